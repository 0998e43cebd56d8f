//! The matrix as heat maps: a table for each scenario, a row for each variant, a column for each machine.

use maud::{Markup, html};

use super::tag;
use crate::judge::verdict::Verdict;
use crate::report::Report;
use crate::report::cells::{Cell, Table};

/// The section.
pub(super) fn section(report: &Report) -> Markup {
    let common = report.layout.common();
    html! {
        @if !common.is_empty() { p { "All runs: " (common) "." } }
        @for (number, table) in report.layout.tables.iter().enumerate() { (heat(report, number, table)) }
        @if report.layout.tables.is_empty() { p { "No run has ended yet." } }
        (legend(report))
    }
}

fn legend(report: &Report) -> Markup {
    let occurs = |verdict: &Verdict| report.runs.iter().any(|run| run.verdict() == *verdict);
    html! {
        ul.legend aria-label="Verdicts that occur" {
            @for verdict in Verdict::ALL.into_iter().filter(occurs) { li { (tag(verdict)) } }
        }
    }
}

fn heat(report: &Report, number: usize, table: &Table) -> Markup {
    let id = format!("matrix-{number}");
    let caption = if table.about.is_empty() { "Verdicts".to_owned() } else { table.title() };
    let row_head: Vec<&str> = table.row_axes.iter().map(|axis| axis.name()).collect();
    html! {
        // Not a caption: that would scroll away with the table.
        h3 id=(id) { (caption) }
        div.scroll tabindex="0" role="region" aria-labelledby=(id) {
            table.heat aria-labelledby=(id) {
                thead { (heads(table, &row_head.join(", "))) }
                tbody {
                    @for (row, cells) in table.cells.iter().enumerate() {
                        tr {
                            th scope="row" { @let name = table.row(row); @if name.is_empty() { "all" } @else { (name) } }
                            @for at in cells {
                                @match at {
                                    Some(at) => (cell(*at, &report.layout.cells[*at])),
                                    None => { td.none { span { "not run" } } }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Heads of the columns: of two axes the outer one spans the inner one's.
fn heads(table: &Table, row_head: &str) -> Markup {
    let inner = |column: &[String]| match (table.column_axes.last(), column.last()) {
        (Some(axis), Some(value)) => axis.says(value),
        _ => "verdicts".to_owned(),
    };
    let mut groups: Vec<(String, usize)> = Vec::new();
    if let [outer, _] = table.column_axes.as_slice() {
        for column in &table.columns {
            let says = outer.says(&column[0]);
            match groups.last_mut() {
                Some((last, count)) if *last == says => *count += 1,
                _ => groups.push((says, 1)),
            }
        }
    }
    html! {
        @if !groups.is_empty() {
            tr {
                th scope="col" rowspan="2" { (row_head) }
                @for (says, count) in &groups { th scope="colgroup" colspan=(count) { (says) } }
            }
            tr { @for column in &table.columns { th scope="col" { (inner(column)) } } }
        } @else {
            tr {
                th scope="col" { (row_head) }
                @for column in &table.columns { th scope="col" { (inner(column)) } }
            }
        }
    }
}

fn cell(at: usize, cell: &Cell) -> Markup {
    let Some((verdict, share)) = cell.headline() else {
        return html! {
            td.cell.v-harness-error style="--mix:12%" {
                a href={ "#cell-" (at) } { b { (cell.harness_errors) } "harness error" small { "says nothing" } }
            }
        };
    };
    // From a tint for a rare defect to a strong one for a certain one; what is well stays in the background.
    let mix = if verdict == Verdict::Pass { 13.0 } else { 12.0 + 28.0 * ratio(share.hits, share.runs) };
    let class = format!("cell v-{}{}", verdict.name(), if cell.unexpected > 0 { " unexpected" } else { "" });
    html! {
        td class=(class) style={ "--mix:" (format!("{mix:.0}")) "%" } {
            a href={ "#cell-" (at) } {
                b { (share.hits) "/" (share.runs) }
                (verdict.name())
                small { (percent(share.low)) "–" (percent(share.high)) " %" }
                @if cell.unexpected > 0 { small { strong { "not expected" } } }
                @if cell.harness_errors > 0 { small { "+" (cell.harness_errors) " harness error" } }
            }
            @if cell.verdicts.len() > 1 { (bar(cell)) }
        }
    }
}

/// The shares of all verdicts of a cell.
fn bar(cell: &Cell) -> Markup {
    let says: Vec<_> = cell.verdicts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
    html! {
        div.bar role="img" aria-label=(says.join(", ")) title=(says.join(", ")) {
            @for (verdict, count) in &cell.verdicts {
                i class={ "v-" (verdict.name()) } style={ "width:" (format!("{:.1}", 100.0 * ratio(*count, cell.judged))) "%" } {}
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of runs")]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// A share in whole per cent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.0}", share * 100.0)
}

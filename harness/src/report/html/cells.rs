//! Every cell with its runs, folded.

use maud::{Markup, html};

use super::matrix::percent;
use super::tag;
use crate::report::cells::Cell;
use crate::report::compare::{duration, short};
use crate::report::run::Run;
use crate::report::text::cut;
use crate::report::{Counted, Report};
use crate::statistics::Share;

/// Rows of runs in a page, over all cells: what is more is in the records.
const RUNS: usize = 4000;

/// The section.
pub(super) fn section(report: &Report) -> Markup {
    let each = (RUNS / report.layout.cells.len().max(1)).max(5);
    html! {
        @for (at, cell) in report.layout.cells.iter().enumerate() {
            details {
                summary {
                    (report.layout.label(cell))
                    @for (verdict, count) in &cell.verdicts { " " span class={ "tag v-" (verdict.name()) } { (count) " " (verdict.name()) } }
                    @if cell.harness_errors > 0 { " " span.tag.v-harness-error { (cell.harness_errors) " harness-error" } }
                }
                // The target is inside, so that a browser that follows a link to it opens the fold.
                div.inside id={ "cell-" (at) } { (figures(cell)) (runs(report, cell, each)) }
            }
        }
    }
}

fn figures(cell: &Cell) -> Markup {
    let share = |share: &Share| {
        format!("{} of {}, {}–{} %", share.hits, share.runs, percent(share.low), percent(share.high))
    };
    html! {
        dl.pairs {
            dt { "failed" } dd { (share(&cell.failures)) }
            @if let Some(expected) = cell.expected { dt { "expected" } dd { (tag(expected)) } }
            @if cell.measures.faults > 0 { dt { "device faults resolved" } dd { (cell.measures.faults) } }
            @if let Some(rate) = cell.measures.fault_rate { dt { "faults a second" } dd { (short(rate)) " (median, guest time)" } }
            @if let Some(retries) = cell.measures.retries { dt { "retries a fault" } dd { (format!("{retries:.2}")) } }
            @if cell.measures.migrations.0 > 0 {
                @let (attempts, pages, moved) = cell.measures.migrations;
                dt { "migrations" } dd { (attempts) " asked for, " (moved) " of " (pages) " pages moved" }
            }
            @for (reason, pages) in &cell.measures.aborts { @if *pages > 0 { dt { "not moved: " (reason) } dd { (pages) " pages" } } }
            @if cell.measures.unswitched_ms > 0 {
                dt { "longest without a context switch" } dd { (duration(cell.measures.unswitched_ms as f64 * 1e6)) }
            }
            @if let Some(latency) = &cell.measures.latency {
                dt { "latency" }
                dd {
                    "p50 " (duration(latency.value_at_quantile(0.5) as f64))
                    ", p99 " (duration(latency.value_at_quantile(0.99) as f64))
                    ", p99.9 " (duration(latency.value_at_quantile(0.999) as f64))
                    ", longest " (duration(latency.max() as f64))
                }
            }
        }
    }
}

fn runs(report: &Report, cell: &Cell, limit: usize) -> Markup {
    html! {
        div.scroll tabindex="0" role="region" aria-label="Runs" {
            table {
                thead {
                    tr {
                        th.n scope="col" { "seed" } th scope="col" { "verdict" } th.n scope="col" { "operations" }
                        th.n scope="col" { "faults" } th.n scope="col" { "host time" } th scope="col" { "finding" }
                        th scope="col" { "console.log, SHA-256" }
                    }
                }
                tbody { @for &index in cell.runs.iter().take(limit) { (run(report, index, &report.runs[index])) } }
            }
        }
        @if cell.runs.len() > limit { p.faint { "and " (Counted(cell.runs.len() - limit, "more run")) " in the records" } }
    }
}

fn run(report: &Report, index: usize, run: &Run) -> Markup {
    let record = &run.record;
    let found = report.findings.iter().position(|found| found.runs.contains(&index));
    let hash = record.files.get("console.log").map(|file| cut(&file.sha256, 13)).unwrap_or_default();
    html! {
        tr {
            th.n scope="row" { (record.run.seed) }
            td.w { (tag(run.verdict())) @if !record.as_expected { " " strong { "not expected" } } }
            td.n { (record.progress.operations) }
            td.n { (record.progress.faults) }
            td.n { (format!("{:.1} s", seconds(record.timings.total_ms))) }
            td.w { @if let Some(number) = found { a href={ "#finding-" (number) } { "finding " (number + 1) } } }
            td.w { code { (hash) } }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "times for people")]
fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

//! Latency and survival: what is drawn, with the figures beside it.

use hdrhistogram::Histogram;
use maud::{Markup, PreEscaped, html};

use super::plot::{self, Line};
use crate::report::cells::{Cell, Table};
use crate::report::compare::duration;
use crate::report::{Error, Report};
use crate::statistics::Survival;

/// Lines in a plot, at most: more cannot be told apart.
const LINES: usize = plot::SERIES.len();

/// Latency of operations that resolved a device fault; nothing if no cell has any.
pub(super) fn latency(report: &Report) -> Result<Option<Markup>, Error> {
    let mut figures = Vec::new();
    for table in &report.layout.tables {
        for column in 0..table.columns.len() {
            let cells = with(report, table, column, |cell| cell.measures.latency.is_some());
            if cells.is_empty() {
                continue;
            }
            let lines: Vec<Line> = cells
                .iter()
                .filter_map(|(_, cell)| cell.measures.latency.as_ref())
                .map(distribution)
                .collect();
            let svg = plot::latency(&lines)?;
            figures.push(figure(&caption(table, column), &svg, &cells));
        }
    }
    if figures.is_empty() {
        return Ok(None);
    }
    Ok(Some(html! {
        p { "Time of an operation that resolved at least one fault on a device page, from the call to its return, in guest time; all runs of a cell together. Dots are p50, p99 and p99.9." }
        div.plots { @for figure in &figures { (figure) } }
        (table(report))
    }))
}

/// Survival by guest time; nothing if no run failed.
pub(super) fn survival(report: &Report) -> Result<Option<Markup>, Error> {
    let mut figures = Vec::new();
    for table in &report.layout.tables {
        for column in 0..table.columns.len() {
            let cells = with(report, table, column, |cell| cell.measures.survival.runs > 0);
            // Where nothing fails there is nothing to see.
            if cells.iter().all(|(_, cell)| cell.measures.survival.failures == 0) {
                continue;
            }
            let lines: Vec<Line> = cells.iter().map(|(_, cell)| curve(&cell.measures.survival)).collect();
            let svg = plot::survival(&lines, "guest seconds since the scenario began")?;
            figures.push(figure(&caption(table, column), &svg, &cells));
        }
    }
    if figures.is_empty() {
        return Ok(None);
    }
    Ok(Some(html! {
        p { "Share of runs that had not failed after so much guest time (Kaplan and Meier), with the 95 % interval. A dot is a run that ended without a failure: nobody knows what it would have done later. Machines on which nothing failed are left out." }
        div.plots { @for figure in &figures { (figure) } }
        (survival_table(report))
    }))
}

/// Dots of runs without a failure, of a line, at most.
const DOTS: usize = 40;

#[expect(clippy::cast_precision_loss, reason = "guest milliseconds are far below 2^52")]
fn curve(survival: &Survival) -> Line {
    let seconds = |ms: u64| ms as f64 / 1000.0;
    let last =
        survival.steps.last().map_or(0, |step| step.at).max(survival.censored.last().copied().unwrap_or(0));
    let mut line = Line { points: vec![(0.0, 1.0)], ..Line::default() };
    let (mut level, mut band) = (1.0, (1.0, 1.0));
    if !survival.steps.is_empty() {
        line.band.push((0.0, 1.0, 1.0));
    }
    for step in &survival.steps {
        let at = seconds(step.at);
        line.points.extend([(at, level), (at, step.survival)]);
        line.band.extend([(at, band.0, band.1), (at, step.low, step.high)]);
        (level, band) = (step.survival, (step.low, step.high));
    }
    line.points.push((seconds(last), level));
    if !survival.steps.is_empty() {
        line.band.push((seconds(last), band.0, band.1));
    }
    line.marks = survival.censored.iter().take(DOTS).map(|&at| (seconds(at), survival.at(at))).collect();
    line
}

fn survival_table(report: &Report) -> Markup {
    let cells = || report.layout.cells.iter().filter(|cell| cell.measures.survival.failures > 0);
    html! {
        div.scroll tabindex="0" role="region" aria-label="Time to failure by cell" {
            table {
                thead {
                    tr {
                        th scope="col" { "cell" } th.n scope="col" { "failed" } th.n scope="col" { "first failure" }
                        th.n scope="col" { "median to failure" }
                    }
                }
                tbody {
                    @for cell in cells() {
                        @let survival = &cell.measures.survival;
                        tr {
                            th scope="row" { (report.layout.label(cell)) }
                            td.n { (survival.failures) " of " (survival.runs) }
                            td.n { @if let Some(first) = survival.steps.first() { (time(first.at)) } }
                            td.n { @if let Some(median) = survival.median() { (time(median)) } @else { "not reached" } }
                        }
                    }
                }
            }
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "guest milliseconds are far below 2^52")]
fn time(ms: u64) -> String {
    duration(ms as f64 * 1e6)
}

/// The cells of a column with their row's name.
fn with<'a>(
    report: &'a Report,
    table: &Table,
    column: usize,
    has: impl Fn(&Cell) -> bool,
) -> Vec<(String, &'a Cell)> {
    let cell = |row: usize| Some((table.row(row), &report.layout.cells[table.cells[row][column]?]));
    (0..table.rows.len()).filter_map(cell).filter(|(_, cell)| has(cell)).take(LINES).collect()
}

fn caption(table: &Table, column: usize) -> String {
    let says = table.column_axes.iter().zip(&table.columns[column]).map(|(axis, value)| axis.says(value));
    let parts: Vec<_> =
        Some(table.title()).filter(|title| !title.is_empty()).into_iter().chain(says).collect();
    if parts.is_empty() { "All runs".to_owned() } else { parts.join(", ") }
}

fn figure(caption: &str, svg: &str, lines: &[(String, &Cell)]) -> Markup {
    html! {
        figure {
            figcaption { (caption) }
            div.plot role="img" aria-label={ (caption) ": a line for each variant; the figures are in the table below" } { (PreEscaped(svg)) }
            ul.series {
                @for (index, (name, _)) in lines.iter().enumerate() {
                    li style={ "--s:var(--s" (index % LINES) ")" } { @if name.is_empty() { "all runs" } @else { (name) } }
                }
            }
        }
    }
}

/// A histogram as a line over nines.
fn distribution(histogram: &Histogram<u64>) -> Line {
    let nines = |quantile: f64| -(1.0 - quantile).log10();
    let at = |quantile: f64| (nines(quantile), histogram.value_at_quantile(quantile) as f64);
    // To the last nine that at least one operation stands for.
    let last = (histogram.len() as f64).log10().clamp(1.0, 6.0);
    let steps = 60;
    let points =
        (0..=steps).map(|step| at(1.0 - 10f64.powf(-last * f64::from(step) / f64::from(steps)))).collect();
    let marks = [0.5, 0.99, 0.999].into_iter().filter(|&quantile| nines(quantile) <= last).map(at).collect();
    Line { points, band: Vec::new(), marks }
}

fn table(report: &Report) -> Markup {
    let cells =
        || report.layout.cells.iter().filter_map(|cell| Some((cell, cell.measures.latency.as_ref()?)));
    html! {
        div.scroll tabindex="0" role="region" aria-label="Latency by cell" {
            table {
                thead {
                    tr {
                        th scope="col" { "cell" } th.n scope="col" { "operations" } th.n scope="col" { "p50" } th.n scope="col" { "p99" }
                        th.n scope="col" { "p99.9" } th.n scope="col" { "longest" }
                    }
                }
                tbody {
                    @for (cell, latency) in cells() {
                        tr {
                            th scope="row" { (report.layout.label(cell)) }
                            td.n { (latency.len()) }
                            @for quantile in [0.5, 0.99, 0.999] { td.n { (duration(latency.value_at_quantile(quantile) as f64)) } }
                            td.n { (duration(latency.max() as f64)) }
                        }
                    }
                }
            }
        }
    }
}

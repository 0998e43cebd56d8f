//! The report as one HTML page: no script, no font, no picture from elsewhere, and a policy in its head that says so to the
//! browser. `maud` escapes everything that is not marked as markup, and marked is only what this module draws itself.

mod cells;
mod comparison;
mod finding;
mod matrix;
mod plot;
mod plots;
mod provenance;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::{Counted, Error, Report};
use crate::judge::verdict::Verdict;

const STYLE: &str = include_str!("style.css");

/// Nothing is loaded and nothing runs, whatever a guest managed to write: the page's own style and pictures in the page.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'";

/// Places of the page that something could not be read from, at most.
const TROUBLES: usize = 50;

/// The page.
pub(super) fn page(report: &Report) -> Result<String, Error> {
    let latency = plots::latency(report)?;
    let survival = plots::survival(report)?;
    let sections: Vec<(&str, &str, Markup)> = [
        ("matrix", "Matrix", Some(matrix::section(report))),
        ("comparison", "Comparison", comparison::section(report)),
        ("findings", "Findings", Some(finding::section(report))),
        ("latency", "Latency", latency),
        ("survival", "Survival", survival),
        ("cells", "Cells and runs", Some(cells::section(report))),
        ("provenance", "Provenance", Some(provenance::section(report))),
        ("reading", "How to read this", Some(reading(report))),
    ]
    .into_iter()
    .filter_map(|(id, name, markup)| Some((id, name, markup?)))
    .collect();
    let title = title(report);
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="generator" content={ "hmmstorm " (env!("CARGO_PKG_VERSION")) };
                title { "hmmstorm: " (title) }
                // Otherwise a browser asks the server for one.
                link rel="icon" href="data:,";
                style { (PreEscaped(STYLE)) (PreEscaped(plot::rules())) }
            }
            body {
                a.skip href="#matrix" { "Skip to the matrix" }
                div.wrap {
                    header.top {
                        p.kicker { "hmmstorm report" }
                        h1 { (title) }
                        p.lead { (report.headline()) "." }
                        (tiles(report))
                        nav aria-label="Sections" {
                            ul { @for (id, name, _) in &sections { li { a href={ "#" (id) } { (name) } } } }
                        }
                    }
                    main {
                        (missing(report))
                        @for (id, name, markup) in &sections {
                            section aria-labelledby=(id) { h2 id=(id) { (name) } (markup) }
                        }
                    }
                    footer {
                        p { "Made by hmmstorm " (env!("CARGO_PKG_VERSION")) " from run records; the same records give the same page." }
                    }
                }
            }
        }
    };
    Ok(page.into_string())
}

/// What the page is about: the scenarios, on the kernels.
fn title(report: &Report) -> String {
    let mut scenarios: Vec<&str> = Vec::new();
    let mut kernels: Vec<&str> = Vec::new();
    for run in &report.runs {
        let (scenario, kernel) =
            (run.record.run.scenario.as_str(), run.image("kernel_version").unwrap_or("?"));
        if !scenarios.contains(&scenario) {
            scenarios.push(scenario);
        }
        if !kernels.contains(&kernel) {
            kernels.push(kernel);
        }
    }
    let list = |what: &[&str]| match what {
        [] => "nothing yet".to_owned(),
        [rest @ .., last] if !rest.is_empty() && rest.len() < 4 => format!("{} and {last}", rest.join(", ")),
        [only] => (*only).to_owned(),
        many => format!("{} scenarios", many.len()),
    };
    if kernels.is_empty() {
        list(&scenarios)
    } else {
        format!("{} on Linux {}", list(&scenarios), kernels.join(", "))
    }
}

fn tiles(report: &Report) -> Markup {
    let unexpected = report.count(|run| !run.record.as_expected && run.verdict() != Verdict::HarnessError);
    let harness = report.count(|run| run.verdict() == Verdict::HarnessError && !run.record.as_expected);
    html! {
        dl.tiles {
            div { dt { "runs" } dd { (report.runs.len()) } }
            div { dt { "cells" } dd { (report.layout.cells.len()) } }
            div { dt { "findings" } dd { (report.findings.iter().filter(|f| f.verdict != Verdict::HarnessError).count()) } }
            div.bad[unexpected > 0] { dt { "unexpected verdicts" } dd { (unexpected) } }
            @if harness > 0 { div { dt { "failures of the bench" } dd { (harness) } } }
        }
    }
}

fn missing(report: &Report) -> Markup {
    html! {
        @if !report.missing.is_empty() {
            div.notice role="note" {
                p { "The plan is not done: it asks for more runs in " (Counted(report.missing.len(), "cell")) "." }
                details {
                    summary { "Which" }
                    div.inside {
                        ul {
                            @for cell in report.missing.iter().take(TROUBLES) {
                                li { (cell.cell) ": " (cell.done) " of " (cell.asked) }
                            }
                            @if report.missing.len() > TROUBLES { li { "and " (report.missing.len() - TROUBLES) " more" } }
                        }
                    }
                }
            }
        }
        @if !report.troubles.is_empty() {
            div.notice role="note" {
                p { "Something is missing. Everything below is of the runs that are there." }
                ul {
                    @for trouble in report.troubles.iter().take(TROUBLES) {
                        li { code { (trouble.place) } ": " (trouble.what) }
                    }
                    @if report.troubles.len() > TROUBLES { li { "and " (report.troubles.len() - TROUBLES) " more" } }
                }
            }
        }
        @if !report.conflicts.is_empty() {
            div.notice role="note" {
                p { "Deterministic runs came out in more than one way. Either the bench is not deterministic there, or the host changed what it runs." }
                ul { @for conflict in report.conflicts.iter().take(TROUBLES) { li { (conflict) } } }
            }
        }
    }
}

/// What the words mean, of those that occur.
fn reading(report: &Report) -> Markup {
    let says = |verdict: Verdict| match verdict {
        Verdict::Pass => "the workload finished and every check held",
        Verdict::Livelock => {
            "nothing completed any more while CPUs spun in one kernel call tree, and the kernel's own detector spoke of them; or while device faults were made again and again in vain, until the driver gave up"
        }
        Verdict::Deadlock => "nothing completed any more, all CPUs were idle, tasks slept uninterruptibly",
        Verdict::Starvation => "progress in total, but a worker had none for too long",
        Verdict::Slow => "progress, but not enough of it in the time",
        Verdict::DeviceStall => "the GPU held queued work and did not complete it",
        Verdict::Corruption => {
            "a page did not hold what was last written to it, or an account did not add up"
        }
        Verdict::Crash => "the kernel reported a defect: oops, BUG, WARN, bad page, sanitizer",
        Verdict::HarnessError => "the bench failed; it says nothing of the kernel and counts neither way",
    };
    let occurs = |verdict: &Verdict| report.runs.iter().any(|run| run.verdict() == *verdict);
    html! {
        dl.pairs {
            @for verdict in Verdict::ALL.into_iter().filter(occurs) {
                dt { (tag(verdict)) } dd { (says(verdict)) }
            }
            dt { "3/20, 5–36 %" }
            dd { "3 of 20 runs got this verdict; the true share is between 5 and 36 % with 95 % confidence (Wilson's score interval)" }
            dt { "a thick frame" } dd { "the cell has verdicts that were not expected of it" }
            dt { "a finding" }
            dd { "runs with the same verdict, the same stable stack frames and the same thing waited for, whatever their seed" }
        }
        p { "How each verdict is reached is in " code { "docs/verdicts.md" } " of hmmstorm's source." }
    }
}

/// A verdict as a word with its colour.
fn tag(verdict: Verdict) -> Markup {
    html! { span class={ "tag v-" (verdict.name()) } { (verdict.name()) } }
}

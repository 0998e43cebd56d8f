//! Findings: each with who waits for whom, stacks, the command that shows it again.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{Markup, html};

use super::tag;
use crate::judge::cycle::Cycle;
use crate::judge::structures::{Closing, Link};
use crate::judge::verdict::{Source, Verdict};
use crate::report::Counted;
use crate::report::Report;
use crate::report::findings::{Found, evidence, replay, reproducer, stacks};
use crate::report::text::one_line;

/// Findings told in full; of the others there is the name.
const FULL: usize = 40;
/// Statements of a cycle, and cells of a finding, at most.
const STATEMENTS: usize = 40;
const CELLS: usize = 24;

/// The section.
pub(super) fn section(report: &Report) -> Markup {
    html! {
        @if report.findings.is_empty() { p { "No run found anything." } }
        @for (number, found) in report.findings.iter().enumerate() {
            @if number < FULL { (finding(report, number, found)) }
            @else { p id={ "finding-" (number) } { (tag(found.verdict)) " " (found.title) " (" (Counted(found.runs.len(), "run")) ")" } }
        }
    }
}

fn finding(report: &Report, number: usize, found: &Found) -> Markup {
    let run = &report.runs[found.shown_by];
    let record = &run.record;
    let picture = found.picture(&report.runs);
    html! {
        article class={ "finding v-" (found.verdict.name()) } id={ "finding-" (number) } {
            h3 { (found.title) }
            p.facts {
                (tag(found.verdict))
                @if found.unexpected > 0 && found.verdict != Verdict::HarnessError { strong { (found.often()) } }
                @else { span { (found.often()) } }
                span { "in " (found.scenarios(&report.runs).join(", ")) }
                @if record.identity.is_some() { code.faint { (found.identity) } }
            }
            @if record.title.is_some() { p { (record.judgement.reason) } }
            div.split.pictured[picture.is_some()] {
                @if let Some(svg) = &picture {
                    figure.picture {
                        // As an image its style and its ids are its own, and whatever it holds cannot run.
                        img src={ "data:image/svg+xml;base64," (STANDARD.encode(svg)) } alt=(alt(found, report)) loading="lazy";
                        figcaption.faint.small { "Read from the guest's memory when it stood still." }
                    }
                }
                div {
                    @if let Some(cycle) = &record.cycle { (statements(cycle)) }
                    @else { (evidence_list(&evidence(run))) }
                    @if let Some(structures) = record.structures.as_ref().filter(|s| !s.statements.is_empty()) {
                        details {
                            summary { "The same from the guest's data structures" }
                            div.inside {
                                ol.statements { @for says in structures.statements.iter().take(STATEMENTS) { li { (says) } } }
                                @for note in &structures.reading.notes { p.faint { "Not read: " (note) } }
                            }
                        }
                    }
                }
            }
            h4 { "See it again" }
            pre { code { (reproducer(run)) } }
            @if let Some(replay) = replay(run) {
                p { "Or from its capsule, one file that holds all it takes:" }
                pre { code { (replay) } }
            }
            @if record.cycle.is_some() && !record.judgement.evidence.is_empty() {
                details { summary { "Evidence" } div.inside { (evidence_list(&evidence(run))) } }
            }
            (stack_list(report, found))
            details {
                summary { "Where it was found" }
                div.inside { (places(report, found)) }
            }
        }
    }
}

/// The picture in a sentence.
fn alt(found: &Found, report: &Report) -> String {
    let closing = report.runs[found.shown_by].record.structures.as_ref().and_then(|structures| {
        let Closing { holder, link, spinner, .. } = structures.closing()?;
        let waits = match link {
            Link::Work(wait) => format!("waits for {} on CPU {}", wait.function, wait.cpu),
            Link::Cpu(ready) => format!("is ready to run on CPU {}", ready.cpu),
        };
        Some(format!(
            "Cycle: {} spins on CPU {} for a folio that {} has locked, which {waits}, which the spinner keeps.",
            spinner.task, spinner.cpu, holder.task
        ))
    });
    closing.unwrap_or_else(|| "Who waits for whom".to_owned())
}

fn statements(cycle: &Cycle) -> Markup {
    html! {
        h4 { "Who waits for whom" }
        ol.statements {
            @for statement in cycle.statements.iter().take(STATEMENTS) {
                li {
                    (statement.says)
                    @match (statement.line, statement.source) {
                        (Some(line), _) => { " " span.at { "console.log:" (line) } },
                        (None, Source::Samples) => { " " span.at { "CPU samples" } },
                        (None, Source::Memory) => { " " span.at { "guest memory" } },
                        (None, _) => {},
                    }
                }
            }
        }
        @for gap in &cycle.gaps { p.faint { "Not observed: " (gap) } }
    }
}

fn evidence_list(evidence: &[String]) -> Markup {
    html! { ul { @for says in evidence.iter().take(STATEMENTS) { li { (says) } } } }
}

fn stack_list(report: &Report, found: &Found) -> Markup {
    let stacks = stacks(&report.runs[found.shown_by]);
    html! {
        @if !stacks.is_empty() {
            details {
                summary { (Counted(stacks.len(), "stack")) }
                div.inside {
                    @for stack in &stacks {
                        h4 { (stack.title) @if let Some(line) = stack.line { " " span.faint { "console.log:" (line) } } }
                        pre { @for frame in &stack.frames { (one_line(frame)) "\n" } }
                    }
                }
            }
        }
    }
}

fn places(report: &Report, found: &Found) -> Markup {
    html! {
        ul {
            @for &(at, count) in found.cells.iter().take(CELLS) {
                @let cell = &report.layout.cells[at];
                li { a href={ "#cell-" (at) } { (report.layout.label(cell)) } ": " (count) " of " (cell.runs.len()) }
            }
            @if found.cells.len() > CELLS { li { "and " (Counted(found.cells.len() - CELLS, "more cell")) } }
        }
        @if let Some(folder) = &report.runs[found.shown_by].record.folder {
            p { "Evidence of the run shown (seed " (report.runs[found.shown_by].record.run.seed) "): " code { (folder.display()) } }
        }
    }
}

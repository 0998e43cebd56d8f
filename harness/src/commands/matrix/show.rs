//! What `hmmstorm matrix` prints.

use std::fmt::Write;
use std::path::Path;

use crate::judge::record::Record;
use crate::judge::verdict::Verdict;
use crate::matrix::schedule::Task;
use crate::matrix::{CellSpec, Plan, Schedule, Shard};
use crate::records::{Cell, Finding, cells};

/// `--dry-run`: every run of a shard, cell by cell, as commands.
pub(super) fn plan(plan: &Plan, cells: &[CellSpec], shard: Shard) -> String {
    let tasks: Vec<Task> = cells.iter().map(|cell| task(cell, 1, 0)).collect();
    let schedule = Schedule::new(&tasks, shard, 0, 1, 0);
    let mut text = String::new();
    let mut runs = 0;
    let mut group = "";
    for (index, cell) in cells.iter().enumerate() {
        let seeds: Vec<u64> = schedule.seeds(index).collect();
        if seeds.is_empty() {
            continue;
        }
        runs += seeds.len();
        if cell.group != group {
            group = &cell.group;
            let about = plan.groups.iter().find(|g| g.name == group).map_or("", |g| g.about.trim());
            let _ = writeln!(text, "\n# {group}: {}", about.replace('\n', "\n# "));
        }
        let stop = if cell.stop.is_some() { ", fewer if it is clear" } else { "" };
        let _ = writeln!(text, "# {}: {} runs{stop}", cell.name(), seeds.len());
        for seed in seeds {
            let _ = writeln!(text, "{}", cell.command(seed));
        }
    }
    let _ = writeln!(text, "\n# {runs} runs at most, of {} cells, shard {shard}", cells.len());
    text
}

/// The schedule's view of a cell on a machine of so many cores.
pub(super) fn task(cell: &CellSpec, cores: u32, memory: u64) -> Task {
    // In deterministic mode one host thread runs all CPUs.
    let busy = match cell.mode {
        crate::matrix::Mode::Deterministic => 1,
        crate::matrix::Mode::RealTime => cell.cpus.min(cores),
    };
    Task { first_seed: cell.first_seed, seeds: cell.seeds, stop: cell.stop, cores: busy, memory }
}

/// Runs that no try made up for.
pub(super) fn harness_errors(records: &[Record]) -> usize {
    let failed = |record: &&Record| record.judgement.verdict == Verdict::HarnessError && !record.as_expected;
    records.iter().filter(failed).count()
}

/// A line a cell: how its runs ended, and what was not as expected.
pub(super) fn summary(records: &[Record], specs: &[CellSpec]) -> String {
    let mut text = String::new();
    let cells = cells(records);
    for cell in &cells {
        let _ = writeln!(text, "{}", line(cell));
    }
    let unexpected: Vec<_> = records.iter().filter(|record| !record.as_expected).collect();
    let _ = writeln!(
        text,
        "{} runs in {} cells of {}; {} not as expected",
        records.len(),
        cells.len(),
        specs.len(),
        unexpected.len()
    );
    for record in unexpected.iter().take(20) {
        let folder = record.folder.as_ref().map_or(String::new(), |folder| folder.display().to_string());
        let _ = writeln!(
            text,
            "  {} instead of {}: run {}, seed {}: {} ({folder})",
            record.judgement.verdict, record.expected, record.id, record.run.seed, record.judgement.reason
        );
    }
    text
}

/// A finding with the command that makes it happen again.
pub(super) fn finding(finding: &Finding, out: &Path) -> String {
    let replay = finding
        .capsule
        .as_ref()
        .map_or(String::new(), |capsule| format!("\n  hmmstorm replay {}", out.join(capsule).display()));
    let variants = finding.variants.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    format!(
        "finding {} in {} runs of {variants}: {}{replay}",
        finding.identity,
        finding.runs.len(),
        finding.title
    )
}

fn line(cell: &Cell<'_>) -> String {
    let key = &cell.key;
    let control = key.control.iter().map(|control| format!("/{control}")).collect::<String>();
    let verdicts: Vec<String> =
        cell.verdicts().keys().map(|verdict| format!("{verdict} {}", cell.share(*verdict))).collect();
    let errors = match cell.harness_errors {
        0 => String::new(),
        n => format!("; {n} harness errors"),
    };
    format!(
        "{}{control} {} {} preempt={} {} CPUs {}: {}{errors}",
        key.scenario,
        key.kernel,
        key.variant,
        key.preempt,
        key.cpus,
        key.mode,
        verdicts.join(", ")
    )
}

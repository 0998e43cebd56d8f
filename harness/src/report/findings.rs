//! Findings: what went wrong, each once, however many runs found it; and the command that shows it again.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::cells::Layout;
use super::run::Run;
use super::text::{clean, one_line, shell};
use crate::capsule::kernel_options;
use crate::judge::structures;
use crate::judge::verdict::{Verdict, Weight};

/// What one or more runs found.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its identity: verdict and stable frames, hashed.
    pub identity: String,
    /// Its name in a line.
    pub title: String,
    /// What the runs were called.
    pub verdict: Verdict,
    /// Indices of the runs that found it.
    pub runs: Vec<usize>,
    /// Indices of the cells of those runs, with the number of them.
    pub cells: Vec<(usize, usize)>,
    /// Of these runs, those that were not expected to show it.
    pub unexpected: usize,
    /// Index of the run that shows it best.
    pub shown_by: usize,
}

impl Found {
    /// Findings of all runs: the unexpected ones first, then by number of runs.
    #[must_use]
    pub fn all(runs: &[Run], layout: &Layout) -> Vec<Self> {
        let mut by_identity: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (index, run) in runs.iter().enumerate().filter(|(_, run)| run.verdict() != Verdict::Pass) {
            by_identity.entry(identity(run)).or_default().push(index);
        }
        let mut found: Vec<Self> = by_identity
            .into_iter()
            .filter_map(|(identity, members)| {
                let shown_by = members.iter().copied().max_by_key(|&index| {
                    // Of equally good ones the first: the lowest seed of the first cell.
                    (quality(&runs[index]), std::cmp::Reverse(index))
                })?;
                let record = &runs[shown_by].record;
                let of_cell = |(at, cell): (usize, &super::cells::Cell)| {
                    let count = cell.runs.iter().filter(|run| members.contains(run)).count();
                    (count > 0).then_some((at, count))
                };
                Some(Self {
                    identity,
                    title: one_line(record.title.as_deref().unwrap_or(&record.judgement.reason)),
                    verdict: record.judgement.verdict,
                    cells: layout.cells.iter().enumerate().filter_map(of_cell).collect(),
                    unexpected: members.iter().filter(|&&index| !runs[index].record.as_expected).count(),
                    runs: members,
                    shown_by,
                })
            })
            .collect();
        found.sort_by_key(|found| {
            let failed_bench = found.verdict == Verdict::HarnessError;
            (failed_bench, found.unexpected == 0, std::cmp::Reverse(found.runs.len()))
        });
        found
    }

    /// How often, and whether that was expected, in words.
    #[must_use]
    pub fn often(&self) -> String {
        let runs = super::Counted(self.runs.len(), "run");
        match self.unexpected {
            0 => format!("{runs}, as expected"),
            n if n == self.runs.len() => format!("{runs}, not expected"),
            n => format!("{runs}, {n} of them not expected"),
        }
    }

    /// The scenarios in which it was found.
    #[must_use]
    pub fn scenarios<'a>(&self, runs: &'a [Run]) -> Vec<&'a str> {
        let names: BTreeSet<_> =
            self.runs.iter().map(|&index| runs[index].record.run.scenario.as_str()).collect();
        names.into_iter().collect()
    }

    /// The cycle as a picture, if it was read from the guest's memory.
    #[must_use]
    pub fn picture(&self, runs: &[Run]) -> Option<String> {
        structures::svg(runs[self.shown_by].record.structures.as_ref()?)
    }
}

/// The identity of a run's finding. What has none (the bench failed) is told apart by its reason, whatever page, address or
/// process it is about.
fn identity(run: &Run) -> String {
    let record = &run.record;
    record.identity.clone().unwrap_or_else(|| {
        format!("{}: {}", record.judgement.verdict, without_numbers(&record.judgement.reason))
    })
}

/// A text with `N` for every number, hexadecimal ones included.
fn without_numbers(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c: char| c.is_ascii_digit()) {
        plain.push_str(&rest[..at]);
        plain.push('N');
        let number = rest[at..].strip_prefix("0x").unwrap_or(&rest[at..]);
        let hexadecimal = number.len() < rest.len() - at;
        let end = |c: char| !(c.is_ascii_digit() || hexadecimal && c.is_ascii_hexdigit());
        rest = number.find(end).map_or("", |end| &number[end..]);
    }
    plain + rest
}

/// How much a run has to show of its finding.
fn quality(run: &Run) -> u32 {
    let record = &run.record;
    let closed = record.structures.as_ref().is_some_and(|structures| structures.closed);
    let named = record.cycle.as_ref().is_some_and(|cycle| cycle.closed);
    4 * u32::from(closed) + 2 * u32::from(named) + u32::from(record.run.mode == "deterministic")
}

/// A stack to show, leaf first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// Whose, and when.
    pub title: String,
    /// Functions with offsets.
    pub frames: Vec<String>,
    /// Line of `console.log`.
    pub line: Option<u64>,
}

/// Stacks shown of a finding, and frames shown of a stack.
const STACKS: usize = 6;
const FRAMES: usize = 24;

/// The stacks that matter of a run: of the kernel's complaints, and of CPUs that spin.
#[must_use]
pub fn stacks(run: &Run) -> Vec<Stack> {
    let record = &run.record;
    let mut stacks = Vec::new();
    let mut seen = BTreeSet::new();
    for complaint in record.complaints.iter().filter(|complaint| !complaint.stack.is_empty()) {
        let frames: Vec<String> = complaint.stack.iter().take(FRAMES).map(ToString::to_string).collect();
        if seen.insert(frames.clone()) {
            stacks.push(Stack { title: one_line(&complaint.title), frames, line: Some(complaint.line) });
        }
    }
    for cpu in record.cpus.iter().filter(|cpu| cpu.spins) {
        let title = format!(
            "CPU {}: {} of {} samples in this call tree, {} addresses",
            cpu.cpu, cpu.in_tree, cpu.judged, cpu.distinct_ips
        );
        stacks.push(Stack { title, frames: cpu.trunk.iter().take(FRAMES).cloned().collect(), line: None });
    }
    stacks.truncate(STACKS);
    stacks
}

/// A sentence of evidence with its place, as `hmmstorm storm` prints it.
#[must_use]
pub fn evidence(run: &Run) -> Vec<String> {
    let judgement = &run.record.judgement;
    let said = judgement.evidence.iter().map(|evidence| {
        let word = match evidence.weight {
            Weight::Missing => "missing: ",
            Weight::Against => "against: ",
            Weight::For | Weight::Note => "",
        };
        let line = evidence.line.map_or(String::new(), |line| format!(" [console.log:{line}]"));
        format!("{word}{}{line}", one_line(&evidence.says))
    });
    said.chain(judgement.also.iter().map(|also| format!("also: {}", one_line(also)))).collect()
}

/// The command that does the same run again, from what the guest was booted with.
#[must_use]
pub fn reproducer(run: &Run) -> String {
    let record = &run.record;
    let asked = &record.run;
    let mut words = vec!["hmmstorm".to_owned(), "storm".to_owned(), asked.scenario.clone()];
    let mut option = |name: &str, value: &str| words.extend([name.to_owned(), value.to_owned()]);
    if let Some(kernel) = run.image("kernel_version").filter(|_| run.image("tree").is_none()) {
        option("--kernel", kernel);
    }
    for (name, value) in kernel_options(record) {
        option(name, &value);
    }
    if let Some(flavour) = run.image("flavour").filter(|flavour| *flavour != "default") {
        option("--flavour", flavour);
    }
    if let Some(control) = &asked.control {
        option("--control", control);
    }
    option("--preempt", &asked.preempt);
    option("--cpus", &asked.cpus.to_string());
    option("--gpus", &asked.gpus.to_string());
    if asked.profile != "smoke" {
        option("--profile", &asked.profile);
    }
    for word in record.provenance.kernel_command_line.split_whitespace() {
        if let Some(parameter) = word.strip_prefix("storm.p.") {
            option("--param", parameter);
        }
    }
    if let Some(chaos) = &asked.chaos {
        option("--chaos", chaos);
    }
    option("--seed", &asked.seed.to_string());
    if asked.mode == "deterministic" {
        words.push("--deterministic".into());
    }
    if record.judgement.verdict != Verdict::Pass {
        words.extend(["--expect".into(), record.judgement.verdict.to_string()]);
    }
    words.iter().map(|word| shell(word)).collect::<Vec<_>>().join(" ")
}

/// The command that does it from the run's capsule, where there is one.
#[must_use]
pub fn replay(run: &Run) -> Option<String> {
    let capsule = run.capsule.as_ref()?;
    Some(format!("hmmstorm replay {}", shell(&clean(&capsule.to_string_lossy()))))
}

/// A patch of a run's kernel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Patch {
    /// `abstraction`, `variant NAME` or `user`.
    pub origin: String,
    /// File name.
    pub name: String,
    /// Its SHA-256.
    pub sha256: String,
}

/// The patches of a run's kernel, in order of application.
#[must_use]
pub fn patches(run: &Run) -> Vec<Patch> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let patches = run.record.provenance.image.get("patches").and_then(Value::as_array);
    let patch = |patch: &Value| {
        let origin = match patch.get("origin") {
            Some(Value::String(origin)) => origin.clone(),
            Some(Value::Object(of)) => of
                .iter()
                .map(|(kind, name)| format!("{kind} {}", name.as_str().unwrap_or_default()))
                .collect(),
            _ => "unknown".to_owned(),
        };
        let sha256 = patch.get("sha256").and_then(text).unwrap_or_default();
        Some(Patch { origin, name: patch.get("name").and_then(text)?, sha256 })
    };
    patches.into_iter().flatten().filter_map(patch).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_the_bench_differ_in_words_and_not_in_numbers() {
        assert_eq!(without_numbers("page 12 at 0x7f76f953e000: busy (16)"), "page N at N: busy (N)");
        assert_eq!(without_numbers("no number"), "no number");
        assert_eq!(without_numbers("faulter3@cpu1"), "faulterN@cpuN");
        assert_eq!(without_numbers("0x"), "N");
    }
}

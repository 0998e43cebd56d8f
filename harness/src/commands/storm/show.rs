//! What `hmmstorm storm` prints: progress while a run goes on, a line for each run, a summary.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{Context, Verbosity};
use crate::judge::record::Record;
use crate::judge::verdict::{Phase, Verdict, Weight};
use crate::statistics::Share;

/// Progress of one run, on stderr: a moving line on a terminal, a line at each stage elsewhere.
#[derive(Debug)]
pub(super) struct Progress<'a> {
    ctx: &'a Context,
    bar: Option<ProgressBar>,
    name: String,
    stage: &'static str,
}

impl<'a> Progress<'a> {
    /// For the run of this name.
    pub(super) fn new(ctx: &'a Context, name: String) -> Self {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let bar = (terminal && ctx.verbosity >= Verbosity::Normal).then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        let mut progress = Self { ctx, bar, name, stage: "" };
        progress.stage("boots", String::new());
        progress
    }

    /// Shows how far the run has come.
    pub(super) fn phase(&mut self, phase: Phase) {
        match phase {
            Phase::Booting => self.stage("boots", String::new()),
            Phase::Binding => self.stage("binds the GPUs", String::new()),
            Phase::Running { progress, stalled } => {
                let mut detail = format!(
                    ": round {}, {} operations, {} device faults",
                    progress.round, progress.operations, progress.faults
                );
                if stalled >= Duration::from_secs(2) {
                    let _ = write!(detail, "; nothing completed for {:.0} s", stalled.as_secs_f64());
                }
                self.stage("storms", detail);
            }
            Phase::Ending => self.stage("ends", String::new()),
        }
    }

    fn stage(&mut self, stage: &'static str, detail: String) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{} {stage}{detail}", self.name)),
            None if self.stage != stage => self.ctx.detail(format_args!("{} {stage}", self.name)),
            None => {}
        }
        self.stage = stage;
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The line of a run, and below it what a reader wants to know of anything but a plain pass.
pub(super) fn run(record: &Record, folder: &Path) -> String {
    let mark = if record.as_expected { "" } else { ", unexpected" };
    let Record { judgement, progress, timings, .. } = record;
    let mut text = format!(
        "seed {}: {}{mark} after {:.1} s ({:.1} s to the GPUs bound); {} operations, {} device faults\n",
        record.run.seed,
        judgement.verdict,
        seconds(timings.verdict_ms),
        seconds(timings.bound_ms.unwrap_or(0)),
        progress.operations,
        progress.faults,
    );
    if let Some(recovered) = &judgement.recovered {
        let _ = writeln!(
            text,
            "  progress came back {} time(s), after {:.1} s at the longest (round {})",
            recovered.times,
            seconds(recovered.longest_ms),
            recovered.round
        );
    }
    if judgement.verdict != Verdict::Pass {
        let _ = writeln!(text, "  {}", judgement.reason);
        if let Some(identity) = &record.identity {
            let _ = writeln!(text, "  finding {identity}: {}", record.title.as_deref().unwrap_or_default());
        }
        match &record.cycle {
            Some(cycle) => {
                text.push_str(&cycle.to_string());
                structures(record, &mut text);
            }
            None => {
                for evidence in judgement.evidence.iter().filter(|evidence| evidence.weight != Weight::Note) {
                    let word = match evidence.weight {
                        Weight::Missing => "missing: ",
                        Weight::Against => "against: ",
                        Weight::For | Weight::Note => "",
                    };
                    let line = evidence.line.map_or(String::new(), |line| format!(" [console.log:{line}]"));
                    let _ = writeln!(text, "  - {word}{}{line}", evidence.says);
                }
            }
        }
        for also in judgement.also.iter().take(4) {
            let _ = writeln!(text, "  also: {also}");
        }
    }
    if record.run.mode == "deterministic" {
        for (name, hash) in &record.files {
            let _ = writeln!(text, "  sha256 {}  {name}", hash.sha256);
        }
    }
    if judgement.verdict != Verdict::Pass || !record.as_expected {
        let _ = writeln!(text, "  evidence: {}", folder.display());
    }
    text
}

/// What the guest's memory says of the cycle.
fn structures(record: &Record, text: &mut String) {
    let Some(structures) = &record.structures else { return };
    let _ = writeln!(
        text,
        "  the same from the guest's memory{}:",
        if structures.closed { "" } else { ", as far as it goes" }
    );
    for says in &structures.statements {
        let _ = writeln!(text, "  - {says}");
    }
    for note in &structures.reading.notes {
        let _ = writeln!(text, "  - not read: {note}");
    }
}

#[expect(clippy::cast_precision_loss, reason = "times for people")]
fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

/// How often each verdict came, with its interval.
#[derive(Debug, serde::Serialize)]
pub(super) struct Summary {
    /// Runs that ended, and how; sorted by verdict.
    pub(super) verdicts: BTreeMap<Verdict, Share>,
    /// Runs that got the expected verdict. Harness errors are no runs of the kernel: they count neither way.
    pub(super) as_expected: Share,
    /// Harness errors that were not expected.
    pub(super) harness_errors: u64,
    /// Runs that were asked for.
    pub(super) asked: u64,
}

impl Summary {
    /// Counts records.
    pub(super) fn of(records: &[Record], asked: u64) -> Self {
        let count =
            |held: &dyn Fn(&Record) -> bool| records.iter().filter(|record| held(record)).count() as u64;
        let failed =
            |record: &Record| record.judgement.verdict == Verdict::HarnessError && !record.as_expected;
        let harness_errors = count(&failed);
        let judged = records.len() as u64 - harness_errors;
        let share = |verdict: Verdict| {
            let hits = count(&|record| record.judgement.verdict == verdict);
            (hits > 0).then(|| {
                (
                    verdict,
                    Share::wilson(
                        hits,
                        if verdict == Verdict::HarnessError { records.len() as u64 } else { judged },
                    ),
                )
            })
        };
        Self {
            verdicts: Verdict::ALL.into_iter().filter_map(share).collect(),
            as_expected: Share::wilson(count(&|record| record.as_expected), judged),
            harness_errors,
            asked,
        }
    }
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts: Vec<String> =
            self.verdicts.iter().map(|(verdict, share)| format!("{verdict} {share}")).collect();
        f.write_str(&counts.join(", "))?;
        let ended = self.as_expected.runs + self.harness_errors;
        if ended < self.asked {
            write!(f, "; {} of {} runs not done", self.asked - ended, self.asked)?;
        }
        Ok(())
    }
}

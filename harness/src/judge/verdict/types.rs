//! What a judge is told and what it says.

use std::fmt;
use std::time::Duration;

use hmmstorm_abi::wire::control::GpuStats;
use hmmstorm_abi::wire::event::Record;
use serde::{Deserialize, Serialize};

use crate::judge::console::Finding;
use crate::judge::sampler::CpuSummary;

/// A verdict on a run. `docs/verdicts.md` says how each is reached.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The workload finished and every oracle holds.
    Pass,
    /// No completion with work outstanding, and CPUs spin in one kernel call tree, or device faults are made again and again
    /// in vain.
    Livelock,
    /// No completion, CPUs idle, tasks in D.
    Deadlock,
    /// Progress in total, but a worker had none.
    Starvation,
    /// Progress, but not enough of it.
    Slow,
    /// The GPU holds queued work and the guest waits for it.
    DeviceStall,
    /// A data or accounting oracle failed.
    Corruption,
    /// The kernel reported a defect: oops, BUG, WARN, bad page, sanitizer.
    Crash,
    /// The bench failed; it says nothing about the kernel.
    HarnessError,
}

impl Verdict {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Pass,
        Self::Livelock,
        Self::Deadlock,
        Self::Starvation,
        Self::Slow,
        Self::DeviceStall,
        Self::Corruption,
        Self::Crash,
        Self::HarnessError,
    ];

    /// As it is written in files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Livelock => "livelock",
            Self::Deadlock => "deadlock",
            Self::Starvation => "starvation",
            Self::Slow => "slow",
            Self::DeviceStall => "device-stall",
            Self::Corruption => "corruption",
            Self::Crash => "crash",
            Self::HarnessError => "harness-error",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How long things may take before the judge draws conclusions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// *T*: without a completion for so long, with work outstanding, a run is stuck.
    pub no_progress: Duration,
    /// Host time from the start to the guest's hello.
    pub hello: Duration,
    /// Host time from hello to the first record of the scenario.
    pub start: Duration,
    /// Host time from the scenario's first record to its end.
    pub run: Duration,
    /// Host time that a stuck run is given to complete the evidence, from the last progress on.
    pub hard_stop: Duration,
    /// Guest time after which the kernel's slowest detector has spoken, from the last progress on: a verdict that is certain
    /// waits for it, because its report names who holds what.
    pub detectors: Duration,
    /// A worker without progress for so long starves. None: the scenario has workers that may rest.
    pub starvation: Option<Duration>,
    /// Least operations a second that are not `slow`.
    pub least_rate: Option<f64>,
    /// Host time for which a run goes on once the kernel has complained of a defect.
    pub after_complaint: Duration,
    /// The guest's clock is no function of the host's (deterministic mode): only guest time counts, and the guest ends
    /// itself.
    pub guest_time_only: bool,
}

impl Limits {
    /// Limits for *T*, the others in proportion. `slowdown` is how much slower than hardware the guest runs.
    #[must_use]
    pub fn new(no_progress: Duration, slowdown: f64) -> Self {
        let scaled = |seconds: u64| Duration::from_secs(seconds).mul_f64(slowdown.max(1.0));
        Self {
            no_progress,
            hello: scaled(60),
            start: scaled(60),
            run: scaled(600),
            hard_stop: no_progress * 10,
            detectors: no_progress * 2,
            starvation: None,
            least_rate: None,
            after_complaint: super::SETTLE,
            guest_time_only: false,
        }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset: what it does after a panic.
    Reset,
    /// QEMU ended in no way that the guest can cause.
    QemuFailed(String),
    /// The device's process ended under the guest.
    DeviceFailed(String),
    /// The bench itself could not go on.
    BenchFailed(String),
}

/// One observation.
#[derive(Clone, Debug)]
pub enum Observation {
    /// The device's counters, one entry a GPU.
    Device(Vec<GpuStats>),
    /// A record of the storm.
    Storm(Record),
    /// Guest time seen on the console, nanoseconds.
    GuestTime(u64),
    /// All complaints of the kernel so far, by guest time.
    Console(Vec<Finding>),
    /// What each CPU did since [`Judge::stalled_since`](super::Judge::stalled_since).
    Samples(Vec<CpuSummary>),
    /// The machine ended; nothing else follows.
    Ended(Ended),
}

/// Where an observation comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// The device's own counters, over its control socket.
    Device,
    /// The storm's records.
    Storm,
    /// Samples of the CPUs over QMP.
    Samples,
    /// The guest kernel's console.
    Console,
    /// QEMU and the processes around it.
    Machine,
    /// Data structures in the guest's memory.
    Memory,
}

/// What an observation does to a verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// Speaks for it.
    For,
    /// Speaks against it.
    Against,
    /// Was needed and is not there.
    Missing,
    /// Told for the reader.
    Note,
}

/// One observation in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Where from.
    pub source: Source,
    /// What it does to the verdict.
    pub weight: Weight,
    /// What was observed.
    pub says: String,
    /// Line of `console.log`, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
}

impl Evidence {
    pub(super) fn new(source: Source, weight: Weight, says: impl Into<String>) -> Self {
        Self { source, weight, says: says.into(), line: None }
    }

    pub(super) fn at(mut self, line: u64) -> Self {
        self.line = Some(line);
        self
    }
}

/// Progress that came back after more than *T*.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovered {
    /// How often.
    pub times: u32,
    /// The longest time without progress, milliseconds of guest time.
    pub longest_ms: u64,
    /// Round in which the longest one was.
    pub round: u64,
}

/// What a judge says of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// Why, in one sentence.
    pub reason: String,
    /// Functions that name the finding and survive a rebuild, leaf first; empty for `pass`.
    pub frames: Vec<String>,
    /// CPUs that spin, for `livelock`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spinners: Vec<u32>,
    /// What was observed, and what was missing.
    pub evidence: Vec<Evidence>,
    /// Progress came back after more than *T*.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered: Option<Recovered>,
    /// Other defects of the same run: later in guest time, or of less weight.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<String>,
}

//! What the judge remembers of a run: pure bookkeeping, no conclusions.

use std::time::Duration;

use hmmstorm_abi::wire::control::GpuStats;
use hmmstorm_abi::wire::event::{Event, Progress, Record, Unserved};

use super::types::{Ended, Observation, Recovered};
use crate::judge::console::Finding;
use crate::judge::sampler::CpuSummary;

/// A moment on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moment {
    /// Since the run began.
    pub(super) host: Duration,
    /// Latest guest time known then, nanoseconds.
    pub(super) guest: u64,
}

/// A defect that the storm found in data or accounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Defect {
    pub(super) guest: u64,
    pub(super) seen: Duration,
    pub(super) says: String,
    pub(super) name: String,
}

/// Everything observed so far.
#[derive(Clone, Debug, Default)]
pub(super) struct State {
    pub(super) now: Moment,
    pub(super) hello: Option<Duration>,
    pub(super) bound: Option<Duration>,
    pub(super) started: Option<Moment>,
    pub(super) scenario: Option<String>,
    pub(super) worker_names: Vec<String>,
    pub(super) progress: Option<Progress>,
    pub(super) heartbeat: Option<Moment>,
    /// The last moment at which anything was completed.
    pub(super) last_progress: Moment,
    /// By worker: the last moment at which it completed an operation, or was in none.
    pub(super) worker_progress: Vec<Moment>,
    pub(super) done: Option<Done>,
    pub(super) bye: bool,
    pub(super) error: Option<(Duration, String)>,
    pub(super) defects: Vec<Defect>,
    /// The accesses that the driver gave up, in the order in which the guest said so.
    pub(super) unserved: Vec<GivenUp>,
    /// Faults that the drivers of all GPUs have counted, and when they were asked.
    pub(super) driver_faults: Vec<(u64, u64)>,
    pub(super) device: Vec<GpuStats>,
    /// Since when the device has had work queued and completed none.
    pub(super) queued_since: Option<Moment>,
    pub(super) findings: Vec<Finding>,
    /// When the first complaint that is a crash was seen.
    pub(super) crash_seen: Option<Duration>,
    pub(super) summaries: Vec<CpuSummary>,
    pub(super) ended: Option<(Duration, Ended)>,
    pub(super) recovered: Option<Recovered>,
}

/// An access that the driver gave up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GivenUp {
    pub(super) seen: Duration,
    /// Guest time at which it was given up, nanoseconds.
    pub(super) guest: u64,
    pub(super) access: Unserved,
}

/// The scenario's end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) at: Moment,
    pub(super) elapsed_ns: u64,
}

impl State {
    /// Takes in an observation made at this host time.
    pub(super) fn observe(&mut self, host: Duration, observation: Observation, no_progress: Duration) {
        self.now.host = self.now.host.max(host);
        match observation {
            Observation::Device(gpus) => self.device(gpus, no_progress),
            Observation::Storm(record) => self.storm(record, no_progress),
            Observation::GuestTime(time) => self.now.guest = self.now.guest.max(time),
            Observation::Console(findings) => {
                if let Some(latest) = findings.iter().filter_map(|finding| finding.time).max() {
                    self.now.guest = self.now.guest.max(latest);
                }
                if self.crash_seen.is_none() && super::crash::first(&findings).is_some() {
                    self.crash_seen = Some(self.now.host);
                }
                self.findings = findings;
            }
            Observation::Samples(summaries) => self.summaries = summaries,
            Observation::Ended(ended) => {
                self.ended.get_or_insert((self.now.host, ended));
            }
        }
    }

    fn device(&mut self, gpus: Vec<GpuStats>, no_progress: Duration) {
        let total = |gpus: &[GpuStats], count: fn(&GpuStats) -> u64| gpus.iter().map(count).sum::<u64>();
        // A long job completes once, but each of its accesses is progress.
        let done = |gpu: &GpuStats| gpu.completions + gpu.accesses;
        let completed = total(&gpus, done) > total(&self.device, done);
        let queued = total(&gpus, |gpu| gpu.queued) > 0;
        if completed {
            self.progressed(no_progress);
        }
        self.queued_since = match self.queued_since {
            _ if !queued => None,
            Some(since) if !completed => Some(since),
            _ => Some(self.now),
        };
        self.device = gpus;
    }

    fn storm(&mut self, record: Record, no_progress: Duration) {
        self.now.guest = self.now.guest.max(record.t);
        match record.event {
            Event::Hello { .. } => self.hello = Some(self.now.host),
            Event::Bound { .. } => self.bound = Some(self.now.host),
            Event::Start { scenario, workers, .. } => {
                self.started = Some(self.now);
                self.last_progress = self.now;
                self.worker_progress = vec![self.now; workers.len()];
                self.worker_names = workers;
                self.scenario = Some(scenario);
            }
            Event::Progress(progress) => {
                self.heartbeat = Some(self.now);
                self.storm_progress(progress, no_progress);
            }
            Event::Corruption { worker, page, expected, found } => self.defects.push(Defect {
                guest: record.t,
                seen: self.now.host,
                says: format!("{worker} found page {page} wrong: expected {expected}, found {found}"),
                name: "page-contents".to_owned(),
            }),
            Event::Invariant { name, detail } => {
                self.defects.push(Defect {
                    guest: record.t,
                    seen: self.now.host,
                    says: format!("{name}: {detail}"),
                    name,
                });
            }
            Event::Done { progress, elapsed_ns, .. } => {
                self.storm_progress(progress, no_progress);
                self.done = Some(Done { at: self.now, elapsed_ns });
            }
            Event::Error { message } => {
                self.error.get_or_insert((self.now.host, message));
            }
            Event::Unserved(access) => {
                self.unserved.push(GivenUp { seen: self.now.host, guest: record.t, access });
            }
            Event::Counters { stats } => {
                let faults = |gpu: &std::collections::BTreeMap<String, u64>| {
                    ["cpu_faults", "device_faults"].iter().filter_map(|name| gpu.get(*name)).sum::<u64>()
                };
                self.driver_faults.push((record.t, stats.iter().map(faults).sum()));
            }
            Event::Measured(_) => {}
            Event::Bye => self.bye = true,
            Event::Tests { .. } | Event::Output { .. } | Event::Sample { .. } => {}
        }
    }

    fn storm_progress(&mut self, progress: Progress, no_progress: Duration) {
        let before = self.progress.take().unwrap_or_default();
        for (worker, &operations) in progress.workers.iter().enumerate() {
            // A worker that is at rest, or at its end, waits for nothing.
            let at_rest = progress.busy.get(worker) == Some(&false);
            if (at_rest || operations > before.workers.get(worker).copied().unwrap_or(0))
                && let Some(last) = self.worker_progress.get_mut(worker)
            {
                *last = self.now;
            }
        }
        if progress.operations > before.operations || progress.faults > before.faults {
            self.progressed(no_progress);
        }
        self.progress = Some(progress);
    }

    /// Something was completed: a wait of more than *T* before it was no hang.
    fn progressed(&mut self, no_progress: Duration) {
        if self.started.is_some() && self.done.is_none() {
            let waited = self.guest_stall();
            if waited >= no_progress {
                let round = self.progress.as_ref().map_or(0, |progress| progress.round);
                let longest_ms = u64::try_from(waited.as_millis()).unwrap_or(u64::MAX);
                let entry = self.recovered.get_or_insert(Recovered { times: 0, longest_ms: 0, round });
                entry.times += 1;
                if longest_ms > entry.longest_ms {
                    *entry = Recovered { longest_ms, round, ..*entry };
                }
            }
        }
        self.last_progress = self.now;
    }

    /// Guest time since the last completion, as far as the guest's clock has been seen.
    pub(super) fn guest_stall(&self) -> Duration {
        Duration::from_nanos(self.now.guest.saturating_sub(self.last_progress.guest))
    }

    /// Host time since the last completion.
    pub(super) fn host_stall(&self) -> Duration {
        self.now.host.saturating_sub(self.last_progress.host)
    }

    /// Guest time since the last heartbeat.
    pub(super) fn silence(&self) -> Duration {
        let last = self.heartbeat.or(self.started).unwrap_or_default();
        Duration::from_nanos(self.now.guest.saturating_sub(last.guest))
    }

    /// Complaints that came after the last completion (with a second's grace, since a heartbeat is not a timestamp).
    pub(super) fn since_stall(&self) -> impl Iterator<Item = &Finding> {
        let from = self.last_progress.guest.saturating_sub(1_000_000_000);
        self.findings.iter().filter(move |finding| finding.time.is_none_or(|time| time >= from))
    }

    /// Total operations and resolved faults.
    pub(super) fn counts(&self) -> (u64, u64) {
        self.progress.as_ref().map_or((0, 0), |progress| (progress.operations, progress.faults))
    }

    /// Descriptors that the device has completed.
    pub(super) fn completions(&self) -> u64 {
        self.device.iter().map(|gpu| gpu.completions).sum()
    }

    /// Descriptors that the device has not completed.
    pub(super) fn queued(&self) -> u64 {
        self.device.iter().map(|gpu| gpu.queued).sum()
    }

    /// Channels whose job waits for the driver to serve a page fault: the guest's work, not the device's.
    pub(super) fn stalled(&self) -> u64 {
        self.device.iter().map(|gpu| gpu.stalled).sum()
    }
}

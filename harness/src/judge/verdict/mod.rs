//! The judge proper: a state machine over observations. It has no clock, no process and no file of its own, so every
//! rule is a table test.

mod crash;
mod span;
mod state;
mod stuck;
mod types;
mod unserved;

use std::time::Duration;

use hmmstorm_abi::wire::event::Progress;

use super::console::Finding;
use super::sampler::CpuSummary;
pub use span::Span;
use state::State;
pub use types::{Ended, Evidence, Judgement, Limits, Observation, Recovered, Source, Verdict, Weight};

/// Host time that a report of the kernel, or of the storm, is given to arrive in full.
pub const SETTLE: Duration = Duration::from_secs(2);

/// Host time within which a guest may complain *because* a process of the bench ended under it.
const CONSEQUENCE: Duration = Duration::from_millis(500);

/// How far a run has come: for progress displays.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// No hello yet.
    Booting,
    /// Hello, but no scenario yet.
    Binding,
    /// The scenario runs.
    Running {
        /// Where it stands.
        progress: Progress,
        /// Time without progress.
        stalled: Duration,
    },
    /// The scenario is done.
    Ending,
}

/// Takes in observations and says when, and what, it is sure of.
#[derive(Clone, Debug)]
pub struct Judge {
    limits: Limits,
    state: State,
}

impl Judge {
    /// A judge at the start of a run.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: State::default() }
    }

    /// The limits it judges by.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes in an observation made at this host time since the run began.
    pub fn observe(&mut self, host: Duration, observation: Observation) {
        self.state.observe(host, observation, self.limits.no_progress);
    }

    /// Host time of the last completion: samples since then show what goes on instead.
    #[must_use]
    pub fn stalled_since(&self) -> Duration {
        self.state.last_progress.host
    }

    /// How far the run has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        let state = &self.state;
        if state.done.is_some() {
            Phase::Ending
        } else if state.started.is_some() {
            let stalled = if self.limits.guest_time_only { state.guest_stall() } else { state.host_stall() };
            Phase::Running { progress: state.progress.clone().unwrap_or_default(), stalled }
        } else if state.hello.is_some() {
            Phase::Binding
        } else {
            Phase::Booting
        }
    }

    /// Worker names, in the order of [`Progress::workers`] and [`Progress::pids`].
    #[must_use]
    pub fn workers(&self) -> &[String] {
        &self.state.worker_names
    }

    /// The storm's last word on where it stands.
    #[must_use]
    pub fn progress(&self) -> Option<&Progress> {
        self.state.progress.as_ref()
    }

    /// What each CPU did since the last completion.
    #[must_use]
    pub fn summaries(&self) -> &[CpuSummary] {
        &self.state.summaries
    }

    /// Complaints of the kernel since the last completion.
    pub fn findings(&self) -> impl Iterator<Item = &Finding> {
        self.state.since_stall()
    }

    /// Host time at which the guest said hello, the GPUs were bound, the scenario began and ended.
    #[must_use]
    pub fn milestones(&self) -> [Option<Duration>; 4] {
        let state = &self.state;
        [
            state.hello,
            state.bound,
            state.started.map(|at| at.host),
            state.done.as_ref().map(|done| done.at.host),
        ]
    }

    /// Guest time that the scenario took, if it ended.
    #[must_use]
    pub fn elapsed(&self) -> Option<Duration> {
        self.state.done.as_ref().map(|done| Duration::from_nanos(done.elapsed_ns))
    }

    /// The judgement, once nothing that may still come can change it; otherwise the run should go on.
    #[must_use]
    pub fn decide(&self, host: Duration) -> Option<Judgement> {
        let state = &self.state;
        if state.ended.is_some() {
            return Some(self.conclude(host));
        }
        if self.limits.guest_time_only && !self.out_of_time(host) {
            // A deterministic guest ends itself, at an instant of its own choosing: ending it earlier would cut its log
            // wherever the host happened to be. One whose CPUs sleep for ever will not, nor one that spins where every
            // detector is content or without a CPU: under SCHED_FIFO, with forced preemption.
            let patience =
                |stuck: &stuck::Stuck| self.limits.detectors * if stuck.is_livelock() { 10 } else { 3 };
            let stuck = stuck::examine(state, &self.limits, host).filter(stuck::Stuck::is_certain);
            let endless = stuck.filter(|stuck| state.guest_stall() >= patience(stuck));
            // A storm that lost an access ends as soon as its workers do, each of which may be as far from its own end.
            let since = |access: &state::GivenUp| state.now.guest.saturating_sub(access.guest);
            let lingers =
                |access: &state::GivenUp| Duration::from_nanos(since(access)) >= self.limits.detectors * 5;
            if state.unserved.first().is_some_and(lingers) {
                return Some(self.conclude(host));
            }
            return endless.map(|stuck| self.finish(stuck.into_judgement()));
        }
        let settled = |since: Duration| host.saturating_sub(since) >= SETTLE;
        let crash =
            state.crash_seen.is_some_and(|since| host.saturating_sub(since) >= self.limits.after_complaint);
        let error = state.error.as_ref().is_some_and(|(at, _)| settled(*at));
        // The storm goes on after a corruption, or ends, as the scenario decides; it is not waited for long.
        let corrupt = state
            .defects
            .first()
            .is_some_and(|defect| host.saturating_sub(defect.seen) >= self.limits.no_progress);
        let unserved = state.unserved.first().is_some_and(|first| settled(first.seen));
        if crash || error || corrupt || unserved || self.starved().is_some() {
            return Some(self.conclude(host));
        }
        let stuck = stuck::examine(state, &self.limits, host);
        if let Some(stuck) = stuck.filter(stuck::Stuck::is_certain)
            && stuck::detectors_have_spoken(state, &self.limits)
        {
            return Some(self.finish(stuck.into_judgement()));
        }
        self.out_of_time(host).then(|| self.conclude(host))
    }

    /// The judgement on what there is, at the end of the machine or of the host's patience.
    #[must_use]
    pub fn conclude(&self, host: Duration) -> Judgement {
        let judgement = if self.bench_failed_first() { self.bench_failed() } else { self.defective() };
        let judgement = judgement
            .or_else(|| unserved::judge(&self.state, &self.limits))
            .or_else(|| self.bench_failed())
            .or_else(|| self.starved())
            .or_else(|| self.passed());
        self.finish(judgement.unwrap_or_else(|| self.unfinished(host)))
    }

    fn finish(&self, mut judgement: Judgement) -> Judgement {
        judgement.recovered = self.state.recovered;
        judgement
    }

    fn out_of_time(&self, host: Duration) -> bool {
        let state = &self.state;
        let limits = &self.limits;
        let over = |since: Duration, limit: Duration| host.saturating_sub(since) >= limit;
        match (state.hello, state.started, &state.done) {
            (None, ..) => over(Duration::ZERO, limits.hello),
            (Some(hello), None, _) => over(hello, limits.start),
            (_, Some(started), None) => {
                over(started.host, limits.run) || over(state.last_progress.host, limits.hard_stop)
            }
            (_, _, Some(done)) => over(done.at.host, limits.hard_stop),
        }
    }

    /// Defects of the kernel under test: the earliest in guest time names the run.
    fn defective(&self) -> Option<Judgement> {
        let state = &self.state;
        let crash = crash::first(&state.findings);
        let defect = state.defects.first();
        let crash_first = match (crash, defect) {
            (Some(crash), Some(defect)) => crash.time.unwrap_or(0) <= defect.guest,
            (crash, _) => crash.is_some(),
        };
        if let Some(finding) = crash.filter(|_| crash_first) {
            let mut also: Vec<String> = crash::others(&state.findings).map(title).collect();
            also.extend(state.defects.iter().map(|defect| defect.says.clone()));
            let says = format!("{}: {}", crash::word(finding), finding.title);
            return Some(Judgement {
                verdict: Verdict::Crash,
                reason: says.clone(),
                frames: crash::frames(finding),
                spinners: Vec::new(),
                evidence: vec![Evidence::new(Source::Console, Weight::For, says).at(finding.line)],
                recovered: None,
                also,
            });
        }
        let defect = defect?;
        let mut evidence: Vec<Evidence> = state
            .defects
            .iter()
            .take(16)
            .map(|defect| Evidence::new(Source::Storm, Weight::For, &defect.says))
            .collect();
        if state.defects.len() > evidence.len() {
            let more = format!("and {} more", state.defects.len() - evidence.len());
            evidence.push(Evidence::new(Source::Storm, Weight::For, more));
        }
        Some(Judgement {
            verdict: Verdict::Corruption,
            reason: defect.says.clone(),
            frames: vec![defect.name.clone()],
            spinners: Vec::new(),
            evidence,
            recovered: None,
            also: state
                .findings
                .iter()
                .filter(|finding| finding.class() == super::console::Class::Crash)
                .map(title)
                .collect(),
        })
    }

    /// Whether a process of the bench ended under the guest before the guest complained of anything: what it says
    /// afterwards, or just then, is no finding.
    fn bench_failed_first(&self) -> bool {
        let Some((at, Ended::QemuFailed(_) | Ended::DeviceFailed(_) | Ended::BenchFailed(_))) =
            &self.state.ended
        else {
            return false;
        };
        let defect = self.state.defects.first().map(|defect| defect.seen);
        let earliest = [self.state.crash_seen, defect].into_iter().flatten().min();
        earliest.is_none_or(|seen| seen + CONSEQUENCE > *at)
    }

    /// Progress in total, but a worker that had none.
    fn starved(&self) -> Option<Judgement> {
        let state = &self.state;
        let limit = self.limits.starvation?;
        let started = state.started?;
        if state.done.is_some() || state.guest_stall() >= limit {
            return None;
        }
        let since =
            |moment: &state::Moment| Duration::from_nanos(state.now.guest.saturating_sub(moment.guest));
        let (worker, longest) =
            state.worker_progress.iter().map(since).enumerate().rev().max_by_key(|&(_, time)| time)?;
        if longest < limit {
            return None;
        }
        let name = state.worker_names.get(worker).cloned().unwrap_or_default();
        let (operations, _) = state.counts();
        let reason = format!(
            "{name} completed nothing for {:.1} s of guest time while others went on",
            longest.as_secs_f64()
        );
        let total = format!(
            "{operations} operations since {:.1} s",
            Duration::from_nanos(started.guest).as_secs_f64()
        );
        let evidence = vec![
            Evidence::new(Source::Storm, Weight::For, reason.clone()),
            Evidence::new(Source::Storm, Weight::For, total),
        ];
        Some(judgement(Verdict::Starvation, reason, evidence))
    }

    /// What the bench did wrong.
    fn bench_failed(&self) -> Option<Judgement> {
        let state = &self.state;
        let (source, reason) = match (&state.ended, &state.error) {
            (Some((_, Ended::QemuFailed(how))), _) => (Source::Machine, format!("QEMU ended: {how}")),
            (Some((_, Ended::DeviceFailed(how))), _) => {
                (Source::Machine, format!("the device's process ended: {how}"))
            }
            (Some((_, Ended::BenchFailed(how))), _) => (Source::Machine, how.clone()),
            (_, Some((_, message))) => (Source::Storm, format!("the storm could not do its work: {message}")),
            _ => return None,
        };
        Some(harness_error(reason.clone(), vec![Evidence::new(source, Weight::For, reason)]))
    }

    fn passed(&self) -> Option<Judgement> {
        let state = &self.state;
        let done = state.done.as_ref()?;
        let (operations, faults) = state.counts();
        let elapsed = Duration::from_nanos(done.elapsed_ns);
        let mut evidence = vec![Evidence::new(
            Source::Storm,
            Weight::For,
            format!(
                "done after {elapsed:.1?} of guest time: {operations} operations, {faults} device faults, every check held"
            ),
        )];
        evidence.push(Evidence::new(
            Source::Device,
            Weight::For,
            format!("{} descriptors completed, {} left", state.completions(), state.queued()),
        ));
        match &state.ended {
            Some((_, Ended::PoweredOff)) => {}
            Some((_, Ended::Reset)) => {
                let reason = "the scenario finished, but the guest reset instead of powering off";
                evidence.push(Evidence::new(Source::Machine, Weight::Against, reason));
                return Some(harness_error(reason.into(), evidence));
            }
            _ => {
                let reason = "the scenario finished, but the guest did not power off";
                evidence.push(Evidence::new(Source::Machine, Weight::Missing, "no power-off"));
                return Some(harness_error(reason.into(), evidence));
            }
        }
        if operations == 0 && !state.worker_names.is_empty() {
            return Some(harness_error(
                "the scenario finished without a single operation, which proves nothing".into(),
                evidence,
            ));
        }
        if let Some(least) = self.limits.least_rate {
            #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
            let rate = operations as f64 / elapsed.as_secs_f64().max(1e-9);
            if rate < least {
                let reason = format!("{rate:.0} operations/s of guest time are below {least:.0}");
                return Some(judgement(Verdict::Slow, reason, evidence));
            }
        }
        let reason = format!("{operations} operations and {faults} device faults, every check held");
        Some(judgement(Verdict::Pass, reason, evidence))
    }

    /// The machine ended, or time ran out, before the scenario was done.
    fn unfinished(&self, host: Duration) -> Judgement {
        let state = &self.state;
        let how = match &state.ended {
            Some((_, Ended::PoweredOff)) => "the guest powered off",
            Some(_) => "the guest reset",
            None => "time ran out",
        };
        let Some(started) = state.started else {
            let stage = match (state.hello, state.bound) {
                (None, _) => "before PID 1 said hello",
                (Some(_), None) => "before the GPUs were bound",
                _ => "before the scenario began",
            };
            let evidence = vec![Evidence::new(
                Source::Storm,
                Weight::Missing,
                format!("nothing from the storm; {how} {stage}"),
            )];
            return harness_error(format!("{how} {stage} ({:.0} s)", host.as_secs_f64()), evidence);
        };
        if let Some(stuck) = stuck::examine(state, &self.limits, host) {
            return stuck.into_judgement();
        }
        let ran = host.saturating_sub(started.host);
        let (operations, faults) = state.counts();
        let so_far = format!(
            "{operations} operations and {faults} device faults in {:.0} s, and still going",
            ran.as_secs_f64()
        );
        if state.ended.is_none() {
            let evidence = vec![Evidence::new(Source::Storm, Weight::For, so_far.clone())];
            return judgement(Verdict::Slow, format!("not done when time ran out: {so_far}"), evidence);
        }
        let evidence = vec![
            Evidence::new(Source::Storm, Weight::Missing, "the scenario's end"),
            Evidence::new(Source::Console, Weight::Missing, "any word of the kernel on why"),
        ];
        harness_error(
            format!("{how} in the middle of the scenario and said nothing; {so_far} before"),
            evidence,
        )
    }
}

fn title(finding: &Finding) -> String {
    format!("{} (console.log:{})", finding.title, finding.line)
}

fn judgement(verdict: Verdict, reason: String, evidence: Vec<Evidence>) -> Judgement {
    Judgement {
        verdict,
        reason,
        frames: Vec::new(),
        spinners: Vec::new(),
        evidence,
        recovered: None,
        also: Vec::new(),
    }
}

fn harness_error(reason: String, evidence: Vec<Evidence>) -> Judgement {
    judgement(Verdict::HarnessError, reason, evidence)
}

#[cfg(test)]
mod tests;

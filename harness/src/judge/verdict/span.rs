//! How long a run worked before it failed, in guest time: what survival is estimated from.

use std::time::Duration;

use super::{Judge, Verdict};
use crate::judge::verdict::crash;

/// Guest time from the scenario's beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// To the failure, or for as long as there was none to be seen.
    pub observed: Duration,
    /// It ends with a failure of the kernel under test.
    pub failed: bool,
}

impl Judge {
    /// Guest time for which the scenario worked, given its verdict; none if it never began. The moment of a hang is that
    /// of the last completion before it, as exact as a heartbeat; that of a crash or corruption is its first report.
    #[must_use]
    pub fn span(&self, verdict: Verdict) -> Option<Span> {
        let state = &self.state;
        let from = state.started?.guest;
        let starved = || state.worker_progress.iter().map(|moment| moment.guest).min();
        let crashed = || crash::first(&state.findings).and_then(|finding| finding.time);
        let ended = || state.done.as_ref().map(|done| from + done.elapsed_ns);
        let (at, failed) = match verdict {
            Verdict::Livelock | Verdict::Deadlock | Verdict::DeviceStall => (None, true),
            Verdict::Starvation => (starved(), true),
            Verdict::Crash => (crashed(), true),
            Verdict::Corruption => (state.defects.first().map(|defect| defect.guest), true),
            Verdict::Slow => (ended().or(Some(state.now.guest)), true),
            Verdict::Pass => (ended(), false),
            Verdict::HarnessError => (None, false),
        };
        let at = at.unwrap_or(state.last_progress.guest);
        Some(Span { observed: Duration::from_nanos(at.saturating_sub(from)), failed })
    }
}

//! Runs a scenario in a process of its own and reports on it from outside.
//!
//! The supervisor shares no address space and no lock with the workload; it reads the board, writes heartbeats and reaps.
//! So it goes on reporting when the whole workload hangs in the kernel, `mmap_lock` held and all.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use hmmstorm_abi::wire::event::Event;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, wait};
use thiserror::Error;

use crate::accounting::Baseline;
use crate::board::{Board, Finding};
use crate::clock::monotonic_ns;
use crate::gpu;
use crate::machine::pin;
use crate::scenario::{Context, Prepared};
use crate::sink::Sink;
use crate::sys::process::{PANICKED, block_signals, fork, unblock_signals, wait_signal};

/// Guest time between two heartbeats unless the host asks for another.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(500);

/// Heartbeats without a completed operation after which it is told what was measured before.
const STILL_BEATS: u32 = 4;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It finished and every oracle holds.
    Clean,
    /// An oracle failed.
    Wrong,
    /// It could not be done.
    Failed,
}

impl Outcome {
    /// Exit status of a command.
    pub(crate) const fn status(self) -> u8 {
        match self {
            Self::Clean => 0,
            Self::Wrong => 1,
            Self::Failed => 3,
        }
    }

    fn from_status(status: i32) -> Option<Self> {
        [Self::Clean, Self::Wrong, Self::Failed].into_iter().find(|o| i32::from(o.status()) == status)
    }
}

/// A run that could not be started or followed.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub(crate) struct SuperviseError {
    what: &'static str,
    source: io::Error,
}

impl SuperviseError {
    fn of<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { what, source: source.into() }
    }
}

/// Runs `prepared` with `seed`; tells `sink`, with a heartbeat every `heartbeat`.
///
/// # Errors
/// [`SuperviseError`]. What goes wrong in the run itself is told to `sink`.
pub(crate) fn supervise(
    prepared: &Prepared,
    seed: u64,
    sink: &Sink,
    heartbeat: Duration,
) -> Result<Outcome, SuperviseError> {
    let emit = |event| sink.emit(event).map_err(SuperviseError::of("cannot write an event"));
    let names = prepared.workload.workers();
    let board = Board::new(names.len()).map_err(SuperviseError::of("cannot map the progress board"))?;
    emit(Event::Start {
        scenario: prepared.name.clone(),
        seed,
        parameters: prepared.parameters.to_text(),
        workers: names.clone(),
    })?;
    // Away from the CPUs that the workload stops on purpose.
    pin(0).map_err(SuperviseError::of("cannot pin the supervisor to CPU 0"))?;
    block_signals(&[Signal::CHILD]);
    let runner = fork(|| {
        unblock_signals();
        let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        let ran = catch_unwind(AssertUnwindSafe(|| run(prepared, seed, &board, sink)));
        match (tied, ran) {
            (Ok(()), Ok(Ok(outcome))) => outcome.status().into(),
            (Ok(()), Ok(Err(error))) => fail(sink, &error.to_string()),
            (Err(error), _) => fail(sink, &format!("prctl(PR_SET_PDEATHSIG): {error}")),
            (_, Err(_panic)) => PANICKED,
        }
    })
    .map_err(SuperviseError::of("cannot fork the workload"))?;

    let mut told = vec![false; names.len()];
    let mut outcome = Outcome::Clean;
    let mut tell_findings = || -> Result<Option<Outcome>, SuperviseError> {
        let mut worst = None;
        for (worker, finding) in board.findings() {
            let failed = matches!(finding, Finding::Failure(_));
            if !std::mem::replace(&mut told[worker], true) {
                if matches!(finding, Finding::Unserved { .. }) {
                    // What others completed meanwhile, and what the driver did, up to this moment.
                    emit(Event::Progress(board.progress()))?;
                    emit(Event::Measured(board.measured()))?;
                    emit(Event::Counters { stats: gpu::counters() })?;
                }
                emit(finding.into_event(&names[worker]))?;
            }
            // An oracle's word counts for more than what failed after it.
            worst = if failed { worst.or(Some(Outcome::Failed)) } else { Some(Outcome::Wrong) };
        }
        Ok(worst)
    };

    let (mut operations, mut still) = (0, 0);
    let mut next = monotonic_ns() + heartbeat.as_nanos() as u64;
    loop {
        let left = Duration::from_nanos(next.saturating_sub(monotonic_ns()));
        wait_signal(&[Signal::CHILD], left).map_err(SuperviseError::of("cannot wait for a signal"))?;
        let ended = reap(runner);
        if let Some(found) = tell_findings()? {
            outcome = found;
        }
        if let Some(status) = ended {
            return Ok(match status.exit_status().map(Outcome::from_status) {
                // The runner knows of its own oracles, the board of the workers'.
                Some(Some(own)) => {
                    if outcome == Outcome::Clean {
                        own
                    } else {
                        outcome
                    }
                }
                _ => {
                    emit(Event::Error { message: how_it_ended(status) })?;
                    if outcome == Outcome::Wrong { outcome } else { Outcome::Failed }
                }
            });
        }
        if monotonic_ns() >= next {
            let progress = board.progress();
            still = if progress.operations > operations { 0 } else { still + 1 };
            operations = progress.operations;
            emit(Event::Progress(progress))?;
            if still == STILL_BEATS {
                emit(Event::Measured(board.measured()))?;
                emit(Event::Counters { stats: gpu::counters() })?;
            }
            // The next beat that is still to come: a late one is not made up for by two.
            while next <= monotonic_ns() {
                next += heartbeat.as_nanos() as u64;
            }
        }
    }
}

/// Reaps whatever has ended; the status of `runner` if it has.
fn reap(runner: Pid) -> Option<WaitStatus> {
    let mut ended = None;
    // Not waitpid(None), which is about this process group only.
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == runner {
            ended = Some(status);
        }
    }
    ended
}

fn how_it_ended(status: WaitStatus) -> String {
    match (status.terminating_signal(), status.exit_status()) {
        (Some(signal), _) => {
            format!("the workload was killed by signal {signal} (7 is SIGBUS: a device page was lost)")
        }
        (_, Some(PANICKED)) => "the workload panicked; the message is on the console".to_owned(),
        (_, status) => format!("the workload ended with status {status:?}"),
    }
}

fn fail(sink: &Sink, message: &str) -> i32 {
    // If not even this can be told, the status still says that the run failed.
    drop(sink.emit(Event::Error { message: message.to_owned() }));
    Outcome::Failed.status().into()
}

#[derive(Debug, Error)]
enum RunError {
    #[error(transparent)]
    Gpu(#[from] gpu::GpuError),
    #[error("cannot write an event: {0}")]
    Sink(#[from] io::Error),
}

/// The run itself, in its own process.
fn run(prepared: &Prepared, seed: u64, board: &Board, sink: &Sink) -> Result<Outcome, RunError> {
    let baseline = Baseline::take()?;
    let start = monotonic_ns();
    if prepared.workload.run(&Context { board, seed, sink }).is_err() {
        // What was found is on the board, for the supervisor to tell.
        return Ok(Outcome::Failed);
    }
    let elapsed_ns = monotonic_ns() - start;
    let progress = board.progress();
    let (wrong, stats) = baseline.verify(&progress, &prepared.waived)?;
    let outcome = if wrong.is_empty() { Outcome::Clean } else { Outcome::Wrong };
    for event in wrong {
        sink.emit(event)?;
    }
    sink.emit(Event::Measured(board.measured()))?;
    sink.emit(Event::Done { progress, elapsed_ns, stats: stats.iter().map(gpu::named).collect() })?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_survive_as_exit_statuses() {
        for outcome in [Outcome::Clean, Outcome::Wrong, Outcome::Failed] {
            assert_eq!(Outcome::from_status(outcome.status().into()), Some(outcome));
        }
        assert_eq!(Outcome::from_status(PANICKED), None);
    }
}

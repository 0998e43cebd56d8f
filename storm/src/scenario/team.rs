//! Teams: workers in several processes of several threads each, which a leader in the scenario's own process starts,
//! watches and ends.

use std::io;
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};

use super::definition::Parameters;
use super::{Context, WorkError};
use crate::accounting::rss;
use crate::board::{Board, Slot};
use crate::clock::{monotonic_ns, poll};
use crate::machine::{Machine, pin};
use crate::sys::process::fork;

/// CPU of the leader.
const LEADER_CPU: usize = 0;
/// Guest time that a process's counters get to settle, when the others may be migrating its pages.
const SETTLE: Duration = Duration::from_secs(5);
/// Guest time between two looks of the leader at its workers.
const LOOK: Duration = Duration::from_millis(20);

/// How many workers there are, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Forked processes; none if the workers are threads of the leader's own process.
    processes: usize,
    threads: usize,
    cpus: usize,
}

/// One worker.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Member<'a> {
    /// Its number in the team, from 0.
    pub(crate) number: usize,
    /// Its number in its process.
    pub(crate) thread: usize,
    /// Its place on the board.
    pub(crate) slot: Slot<'a>,
    board: &'a Board,
}

impl Member<'_> {
    /// Whether another worker has a finding.
    pub(crate) fn failed(&self) -> bool {
        self.board.has_finding()
    }

    /// Whether it should end: see [`Board::stopped`].
    pub(crate) fn stopped(&self) -> bool {
        self.board.stopped()
    }
}

impl Shape {
    /// By the parameters `processes` and `threads`. `processes` may be 0, for threads of the leader's process.
    pub(crate) fn from_parameters(parameters: &Parameters, machine: Machine) -> Self {
        let processes = parameters.integer("processes") as usize;
        let threads = parameters.integer("threads") as usize;
        Self::new(processes, threads, machine)
    }

    /// `threads` workers in each of `processes` processes.
    pub(crate) fn new(processes: usize, threads: usize, machine: Machine) -> Self {
        Self { processes, threads, cpus: machine.cpus }
    }

    /// Workers, without the leader.
    pub(crate) fn members(&self) -> usize {
        self.processes.max(1) * self.threads
    }

    /// Workers in each address space.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// CPU of a worker: round robin, from the CPU after the leader's on.
    pub(crate) fn cpu(&self, number: usize) -> usize {
        (LEADER_CPU + 1 + number) % self.cpus
    }

    /// Names for the board: the leader, then every worker.
    pub(crate) fn names(&self, leader: &str, worker: &str) -> Vec<String> {
        let members = (0..self.members()).map(|n| format!("{worker}{n}@cpu{}", self.cpu(n)));
        [format!("{leader}@cpu{LEADER_CPU}")].into_iter().chain(members).collect()
    }

    /// Starts the workers; `set_up` makes in each of their address spaces what its workers share, `work` is the work of
    /// each. Meanwhile `lead` runs; when it is done, waits for all of them. What a worker finds is posted to its slot.
    ///
    /// The first slot is the leader's. To be called with one thread.
    ///
    /// # Errors
    /// Of `lead`; [`WorkError::Elsewhere`] after a worker's finding, [`WorkError::Invariant`] if the kernel killed a worker
    /// because of its memory, [`WorkError::Condition`] if one ended otherwise.
    pub(crate) fn run<S: Sync>(
        &self,
        context: &Context<'_>,
        worker: &str,
        set_up: impl Fn(usize) -> Result<S, WorkError>,
        work: impl Fn(&S, Member<'_>) -> Result<(), WorkError> + Sync,
        lead: impl FnOnce(&Crew<'_>) -> Result<(), WorkError>,
    ) -> Result<(), WorkError> {
        let crew = |children| Crew { board: context.board, children };
        pin(LEADER_CPU).map_err(WorkError::system("sched_setaffinity of the leader"))?;
        if self.processes == 0 {
            let shared = set_up(0)?;
            return thread::scope(|scope| {
                for thread in 0..self.threads {
                    let (shared, work) = (&shared, &work);
                    scope.spawn(move || self.member(context, worker, 0, thread, |m| work(shared, m)));
                }
                let led = lead(&crew(&[]));
                if led.is_err() {
                    context.board.stop();
                }
                led
            });
        }
        let mut children = Vec::new();
        for process in 0..self.processes {
            let child = fork(|| i32::from(!self.process(context, worker, process, &set_up, &work)));
            match child {
                Ok(pid) => children.push(pid),
                Err(source) => {
                    crew(&children).kill();
                    return Err(WorkError::System { call: "fork of a worker", source });
                }
            }
        }
        let crew = crew(&children);
        let led = lead(&crew);
        if led.is_err() {
            crew.kill();
            return led;
        }
        crew.join()
    }

    /// All of one process; whether that went well.
    fn process<S: Sync>(
        &self,
        context: &Context<'_>,
        worker: &str,
        process: usize,
        set_up: &impl Fn(usize) -> Result<S, WorkError>,
        work: &(impl Fn(&S, Member<'_>) -> Result<(), WorkError> + Sync),
    ) -> bool {
        // The parent's end is the child's.
        if rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).is_err() {
            return false;
        }
        let first = context.board.slot(1 + process * self.threads);
        let shared = match set_up(process) {
            Ok(shared) => shared,
            Err(error) => {
                error.post(first);
                return false;
            }
        };
        let well = if self.threads == 1 {
            self.member(context, worker, process, 0, |member| work(&shared, member))
        } else {
            thread::scope(|scope| {
                let threads: Vec<_> = (0..self.threads)
                    .map(|thread| {
                        let shared = &shared;
                        scope.spawn(move || {
                            self.member(context, worker, process, thread, |member| work(shared, member))
                        })
                    })
                    .collect();
                threads.into_iter().all(|thread| thread.join().unwrap_or(false))
            })
        };
        // With everything still mapped, pages on devices included.
        if well && let Some(detail) = settled_rss() {
            WorkError::Invariant { name: "rss", detail }.post(first);
            return false;
        }
        well
    }

    /// One worker; whether that went well.
    fn member(
        &self,
        context: &Context<'_>,
        worker: &str,
        process: usize,
        thread: usize,
        work: impl FnOnce(Member<'_>) -> Result<(), WorkError>,
    ) -> bool {
        let number = process * self.threads + thread;
        let (cpu, slot) = (self.cpu(number), context.board.slot(number + 1));
        slot.enter(&format!("{worker}{number}"));
        let member = Member { number, thread, slot, board: context.board };
        pin(cpu)
            .map_err(WorkError::system("sched_setaffinity of a worker"))
            .and_then(|()| work(member))
            .inspect_err(|error| error.post(slot))
            .is_ok()
    }
}

fn settled_rss() -> Option<String> {
    let mut wrong = None;
    poll(SETTLE, || {
        wrong = rss::difference();
        wrong.is_none().then_some(())
    });
    wrong
}

/// The workers, as their leader sees them.
#[derive(Debug)]
pub(crate) struct Crew<'a> {
    board: &'a Board,
    /// Forked processes; none if the workers are threads.
    children: &'a [Pid],
}

impl Crew<'_> {
    /// Whether the workers still can do what is asked of them.
    ///
    /// # Errors
    /// [`WorkError::Elsewhere`] if one has a finding, and as [`Shape::run`].
    pub(crate) fn check(&self) -> Result<(), WorkError> {
        if self.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        for &child in self.children {
            // Not reaped here: `join()` wants to see it, too.
            let options = rustix::process::WaitIdOptions::EXITED
                | rustix::process::WaitIdOptions::NOHANG
                | rustix::process::WaitIdOptions::NOWAIT;
            if let Ok(Some(status)) = rustix::process::waitid(rustix::process::WaitId::Pid(child), options)
                && status.exit_status() != Some(0)
            {
                return Err(ended(child, status.terminating_signal(), status.exit_status()));
            }
        }
        Ok(())
    }

    /// Lets the workers go on for `time` of the guest's, then tells them to stop.
    ///
    /// # Errors
    /// As [`Crew::check`].
    pub(crate) fn let_run(&self, time: Duration) -> Result<(), WorkError> {
        let end = monotonic_ns() + time.as_nanos() as u64;
        while monotonic_ns() < end {
            self.check()?;
            thread::sleep(LOOK);
        }
        self.board.stop();
        Ok(())
    }

    fn kill(&self) {
        for &child in self.children {
            // One that has ended already needs no signal; PID 1 reaps them.
            let _gone = kill_process(child, Signal::KILL);
        }
    }

    fn join(&self) -> Result<(), WorkError> {
        let mut result = Ok(());
        for &child in self.children {
            let ended = match waitpid(Some(child), WaitOptions::empty()) {
                Ok(Some((_, status))) => check_status(child, status),
                Ok(None) => continue,
                Err(source) => Err(WorkError::System { call: "waitpid for a worker", source: source.into() }),
            };
            result = result.and(ended);
        }
        if self.board.has_finding() { Err(WorkError::Elsewhere) } else { result }
    }
}

fn check_status(child: Pid, status: WaitStatus) -> Result<(), WorkError> {
    match status.exit_status() {
        Some(0) => Ok(()),
        code => Err(ended(child, status.terminating_signal(), code)),
    }
}

/// Why a worker's process ended that should not have.
fn ended(child: Pid, signal: Option<i32>, code: Option<i32>) -> WorkError {
    let name = |signal: i32| io::Error::other(format!("signal {signal}"));
    match signal {
        Some(signal @ (libc::SIGBUS | libc::SIGSEGV)) => WorkError::Invariant {
            name: "memory-kept",
            detail: format!(
                "process {child} was killed by {} while it used its own memory",
                if signal == libc::SIGBUS { "SIGBUS: a page of it was lost" } else { "SIGSEGV" }
            ),
        },
        Some(signal) => WorkError::System { call: "a worker's process was killed", source: name(signal) },
        None => WorkError::Condition(format!("worker process {child} ended with status {code:?}")),
    }
}

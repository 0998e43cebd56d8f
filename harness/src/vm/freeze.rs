//! Holds QEMU's RCU thread still, for runs that must give the same bytes.
//!
//! QEMU frees what its CPUs may still read on a thread of its own (`call_rcu`). When the CPU thread has not passed a
//! quiescent state for some tens of milliseconds of *host* time, or when much has piled up, that thread makes it leave
//! the guest at once (`util/rcu.c: wait_for_readers`, `accel/tcg/tcg-accel-ops-rr.c: rr_force_rcu`), and the CPU loses
//! the rest of its turn. So the order in which the guest's CPUs run depends on how busy the host is, which is seen as
//! soon as two of them run at once. A thread that sleeps does not do that; what it would free waits for QEMU's end,
//! and in a run of seconds that is little.
//!
//! It must not hold a lock then, or QEMU waits for it for ever: not QEMU's big lock while it frees, not the allocator's
//! while it trims the heap. So it is stopped only where it waits, without a limit, for something to free.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The name that QEMU gives the thread with `-name ...,debug-threads=on`.
const THREAD: &str = "call_rcu";

/// What `/proc/PID/task/TID/syscall` begins with and goes on to say where the thread waits for something to free:
/// `futex(address, FUTEX_WAIT, EV_BUSY, no limit)` (`util/event.c: qemu_event_wait`). A mutex has another value, and the
/// wait for a grace period has a limit.
const FUTEX_WAIT_BUSY: (&str, &str, &str) = ("202", "0xffffffff", "0x0");

/// Time for the thread to come to rest. It sleeps 10 ms at a time and rests once nothing was to be freed for one of them.
const REST: Duration = Duration::from_secs(10);
/// Time between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// Why the thread still runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU has no such thread, or has gone.
    #[error("QEMU (process {qemu}) has no thread named {THREAD}")]
    NoThread {
        /// QEMU's process id.
        qemu: u32,
    },
    /// `/proc` cannot be read.
    #[error("{what}: {source}")]
    Proc {
        /// What was read.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Tracing it is not allowed, as in some containers, or failed.
    #[error("cannot stop thread {thread} ({THREAD}) of QEMU with ptrace: {source}")]
    Trace {
        /// The thread's id.
        thread: i32,
        /// Why.
        source: Errno,
    },
    /// It never stood where it can be stopped.
    #[error(
        "thread {thread} ({THREAD}) of QEMU did not come to rest within {} s; it is in system call {seen}",
        REST.as_secs()
    )]
    Restless {
        /// The thread's id.
        thread: i32,
        /// Where it was at last.
        seen: String,
    },
}

/// A thread that is held until its process ends, or until we do.
#[derive(Debug)]
pub struct Frozen {
    // Only the thread that traces may wait for the traced one, and its end would set that free.
    _tracer: JoinHandle<()>,
}

impl Frozen {
    /// Stops the RCU thread of a running QEMU. When this returns, the thread has stopped.
    pub fn hold(qemu: u32) -> Result<Self, Error> {
        let thread = find(qemu)?;
        let call = PathBuf::from(format!("/proc/{qemu}/task/{thread}/syscall"));
        let (stopped, outcome) = mpsc::sync_channel(1);
        let tracer = thread::Builder::new()
            .name("tracer".into())
            .spawn(move || {
                let outcome = stop(thread, &call);
                let held = outcome.is_ok();
                if stopped.send(outcome).is_ok() && held {
                    reap(thread);
                }
            })
            .map_err(|source| Error::Proc { what: "cannot start a thread".into(), source })?;
        // A tracer that is gone without a word has panicked.
        outcome.recv().unwrap_or(Err(traced(thread)(Errno::ECHILD)))?;
        Ok(Self { _tracer: tracer })
    }
}

fn find(qemu: u32) -> Result<Pid, Error> {
    let folder = format!("/proc/{qemu}/task");
    let failed = |source| Error::Proc { what: folder.clone(), source };
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // A thread may end while we look; it is not the one that we look for.
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if name.trim_end() == THREAD
            && let Some(id) = entry.file_name().to_str().and_then(|id| id.parse().ok())
        {
            return Ok(Pid::from_raw(id));
        }
    }
    Err(Error::NoThread { qemu })
}

/// For `map_err`.
fn traced(thread: Pid) -> impl Fn(Errno) -> Error {
    move |source| Error::Trace { thread: thread.as_raw(), source }
}

/// Stops the thread at a wait in which it holds no lock.
fn stop(thread: Pid, call: &Path) -> Result<(), Error> {
    let failed = traced(thread);
    let look = || {
        fs::read_to_string(call).map_err(|source| Error::Proc { what: call.display().to_string(), source })
    };
    ptrace::seize(thread, ptrace::Options::empty()).map_err(&failed)?;
    let deadline = Instant::now() + REST;
    loop {
        let seen = look()?;
        if rests(&seen) {
            ptrace::interrupt(thread).map_err(&failed)?;
            match waitpid(thread, Some(WaitPidFlag::__WALL)).map_err(&failed)? {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Err(failed(Errno::ESRCH)),
                // It may have been woken between the look and the stop.
                _ if rests(&look()?) => return Ok(()),
                _ => ptrace::cont(thread, None).map_err(&failed)?,
            }
        } else if Instant::now() >= deadline {
            return Err(Error::Restless { thread: thread.as_raw(), seen: seen.trim_end().to_owned() });
        }
        thread::sleep(LOOK);
    }
}

/// Whether a line of `/proc/PID/task/TID/syscall` (number, six arguments, stack and instruction pointer) is the wait for
/// something to free.
fn rests(call: &str) -> bool {
    let words: Vec<&str> = call.split_whitespace().collect();
    let (number, value, limit) = FUTEX_WAIT_BUSY;
    matches!(words[..], [nr, _, _, val, timeout, ..] if nr == number && val == value && timeout == limit)
}

/// Waits for the stopped thread's end. A traced thread that nobody reaps would keep its process from being reaped.
fn reap(thread: Pid) {
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) => return,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_the_thread_is_named() {
        let error = Frozen::hold(std::process::id()).expect_err("no such thread here");
        assert!(matches!(error, Error::NoThread { .. }), "{error}");
    }

    #[test]
    fn only_the_unlimited_wait_for_an_event_is_rest() {
        assert!(rests("202 0x55d0c8a3e010 0x80 0xffffffff 0x0 0x0 0x0 0x7f3c2b5ff5a8 0x7f3c2d1a2f29\n"));
        for elsewhere in [
            "202 0x55d0c8a3e010 0x80 0xffffffff 0x7f3c2b5ff500 0x0 0x0 0x7f3c2b5ff5a8 0x7f3c2d1a2f29", // a limit
            "202 0x55d0c8a3e010 0x80 0x2 0x0 0x0 0x0 0x7f3c2b5ff5a8 0x7f3c2d1a2f29", // a mutex
            "230 0x0 0x0 0x7f3c2b5ff500 0x0 0x0 0x0 0x7f3c2b5ff5a8 0x7f3c2d1a2f29",  // a sleep
            "running",
            "",
        ] {
            assert!(!rests(elsewhere), "{elsewhere}");
        }
    }

    #[test]
    fn a_process_that_is_gone_is_an_error() {
        let error = Frozen::hold(u32::MAX).expect_err("no such process");
        assert!(error.to_string().contains("/proc/"), "{error}");
    }
}

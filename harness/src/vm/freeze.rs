//! Holds QEMU's RCU thread still, for runs that must give the same bytes.
//!
//! QEMU frees what its CPUs may still read on a thread of its own (`call_rcu`). When the CPU thread has not passed a
//! quiescent state for some tens of milliseconds of *host* time, or when much has piled up, that thread makes it leave
//! the guest at once (`util/rcu.c: wait_for_readers`, `accel/tcg/tcg-accel-ops-rr.c: rr_force_rcu`), and the CPU loses
//! the rest of its turn. So the order in which the guest's CPUs run depends on how busy the host is, which is seen as
//! soon as two of them run at once. A thread that sleeps does not do that; what it would free waits for QEMU's end,
//! and in a run of seconds that is little.

use std::fs;
use std::io;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The name that QEMU gives the thread with `-name ...,debug-threads=on`.
const THREAD: &str = "call_rcu";

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
        let (stopped, outcome) = mpsc::sync_channel(1);
        let tracer = thread::Builder::new()
            .name("tracer".into())
            .spawn(move || {
                if stopped.send(stop(thread)).is_ok() {
                    reap(thread);
                }
            })
            .map_err(|source| Error::Proc { what: "cannot start a thread".into(), source })?;
        // A tracer that is gone without a word has panicked.
        outcome
            .recv()
            .unwrap_or(Err(Errno::ECHILD))
            .map_err(|source| Error::Trace { thread: thread.as_raw(), source })?;
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

fn stop(thread: Pid) -> Result<(), Errno> {
    ptrace::seize(thread, ptrace::Options::empty())?;
    ptrace::interrupt(thread)?;
    match waitpid(thread, Some(WaitPidFlag::__WALL))? {
        WaitStatus::Exited(..) | WaitStatus::Signaled(..) => Err(Errno::ESRCH),
        _ => Ok(()),
    }
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
    fn a_process_that_is_gone_is_an_error() {
        let error = Frozen::hold(u32::MAX).expect_err("no such process");
        assert!(error.to_string().contains("/proc/"), "{error}");
    }
}

//! Processes and signals: fork, blocked signals, waiting for one with a time limit.

#![expect(unsafe_code, reason = "fork(2) and the signal-set functions have no safe form")]

use std::io;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use rustix::process::{Pid, Signal};

/// Exit status of a child whose closure panicked.
pub(crate) const PANICKED: i32 = 101;

/// Forks; the child runs `run` and ends with its result as exit status, without running the parent's destructors.
///
/// # Errors
/// Of `fork`; `EBUSY` if this process has more than one thread, since the child would then inherit locks that nobody
/// will ever release.
pub(crate) fn fork(run: impl FnOnce() -> i32) -> io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: this process has one thread, so the child's copy of every lock and allocator state is consistent.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let status = catch_unwind(AssertUnwindSafe(run)).unwrap_or(PANICKED);
        // SAFETY: _exit(2) has no preconditions; buffers of the parent are not to be flushed twice.
        unsafe { libc::_exit(status) }
    }
    Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)
}

/// Gives the calling thread a real-time priority (`SCHED_FIFO`, the lowest of them): no ordinary task, the kernel's
/// workers among them, takes the CPU from it.
///
/// # Errors
/// Of `sched_setscheduler`: `EPERM` without the privilege.
pub(crate) fn run_real_time() -> io::Result<()> {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: the structure is initialised and outlives the call; 0 is the calling thread.
    match unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn signal_set(signals: &[Signal]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointer is to a set, which this initialises.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset cannot fail with a valid pointer, and has initialised the set.
    let mut set = unsafe { set.assume_init() };
    for signal in signals {
        // SAFETY: the set is initialised, and the number is a signal's.
        unsafe { libc::sigaddset(&raw mut set, signal.as_raw()) };
    }
    set
}

/// Blocks `signals` in this thread (and in those it starts), so that they wait for [`wait_signal`].
pub(crate) fn block_signals(signals: &[Signal]) {
    let set = signal_set(signals);
    // SAFETY: the set is initialised; no old mask is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Unblocks every signal, as a program that is about to be executed expects.
pub(crate) fn unblock_signals() {
    let set = signal_set(&[]);
    // SAFETY: the set is initialised; no old mask is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()) };
}

/// The next of the blocked `signals`, or `None` when `limit` of guest time passed without one.
///
/// # Errors
/// Of `sigtimedwait`, but for `EINTR`, which counts as `None`.
pub(crate) fn wait_signal(signals: &[Signal], limit: Duration) -> io::Result<Option<i32>> {
    let set = signal_set(signals);
    let timeout = libc::timespec {
        tv_sec: limit.as_secs().min(i64::MAX as u64).cast_signed(),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: set and timeout are initialised and outlive the call; no siginfo is asked for.
    let signal = unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const timeout) };
    if signal > 0 {
        return Ok(Some(signal));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EINTR) => Ok(None),
        _ => Err(error),
    }
}

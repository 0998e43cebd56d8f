//! Reordering: a channel that lets another one complete a descriptor first.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Completions of one GPU's channels, for those that wait for one. Without waiters a completion costs one load.
#[derive(Debug, Default)]
pub struct Order {
    waiters: AtomicU32,
    completions: Mutex<u64>,
    changed: Condvar,
}

impl Order {
    /// A channel completed a descriptor, or something else happened that a waiter should see.
    pub fn moved(&self) {
        if self.waiters.load(Ordering::Acquire) > 0 {
            let mut completions = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
            *completions = completions.wrapping_add(1);
            self.changed.notify_all();
        }
    }

    /// Waits until another channel has completed a descriptor, `time` is over, or `enough` says so.
    pub fn wait(&self, time: Duration, enough: impl Fn() -> bool) {
        self.waiters.fetch_add(1, Ordering::AcqRel);
        let completions = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *completions;
        let stays = |completions: &mut u64| *completions == before && !enough();
        drop(self.changed.wait_timeout_while(completions, time, stays));
        self.waiters.fetch_sub(1, Ordering::AcqRel);
    }
}

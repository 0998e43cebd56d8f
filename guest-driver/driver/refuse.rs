// SPDX-License-Identifier: GPL-2.0

//! Refusing to serve CPU faults for a time (`HSGPU_REFUSE`), as drivers do that keep a page on the device for a time slice,
//! and as broken ones do. Off unless asked for, and over by itself.

use kernel::{
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

use crate::{
    abi::uapi,
    stats::Counter, //
};

/// What is refused, and until when.
pub(crate) struct Refusal {
    mode: Atomic<u32>,
    /// Nanoseconds after `since`.
    until: Atomic<i64>,
    since: Instant<Monotonic>,
    refused: Counter,
}

/// What to do instead of serving a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instead {
    /// Return as if all were well.
    Stay,
    /// Fail.
    Fail,
}

impl Refusal {
    /// Refuses nothing.
    pub(crate) fn new() -> Self {
        Self {
            mode: Atomic::new(uapi::REFUSE_NOTHING),
            until: Atomic::new(0),
            since: Instant::now(),
            refused: Counter::new(),
        }
    }

    /// Serves `HSGPU_REFUSE`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an unknown mode or too long a time.
    pub(crate) fn set(&self, req: &mut uapi::Refuse) -> Result {
        if req.mode > uapi::REFUSE_FAIL || req.reserved != 0 || req.for_us > uapi::HOLD_LIMIT_US {
            return Err(EINVAL);
        }
        let length = i64::try_from(req.for_us)? * 1_000;

        // The end first: a fault that sees the new mode with the old end is served, and no longer refused than asked.
        self.mode.store(uapi::REFUSE_NOTHING, Relaxed);
        self.until
            .store(self.since.elapsed().as_nanos() + length, Relaxed);
        self.mode.store(req.mode, Relaxed);
        req.refused = self.refused.get();
        Ok(())
    }

    /// What to do instead of serving the fault that just came in, if it is to be refused.
    pub(crate) fn instead(&self) -> Option<Instead> {
        let instead = match self.mode.load(Relaxed) {
            uapi::REFUSE_STAY => Instead::Stay,
            uapi::REFUSE_FAIL => Instead::Fail,
            _ => return None,
        };

        if self.since.elapsed().as_nanos() >= self.until.load(Relaxed) {
            return None;
        }
        self.refused.inc();
        Some(instead)
    }
}

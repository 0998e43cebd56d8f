// SPDX-License-Identifier: GPL-2.0

//! A gate counts those who are inside, and closes once for good.

use kernel::{
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Full,
            Relaxed, //
        },
        Completion, //
    }, //
};

/// Bit of the state: nobody may enter any more. Far above any possible number of threads.
const CLOSED: i64 = 1 << 62;

/// A gate: open when made, then closed for good, after which one can wait until everyone has left.
///
/// Entering costs one atomic operation and never sleeps.
#[pin_data]
pub(crate) struct Gate {
    /// Number of those inside, plus [`CLOSED`].
    state: Atomic<i64>,
    /// Completed when the gate is closed and nobody is inside.
    #[pin]
    empty: Completion,
}

/// Proof of being inside a [`Gate`]; dropping it leaves.
pub(crate) struct Inside<'a>(&'a Gate);

impl Gate {
    /// An open gate.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            state: Atomic::new(0),
            empty <- Completion::new(),
        })
    }

    /// Enters, unless the gate is closed.
    #[inline]
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let before = self.state.fetch_add(1, Full);
        let inside = Inside(self);

        // Having counted ourselves first, we are waited for if the gate was open.
        (before & CLOSED == 0).then_some(inside)
    }

    /// Closes the gate; those inside stay.
    ///
    /// Returns whether it was open.
    pub(crate) fn close(&self) -> bool {
        let mut seen = self.state.load(Relaxed);

        while seen & CLOSED == 0 {
            match self.state.cmpxchg(seen, seen | CLOSED, Full) {
                Ok(_) => {
                    if seen == 0 {
                        self.empty.complete_all();
                    }
                    return true;
                }
                Err(now) => seen = now,
            }
        }
        false
    }

    /// Waits until nobody is inside; the gate must have been closed before.
    pub(crate) fn wait_empty(&self) {
        self.empty.wait_for_completion();
    }
}

impl Drop for Inside<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.0.state.fetch_add(-1, Full) == CLOSED + 1 {
            self.0.empty.complete_all();
        }
    }
}

#[kunit_tests(hsgpu_gate)]
mod tests {
    use super::*;

    #[test]
    fn closed_gate_lets_nobody_in_and_waits_for_the_last() -> Result {
        let gate = KBox::pin_init(Gate::new(), GFP_KERNEL)?;

        let first = gate.enter().ok_or(EINVAL)?;
        let second = gate.enter().ok_or(EINVAL)?;
        assert!(gate.close());
        assert!(!gate.close());
        assert!(gate.enter().is_none());
        drop(first);
        drop(second);
        gate.wait_empty();
        Ok(())
    }

    #[test]
    fn closing_an_empty_gate_does_not_wait() -> Result {
        let gate = KBox::pin_init(Gate::new(), GFP_KERNEL)?;

        assert!(gate.close());
        gate.wait_empty();
        assert!(gate.enter().is_none());
        Ok(())
    }
}

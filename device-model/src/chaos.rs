//! Faults on purpose: a [`Chaos`] plan, and the decisions that follow from it.
//!
//! Decisions depend on the plan's seed and on how many segments, descriptors and interrupts this GPU has seen under
//! the plan, and on nothing else.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use hmmstorm_abi::job::mix;
use hmmstorm_abi::wire::control::Chaos;

/// A plan in force, with what it has counted.
#[derive(Debug, Default)]
struct InForce {
    plan: Chaos,
    segments: AtomicU64,
    descriptors: AtomicU64,
    interrupts: AtomicU64,
}

/// The plan of one GPU. Replacing it starts its counts anew.
#[derive(Debug, Default)]
pub struct Plan {
    in_force: RwLock<InForce>,
    /// Whether `in_force` asks for anything at all, so that a GPU without chaos pays one load for it.
    any: AtomicBool,
    dead: AtomicBool,
}

/// One flipped bit of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Byte, from the segment's start.
    pub offset: u64,
    /// The bit, as a mask.
    pub mask: u8,
}

impl Plan {
    /// A GPU's plan at start.
    pub fn new(plan: Chaos) -> Self {
        let new = Self::default();
        new.replace(plan);
        new
    }

    /// Puts another plan in force.
    pub fn replace(&self, plan: Chaos) {
        let mut in_force = self.in_force.write().unwrap_or_else(PoisonError::into_inner);
        let quiet = Chaos { seed: plan.seed, ..Chaos::default() };
        self.any.store(plan != quiet, Ordering::Relaxed);
        self.dead.store(plan.dead, Ordering::Release);
        *in_force = InForce { plan, ..InForce::default() };
    }

    /// Whether the device plays dead.
    pub fn dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Whether `channel` may not execute now.
    pub fn holds(&self, _channel: u16) -> bool {
        self.dead()
    }

    /// How long the next descriptor has to wait; zero for not at all.
    pub fn latency(&self) -> Duration {
        self.ask(|in_force| Some(Duration::from_micros(in_force.plan.latency_us))).unwrap_or_default()
    }

    /// Whether the next descriptor fails.
    pub fn fails_descriptor(&self) -> bool {
        self.ask(|in_force| nth(&in_force.descriptors, in_force.plan.fail_every)).is_some()
    }

    /// Whether the next interrupt is lost.
    pub fn drops_interrupt(&self) -> bool {
        self.ask(|in_force| nth(&in_force.interrupts, in_force.plan.drop_interrupt_every)).is_some()
    }

    /// What breaks in the next segment, of `length` bytes.
    pub fn corrupts_segment(&self, length: u64) -> Option<Flip> {
        self.ask(|in_force| {
            let count = nth(&in_force.segments, in_force.plan.corrupt_every)?;
            let random = mix(in_force.plan.seed ^ mix(count));
            let offset = (random >> 3).checked_rem(length)?;
            Some(Flip { offset, mask: 1 << (random & 7) })
        })
    }

    fn ask<T>(&self, question: impl FnOnce(&InForce) -> Option<T>) -> Option<T> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        question(&self.in_force.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Counts one, and returns the count if it is the `every`-th, twice `every`-th, …
fn nth(counter: &AtomicU64, every: u64) -> Option<u64> {
    if every == 0 {
        return None;
    }
    let count = counter.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
    count.is_multiple_of(every).then_some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_plan_does_nothing() {
        let plan = Plan::default();
        for _ in 0..100 {
            assert!(!plan.fails_descriptor() && !plan.drops_interrupt() && !plan.dead());
            assert_eq!(plan.corrupts_segment(4096), None);
            assert_eq!(plan.latency(), Duration::ZERO);
        }
    }

    #[test]
    fn every_third_means_every_third() {
        let plan = Plan::new(Chaos { fail_every: 3, ..Chaos::default() });
        let struck: Vec<bool> = (0..7).map(|_| plan.fails_descriptor()).collect();
        assert_eq!(struck, [false, false, true, false, false, true, false]);
    }

    #[test]
    fn a_plan_repeats_itself_and_another_seed_does_not() {
        let run = |seed| {
            let plan = Plan::new(Chaos { seed, corrupt_every: 2, ..Chaos::default() });
            (0..64).filter_map(|_| plan.corrupts_segment(4096)).collect::<Vec<_>>()
        };
        assert_eq!(run(7).len(), 32);
        assert!(run(7).iter().all(|flip| flip.offset < 4096 && flip.mask.count_ones() == 1));
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn an_empty_segment_cannot_be_corrupted() {
        let plan = Plan::new(Chaos { corrupt_every: 1, ..Chaos::default() });
        assert_eq!(plan.corrupts_segment(0), None);
    }
}

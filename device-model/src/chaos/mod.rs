//! Faults on purpose: a [`Chaos`] plan, and the decisions that follow from it.
//!
//! Decisions depend on the plan's seed and on how many segments, descriptors, interrupts and page faults this GPU has
//! seen under the plan, and on nothing else.

pub mod late;
pub mod order;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use hmmstorm_abi::job::mix;
use hmmstorm_abi::pci::CHANNELS;
use hmmstorm_abi::ring::Opcode;
use hmmstorm_abi::wire::control::Chaos;

/// How long a descriptor is held back, if the plan does not say.
const REORDER: Duration = Duration::from_millis(1);
/// How late an interrupt is, if the plan does not say.
const INTERRUPT_DELAY: Duration = Duration::from_millis(10);

/// What is counted and chosen apart from the rest.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Segment,
    Descriptor,
    Copy,
    Latency,
    Reorder,
    DropInterrupt,
    DuplicateInterrupt,
    DelayInterrupt,
    DropFault,
    DuplicateFault,
    SpuriousFault,
    OverflowFault,
    Hang,
    Dead,
}

const KINDS: usize = Kind::Dead as usize + 1;

/// A plan in force, with what it has counted.
#[derive(Debug, Default)]
struct InForce {
    plan: Chaos,
    counts: [AtomicU64; KINDS],
    /// The channel that the plan hangs has been reset.
    unhung: AtomicBool,
    /// It has been noticed that it hangs.
    hung: AtomicBool,
}

impl InForce {
    /// Counts one, and returns the count.
    fn count(&self, kind: Kind) -> u64 {
        self.counts[kind as usize].fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    /// Counts one, and returns the count if it is the `every`-th, twice `every`-th, …
    fn nth(&self, kind: Kind, every: u64) -> Option<u64> {
        if every == 0 {
            return None;
        }
        let count = self.count(kind);
        count.is_multiple_of(every).then_some(count)
    }

    /// A random number for the `count`-th of its kind.
    fn random(&self, kind: Kind, count: u64) -> u64 {
        mix(self.plan.seed ^ mix((kind as u64) << 56 ^ count))
    }

    /// This many microseconds, or a sample of the distribution with that mean.
    fn latency(&self, microseconds: u64) -> Duration {
        let mean = Duration::from_micros(microseconds);
        if !self.plan.exponential || microseconds == 0 {
            return mean;
        }
        let random = self.random(Kind::Latency, self.count(Kind::Latency));
        // From 2^-53 to 1, so that the logarithm is finite.
        let uniform = ((random >> 11) + 1) as f64 / (1_u64 << 53) as f64;
        mean.mul_f64(-uniform.ln())
    }
}

/// What happens to an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptFate {
    /// It is raised.
    Raised,
    /// It is lost.
    Dropped,
    /// It is raised twice.
    Doubled,
    /// It is raised after this time.
    Late(Duration),
}

/// What happens to the report of a page fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReportFate {
    /// It does not reach the buffer.
    pub dropped: bool,
    /// It finds the buffer full.
    pub overflowed: bool,
    /// It is there twice.
    pub doubled: bool,
    /// Another one follows, for a page this far away (in pages, wrapping).
    pub spurious: Option<u64>,
}

/// One flipped bit of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flip {
    /// Byte, from the segment's start.
    pub offset: u64,
    /// The bit, as a mask.
    pub mask: u8,
}

/// The plan of one GPU. Replacing it starts its counts anew.
#[derive(Debug, Default)]
pub struct Plan {
    in_force: RwLock<InForce>,
    /// Whether `in_force` asks for anything at all, so that a GPU without chaos pays one load for it.
    any: AtomicBool,
    dead: AtomicBool,
}

/// Checks what no single value can show.
///
/// # Errors
/// A sentence for the user.
pub fn check(plan: &Chaos) -> Result<(), String> {
    match plan.hang_channel {
        Some(channel) if usize::from(channel) >= CHANNELS => {
            Err(format!("hang_channel {channel}: channels are 0 to {}", CHANNELS - 1))
        }
        _ => Ok(()),
    }
}

const fn copies(opcode: Option<Opcode>) -> bool {
    matches!(opcode, Some(Opcode::Copy | Opcode::CopyList | Opcode::Fill))
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

    /// Whether `channel` may not execute now, and whether that is news.
    pub fn holds(&self, channel: u16) -> Option<bool> {
        if self.dead() {
            return Some(false);
        }
        self.ask(|in_force| {
            let begun = in_force.counts[Kind::Hang as usize].load(Ordering::Relaxed);
            let plan = &in_force.plan;
            let hangs = plan.hang_channel == Some(channel)
                && begun >= plan.hang_after
                && !in_force.unhung.load(Ordering::Relaxed);
            hangs.then(|| !in_force.hung.swap(true, Ordering::Relaxed))
        })
    }

    /// `channel` was reset, which ends its hanging if that has begun: drivers reset channels before they use them.
    pub fn unhang(&self, channel: u16) {
        self.ask(|in_force| {
            let begun = in_force.counts[Kind::Hang as usize].load(Ordering::Relaxed);
            let hangs = in_force.plan.hang_channel == Some(channel) && begun >= in_force.plan.hang_after;
            hangs.then(|| in_force.unhung.store(true, Ordering::Relaxed))
        });
    }

    /// Whether descriptors have to wait, so that it matters what comes next.
    pub fn delays(&self) -> bool {
        self.ask(|InForce { plan, .. }| {
            let waits = [plan.latency_us, plan.copy_latency_us, plan.access_latency_us, plan.reorder_every];
            Some(waits.iter().any(|wait| *wait != 0))
        })
        .unwrap_or_default()
    }

    /// How long the next descriptor has to wait.
    pub fn latency(&self, opcode: Option<Opcode>) -> Duration {
        self.ask(|in_force| {
            let plan = &in_force.plan;
            let engine = match opcode {
                Some(Opcode::Access) => plan.access_latency_us,
                _ if copies(opcode) => plan.copy_latency_us,
                _ => 0,
            };
            Some(in_force.latency(plan.latency_us).saturating_add(in_force.latency(engine)))
        })
        .unwrap_or_default()
    }

    /// How long the next descriptor is to let another channel go first, if at all.
    pub fn holds_back(&self) -> Option<Duration> {
        self.ask(|in_force| {
            in_force.nth(Kind::Reorder, in_force.plan.reorder_every)?;
            Some(or(in_force.plan.reorder_us, REORDER))
        })
    }

    /// The order in which a synchronous device serves its channels after a replay.
    pub fn order(&self) -> [usize; CHANNELS] {
        let mut order = std::array::from_fn(|channel| channel);
        self.ask(|in_force| {
            let count = in_force.nth(Kind::Reorder, in_force.plan.reorder_every)?;
            // Fisher and Yates.
            for last in (1..CHANNELS).rev() {
                let random = in_force.random(Kind::Reorder, count << 8 | last as u64);
                order.swap(last, (random % (last as u64 + 1)) as usize);
            }
            Some(())
        });
        order
    }

    /// Whether the next descriptor, of `channel`, fails.
    pub fn fails_descriptor(&self, channel: u16, opcode: Option<Opcode>) -> bool {
        self.ask(|in_force| {
            let plan = &in_force.plan;
            if plan.hang_channel == Some(channel) {
                in_force.count(Kind::Hang);
            }
            if plan.dead_after != 0 && in_force.count(Kind::Dead) >= plan.dead_after {
                self.dead.store(true, Ordering::Release);
            }
            let any = in_force.nth(Kind::Descriptor, plan.fail_every).is_some();
            let copy = copies(opcode) && in_force.nth(Kind::Copy, plan.fail_copy_every).is_some();
            Some(any || copy)
        })
        .unwrap_or_default()
    }

    /// What happens to the next interrupt.
    pub fn interrupt(&self) -> InterruptFate {
        self.ask(|in_force| {
            let plan = &in_force.plan;
            let dropped = in_force.nth(Kind::DropInterrupt, plan.drop_interrupt_every);
            let doubled = in_force.nth(Kind::DuplicateInterrupt, plan.duplicate_interrupt_every);
            let late = in_force.nth(Kind::DelayInterrupt, plan.delay_interrupt_every);
            Some(match (dropped, late, doubled) {
                (Some(_), _, _) => InterruptFate::Dropped,
                (_, Some(_), _) => InterruptFate::Late(or(plan.interrupt_delay_us, INTERRUPT_DELAY)),
                (_, _, Some(_)) => InterruptFate::Doubled,
                (None, None, None) => InterruptFate::Raised,
            })
        })
        .unwrap_or(InterruptFate::Raised)
    }

    /// What happens to the next report of a page fault.
    pub fn report(&self) -> ReportFate {
        self.ask(|in_force| {
            let plan = &in_force.plan;
            let spurious = in_force.nth(Kind::SpuriousFault, plan.spurious_fault_every);
            let away = |count| (in_force.random(Kind::SpuriousFault, count) % 512).wrapping_sub(256);
            Some(ReportFate {
                dropped: in_force.nth(Kind::DropFault, plan.drop_fault_every).is_some(),
                overflowed: in_force.nth(Kind::OverflowFault, plan.overflow_fault_every).is_some(),
                doubled: in_force.nth(Kind::DuplicateFault, plan.duplicate_fault_every).is_some(),
                spurious: spurious.map(away),
            })
        })
        .unwrap_or_default()
    }

    /// What breaks in the next segment, of `length` bytes.
    pub fn corrupts_segment(&self, length: u64) -> Option<Flip> {
        self.ask(|in_force| {
            let count = in_force.nth(Kind::Segment, in_force.plan.corrupt_every)?;
            let random = in_force.random(Kind::Segment, count);
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

/// This many microseconds, or a default for 0.
const fn or(microseconds: u64, default: Duration) -> Duration {
    if microseconds == 0 { default } else { Duration::from_micros(microseconds) }
}

#[cfg(test)]
mod tests;

//! The inner loop of a job: addresses by its pattern, translations page by page, and what it does to each word.
//!
//! Loads and stores are 8-byte atomic. Atomics in the GPU's own VRAM are the host's own; anywhere else they go over the
//! bus, see [`super::atomics`].

use std::sync::atomic::{AtomicU64, Ordering};

use hmmstorm_abi::job::{Job, Op, Outcome, Pattern, WORD, mix};
use hmmstorm_abi::mmu::{PAGE_SHIFT, Reason, Want};
use hmmstorm_abi::ring::Location;
use vm_memory::{VolatileMemory, VolatileSlice};

use super::place::Place;
use super::{Failure, PAGE};
use crate::core::Core;
use crate::guest_memory::{DmaGuard, Need};
use crate::mmu::Space;

/// Accesses of a stretch: some ten to hundred microseconds.
const STRETCH: u64 = 4096;
/// Pages whose translation and mapping a stretch keeps at hand.
const AT_HAND: usize = 16;

/// Why a stretch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// The job is done.
    Done,
    /// It was long enough.
    Breath,
    /// There is no translation.
    Fault {
        /// For this address.
        va: u64,
        /// And this use.
        want: Want,
        /// Because of this.
        reason: Reason,
    },
}

/// Where a job's next access goes.
#[derive(Clone, Copy, Debug)]
pub struct Walker {
    index: u64,
    /// Offset of the next access of a strided job whose products stay below 2^64; the next address of a chase.
    next: u64,
    /// Stride modulo window; nothing if it has to be computed access by access.
    step: Option<u64>,
}

impl Walker {
    /// At the job's first access.
    pub fn new(job: &Job) -> Self {
        let exact = job.stride.checked_mul(job.count).is_some() && job.window <= 1 << 63;
        let step = (job.pattern == Pattern::Strided && exact).then(|| job.stride % job.window);
        let next = if job.pattern == Pattern::Chase { job.va } else { 0 };
        Self { index: 0, next, step }
    }

    /// Address of the next access.
    pub const fn address(&self, job: &Job) -> u64 {
        match (job.pattern, self.step) {
            (Pattern::Chase, _) => self.next,
            (_, Some(_)) => job.va + self.next,
            (_, None) => job.address(self.index),
        }
    }

    /// Moves on, to where `found` leads if the job is a chase. False if that is outside the job's window.
    pub const fn advance(&mut self, job: &Job, found: u64) -> bool {
        self.index += 1;
        if let Some(step) = self.step {
            self.next += step;
            if self.next >= job.window {
                self.next -= job.window;
            }
        } else if matches!(job.pattern, Pattern::Chase) {
            self.next = found;
            return found.is_multiple_of(WORD) && found >= job.va && found - job.va < job.window;
        }
        true
    }
}

/// A piece of memory that a translation leads to.
#[derive(Clone, Copy, Debug)]
struct Mapped<'a> {
    va: u64,
    /// It is the GPU's own VRAM.
    own: bool,
    words: VolatileSlice<'a>,
}

impl Mapped<'_> {
    fn holds(&self, va: u64) -> bool {
        va.wrapping_sub(self.va) < self.words.len() as u64
    }

    fn word(&self, va: u64) -> Option<&AtomicU64> {
        let offset = usize::try_from(va.wrapping_sub(self.va)).ok()?;
        self.words.get_atomic_ref(offset).ok()
    }
}

/// Runs a stretch of `job`.
///
/// # Errors
/// [`Failure`] if a translation leads to memory that cannot be used.
pub fn run(
    core: &Core,
    guard: &DmaGuard<'_>,
    space: &Space<'_>,
    job: &Job,
    walker: &mut Walker,
    outcome: &mut Outcome,
) -> Result<Pause, Failure> {
    let want = wanted(job.op);
    let reads = job.op != Op::Store;
    let generation = mix(job.tag);
    let next_generation = mix(job.operand);
    // What `word_at()` computes, with its inner half done once.
    let word_at = |va: u64, generation: u64| mix(va ^ generation);
    let mut at_hand: [Option<Mapped<'_>>; AT_HAND] = [None; AT_HAND];
    for _ in 0..STRETCH {
        if walker.index >= job.count {
            return Ok(Pause::Done);
        }
        let va = walker.address(job);
        let slot = &mut at_hand[(va >> PAGE_SHIFT) as usize % AT_HAND];
        if slot.as_ref().is_none_or(|mapped| !mapped.holds(va)) {
            match map(core, guard, space, va, want, reads)? {
                Ok(mapped) => *slot = Some(mapped),
                Err(reason) => return Ok(Pause::Fault { va, want, reason }),
            }
        }
        let own = slot.as_ref().is_some_and(|mapped| mapped.own);
        let Some(word) = slot.as_ref().and_then(|mapped| mapped.word(va)) else {
            return Err(Failure::Job("a word that is not in one piece"));
        };
        let mut found = 0;
        match job.op {
            Op::Load => {
                found = word.load(Ordering::Acquire);
                outcome.sum = outcome.sum.wrapping_add(found);
            }
            Op::Check | Op::CheckStore => {
                let (found, wanted) = (word.load(Ordering::Acquire), word_at(va, generation));
                if found != wanted {
                    mismatch(outcome, va, found, wanted);
                }
                if job.op == Op::CheckStore {
                    word.store(word_at(va, next_generation), Ordering::Release);
                }
            }
            Op::Store => word.store(word_at(va, generation), Ordering::Release),
            Op::AtomicAdd => {
                let found = if own {
                    word.fetch_add(job.operand, Ordering::SeqCst)
                } else {
                    core.bus_atomics.add(word, job.operand)
                };
                outcome.sum = outcome.sum.wrapping_add(found);
            }
            Op::AtomicCompareExchange => {
                let found = if own {
                    let exchanged =
                        word.compare_exchange(job.tag, job.operand, Ordering::SeqCst, Ordering::SeqCst);
                    exchanged.unwrap_or_else(|found| found)
                } else {
                    core.bus_atomics.compare_exchange(word, job.tag, job.operand)
                };
                if found != job.tag {
                    mismatch(outcome, va, found, job.tag);
                }
            }
        }
        outcome.done += 1;
        if !walker.advance(job, found) && walker.index < job.count {
            mismatch(outcome, va, found, job.va);
            return Ok(Pause::Done);
        }
    }
    Ok(if walker.index >= job.count { Pause::Done } else { Pause::Breath })
}

fn mismatch(outcome: &mut Outcome, va: u64, found: u64, wanted: u64) {
    outcome.mismatches += 1;
    if outcome.mismatches == 1 {
        (outcome.first_va, outcome.first_found, outcome.first_wanted) = (va, found, wanted);
    }
}

const fn wanted(op: Op) -> Want {
    match op {
        Op::Load | Op::Check => Want::Read,
        Op::Store | Op::CheckStore => Want::Write,
        Op::AtomicAdd | Op::AtomicCompareExchange => Want::Atomic,
    }
}

/// Translates `va` and looks up the memory of its 4 KiB, which is to be read as well or only written.
fn map<'a>(
    core: &'a Core,
    guard: &'a DmaGuard<'_>,
    space: &Space<'_>,
    va: u64,
    want: Want,
    reads: bool,
) -> Result<Result<Mapped<'a>, Reason>, Failure> {
    let translation = match space.translate(core, guard, va, want) {
        Ok(translation) => translation,
        Err(reason) => return Ok(Err(reason)),
    };
    let start = va >> PAGE_SHIFT << PAGE_SHIFT;
    let offset = start - translation.va;
    let at = Location { address: translation.page.address + offset, ..translation.page };
    let place = Place::of(core, at, PAGE)?;
    if reads {
        place.check_poison(core, PAGE)?;
    }
    let need = if want == Want::Read { Need::Read } else { Need::Write };
    let words = place.span(guard, 0, PAGE, need)?;
    Ok(Ok(Mapped { va: start, own: place.is_vram_of(core), words }))
}

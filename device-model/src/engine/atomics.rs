//! Atomic operations beyond the GPU's own VRAM: a read and a write over the bus.
//!
//! A GPU keeps its own jobs from coming between the two; CPUs and other GPUs know nothing of it. Whether anybody else
//! uses the word is the driver's business: it allows atomics in a translation only while nobody does.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Turns of a wait loop between read and write: about a hundred nanoseconds, far less than a bus takes.
const BETWEEN: u32 = 32;

/// What makes the read and the write of one GPU's job one for its other jobs.
#[derive(Debug, Default)]
pub struct BusAtomics(Mutex<()>);

impl BusAtomics {
    /// Adds `operand` to `word`, and returns what it was.
    pub fn add(&self, word: &AtomicU64, operand: u64) -> u64 {
        self.update(word, |found| Some(found.wrapping_add(operand)))
    }

    /// Replaces `old` by `new`, and returns what was there.
    pub fn compare_exchange(&self, word: &AtomicU64, old: u64, new: u64) -> u64 {
        self.update(word, |found| (found == old).then_some(new))
    }

    fn update(&self, word: &AtomicU64, next: impl FnOnce(u64) -> Option<u64>) -> u64 {
        let _one = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = word.load(Ordering::Acquire);
        (0..BETWEEN).for_each(|_| spin_loop());
        if let Some(next) = next(found) {
            word.store(next, Ordering::Release);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const ADDS: u64 = 2000;

    #[test]
    fn jobs_of_one_gpu_do_not_lose_each_others_updates() {
        let (gpu, word) = (BusAtomics::default(), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..ADDS).map(|_| gpu.add(&word, 1)).max());
            }
        });
        assert_eq!(word.into_inner(), 4 * ADDS);
    }

    #[test]
    fn only_the_wanted_word_is_replaced() {
        let (gpu, word) = (BusAtomics::default(), AtomicU64::new(7));
        assert_eq!(gpu.compare_exchange(&word, 6, 1), 7);
        assert_eq!(gpu.compare_exchange(&word, 7, 1), 7);
        assert_eq!(word.into_inner(), 1);
    }
}

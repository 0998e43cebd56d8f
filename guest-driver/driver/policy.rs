// SPDX-License-Identifier: GPL-2.0

//! Where a page goes that the GPU faults on.
//!
//! The answer is per address space, and set by user space: how much moves at once, whether it moves at all, whose
//! device-private pages count as its own, and when to give up on memory that CPU and GPU take from each other all the
//! time: after some migrations of a chunk within a time it stays in system memory for as long again, and the GPU accesses
//! it there.

use core::ops::Range;

use kernel::{
    prelude::*,
    time::{
        Delta,
        Instant,
        Monotonic, //
    }, //
};

use crate::abi::{
    job::mix,
    uapi::{
        self,
        PAGE_SIZE, //
    },
};

/// Chunks whose migrations are remembered. Two that share a place make each other forgotten.
const SLOTS: usize = 1024;

/// What user space asked for.
#[derive(Clone, Copy)]
pub(crate) struct Policy {
    /// Bytes that are migrated and mapped at once, naturally aligned: 4 KiB, 64 KiB or 2 MiB.
    pub(crate) chunk: u64,
    /// Whether pages migrate to the GPU at all.
    pub(crate) migrate: bool,
    /// Whether the GPU's own device-private pages are its own for `hmm_range_fault()`.
    pub(crate) own: bool,
    /// Migrations of a chunk to the GPU within `window` after which it stays; 0 for any number.
    pub(crate) limit: u32,
    /// The time in which `limit` counts, and for which a chunk stays then.
    pub(crate) window: Delta,
}

impl Policy {
    /// What a new address space has.
    pub(crate) const DEFAULT: Self = Self {
        chunk: 64 << 10,
        migrate: true,
        own: true,
        limit: 0,
        window: Delta::from_millis(100),
    };

    /// Decodes what user space asked for.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is none of the choices.
    pub(crate) fn new(asked: &uapi::Policy) -> Result<Self> {
        let migrate = match asked.placement {
            uapi::PLACE_MIGRATE => true,
            uapi::PLACE_STAY => false,
            _ => return Err(EINVAL),
        };
        let own = match asked.owner {
            uapi::OWNER_OWN => true,
            uapi::OWNER_NONE => false,
            _ => return Err(EINVAL),
        };

        if !uapi::CHUNKS.contains(&asked.chunk) {
            return Err(EINVAL);
        }
        Ok(Self {
            chunk: asked.chunk,
            migrate,
            own,
            limit: asked.limit,
            window: Delta::from_millis(i64::from(asked.window_ms)),
        })
    }

    /// The chunk in which `va` is.
    pub(crate) fn chunk_of(&self, va: u64) -> Range<u64> {
        let start = va & !(self.chunk - 1);

        start..start + self.chunk
    }
}

/// What is remembered about a chunk.
#[derive(Clone, Copy)]
struct Slot {
    /// Address of the chunk.
    chunk: u64,
    /// Migrations to the GPU since `since`.
    count: u32,
    since: Instant<Monotonic>,
}

/// The migrations of late in one address space.
pub(crate) struct History {
    slots: KVVec<Option<Slot>>,
}

impl History {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            slots: KVVec::from_elem(None, SLOTS, GFP_KERNEL)?,
        })
    }

    fn slot(&mut self, chunk: u64) -> Option<&mut Option<Slot>> {
        // CAST: a small remainder.
        let index = (mix(chunk / PAGE_SIZE as u64) % SLOTS as u64) as usize;

        self.slots.get_mut(index)
    }

    /// Whether the chunk at `chunk` may migrate to the GPU at time `now`.
    pub(crate) fn may_migrate(
        &mut self,
        policy: &Policy,
        chunk: u64,
        now: Instant<Monotonic>,
    ) -> bool {
        policy.limit == 0
            || !self.slot(chunk).is_some_and(|slot| {
                slot.is_some_and(|slot| {
                    slot.chunk == chunk
                        && slot.count >= policy.limit
                        && now - slot.since <= policy.window
                })
            })
    }

    /// Pages of the chunk at `chunk` have migrated to the GPU at time `now`.
    pub(crate) fn migrated(&mut self, policy: &Policy, chunk: u64, now: Instant<Monotonic>) {
        let Some(slot) = self.slot(chunk) else {
            return;
        };

        match slot {
            Some(slot) if slot.chunk == chunk && now - slot.since <= policy.window => {
                slot.count = slot.count.saturating_add(1);
                // It stays for a whole window from the last migration on.
                if slot.count == policy.limit {
                    slot.since = now;
                }
            }
            _ => {
                *slot = Some(Slot {
                    chunk,
                    count: 1,
                    since: now,
                });
            }
        }
    }
}

#[kunit_tests(hsgpu_policy)]
mod tests {
    use super::*;

    const CHUNK: u64 = 0x7000_0000_0000;

    fn policy(limit: u32, window_ms: i64) -> Policy {
        Policy {
            limit,
            window: Delta::from_millis(window_ms),
            ..Policy::DEFAULT
        }
    }

    #[test]
    fn a_chunk_stays_once_it_has_moved_too_often() -> Result {
        let mut history = History::new()?;
        let policy = policy(3, 1_000_000);
        let now = Instant::<Monotonic>::now();

        for _ in 0..3 {
            assert!(history.may_migrate(&policy, CHUNK, now));
            history.migrated(&policy, CHUNK, now);
        }
        assert!(!history.may_migrate(&policy, CHUNK, now));
        // Others are not concerned, and a policy without a limit is none.
        assert!(history.may_migrate(&policy, CHUNK + policy.chunk, now));
        assert!(history.may_migrate(&Policy::DEFAULT, CHUNK, now));
        Ok(())
    }

    #[test]
    fn a_chunk_that_moves_seldom_may_always() -> Result {
        let mut history = History::new()?;
        // Whatever was before now is outside of this window.
        let policy = policy(1, -1);

        for _ in 0..10 {
            let now = Instant::<Monotonic>::now();

            assert!(history.may_migrate(&policy, CHUNK, now));
            history.migrated(&policy, CHUNK, now);
        }
        Ok(())
    }

    #[test]
    fn only_what_the_interface_names_is_taken() {
        let good = uapi::Policy {
            chunk: 2 << 20,
            limit: 4,
            window_ms: 10,
            ..Default::default()
        };

        assert!(Policy::new(&good).is_ok_and(|p| p.chunk == 2 << 20 && p.migrate && p.own));
        for bad in [
            uapi::Policy { chunk: 0, ..good },
            uapi::Policy {
                chunk: 8192,
                ..good
            },
            uapi::Policy {
                placement: 2,
                ..good
            },
            uapi::Policy { owner: 2, ..good },
        ] {
            assert!(Policy::new(&bad).is_err());
        }
    }

    #[test]
    fn chunks_are_naturally_aligned() {
        assert_eq!(
            Policy::DEFAULT.chunk_of(CHUNK + 0x1_2345),
            CHUNK + 0x1_0000..CHUNK + 0x2_0000
        );
    }
}

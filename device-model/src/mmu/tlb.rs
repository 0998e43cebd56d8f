//! The TLB: translations as they were when a walk found them, until they are forgotten on request or make room for
//! others. Set-associative; the one of a set that was used longest ago makes room.
//!
//! What it holds may be out of date, as in hardware: a driver that changes a page table and does not invalidate is
//! to meet the consequences.

use std::sync::{Mutex, MutexGuard, PoisonError};

use hmmstorm_abi::job::mix;
use hmmstorm_abi::mmu::{HUGE_SHIFT, PAGE_SHIFT, Want};

use super::Translation;

/// Translations of a set, unless the whole TLB is smaller.
const WAYS: usize = 8;

#[derive(Clone, Copy, Debug)]
struct Entry {
    asid: u16,
    translation: Translation,
    /// The set's clock when it was last used.
    used: u64,
}

impl Entry {
    const fn is(&self, asid: u16, va: u64, huge: bool) -> bool {
        self.asid == asid && self.translation.huge == huge && self.translation.va == base(va, huge)
    }
}

#[derive(Debug, Default)]
struct Set {
    clock: u64,
    entries: Vec<Entry>,
}

/// The TLB of a GPU. Sets are locked one by one.
#[derive(Debug)]
pub struct Tlb {
    sets: Box<[Mutex<Set>]>,
    ways: usize,
}

const fn base(va: u64, huge: bool) -> u64 {
    let shift = if huge { HUGE_SHIFT } else { PAGE_SHIFT };
    va >> shift << shift
}

impl Tlb {
    /// A TLB of `entries` translations, at least one; rounded up to whole sets.
    pub fn new(entries: usize) -> Self {
        let ways = entries.clamp(1, WAYS);
        Self { sets: (0..entries.div_ceil(ways).max(1)).map(|_| Mutex::default()).collect(), ways }
    }

    fn set(&self, asid: u16, va: u64, huge: bool) -> MutexGuard<'_, Set> {
        let hash = mix(base(va, huge) | u64::from(huge)) ^ u64::from(asid);
        // Smaller than the number of sets.
        let index = (hash % self.sets.len() as u64) as usize;
        self.sets[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is remembered for `va`, if it allows `want`; if it does not, it is forgotten.
    pub fn find(&self, asid: u16, va: u64, want: Want) -> Option<Translation> {
        [false, true].into_iter().find_map(|huge| {
            let mut set = self.set(asid, va, huge);
            let Set { clock, entries } = &mut *set;
            let at = entries.iter().position(|entry| entry.is(asid, va, huge))?;
            if entries[at].translation.allows(want) {
                *clock += 1;
                entries[at].used = *clock;
                return Some(entries[at].translation);
            }
            entries.swap_remove(at);
            None
        })
    }

    /// Remembers a translation.
    pub fn remember(&self, asid: u16, translation: Translation) {
        let Translation { va, huge, .. } = translation;
        let mut set = self.set(asid, va, huge);
        set.clock += 1;
        let entry = Entry { asid, translation, used: set.clock };
        let entries = &mut set.entries;
        if let Some(same) = entries.iter_mut().find(|same| same.is(asid, va, huge)) {
            *same = entry;
        } else if entries.len() < self.ways {
            entries.push(entry);
        } else if let Some(oldest) = entries.iter_mut().min_by_key(|entry| entry.used) {
            *oldest = entry;
        }
    }

    /// Forgets every translation of `asid` that translates an address from `first` to `last`.
    pub fn forget(&self, asid: u16, first: u64, last: u64) {
        for set in &self.sets {
            let mut set = set.lock().unwrap_or_else(PoisonError::into_inner);
            set.entries.retain(|Entry { asid: of, translation, .. }| {
                let end = translation.va + (translation.length() - 1);
                *of != asid || translation.va > last || end < first
            });
        }
    }
}

//! The MMU of one GPU: address spaces, the walk through their page tables, and the TLB.
//!
//! An access looks at translations under a [`Space`], i.e. with its address space locked for reading, and holds it
//! while it uses them. A binding or an invalidation takes the lock for writing: so it waits until accesses with old
//! translations are over, and no walk that began before it can leave an old translation in the TLB after it. A space
//! is held for some thousand accesses at most, like the DMA map; the map is taken first.

pub mod tlb;
pub mod walk;

use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use hmmstorm_abi::mmu::{ADDRESS_SPACES, HUGE_SHIFT, PAGE_SHIFT, Pte, Reason, Want};
use hmmstorm_abi::ring::Location;

use crate::core::Core;
use crate::guest_memory::DmaGuard;
use tlb::Tlb;

/// What a leaf of a page table, or the TLB's memory of one, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First virtual address that it translates.
    pub va: u64,
    /// Whether it is 2 MiB and not 4 KiB long.
    pub huge: bool,
    /// Where that address's byte is.
    pub page: Location,
    /// [`Pte::WRITE`] and [`Pte::ATOMIC`], as far as they are set.
    pub rights: u64,
}

impl Translation {
    /// Whether the page may be used like this. An atomic is a store too, so it needs both rights.
    pub const fn allows(&self, want: Want) -> bool {
        let needed = match want {
            Want::Read => 0,
            Want::Write => Pte::WRITE,
            Want::Atomic => Pte::WRITE | Pte::ATOMIC,
        };
        self.rights & needed == needed
    }

    /// Bytes that it translates.
    pub const fn length(&self) -> u64 {
        1 << if self.huge { HUGE_SHIFT } else { PAGE_SHIFT }
    }
}

/// Address spaces and TLB of one GPU.
#[derive(Debug)]
pub struct Mmu {
    /// The root of each space's page table.
    roots: Box<[RwLock<Option<Location>>]>,
    tlb: Tlb,
}

impl Mmu {
    /// An MMU without a bound space, whose TLB holds `tlb_entries` translations.
    pub fn new(tlb_entries: usize) -> Self {
        Self { roots: (0..ADDRESS_SPACES).map(|_| RwLock::default()).collect(), tlb: Tlb::new(tlb_entries) }
    }

    fn root(&self, asid: u32) -> Option<&RwLock<Option<Location>>> {
        self.roots.get(usize::try_from(asid).ok()?)
    }

    /// Whether there is an address space `asid`, bound or not.
    pub fn has(&self, asid: u32) -> bool {
        self.root(asid).is_some()
    }

    /// Address space `asid`, held still, if it exists and is bound.
    pub fn space(&self, asid: u32) -> Option<Space<'_>> {
        let root = self.root(asid)?.read().unwrap_or_else(PoisonError::into_inner);
        // There are fewer spaces than 2^16.
        (*root).map(|at| Space { tlb: &self.tlb, asid: asid as u16, at, _held: root })
    }

    /// Binds address space `asid` to the page table with this root, or to none, and forgets its translations; waits
    /// for accesses under way. A space that does not exist stays so.
    pub fn bind(&self, asid: u32, to: Option<Location>) {
        if let Some(root) = self.root(asid) {
            let mut root = root.write().unwrap_or_else(PoisonError::into_inner);
            *root = to;
            self.tlb.forget(asid as u16, 0, u64::MAX);
        }
    }

    /// Forgets the translations of `asid` for any address from `first` to `last`; waits for accesses under way.
    pub fn invalidate(&self, asid: u32, first: u64, last: u64) {
        if let Some(root) = self.root(asid) {
            let held = root.write().unwrap_or_else(PoisonError::into_inner);
            self.tlb.forget(asid as u16, first, last);
            drop(held);
        }
    }

    /// Unbinds every space.
    pub fn clear(&self) {
        // There are fewer spaces than 2^32.
        (0..self.roots.len() as u32).for_each(|asid| self.bind(asid, None));
    }
}

/// An address space, held still: while it lives, nothing of it is invalidated.
#[derive(Debug)]
pub struct Space<'a> {
    tlb: &'a Tlb,
    asid: u16,
    at: Location,
    _held: RwLockReadGuard<'a, Option<Location>>,
}

impl Space<'_> {
    /// Translates `va` for `want`, by the TLB or by a walk. A remembered translation that lacks the right is
    /// forgotten and looked up again, so that more rights need no invalidation.
    ///
    /// # Errors
    /// The [`Reason`] for a page fault.
    pub fn translate(
        &self,
        core: &Core,
        guard: &DmaGuard<'_>,
        va: u64,
        want: Want,
    ) -> Result<Translation, Reason> {
        if let Some(known) = self.tlb.find(self.asid, va, want) {
            core.stats.tlb_hits.increment();
            return Ok(known);
        }
        core.stats.tlb_misses.increment();
        let found = walk::walk(core, guard, self.at, va)?;
        if !found.allows(want) {
            return Err(Reason::Permission);
        }
        self.tlb.remember(self.asid, found);
        Ok(found)
    }
}

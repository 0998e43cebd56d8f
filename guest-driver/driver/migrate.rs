// SPDX-License-Identifier: GPL-2.0

//! Moving pages between processes and VRAM, on demand of user space and on CPU faults.
//!
//! A migration holds the locks of its folios from `migrate_vma_setup()` on until it is finalised. In between it
//! allocates destinations and waits for the copy engine, whose waits have an end. An error on the way drops the
//! migration, which puts all of its pages back where they were.
//!
//! # What must not happen before `migrate_vma_setup()`
//!
//! A storm prepares its pages so that they sit in the LRU batch of another CPU. So from the entry of the ioctl to the
//! setup nothing may drain these batches or wait for another CPU: two allocations and the mmap lock are all there is.
//! And what user space selects is selected in *one* setup, because the order in which the kernel locks folios and drains
//! batches within it is the subject of the test bench.
//!
//! # Huge folios
//!
//! A setup ends where a huge page does, so that none is cut. What is less than a huge page in front of the first one of
//! the range, or behind the last one, is in the same setup with it.
//!
//! With [`uapi::SELECT_HUGE`], what a PMD maps is collected as one folio and gets one of 2 MiB for a destination. If there
//! is none, it gets 512 small ones, and the kernel splits the folio on the way. Both are one migration and one
//! submission to the copy engine. Where the kernel cannot split on the way, which is when there is another reference
//! (that of a CPU fault) or no address (eviction), the folio is split before it is collected.
//!
//! Lock order: see [`crate::gpu`].

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    current,
    mm::{
        migrate::{
            Collected,
            Migration,
            Select,
            Source, //
        },
        pagemap::{
            Kind,
            Owner, //
        },
        virt::flags,
        Mm, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Full,
        Relaxed, //
    }, //
};

use crate::{
    abi::uapi::{
        self,
        PAGE_SIZE, //
    },
    engine::{
        Segment,
        Work, //
    },
    evict,
    gpu::Session,
    mirror::{
        owner,
        user_range, //
    },
    moving::{
        self,
        Room,
        PAGES, //
    },
    pagemap::VramPagemap, //
};

/// Bytes of a huge page.
const HUGE_SIZE: usize = PAGES * PAGE_SIZE;

/// How often room is made for one call: what was evicted for it may go to somebody else.
const EVICTIONS: usize = 8;

/// What user space can make fail ([`uapi::HMM_DMIRROR_FLAGS`]), for the migrations by one open file.
pub(crate) struct Failures(Atomic<u64>);

impl Failures {
    /// Nothing fails.
    pub(crate) fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Sets the flags.
    pub(crate) fn set(&self, flags: u64) {
        self.0.store(flags, Relaxed);
    }

    /// Whether this allocation of a destination is the one that must fail.
    fn take(&self) -> bool {
        let flags = self.0.load(Relaxed);

        flags & uapi::HMM_DMIRROR_FLAG_FAIL_ALLOC != 0
            && self
                .0
                .cmpxchg(flags, flags & !uapi::HMM_DMIRROR_FLAG_FAIL_ALLOC, Full)
                .is_ok()
    }
}

/// Serves `HSGPU_MIGRATE` for the address space `mm`; fills in the results as far as it comes.
///
/// # Errors
///
/// `EINVAL` for addresses that are not aligned, not mapped or not readable, for memory that cannot migrate, and for
/// unknown flags; `EINTR` on a signal; `ENOMEM`; those of the copy engine, in which case the pages of the call in
/// question stay where they were. That there is not room for all of it, even after eviction, is no error.
pub(crate) fn migrate(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mm: &Mm,
    failures: &Failures,
    req: &mut uapi::Migrate,
) -> Result {
    (req.calls, req.collected, req.migrated) = (0, 0, 0);

    let range = user_range(req.addr, req.npages)?;
    let select = select(req.select)?;
    let huge = req.select & uapi::SELECT_HUGE != 0;
    let owner = owner(req.owner, pagemap)?;
    let towards_device = match (req.direction, req.reserved) {
        (uapi::TO_DEVICE, 0) => true,
        (uapi::TO_SYSTEM, 0) => false,
        _ => return Err(EINVAL),
    };
    let pieces = Pieces {
        session,
        pagemap,
        failures,
        select,
        huge,
        owner,
        towards_device,
        range,
    };

    if huge && (pieces.range.start % HUGE_SIZE != 0 || pieces.range.end % HUGE_SIZE != 0) {
        pieces.migrate::<{ 2 * PAGES }>(mm, req)
    } else {
        pieces.migrate::<PAGES>(mm, req)
    }
}

/// What a request comes to.
struct Pieces<'a> {
    session: &'a Session<'a>,
    pagemap: &'a VramPagemap,
    failures: &'a Failures,
    select: Select,
    huge: bool,
    owner: Option<Owner>,
    towards_device: bool,
    range: Range<usize>,
}

impl Pieces<'_> {
    /// Where the setup that begins at `addr` ends at the latest.
    fn end(&self, addr: usize) -> usize {
        if !self.huge {
            return addr.saturating_add(HUGE_SIZE);
        }
        let next = addr.saturating_add(HUGE_SIZE) / HUGE_SIZE * HUGE_SIZE;
        match addr % HUGE_SIZE {
            0 if self.range.end.saturating_sub(next) < HUGE_SIZE => self.range.end,
            1.. if addr == self.range.start => next.saturating_add(HUGE_SIZE),
            _ => next,
        }
    }

    /// Migrates it in setups of at most `N` pages each.
    ///
    /// # Errors
    ///
    /// Those of [`migrate`].
    fn migrate<const N: usize>(&self, mm: &Mm, req: &mut uapi::Migrate) -> Result {
        let (session, pagemap, range) = (self.session, self.pagemap, &self.range);
        let mm = mm.mmget_not_zero().ok_or(EINVAL)?;
        let mut room = Room::<N>::new(range.len() / PAGE_SIZE)?;

        let mmap = mm.mmap_read_lock();
        let mut addr = range.start;
        while addr < range.end {
            let vma = mmap
                .vma_lookup(addr)
                .filter(|vma| vma.flags() & flags::READ != 0)
                .ok_or(EINVAL)?;
            let end = cmp::min(cmp::min(range.end, vma.end()), self.end(addr));

            for attempt in 0..=EVICTIONS {
                let migration = Migration::collect(
                    &mmap,
                    vma,
                    addr..end,
                    self.select,
                    self.owner,
                    &mut room.entries,
                )?;
                // CAST: `usize` has 64 bits.
                req.calls += 1;
                req.collected += migration.cpages() as u64;
                let (moved, short) = if self.towards_device {
                    to_device(
                        session,
                        pagemap,
                        migration,
                        &mut room.segments,
                        self.failures,
                    )?
                } else {
                    let moved = to_system(
                        session,
                        pagemap,
                        migration,
                        &mut room.segments,
                        self.failures,
                    )?;
                    (moved, 0)
                };
                req.migrated += moved as u64;

                // With no folio locked any more, what is short can be taken from others.
                if short == 0 {
                    break;
                }
                if attempt == EVICTIONS || evict::make_room(session, pagemap, short)? == 0 {
                    session.stats.abort_no_room.add(short as u64);
                    break;
                }
            }

            addr = end;
            if addr < range.end && current!().signal_pending() {
                return Err(EINTR);
            }
        }
        Ok(())
    }
}

/// Decodes [`uapi::Migrate::select`].
fn select(bits: u32) -> Result<Select> {
    const KINDS: [(u32, Select); 3] = [
        (uapi::SELECT_SYSTEM, Select::SYSTEM),
        (uapi::SELECT_DEVICE_PRIVATE, Select::DEVICE_PRIVATE),
        (uapi::SELECT_DEVICE_COHERENT, Select::DEVICE_COHERENT),
    ];
    let mut rest = bits & !uapi::SELECT_HUGE;
    let mut select = None;

    for (bit, kind) in KINDS {
        if rest & bit != 0 {
            rest &= !bit;
            select = Some(select.map_or(kind, |select| select | kind));
        }
    }
    match (select, rest) {
        (Some(select), 0) if bits & uapi::SELECT_HUGE != 0 => Ok(select | Select::HUGE),
        (Some(select), 0) => Ok(select),
        _ => Err(EINVAL),
    }
}

/// Moves what is not on a device yet to this part of the VRAM, as long as there is room. Returns how many pages moved, and
/// for how many there was no room.
fn to_device(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mut migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
    failures: &Failures,
) -> Result<(usize, usize)> {
    let mut short = 0;
    let mut next = 0;

    while next < migration.npages() {
        let (index, order) = (next, migration.order(next));

        next += 1 << order;
        match migration.source(index) {
            Source::System(_) | Source::Hole => (),
            // It is here already, and stays.
            Source::Device(_) | Source::None => continue,
        }

        let fails = failures.take();
        // In coherent memory it is the huge folio that fails, as always.
        if fails && order == 0 && pagemap.pages().kind() == Kind::Private {
            continue;
        }
        if order != 0 && !fails {
            if let Some(folio) = pagemap.alloc(order) {
                migration.set_device(index, folio)?;
                continue;
            }
        }
        for page in index..next {
            match pagemap.alloc(0) {
                Some(free) => migration.set_device(page, free)?,
                None => {
                    // A folio moves with all of its pages or not at all.
                    short += next - index;
                    break;
                }
            }
        }
    }

    let moved = moving::run(session, pagemap.pages(), Work::Migrate, migration, segments)?;
    session.stats.to_device.add(moved.pages as u64);
    session.stats.huge_to_device.add(moved.huge as u64);
    Ok((moved.pages, short))
}

/// Moves what is on this GPU to system memory. Returns how many pages moved.
pub(crate) fn to_system(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mut migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
    failures: &Failures,
) -> Result<usize> {
    let mut next = 0;

    while next < migration.npages() {
        let (index, order) = (next, migration.order(next));

        next += 1 << order;
        if !matches!(migration.source(index), Source::Device(_)) {
            continue;
        }

        let fails = failures.take();
        if fails && order == 0 {
            continue;
        }
        if order != 0 && !fails {
            if let Ok(folio) = migration.alloc_system_huge(index) {
                migration.set_system(index, folio)?;
                continue;
            }
        }
        if order != 0 && !migration.can_split() {
            continue;
        }
        for page in index..next {
            let free = migration.alloc_system(page)?;

            migration.set_system(page, free)?;
        }
    }

    let moved = moving::run(session, pagemap.pages(), Work::Migrate, migration, segments)?;
    session.stats.to_system.add(moved.pages as u64);
    session.stats.huge_to_system.add(moved.huge as u64);
    Ok(moved.pages)
}

#[kunit_tests(hsgpu_migrate)]
mod tests {
    use super::*;

    #[test]
    fn selections_are_decoded_and_others_refused() {
        assert_eq!(select(uapi::SELECT_SYSTEM), Ok(Select::SYSTEM));
        assert_eq!(
            select(uapi::SELECT_SYSTEM | uapi::SELECT_DEVICE_PRIVATE),
            Ok(Select::SYSTEM | Select::DEVICE_PRIVATE)
        );
        assert_eq!(
            select(uapi::SELECT_DEVICE_COHERENT | uapi::SELECT_HUGE),
            Ok(Select::DEVICE_COHERENT | Select::HUGE)
        );
        for bits in [0, uapi::SELECT_HUGE, 1 << 4, uapi::SELECT_SYSTEM | 1 << 31] {
            assert_eq!(select(bits), Err(EINVAL));
        }
    }

    #[test]
    fn an_allocation_fails_once() {
        let failures = Failures::new();

        assert!(!failures.take());
        failures.set(uapi::HMM_DMIRROR_FLAG_FAIL_ALLOC);
        assert!(failures.take());
        assert!(!failures.take());
        failures.set(!uapi::HMM_DMIRROR_FLAG_FAIL_ALLOC);
        assert!(!failures.take());
    }
}

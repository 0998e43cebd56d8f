// SPDX-License-Identifier: GPL-2.0

//! The part that all migrations have in common: from the destinations on to the end.
//!
//! Whoever comes here holds the locks of the folios, so every wait has an end. An error drops the migration, which puts
//! all of its pages back where they were.

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    dma::{
        DataDirection,
        PageMapping, //
    },
    mm::{
        migrate::{
            Collected,
            Destination,
            Entries,
            Migration,
            Source, //
        },
        pagemap::{
            HUGE_ORDER,
            HUGE_PAGES, //
        },
    },
    prelude::*, //
};

use crate::{
    abi::{
        ring::Location,
        uapi::PAGE_SIZE, //
    },
    engine::{
        Segment,
        Work, //
    },
    gpu::Session,
    pagemap::{
        locate,
        VramPages, //
    }, //
};

/// Pages of one migration, as a rule: as many as a page table has, and as a huge folio.
pub(crate) const PAGES: usize = 512;

/// [`PAGE_SIZE`] as the device counts.
const PAGE_BYTES: u32 = PAGE_SIZE as u32;
/// Size of a huge folio as the device counts.
const HUGE_BYTES: u32 = PAGE_BYTES << HUGE_ORDER;

const _: () = assert!(HUGE_PAGES == PAGES);

/// Memory that a migration needs, allocated beforehand.
pub(crate) struct Room<const N: usize> {
    pub(crate) entries: KBox<Entries<N>>,
    pub(crate) segments: KVVec<Segment>,
}

impl<const N: usize> Room<N> {
    /// For migrations of up to `pages` pages each. Small requests need small allocations, which do not get into
    /// compaction, which drains LRU batches.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            entries: KBox::init(pin_init::init_zeroed(), GFP_KERNEL)?,
            segments: KVVec::with_capacity(cmp::min(pages, N), GFP_KERNEL)?,
        })
    }
}

/// What a migration moved.
pub(crate) struct Count {
    /// Pages, those of huge folios included.
    pub(crate) pages: usize,
    /// Huge folios that moved whole.
    pub(crate) huge: usize,
}

/// Copies everything that has a destination, and completes the migration; counts what does not move. All copies are one submission for `work`.
///
/// # Errors
///
/// Those of the copy engine, and `ENOMEM`.
pub(crate) fn run(
    session: &Session<'_>,
    pages: &VramPages,
    work: Work,
    migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result<Count> {
    let stats = &session.stats;
    let collected = migration.cpages();
    let bound = nr_bound(&migration);

    copy(session, pages, work, &migration, segments)
        .inspect_err(|_| stats.abort_copy.add(bound as u64))?;

    let migration = migration.pages();
    let moved = Count {
        pages: migration.nr_moved(),
        huge: (0..migration.npages())
            .filter(|index| migration.destination_is_huge(*index) && migration.moved(*index))
            .count(),
    };
    migration.finalize();

    // CAST: `usize` has 64 bits.
    stats
        .not_migrated
        .add(collected.saturating_sub(moved.pages) as u64);
    stats
        .abort_referenced
        .add(bound.saturating_sub(moved.pages) as u64);
    Ok(moved)
}

/// How many pages have a destination, each page of what is huge included.
fn nr_bound(migration: &Migration<'_, Collected>) -> usize {
    (0..migration.npages())
        .filter(|index| !matches!(migration.destination(*index), Destination::None))
        .map(|index| {
            if migration.destination_is_huge(index) {
                PAGES
            } else {
                1
            }
        })
        .sum()
}

/// Gives every destination its contents: all copies in one submission, and one for each run of pages to clear.
fn copy(
    session: &Session<'_>,
    pages: &VramPages,
    work: Work,
    migration: &Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result {
    let mut mappings = KVVec::with_capacity(mappings_needed(migration), GFP_KERNEL)?;
    let mut clear = Clear::new(work);

    segments.clear();
    for index in 0..migration.npages() {
        let length = if migration.destination_is_huge(index) {
            HUGE_BYTES
        } else {
            PAGE_BYTES
        };
        let (src, dst) = match (migration.source(index), migration.destination(index)) {
            (_, Destination::None) => continue,
            (Source::Hole, Destination::Device(dst)) => {
                clear.add(session, locate(pages, &dst)?, length)?;
                continue;
            }
            (Source::System(src), Destination::Device(dst)) => {
                let direction = DataDirection::ToDevice;
                // Small destinations of a huge folio are written page by page, and it is read likewise.
                let mapping = match migration.source_folio(index) {
                    Some(folio) if length == HUGE_BYTES => {
                        PageMapping::new_folio(session.device(), folio, direction)?
                    }
                    _ => PageMapping::new(session.device(), src, direction)?,
                };
                let address = mapping.dma_address();

                mappings.push(mapping, GFP_KERNEL)?;
                (Location::system(address), locate(pages, &dst)?)
            }
            (Source::Device(src), Destination::System(dst)) => {
                let direction = DataDirection::FromDevice;
                let mapping = match migration.destination_folio(index) {
                    Some(folio) => PageMapping::new_folio(session.device(), folio, direction)?,
                    None => PageMapping::new(session.device(), dst, direction)?,
                };
                let address = mapping.dma_address();

                mappings.push(mapping, GFP_KERNEL)?;
                (locate(pages, &src)?, Location::system(address))
            }
            // Nobody asks for other combinations.
            _ => return Err(EINVAL),
        };

        segments.push(Segment { src, dst, length }, GFP_KERNEL)?;
    }
    clear.flush(session)?;
    session.copy(work, segments)
}

/// For how many destinations something must be mapped.
fn mappings_needed(migration: &Migration<'_, Collected>) -> usize {
    (0..migration.npages())
        .filter(|index| !matches!(migration.destination(*index), Destination::None))
        .count()
}

/// A run of VRAM pages to clear.
struct Clear {
    work: Work,
    range: Range<u64>,
}

impl Clear {
    fn new(work: Work) -> Self {
        Self { work, range: 0..0 }
    }

    fn add(&mut self, session: &Session<'_>, at: Location, length: u32) -> Result {
        if self.range.end != at.address {
            self.flush(session)?;
            self.range = at.address..at.address;
        }
        self.range.end += u64::from(length);
        Ok(())
    }

    fn flush(&mut self, session: &Session<'_>) -> Result {
        let length = self.range.end - self.range.start;

        if length == 0 {
            return Ok(());
        }
        session.fill(self.work, Location::vram(self.range.start), length, 0)
    }
}

/// Copies the only page of `migration` from VRAM; needs no memory.
pub(crate) fn copy_one(
    session: &Session<'_>,
    pages: &VramPages,
    migration: &Migration<'_, Collected>,
) -> Result {
    let (Source::Device(src), Destination::System(dst)) =
        (migration.source(0), migration.destination(0))
    else {
        return Err(EINVAL);
    };
    let mapping = PageMapping::new(session.device(), dst, DataDirection::FromDevice)?;

    session.copy(
        Work::Fault,
        &[Segment {
            src: locate(pages, &src)?,
            dst: Location::system(mapping.dma_address()),
            length: PAGE_BYTES,
        }],
    )
}

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
//! Lock order: see [`crate::gpu`].

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    current,
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
            Select,
            Source, //
        },
        pagemap::{
            CpuFault,
            FaultError, //
        },
        virt::flags,
        Mm, //
    },
    prelude::*, //
};

use crate::{
    abi::{
        ring::Location,
        uapi::{
            self,
            PAGE_SIZE, //
        },
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
    pagemap::{
        locate,
        VramPagemap,
        VramPages, //
    }, //
};

/// Pages of one migration: as many as a page table has.
pub(crate) const PAGES: usize = 512;

/// How often room is made for one call: what was evicted for it may go to somebody else.
const EVICTIONS: usize = 8;

/// [`PAGE_SIZE`] as the device counts.
const PAGE_BYTES: u32 = PAGE_SIZE as u32;

/// Memory that a migration needs, allocated beforehand.
pub(crate) struct Room {
    pub(crate) entries: KBox<Entries<PAGES>>,
    pub(crate) segments: KVVec<Segment>,
}

impl Room {
    /// For migrations of up to `pages` pages each. Small requests need small allocations, which do not get into
    /// compaction, which drains LRU batches.
    pub(crate) fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            entries: KBox::init(pin_init::init_zeroed(), GFP_KERNEL)?,
            segments: KVVec::with_capacity(cmp::min(pages, PAGES), GFP_KERNEL)?,
        })
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
    req: &mut uapi::Migrate,
) -> Result {
    (req.calls, req.collected, req.migrated) = (0, 0, 0);

    let range = user_range(req.addr, req.npages)?;
    let select = select(req.select)?;
    let owner = owner(req.owner, pagemap)?;
    let towards_device = match (req.direction, req.reserved) {
        (uapi::TO_DEVICE, 0) => true,
        (uapi::TO_SYSTEM, 0) => false,
        _ => return Err(EINVAL),
    };
    let mm = mm.mmget_not_zero().ok_or(EINVAL)?;
    let mut room = Room::new(range.len() / PAGE_SIZE)?;

    let mmap = mm.mmap_read_lock();
    let mut addr = range.start;
    while addr < range.end {
        let vma = mmap
            .vma_lookup(addr)
            .filter(|vma| vma.flags() & flags::READ != 0)
            .ok_or(EINVAL)?;
        let end = cmp::min(
            cmp::min(range.end, vma.end()),
            addr.saturating_add(PAGES * PAGE_SIZE),
        );

        for attempt in 0..=EVICTIONS {
            let migration =
                Migration::collect(&mmap, vma, addr..end, select, owner, &mut room.entries)?;
            // CAST: `usize` has 64 bits.
            req.calls += 1;
            req.collected += migration.cpages() as u64;
            let (moved, short) = if towards_device {
                self::to_device(session, pagemap, migration, &mut room.segments)?
            } else {
                let moved = to_system(session, pagemap, migration, &mut room.segments)?;
                (moved, 0)
            };
            req.migrated += moved as u64;

            // With no folio locked any more, what is short can be taken from others.
            if short == 0
                || attempt == EVICTIONS
                || evict::make_room(session, pagemap, short, &mut room)? == 0
            {
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

/// Decodes [`uapi::Migrate::select`].
fn select(bits: u32) -> Result<Select> {
    const BOTH: u32 = uapi::SELECT_SYSTEM | uapi::SELECT_DEVICE_PRIVATE;

    match bits {
        uapi::SELECT_SYSTEM => Ok(Select::SYSTEM),
        uapi::SELECT_DEVICE_PRIVATE => Ok(Select::DEVICE_PRIVATE),
        BOTH => Ok(Select::SYSTEM | Select::DEVICE_PRIVATE),
        _ => Err(EINVAL),
    }
}

/// Moves what is not on this GPU yet to its VRAM, as long as there is any. Returns how many pages moved, and for how
/// many there was no room.
fn to_device(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mut migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result<(usize, usize)> {
    let mut short = 0;

    for index in 0..migration.npages() {
        match migration.source(index) {
            Source::System(_) | Source::Hole => (),
            // It is here already, and stays.
            Source::Device(_) | Source::None => continue,
        }
        match pagemap.alloc() {
            Some(page) => migration.set_device(index, page)?,
            None => short += 1,
        }
    }

    let moved = run(session, pagemap.pages(), migration, segments)?;
    session.stats.to_device.add(moved as u64);
    Ok((moved, short))
}

/// Moves what is on this GPU to system memory. Returns how many pages moved.
pub(crate) fn to_system(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mut migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result<usize> {
    for index in 0..migration.npages() {
        if let Source::Device(_) = migration.source(index) {
            let page = migration.alloc_system(index)?;

            migration.set_system(index, page)?;
        }
    }

    let moved = run(session, pagemap.pages(), migration, segments)?;
    session.stats.to_system.add(moved as u64);
    Ok(moved)
}

/// Copies everything that has a destination, and completes the migration. Returns how many pages moved.
fn run(
    session: &Session<'_>,
    pages: &VramPages,
    migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result<usize> {
    copy(session, pages, &migration, segments)?;

    let collected = migration.cpages();
    let migration = migration.pages();
    let moved = migration.nr_moved();
    migration.finalize();

    session
        .stats
        .not_migrated
        .add(collected.saturating_sub(moved) as u64);
    Ok(moved)
}

/// Gives every destination its contents: all copies in one submission, and one for each run of pages to clear.
fn copy(
    session: &Session<'_>,
    pages: &VramPages,
    migration: &Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result {
    let mut mappings = KVVec::with_capacity(migration.npages(), GFP_KERNEL)?;
    let mut clear = Clear::default();

    segments.clear();
    for index in 0..migration.npages() {
        let (src, dst) = match (migration.source(index), migration.destination(index)) {
            (_, Destination::None) => continue,
            (Source::Hole, Destination::Device(dst)) => {
                clear.add(session, locate(pages, &dst)?)?;
                continue;
            }
            (Source::System(src), Destination::Device(dst)) => {
                let mapping = PageMapping::new(session.device(), src, DataDirection::ToDevice)?;
                let address = mapping.dma_address();

                mappings.push(mapping, GFP_KERNEL)?;
                (Location::system(address), locate(pages, &dst)?)
            }
            (Source::Device(src), Destination::System(dst)) => {
                let mapping = PageMapping::new(session.device(), dst, DataDirection::FromDevice)?;
                let address = mapping.dma_address();

                mappings.push(mapping, GFP_KERNEL)?;
                (locate(pages, &src)?, Location::system(address))
            }
            // Nobody asks for other combinations.
            _ => return Err(EINVAL),
        };

        segments.push(
            Segment {
                src,
                dst,
                length: PAGE_BYTES,
            },
            GFP_KERNEL,
        )?;
    }
    clear.flush(session)?;
    session.copy(Work::Migrate, segments)
}

/// A run of VRAM pages to clear.
#[derive(Default)]
struct Clear {
    range: Range<u64>,
}

impl Clear {
    fn add(&mut self, session: &Session<'_>, at: Location) -> Result {
        if self.range.end != at.address {
            self.flush(session)?;
            self.range = at.address..at.address;
        }
        self.range.end += u64::from(PAGE_BYTES);
        Ok(())
    }

    fn flush(&mut self, session: &Session<'_>) -> Result {
        let length = self.range.end - self.range.start;

        if length == 0 {
            return Ok(());
        }
        session.fill(Work::Migrate, Location::vram(self.range.start), length, 0)
    }
}

/// Brings the page that the CPU touched back to system memory.
///
/// # Errors
///
/// [`FaultError::OutOfMemory`], and [`FaultError::Bus`] if the device is gone or cannot copy. In both cases the data
/// stays on the device.
pub(crate) fn to_ram(pages: &VramPages, fault: &CpuFault<'_>) -> Result<(), FaultError> {
    let stats = &pages.data().gpu().stats;

    stats.cpu_faults.inc();
    fault_in(pages, fault).inspect_err(|_| stats.cpu_faults_failed.inc())
}

fn fault_in(pages: &VramPages, fault: &CpuFault<'_>) -> Result<(), FaultError> {
    let gpu = pages.data().gpu();
    let session = gpu.enter_fault().map_err(|_| FaultError::Bus)?;
    let mut entries = Entries::<1>::new();
    let mut migration = Migration::collect_fault(fault, pages.owner(), &mut entries)
        .map_err(|_| FaultError::Bus)?;

    let Source::Device(_) = migration.source(0) else {
        // Somebody else was faster, or has a reference; the CPU tries again.
        return Ok(());
    };
    let page = migration
        .alloc_system(0)
        .map_err(|_| FaultError::OutOfMemory)?;
    migration
        .set_system(0, page)
        .and_then(|()| copy_one(&session, pages, &migration))
        .map_err(|_| FaultError::Bus)?;

    let migration = migration.pages();
    if migration.moved(0) {
        gpu.stats.to_system.inc();
    } else {
        gpu.stats.not_migrated.inc();
    }
    migration.finalize();
    Ok(())
}

/// Copies the only page of `migration` from VRAM; needs no memory.
fn copy_one(
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

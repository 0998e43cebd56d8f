// SPDX-License-Identifier: GPL-2.0

//! CPU faults on private memory: the data comes back to system memory.
//!
//! The faulting task holds `mmap_lock` (or a per-VMA lock) for reading, and the lock of the folio. It must get by with
//! little: a single page needs no memory but the one it moves to.
//!
//! A trip to the device costs much the same for one page as for many, and the CPU is likely to go on next door. So the
//! pages around come along, as with the drivers of real devices: as many as [`Around`] says.

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    mm::{
        migrate::{
            Entries,
            Migration,
            Source,
            SystemPage, //
        },
        pagemap::{
            CpuFault,
            FaultError, //
        }, //
    },
    prelude::*,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

use crate::{
    abi::uapi::PAGE_SIZE,
    engine::Work,
    gpu::Session,
    moving::{
        self,
        copy_one,
        Room,
        PAGES, //
    },
    pagemap::VramPages,
    refuse::Instead, //
};

/// Brings the page that the CPU touched back to system memory, or the folio if that is mapped as a whole.
///
/// # Errors
///
/// [`FaultError::OutOfMemory`], and [`FaultError::Bus`] if the device is gone or cannot copy. In both cases the data
/// stays on the device.
pub(crate) fn to_ram(pages: &VramPages, fault: &CpuFault<'_>) -> Result<(), FaultError> {
    let gpu = pages.data().gpu();

    gpu.stats.cpu_faults.inc();
    match gpu.refusal.instead() {
        Some(Instead::Stay) => return Ok(()),
        Some(Instead::Fail) => return Err(FaultError::Bus),
        None => (),
    }
    gpu.enter_fault()
        .map_err(|_| FaultError::Bus)
        .and_then(|session| match fault.order() {
            0 => match gpu.around.range(fault) {
                // What went wrong may concern a neighbour alone.
                Some(range) => around_to_ram(&session, pages, fault, range)
                    .or_else(|_| page_to_ram(&session, pages, fault)),
                None => page_to_ram(&session, pages, fault),
            },
            _ => folio_to_ram(&session, pages, fault),
        })
        .inspect_err(|_| gpu.stats.cpu_faults_failed.inc())
}

/// How many pages a CPU fault brings back; changed at run time through debugfs.
pub(crate) struct Around {
    pages: Atomic<u32>,
}

impl Around {
    /// `pages`, naturally aligned: a power of two.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is none, or more than a migration takes.
    pub(crate) fn new(pages: u32) -> Result<Self> {
        let this = Self {
            pages: Atomic::new(1),
        };

        this.set(pages)?;
        Ok(this)
    }

    /// As many as it is set to.
    pub(crate) fn pages(&self) -> u32 {
        self.pages.load(Relaxed)
    }

    /// Sets it.
    ///
    /// # Errors
    ///
    /// As [`Around::new`].
    pub(crate) fn set(&self, pages: u32) -> Result {
        // CAST: widening.
        if !pages.is_power_of_two() || pages as usize > PAGES {
            return Err(EINVAL);
        }
        self.pages.store(pages, Relaxed);
        Ok(())
    }

    /// What moves along with the page of `fault`; `None` if it moves alone: because so it is set, or because the page is part
    /// of a larger folio.
    fn range(&self, fault: &CpuFault<'_>) -> Option<Range<usize>> {
        // CAST: widening.
        let size = self.pages() as usize * PAGE_SIZE;
        let vma = fault.vma();

        if size == PAGE_SIZE || fault.is_part() {
            return None;
        }
        Some(clip(fault.address(), size, vma.start()..vma.end()))
    }
}

/// The part that lies within `vma` of the naturally aligned `size` bytes around `address`.
fn clip(address: usize, size: usize, vma: Range<usize>) -> Range<usize> {
    let start = address & !(size - 1);

    cmp::max(start, vma.start)..cmp::min(start.saturating_add(size), vma.end)
}

/// Brings back the page that the CPU touched and what else of this device there is in `range`.
fn around_to_ram(
    session: &Session<'_>,
    pages: &VramPages,
    fault: &CpuFault<'_>,
    range: Range<usize>,
) -> Result {
    let touched = (fault.address() - range.start) / PAGE_SIZE;
    let mut room = Room::<PAGES>::new((range.end - range.start) / PAGE_SIZE)?;
    let mut migration =
        Migration::collect_fault_around(fault, range, pages.owner(), &mut room.entries)?;

    if !matches!(migration.source(touched), Source::Device(_)) {
        // Somebody else was faster, or has a reference; the CPU tries again. The neighbours are his business.
        session.stats.abort_busy.inc();
        return Ok(());
    }
    // The page that is wanted first: the others come if there is memory for them, too.
    migration.set_system(touched, migration.alloc_system(touched)?)?;
    for index in (0..migration.npages()).filter(|index| *index != touched) {
        if !matches!(migration.source(index), Source::Device(_)) {
            continue;
        }
        let Ok(page) = migration.alloc_system(index) else {
            break;
        };

        migration.set_system(index, page)?;
    }

    let moved = moving::run(session, pages, Work::Fault, migration, &mut room.segments)?;
    // CAST: a small number.
    session.stats.to_system.add(moved.pages as u64);
    Ok(())
}

fn page_to_ram(
    session: &Session<'_>,
    pages: &VramPages,
    fault: &CpuFault<'_>,
) -> Result<(), FaultError> {
    let mut entries = Entries::<1>::new();
    let mut migration = Migration::collect_fault(fault, pages.owner(), &mut entries)
        .map_err(|_| FaultError::Bus)?;

    let Source::Device(_) = migration.source(0) else {
        // Somebody else was faster, or has a reference; the CPU tries again.
        session.stats.abort_busy.inc();
        return Ok(());
    };
    let page = migration
        .alloc_system(0)
        .map_err(|_| FaultError::OutOfMemory)?;
    migration
        .set_system(0, page)
        .and_then(|()| copy_one(session, pages, &migration))
        .inspect_err(|_| session.stats.abort_copy.inc())
        .map_err(|_| FaultError::Bus)?;

    let migration = migration.pages();
    if migration.moved(0) {
        session.stats.to_system.inc();
    } else {
        session.stats.not_migrated.inc();
        session.stats.abort_referenced.inc();
    }
    migration.finalize();
    Ok(())
}

/// Brings back a huge folio: whole, or if there is no system memory in one piece, page by page.
fn folio_to_ram(
    session: &Session<'_>,
    pages: &VramPages,
    fault: &CpuFault<'_>,
) -> Result<(), FaultError> {
    let mut room = Room::<PAGES>::new(PAGES).map_err(|_| FaultError::OutOfMemory)?;
    let mut huge = SystemPage::new_for_fault(fault).ok();

    // With the reference of the fault the kernel cannot split it later. Should somebody else have one too, the CPU tries
    // again until it is gone.
    if huge.is_none() && fault.split().is_err() {
        session.stats.abort_busy.add(PAGES as u64);
        return Ok(());
    }

    let mut migration = Migration::collect_fault(fault, pages.owner(), &mut room.entries)
        .map_err(|_| FaultError::Bus)?;
    let mut next = 0;
    let mut found = false;
    while next < migration.npages() {
        let (index, order) = (next, migration.order(next));

        next += 1 << order;
        if !matches!(migration.source(index), Source::Device(_)) {
            continue;
        }
        found = true;
        // It may have been split meanwhile.
        let free = match huge.take_if(|_| order != 0) {
            Some(folio) => folio,
            None => migration
                .alloc_system(index)
                .map_err(|_| FaultError::OutOfMemory)?,
        };
        migration
            .set_system(index, free)
            .map_err(|_| FaultError::Bus)?;
    }

    if !found {
        session.stats.abort_busy.add(PAGES as u64);
    }

    let moved = match moving::run(session, pages, Work::Fault, migration, &mut room.segments) {
        Ok(moved) => moved,
        // If the device cannot read all of it, maybe it can read the page that the CPU wants. The CPU touches that again,
        // and again if somebody else has a reference now.
        Err(EIO) => {
            let _ = fault.split();
            return Ok(());
        }
        Err(_) => return Err(FaultError::Bus),
    };
    session.stats.to_system.add(moved.pages as u64);
    session.stats.huge_to_system.add(moved.huge as u64);
    Ok(())
}

#[kunit_tests(hsgpu_to_ram)]
mod tests {
    use super::*;

    const VMA: Range<usize> = 0x7000_0003_0000..0x7000_0021_1000;

    #[test]
    fn what_comes_along_is_aligned_and_within_the_area() {
        let clip = |address, size| clip(address, size, VMA);

        assert_eq!(
            clip(0x7000_0012_3000, 0x1_0000),
            0x7000_0012_0000..0x7000_0013_0000
        );
        // Both ends of the area.
        assert_eq!(
            clip(0x7000_0003_0000, 0x20_0000),
            VMA.start..0x7000_0020_0000
        );
        assert_eq!(clip(0x7000_0021_0000, 0x20_0000), 0x7000_0020_0000..VMA.end);
        assert_eq!(clip(0x7000_0021_0000, 0x1000), 0x7000_0021_0000..VMA.end);
    }

    #[test]
    fn powers_of_two_up_to_a_migration() {
        for pages in [1, 16, 512] {
            assert!(Around::new(pages).is_ok_and(|around| around.pages() == pages));
        }
        for pages in [0, 3, 1024] {
            assert!(Around::new(pages).is_err());
        }
    }
}

// SPDX-License-Identifier: GPL-2.0

//! CPU faults on private memory: the data comes back to system memory.
//!
//! The faulting task holds `mmap_lock` (or a per-VMA lock) for reading, and the lock of the folio. It must get by with
//! little: a single page needs no memory but the one it moves to.

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
    prelude::*, //
};

use crate::{
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
            0 => page_to_ram(&session, pages, fault),
            _ => folio_to_ram(&session, pages, fault),
        })
        .inspect_err(|_| gpu.stats.cpu_faults_failed.inc())
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
        return Ok(());
    };
    let page = migration
        .alloc_system(0)
        .map_err(|_| FaultError::OutOfMemory)?;
    migration
        .set_system(0, page)
        .and_then(|()| copy_one(session, pages, &migration))
        .map_err(|_| FaultError::Bus)?;

    let migration = migration.pages();
    if migration.moved(0) {
        session.stats.to_system.inc();
    } else {
        session.stats.not_migrated.inc();
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
        return Ok(());
    }

    let mut migration = Migration::collect_fault(fault, pages.owner(), &mut room.entries)
        .map_err(|_| FaultError::Bus)?;
    let mut next = 0;
    while next < migration.npages() {
        let (index, order) = (next, migration.order(next));

        next += 1 << order;
        if !matches!(migration.source(index), Source::Device(_)) {
            continue;
        }
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

    let moved = moving::run(session, pages, Work::Fault, migration, &mut room.segments)
        .map_err(|_| FaultError::Bus)?;
    session.stats.to_system.add(moved.pages as u64);
    session.stats.huge_to_system.add(moved.huge as u64);
    Ok(())
}

//! Bugs of device entries that map 2 MiB.

use std::sync::atomic::Ordering::Relaxed;

use rustix::process::{WaitOptions, waitpid};

use super::{Case, proc};
use crate::oracle::Stamp;
use crate::scenario::WorkError;
use crate::sys::process::fork;
use crate::sys::uffd;
use crate::sys::vma::{HUGE, Vma};

fn stamp(case: &Case<'_>, page: usize) -> Stamp {
    Stamp { seed: case.seed, page: page as u64, generation: 1 }
}

/// A populated huge page.
pub(super) fn huge(case: &Case<'_>) -> Result<Vma, WorkError> {
    let vma = Vma::huge(1).map_err(WorkError::system("mmap of a huge page"))?;
    for page in 0..HUGE {
        stamp(case, page).write(vma.page(page));
    }
    let huge = proc::smaps(&vma, "AnonHugePages")?;
    if huge == 0 {
        let why = "the kernel made no huge page: has it less than 512 MiB, or no free block of 2 MiB?";
        return Err(WorkError::Condition(why.to_owned()));
    }
    Ok(vma)
}

/// `set_pmd_migration_entry()` asks a device entry whether it is writable, as if it were a mapped page, and reads the
/// soft-dirty bit (mm/huge_memory.c): after a fork, parent and child may both write the page that they share.
pub(super) fn fork_write(case: &Case<'_>) -> Result<(), WorkError> {
    const SEEN: i32 = 3;
    let vma = huge(case)?;
    let device = case.driver.open()?;
    if !case.trigger {
        proc::clear_soft_dirty()?;
    }
    device.take_huge(&vma)?;
    let child = fork(|| {
        // The first write brings the page back, the others go to whatever page is mapped then.
        for page in 0..HUGE {
            vma.page(page)[0].store(u64::MAX, Relaxed);
        }
        SEEN
    });
    let child = child.map_err(WorkError::system("fork"))?;
    let ended = waitpid(Some(child), WaitOptions::empty()).map_err(WorkError::system("waitpid"))?;
    match ended.map(|(_, status)| status.exit_status()) {
        Some(Some(SEEN)) => {}
        other => return Err(WorkError::Condition(format!("the child ended with {other:?}"))),
    }
    (0..HUGE).try_for_each(|page| {
        let seen = WorkError::seen("read by the parent after the child wrote its own copy");
        stamp(case, page).check(vma.page(page)).map_err(seen)
    })
}

/// `mbind()` takes whatever a device entry holds for a mapped page (mm/mempolicy.c, `queue_folios_pmd()`).
pub(super) fn bind(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = huge(case)?;
    let device = case.driver.open()?;
    if case.trigger {
        device.take_huge(&vma)?;
    }
    vma.bind().map_err(WorkError::system("mbind"))?;
    check(case, &vma)
}

/// Every page holds its stamp.
pub(super) fn check(case: &Case<'_>, vma: &Vma) -> Result<(), WorkError> {
    (0..vma.pages()).try_for_each(|page| {
        stamp(case, page).check(vma.page(page)).map_err(WorkError::seen("read by the CPU"))
    })
}

/// `mprotect()` makes a device entry read-only and forgets that userfaultfd protects it
/// (mm/huge_memory.c, `change_non_present_huge_pmd()`).
pub(super) fn write_protection_lost(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = huge(case)?;
    let _protected = uffd::write_protect(&vma).map_err(WorkError::system("userfaultfd"))?;
    let device = case.driver.open()?;
    device.take_huge(&vma)?;
    if case.trigger {
        vma.protect(false).map_err(WorkError::system("mprotect"))?;
        vma.protect(true).map_err(WorkError::system("mprotect"))?;
    }
    // Read back by the CPU: what pagemap says of a page that is on the device is another bug.
    check(case, &vma)?;
    let lost = proc::pagemap(&vma)?.into_iter().filter(|entry| entry & proc::UFFD_WP == 0).count();
    if lost == 0 {
        return Ok(());
    }
    Err(WorkError::Invariant {
        name: "uffd-write-protection",
        detail: format!("{lost} of {HUGE} pages are not write-protected any more, and nobody asked for that"),
    })
}

/// `/proc/self/pagemap` warns of every entry that is neither mapped nor under migration
/// (fs/proc/task_mmu.c, `pagemap_pmd_range_thp()`); with `DEBUG_VM`.
pub(super) fn pagemap(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = huge(case)?;
    let device = case.driver.open()?;
    if case.trigger {
        device.take_huge(&vma)?;
    }
    proc::pagemap(&vma)?;
    check(case, &vma)
}

/// A huge folio that goes to the device and is freed there is counted as anonymous for ever (no `MTHP_STAT_NR_ANON` in
/// mm/memremap.c).
pub(super) fn anon_count_leak(case: &Case<'_>) -> Result<(), WorkError> {
    let before = proc::anonymous_huge_folios()?;
    let vma = huge(case)?;
    let device = case.driver.open()?;
    if case.trigger {
        device.take_huge(&vma)?;
    }
    drop(vma);
    match proc::anonymous_huge_folios()? - before {
        0 => Ok(()),
        left => Err(WorkError::Invariant {
            name: "nr-anon",
            detail: format!("nr_anon of 2 MiB folios is off by {left} after the only one was unmapped"),
        }),
    }
}

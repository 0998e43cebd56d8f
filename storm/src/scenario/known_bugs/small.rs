//! Bugs that need no huge page.

use std::sync::atomic::Ordering::Relaxed;

use rustix::mm::Advice;

use super::{Case, proc};
use crate::oracle::Stamp;
use crate::scenario::WorkError;
use crate::sys::memory::Mapping;
use crate::sys::vma::Vma;

/// Pages that are enough.
const PAGES: usize = 16;

fn stamp(case: &Case<'_>, page: usize) -> Stamp {
    Stamp { seed: case.seed, page: page as u64, generation: 1 }
}

/// A page of a private file mapping that was written is anonymous, and may be migrated; but who unmaps it from the device
/// is warned that this is no anonymous VMA (mm/memory.c, `zap_nonpresent_ptes()`).
pub(super) fn zap_private_file(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = Vma::private_file(PAGES).map_err(WorkError::system("mmap of a private file"))?;
    for page in 0..PAGES {
        stamp(case, page).write(vma.page(page));
    }
    let device = case.driver.open()?;
    if case.trigger {
        device.take(&vma)?;
    }
    drop(vma);
    Ok(())
}

/// test_hmm's pages point to the open file that brought them; a fault after it was closed reads freed memory, which
/// `slab_debug=P` fills (lib/test_hmm.c, `dmirror_devmem_fault()`).
pub(super) fn close_use_after_free(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = Vma::small(PAGES).map_err(WorkError::system("mmap"))?;
    for page in 0..PAGES {
        stamp(case, page).write(vma.page(page));
    }
    let device = case.driver.open()?;
    device.take(&vma)?;
    if case.trigger {
        drop(device);
        check(case, &vma)
    } else {
        check(case, &vma)?;
        drop(device);
        Ok(())
    }
}

/// Every page holds its stamp, read by the CPU.
fn check(case: &Case<'_>, vma: &Vma) -> Result<(), WorkError> {
    (0..vma.pages()).try_for_each(|page| {
        stamp(case, page).check(vma.page(page)).map_err(WorkError::seen("read by the CPU"))
    })
}

/// `migrate_vma` asks a device entry whether it is dirty, as if it were a mapped page, and hears that it is
/// (mm/migrate_device.c, `migrate_vma_collect_pmd()`): a page that `MADV_FREE` gave away, and that nobody wrote since,
/// cannot be freed any more after a visit to the device.
pub(super) fn spurious_dirty(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = Vma::small(PAGES).map_err(WorkError::system("mmap"))?;
    let drain: Mapping = Mapping::private(1).map_err(WorkError::system("mmap"))?;
    let drain = || drain.drain_local_lru().map_err(WorkError::system("madvise(MADV_COLD)"));
    for page in 0..PAGES {
        vma.page(page)[0].store(case.seed | 1, Relaxed);
    }
    // The pages must be on the LRU to be given away, and out of this CPU's batch to be seen so.
    drain()?;
    vma.advise(0..PAGES, Advice::LinuxFree).map_err(WorkError::system("madvise(MADV_FREE)"))?;
    drain()?;
    let all = (PAGES * hmmstorm_abi::uapi::PAGE_SIZE / 1024) as u64;
    let before = proc::smaps(&vma, "LazyFree")?;
    if before != all {
        return Err(WorkError::Condition(format!("{before} of {all} kB are LazyFree after MADV_FREE")));
    }
    let device = case.driver.open()?;
    if case.trigger {
        device.take(&vma)?;
        device.give_back(&vma)?;
    }
    match proc::smaps(&vma, "LazyFree")? {
        after if after == all => Ok(()),
        after => Err(WorkError::Invariant {
            name: "clean-pages",
            detail: format!(
                "{after} of {all} kB are LazyFree after a visit to {:?}; nobody wrote",
                case.driver
            ),
        }),
    }
}

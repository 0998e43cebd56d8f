//! Bits of page-table entries that mean something to user space and must outlive a visit to a device: soft-dirty, by which
//! CRIU and live migration know what was written, and userfaultfd's write protection, by which snapshots do.
//!
//! A child of the run's process sends pages of its own to GPU 0 and has them back by touching them; it looks at their bits
//! before, meanwhile and after. Whatever the run did to the driver is then part of what is tested. A GPU that does not take
//! pages any more (a scenario may have broken it on purpose) leaves nothing to say: contents and VRAM are others' to judge.

use std::fs::OpenOptions;
use std::io;
use std::sync::atomic::Ordering::Relaxed;

use hmmstorm_abi::uapi::{
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL, HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE, HMM_DMIRROR_PROT_ERROR,
};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};

use crate::clock::monotonic_ns;
use crate::gpu;
use crate::sys::memory::Mapping;
use crate::sys::pagemap::{self, SOFT_DIRTY, UFFD_WP};
use crate::sys::process::fork;
use crate::sys::vma::Vma;
use crate::sys::{dmirror, uffd};

/// Pages that travel.
const PAGES: usize = 16;
/// Guest time in which they are asked to, again and again: one whose folio somebody holds for a moment stays. A GPU that
/// hangs may take its own time limit for the last try.
const PATIENCE_NS: u64 = 1_000_000_000;

/// Where a page was when its bit was gone.
const PLACES: [&str; 3] =
    ["before it went anywhere", "on the device", "after a touch of the CPU brought it back"];

/// A bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bit {
    /// Soft-dirty.
    SoftDirty,
    /// userfaultfd's write protection.
    UffdWp,
}

impl Bit {
    /// Both.
    pub(super) const ALL: [Self; 2] = [Self::SoftDirty, Self::UffdWp];

    /// Name of the invariant that it stays.
    pub(super) const fn invariant(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::UffdWp => "uffd-write-protection",
        }
    }

    fn mask(self) -> u64 {
        match self {
            Self::SoftDirty => SOFT_DIRTY,
            Self::UffdWp => UFFD_WP,
        }
    }

    /// What is wrong if it is lost.
    fn lost(self) -> &'static str {
        match self {
            Self::SoftDirty => "a page that was written is not soft-dirty any more",
            Self::UffdWp => {
                "a page is, though nobody asked for that, not write-protected by userfaultfd any more"
            }
        }
    }

    /// Where it is lost, if it is.
    pub(super) fn changed(self) -> Option<String> {
        if gpu::count() == 0 {
            return None; // nowhere to send pages to
        }
        let child = fork(|| status(self.travel())).ok()?;
        let (_, ended) = waitpid(Some(child), WaitOptions::empty()).ok()??;
        // A child that was killed found that data is lost, which is told elsewhere.
        let place = usize::try_from(ended.exit_status()?).ok()?.checked_sub(LOST)?;
        Some(format!("{} {}", self.lost(), PLACES.get(place)?))
    }

    /// Index of the place where the bit was lost.
    fn travel(self) -> io::Result<Option<usize>> {
        let vma = Vma::small(PAGES)?;
        let touch = || (0..PAGES).for_each(|page| _ = std::hint::black_box(vma.page(page)[0].load(Relaxed)));
        let write = || (0..PAGES).for_each(|page| vma.page(page)[0].store(page as u64 + 1, Relaxed));
        write();
        let _protection = match self {
            Self::SoftDirty => {
                pagemap::clear_soft_dirty()?;
                write();
                None
            }
            Self::UffdWp => Some(uffd::write_protect(&vma)?),
        };
        let lost = || {
            let entries = pagemap::entries(&vma)?;
            Ok::<_, io::Error>(entries.iter().any(|entry| entry & self.mask() == 0))
        };
        if lost()? {
            return Ok(Some(0));
        }
        let gpu = OpenOptions::new().read(true).write(true).open(gpu::node(0))?;
        let buffer = Mapping::private(PAGES)?;
        let all_there = || {
            let places = dmirror::snapshot(&gpu, &vma, PAGES)?;
            Ok::<_, io::Error>(places.into_iter().all(|place| {
                place != HMM_DMIRROR_PROT_ERROR
                    && place & HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE == HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
            }))
        };
        let begin = monotonic_ns();
        while monotonic_ns() - begin < PATIENCE_NS {
            match dmirror::to_device(&gpu, &vma, 0, &buffer) {
                // The last three: some stayed where they were, which the snapshot shows.
                Ok(_) | Err(Errno::NOENT | Errno::FAULT | Errno::BUSY) => {}
                Err(_) => return Ok(None),
            }
            if all_there()? {
                if lost()? {
                    return Ok(Some(1));
                }
                touch();
                return Ok(lost()?.then_some(2));
            }
        }
        Ok(None)
    }
}

/// Exit status of a child that lost the bit at place 0.
const LOST: usize = 16;

/// Nothing wrong and nothing to say are the same.
fn status(result: io::Result<Option<usize>>) -> i32 {
    match result {
        Ok(Some(place)) => i32::try_from(LOST + place).unwrap_or(i32::MAX),
        Ok(None) | Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_has_a_status_of_its_own() {
        let statuses: Vec<i32> = (0..PLACES.len()).map(|place| status(Ok(Some(place)))).collect();
        assert_eq!(statuses, [16, 17, 18]);
        assert_eq!(status(Ok(None)), 0);
        assert_eq!(status(Err(io::Error::from_raw_os_error(libc::ENOENT))), 0);
    }
}

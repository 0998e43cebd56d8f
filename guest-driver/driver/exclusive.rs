// SPDX-License-Identifier: GPL-2.0

//! Exclusive access: a device has pages to itself, for atomic operations, until the CPU touches them.
//!
//! A page becomes exclusive with its folio locked. It is entered in the view before the lock is given up, so the
//! notification that ends its time finds it there. A page table that another task changed in between makes the attempt
//! void.

use core::cmp;

use kernel::{
    current,
    dma::{
        DataDirection,
        PageMapping,
        SliceMapping, //
    },
    mm::{
        exclusive::make_exclusive,
        hmm::Memory,
        MmWithUser, //
    },
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    },
    uaccess::UserSlice, //
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
    gpu::Session,
    mirror::{
        user_range,
        Mirror,
        STALE_LIMIT, //
    },
    pagemap::VramPagemap,
    view::Right, //
};

/// Pages that are shown to user space at once.
const CHUNK: usize = 16;

impl Mirror {
    /// Serves `HMM_DMIRROR_EXCLUSIVE`: makes pages exclusive, and shows user space what the device reads there.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a bad request or if the process is gone, `EFAULT` and `EOPNOTSUPP` for memory that cannot become
    /// exclusive, `EINTR` if the task is killed, `EBUSY` if the page tables do not come to rest, `ENOMEM`, and those of
    /// the copy engine. What became exclusive before stays so.
    pub(crate) fn exclusive(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::DmirrorCmd,
    ) -> Result {
        let range = user_range(req.addr, req.npages)?;
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;
        let size = range.end - range.start;
        let mut user = UserSlice::new(UserPtr::from_addr(usize::try_from(req.ptr)?), size).writer();
        let mut bounce = KVec::from_elem(0u8, cmp::min(size, CHUNK * PAGE_SIZE), GFP_KERNEL)?;

        for first in range.clone().step_by(CHUNK * PAGE_SIZE) {
            let pages = cmp::min(range.end - first, CHUNK * PAGE_SIZE) / PAGE_SIZE;

            bounce.truncate(pages * PAGE_SIZE);
            {
                let bounce =
                    SliceMapping::new(session.device(), &mut bounce, DataDirection::FromDevice)?;
                let mut to = bounce.dma_address();

                for addr in (first..first + pages * PAGE_SIZE).step_by(PAGE_SIZE) {
                    self.exclusive_page(session, pagemap, &mm, addr, Location::system(to))?;
                    to += PAGE_SIZE as u64;
                }
            }
            user.write_slice(&bounce)?;
            // CAST: `usize` has 64 bits.
            req.cpages += pages as u64;
        }
        Ok(())
    }

    /// Makes the page at `addr` exclusive, and copies it to `to`.
    fn exclusive_page(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        mm: &MmWithUser,
        addr: usize,
        to: Location,
    ) -> Result {
        let start = Instant::<Monotonic>::now();
        let _maker = self.making.lock();

        loop {
            let before = {
                let mut watch = self.notifier.lock();
                let watch = watch.as_mut().get_mut();

                // What this task changes on the way is no change: it brings the page in, be it from the device or from
                // exclusive access.
                watch.maker = current!().pid();
                watch.changes
            };
            let mmap = mm.mmap_read_lock();
            let page = make_exclusive(&mmap, addr, Some(pagemap.owner()))?;
            let mut watch = self.notifier.lock();

            if watch.changes == before {
                watch.as_mut().get_mut().view.set(addr, Right::Exclusive)?;
                drop(watch);
                session.stats.exclusive.inc();
                return read(session, pagemap, page.memory(), to);
            }
            if start.elapsed() > STALE_LIMIT {
                return Err(EBUSY);
            }
        }
    }

    /// Serves `HMM_DMIRROR_CHECK_EXCLUSIVE`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a bad request; `EPERM` if one of the pages is exclusive still.
    pub(crate) fn check_exclusive(&self, req: &uapi::DmirrorCmd) -> Result {
        let range = user_range(req.addr, req.npages)?;

        if self.notifier.lock().view.has_exclusive(range) {
            return Err(EPERM);
        }
        Ok(())
    }
}

/// Has the device copy a page that nobody else accesses.
fn read(session: &Session<'_>, pagemap: &VramPagemap, page: Memory<'_>, to: Location) -> Result {
    let (from, _mapping) = match page {
        Memory::Device(page) => (pagemap.reach(&page)?, None),
        Memory::System(page) => {
            let mapping = PageMapping::new(session.device(), page, DataDirection::ToDevice)?;

            (Location::system(mapping.dma_address()), Some(mapping))
        }
    };

    session.copy(
        Work::Access,
        &[Segment {
            src: from,
            dst: to,
            length: PAGE_SIZE as u32,
        }],
    )
}

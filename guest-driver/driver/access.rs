// SPDX-License-Identifier: GPL-2.0

//! Loads and stores of the device, on behalf of an ioctl: page by page as the kernel gives them out, by the copy engine,
//! through a bounce buffer. See [`crate::mirror`] for what holds the pages in place.

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    alloc::flags::{
        __GFP_NOWARN, //
        GFP_NOWAIT,
    },
    dma::{
        DataDirection,
        PageMapping,
        SliceMapping, //
    },
    mm::{
        hmm::{
            self,
            Entry,
            HmmPage,
            HmmPfn,
            Mapped,
            Memory,
            Request, //
        },
        pagemap::Owner,
        MmWithUser, //
    },
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    },
    uaccess::{
        UserSlice,
        UserSliceReader,
        UserSliceWriter, //
    }, //
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
        owner,
        user_range,
        Mirror,
        Watch,
        STALE_LIMIT, //
    },
    pagemap::VramPagemap,
    view::Right, //
};

/// Pages that are accessed at once, best first: the bounce buffer is one piece of memory.
const CHUNKS: [usize; 3] = [512, 128, 16];
/// Pages of system memory of one submission: their mappings are on the stack.
const MAPPINGS: usize = 32;

/// How user data of an access moves.
enum Transfer {
    /// The device reads the process; what it read goes out here.
    Read(UserSliceWriter),
    /// The same, but only what is on the device already; nothing is faulted in.
    ReadBack(UserSliceWriter),
    /// The device writes the process; what it writes comes from here.
    Write(UserSliceReader),
}

impl Transfer {
    fn request(&self) -> Request {
        match self {
            Self::Read(_) => Request::Read,
            Self::ReadBack(_) => Request::Snapshot,
            Self::Write(_) => Request::Write,
        }
    }

    /// Which way data crosses the bounce buffer.
    fn bounce_direction(&self) -> DataDirection {
        match self {
            Self::Read(_) | Self::ReadBack(_) => DataDirection::FromDevice,
            Self::Write(_) => DataDirection::ToDevice,
        }
    }
}

/// A buffer for a part of `pages` pages; smaller if memory is in small pieces. Returns the number of pages of a part, too.
fn bounce(pages: usize) -> Result<(KVec<u8>, usize)> {
    for chunk in CHUNKS {
        let size = cmp::min(pages, chunk) * PAGE_SIZE;
        let flags = if pages > 16 && chunk > 16 {
            GFP_NOWAIT | __GFP_NOWARN
        } else {
            GFP_KERNEL
        };

        match KVec::from_elem(0u8, size, flags) {
            Ok(buffer) => return Ok((buffer, size / PAGE_SIZE)),
            Err(_) if chunk > 16 => (),
            Err(error) => return Err(error.into()),
        }
    }
    Err(ENOMEM)
}

impl Mirror {
    /// Serves `HSGPU_ACCESS`: the device reads or writes memory of the process; fills in the results as far as it
    /// comes.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a bad request, `ESRCH` if the process is gone, `EFAULT` or `EPERM` if memory cannot be accessed as
    /// asked, `EBUSY` if the page tables do not come to rest, `ENOMEM`, and those of the copy engine.
    pub(crate) fn access(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::Access,
    ) -> Result {
        (req.cpages, req.faults, req.retries) = (0, 0, 0);

        let range = user_range(req.addr, req.npages)?;
        let owner = owner(req.owner, pagemap)?;
        let user = UserSlice::new(
            UserPtr::from_addr(usize::try_from(req.ptr)?),
            range.end - range.start,
        );
        let transfer = match req.write {
            0 => Transfer::Read(user.writer()),
            1 => Transfer::Write(user.reader()),
            _ => return Err(EINVAL),
        };

        self.transfer(session, pagemap, range, owner, transfer, req)
    }

    /// Serves the second half of `HMM_DMIRROR_MIGRATE_TO_DEV`: reads what the device has of the process, as upstream
    /// does.
    ///
    /// # Errors
    ///
    /// `ENOENT` if a page is not on this device, and those of [`Mirror::access`].
    pub(crate) fn read_back(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::DmirrorCmd,
    ) -> Result {
        let range = user_range(req.addr, req.npages)?;
        let user = UserSlice::new(
            UserPtr::from_addr(usize::try_from(req.ptr)?),
            range.end - range.start,
        );
        let transfer = Transfer::ReadBack(user.writer());
        let mut access = uapi::Access::default();

        self.transfer(
            session,
            pagemap,
            range,
            Some(pagemap.owner()),
            transfer,
            &mut access,
        )?;
        (req.cpages, req.faults) = (access.cpages, 0);
        Ok(())
    }

    /// Moves user data between `range` of the process and `transfer`, part by part; counts in `req`.
    fn transfer(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        range: Range<usize>,
        owner: Option<Owner>,
        mut transfer: Transfer,
        req: &mut uapi::Access,
    ) -> Result {
        let mm = self.mm().mmget_not_zero().ok_or(ESRCH)?;
        let (mut bounce, chunk) = bounce((range.end - range.start) / PAGE_SIZE)?;
        let mut pfns = KVVec::from_elem(HmmPfn::default(), chunk, GFP_KERNEL)?;
        let mut segments = KVVec::with_capacity(chunk, GFP_KERNEL)?;

        for addr in range.clone().step_by(chunk * PAGE_SIZE) {
            let pages = cmp::min(range.end - addr, chunk * PAGE_SIZE) / PAGE_SIZE;
            let part = Part {
                session,
                pagemap,
                mm: &mm,
                addr,
                pages,
                owner,
            };

            bounce.truncate(pages * PAGE_SIZE);
            if let Transfer::Write(user) = &mut transfer {
                user.read_slice(&mut bounce)?;
            }
            {
                let bounce =
                    SliceMapping::new(session.device(), &mut bounce, transfer.bounce_direction())?;

                self.access_part(
                    &part,
                    transfer.request(),
                    &bounce,
                    pfns.get_mut(..pages).ok_or(EINVAL)?,
                    &mut segments,
                    req,
                )?;
            }
            if let Transfer::Read(user) | Transfer::ReadBack(user) = &mut transfer {
                user.write_slice(&bounce)?;
            }
            // CAST: `usize` has 64 bits.
            req.cpages += pages as u64;
        }
        Ok(())
    }

    /// Moves data between `bounce` and a part of the process.
    fn access_part(
        &self,
        part: &Part<'_>,
        request: Request,
        bounce: &SliceMapping<'_>,
        pfns: &mut [HmmPfn],
        segments: &mut KVVec<Segment>,
        req: &mut uapi::Access,
    ) -> Result {
        let stats = &part.session.stats;
        let start = Instant::<Monotonic>::now();
        let mut owner = part.owner;

        loop {
            req.faults += 1;
            stats.device_faults.inc();

            let seq = self.notifier.read_begin();
            let mmap = part.mm.mmap_read_lock();
            let faulted = hmm::range_fault(seq, &mmap, part.addr, pfns, request, owner);
            drop(mmap);

            let faulted = match faulted {
                Ok(faulted) => faulted.lock(),
                Err(EBUSY) => None,
                Err(error) => return Err(error),
            };
            if let Some(mut mapped) = faulted {
                if request == Request::Write && owner.is_some() && !part.is_writable(&mapped) {
                    // hmm_range_fault() reports pages of the owner as they are, also those that are shared after a fork
                    // and may only be read (mm/hmm.c, hmm_vma_handle_pte()). For a stranger it faults them: each comes to
                    // system memory, and is copied there if it is shared.
                    owner = None;
                    continue;
                }
                part.copy(&mapped, bounce, request, segments)?;
                part.remember(&mut mapped);
                return Ok(());
            }

            req.retries += 1;
            stats.device_fault_retries.inc();
            if start.elapsed() > STALE_LIMIT {
                return Err(EBUSY);
            }
        }
    }
}

/// A part of an access that is done at once.
struct Part<'a> {
    session: &'a Session<'a>,
    pagemap: &'a VramPagemap,
    mm: &'a MmWithUser,
    addr: usize,
    pages: usize,
    owner: Option<Owner>,
}

impl Part<'_> {
    /// Whether the process may write all of its pages where they are.
    fn is_writable(&self, mapped: &Mapped<'_, '_, Watch>) -> bool {
        (0..self.pages).all(|index| match mapped.entry(index) {
            Entry::Page(page) => page.is_writable(),
            // Told by the copy.
            Entry::None | Entry::Error => true,
        })
    }

    /// Copies between the pages, which stay where they are as long as `mapped` exists, and the bounce buffer. Without
    /// a fault, only pages of this device count.
    ///
    /// All is one submission, unless there are many pages of system memory.
    fn copy(
        &self,
        mapped: &Mapped<'_, '_, Watch>,
        bounce: &SliceMapping<'_>,
        request: Request,
        segments: &mut KVVec<Segment>,
    ) -> Result {
        let mut index = 0;

        while index < self.pages {
            let mut mappings = [const { None::<PageMapping<'_>> }; MAPPINGS];
            let mut free = mappings.iter_mut();

            segments.clear();
            while index < self.pages {
                let page = match mapped.entry(index) {
                    Entry::Page(page) => page,
                    Entry::None | Entry::Error if request == Request::Snapshot => {
                        return Err(ENOENT)
                    }
                    Entry::None | Entry::Error => return Err(EFAULT),
                };
                let Some(page) = self.reach(page, request, &mut free)? else {
                    break;
                };
                // CAST: `usize` has 64 bits, and the part is small.
                let bounce = Location::system(bounce.dma_address() + (index * PAGE_SIZE) as u64);
                let (src, dst) = match request {
                    Request::Write => (bounce, page),
                    Request::Read | Request::Snapshot => (page, bounce),
                };

                // There is room for all: nothing may be allocated here.
                segments
                    .push_within_capacity(Segment {
                        src,
                        dst,
                        length: PAGE_SIZE as u32,
                    })
                    .map_err(|_| EINVAL)?;
                index += 1;
            }
            self.session.copy(Work::Access, segments)?;
        }
        Ok(())
    }

    /// Where the device reaches `page`; [`None`] if that takes a mapping and none is free.
    fn reach<'m>(
        &'m self,
        page: HmmPage<'m>,
        request: Request,
        free: &mut core::slice::IterMut<'_, Option<PageMapping<'m>>>,
    ) -> Result<Option<Location>> {
        let direction = match request {
            Request::Write => DataDirection::FromDevice,
            Request::Read | Request::Snapshot => DataDirection::ToDevice,
        };

        match page.memory() {
            Memory::Device(page) if request == Request::Snapshot => {
                self.pagemap.locate(&page).map(Some).map_err(|_| ENOENT)
            }
            Memory::Device(page) => {
                self.pagemap.touch(&page);
                self.pagemap.reach(&page).map(Some)
            }
            Memory::System(_) if request == Request::Snapshot => Err(ENOENT),
            Memory::System(page) => {
                let Some(mapping) = free.next() else {
                    return Ok(None);
                };
                let mapping =
                    mapping.insert(PageMapping::new(self.session.device(), page, direction)?);

                Ok(Some(Location::system(mapping.dma_address())))
            }
        }
    }

    /// Enters the pages in the view. One that finds no room is asked for again the next time.
    fn remember(&self, mapped: &mut Mapped<'_, '_, Watch>) {
        for index in 0..self.pages {
            let Entry::Page(page) = mapped.entry(index) else {
                continue;
            };
            let right = if page.is_writable() {
                Right::Write
            } else {
                Right::Read
            };
            let addr = self.addr + index * PAGE_SIZE;
            let view = &mut mapped.state().get_mut().view;

            if view.set(addr, right).is_err() {
                return;
            }
        }
    }
}

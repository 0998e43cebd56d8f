// SPDX-License-Identifier: GPL-2.0

//! The device's view of the address space of a process, one for each open file.
//!
//! The device has no page tables of its own yet. To access memory it asks the kernel for the pages behind a range of
//! addresses (`hmm_range_fault()`), and then, with the mutex of the notifier held, copies from or to them. Whoever
//! wants to change the CPU's page tables meanwhile waits in the notifier until the copy engine is done, which takes
//! a bounded time; so no page can be freed or migrate under a DMA transfer.
//!
//! The notifier ignores nothing, not even migrations by this driver itself: a page found here must not migrate to the
//! device either before it has been copied.
//!
//! Under the mutex nothing touches user memory, and nothing allocates memory in a way that could start reclaim. So data
//! takes the way through a bounce buffer. Lock order: see [`crate::gpu`].

use core::{
    cmp,
    ops::Range, //
};

use kernel::{
    current,
    dma::{
        DataDirection,
        PageMapping,
        SliceMapping, //
    },
    mm::{
        hmm::{
            self,
            Entry,
            HmmPfn,
            Mapped,
            Memory,
            Request, //
        },
        interval_notifier::{
            Event,
            IntervalNotifier,
            Invalidate, //
        },
        pagemap::Owner,
        Mm,
        MmWithUser, //
    },
    new_mutex,
    page::PAGE_MASK,
    prelude::*,
    sync::Arc,
    time::{
        Delta,
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
    gpu::{
        Gpu,
        Session, //
    },
    migrate,
    pagemap::VramPagemap, //
};

/// Pages that are accessed at once: 64 KiB, which `kmalloc()` can give in one piece.
const CHUNK: usize = 16;
/// Pages of one snapshot, as in `lib/test_hmm.c`.
const SNAPSHOT: usize = 32;

/// How long an access or a snapshot is tried again because the page tables keep changing.
const STALE_LIMIT: Delta = Delta::from_millis(10_000);

/// Orders of the mappings that a snapshot tells apart: PMD and PUD of x86-64.
const PMD_ORDER: u32 = 9;
const PUD_ORDER: u32 = 18;

/// The state of the notifier: nothing but a reason to count.
struct Watch {
    gpu: Arc<Gpu>,
}

impl Invalidate for Watch {
    fn invalidate(self: Pin<&mut Self>, _range: Range<usize>, _event: Event) {
        self.gpu.stats.invalidations.inc();
    }
}

/// A mirror of the address space of the process that opened a device node.
#[pin_data]
pub(crate) struct Mirror {
    #[pin]
    notifier: IntervalNotifier<Watch>,
}

/// How user data of an access moves.
enum Transfer {
    /// The device reads the process; what it read goes out here.
    Read(UserSliceWriter),
    /// The same, but only what is on the device already; nothing is faulted in.
    ReadBack(UserSliceWriter),
    /// The device writes the process; what it writes comes from here.
    Write(UserSliceReader),
}

impl Mirror {
    /// Mirrors the address space of the current task.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has none; `ENOMEM`.
    pub(crate) fn open(gpu: &Arc<Gpu>) -> Result<Arc<Self>> {
        let task = current!();
        let mm = task.mm().ok_or(ESRCH)?;
        let watch = Watch { gpu: gpu.clone() };

        Arc::pin_init(
            try_pin_init!(Self {
                notifier <- IntervalNotifier::register(
                    mm,
                    0..usize::MAX & PAGE_MASK,
                    new_mutex!(watch, "hsgpu::mirror"),
                ),
            }),
            GFP_KERNEL,
        )
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &Mm {
        self.notifier.mm()
    }

    /// Serves `HSGPU_MIGRATE`.
    ///
    /// # Errors
    ///
    /// Those of [`migrate::migrate`].
    pub(crate) fn migrate(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::Migrate,
    ) -> Result {
        migrate::migrate(session, pagemap, self.mm(), req)
    }

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

    /// Moves user data between `range` of the process and `transfer`, chunk by chunk; counts in `req`.
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
        let room = cmp::min(range.end - range.start, CHUNK * PAGE_SIZE);
        let mut bounce = KVec::from_elem(0u8, room, GFP_KERNEL)?;

        for addr in range.clone().step_by(CHUNK * PAGE_SIZE) {
            let pages = cmp::min(range.end - addr, CHUNK * PAGE_SIZE) / PAGE_SIZE;
            let chunk = Chunk {
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
            self.access_chunk(&chunk, &transfer, &mut bounce, req)?;
            if let Transfer::Read(user) | Transfer::ReadBack(user) = &mut transfer {
                user.write_slice(&bounce)?;
            }
            // CAST: `usize` has 64 bits.
            req.cpages += pages as u64;
        }
        Ok(())
    }

    /// Moves data between `bounce` and a chunk of the process.
    fn access_chunk(
        &self,
        chunk: &Chunk<'_>,
        transfer: &Transfer,
        bounce: &mut KVec<u8>,
        req: &mut uapi::Access,
    ) -> Result {
        let (request, bounce_direction) = match transfer {
            Transfer::Read(_) => (Request::Read, DataDirection::FromDevice),
            Transfer::ReadBack(_) => (Request::Snapshot, DataDirection::FromDevice),
            Transfer::Write(_) => (Request::Write, DataDirection::ToDevice),
        };
        let stats = &chunk.session.stats;
        let bounce = SliceMapping::new(chunk.session.device(), bounce, bounce_direction)?;
        let mut pfns = [HmmPfn::default(); CHUNK];
        let pfns = pfns.get_mut(..chunk.pages).ok_or(EINVAL)?;
        let start = Instant::<Monotonic>::now();

        loop {
            req.faults += 1;
            stats.device_faults.inc();

            let seq = self.notifier.read_begin();
            let mmap = chunk.mm.mmap_read_lock();
            let faulted = hmm::range_fault(seq, &mmap, chunk.addr, pfns, request, chunk.owner);
            drop(mmap);

            let faulted = match faulted {
                Ok(faulted) => faulted.lock(),
                Err(EBUSY) => None,
                Err(error) => return Err(error),
            };
            if let Some(mapped) = faulted {
                return chunk.copy(&mapped, &bounce, request);
            }

            req.retries += 1;
            stats.device_fault_retries.inc();
            if start.elapsed() > STALE_LIMIT {
                return Err(EBUSY);
            }
        }
    }

    /// Serves `HMM_DMIRROR_SNAPSHOT`: stores a byte for each page that says how the device could access it.
    ///
    /// # Errors
    ///
    /// As [`Mirror::access`].
    pub(crate) fn snapshot(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::DmirrorCmd,
    ) -> Result {
        (req.cpages, req.faults) = (0, 0);

        let range = user_range(req.addr, req.npages)?;
        let npages = (range.end - range.start) / PAGE_SIZE;
        let ptr = UserPtr::from_addr(usize::try_from(req.ptr)?);
        let mut user = UserSlice::new(ptr, npages).writer();
        let mm = self.mm().mmget_not_zero().ok_or(EINVAL)?;

        for addr in range.clone().step_by(SNAPSHOT * PAGE_SIZE) {
            let pages = cmp::min(range.end - addr, SNAPSHOT * PAGE_SIZE) / PAGE_SIZE;
            let mut bytes = [0; SNAPSHOT];
            let bytes = bytes.get_mut(..pages).ok_or(EINVAL)?;

            snapshot_chunk(session, pagemap, &mm, addr, bytes)?;
            user.write_slice(bytes)?;
            // CAST: `usize` has 64 bits.
            req.cpages += pages as u64;
        }
        Ok(())
    }
}

/// A part of an access that is done at once.
struct Chunk<'a> {
    session: &'a Session<'a>,
    pagemap: &'a VramPagemap,
    mm: &'a MmWithUser,
    addr: usize,
    pages: usize,
    owner: Option<Owner>,
}

impl Chunk<'_> {
    /// Copies between the pages, which stay where they are as long as `mapped` exists, and the bounce buffer. Without
    /// a fault, only pages of the device count.
    fn copy<T: Invalidate>(
        &self,
        mapped: &Mapped<'_, '_, T>,
        bounce: &SliceMapping<'_>,
        request: Request,
    ) -> Result {
        let nowhere = Segment {
            src: Location::system(0),
            dst: Location::system(0),
            length: 0,
        };
        let direction = match request {
            Request::Write => DataDirection::FromDevice,
            Request::Read | Request::Snapshot => DataDirection::ToDevice,
        };
        let mut segments = [nowhere; CHUNK];
        let mut mappings = [const { None::<PageMapping<'_>> }; CHUNK];

        for (index, (segment, mapping)) in segments
            .iter_mut()
            .zip(&mut mappings)
            .take(self.pages)
            .enumerate()
        {
            let page = match mapped.entry(index) {
                Entry::Page(page) => page,
                Entry::None | Entry::Error if request == Request::Snapshot => return Err(ENOENT),
                Entry::None | Entry::Error => return Err(EFAULT),
            };
            let page = match page.memory() {
                Memory::Device(page) => {
                    self.pagemap.touch(&page);
                    self.pagemap.locate(&page)?
                }
                Memory::System(_) if request == Request::Snapshot => return Err(ENOENT),
                Memory::System(page) => {
                    let mapping =
                        mapping.insert(PageMapping::new(self.session.device(), page, direction)?);

                    Location::system(mapping.dma_address())
                }
            };
            // CAST: `usize` has 64 bits, and the chunk is small.
            let bounce = Location::system(bounce.dma_address() + (index * PAGE_SIZE) as u64);

            (segment.src, segment.dst) = match request {
                Request::Write => (bounce, page),
                Request::Read | Request::Snapshot => (page, bounce),
            };
            segment.length = PAGE_SIZE as u32;
        }

        let segments = segments.get(..self.pages).ok_or(EINVAL)?;
        self.session.copy(Work::Access, segments)
    }
}

/// Looks at the pages from `addr` on, one for each of `bytes`, with a notifier of their own.
fn snapshot_chunk(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mm: &MmWithUser,
    addr: usize,
    bytes: &mut [u8],
) -> Result {
    let notifier = KBox::try_pin_init(
        IntervalNotifier::register(
            mm,
            addr..addr + bytes.len() * PAGE_SIZE,
            new_mutex!((), "hsgpu::snapshot"),
        ),
        GFP_KERNEL,
    )?;
    let mut pfns = [HmmPfn::default(); SNAPSHOT];
    let pfns = pfns.get_mut(..bytes.len()).ok_or(EINVAL)?;
    let start = Instant::<Monotonic>::now();

    loop {
        session.stats.device_faults.inc();

        let seq = notifier.read_begin();
        let mmap = mm.mmap_read_lock();
        let faulted = hmm::range_fault(
            seq,
            &mmap,
            addr,
            pfns,
            Request::Snapshot,
            Some(pagemap.owner()),
        );
        drop(mmap);

        let faulted = match faulted {
            Ok(faulted) => faulted.lock(),
            Err(EBUSY) => None,
            Err(error) => return Err(error),
        };
        if let Some(mapped) = faulted {
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = protection(pagemap, mapped.entry(index));
            }
            return Ok(());
        }

        session.stats.device_fault_retries.inc();
        if start.elapsed() > STALE_LIMIT {
            return Err(EBUSY);
        }
    }
}

/// The `HMM_DMIRROR_PROT_*` byte of an entry.
fn protection(pagemap: &VramPagemap, entry: Entry<'_>) -> u8 {
    let page = match entry {
        Entry::Error => return uapi::HMM_DMIRROR_PROT_ERROR,
        Entry::None => return uapi::HMM_DMIRROR_PROT_NONE,
        Entry::Page(page) => page,
    };
    let memory = match page.memory() {
        Memory::Device(page) if pagemap.locate(&page).is_ok() => {
            uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
        }
        Memory::Device(_) => uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
        Memory::System(_) if page.is_zero_page() => uapi::HMM_DMIRROR_PROT_ZERO,
        Memory::System(_) => uapi::HMM_DMIRROR_PROT_NONE,
    };
    let access = if page.is_writable() {
        uapi::HMM_DMIRROR_PROT_WRITE
    } else {
        uapi::HMM_DMIRROR_PROT_READ
    };
    let size = match page.map_order() {
        PMD_ORDER => uapi::HMM_DMIRROR_PROT_PMD,
        PUD_ORDER => uapi::HMM_DMIRROR_PROT_PUD,
        _ => 0,
    };

    memory | access | size
}

/// The addresses that a request is about.
///
/// # Errors
///
/// `EINVAL` if they are not aligned, none, or beyond the end.
pub(crate) fn user_range(addr: u64, npages: u64) -> Result<Range<usize>> {
    let start = usize::try_from(addr)?;
    let size = usize::try_from(npages)?
        .checked_mul(PAGE_SIZE)
        .ok_or(EINVAL)?;
    let end = start.checked_add(size).ok_or(EINVAL)?;

    if start % PAGE_SIZE != 0 || size == 0 || end > usize::MAX & PAGE_MASK {
        return Err(EINVAL);
    }
    Ok(start..end)
}

/// Decodes an owner policy.
///
/// # Errors
///
/// `EINVAL` for an unknown one.
pub(crate) fn owner(policy: u32, pagemap: &VramPagemap) -> Result<Option<Owner>> {
    match policy {
        uapi::OWNER_OWN => Ok(Some(pagemap.owner())),
        uapi::OWNER_NONE => Ok(None),
        _ => Err(EINVAL),
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Snapshots: what a device would find in the page tables of a process, without touching anything.

use core::cmp;

use kernel::{
    mm::{
        hmm::{
            self,
            Entry,
            HmmPfn,
            Memory,
            Request, //
        },
        interval_notifier::IntervalNotifier,
        pagemap::Kind,
        MmWithUser, //
    },
    new_mutex,
    prelude::*,
    time::{
        Instant,
        Monotonic, //
    },
    uaccess::UserSlice, //
};

use crate::{
    abi::uapi::{
        self,
        PAGE_SIZE, //
    },
    gpu::Session,
    mirror::{
        user_range,
        Mirror,
        STALE_LIMIT, //
    },
    pagemap::VramPagemap, //
};

/// Pages of one look, as in `lib/test_hmm.c`.
const SNAPSHOT: usize = 32;

/// Orders of the mappings that a snapshot tells apart: PMD and PUD of x86-64.
const PMD_ORDER: u32 = 9;
const PUD_ORDER: u32 = 18;

impl Mirror {
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
        Memory::Device(page) => match (page.kind(), pagemap.locate(&page).is_ok()) {
            (Kind::Private, true) => uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
            (Kind::Private, false) => uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE,
            (Kind::Coherent, true) => uapi::HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
            (Kind::Coherent, false) => uapi::HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
        },
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

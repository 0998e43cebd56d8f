// SPDX-License-Identifier: GPL-2.0

//! Serving page faults of the GPU: from a fault to an entry of its page table.
//!
//! For each fault, until it is served or turns out to be hopeless:
//!
//! 1. Look at what the process has in the chunk around the address (`hmm_range_fault()` as a snapshot).
//! 2. If the page is where it should be, and can be accessed as wanted, enter it and its neighbours in the page table,
//!    under the notifier's lock, so that nothing changes meanwhile. Done.
//! 3. If it should be in VRAM and is not, migrate the chunk, once.
//! 4. If the job wants to be atomic on a page that stays where it is, take it away from everyone else
//!    ([`crate::atomic`]). Done.
//! 5. Otherwise have the kernel fault it in (`hmm_range_fault()` for real).
//!
//! Then begin again. What cannot be served (no VMA, no permission, the process is gone, the page tables do not come to
//! rest) is cancelled, and its job ends with a page fault.

use core::{
    iter,
    ops::Range, //
};

use kernel::{
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
        pagemap::{
            DevicePageRef,
            Kind,
            Owner, //
        },
        MmWithUser, //
    },
    prelude::*,
    sync::{
        aref::ARef,
        atomic::Acquire, //
    },
    time::{
        Instant,
        Monotonic, //
    }, //
};

use crate::{
    abi::{
        mmu::{
            Fault,
            Pte,
            Reason,
            Want, //
        },
        ring::{
            Aperture,
            Location, //
        },
        uapi::{
            self,
            PAGE_SIZE, //
        }, //
    },
    fault::ENTRIES,
    gpu::Session,
    migrate::{
        self,
        Failures, //
    },
    mirror::STALE_LIMIT,
    moving::PAGES,
    page_table::{
        Stash,
        HUGE,
        SMALL,
        VA_END, //
    },
    pagemap::VramPagemap,
    policy::Policy,
    space::Space,
    tables::{
        direction_of,
        order_of,
        Dma,
        Tables, //
    }, //
};

/// [`PAGE_SIZE`] as virtual addresses count.
pub(crate) const PAGE: u64 = PAGE_SIZE as u64;
/// A chunk as large as a huge page.
const HUGE_CHUNK: u64 = PAGE << order_of(HUGE);

/// What is needed to serve faults, allocated beforehand.
pub(crate) struct Server<'a> {
    pub(crate) space: &'a Space,
    pub(crate) session: &'a Session<'a>,
    pub(crate) pagemap: &'a VramPagemap,
    mm: Option<ARef<MmWithUser>>,
    /// The faults that are being served.
    pub(crate) batch: KVec<Fault>,
    pfns: KVVec<HmmPfn>,
    /// The leaf that is to be entered at each page of a chunk.
    leaves: KVVec<Option<Pte>>,
    pub(crate) stash: Stash<Dma>,
}

/// How the fault of one attempt ended.
enum Attempt {
    /// The page is mapped.
    Mapped,
    /// The page is not where it should be: migrate it.
    Migrate(Range<u64>),
    /// The page stays where it is, and the GPU needs it for itself.
    Exclude,
    /// There is nothing, or not with the rights wanted: have it faulted in, for this owner.
    FaultIn(Option<Owner>),
    /// Begin again.
    Again,
}

impl<'a> Server<'a> {
    /// Allocates it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, `ENODEV`.
    pub(crate) fn new(space: &'a Space, session: &'a Session<'a>) -> Result<Self> {
        Ok(Self {
            space,
            session,
            pagemap: space.node.pagemap(session)?,
            mm: space.notifier.mm().mmget_not_zero(),
            batch: KVec::with_capacity(ENTRIES, GFP_KERNEL)?,
            pfns: KVVec::from_elem(HmmPfn::default(), PAGES, GFP_KERNEL)?,
            leaves: KVVec::from_elem(None, PAGES, GFP_KERNEL)?,
            stash: Stash::new(),
        })
    }

    /// Serves every fault of the batch, or cancels it.
    pub(crate) fn serve_batch(&mut self) {
        let stats = &self.session.stats;

        for index in 0..self.batch.len() {
            let Some(&fault) = self.batch.get(index) else {
                break;
            };
            if let Err(error) = self.serve(&fault) {
                stats.gpu_faults_failed.inc();
                dev_dbg!(
                    self.session.device(),
                    "fault at {:#x} ({:?}, asid {}) cancelled: {:?}\n",
                    fault.va,
                    fault.want,
                    fault.asid,
                    error
                );
                self.session.regs().cancel_fault(fault.sequence);
            }
        }
    }

    /// Serves one fault.
    ///
    /// # Errors
    ///
    /// `EFAULT`, `EPERM`, `ENOMEM` of `hmm_range_fault()`; `EFAULT` for a fault that no page can mend, `ESRCH` if process
    /// or space are gone, `EINTR` if the job is to end, `EBUSY` if the page tables do not come to rest, `ENODEV`.
    fn serve(&mut self, fault: &Fault) -> Result {
        let space = self.space;
        let mm = self.mm.clone().ok_or(ESRCH)?;
        let Steer {
            policy,
            mut migrate,
        } = self.steer(fault);
        let start = Instant::<Monotonic>::now();

        if matches!(fault.reason, Reason::BadTable | Reason::BadAddress) || fault.va >= VA_END {
            return Err(EFAULT);
        }
        loop {
            if space.is_dead() {
                return Err(ESRCH);
            }
            if space.ending.load(Acquire) & 1u32.checked_shl(u32::from(fault.channel)).unwrap_or(0)
                != 0
            {
                return Err(EINTR);
            }
            {
                let tables = space.notifier.lock();

                if tables.allows(fault.va, fault.want) {
                    self.session.stats.gpu_faults_stale.inc();
                    return Ok(());
                }
                if !tables.has_tables(fault.va) {
                    drop(tables);
                    self.stash.fill(|| Dma::new(self.session.device()))?;
                }
            }

            match self.attempt(&mm, fault, &policy, migrate)? {
                Attempt::Mapped => return Ok(()),
                Attempt::Migrate(range) => {
                    migrate = false;
                    self.migrate(&mm, range, &policy)?;
                    continue;
                }
                Attempt::Exclude => {
                    if self.make_exclusive(&mm, fault)? {
                        return Ok(());
                    }
                }
                Attempt::FaultIn(owner) => self.fault_in(&mm, fault, owner)?,
                Attempt::Again => (),
            }
            self.session.stats.device_fault_retries.inc();
            if start.elapsed() > STALE_LIMIT {
                return Err(EBUSY);
            }
        }
    }

    /// Where the page of `fault` should be.
    fn steer(&self, fault: &Fault) -> Steer {
        let mut steering = self.space.steering.lock();
        let policy = steering.policy;
        let chunk = policy.chunk_of(fault.va).start;
        let wanted = policy.migrate && policy.own;
        let may = wanted
            && steering
                .history
                .may_migrate(&policy, chunk, Instant::<Monotonic>::now());

        if wanted && !may {
            self.session.stats.thrashing.inc();
        }
        Steer {
            policy,
            migrate: may,
        }
    }

    /// Whose device-private pages are reported as such, and not fetched.
    fn owner(&self, policy: &Policy) -> Option<Owner> {
        policy.own.then(|| self.pagemap.owner())
    }

    /// Looks at the chunk, and maps what is good.
    fn attempt(
        &mut self,
        mm: &MmWithUser,
        fault: &Fault,
        policy: &Policy,
        migrate: bool,
    ) -> Result<Attempt> {
        let owner = self.owner(policy);
        let seq = self.space.notifier.read_begin();
        let mmap = mm.mmap_read_lock();
        let vma = mmap.vma_lookup(usize::try_from(fault.va)?).ok_or(EFAULT)?;
        let chunk = policy.chunk_of(fault.va);
        // CAST: `usize` has 64 bits.
        let range = chunk.start.max(vma.start() as u64)..chunk.end.min(vma.end() as u64);
        let pages = usize::try_from((range.end - range.start) / PAGE)?;
        let pfns = self.pfns.get_mut(..pages).ok_or(EINVAL)?;
        let first = usize::try_from(range.start)?;

        self.session.stats.device_faults.inc();
        let faulted = hmm::range_fault(seq, &mmap, first, pfns, Request::Snapshot, owner);
        drop(mmap);

        let mut mapped = match faulted {
            Ok(faulted) => match faulted.lock() {
                Some(mapped) => mapped,
                None => return Ok(Attempt::Again),
            },
            Err(EBUSY) => return Ok(Attempt::Again),
            Err(error) => return Err(error),
        };

        let at = usize::try_from((fault.va - range.start) / PAGE)?;
        let verdict = match mapped.entry(at) {
            Entry::Page(page) => judge(self.pagemap, &page, fault.want, migrate),
            Entry::None if migrate => Verdict::Migrate,
            // Maybe it is exclusive already, and not in the page table any more.
            Entry::None if fault.want == Want::Atomic => Verdict::Exclude,
            // Snapshots report huge pages of strangers' devices as errors. Whether it is one shows when it is faulted.
            Entry::None | Entry::Error => Verdict::FaultIn,
        };
        match verdict {
            Verdict::Good => (),
            Verdict::Migrate => return Ok(Attempt::Migrate(range)),
            Verdict::Exclude => return Ok(Attempt::Exclude),
            Verdict::FaultIn => return Ok(Attempt::FaultIn(owner)),
            Verdict::Unshare => return Ok(Attempt::FaultIn(None)),
        }

        let map = Map {
            session: self.session,
            pagemap: self.pagemap,
            range,
            at,
        };
        let leaves = self.leaves.get_mut(..pages).ok_or(EINVAL)?;
        match map.run(&mut mapped, leaves, &mut self.stash) {
            Ok(()) => Ok(Attempt::Mapped),
            // A table is gone since we looked.
            Err(EAGAIN) => Ok(Attempt::Again),
            Err(error) => Err(error),
        }
    }

    /// What of a chunk migrates: with chunks of the size of a huge page, a huge page is not split for it.
    fn select(&self, policy: &Policy) -> u32 {
        // Coherent memory has no huge folios.
        if policy.chunk == HUGE_CHUNK && self.pagemap.pages().kind() == Kind::Private {
            uapi::SELECT_SYSTEM | uapi::SELECT_HUGE
        } else {
            uapi::SELECT_SYSTEM
        }
    }

    /// Moves `range` to VRAM as far as that is possible.
    fn migrate(&self, mm: &MmWithUser, range: Range<u64>, policy: &Policy) -> Result {
        let mut request = uapi::Migrate {
            addr: range.start,
            npages: (range.end - range.start) / PAGE,
            select: self.select(policy),
            owner: uapi::OWNER_OWN,
            direction: uapi::TO_DEVICE,
            ..Default::default()
        };

        match migrate::migrate(
            self.session,
            self.pagemap,
            mm,
            &Failures::new(),
            &mut request,
        ) {
            // What did not move can be accessed where it is.
            Ok(()) | Err(EINVAL | EINTR | EIO | ETIMEDOUT | ENOMEM | EBUSY) => (),
            Err(error) => return Err(error),
        }
        if request.migrated != 0 {
            self.space.steering.lock().history.migrated(
                policy,
                policy.chunk_of(range.start).start,
                Instant::<Monotonic>::now(),
            );
        }
        Ok(())
    }

    /// Has the kernel make the page of `fault` accessible.
    fn fault_in(&self, mm: &MmWithUser, fault: &Fault, owner: Option<Owner>) -> Result {
        let request = match fault.want {
            Want::Read => Request::Read,
            Want::Write | Want::Atomic => Request::Write,
        };
        let mut pfn = [HmmPfn::default()];

        self.session.stats.device_faults.inc();
        let seq = self.space.notifier.read_begin();
        let mmap = mm.mmap_read_lock();
        let va = usize::try_from(fault.va)?;
        match hmm::range_fault(seq, &mmap, va, &mut pfn, request, owner) {
            // What was found is looked at again, with its neighbours.
            Ok(_) | Err(EBUSY) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// What the policy says about a fault.
struct Steer {
    policy: Policy,
    migrate: bool,
}

/// What is to be done with a page.
enum Verdict {
    Good,
    Migrate,
    Exclude,
    FaultIn,
    /// `hmm_range_fault()` reports device pages of the asking owner as they are, also if they may only be read because
    /// they are shared. For a stranger it faults them: they come to system memory, and are copied there.
    Unshare,
}

/// What is to be done with a page that is there.
fn judge(pagemap: &VramPagemap, page: &HmmPage<'_>, want: Want, migrate: bool) -> Verdict {
    let writable = want == Want::Read || page.is_writable();

    match page.memory() {
        Memory::Device(device) if own(pagemap, &device).is_some() => {
            if writable {
                Verdict::Good
            } else {
                Verdict::Unshare
            }
        }
        // Shared memory is made private first: it would have to come back for that.
        _ if !writable => Verdict::FaultIn,
        // Coherent memory of another GPU, which that has brought there: it is used where it is, as a peer's.
        Memory::Device(_) if want != Want::Atomic => Verdict::Good,
        Memory::System(_) if migrate => Verdict::Migrate,
        Memory::System(_) if want != Want::Atomic => Verdict::Good,
        _ => Verdict::Exclude,
    }
}

/// Where a page is in this GPU's VRAM, whichever part that is, if it is there.
fn own(pagemap: &VramPagemap, device: &DevicePageRef<'_>) -> Option<Location> {
    pagemap
        .reach(device)
        .ok()
        .filter(|location| location.aperture == Aperture::Vram)
}

/// Entering a chunk in the page table.
struct Map<'a> {
    session: &'a Session<'a>,
    pagemap: &'a VramPagemap,
    /// The chunk, as far as the VMA goes.
    range: Range<u64>,
    /// The page that must be mapped; others are if it costs nothing.
    at: usize,
}

impl Map<'_> {
    fn va(&self, index: usize) -> u64 {
        // CAST: `usize` has 64 bits.
        self.range.start + index as u64 * PAGE
    }

    /// Enters everything that `mapped` has and the page table has not.
    ///
    /// # Errors
    ///
    /// `EAGAIN` if `stash` is short of a table, and those of DMA mappings. Then nothing was entered at `at`.
    fn run(
        &self,
        mapped: &mut Mapped<'_, '_, Tables>,
        leaves: &mut [Option<Pte>],
        stash: &mut Stash<Dma>,
    ) -> Result {
        if let Some(pte) = self.huge(mapped)? {
            let mut tables = mapped.state();

            tables.take(self.range.clone());
            return tables
                .enter(self.range.start, HUGE, pte, stash)
                .inspect_err(|_| self.unmap(pte, HUGE));
        }

        // The page that faulted may be mapped with less than what is wanted.
        mapped.state().take(self.va(self.at)..self.va(self.at + 1));
        for (index, leaf) in leaves.iter_mut().enumerate() {
            *leaf = None;
            if mapped.state().get(self.va(index)).is_none() {
                match self.leaf(mapped, index) {
                    Ok(found) => *leaf = found,
                    Err(error) if index == self.at => {
                        self.drop_leaves(leaves.get(..index).unwrap_or_default());
                        return Err(error);
                    }
                    Err(_) => (),
                }
            }
        }

        let mut result = Ok(());
        let mut tables = mapped.state();
        // The one that matters goes first.
        for index in Iterator::chain(iter::once(self.at), 0..leaves.len()) {
            let Some(leaf) = leaves.get_mut(index).and_then(Option::take) else {
                continue;
            };

            if let Err(error) = tables.enter(self.va(index), SMALL, leaf, stash) {
                self.unmap(leaf, SMALL);
                if index == self.at {
                    result = Err(error);
                }
            }
        }
        result
    }

    /// The leaf for one page, its memory mapped for DMA.
    fn leaf(&self, mapped: &Mapped<'_, '_, Tables>, index: usize) -> Result<Option<Pte>> {
        let Entry::Page(page) = mapped.entry(index) else {
            return Ok(None);
        };
        let write = if page.is_writable() { Pte::WRITE } else { 0 };

        let pte = match page.memory() {
            Memory::Device(device) => {
                let Ok(location) = self.pagemap.reach(&device) else {
                    return Ok(None);
                };
                // On a peer's memory the GPU is no more atomic than on that of the system.
                let rights = if location.aperture == Aperture::Vram {
                    in_vram(write)
                } else {
                    write
                };

                self.pagemap.touch(&device);
                Pte::leaf(location, rights)
            }
            Memory::System(_) => self.map_system(mapped, index, SMALL, write)?,
        };
        Ok(Some(pte))
    }

    /// The leaf for the whole chunk, if it is one piece of memory that the CPU maps as one.
    fn huge(&self, mapped: &Mapped<'_, '_, Tables>) -> Result<Option<Pte>> {
        let order = order_of(HUGE);

        if mapped.len() != PAGES || self.range.start % (PAGE << order) != 0 {
            return Ok(None);
        }
        let Entry::Page(first) = mapped.entry(0) else {
            return Ok(None);
        };
        let same = |page: &HmmPage<'_>| {
            page.map_order() >= order && page.is_writable() == first.is_writable()
        };
        let write = if first.is_writable() { Pte::WRITE } else { 0 };

        match first.memory() {
            Memory::Device(device) => {
                let Ok(start) = self.pagemap.locate(&device) else {
                    return Ok(None);
                };
                let in_place = |(index, offset): (usize, u64)| match mapped.entry(index) {
                    Entry::Page(page) if same(&page) => match page.memory() {
                        Memory::Device(device) => {
                            self.pagemap.locate(&device)
                                == Ok(Location::vram(start.address + offset))
                        }
                        Memory::System(_) => false,
                    },
                    _ => false,
                };

                if start.address % (PAGE << order) != 0
                    || !(0..PAGES).zip((0..).step_by(PAGE_SIZE)).all(in_place)
                {
                    return Ok(None);
                }
                self.pagemap.touch(&device);
                Ok(Some(Pte::leaf(start, in_vram(write))))
            }
            Memory::System(_) => {
                let whole = (0..PAGES)
                    .all(|index| matches!(mapped.entry(index), Entry::Page(page) if same(&page)));

                if !whole {
                    return Ok(None);
                }
                match self.map_system(mapped, 0, HUGE, write) {
                    Ok(pte) => Ok(Some(pte)),
                    // It is not one piece after all.
                    Err(EINVAL) => Ok(None),
                    Err(error) => Err(error),
                }
            }
        }
    }

    fn map_system(
        &self,
        mapped: &Mapped<'_, '_, Tables>,
        index: usize,
        level: u32,
        rights: u64,
    ) -> Result<Pte> {
        let direction = direction_of(Pte(rights));
        // SAFETY: The mapping is undone when its leaf is reaped, or in `unmap()` if there will be none. Leaves are taken in
        // the notifier of their pages before it returns, and all of them when the space is killed, which is before the
        // notifier is dropped and before the driver unbinds. The device does not write without the right to.
        let address =
            unsafe { mapped.dma_map(self.session.device(), index, order_of(level), direction)? };

        if level == HUGE && address % (PAGE << order_of(HUGE)) != 0 {
            self.unmap(Pte::leaf(Location::system(address), rights), level);
            return Err(EINVAL);
        }
        Ok(Pte::leaf(Location::system(address), rights))
    }

    fn drop_leaves(&self, leaves: &[Option<Pte>]) {
        for leaf in leaves.iter().flatten() {
            self.unmap(*leaf, SMALL);
        }
    }

    /// Undoes what was done for a leaf that was not entered.
    fn unmap(&self, pte: Pte, level: u32) {
        crate::tables::unmap(self.session, pte, level);
    }
}

/// Rights in memory of the GPU's own, where it can be atomic if it can write.
const fn in_vram(write: u64) -> u64 {
    if write != 0 {
        Pte::WRITE | Pte::ATOMIC
    } else {
        0
    }
}

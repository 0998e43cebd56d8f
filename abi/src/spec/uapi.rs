// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ioctls of `/dev/hmm_dmirror0..`: those of the kernel's `lib/test_hmm_uapi.h`, and hsgpu's own beside them.
//!
//! Node `n` is GPU `n` with its memory registered as `MEMORY_DEVICE_PRIVATE`. If a part of the memory is registered as
//! `MEMORY_DEVICE_COHERENT` (module parameter `coherent_mib`), that of GPU `n` is node `n` plus the number of GPUs, or plus
//! 2 if there is only one. All structures are native-endian, have
//! no padding and consist of `u64` and `u32` only. Addresses and lengths that are not page-aligned give `EINVAL`.

/// Ioctl type of all commands.
pub const MAGIC: u8 = b'H';

const fn iowr(nr: u8, size: usize) -> u32 {
    3 << 30 | (size as u32) << 16 | (MAGIC as u32) << 8 | nr as u32
}

/// Bytes of a page; also the unit of every `npages`.
pub const PAGE_SIZE: usize = 4096;

/// `struct hmm_dmirror_cmd` of `lib/test_hmm_uapi.h`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DmirrorCmd {
    /// In: user address that the device accesses.
    pub addr: u64,
    /// In: user address that data is copied to or from.
    pub ptr: u64,
    /// In: number of pages.
    pub npages: u64,
    /// Out: number of pages copied.
    pub cpages: u64,
    /// Out: number of device page faults.
    pub faults: u64,
}

/// Device reads `npages` at `addr` into the buffer at `ptr`, faulting pages in where needed.
pub const HMM_DMIRROR_READ: u32 = iowr(0x00, size_of::<DmirrorCmd>());
/// Device writes the buffer at `ptr` to `npages` at `addr`.
pub const HMM_DMIRROR_WRITE: u32 = iowr(0x01, size_of::<DmirrorCmd>());
/// Migrates `npages` of system memory at `addr` to the device, and reads the device's copy into `ptr`.
pub const HMM_DMIRROR_MIGRATE_TO_DEV: u32 = iowr(0x02, size_of::<DmirrorCmd>());
/// Migrates `npages` of this device's memory at `addr` back to system memory.
pub const HMM_DMIRROR_MIGRATE_TO_SYS: u32 = iowr(0x03, size_of::<DmirrorCmd>());
/// Stores one protection byte a page (`HMM_DMIRROR_PROT_*`) at `ptr`.
pub const HMM_DMIRROR_SNAPSHOT: u32 = iowr(0x04, size_of::<DmirrorCmd>());
/// Makes `npages` at `addr` exclusive to the device.
pub const HMM_DMIRROR_EXCLUSIVE: u32 = iowr(0x05, size_of::<DmirrorCmd>());
/// Fails with `EPERM` if one of `npages` at `addr` is still exclusive.
pub const HMM_DMIRROR_CHECK_EXCLUSIVE: u32 = iowr(0x06, size_of::<DmirrorCmd>());
/// Evicts everything from the device.
pub const HMM_DMIRROR_RELEASE: u32 = iowr(0x07, size_of::<DmirrorCmd>());
/// Sets test flags (`npages`).
pub const HMM_DMIRROR_FLAGS: u32 = iowr(0x08, size_of::<DmirrorCmd>());

/// Snapshot byte: no valid entry.
pub const HMM_DMIRROR_PROT_ERROR: u8 = 0xff;
/// Snapshot byte: not populated, or no access.
pub const HMM_DMIRROR_PROT_NONE: u8 = 0x00;
/// Snapshot byte: readable.
pub const HMM_DMIRROR_PROT_READ: u8 = 0x01;
/// Snapshot byte: readable and writable.
pub const HMM_DMIRROR_PROT_WRITE: u8 = 0x02;
/// Snapshot bit: mapped by a PMD.
pub const HMM_DMIRROR_PROT_PMD: u8 = 0x04;
/// Snapshot bit: mapped by a PUD.
pub const HMM_DMIRROR_PROT_PUD: u8 = 0x08;
/// Snapshot bit: the zero page.
pub const HMM_DMIRROR_PROT_ZERO: u8 = 0x10;
/// Snapshot bits: private memory of the device asked.
pub const HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL: u8 = 0x20;
/// Snapshot bits: private memory of another device.
pub const HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE: u8 = 0x30;
/// Snapshot bits: coherent memory of the device asked.
pub const HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL: u8 = 0x40;
/// Snapshot bits: coherent memory of another device.
pub const HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE: u8 = 0x50;

/// Bit of [`HMM_DMIRROR_FLAGS`]: the next allocation of a destination fails, once. Of a huge folio, small pages are made
/// then.
pub const HMM_DMIRROR_FLAG_FAIL_ALLOC: u64 = 1 << 0;

/// Bit of [`Migrate::select`]: system memory (`MIGRATE_VMA_SELECT_SYSTEM`).
pub const SELECT_SYSTEM: u32 = 1 << 0;
/// Bit of [`Migrate::select`]: device-private memory (`MIGRATE_VMA_SELECT_DEVICE_PRIVATE`).
pub const SELECT_DEVICE_PRIVATE: u32 = 1 << 1;
/// Bit of [`Migrate::select`]: device-coherent memory (`MIGRATE_VMA_SELECT_DEVICE_COHERENT`).
pub const SELECT_DEVICE_COHERENT: u32 = 1 << 2;
/// Bit of [`Migrate::select`]: folios of 2 MiB as what they are (`MIGRATE_VMA_SELECT_COMPOUND`); without it they are split
/// first.
pub const SELECT_HUGE: u32 = 1 << 3;

/// [`Migrate::owner`], [`Access::owner`]: this GPU's own pagemap owner.
pub const OWNER_OWN: u32 = 0;
/// [`Migrate::owner`], [`Access::owner`]: no owner, so that every device-private page is foreign.
pub const OWNER_NONE: u32 = 1;

/// [`Migrate::direction`]: towards this GPU's memory.
pub const TO_DEVICE: u32 = 0;
/// [`Migrate::direction`]: back to system memory.
pub const TO_SYSTEM: u32 = 1;

/// One `migrate_vma_setup()`, `_pages()`, `_finalize()` over a range, with nothing decided by the driver.
///
/// With both selections and direction [`TO_DEVICE`], pages that are on this GPU already are collected, isolated and
/// unmapped like the others, and put back where they were: that is the mixed migration of NVIDIA UVM and of Xe's
/// multi-device code, which the kernel's own `test_hmm` cannot do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Migrate {
    /// In: user address.
    pub addr: u64,
    /// In: pages; any number, done in calls of at most 512 pages that do not cross a VMA.
    pub npages: u64,
    /// In: [`SELECT_SYSTEM`], [`SELECT_DEVICE_PRIVATE`], [`SELECT_DEVICE_COHERENT`] or several; [`SELECT_HUGE`] with them.
    pub select: u32,
    /// In: [`OWNER_OWN`] or [`OWNER_NONE`].
    pub owner: u32,
    /// In: [`TO_DEVICE`] or [`TO_SYSTEM`].
    pub direction: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// Out: calls of `migrate_vma_setup()`.
    pub calls: u64,
    /// Out: pages that were collected (`migrate_vma::cpages` after setup, summed).
    pub collected: u64,
    /// Out: pages that moved.
    pub migrated: u64,
}

/// [`Migrate`].
pub const HSGPU_MIGRATE: u32 = iowr(0x80, size_of::<Migrate>());

/// Milliseconds for which the driver tries to serve a device access while what it finds is stale every time. Then it
/// gives up: [`HSGPU_ACCESS`] with `EBUSY`, a [`Submit`]ted job with [`Status::PageFault`](super::ring::Status::PageFault).
pub const STALE_LIMIT_MS: u32 = 10_000;

/// A device access, like [`HMM_DMIRROR_READ`], with an owner policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Access {
    /// In: user address that the device accesses.
    pub addr: u64,
    /// In: user address that data is copied to or from.
    pub ptr: u64,
    /// In: number of pages.
    pub npages: u64,
    /// In: 1 to write `ptr` to `addr`, 0 to read.
    pub write: u32,
    /// In: [`OWNER_OWN`] or [`OWNER_NONE`]: what `hmm_range_fault()` gets as `dev_private_owner`.
    pub owner: u32,
    /// Out: pages copied.
    pub cpages: u64,
    /// Out: device page faults, i.e. calls of `hmm_range_fault()`.
    pub faults: u64,
    /// Out: times that the result of `hmm_range_fault()` was stale and was asked for again.
    pub retries: u64,
}

/// [`Access`].
pub const HSGPU_ACCESS: u32 = iowr(0x81, size_of::<Access>());

/// Flag of [`Submit`]: the caller runs the job, serves its page faults itself, and comes back when it has ended. A
/// signal ends the job. Without it, a kernel worker does, and the call returns at once.
pub const SUBMIT_DIRECT: u32 = 1 << 0;

/// Most jobs of one open file that were submitted and not waited for yet.
pub const JOBS_MAX: usize = 32;

/// Starts an access job in the address space of the process that opened the file.
///
/// Fails with `EAGAIN` if [`JOBS_MAX`] jobs have not been waited for yet, with `ENOSPC` if all address spaces of the
/// GPU are in use, and with `ENXIO` if it has no channel for jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Submit {
    /// In: the [`Job`](super::job::Job) as words.
    pub job: [u64; 8],
    /// In: milliseconds after which the job has failed if it made no progress that the driver can see (a page fault
    /// served, its end); 0 for 10 s.
    pub limit_ms: u32,
    /// In: [`SUBMIT_DIRECT`].
    pub flags: u32,
    /// Out: what [`Wait`] wants.
    pub handle: u64,
}

/// [`Submit`].
pub const HSGPU_SUBMIT: u32 = iowr(0x83, size_of::<Submit>());

/// [`Wait::status`]: no end within the job's limit; its channel was reset.
pub const JOB_TIMEOUT: u32 = 0x100;
/// [`Wait::status`]: the device does not answer any more.
pub const JOB_DEAD: u32 = 0x101;
/// [`Wait::status`]: the job was ended, by a signal or because the driver unbinds, or it never began.
pub const JOB_CANCELLED: u32 = 0x102;

/// Waits for the end of a job, and forgets it.
///
/// Fails with `ENOENT` if there is no such job, with `ETIMEDOUT` if it has not ended in time, with `EINTR`. A file can
/// be polled: it is readable when a job has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Wait {
    /// In: what [`Submit`] gave.
    pub handle: u64,
    /// In: how long to wait, in milliseconds.
    pub timeout_ms: u32,
    /// Out: the [`Status`](super::ring::Status) with which the job ended, or one of `JOB_*`.
    pub status: u32,
    /// Out: the [`Outcome`](super::job::Outcome) as words.
    pub outcome: [u64; 8],
}

/// [`Wait`].
pub const HSGPU_WAIT: u32 = iowr(0x84, size_of::<Wait>());

/// Sizes in bytes that [`Policy::chunk`] may have.
pub const CHUNKS: [u64; 3] = [4 << 10, 64 << 10, 2 << 20];
/// [`Policy::placement`]: a page that the GPU faults on migrates to its memory.
pub const PLACE_MIGRATE: u32 = 0;
/// [`Policy::placement`]: it stays where it is, and the GPU accesses it there.
pub const PLACE_STAY: u32 = 1;

/// What the driver does when the GPU faults in the address space of this file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Policy {
    /// In: bytes that are migrated and mapped at once, one of [`CHUNKS`]; at first 64 KiB.
    pub chunk: u64,
    /// In: [`PLACE_MIGRATE`] or [`PLACE_STAY`]. What the GPU wants to be atomic on migrates in any case: it can be only in
    /// its own memory.
    pub placement: u32,
    /// In: [`OWNER_OWN`] or [`OWNER_NONE`]: what `hmm_range_fault()` gets as `dev_private_owner`. With the latter nothing
    /// migrates to the GPU, and what is there comes back when the GPU faults on it.
    pub owner: u32,
    /// In: migrations of a chunk to the GPU within `window_ms` after which it stays in system memory for as long again;
    /// 0 for any number.
    pub limit: u32,
    /// In: see `limit`.
    pub window_ms: u32,
}

/// [`Policy`].
pub const HSGPU_POLICY: u32 = iowr(0x85, size_of::<Policy>());

/// Moves what a range has in this GPU's memory back to system memory, and tries again what is locked at the moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Evict {
    /// In: user address.
    pub addr: u64,
    /// In: pages.
    pub npages: u64,
    /// Out: pages that moved.
    pub evicted: u64,
}

/// [`Evict`].
pub const HSGPU_EVICT: u32 = iowr(0x86, size_of::<Evict>());

/// Moves what a range has in the memory of another GPU to the memory of this one, by a copy from GPU to GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct PeerMigrate {
    /// In: user address.
    pub addr: u64,
    /// In: pages.
    pub npages: u64,
    /// In: index of the other GPU.
    pub from: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// Out: pages that moved.
    pub migrated: u64,
}

/// [`PeerMigrate`].
pub const HSGPU_PEER_MIGRATE: u32 = iowr(0x87, size_of::<PeerMigrate>());

/// Counters of one GPU's driver since probe. Each only grows, but for `vram_free` and `coherent_free`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Stats {
    /// Pages of VRAM registered as device-private memory.
    pub vram_pages: u64,
    /// Of these, free ones.
    pub vram_free: u64,
    /// CPU faults on device pages that `migrate_to_ram` served.
    pub cpu_faults: u64,
    /// Of these, those that failed (`VM_FAULT_SIGBUS`).
    pub cpu_faults_failed: u64,
    /// Pages migrated to the device.
    pub to_device: u64,
    /// Pages migrated to system memory, CPU faults included.
    pub to_system: u64,
    /// Pages collected by a migration and then not moved.
    pub not_migrated: u64,
    /// Calls of `hmm_range_fault()`.
    pub device_faults: u64,
    /// Of these, those whose result was stale.
    pub device_fault_retries: u64,
    /// `mmu_interval_notifier` invalidations.
    pub invalidations: u64,
    /// Descriptors submitted.
    pub submitted: u64,
    /// Doorbells that had to be rung (trapped writes).
    pub doorbells: u64,
    /// Fences waited for.
    pub fences: u64,
    /// Fences that ended in an error or timed out.
    pub fences_failed: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Bit 0: the device is synchronous.
    pub flags: u64,
    /// Pages evicted to make room for others.
    pub evicted: u64,
    /// Entries read from the fault buffer.
    pub gpu_faults: u64,
    /// Of these, those that could not be served: their jobs were cancelled.
    pub gpu_faults_failed: u64,
    /// Of these, those that found the page mapped by then.
    pub gpu_faults_stale: u64,
    /// Faults that found the buffer full.
    pub fault_overflows: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Pages (of 4 KiB) entered in GPU page tables, those of huge entries included.
    pub gpu_mapped: u64,
    /// Huge entries (2 MiB) made.
    pub gpu_mapped_huge: u64,
    /// Pages taken from GPU page tables.
    pub gpu_unmapped: u64,
    /// Invalidations of the GPU's TLB.
    pub tlb_invalidations: u64,
    /// Pages that stayed in system memory because they had moved too often.
    pub thrashing: u64,
    /// Access jobs that ended, errors included.
    pub jobs: u64,
    /// Of these, those that ended in an error.
    pub jobs_failed: u64,
    /// Pages that came from the memory of another GPU.
    pub from_peer: u64,
    /// Folios of 2 MiB that were migrated to the device whole.
    pub huge_to_device: u64,
    /// The same, to system memory.
    pub huge_to_system: u64,
    /// Folios of 2 MiB on the device that the kernel split.
    pub splits: u64,
    /// Pages that became exclusive to the device.
    pub exclusive: u64,
    /// Pages of VRAM registered as device-coherent memory.
    pub coherent_pages: u64,
    /// Of these, free ones.
    pub coherent_free: u64,
    /// Bytes that the copy engine moved or filled for the driver.
    pub copied: u64,
    /// Pages that a CPU fault wanted and `migrate_vma_setup()` did not give out: somebody else has the lock of the folio,
    /// unless the fault has it itself, or references beside those of its mappings.
    pub abort_busy: u64,
    /// Pages that were collected and given a destination, and then did not move: a reference appeared meanwhile, or what
    /// the destination was for has changed.
    pub abort_referenced: u64,
    /// Pages that were collected and for which there was no room on the device, not even after eviction.
    pub abort_no_room: u64,
    /// Pages that were collected and could not be copied.
    pub abort_copy: u64,
    /// Pages whose contents could not be brought back when the driver was unbound: touching one is an error.
    pub lost: u64,
}

/// Reads [`Stats`].
pub const HSGPU_STATS: u32 = iowr(0x82, size_of::<Stats>());

/// Locks device pages and lets them be: something that is no migration and has the lock again and again.
///
/// One page a time: the folio of the page at the next address of the range is locked, kept for a while and unlocked. It
/// holds a reference as long as the lock, and no longer. A signal ends it early; then `held` says how far it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Hold {
    /// In: user address.
    pub addr: u64,
    /// In: pages, taken in turn.
    pub npages: u64,
    /// In: times that a page is locked, all together.
    pub times: u64,
    /// In: microseconds that each lock is kept.
    pub hold_us: u64,
    /// In: microseconds between two locks. With [`Hold::hold_us`], at most [`HOLD_LIMIT_US`] in all.
    pub gap_us: u64,
    /// Out: times that a page was locked and kept.
    pub held: u64,
    /// Out: times that the page was not on this GPU.
    pub absent: u64,
    /// Out: longest wait for a lock, microseconds.
    pub waited_us: u64,
}

/// Most microseconds of one [`HSGPU_HOLD`].
pub const HOLD_LIMIT_US: u64 = 10_000_000;

/// [`Hold`].
pub const HSGPU_HOLD: u32 = iowr(0x90, size_of::<Hold>());

/// [`Refuse::mode`]: CPU faults are served.
pub const REFUSE_NOTHING: u32 = 0;
/// [`Refuse::mode`]: CPU faults return without an error and without having migrated anything.
pub const REFUSE_STAY: u32 = 1;
/// [`Refuse::mode`]: CPU faults fail with `VM_FAULT_SIGBUS`; the page stays as it is.
pub const REFUSE_FAIL: u32 = 2;

/// Makes the GPU's `migrate_to_ram()` refuse, for a time: what drivers do that keep a page on the device for a time slice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Refuse {
    /// In: `REFUSE_*`.
    pub mode: u32,
    /// Reserved, zero.
    pub reserved: u32,
    /// In: microseconds after which faults are served again, at most [`HOLD_LIMIT_US`].
    pub for_us: u64,
    /// Out: faults refused since probe.
    pub refused: u64,
}

/// [`Refuse`].
pub const HSGPU_REFUSE: u32 = iowr(0x91, size_of::<Refuse>());

const _: () = {
    assert!(size_of::<Hold>() == 64);
    assert!(size_of::<Refuse>() == 24);
    assert!(size_of::<DmirrorCmd>() == 40);
    assert!(size_of::<Migrate>() == 56);
    assert!(size_of::<Access>() == 56);
    assert!(size_of::<Submit>() == 80);
    assert!(size_of::<Wait>() == 80);
    assert!(size_of::<Policy>() == 24);
    assert!(size_of::<Evict>() == 24);
    assert!(size_of::<PeerMigrate>() == 32);
    assert!(size_of::<Stats>() == 336);
    // The values of lib/test_hmm_uapi.h.
    assert!(HMM_DMIRROR_READ == 0xc028_4800);
    assert!(HMM_DMIRROR_FLAGS == 0xc028_4808);
};

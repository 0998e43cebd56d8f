// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Ioctls of `/dev/hmm_dmirror0..`: those of the kernel's `lib/test_hmm_uapi.h`, and hsgpu's own beside them.
//!
//! Node `n` is GPU `n` with its memory registered as `MEMORY_DEVICE_PRIVATE`. All structures are native-endian, have
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

/// Bit of [`Migrate::select`]: system memory (`MIGRATE_VMA_SELECT_SYSTEM`).
pub const SELECT_SYSTEM: u32 = 1 << 0;
/// Bit of [`Migrate::select`]: device-private memory (`MIGRATE_VMA_SELECT_DEVICE_PRIVATE`).
pub const SELECT_DEVICE_PRIVATE: u32 = 1 << 1;

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
    /// In: [`SELECT_SYSTEM`], [`SELECT_DEVICE_PRIVATE`] or both.
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

/// Counters of one GPU's driver since probe. Each only grows, but for `vram_free` and `device_pages`.
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
}

/// Reads [`Stats`].
pub const HSGPU_STATS: u32 = iowr(0x82, size_of::<Stats>());

const _: () = {
    assert!(size_of::<DmirrorCmd>() == 40);
    assert!(size_of::<Migrate>() == 56);
    assert!(size_of::<Access>() == 56);
    assert!(size_of::<Stats>() == 136);
    // The values of lib/test_hmm_uapi.h.
    assert!(HMM_DMIRROR_READ == 0xc028_4800);
    assert!(HMM_DMIRROR_FLAGS == 0xc028_4808);
};

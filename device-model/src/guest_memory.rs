//! The DMA map: which guest memory the GPU may reach, and where it is mapped in this process.
//!
//! The VMM adds and removes entries at any time, and takes the answer to a removal as the promise that the device
//! touches that memory no more. So every access goes through a [`DmaGuard`], which holds the map for reading, and
//! [`GuestMemory::unmap`] waits until no guard is out. Guards are short: see [`crate::engine`], which gives its own
//! back every few hundred microseconds. A thread holds one guard at a time, or a waiting removal would lock it out
//! of its own second one.

use std::fs::File;
use std::io;
use std::num::TryFromIntError;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection,
    GuestRegionMmap, MmapRegion, VolatileMemory, VolatileSlice,
};

/// Most entries of the map. QEMU announces 65,535 as its own limit.
const ENTRIES_MAX: usize = 65_535;
/// Unit of addresses and sizes, in bytes.
const PAGE: u64 = 4096;

/// What an access needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// To read.
    Read,
    /// To write.
    Write,
}

/// An access to a DMA address that the map does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA {} of {length} bytes at {address:#x}: {reason}", if *need == Need::Write { "write" } else { "read" })]
pub struct DmaFault {
    /// First address that could not be reached.
    pub address: u64,
    /// Bytes wanted from there.
    pub length: u64,
    /// What for.
    pub need: Need,
    /// What the map says.
    pub reason: FaultReason,
}

/// Why an address cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultReason {
    /// No entry.
    #[error("not mapped")]
    Unmapped,
    /// An entry that may only be read.
    #[error("mapped read-only")]
    ReadOnly,
    /// An entry that came without a file, such as a ROM or another device's BAR.
    #[error("known to the VMM, but not shared with the device")]
    NotShared,
    /// The address is not a multiple of the access's size, or the range wraps around.
    #[error("misaligned, or beyond the address space")]
    Malformed,
}

/// Why an entry could not be added or removed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Empty, not page-aligned, or past the end of the address space.
    #[error("DMA range {address:#x}+{size:#x} is empty, not page-aligned, or wraps around")]
    BadRange {
        /// Start.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// Part of the range is mapped already.
    #[error("DMA range {address:#x}+{size:#x} overlaps one that is mapped; unmap that first")]
    Overlap {
        /// Start.
        address: u64,
        /// Bytes.
        size: u64,
    },
    /// The file ends before the range does; touching it would kill the process.
    #[error("file of DMA range {address:#x} ends at {length:#x}, needed up to {end:#x}")]
    ShortFile {
        /// Start of the range.
        address: u64,
        /// Bytes in the file.
        length: u64,
        /// Bytes that the range reaches to.
        end: u64,
    },
    /// The file could not be examined.
    #[error("cannot examine the file of DMA range {address:#x}: {source}")]
    File {
        /// Start of the range.
        address: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("cannot map the file of DMA range {address:#x}: {source}")]
    Mmap {
        /// Start of the range.
        address: u64,
        /// What the host said.
        source: MmapRegionError,
    },
    /// The range does not fit this host's address space.
    #[error("DMA range {address:#x}+{size:#x} does not fit this host: {source}")]
    TooLarge {
        /// Start.
        address: u64,
        /// Bytes.
        size: u64,
        /// The conversion that failed.
        source: TryFromIntError,
    },
    /// The map is full.
    #[error("more than {ENTRIES_MAX} DMA ranges")]
    Full,
    /// A removal that would cut an entry in two, or that meets none.
    #[error("DMA range {address:#x}+{size:#x} is not a set of whole mapped ranges")]
    NotMapped {
        /// Start.
        address: u64,
        /// Bytes.
        size: u64,
    },
}

/// A range of DMA addresses; never empty, never wrapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    start: u64,
    last: u64,
}

impl Range {
    fn new(address: u64, size: u64) -> Option<Self> {
        let last = address.checked_add(size.checked_sub(1)?)?;
        Some(Self { start: address, last })
    }
    fn overlaps(self, other: Self) -> bool {
        self.start <= other.last && other.start <= self.last
    }
    fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.last <= self.last
    }
}

fn range_of(region: &GuestRegionMmap) -> Range {
    Range { start: region.start_addr().0, last: region.last_addr().0 }
}

/// The entries in force.
#[derive(Debug, Default)]
struct Entries {
    /// Those that are mapped in this process.
    shared: GuestRegionCollection<GuestRegionMmap>,
    /// Those without a file, by no order.
    not_shared: Vec<Range>,
}

impl Entries {
    fn ranges(&self) -> impl Iterator<Item = Range> {
        self.shared.iter().map(range_of).chain(self.not_shared.iter().copied())
    }
}

/// The DMA map of one GPU.
#[derive(Debug, Default)]
pub struct GuestMemory {
    entries: RwLock<Entries>,
}

impl GuestMemory {
    /// Adds `size` bytes at DMA address `address`, found in `file` from `offset` on. Without a file the range is
    /// remembered, but no access to it succeeds.
    ///
    /// # Errors
    /// See [`MapError`]; the map is then as before.
    pub fn map(
        &self,
        address: u64,
        size: u64,
        writable: bool,
        file: Option<(File, u64)>,
    ) -> Result<(), MapError> {
        let bad = MapError::BadRange { address, size };
        let Some(range) = Range::new(address, size) else { return Err(bad) };
        let region = match file {
            None => None,
            Some(_) if !address.is_multiple_of(PAGE) || !size.is_multiple_of(PAGE) => return Err(bad),
            Some((file, offset)) => Some(Arc::new(map_file(address, size, writable, file, offset)?)),
        };
        // The mapping exists by now, so that readers wait for two pointers and not for a system call.
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let overlap = MapError::Overlap { address, size };
        if entries.ranges().any(|other| other.overlaps(range)) {
            return Err(overlap);
        }
        if entries.shared.num_regions() + entries.not_shared.len() >= ENTRIES_MAX {
            return Err(MapError::Full);
        }
        match region {
            None => entries.not_shared.push(range),
            Some(region) => entries.shared = entries.shared.insert_region(region).map_err(|_| overlap)?,
        }
        Ok(())
    }

    /// Removes the entries that `size` bytes at `address` cover, after every access under way has ended.
    ///
    /// # Errors
    /// [`MapError::NotMapped`] if the range covers no entry, or a part of one; nothing is removed then.
    pub fn unmap(&self, address: u64, size: u64) -> Result<(), MapError> {
        let not_mapped = MapError::NotMapped { address, size };
        let Some(range) = Range::new(address, size) else { return Err(not_mapped) };
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let met: Vec<Range> = entries.ranges().filter(|entry| entry.overlaps(range)).collect();
        if met.is_empty() || met.iter().any(|entry| !range.contains(*entry)) {
            return Err(not_mapped);
        }
        for entry in met {
            let length = entry.last - entry.start + 1;
            // An entry that is not shared is not found here.
            if let Ok((rest, _)) = entries.shared.remove_region(GuestAddress(entry.start), length) {
                entries.shared = rest;
            }
        }
        entries.not_shared.retain(|entry| !range.contains(*entry));
        Ok(())
    }

    /// Removes every entry, after every access under way has ended.
    pub fn unmap_all(&self) {
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = Entries::default();
    }

    /// Holds the map still for a few accesses. A thread must not ask for a second guard while it has one.
    pub fn guard(&self) -> DmaGuard<'_> {
        DmaGuard { entries: self.entries.read().unwrap_or_else(PoisonError::into_inner) }
    }
}

fn map_file(
    address: u64,
    size: u64,
    writable: bool,
    file: File,
    offset: u64,
) -> Result<GuestRegionMmap, MapError> {
    let length = file.metadata().map_err(|source| MapError::File { address, source })?.len();
    let end = offset.checked_add(size).ok_or(MapError::BadRange { address, size })?;
    if end > length {
        return Err(MapError::ShortFile { address, length, end });
    }
    let bytes = usize::try_from(size).map_err(|source| MapError::TooLarge { address, size, source })?;
    let access = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    let mapping = MmapRegion::build(
        Some(FileOffset::new(file, offset)),
        bytes,
        access.bits().cast_signed(),
        flags.bits().cast_signed(),
    )
    .map_err(|source| MapError::Mmap { address, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(address)).ok_or(MapError::BadRange { address, size })
}

fn writable(region: &GuestRegionMmap) -> bool {
    ProtFlags::from_bits_retain(region.prot().cast_unsigned()).contains(ProtFlags::WRITE)
}

/// The DMA map, held still. While it lives, nothing is unmapped.
#[derive(Debug)]
pub struct DmaGuard<'a> {
    entries: RwLockReadGuard<'a, Entries>,
}

impl DmaGuard<'_> {
    /// The region that holds `address` and allows `need`.
    fn region(&self, address: u64, length: u64, need: Need) -> Result<&GuestRegionMmap, DmaFault> {
        let fault = |reason| DmaFault { address, length, need, reason };
        match self.entries.shared.find_region(GuestAddress(address)) {
            Some(region) if need == Need::Write && !writable(region) => Err(fault(FaultReason::ReadOnly)),
            Some(region) => Ok(region),
            None => {
                let byte = Range { start: address, last: address };
                let known = self.entries.not_shared.iter().any(|entry| entry.contains(byte));
                Err(fault(if known { FaultReason::NotShared } else { FaultReason::Unmapped }))
            }
        }
    }

    /// As much of `length` bytes at `address` as lies in one mapping; at least one byte if `length` is not zero.
    ///
    /// # Errors
    /// [`DmaFault`] if not even the first byte can be reached.
    pub fn span(&self, address: u64, length: u64, need: Need) -> Result<VolatileSlice<'_>, DmaFault> {
        let region = self.region(address, length, need)?;
        let offset = address - region.start_addr().0;
        let here = length.min(region.len() - offset);
        slice(region, offset, here).ok_or(DmaFault { address, length, need, reason: FaultReason::Malformed })
    }

    /// As much of the `length` bytes that end before `end` as lies in one mapping, counted from the end.
    ///
    /// # Errors
    /// [`DmaFault`] if not even the last byte can be reached.
    pub fn span_back(&self, end: u64, length: u64, need: Need) -> Result<VolatileSlice<'_>, DmaFault> {
        let last = end.wrapping_sub(1);
        let region = self.region(last, length, need)?;
        let until = last - region.start_addr().0 + 1;
        let here = length.min(until);
        let malformed = DmaFault { address: last, length, need, reason: FaultReason::Malformed };
        slice(region, until - here, here).ok_or(malformed)
    }

    /// Checks that all of `length` bytes at `address` can be reached.
    ///
    /// # Errors
    /// [`DmaFault`] with the first address that cannot.
    pub fn check(&self, address: u64, length: u64, need: Need) -> Result<(), DmaFault> {
        let malformed = DmaFault { address, length, need, reason: FaultReason::Malformed };
        address.checked_add(length).ok_or(malformed)?;
        let (mut at, mut left) = (address, length);
        while left > 0 {
            let here = self.span(at, left, need)?.len() as u64;
            at += here;
            left -= here;
        }
        Ok(())
    }

    /// Reads all of `buffer` from `address` on.
    ///
    /// # Errors
    /// [`DmaFault`]; part of the buffer may have been read.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), DmaFault> {
        self.check(address, buffer.len() as u64, Need::Read)?;
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            done += self.span(address + done as u64, rest.len() as u64, Need::Read)?.copy_to(rest);
        }
        Ok(())
    }

    /// Reads the `u32` at `address` in one access, with acquire order.
    ///
    /// # Errors
    /// [`DmaFault`] if it cannot be reached, or is not aligned.
    pub fn load_u32(&self, address: u64) -> Result<u32, DmaFault> {
        let malformed = DmaFault { address, length: 4, need: Need::Read, reason: FaultReason::Malformed };
        self.span(address, 4, Need::Read)?.load(0, Ordering::Acquire).map_err(|_| malformed)
    }

    /// Writes the `u32` at `address` in one access, with release order.
    ///
    /// # Errors
    /// [`DmaFault`] if it cannot be reached, or is not aligned.
    pub fn store_u32(&self, address: u64, value: u32) -> Result<(), DmaFault> {
        let malformed = DmaFault { address, length: 4, need: Need::Write, reason: FaultReason::Malformed };
        self.span(address, 4, Need::Write)?.store(value, 0, Ordering::Release).map_err(|_| malformed)
    }

    /// Writes the `u64` at `address` in one access, with release order.
    ///
    /// # Errors
    /// [`DmaFault`] if it cannot be reached, or is not aligned.
    pub fn store_u64(&self, address: u64, value: u64) -> Result<(), DmaFault> {
        let malformed = DmaFault { address, length: 8, need: Need::Write, reason: FaultReason::Malformed };
        self.span(address, 8, Need::Write)?.store(value, 0, Ordering::Release).map_err(|_| malformed)
    }
}

fn slice(region: &GuestRegionMmap, offset: u64, length: u64) -> Option<VolatileSlice<'_>> {
    // The region's mapping, and not its `Bytes`: those check the address again for every access.
    let mapping: &MmapRegion<()> = region;
    mapping.get_slice(usize::try_from(offset).ok()?, usize::try_from(length).ok()?).ok()
}

//! The GPU's own memory: a memfd that the engines reach through a mapping, and QEMU through the fd of BAR 2.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hmmstorm_abi::job::mix;
use hmmstorm_abi::mmu::PAGE_SHIFT;
use hmmstorm_abi::wire::control::Chaos;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Why VRAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VramError {
    /// The host refused the memory file.
    #[error("cannot create a memory file of {size} bytes for VRAM: {source}; try a smaller --vram")]
    Create {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The host refused the mapping.
    #[error(
        "cannot map {size} bytes of VRAM: {source}; try a smaller --vram or a larger address-space limit"
    )]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What the host said.
        source: vm_memory::mmap::MmapRegionError,
    },
}

/// The memory of one GPU. Its size never changes: the file is sealed, so nobody it is handed to can shrink it under
/// the mapping.
#[derive(Debug)]
pub struct Vram {
    region: MmapRegion<()>,
    file: File,
    /// What the chaos plan makes unreadable for the engines of every GPU.
    poison: Poison,
}

/// Which pages are poisoned. A plan that changes while an engine looks shows in part; nothing depends on the moment.
#[derive(Debug, Default)]
struct Poison {
    any: AtomicBool,
    seed: AtomicU64,
    every: AtomicU64,
    first: AtomicU64,
    pages: AtomicU64,
}

impl Poison {
    fn holds(&self, page: u64) -> bool {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let chosen = mix(load(&self.seed) ^ mix(page)).checked_rem(load(&self.every)) == Some(0);
        chosen || page.wrapping_sub(load(&self.first)) < load(&self.pages)
    }
}

impl Vram {
    /// Makes `size` bytes of zeroed memory, which take host memory as they are touched.
    ///
    /// # Errors
    /// When the host gives no such file or mapping.
    pub fn new(size: u64) -> Result<Self, VramError> {
        let create = |source: io::Error| VramError::Create { size, source };
        let fd = rustix::fs::memfd_create("hsgpu-vram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|e| create(e.into()))?;
        rustix::fs::ftruncate(&fd, size).map_err(|e| create(e.into()))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(|e| create(e.into()))?;
        let file = File::from(fd);
        let mapped = file.try_clone().map_err(create)?;
        let length = usize::try_from(size)
            .map_err(|_| create(io::Error::new(io::ErrorKind::OutOfMemory, "beyond the address space")))?;
        let region = MmapRegion::from_file(FileOffset::new(mapped, 0), length)
            .map_err(|source| VramError::Map { size, source })?;
        Ok(Self { region, file, poison: Poison::default() })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// The memory from `offset` for `length` bytes, if all of it exists.
    pub fn slice(&self, offset: u64, length: u64) -> Option<VolatileSlice<'_>> {
        self.region.get_slice(usize::try_from(offset).ok()?, usize::try_from(length).ok()?).ok()
    }

    /// Whether `length` bytes from `offset` exist.
    pub fn contains(&self, offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= self.size())
    }

    /// Poisons the pages that `plan` names, and no others.
    pub fn poison(&self, plan: &Chaos) {
        let store = |value: &AtomicU64, new| value.store(new, Ordering::Relaxed);
        store(&self.poison.seed, plan.seed);
        store(&self.poison.every, plan.poison_every);
        store(&self.poison.first, plan.poison_first);
        store(&self.poison.pages, plan.poison_pages);
        self.poison.any.store(plan.poison_every != 0 || plan.poison_pages != 0, Ordering::Release);
    }

    /// Whether a page is poisoned that has one of `length` bytes from `offset`, which exist.
    pub fn is_poisoned(&self, offset: u64, length: u64) -> bool {
        if length == 0 || !self.poison.any.load(Ordering::Acquire) {
            return false;
        }
        (offset >> PAGE_SHIFT..=(offset + (length - 1)) >> PAGE_SHIFT).any(|page| self.poison.holds(page))
    }

    /// Gives the contents back to the host: all of it reads as zero.
    ///
    /// # Errors
    /// Whatever the host says to `fallocate()`.
    pub fn clear(&self) -> io::Result<()> {
        let whole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, whole, 0, self.size())?)
    }
}

impl AsRawFd for Vram {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn only_what_exists_can_be_reached() {
        let vram = Vram::new(1 << 20).expect("a small memory file");
        assert!(vram.slice(0, 1 << 20).is_some());
        assert!(vram.slice(1, 1 << 20).is_none());
        assert!(vram.slice(u64::MAX, 2).is_none());
        assert!(vram.contains(1 << 20, 0));
        assert!(!vram.contains(u64::MAX, 1));
    }

    #[test]
    fn one_in_n_pages_is_poisoned_and_those_that_are_named() {
        let vram = Vram::new(16 << 20).expect("a small memory file");
        let poisoned = |page: u64| vram.is_poisoned(page << 12, 1);
        assert!(!vram.is_poisoned(0, 16 << 20));
        vram.poison(&Chaos { poison_first: 7, poison_pages: 2, ..Chaos::default() });
        assert_eq!((0..4096).filter(|page| poisoned(*page)).collect::<Vec<_>>(), [7, 8]);
        assert!(
            vram.is_poisoned(6 << 12, 4097)
                && !vram.is_poisoned(6 << 12, 4096)
                && !vram.is_poisoned(7 << 12, 0)
        );
        vram.poison(&Chaos { seed: 5, poison_every: 16, ..Chaos::default() });
        let chosen: Vec<u64> = (0..4096).filter(|page| poisoned(*page)).collect();
        assert!((200..320).contains(&chosen.len()), "{}", chosen.len());
        vram.poison(&Chaos { seed: 6, poison_every: 16, ..Chaos::default() });
        assert_ne!((0..4096).filter(|page| poisoned(*page)).collect::<Vec<_>>(), chosen);
        vram.poison(&Chaos::default());
        assert!(!vram.is_poisoned(0, 16 << 20));
    }

    #[test]
    fn clear_leaves_zeroes_and_the_file_cannot_shrink() {
        let vram = Vram::new(1 << 20).expect("a small memory file");
        let word = vram.slice(4096, 8).expect("in range");
        word.write_obj(0x1122_3344_5566_7788_u64, 0).expect("in range");
        vram.clear().expect("memfds can be punched");
        assert_eq!(word.read_obj::<u64>(0).expect("in range"), 0);
        assert!(vram.file.set_len(4096).is_err());
    }
}

//! A VMA of a chosen kind, to do to it what a bug needs: huge pages, private file pages, advice, protection, policy.

#![expect(
    unsafe_code,
    reason = "owns a memory mapping; what it hands out are atomics, which anyone may change"
)]

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use hmmstorm_abi::uapi::PAGE_SIZE;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap, mmap_anonymous, mprotect, munmap,
};

/// Pages of a huge page that a PMD maps.
pub(crate) const HUGE: usize = 512;
const CELLS: usize = PAGE_SIZE / size_of::<AtomicU64>();

/// Memory in one VMA, seen as atomics. Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Vma {
    base: NonNull<AtomicU64>,
    pages: usize,
    outer: NonNull<c_void>,
    outer_length: usize,
}

impl Vma {
    /// `pages` anonymous pages of the smallest size.
    ///
    /// # Errors
    /// Of `mmap`, `madvise`.
    pub(crate) fn small(pages: usize) -> io::Result<Self> {
        let vma = Self::anonymous(pages, PAGE_SIZE)?;
        vma.advise(0..pages, Advice::LinuxNoHugepage)?;
        Ok(vma)
    }

    /// `count` huge pages, aligned, with huge pages advised. Nothing is populated.
    ///
    /// # Errors
    /// Of `mmap`, `madvise`.
    pub(crate) fn huge(count: usize) -> io::Result<Self> {
        let vma = Self::anonymous(count * HUGE, HUGE * PAGE_SIZE)?;
        vma.advise(0..count * HUGE, Advice::LinuxHugepage)?;
        Ok(vma)
    }

    /// `pages` pages of a file in memory, privately: a write copies the page.
    ///
    /// # Errors
    /// Of `memfd_create`, `ftruncate`, `mmap`.
    pub(crate) fn private_file(pages: usize) -> io::Result<Self> {
        let file = memfd_create(c"hmmstorm", MemfdFlags::CLOEXEC)?;
        let length = pages * PAGE_SIZE;
        ftruncate(&file, length as u64)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists; nobody else has the file.
        let base =
            unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::PRIVATE, file.as_fd(), 0) }?;
        let outer = NonNull::new(base).ok_or_else(no_address)?;
        Ok(Self { base: outer.cast(), pages, outer, outer_length: length })
    }

    /// The VMA proper stands between inaccessible guards, so that the kernel merges it with nothing.
    fn anonymous(pages: usize, alignment: usize) -> io::Result<Self> {
        let length = pages * PAGE_SIZE;
        let outer_length = length + alignment + 2 * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let outer = unsafe {
            mmap_anonymous(std::ptr::null_mut(), outer_length, ProtFlags::empty(), MapFlags::PRIVATE)
        }?;
        let outer = NonNull::new(outer).ok_or_else(no_address)?;
        let first = outer.as_ptr().addr() + PAGE_SIZE;
        let skip = first.next_multiple_of(alignment) - outer.as_ptr().addr();
        let inner = outer.as_ptr().wrapping_byte_add(skip);
        let base = NonNull::new(inner.cast()).ok_or_else(no_address)?;
        let vma = Self { base, pages, outer, outer_length };
        // SAFETY: the range lies in the mapping made above, which nothing else knows yet.
        unsafe { mprotect(inner, length, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        Ok(vma)
    }

    /// User address of page `page`.
    pub(crate) fn address(&self, page: usize) -> u64 {
        (self.base.as_ptr().addr() + page * PAGE_SIZE) as u64
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// The cells of page `page`.
    ///
    /// # Panics
    /// If there is no such page.
    pub(crate) fn page(&self, page: usize) -> &[AtomicU64] {
        // SAFETY: the mapping holds this many cells for as long as `self` lives; atomics may be changed by anybody.
        let cells = unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.pages * CELLS) };
        &cells[page * CELLS..(page + 1) * CELLS]
    }

    fn range(&self, pages: &Range<usize>) -> io::Result<(*mut c_void, usize)> {
        if pages.start >= pages.end || pages.end > self.pages {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let start = self.base.as_ptr().wrapping_byte_add(pages.start * PAGE_SIZE).cast();
        Ok((start, pages.len() * PAGE_SIZE))
    }

    /// `madvise`.
    ///
    /// # Errors
    /// Of it; `EINVAL` for an empty range or one outside.
    pub(crate) fn advise(&self, pages: Range<usize>, advice: Advice) -> io::Result<()> {
        let (start, length) = self.range(&pages)?;
        // SAFETY: the range is ours; whatever the advice does to it, atomics are left.
        Ok(unsafe { madvise(start, length, advice) }?)
    }

    /// `mprotect` of all of it; always readable.
    ///
    /// # Errors
    /// Of it.
    pub(crate) fn protect(&self, writable: bool) -> io::Result<()> {
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        // SAFETY: the range is ours. Who writes to it while it is read-only is killed, which breaks no memory.
        Ok(unsafe { mprotect(self.base.as_ptr().cast(), self.pages * PAGE_SIZE, flags) }?)
    }

    /// `mbind(MPOL_BIND)` of all of it to NUMA node 0, with the pages that are there (`MPOL_MF_MOVE_ALL`).
    ///
    /// # Errors
    /// Of it; `ENOSYS` for a kernel without memory policies.
    pub(crate) fn bind(&self) -> io::Result<()> {
        const MPOL_BIND: libc::c_long = 2;
        const MPOL_MF_MOVE_ALL: libc::c_long = 1 << 2;
        let nodes: libc::c_ulong = 1;
        // SAFETY: mbind(2) changes where the pages of our own range are, not what they hold; the mask outlives the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.base.as_ptr(),
                self.pages * PAGE_SIZE,
                MPOL_BIND,
                &raw const nodes,
                libc::c_ulong::from(libc::c_ulong::BITS),
                MPOL_MF_MOVE_ALL,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn no_address() -> io::Error {
    io::Error::from_raw_os_error(libc::EFAULT)
}

// SAFETY: the memory belongs to the value and is reachable as atomics only.
unsafe impl Send for Vma {}
// SAFETY: as above.
unsafe impl Sync for Vma {}

impl Drop for Vma {
    fn drop(&mut self) {
        // SAFETY: this is the range that was mapped; the borrow checker saw every slice of it die.
        let unmapped = unsafe { munmap(self.outer.as_ptr(), self.outer_length) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn huge_pages_are_aligned_and_private_file_pages_hold_what_is_written() {
        let huge = Vma::huge(1).expect("mmap");
        assert_eq!(huge.address(0) % (HUGE * PAGE_SIZE) as u64, 0);
        assert_eq!(huge.pages(), HUGE);
        huge.page(HUGE - 1)[0].store(7, Relaxed);
        let file = Vma::private_file(2).expect("mmap");
        file.page(1)[3].store(9, Relaxed);
        assert_eq!((file.page(1)[3].load(Relaxed), file.page(0)[3].load(Relaxed)), (9, 0));
        assert!(file.advise(1..3, Advice::LinuxDontNeed).is_err());
        file.protect(false).expect("mprotect");
    }
}

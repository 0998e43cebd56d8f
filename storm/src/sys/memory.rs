//! Anonymous memory that devices, other processes and the kernel change behind our back.

#![expect(
    unsafe_code,
    reason = "owns memory mappings; what it hands out are atomics, which anyone may change"
)]

use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

use hmmstorm_abi::uapi::PAGE_SIZE;
use rustix::io;
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

/// Pages of a huge page of 2 MiB.
pub(crate) const BLOCK_PAGES: usize = 512;

/// An atomic integer that a [`Mapping`] consists of.
///
/// # Safety
/// All bit patterns, zeros included, are values of it; its size divides that of a page.
pub(crate) unsafe trait Cell {}
// SAFETY: an atomic integer of 4 bytes.
unsafe impl Cell for AtomicU32 {}
// SAFETY: an atomic integer of 8 bytes.
unsafe impl Cell for AtomicU64 {}

/// Whole pages of zero-filled anonymous memory, seen as atomics only, in a VMA of its own (an inaccessible guard page
/// stands on each side, so the kernel never merges it with a neighbour). Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Mapping<C: Cell = AtomicU64> {
    base: NonNull<C>,
    pages: usize,
    cells: PhantomData<C>,
}

// SAFETY: the memory belongs to the value and is reachable as atomics only.
unsafe impl<C: Cell> Send for Mapping<C> {}
// SAFETY: as above.
unsafe impl<C: Cell> Sync for Mapping<C> {}

/// Some pages of a [`Mapping`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageSpan<'a> {
    mapping: &'a Mapping,
    first: usize,
    pages: usize,
}

/// Addresses that were a mapping's and may by now be nobody's or another's: for calls that neither depend on what is there
/// nor change it. It borrows nothing, so the mapping can go while another thread makes the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    start: u64,
    pages: usize,
}

impl Addresses {
    /// `pages` pages from address `start` on.
    pub(crate) fn new(start: u64, pages: usize) -> Self {
        Self { start, pages }
    }
    /// The first address.
    pub(crate) fn start(self) -> u64 {
        self.start
    }
    /// Number of pages.
    pub(crate) fn pages(self) -> usize {
        self.pages
    }
}

impl From<PageSpan<'_>> for Addresses {
    fn from(span: PageSpan<'_>) -> Self {
        Self { start: span.address(), pages: span.pages() }
    }
}

impl PageSpan<'_> {
    /// User address of the first page.
    pub(crate) fn address(&self) -> u64 {
        self.mapping.address(self.first)
    }
    /// Number of pages, at least one.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }
    /// Index of the first page in the mapping.
    pub(crate) fn first(&self) -> usize {
        self.first
    }
}

impl<C: Cell> Mapping<C> {
    const CELLS_PER_PAGE: usize = PAGE_SIZE / size_of::<C>();

    /// `pages` private pages with transparent huge pages off over the whole VMA. Children get copies on write.
    ///
    /// # Errors
    /// Of `mmap`, `mprotect`, `madvise`.
    pub(crate) fn private(pages: usize) -> io::Result<Self> {
        let mapping = Self::new(pages, MapFlags::PRIVATE)?;
        // SAFETY: the advice covers our own pages and does not change their contents.
        match unsafe { mm::madvise(mapping.base.as_ptr().cast(), pages * PAGE_SIZE, Advice::LinuxNoHugepage) }
        {
            // EINVAL: a kernel without transparent huge pages.
            Ok(()) | Err(io::Errno::INVAL) => Ok(mapping),
            Err(e) => Err(e),
        }
    }

    /// `blocks` times 2 MiB of private pages, aligned to that, with transparent huge pages asked for (or, for comparison,
    /// forbidden).
    ///
    /// # Errors
    /// Of `mmap`, `munmap`, `mprotect`, `madvise`; `EINVAL` for a kernel without transparent huge pages.
    pub(crate) fn blocks(blocks: usize, huge: bool) -> io::Result<Self> {
        let advice = if huge { Advice::LinuxHugepage } else { Advice::LinuxNoHugepage };
        Self::aligned(blocks * BLOCK_PAGES, 0, advice)
    }

    /// A small page and 2 MiB, aligned to that, of private memory side by side: the page in front (`before`) or behind.
    /// Huge pages are asked for in all of it, since it is one VMA; there is room for one.
    ///
    /// # Errors
    /// As [`Mapping::blocks`].
    pub(crate) fn block_beside_page(before: bool) -> io::Result<Self> {
        Self::aligned(BLOCK_PAGES + 1, usize::from(before), Advice::LinuxHugepage)
    }

    /// `pages` private pages, the one with index `lead` aligned to 2 MiB.
    fn aligned(pages: usize, lead: usize, advice: Advice) -> io::Result<Self> {
        let (length, lead, block) = (pages * PAGE_SIZE, lead * PAGE_SIZE, BLOCK_PAGES * PAGE_SIZE);
        let all = length + block + 2 * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let outer =
            unsafe { mm::mmap_anonymous(std::ptr::null_mut(), all, ProtFlags::empty(), MapFlags::PRIVATE) }?;
        let first = outer.wrapping_byte_add(PAGE_SIZE + lead);
        let inner = first
            .wrapping_byte_add(first.addr().next_multiple_of(block) - first.addr())
            .wrapping_byte_sub(lead);
        // What stands before one guard page and behind the other is given back, as the others have it.
        let before = inner.addr() - PAGE_SIZE - outer.addr();
        let behind = all - before - length - 2 * PAGE_SIZE;
        for (start, size) in [(outer, before), (inner.wrapping_byte_add(length + PAGE_SIZE), behind)] {
            if size > 0 {
                // SAFETY: the range lies in the mapping made above, which nothing else knows yet.
                unsafe { mm::munmap(start, size) }?;
            }
        }
        let base = NonNull::new(inner.cast()).ok_or(io::Errno::FAULT)?;
        // From here on dropping it unmaps the rest.
        let mapping = Self { base, pages, cells: PhantomData };
        // SAFETY: as above.
        unsafe { mm::mprotect(inner, length, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        mapping.advise(0..pages, advice)?;
        Ok(mapping)
    }

    /// `pages` pages that children share.
    ///
    /// # Errors
    /// Of `mmap`, `mprotect`.
    pub(crate) fn shared(pages: usize) -> io::Result<Self> {
        Self::new(pages, MapFlags::SHARED)
    }

    fn new(pages: usize, sharing: MapFlags) -> io::Result<Self> {
        let length = pages * PAGE_SIZE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let outer = unsafe {
            mm::mmap_anonymous(std::ptr::null_mut(), length + 2 * PAGE_SIZE, ProtFlags::empty(), sharing)
        }?;
        let inner = outer.wrapping_byte_add(PAGE_SIZE);
        // SAFETY: the range lies in the mapping made above, which nothing else knows yet.
        if let Err(e) = unsafe { mm::mprotect(inner, length, MprotectFlags::READ | MprotectFlags::WRITE) } {
            // SAFETY: as above.
            let _unmapped = unsafe { mm::munmap(outer, length + 2 * PAGE_SIZE) };
            return Err(e);
        }
        let base = NonNull::new(inner.cast()).ok_or(io::Errno::FAULT)?;
        Ok(Self { base, pages, cells: PhantomData })
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// User address of page `page`.
    pub(crate) fn address(&self, page: usize) -> u64 {
        self.base.as_ptr().addr() as u64 + (page * PAGE_SIZE) as u64
    }

    /// All of it.
    pub(crate) fn cells(&self) -> &[C] {
        // SAFETY: the mapping holds this many cells, zeroed at first, for as long as `self` lives; cells are atomics, so
        // changes by others are allowed.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.pages * Self::CELLS_PER_PAGE) }
    }

    /// The cells of page `page`.
    ///
    /// # Panics
    /// If there is no such page.
    pub(crate) fn page(&self, page: usize) -> &[C] {
        &self.cells()[page * Self::CELLS_PER_PAGE..(page + 1) * Self::CELLS_PER_PAGE]
    }

    fn advise(&self, pages: Range<usize>, advice: Advice) -> io::Result<()> {
        if pages.start >= pages.end || pages.end > self.pages {
            return Err(io::Errno::INVAL);
        }
        let start = self.page(pages.start).as_ptr().cast_mut().cast();
        // SAFETY: the range is ours; the advices used here at most set atomics to zero.
        unsafe { mm::madvise(start, pages.len() * PAGE_SIZE, advice) }
    }

    /// Gives the pages back: the next touch finds a fresh zeroed folio (`MADV_DONTNEED`).
    ///
    /// # Errors
    /// Of `madvise`; `EINVAL` for an empty range or one outside.
    pub(crate) fn discard(&self, pages: Range<usize>) -> io::Result<()> {
        self.advise(pages, Advice::LinuxDontNeed)
    }

    /// Takes the right to write to `pages` away, from everyone. The CPU must not store there any more.
    ///
    /// # Errors
    /// Of `mprotect`; `EINVAL` for an empty range or one outside.
    pub(crate) fn write_protect(&self, pages: Range<usize>) -> io::Result<()> {
        if pages.start >= pages.end || pages.end > self.pages {
            return Err(io::Errno::INVAL);
        }
        let start = self.page(pages.start).as_ptr().cast_mut().cast();
        // SAFETY: the range is ours; loads go on to work, and stores are stopped by the CPU.
        unsafe { mm::mprotect(start, pages.len() * PAGE_SIZE, MprotectFlags::READ) }
    }

    /// Offers all pages to KSM (`MADV_MERGEABLE`), which may replace those that are alike by one that is written never.
    ///
    /// # Errors
    /// Of `madvise`; `EINVAL` for a kernel without KSM.
    pub(crate) fn mergeable(&self) -> io::Result<()> {
        self.advise(0..self.pages, Advice::LinuxMergeable)
    }

    /// Lets the kernel take the pages at its leisure (`MADV_FREE`): each holds what it did, or zeros, until it is written.
    ///
    /// # Errors
    /// As [`Mapping::discard`].
    pub(crate) fn let_go(&self, pages: Range<usize>) -> io::Result<()> {
        self.advise(pages, Advice::LinuxFree)
    }

    /// Moves all pages to other addresses (`mremap`), in a VMA of their own as before.
    ///
    /// # Errors
    /// Of `mmap`, `mremap`; the pages are lost then.
    pub(crate) fn relocate(self) -> io::Result<Self> {
        let length = self.pages * PAGE_SIZE;
        let mut to = Self::new(self.pages, MapFlags::PRIVATE)?;
        // SAFETY: source and target are mappings of ours of this length; nobody has a borrow of either, since both are
        // owned here. The source stays mapped, without pages, so its place cannot become another mapping before `self` is
        // dropped.
        let moved = unsafe {
            mm::mremap_fixed(
                self.base.as_ptr().cast(),
                length,
                length,
                MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP,
                to.base.as_ptr().cast(),
            )
        }?;
        to.base = NonNull::new(moved.cast()).ok_or(io::Errno::FAULT)?;
        Ok(to)
    }

    /// Forbids (`writable` false) or allows writing to these pages (`mprotect`). Who writes what is forbidden is killed.
    ///
    /// # Errors
    /// Of `mprotect`; `EINVAL` for an empty range or one outside.
    pub(crate) fn protect(&self, pages: Range<usize>, writable: bool) -> io::Result<()> {
        if pages.start >= pages.end || pages.end > self.pages {
            return Err(io::Errno::INVAL);
        }
        let flags = if writable { MprotectFlags::READ | MprotectFlags::WRITE } else { MprotectFlags::READ };
        let start = self.page(pages.start).as_ptr().cast_mut().cast();
        // SAFETY: the range is ours, and stays readable.
        unsafe { mm::mprotect(start, pages.len() * PAGE_SIZE, flags) }
    }

    /// Empties the LRU batches of the CPU that this runs on: `MADV_COLD` begins with `lru_add_drain()`
    /// (mm/madvise.c, `madvise_cold()`). To be called on a mapping whose pages were never touched, where it does no more.
    ///
    /// # Errors
    /// Of `madvise`.
    pub(crate) fn drain_local_lru(&self) -> io::Result<()> {
        self.advise(0..self.pages, Advice::LinuxCold)
    }
}

impl Mapping {
    /// Whether the kernel can read a page on our behalf: where it cannot, touching it would be the end.
    ///
    /// # Errors
    /// Of the system calls, but for the one that says no.
    pub(crate) fn is_readable(&self, page: usize) -> io::Result<bool> {
        let (_reader, writer) = rustix::pipe::pipe()?;
        let start: *const AtomicU64 = self.page(page).as_ptr();
        // SAFETY: the kernel reads one word of a page of the mapping, which consists of atomics.
        let written = unsafe { libc::write(writer.as_raw_fd(), start.cast(), size_of::<u64>()) };
        match written {
            0.. => Ok(true),
            _ => match io::Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(io::Errno::FAULT) => Ok(false),
                other => Err(other.unwrap_or(io::Errno::IO)),
            },
        }
    }

    /// The pages `pages`; `None` if they are not all in the mapping, or none.
    pub(crate) fn span(&self, pages: Range<usize>) -> Option<PageSpan<'_>> {
        (pages.start < pages.end && pages.end <= self.pages).then(|| PageSpan {
            mapping: self,
            first: pages.start,
            pages: pages.len(),
        })
    }
}

impl<C: Cell> Drop for Mapping<C> {
    fn drop(&mut self) {
        let outer = self.base.as_ptr().wrapping_byte_sub(PAGE_SIZE);
        // SAFETY: this is the range that `new` mapped; the borrow checker saw every slice of it die.
        let unmapped = unsafe { mm::munmap(outer.cast(), (self.pages + 2) * PAGE_SIZE) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn discarded_pages_are_zero_and_others_keep_their_contents() {
        let mapping: Mapping = Mapping::private(3).expect("mmap");
        for page in 0..3 {
            mapping.page(page)[7].store(page as u64 + 1, Relaxed);
        }
        mapping.discard(1..2).expect("madvise");
        assert_eq!(mapping.page(0)[7].load(Relaxed), 1);
        assert_eq!(mapping.page(1)[7].load(Relaxed), 0);
        assert_eq!(mapping.page(2)[7].load(Relaxed), 3);
        assert!(mapping.discard(2..4).is_err());
        assert!(mapping.span(2..2).is_none());
        assert!(mapping.span(2..4).is_none());
        assert_eq!(mapping.span(1..3).map(|s| s.address()), Some(mapping.address(1)));
    }

    #[test]
    fn blocks_are_aligned_and_one_vma() {
        let Ok(mapping) = Mapping::<AtomicU64>::blocks(2, true) else {
            println!("skipped: no transparent huge pages here");
            return;
        };
        assert_eq!(mapping.address(0) % (BLOCK_PAGES * PAGE_SIZE) as u64, 0);
        mapping.page(2 * BLOCK_PAGES - 1)[0].store(1, Relaxed);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let vma = format!("{:x}-{:x} rw-p", mapping.address(0), mapping.address(2 * BLOCK_PAGES));
        assert!(maps.contains(&vma), "no VMA {vma} in:\n{maps}");
    }

    #[test]
    fn a_block_beside_a_page_is_one_vma_with_an_aligned_block() {
        for before in [true, false] {
            let Ok(mapping) = Mapping::<AtomicU64>::block_beside_page(before) else {
                println!("skipped: no transparent huge pages here");
                return;
            };
            let block = mapping.address(usize::from(before));
            assert_eq!(block % (BLOCK_PAGES * PAGE_SIZE) as u64, 0);
            mapping.page(BLOCK_PAGES)[0].store(1, Relaxed);
            mapping.page(0)[0].store(1, Relaxed);
            let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
            let vma = format!("{:x}-{:x} rw-p", mapping.address(0), mapping.address(BLOCK_PAGES + 1));
            assert!(maps.contains(&vma), "no VMA {vma} in:\n{maps}");
        }
    }

    #[test]
    fn relocated_pages_keep_their_contents_at_other_addresses() {
        let mapping: Mapping = Mapping::private(2).expect("mmap");
        mapping.page(1)[3].store(7, Relaxed);
        let old = mapping.address(0);
        let moved = mapping.relocate().expect("mremap");
        assert_ne!(moved.address(0), old);
        assert_eq!((moved.pages(), moved.page(1)[3].load(Relaxed)), (2, 7));
        moved.protect(0..2, false).expect("mprotect");
        moved.protect(0..2, true).expect("mprotect");
        moved.page(0)[0].store(1, Relaxed);
    }

    #[test]
    fn a_private_mapping_is_one_vma_between_guards() {
        let mapping: Mapping = Mapping::private(5).expect("mmap");
        let other: Mapping = Mapping::private(5).expect("mmap");
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        for m in [&mapping, &other] {
            let vma = format!("{:x}-{:x} rw-p", m.address(0), m.address(5));
            assert!(maps.contains(&vma), "no VMA {vma} in:\n{maps}");
        }
    }
}

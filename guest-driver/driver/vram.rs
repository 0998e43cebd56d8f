// SPDX-License-Identifier: GPL-2.0

//! Allocator of a part of VRAM by page index (offset in the part divided by the page size).
//!
//! VRAM is cut into chunks of 512 pages, the size of a huge device folio. Each chunk has a bitmap and a count of its
//! free pages, and stands on one of two lists: *whole* (all free) or *partial* (some free); full chunks are on none.
//! Order 0 is taken from a partial chunk if there is one, so that whole chunks last; order 9 is a whole chunk. Chunks of
//! which something is in use also stand in the order of their last use, for eviction. All operations take constant time
//! under one spinlock: `free` is called with a page-table lock held.

use kernel::{
    alloc::flags::GFP_KERNEL,
    new_spinlock,
    prelude::*,
    sync::SpinLock, //
};

use crate::{
    abi::uapi::PAGE_SIZE,
    lru::Lru, //
};

/// Order of a chunk, and the only order besides 0 that can be allocated.
pub(crate) const CHUNK_ORDER: u32 = 9;
/// Pages of a chunk.
pub(crate) const CHUNK_PAGES: usize = 1 << CHUNK_ORDER;

/// Pages in a word of the bitmap.
const WORD_PAGES: usize = 64;
/// Words of the bitmap of a chunk.
const WORDS: usize = CHUNK_PAGES / WORD_PAGES;
/// "No chunk" in a list.
const NONE: u32 = u32::MAX;

/// A chunk of 512 pages.
struct Chunk {
    /// A set bit is a free page.
    free: [u64; WORDS],
    /// Number of set bits.
    free_pages: usize,
    /// Neighbours on the list that the chunk is on.
    next: u32,
    prev: u32,
}

/// A doubly linked list of chunks, by index.
#[derive(Clone, Copy)]
struct List {
    first: u32,
}

/// What the lock protects.
struct Chunks {
    chunks: KVVec<Chunk>,
    whole: List,
    partial: List,
    used: Lru,
    free_pages: usize,
}

/// The allocator of a part of one GPU's VRAM.
#[pin_data]
pub(crate) struct Vram {
    /// Pages of the VRAM before the part.
    first: usize,
    nr_pages: usize,
    #[pin]
    chunks: SpinLock<Chunks>,
}

impl Vram {
    /// For the `nr_pages` pages of VRAM from page `first` on, both multiples of [`CHUNK_PAGES`]. All are free.
    ///
    /// # Errors
    ///
    /// `EINVAL` for other numbers; `ENOMEM`.
    pub(crate) fn new(first: usize, nr_pages: usize) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            first,
            nr_pages,
            chunks <- new_spinlock!(Chunks::new(*nr_pages)?, "hsgpu::vram"),
        })
    }

    /// Size in pages.
    pub(crate) fn pages(&self) -> usize {
        self.nr_pages
    }

    /// Where page `index` is in the VRAM, in bytes.
    pub(crate) fn offset(&self, index: usize) -> u64 {
        // CAST: `usize` has 64 bits.
        ((self.first + index) * PAGE_SIZE) as u64
    }

    /// Whether page `index` is the first one of a chunk.
    pub(crate) fn begins_chunk(&self, index: usize) -> bool {
        index % CHUNK_PAGES == 0
    }

    /// Pages that are free now.
    pub(crate) fn free_pages(&self) -> usize {
        self.chunks.lock().free_pages
    }

    /// Takes a page and returns its index, or `None` if VRAM is full.
    pub(crate) fn alloc(&self) -> Option<usize> {
        self.chunks.lock().alloc_page()
    }

    /// Takes 2^`order` naturally aligned pages and returns the index of the first, or `None` if there are none (or
    /// `order` is neither 0 nor [`CHUNK_ORDER`]).
    pub(crate) fn alloc_order(&self, order: u32) -> Option<usize> {
        match order {
            0 => self.alloc(),
            CHUNK_ORDER => self.chunks.lock().alloc_chunk(),
            _ => None,
        }
    }

    /// The page `index` is used now.
    pub(crate) fn touch(&self, index: usize) {
        self.chunks.lock().touch(index);
    }

    /// The first page of the chunk that was used longest ago, which then counts as used now: whoever comes next gets
    /// another one. [`None`] if nothing is in use.
    pub(crate) fn take_oldest(&self) -> Option<usize> {
        self.chunks.lock().take_oldest()
    }

    /// Gives the 2^`order` pages at `index` back. Does not sleep. What is free already is reported and left alone.
    pub(crate) fn free(&self, index: usize, order: u32) {
        let freed = match order {
            0 => self.chunks.lock().free_page(index),
            CHUNK_ORDER => self.chunks.lock().free_chunk(index),
            _ => Err(EINVAL),
        };

        if freed.is_err() {
            pr_warn!(
                "VRAM page {} of order {} freed though not allocated; it stays as it is\n",
                index,
                order
            );
        }
    }
}

impl Chunks {
    fn new(nr_pages: usize) -> Result<Self> {
        let nr_chunks = nr_pages / CHUNK_PAGES;

        if nr_pages % CHUNK_PAGES != 0 {
            return Err(EINVAL);
        }

        let mut this = Self {
            chunks: KVVec::with_capacity(nr_chunks, GFP_KERNEL)?,
            whole: List { first: NONE },
            partial: List { first: NONE },
            used: Lru::new(nr_chunks)?,
            free_pages: nr_pages,
        };
        for _ in 0..nr_chunks {
            this.chunks.push(
                Chunk {
                    free: [u64::MAX; WORDS],
                    free_pages: CHUNK_PAGES,
                    next: NONE,
                    prev: NONE,
                },
                GFP_KERNEL,
            )?;
        }
        // The lowest chunk ends up first.
        for index in (0..u32::try_from(nr_chunks)?).rev() {
            this.push(true, index);
        }
        Ok(this)
    }

    fn list(&mut self, whole: bool) -> &mut List {
        if whole {
            &mut self.whole
        } else {
            &mut self.partial
        }
    }

    fn chunk(&mut self, index: u32) -> Option<&mut Chunk> {
        self.chunks.get_mut(usize::try_from(index).ok()?)
    }

    fn push(&mut self, whole: bool, index: u32) {
        let next = self.list(whole).first;

        if let Some(chunk) = self.chunk(next) {
            chunk.prev = index;
        }
        if let Some(chunk) = self.chunk(index) {
            chunk.next = next;
            chunk.prev = NONE;
        }
        self.list(whole).first = index;
    }

    fn unlink(&mut self, whole: bool, index: u32) {
        let Some(chunk) = self.chunk(index) else {
            return;
        };
        let (next, prev) = (chunk.next, chunk.prev);

        if let Some(chunk) = self.chunk(next) {
            chunk.prev = prev;
        }
        match self.chunk(prev) {
            Some(chunk) => chunk.next = next,
            None => self.list(whole).first = next,
        }
    }

    fn alloc_page(&mut self) -> Option<usize> {
        let whole = self.partial.first == NONE;
        let index = self.list(whole).first;
        let chunk = self.chunk(index)?;
        let (word, bits) = chunk.free.iter_mut().enumerate().find(|(_, b)| **b != 0)?;
        // CAST: at most 63.
        let bit = bits.trailing_zeros() as usize;

        *bits &= *bits - 1;
        chunk.free_pages -= 1;
        let left = chunk.free_pages;
        self.free_pages -= 1;
        self.used.touch(index);
        // A chunk of more than one page goes from whole to partial, and from partial to no list.
        if whole {
            self.unlink(true, index);
            self.push(false, index);
        } else if left == 0 {
            self.unlink(false, index);
        }
        Some(usize::try_from(index).ok()? * CHUNK_PAGES + word * WORD_PAGES + bit)
    }

    fn alloc_chunk(&mut self) -> Option<usize> {
        let index = self.whole.first;
        let chunk = self.chunk(index)?;

        chunk.free = [0; WORDS];
        chunk.free_pages = 0;
        self.free_pages -= CHUNK_PAGES;
        self.used.touch(index);
        self.unlink(true, index);
        Some(usize::try_from(index).ok()? * CHUNK_PAGES)
    }

    fn free_page(&mut self, page: usize) -> Result {
        let index = u32::try_from(page / CHUNK_PAGES)?;
        let chunk = self.chunk(index).ok_or(EINVAL)?;
        let bit = 1 << (page % WORD_PAGES);
        // PANIC: `page % CHUNK_PAGES / WORD_PAGES` is less than `WORDS`.
        let word = &mut chunk.free[page % CHUNK_PAGES / WORD_PAGES];

        if *word & bit != 0 {
            return Err(EINVAL);
        }
        *word |= bit;
        chunk.free_pages += 1;
        let free_pages = chunk.free_pages;
        self.free_pages += 1;
        match free_pages {
            1 => self.push(false, index),
            CHUNK_PAGES => {
                self.used.remove(index);
                self.unlink(false, index);
                self.push(true, index);
            }
            _ => (),
        }
        Ok(())
    }

    fn free_chunk(&mut self, page: usize) -> Result {
        let index = u32::try_from(page / CHUNK_PAGES)?;
        let chunk = self.chunk(index).ok_or(EINVAL)?;

        if page % CHUNK_PAGES != 0 || chunk.free_pages != 0 {
            return Err(EINVAL);
        }
        chunk.free = [u64::MAX; WORDS];
        chunk.free_pages = CHUNK_PAGES;
        self.free_pages += CHUNK_PAGES;
        self.used.remove(index);
        self.push(true, index);
        Ok(())
    }

    fn touch(&mut self, page: usize) {
        // A page that is free by now is not used, whatever its user thinks.
        if let Ok(index) = u32::try_from(page / CHUNK_PAGES) {
            if self
                .chunk(index)
                .is_some_and(|chunk| chunk.free_pages < CHUNK_PAGES)
            {
                self.used.touch(index);
            }
        }
    }

    fn take_oldest(&mut self) -> Option<usize> {
        let index = self.used.oldest()?;

        self.used.touch(index);
        Some(usize::try_from(index).ok()? * CHUNK_PAGES)
    }
}

#[kunit_tests(hsgpu_vram)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_each_page_once_and_takes_all_back() -> Result {
        let pages = 3 * CHUNK_PAGES;
        let mut chunks = Chunks::new(pages)?;
        let mut seen = KVVec::new();

        for _ in 0..pages {
            seen.push(chunks.alloc_page().ok_or(ENOMEM)?, GFP_KERNEL)?;
        }
        assert_eq!(chunks.alloc_page(), None);
        assert_eq!(chunks.free_pages, 0);
        for page in 0..pages {
            assert_eq!(seen.iter().filter(|p| **p == page).count(), 1);
        }
        for page in seen.iter() {
            chunks.free_page(*page)?;
        }
        assert_eq!(chunks.free_pages, pages);
        for _ in 0..3 {
            assert!(chunks.alloc_chunk().is_some());
        }
        assert_eq!(chunks.alloc_chunk(), None);
        Ok(())
    }

    #[test]
    fn pages_spare_whole_chunks() -> Result {
        let mut chunks = Chunks::new(2 * CHUNK_PAGES)?;
        let first = chunks.alloc_page().ok_or(ENOMEM)?;
        let chunk = chunks.alloc_chunk().ok_or(ENOMEM)?;

        assert_eq!(chunks.alloc_chunk(), None);
        for _ in 1..CHUNK_PAGES {
            assert!(chunks.alloc_page().is_some());
        }
        assert_eq!(chunks.alloc_page(), None);
        chunks.free_page(first)?;
        assert_eq!(chunks.alloc_page(), Some(first));
        chunks.free_chunk(chunk)?;
        assert_eq!(chunks.alloc_chunk(), Some(chunk));
        Ok(())
    }

    #[test]
    fn refuses_what_was_not_allocated() -> Result {
        let mut chunks = Chunks::new(CHUNK_PAGES)?;

        assert!(Chunks::new(CHUNK_PAGES + 1).is_err());
        assert_eq!(Chunks::new(0)?.alloc_page(), None);
        assert!(chunks.free_page(0).is_err());
        assert!(chunks.free_page(CHUNK_PAGES).is_err());
        assert!(chunks.free_chunk(0).is_err());
        let page = chunks.alloc_page().ok_or(ENOMEM)?;
        chunks.free_page(page)?;
        assert!(chunks.free_page(page).is_err());
        assert_eq!(chunks.free_pages, CHUNK_PAGES);
        Ok(())
    }

    #[test]
    fn the_chunk_used_longest_ago_comes_first_and_free_ones_never() -> Result {
        let mut chunks = Chunks::new(3 * CHUNK_PAGES)?;

        assert_eq!(chunks.take_oldest(), None);
        let first = chunks.alloc_chunk().ok_or(ENOMEM)?;
        let second = chunks.alloc_chunk().ok_or(ENOMEM)?;
        let third = chunks.alloc_page().ok_or(ENOMEM)?;
        chunks.touch(first);
        assert_eq!(chunks.take_oldest(), Some(second));
        assert_eq!(
            chunks.take_oldest(),
            Some(third / CHUNK_PAGES * CHUNK_PAGES)
        );
        assert_eq!(chunks.take_oldest(), Some(first));
        chunks.free_page(third)?;
        chunks.free_chunk(second)?;
        chunks.touch(second);
        assert_eq!(chunks.take_oldest(), Some(first));
        assert_eq!(chunks.take_oldest(), Some(first));
        Ok(())
    }

    #[test]
    fn a_huge_page_may_be_given_back_by_page() -> Result {
        let mut chunks = Chunks::new(CHUNK_PAGES)?;
        let chunk = chunks.alloc_chunk().ok_or(ENOMEM)?;

        for page in chunk..chunk + CHUNK_PAGES {
            chunks.free_page(page)?;
        }
        assert_eq!(chunks.alloc_chunk(), Some(chunk));
        Ok(())
    }
}

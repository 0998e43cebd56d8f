// SPDX-License-Identifier: GPL-2.0

//! What a device may do with the pages of a process without asking: the part of a device's page table that the commands
//! of `lib/test_hmm` let user space see.
//!
//! A page is entered when the device has accessed it, and leaves when the kernel changes the CPU's page table. The view
//! says which pages the device has and with which rights, not where they are; its owner holds the lock of the notifier.

use kernel::{
    alloc::flags::GFP_NOWAIT,
    prelude::*,
    rbtree::RBTree, //
};

use core::ops::Range;

use crate::abi::uapi::PAGE_SIZE;

/// Pages of a block.
const BLOCK_PAGES: usize = 512;
/// Pages in a word.
const WORD_PAGES: usize = 64;

/// The rights of the device to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// It may read.
    Read,
    /// It may read and write.
    Write,
    /// It has the page to itself, and may do what it wants.
    Exclusive,
}

/// Three bits a page of 512 neighbours.
#[derive(Clone, Copy, Default)]
struct Block {
    read: Bits,
    write: Bits,
    exclusive: Bits,
}

type Bits = [u64; BLOCK_PAGES / WORD_PAGES];

impl Block {
    fn get(&self, page: usize) -> Option<Right> {
        if bit(&self.exclusive, page) {
            Some(Right::Exclusive)
        } else if bit(&self.write, page) {
            Some(Right::Write)
        } else if bit(&self.read, page) {
            Some(Right::Read)
        } else {
            None
        }
    }

    fn set(&mut self, page: usize, right: Option<Right>) {
        set_bit(&mut self.read, page, right.is_some());
        set_bit(&mut self.write, page, right == Some(Right::Write));
        set_bit(&mut self.exclusive, page, right == Some(Right::Exclusive));
    }

    fn is_empty(&self) -> bool {
        self.read.iter().all(|word| *word == 0)
    }
}

fn bit(bits: &Bits, page: usize) -> bool {
    bits.get(page / WORD_PAGES)
        .is_some_and(|word| word & 1 << (page % WORD_PAGES) != 0)
}

fn set_bit(bits: &mut Bits, page: usize, value: bool) {
    if let Some(word) = bits.get_mut(page / WORD_PAGES) {
        let mask = 1 << (page % WORD_PAGES);

        *word = if value { *word | mask } else { *word & !mask };
    }
}

/// The view of one device of one address space.
pub(crate) struct View {
    /// By number of the page divided by [`BLOCK_PAGES`]; none is empty.
    blocks: RBTree<usize, Block>,
}

impl View {
    /// A view in which there is nothing.
    pub(crate) fn new() -> Self {
        Self {
            blocks: RBTree::new(),
        }
    }

    /// The right to the page at `addr`.
    pub(crate) fn get(&self, addr: usize) -> Option<Right> {
        let page = addr / PAGE_SIZE;

        self.blocks
            .get(&(page / BLOCK_PAGES))?
            .get(page % BLOCK_PAGES)
    }

    /// Enters the page at `addr`. Does not sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; the page has no entry then.
    pub(crate) fn set(&mut self, addr: usize, right: Right) -> Result {
        let page = addr / PAGE_SIZE;
        let key = page / BLOCK_PAGES;

        if self.blocks.get(&key).is_none() {
            self.blocks
                .try_create_and_insert(key, Block::default(), GFP_NOWAIT)?;
        }
        if let Some(block) = self.blocks.get_mut(&key) {
            block.set(page % BLOCK_PAGES, Some(right));
        }
        Ok(())
    }

    /// Removes all pages of `range` (addresses). Takes time for what is there, not for what could be.
    pub(crate) fn clear(&mut self, range: Range<usize>) {
        let pages = range.start / PAGE_SIZE..range.end.div_ceil(PAGE_SIZE);
        let mut next = pages.start / BLOCK_PAGES;

        while let Some(mut cursor) = self.blocks.cursor_lower_bound_mut(&next) {
            let (key, block) = cursor.current_mut();
            let first = *key * BLOCK_PAGES;

            if first >= pages.end {
                break;
            }
            next = *key + 1;
            for page in 0..BLOCK_PAGES {
                if pages.contains(&(first + page)) {
                    block.set(page, None);
                }
            }
            if block.is_empty() {
                cursor.remove_current();
            }
        }
    }

    /// Whether the device may read, or if `write` write, all pages of `range` (addresses).
    pub(crate) fn covers(&self, range: Range<usize>, write: bool) -> bool {
        range
            .step_by(PAGE_SIZE)
            .all(|addr| match (self.get(addr), write) {
                (None, _) => false,
                (Some(right), true) => right == Right::Write,
                (Some(_), false) => true,
            })
    }

    /// Whether the device has a page of `range` (addresses) to itself.
    pub(crate) fn has_exclusive(&self, range: Range<usize>) -> bool {
        range
            .step_by(PAGE_SIZE)
            .any(|addr| self.get(addr) == Some(Right::Exclusive))
    }
}

#[kunit_tests(hsgpu_view)]
mod tests {
    use super::*;
    use kernel::alloc::flags::GFP_KERNEL;

    const PAGES: usize = 3 * BLOCK_PAGES;

    fn addr(page: usize) -> usize {
        (page + 7 * BLOCK_PAGES) * PAGE_SIZE
    }

    /// Compares with a plain array after each of many steps, whose order a simple generator chooses.
    #[test]
    fn it_is_what_an_array_would_be() -> Result {
        let mut view = View::new();
        let mut model = KVVec::from_elem(None::<Right>, PAGES, GFP_KERNEL)?;
        let mut seed = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            // CAST: the remainder is less than `below`.
            (seed % below as u64) as usize
        };

        for _ in 0..200 {
            let first = next(PAGES);
            let last = core::cmp::min(PAGES, first + 1 + next(BLOCK_PAGES));
            let right = match next(5) {
                0 => Some(Right::Read),
                1 => Some(Right::Write),
                2 => Some(Right::Exclusive),
                _ => None,
            };

            match right {
                Some(right) => {
                    for page in first..last {
                        view.set(addr(page), right)?;
                    }
                }
                None => view.clear(addr(first)..addr(last)),
            }
            for slot in model.get_mut(first..last).ok_or(EINVAL)? {
                *slot = right;
            }
            assert!(model
                .iter()
                .enumerate()
                .all(|(page, right)| view.get(addr(page)) == *right));
        }
        view.clear(0..usize::MAX);
        assert!(view.blocks.is_empty());
        Ok(())
    }

    #[test]
    fn rights_are_told_apart() -> Result {
        let mut view = View::new();

        view.set(addr(0), Right::Read)?;
        view.set(addr(1), Right::Write)?;
        view.set(addr(2), Right::Exclusive)?;
        assert!(view.covers(addr(0)..addr(3), false));
        assert!(!view.covers(addr(0)..addr(4), false));
        assert!(view.covers(addr(1)..addr(2), true));
        assert!(!view.covers(addr(0)..addr(2), true));
        // A write that is none of the atomic kind ends exclusive access.
        assert!(!view.covers(addr(2)..addr(3), true));
        assert!(!view.has_exclusive(addr(0)..addr(2)));
        assert!(view.has_exclusive(addr(0)..addr(3)));
        view.set(addr(2), Right::Write)?;
        assert!(!view.has_exclusive(addr(0)..addr(3)));
        Ok(())
    }
}

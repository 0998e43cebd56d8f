// SPDX-License-Identifier: GPL-2.0

//! Which chunk of VRAM was used longest ago: a doubly linked list by index, in which every step takes constant time.

use kernel::{
    alloc::flags::GFP_KERNEL,
    prelude::*, //
};

/// "No chunk".
const NONE: u32 = u32::MAX;

/// A chunk's neighbours.
#[derive(Clone, Copy)]
struct Link {
    older: u32,
    newer: u32,
    listed: bool,
}

/// Chunks that are in use, from the one used longest ago to the one used last.
pub(crate) struct Lru {
    links: KVVec<Link>,
    oldest: u32,
    newest: u32,
}

impl Lru {
    /// For `len` chunks, none of them in use.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(len: usize) -> Result<Self> {
        let unlisted = Link {
            older: NONE,
            newer: NONE,
            listed: false,
        };

        Ok(Self {
            links: KVVec::from_elem(unlisted, len, GFP_KERNEL)?,
            oldest: NONE,
            newest: NONE,
        })
    }

    fn link(&mut self, index: u32) -> Option<&mut Link> {
        self.links.get_mut(usize::try_from(index).ok()?)
    }

    /// The chunk is used now. One that does not exist is none.
    pub(crate) fn touch(&mut self, index: u32) {
        if self.newest == index {
            return;
        }
        self.remove(index);

        let older = self.newest;
        let Some(link) = self.link(index) else {
            return;
        };
        *link = Link {
            older,
            newer: NONE,
            listed: true,
        };
        match self.link(older) {
            Some(link) => link.newer = index,
            None => self.oldest = index,
        }
        self.newest = index;
    }

    /// The chunk is not in use any more.
    pub(crate) fn remove(&mut self, index: u32) {
        let Some(link) = self.link(index).filter(|link| link.listed) else {
            return;
        };
        let Link { older, newer, .. } = *link;

        link.listed = false;
        match self.link(older) {
            Some(link) => link.newer = newer,
            None => self.oldest = newer,
        }
        match self.link(newer) {
            Some(link) => link.older = older,
            None => self.newest = older,
        }
    }

    /// The chunk that was used longest ago.
    pub(crate) fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }
}

#[kunit_tests(hsgpu_lru)]
mod tests {
    use super::*;

    /// The order from the oldest on, which must be the same read backwards.
    fn order(lru: &Lru) -> Result<KVVec<u32>> {
        let mut forward = KVVec::new();
        let mut index = lru.oldest;
        while let Some(link) = lru.links.get(usize::try_from(index)?) {
            forward.push(index, GFP_KERNEL)?;
            index = link.newer;
        }

        let mut at = forward.len();
        let mut index = lru.newest;
        while let Some(link) = lru.links.get(usize::try_from(index)?) {
            at -= 1;
            assert_eq!(forward.get(at), Some(&index));
            index = link.older;
        }
        assert_eq!(at, 0);
        Ok(forward)
    }

    #[test]
    fn order_is_that_of_the_last_use() -> Result {
        let mut lru = Lru::new(4)?;

        assert_eq!(lru.oldest(), None);
        for index in [2, 0, 3, 0, 2, 2] {
            lru.touch(index);
        }
        assert_eq!(order(&lru)?.as_slice(), [3, 0, 2]);
        assert_eq!(lru.oldest(), Some(3));
        Ok(())
    }

    #[test]
    fn removal_works_at_both_ends_and_between() -> Result {
        let mut lru = Lru::new(5)?;

        for index in 0..5 {
            lru.touch(index);
        }
        for (index, left) in [
            (2, [0, 1, 3, 4].as_slice()),
            (0, [1, 3, 4].as_slice()),
            (4, [1, 3].as_slice()),
            (4, [1, 3].as_slice()),
            (1, [3].as_slice()),
            (3, [].as_slice()),
        ] {
            lru.remove(index);
            assert_eq!(order(&lru)?.as_slice(), left);
        }
        lru.touch(1);
        assert_eq!(order(&lru)?.as_slice(), [1]);
        Ok(())
    }

    #[test]
    fn what_does_not_exist_is_left_alone() -> Result {
        let mut lru = Lru::new(2)?;

        lru.touch(2);
        lru.touch(NONE);
        lru.remove(7);
        assert_eq!(order(&lru)?.as_slice(), []);
        Ok(())
    }
}

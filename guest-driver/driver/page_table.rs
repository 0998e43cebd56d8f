// SPDX-License-Identifier: GPL-2.0

//! The GPU's page tables: four levels of 4 KiB tables, with leaves of 4 KiB and of 2 MiB.
//!
//! Entries are read by the GPU while they are written here. So an entry is written once its table or its page is ready,
//! and taking one away has two steps, between which the owner of the table makes the GPU forget it:
//!
//! 1. [`PageTable::clear`] takes the valid bit of every leaf in a range, and of tables in which no valid entry is left.
//!    Neither allocates, frees or waits.
//! 2. The owner invalidates the TLB for the range that `clear` returned, and waits for the fence.
//! 3. [`PageTable::reap`] reports the leaves that were taken (their pages can be unmapped from DMA now) and frees the
//!    tables.
//!
//! Tables are allocated before, outside of the owner's lock: see [`Stash`]. An entry of zero is empty; one that is not
//! valid and not zero waits to be reaped.
//!
//! # Where the tables are
//!
//! In guest memory. Tables in VRAM would spare the GPU the way over PCIe at a TLB miss; but their entries are cleared from
//! MMU notifiers, i.e. from reclaim, where a store to memory is the most that one wants to do: VRAM could only be written
//! through an aperture that may be smaller than it, or by a copy job for each entry. They would also pin VRAM that
//! migration wants to empty.

use core::ops::Range;

use kernel::{
    prelude::*,
    sync::barrier::dma_wmb, //
};

use crate::abi::{
    mmu::{
        table_index,
        Pte,
        LEVELS,
        PAGE_SHIFT,
        TABLE_ENTRIES,
        VA_BITS, //
    },
    ring::Location, //
};

/// Level of 4 KiB leaves.
pub(crate) const SMALL: u32 = 0;
/// Level of 2 MiB leaves.
pub(crate) const HUGE: u32 = 1;

/// The first address that has no translation.
pub(crate) const VA_END: u64 = 1 << VA_BITS;

/// Memory of one table, zeroed when it is new.
pub(crate) trait Memory {
    /// Reads entry `index`, less than [`TABLE_ENTRIES`].
    fn read(&self, index: usize) -> Pte;

    /// Writes entry `index`, less than [`TABLE_ENTRIES`], at once.
    fn write(&self, index: usize, pte: Pte);

    /// Where the GPU finds it.
    fn location(&self) -> Location;
}

/// Bytes that an entry of level `level` translates.
const fn span(level: u32) -> u64 {
    1 << (PAGE_SHIFT + 9 * level)
}

/// One table.
pub(crate) struct Table<M> {
    memory: M,
    /// Entries that are valid.
    valid: usize,
    /// The tables that entries point to; empty on level 0.
    children: KVec<Option<KBox<Table<M>>>>,
}

impl<M: Memory> Table<M> {
    /// An empty table of level `level` in `memory`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(memory: M, level: u32) -> Result<KBox<Self>> {
        let mut children = KVec::new();

        if level != SMALL {
            children.reserve(TABLE_ENTRIES, GFP_KERNEL)?;
            for _ in 0..TABLE_ENTRIES {
                children.push(None, GFP_KERNEL)?;
            }
        }
        Ok(KBox::new(
            Self {
                memory,
                valid: 0,
                children,
            },
            GFP_KERNEL,
        )?)
    }

    fn child(&mut self, index: usize) -> Option<&mut Table<M>> {
        Some(self.children.get_mut(index)?.as_mut()?)
    }

    /// Clears what is in `range`, whose part in this table of level `level` begins at `base`.
    fn clear(&mut self, level: u32, base: u64, range: &Range<u64>, hull: &mut Option<Range<u64>>) {
        for (index, start) in entries(level, base, range) {
            let pte = self.memory.read(index);

            if !pte.is_valid() {
                continue;
            }
            if !pte.is_leaf() {
                match self.child(index) {
                    Some(child) => {
                        child.clear(level - 1, start, range, hull);
                        if child.valid != 0 {
                            continue;
                        }
                    }
                    None => continue,
                }
            }
            self.memory.write(index, Pte(pte.0 & !Pte::VALID));
            self.valid -= 1;

            let end = start + span(level);
            *hull = Some(match hull.take() {
                Some(hull) => hull.start.min(start)..hull.end.max(end),
                None => start..end,
            });
        }
    }

    /// Whether a leaf meets `range`, whose part in this table of level `level` begins at `base`.
    fn any(&self, level: u32, base: u64, range: &Range<u64>) -> bool {
        entries(level, base, range).any(|(index, start)| {
            let pte = self.memory.read(index);

            pte.is_valid()
                && (pte.is_leaf()
                    || matches!(self.children.get(index), Some(Some(child))
                        if child.any(level - 1, start, range)))
        })
    }

    fn reap(&mut self, level: u32, base: u64, range: &Range<u64>, gone: &mut dyn FnMut(Pte, u32)) {
        for (index, start) in entries(level, base, range) {
            let pte = self.memory.read(index);

            if pte == Pte::NONE {
                continue;
            }
            if !pte.is_leaf() {
                if let Some(child) = self.child(index) {
                    child.reap(level - 1, start, range, gone);
                }
            }
            if !pte.is_valid() {
                if pte.is_leaf() {
                    gone(pte, level);
                } else if let Some(child) = self.children.get_mut(index) {
                    *child = None;
                }
                self.memory.write(index, Pte::NONE);
            }
        }
    }
}

/// The entries, with the address where each begins, of a table of level `level` at `base` that meet `range`.
fn entries(level: u32, base: u64, range: &Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let size = span(level);
    let end = range.end.min(base + size * TABLE_ENTRIES as u64);
    let start = range.start.max(base) & !(size - 1);

    (start..end)
        .step_by(usize::try_from(size).unwrap_or(usize::MAX))
        .map(move |va| (table_index(va, level), va))
}

/// Tables for one [`PageTable::set`], allocated before its lock is taken.
pub(crate) struct Stash<M> {
    /// By level; the root is never missing.
    tables: [Option<KBox<Table<M>>>; LEVELS as usize - 1],
}

impl<M: Memory> Stash<M> {
    /// Without any.
    pub(crate) const fn new() -> Self {
        Self {
            tables: [const { None }; LEVELS as usize - 1],
        }
    }

    /// Allocates what a leaf of any level may need and is not here, from `memory`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn fill(&mut self, mut memory: impl FnMut() -> Result<M>) -> Result {
        for (level, table) in (SMALL..).zip(&mut self.tables) {
            if table.is_none() {
                *table = Some(Table::new(memory()?, level)?);
            }
        }
        Ok(())
    }

    fn take(&mut self, level: u32) -> Option<KBox<Table<M>>> {
        self.tables.get_mut(usize::try_from(level).ok()?)?.take()
    }
}

/// The page table of one address space.
pub(crate) struct PageTable<M> {
    root: KBox<Table<M>>,
}

impl<M: Memory> PageTable<M> {
    /// An empty one, whose root is in `memory`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(memory: M) -> Result<Self> {
        Ok(Self {
            root: Table::new(memory, LEVELS - 1)?,
        })
    }

    /// Where the root is.
    pub(crate) fn root(&self) -> Location {
        self.root.memory.location()
    }

    /// Whether there is nothing in it.
    pub(crate) fn is_empty(&self) -> bool {
        self.root.valid == 0
    }

    /// The leaf that translates `va`, and its level.
    pub(crate) fn get(&self, va: u64) -> Option<(Pte, u32)> {
        if va >= VA_END {
            return None;
        }

        let mut table = &self.root;
        for level in (SMALL..LEVELS).rev() {
            let index = table_index(va, level);
            let pte = table.memory.read(index);

            if !pte.is_valid() {
                return None;
            }
            if pte.is_leaf() {
                return Some((pte, level));
            }
            table = table.children.get(index)?.as_ref()?;
        }
        None
    }

    /// Whether anything in `range` is translated.
    pub(crate) fn any(&self, range: Range<u64>) -> bool {
        self.root
            .any(LEVELS - 1, 0, &(range.start..range.end.min(VA_END)))
    }

    /// Whether every table exists that a leaf of [`SMALL`] at `va` needs.
    pub(crate) fn has_tables(&self, va: u64) -> bool {
        let mut table = &self.root;

        for level in (HUGE..LEVELS).rev() {
            match table.children.get(table_index(va, level)) {
                Some(Some(child)) => table = child,
                _ => return false,
            }
        }
        true
    }

    /// Puts the leaf `pte` of level `level` in the place of `va`, with tables from `stash` where they are missing.
    ///
    /// # Errors
    ///
    /// `EEXIST` if there is something in this place already, `EAGAIN` if the stash has no table for it, `EINVAL` if `va` is
    /// none of a leaf of this level.
    pub(crate) fn set(&mut self, va: u64, level: u32, pte: Pte, stash: &mut Stash<M>) -> Result {
        if va >= VA_END || level > HUGE || va & (span(level) - 1) != 0 {
            return Err(EINVAL);
        }

        let mut table = &mut *self.root;
        for at in (level + 1..LEVELS).rev() {
            let index = table_index(va, at);
            let entry = table.memory.read(index);

            if entry.is_leaf() {
                return Err(EEXIST);
            }
            if entry == Pte::NONE {
                let child = stash.take(at - 1).ok_or(EAGAIN)?;
                let entry = Pte::table(child.memory.location());

                // The table is empty; but its zeroes must be in memory before the GPU can get there.
                dma_wmb();
                *table.children.get_mut(index).ok_or(EINVAL)? = Some(child);
                table.memory.write(index, entry);
                table.valid += 1;
            }
            table = table.child(index).ok_or(EEXIST)?;
        }

        let index = table_index(va, level);
        if table.memory.read(index) != Pte::NONE {
            return Err(EEXIST);
        }
        table.memory.write(index, pte);
        table.valid += 1;
        Ok(())
    }

    /// Takes the valid bit of every leaf that meets `range`, whole huge leaves too. Returns the smallest range that covers
    /// what was taken, in which the GPU must be made to forget translations before [`PageTable::reap`] gets it.
    pub(crate) fn clear(&mut self, range: Range<u64>) -> Option<Range<u64>> {
        let range = range.start..range.end.min(VA_END);
        let mut hull = None;

        self.root.clear(LEVELS - 1, 0, &range, &mut hull);
        hull
    }

    /// Forgets what [`PageTable::clear`] took in `range`, and frees the tables; calls `gone` with each leaf and its level.
    pub(crate) fn reap(&mut self, range: Range<u64>, mut gone: impl FnMut(Pte, u32)) {
        self.root.reap(LEVELS - 1, 0, &range, &mut gone);
    }
}

#[kunit_tests(hsgpu_page_table)]
mod tests {
    use super::*;
    use crate::abi::job::mix;
    use core::cell::Cell;

    /// A table in ordinary memory, which pretends to be at an address of its own.
    struct Fake {
        entries: KBox<[Cell<u64>; TABLE_ENTRIES]>,
    }

    impl Fake {
        fn new() -> Result<Self> {
            Ok(Self {
                entries: KBox::new([const { Cell::new(0) }; TABLE_ENTRIES], GFP_KERNEL)?,
            })
        }
    }

    impl Memory for Fake {
        fn read(&self, index: usize) -> Pte {
            Pte(self.entries.get(index).map_or(0, Cell::get))
        }

        fn write(&self, index: usize, pte: Pte) {
            if let Some(entry) = self.entries.get(index) {
                entry.set(pte.0);
            }
        }

        fn location(&self) -> Location {
            Location::system(0x5_0000)
        }
    }

    fn new() -> Result<PageTable<Fake>> {
        PageTable::new(Fake::new()?)
    }

    fn leaf(page: u64) -> Pte {
        Pte::leaf(Location::vram(page << PAGE_SHIFT), Pte::WRITE)
    }

    fn set(table: &mut PageTable<Fake>, va: u64, level: u32, pte: Pte) -> Result {
        let mut stash = Stash::new();

        stash.fill(Fake::new)?;
        table.set(va, level, pte, &mut stash)
    }

    /// Takes a range away, and returns how many leaves went.
    fn take(table: &mut PageTable<Fake>, range: Range<u64>) -> usize {
        let mut count = 0;

        if let Some(hull) = table.clear(range) {
            table.reap(hull, |_, _| count += 1);
        }
        count
    }

    #[test]
    fn what_is_set_is_found_and_only_that() -> Result {
        let mut table = new()?;
        let va = 0x7f12_3456_7000;

        assert!(table.get(va).is_none());
        assert!(!table.has_tables(va));
        set(&mut table, va, SMALL, leaf(7))?;
        assert_eq!(table.get(va + 0xfff), Some((leaf(7), SMALL)));
        assert!(table.get(va + 0x1000).is_none());
        assert!(table.get(va ^ 1 << 47).is_none());
        assert!(table.has_tables(va));
        assert_eq!(set(&mut table, va, SMALL, leaf(8)), Err(EEXIST));
        assert_eq!(set(&mut table, VA_END, SMALL, leaf(8)), Err(EINVAL));
        assert_eq!(set(&mut table, va, HUGE, leaf(8)), Err(EINVAL));
        Ok(())
    }

    #[test]
    fn a_table_needs_a_stash() -> Result {
        let mut table = new()?;
        let mut empty = Stash::new();

        assert_eq!(table.set(0, SMALL, leaf(0), &mut empty), Err(EAGAIN));
        set(&mut table, 0x1000, SMALL, leaf(1))?;
        assert_eq!(table.set(0, SMALL, leaf(0), &mut empty), Ok(()));
        Ok(())
    }

    #[test]
    fn what_is_cleared_is_kept_until_it_is_reaped() -> Result {
        let mut table = new()?;

        set(&mut table, 0x20_0000, SMALL, leaf(3))?;
        set(&mut table, 0x20_1000, SMALL, leaf(4))?;
        assert!(!table.any(0..0x20_0000) && table.any(0x20_1000..0x20_2000));
        assert!(table.clear(0..0x20_0000).is_none());
        // Another page keeps the table.
        assert_eq!(
            table.clear(0x20_0000..0x20_1000),
            Some(0x20_0000..0x20_1000)
        );
        assert!(table.get(0x20_0000).is_none());
        assert_eq!(set(&mut table, 0x20_0000, SMALL, leaf(5)), Err(EEXIST));

        let mut gone = None;
        table.reap(0x20_0000..0x20_1000, |pte, level| gone = Some((pte, level)));
        assert_eq!(
            gone.map(|(pte, level)| (pte.location(), level)),
            Some((leaf(3).location(), SMALL))
        );
        set(&mut table, 0x20_0000, SMALL, leaf(5))?;
        assert_eq!(take(&mut table, 0..VA_END), 2);
        assert!(table.is_empty() && !table.has_tables(0x20_0000));
        Ok(())
    }

    #[test]
    fn a_huge_leaf_goes_as_a_whole_and_takes_no_place_that_is_in_use() -> Result {
        let mut table = new()?;
        let va = 0x4000_0000;

        // A neighbour keeps the table, so that it does not go with the leaf.
        set(&mut table, va + 0x20_0000, HUGE, leaf(1024))?;
        set(&mut table, va, HUGE, leaf(512))?;
        assert_eq!(table.get(va + 0x12_3456), Some((leaf(512), HUGE)));
        assert_eq!(set(&mut table, va + 0x1000, SMALL, leaf(1)), Err(EEXIST));
        assert_eq!(
            table.clear(va + 0x5000..va + 0x6000),
            Some(va..va + 0x20_0000)
        );
        table.reap(va..va + 0x20_0000, |_, level| assert_eq!(level, HUGE));
        set(&mut table, va + 0x1000, SMALL, leaf(1))?;
        assert_eq!(set(&mut table, va, HUGE, leaf(512)), Err(EEXIST));
        assert_eq!(take(&mut table, va..va + 0x20_0000), 1);
        set(&mut table, va, HUGE, leaf(512))?;
        Ok(())
    }

    /// Random operations against a list of what is mapped.
    #[test]
    fn agrees_with_a_plain_list() -> Result {
        const SLOTS: usize = 48;
        let mut table = new()?;
        let mut model = [const { None::<u64> }; SLOTS];
        // Addresses that share tables of every level, in ascending order.
        let address = |slot: usize| {
            let slot = slot as u64;
            (slot / 16) << 39 | (slot / 8 % 2) << 30 | (slot / 4 % 2) << 21 | (slot % 4) << 12
        };

        for step in 0..600u64 {
            let random = mix(step);
            // CAST: small remainders.
            let slot = (random % SLOTS as u64) as usize;

            if random >> 32 & 3 != 0 {
                let expected = if model[slot].is_some() {
                    Err(EEXIST)
                } else {
                    Ok(())
                };
                assert_eq!(set(&mut table, address(slot), SMALL, leaf(step)), expected);
                model[slot].get_or_insert(step);
            } else {
                let end = SLOTS.min(slot + 1 + (random >> 40) as usize % 12);
                let expected = model[slot..end].iter().flatten().count();
                let range = address(slot)..address(end - 1) + 0x1000;

                assert_eq!(take(&mut table, range), expected);
                model[slot..end].fill(None);
            }
            for (slot, page) in model.iter().enumerate() {
                let found = table.get(address(slot)).map(|(pte, _)| pte);
                assert_eq!(found, page.map(leaf));
            }
        }
        assert_eq!(table.is_empty(), model.iter().all(Option::is_none));
        Ok(())
    }
}

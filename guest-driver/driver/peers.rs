// SPDX-License-Identifier: GPL-2.0

//! Which GPU a page of coherent memory belongs to.
//!
//! The CPU maps coherent pages like any others, so a device comes upon those of every GPU; it reaches its own as VRAM
//! and those of the others as a peer. A page that somebody has in hand is in use, and memory stays registered as long as
//! one of its pages is in use: so whoever looks up a page finds it, and needs no lock.

use kernel::{
    mm::pagemap::DevicePageRef,
    sync::atomic::{
        Acquire,
        Atomic,
        Release, //
    }, //
};

use crate::{
    abi::{
        ring::Location,
        uapi::PAGE_SIZE, //
    },
    vram::CHUNK_PAGES, //
};

/// GPUs that can address each other ([`Location::peer`]).
pub(crate) const MAX_GPUS: usize = 16;

/// Bits of a slot for the number of chunks.
const COUNT_BITS: u32 = 24;

/// By GPU: the first page frame of its coherent memory, in chunks, and the number of chunks; 0 for none. One word, so that
/// nobody sees the one without the other.
static COHERENT: [Atomic<u64>; MAX_GPUS] = [const { Atomic::new(0) }; MAX_GPUS];

/// The coherent memory of the GPU `index` begins at the page frame `first_pfn`, and at offset 0 of its VRAM.
pub(crate) struct Registration {
    index: u8,
}

impl Registration {
    /// Makes `nr_pages` pages from `first_pfn` on known, both multiples of a chunk.
    pub(crate) fn new(index: u8, first_pfn: usize, nr_pages: usize) -> Self {
        if let Some(slot) = COHERENT.get(usize::from(index)) {
            slot.store(pack(first_pfn, nr_pages), Release);
        }
        Self { index }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(slot) = COHERENT.get(usize::from(self.index)) {
            slot.store(0, Release);
        }
    }
}

/// Where the GPU `own` finds `page`, which must be coherent memory.
pub(crate) fn locate(own: u8, page: &DevicePageRef<'_>) -> Option<Location> {
    (0..).zip(&COHERENT).find_map(|(gpu, slot)| {
        let index = find(slot.load(Acquire), page.pfn())?;
        // CAST: `usize` has 64 bits.
        let address = (index * PAGE_SIZE) as u64;

        Some(if gpu == own {
            Location::vram(address)
        } else {
            Location::peer(gpu, address)
        })
    })
}

fn pack(first_pfn: usize, nr_pages: usize) -> u64 {
    // CAST: `usize` has 64 bits.
    ((first_pfn / CHUNK_PAGES) << COUNT_BITS | (nr_pages / CHUNK_PAGES)) as u64
}

/// The index of `pfn` in the memory that `slot` describes.
fn find(slot: u64, pfn: usize) -> Option<usize> {
    // CAST: `usize` has 64 bits.
    let slot = slot as usize;
    let index = pfn.checked_sub((slot >> COUNT_BITS) * CHUNK_PAGES)?;

    (index < (slot & ((1 << COUNT_BITS) - 1)) * CHUNK_PAGES).then_some(index)
}

#[kernel::macros::kunit_tests(hsgpu_peers)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_found() {
        let first = 0x7_8000_0000;
        let slot = pack(first, 3 * CHUNK_PAGES);

        assert_eq!(find(slot, first), Some(0));
        assert_eq!(
            find(slot, first + 3 * CHUNK_PAGES - 1),
            Some(3 * CHUNK_PAGES - 1)
        );
        assert_eq!(find(slot, first + 3 * CHUNK_PAGES), None);
        assert_eq!(find(slot, first - 1), None);
        assert_eq!(find(0, 0), None);
        assert_eq!(find(0, first), None);
    }
}

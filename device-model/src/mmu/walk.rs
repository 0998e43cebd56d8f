//! The walk through a page table. Each entry is read once and checked before it is used; a table may change under
//! the walker, lie anywhere, or point at itself: the walk ends after four entries.

use hmmstorm_abi::mmu::{HUGE_SHIFT, LEVELS, PAGE_SHIFT, Pte, Reason, VA_BITS, table_index};
use hmmstorm_abi::ring::Location;

use super::Translation;
use crate::core::Core;
use crate::engine::place::Place;
use crate::guest_memory::DmaGuard;

/// Bytes of an entry.
const ENTRY: u64 = 8;
/// The lowest level at which an entry may not be a leaf.
const LEAF_LEVELS: u32 = 2;

/// Finds the leaf that translates `va`, from the table at `root` on.
///
/// # Errors
/// Why there is none.
pub fn walk(core: &Core, guard: &DmaGuard<'_>, root: Location, va: u64) -> Result<Translation, Reason> {
    if va >> VA_BITS != 0 {
        return Err(Reason::BadAddress);
    }
    let mut table = root;
    for level in (0..LEVELS).rev() {
        let entry = read(core, guard, table, table_index(va, level))?;
        if !entry.is_valid() {
            return Err(Reason::NotPresent);
        }
        let next = entry.location().ok_or(Reason::BadTable)?;
        if entry.is_leaf() {
            return leaf(core, va, level, entry, next);
        }
        table = next;
    }
    Err(Reason::BadTable)
}

fn leaf(core: &Core, va: u64, level: u32, entry: Pte, page: Location) -> Result<Translation, Reason> {
    if level >= LEAF_LEVELS {
        return Err(Reason::BadTable);
    }
    let huge = level > 0;
    let length = 1_u64 << if huge { HUGE_SHIFT } else { PAGE_SHIFT };
    if !page.address.is_multiple_of(length) {
        return Err(Reason::BadTable);
    }
    // VRAM keeps its size, so what is there now stays there. The DMA map is asked at each access.
    Place::of(core, page, length).map_err(|_| Reason::BadTable)?;
    Ok(Translation { va: va & !(length - 1), huge, page, rights: entry.0 & (Pte::WRITE | Pte::ATOMIC) })
}

fn read(core: &Core, guard: &DmaGuard<'_>, table: Location, index: usize) -> Result<Pte, Reason> {
    let address = table.address.checked_add(index as u64 * ENTRY).ok_or(Reason::BadTable)?;
    let location = Location { aperture: table.aperture, address };
    let word = Place::of(core, location, ENTRY)
        .and_then(|place| {
            place.check_poison(core, ENTRY)?;
            place.load(guard)
        })
        .map_err(|_| Reason::BadTable)?;
    Ok(Pte(word))
}

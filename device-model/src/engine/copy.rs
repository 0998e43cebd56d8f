//! The copy engine: copies, fills, scatter lists.
//!
//! Every range is checked before a byte of the descriptor moves; a list is read once, and what was checked is what is
//! executed. Copies go straight from one mapping to the other.
//!
//! Overlapping source and destination behave as if the source were read first (`memmove`), by DMA address or VRAM
//! offset. A copy is done in pieces, so that a removal of DMA entries or a reset waits for one piece and not for all.

use hmmstorm_abi::ring::{Aperture, Location, SG_ENTRIES_MAX, SG_ENTRY_SIZE, SgEntry};
use vm_memory::Bytes;

use super::place::Place;
use super::session::Session;
use super::{Failure, words_of};
use crate::guest_memory::{DmaGuard, Need};

/// Bytes of pattern that a fill writes at once; stays in the first-level cache.
const PATTERN_BYTES: usize = 4096;
/// Unit of fills, in bytes.
const FILL_UNIT: u64 = 8;

/// What copies need and count, kept between descriptors.
#[derive(Debug, Default)]
pub struct Copier {
    list: Vec<SgEntry>,
    list_bytes: Vec<u8>,
    /// Bytes and segments of the descriptor under way.
    bytes: u64,
    segments: u64,
}

impl Copier {
    /// Runs one operation of this engine and puts down what it moved.
    ///
    /// # Errors
    /// Whatever `operation` says.
    pub fn run(
        &mut self,
        session: &mut Session<'_>,
        operation: impl FnOnce(&mut Self, &mut Session<'_>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        (self.bytes, self.segments) = (0, 0);
        let outcome = operation(self, session);
        session.core.stats.bytes.add(self.bytes);
        session.core.stats.segments.add(self.segments);
        outcome
    }

    /// Copies `length` bytes.
    ///
    /// # Errors
    /// [`Failure`]. Unless it is [`Failure::Aborted`], or the DMA map changed half-way, no byte was moved.
    pub fn copy_checked(
        &mut self,
        session: &mut Session<'_>,
        src: Location,
        dst: Location,
        length: u64,
    ) -> Result<(), Failure> {
        let (src, dst) = check_copy(session, src, dst, length)?;
        self.copy(session, src, dst, length)
    }

    /// Copies between places that were checked.
    fn copy(
        &mut self,
        session: &mut Session<'_>,
        src: Place<'_>,
        dst: Place<'_>,
        length: u64,
    ) -> Result<(), Failure> {
        let ahead = dst.address().wrapping_sub(src.address());
        let backward = src.same_memory(dst) && ahead != 0 && ahead < length;
        let mut done = 0;
        while done < length {
            let want = (length - done).min(session.left());
            let guard = session.guard();
            let moved = if backward {
                piece_backward(guard, src, dst, length - done, want)?
            } else {
                piece_forward(guard, src, dst, done, want)?
            };
            done += moved;
            self.bytes += moved;
            session.moved(moved)?;
        }
        self.end_segment(session, dst, length)
    }

    /// Fills `length` bytes with `pattern`.
    ///
    /// # Errors
    /// As [`Copier::copy_checked`].
    pub fn fill(
        &mut self,
        session: &mut Session<'_>,
        dst: Location,
        length: u64,
        pattern: u64,
    ) -> Result<(), Failure> {
        if !dst.address.is_multiple_of(FILL_UNIT) || !length.is_multiple_of(FILL_UNIT) {
            return Err(Failure::Descriptor("a fill of other than whole aligned 64-bit words"));
        }
        let dst = Place::of(session.core, dst, length)?;
        dst.check(session.guard(), length, Need::Write)?;
        let mut words = [0; PATTERN_BYTES];
        words.as_chunks_mut().0.iter_mut().for_each(|word| *word = pattern.to_le_bytes());
        let mut done = 0;
        while done < length {
            // Spans are whole words: mappings are page-aligned, and so are the pieces of a quantum.
            let want = (length - done).min(session.left());
            let span = dst.span(session.guard(), done, want, Need::Write)?;
            let here = span.len();
            for start in (0..here).step_by(PATTERN_BYTES) {
                let some = PATTERN_BYTES.min(here - start);
                if let Ok(piece) = span.subslice(start, some) {
                    piece.copy_from(&words[..some]);
                }
            }
            done += here as u64;
            self.bytes += here as u64;
            session.moved(here as u64)?;
        }
        self.end_segment(session, dst, length)
    }

    /// Copies every entry of the list of `count` entries at `list`.
    ///
    /// # Errors
    /// As [`Copier::copy_checked`].
    pub fn copy_list(
        &mut self,
        session: &mut Session<'_>,
        list: Location,
        count: u32,
    ) -> Result<(), Failure> {
        if list.aperture != Aperture::System {
            return Err(Failure::Descriptor("a scatter list outside guest memory"));
        }
        let address = list.address;
        if count > SG_ENTRIES_MAX {
            return Err(Failure::List { address, count, why: "too long" });
        }
        let core = session.core;
        self.list_bytes.resize(count as usize * SG_ENTRY_SIZE, 0);
        session.guard().read(address, &mut self.list_bytes).map_err(|_| {
            core.stats.dma_faults.increment();
            Failure::List { address, count, why: "not in memory that the device can read" }
        })?;
        self.list.clear();
        for bytes in self.list_bytes.as_chunks::<SG_ENTRY_SIZE>().0 {
            let entry = SgEntry::from_words(words_of(bytes)).map_err(|_| Failure::List {
                address,
                count,
                why: "an entry with an unknown aperture or a reserved field in use",
            })?;
            check_copy(session, entry.src, entry.dst, u64::from(entry.length))?;
            self.list.push(entry);
        }
        // Checked once more as they are looked up; what was mapped may not be any more.
        for index in 0..self.list.len() {
            let SgEntry { src, dst, length } = self.list[index];
            let length = u64::from(length);
            let (src, dst) = (Place::of(core, src, length)?, Place::of(core, dst, length)?);
            self.copy(session, src, dst, length)?;
        }
        Ok(())
    }

    fn end_segment(&mut self, session: &mut Session<'_>, dst: Place<'_>, length: u64) -> Result<(), Failure> {
        self.segments += 1;
        if let Some(flip) = session.core.chaos.corrupts_segment(length) {
            session.core.stats.chaos.increment();
            let byte = dst.span(session.guard(), flip.offset, 1, Need::Write)?;
            if let Ok(value) = byte.read_obj::<u8>(0) {
                // The span is one byte long, so the write fits.
                let _ = byte.write_obj(value ^ flip.mask, 0);
            }
        }
        Ok(())
    }
}

fn check_copy<'a>(
    session: &mut Session<'a>,
    src: Location,
    dst: Location,
    length: u64,
) -> Result<(Place<'a>, Place<'a>), Failure> {
    let core = session.core;
    let (src, dst) = (Place::of(core, src, length)?, Place::of(core, dst, length)?);
    src.check(session.guard(), length, Need::Read)?;
    src.check_poison(core, length)?;
    dst.check(session.guard(), length, Need::Write)?;
    Ok((src, dst))
}

/// Copies the longest piece of `want` bytes from offset `done` on; returns its length.
fn piece_forward(
    guard: &DmaGuard<'_>,
    src: Place<'_>,
    dst: Place<'_>,
    done: u64,
    want: u64,
) -> Result<u64, Failure> {
    let from = src.span(guard, done, want, Need::Read)?;
    let to = dst.span(guard, done, from.len() as u64, Need::Write)?;
    let length = to.len() as u64;
    // Moves as much as fits both, i.e. all of `to`; handles an overlap within the piece.
    from.copy_to_volatile_slice(to);
    Ok(length)
}

/// Copies the longest piece of `want` bytes that ends at offset `end`; returns its length.
fn piece_backward(
    guard: &DmaGuard<'_>,
    src: Place<'_>,
    dst: Place<'_>,
    end: u64,
    want: u64,
) -> Result<u64, Failure> {
    let to = dst.span_back(guard, end, want, Need::Write)?;
    let from = src.span_back(guard, end, to.len() as u64, Need::Read)?;
    let length = from.len();
    if let Ok(to) = to.offset(to.len() - length) {
        from.copy_to_volatile_slice(to);
    }
    Ok(length as u64)
}

//! The copy engine: decodes a descriptor, checks it, executes it.
//!
//! The guest is hostile. Every range is checked before a byte of the descriptor moves; a list is read once, and what
//! was checked is what is executed. Copies go straight from one mapping to the other.
//!
//! Overlapping source and destination behave as if the source were read first (`memmove`), by DMA address or VRAM
//! offset. A copy is done in pieces, so that a removal of DMA entries or a reset waits for one piece and not for all.

use std::sync::atomic::{AtomicU8, Ordering};

use hmmstorm_abi::ring::{
    Aperture, Descriptor, Location, Opcode, SG_ENTRIES_MAX, SG_ENTRY_SIZE, SgEntry, Status,
};
use vm_memory::{Bytes, VolatileSlice};

use crate::core::Core;
use crate::guest_memory::{DmaFault, DmaGuard, Need};
use crate::reset::Held;
use crate::vram::Vram;

/// Bytes that are moved before the DMA map is released for a moment: some hundred microseconds of copying.
const QUANTUM: u64 = 2 << 20;
/// Bytes of pattern that a fill writes at once; stays in the first-level cache.
const PATTERN_BYTES: usize = 4096;
/// Unit of fills, in bytes.
const FILL_UNIT: u64 = 8;

/// Why a descriptor did not do what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It cannot be decoded, or contradicts itself.
    #[error("descriptor: {0}")]
    Descriptor(&'static str),
    /// An aperture or VRAM range that is not there.
    #[error("{length} bytes at {address:#x} of {aperture:?}, which has no such range")]
    Address {
        /// Which memory.
        aperture: Aperture,
        /// Offset.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A DMA range that the map does not allow.
    #[error(transparent)]
    Dma(#[from] DmaFault),
    /// A scatter list that is too long, unreadable or malformed.
    #[error("scatter list of {count} entries at {address:#x}: {why}")]
    List {
        /// Where.
        address: u64,
        /// How long.
        count: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// The channel is being reset.
    #[error("the channel is being reset")]
    Aborted(Held),
    /// The chaos plan wants it.
    #[error("the chaos plan fails this one")]
    Injected,
}

impl Failure {
    /// The code that the fence slot gets.
    pub const fn status(self) -> Status {
        match self {
            Self::Descriptor(_) => Status::BadDescriptor,
            Self::Address { .. } => Status::BadAddress,
            Self::Dma(_) => Status::DmaFault,
            Self::List { .. } => Status::BadList,
            Self::Aborted(_) => Status::Aborted,
            Self::Injected => Status::Injected,
        }
    }
}

/// A request to stop what a channel is doing, shared with the thread that does it.
#[derive(Debug, Default)]
pub struct Cancel(AtomicU8);

impl Cancel {
    /// Asks.
    pub fn request(&self, held: Held) {
        let code = match held {
            Held::Abort => 1,
            Held::Drop => 2,
        };
        self.0.store(code, Ordering::Release);
    }
    /// Takes the request back.
    pub fn clear(&self) {
        self.0.store(0, Ordering::Release);
    }
    /// What was asked, if anything.
    pub fn requested(&self) -> Option<Held> {
        match self.0.load(Ordering::Acquire) {
            0 => None,
            1 => Some(Held::Abort),
            _ => Some(Held::Drop),
        }
    }
}

/// The DMA map held for the time of a descriptor, and given back for a moment after each [`QUANTUM`] moved.
#[derive(Debug)]
pub struct Session<'a> {
    core: &'a Core,
    cancel: &'a Cancel,
    guard: Option<DmaGuard<'a>>,
    left: u64,
}

impl<'a> Session<'a> {
    /// Takes the DMA map.
    pub fn new(core: &'a Core, cancel: &'a Cancel) -> Self {
        Self { core, cancel, guard: Some(core.memory.guard()), left: QUANTUM }
    }

    /// The DMA map.
    pub fn guard(&mut self) -> &DmaGuard<'a> {
        self.guard.get_or_insert_with(|| self.core.memory.guard())
    }

    /// Accounts for `bytes` moved; after a quantum, lets others at the map and looks whether to stop.
    fn moved(&mut self, bytes: u64) -> Result<(), Failure> {
        self.left = self.left.saturating_sub(bytes);
        if self.left > 0 {
            return Ok(());
        }
        self.left = QUANTUM;
        self.guard = None;
        self.cancel.requested().map_or(Ok(()), |held| Err(Failure::Aborted(held)))
    }
}

/// A location with its aperture looked up.
#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    System(u64),
    Vram(&'a Vram, u64),
}

impl<'a> Place<'a> {
    fn of(core: &'a Core, location: Location, length: u64) -> Result<Self, Failure> {
        let Location { aperture, address } = location;
        let vram = match aperture {
            Aperture::System => return Ok(Self::System(address)),
            Aperture::Vram => Some(core.vram()),
            Aperture::Peer(gpu) => core.vrams.get(usize::from(gpu)),
        };
        let vram = vram.filter(|vram| vram.contains(address, length));
        vram.map(|vram| Self::Vram(vram, address)).ok_or(Failure::Address { aperture, address, length })
    }

    const fn address(self) -> u64 {
        match self {
            Self::System(address) | Self::Vram(_, address) => address,
        }
    }

    fn same_memory(self, other: Self) -> bool {
        match (self, other) {
            (Self::System(_), Self::System(_)) => true,
            (Self::Vram(a, _), Self::Vram(b, _)) => std::ptr::eq(a, b),
            _ => false,
        }
    }

    /// Checks all of `length` bytes; VRAM was checked when the place was made.
    fn check(self, guard: &DmaGuard<'_>, length: u64, need: Need) -> Result<(), Failure> {
        match self {
            Self::System(address) => Ok(guard.check(address, length, need)?),
            Self::Vram(..) => Ok(()),
        }
    }

    /// The bytes from `offset` on, as many of `length` as lie together.
    fn span<'b>(
        self,
        guard: &'b DmaGuard<'_>,
        offset: u64,
        length: u64,
        need: Need,
    ) -> Result<VolatileSlice<'b>, Failure>
    where
        'a: 'b,
    {
        match self {
            Self::System(address) => Ok(guard.span(address + offset, length, need)?),
            Self::Vram(vram, address) => vram_span(vram, address + offset, length),
        }
    }

    /// The bytes that end before `end`, as many of `length` as lie together.
    fn span_back<'b>(
        self,
        guard: &'b DmaGuard<'_>,
        end: u64,
        length: u64,
        need: Need,
    ) -> Result<VolatileSlice<'b>, Failure>
    where
        'a: 'b,
    {
        match self {
            Self::System(address) => Ok(guard.span_back(address + end, length, need)?),
            Self::Vram(vram, address) => vram_span(vram, address + end - length, length),
        }
    }
}

fn vram_span(vram: &Vram, address: u64, length: u64) -> Result<VolatileSlice<'_>, Failure> {
    vram.slice(address, length).ok_or(Failure::Address { aperture: Aperture::Vram, address, length })
}

/// One channel's engine, with the buffers that it keeps between descriptors.
#[derive(Debug, Default)]
pub struct Engine {
    list: Vec<SgEntry>,
    list_bytes: Vec<u8>,
    /// Bytes and segments of the descriptor under way.
    bytes: u64,
    segments: u64,
}

impl Engine {
    /// Executes the descriptor with these words.
    ///
    /// # Errors
    /// [`Failure`]. Unless it is [`Failure::Aborted`], or the DMA map changed half-way, no byte was moved.
    pub fn execute(&mut self, session: &mut Session<'_>, words: [u64; 8]) -> Result<(), Failure> {
        let core = session.core;
        if core.chaos.fails_descriptor() {
            core.stats.chaos.increment();
            return Err(Failure::Injected);
        }
        let descriptor = Descriptor::from_words(words).map_err(|_| {
            Failure::Descriptor("unknown opcode, aperture or flag, or a reserved field in use")
        })?;
        if descriptor.count != 0 && descriptor.opcode != Opcode::CopyList {
            return Err(Failure::Descriptor("a count without a list"));
        }
        let Descriptor { src, dst, length, .. } = descriptor;
        (self.bytes, self.segments) = (0, 0);
        let outcome = match descriptor.opcode {
            Opcode::Nop => Ok(()),
            Opcode::Copy => check_copy(session, src, dst, length)
                .and_then(|(src, dst)| self.copy(session, src, dst, length)),
            Opcode::Fill => self.fill(session, dst, length, descriptor.pattern),
            Opcode::CopyList => self.copy_list(session, src, descriptor.count),
            Opcode::Bind | Opcode::Invalidate | Opcode::Access => Err(Failure::Descriptor("unknown opcode")),
        };
        core.stats.bytes.add(self.bytes);
        core.stats.segments.add(self.segments);
        outcome
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
            let want = (length - done).min(session.left);
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

    fn fill(
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
            let want = (length - done).min(session.left);
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

    fn copy_list(&mut self, session: &mut Session<'_>, list: Location, count: u32) -> Result<(), Failure> {
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
            let mut words = [0; SG_ENTRY_SIZE / 8];
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            let entry = SgEntry::from_words(words).map_err(|_| Failure::List {
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

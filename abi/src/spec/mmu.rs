// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The GPU's MMU: page tables, address spaces, the replayable fault buffer.
//!
//! An *address space* is a number (ASID) bound to the root of a page table by [`Opcode::Bind`]. Access jobs
//! ([`crate::spec::job`](super::job)) use virtual addresses of one space. Translations may be kept in a TLB until
//! [`Opcode::Invalidate`] (or a new `Bind`) takes them away; its fence completes when no access made with the old
//! translations is under way any more.
//!
//! A job that meets an address without a translation for what it wants *stalls* its channel, keeps its place, and
//! leaves a [`Fault`] in the fault buffer. Software mends the page tables and writes the `FAULT_REPLAY` register: every
//! stalled job looks again. Or it gives one up through `FAULT_CANCEL`: the job ends with
//! [`Status::PageFault`](super::ring::Status::PageFault). Other channels go on meanwhile.
//!
//! [`Opcode::Bind`]: super::ring::Opcode::Bind
//! [`Opcode::Invalidate`]: super::ring::Opcode::Invalidate

use super::ring::{Aperture, Location};

/// Address spaces of a GPU; ASIDs are `0..ADDRESS_SPACES`.
pub const ADDRESS_SPACES: usize = 64;
/// Bits of a virtual address; an address with a bit above these set has no translation.
pub const VA_BITS: u32 = 48;
/// Levels of a page table; level 3 is the root, level 0 maps 4 KiB pages.
pub const LEVELS: u32 = 4;
/// Entries of a table: each table is one 4 KiB page.
pub const TABLE_ENTRIES: usize = 512;
/// Log2 of the bytes that an entry of level 0 maps.
pub const PAGE_SHIFT: u32 = 12;
/// Log2 of the bytes that a [`Pte::LEAF`] entry of level 1 maps.
pub const HUGE_SHIFT: u32 = 21;

/// The index in a table of level `level` that translates `va`.
pub const fn table_index(va: u64, level: u32) -> usize {
    ((va >> (PAGE_SHIFT + 9 * level)) & (TABLE_ENTRIES as u64 - 1)) as usize
}

/// A page-table entry: one little-endian `u64`.
///
/// | bits  | field |
/// |-------|-------|
/// | 0     | valid; if 0, the other bits are software's |
/// | 1     | writable (leaf) |
/// | 2     | atomics allowed (leaf) |
/// | 3     | leaf: the entry maps memory; allowed on levels 0 (4 KiB, required there) and 1 (2 MiB) |
/// | 11:4  | aperture of the page or of the next table, as in descriptors |
/// | 51:12 | bits 51:12 of the DMA address or VRAM offset; of a 2 MiB leaf, bits 20:12 are zero |
/// | 63:52 | reserved, zero |
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Pte(pub u64);

impl Pte {
    /// The entry translates.
    pub const VALID: u64 = 1 << 0;
    /// Stores are allowed.
    pub const WRITE: u64 = 1 << 1;
    /// Atomics are allowed; without it they fault even where stores do not.
    pub const ATOMIC: u64 = 1 << 2;
    /// The entry maps memory and not a table.
    pub const LEAF: u64 = 1 << 3;
    /// Lowest bit of the aperture.
    pub const APERTURE_SHIFT: u32 = 4;
    /// The address.
    pub const ADDRESS: u64 = ((1 << 52) - 1) & !((1 << PAGE_SHIFT) - 1);
    /// Bits that must be zero in a valid entry.
    pub const RESERVED: u64 = !((1 << 52) - 1);

    /// No translation.
    pub const NONE: Self = Self(0);

    /// The entry of a table at `next`.
    pub const fn table(next: Location) -> Self {
        Self(Self::VALID | Self::place(next))
    }
    /// The entry of a page at `page`, with `rights` of [`Pte::WRITE`] and [`Pte::ATOMIC`].
    pub const fn leaf(page: Location, rights: u64) -> Self {
        Self(Self::VALID | Self::LEAF | rights & (Self::WRITE | Self::ATOMIC) | Self::place(page))
    }
    const fn place(at: Location) -> u64 {
        (at.aperture.to_u8() as u64) << Self::APERTURE_SHIFT | at.address & Self::ADDRESS
    }
    /// Whether the entry translates.
    pub const fn is_valid(self) -> bool {
        self.0 & Self::VALID != 0
    }
    /// Whether the entry maps memory.
    pub const fn is_leaf(self) -> bool {
        self.0 & Self::LEAF != 0
    }
    /// What a valid entry points to; `None` if its aperture does not exist or a reserved bit is set.
    pub const fn location(self) -> Option<Location> {
        if self.0 & Self::RESERVED != 0 {
            return None;
        }
        match Aperture::from_u8((self.0 >> Self::APERTURE_SHIFT) as u8) {
            Some(aperture) => Some(Location { aperture, address: self.0 & Self::ADDRESS }),
            None => None,
        }
    }
}

/// What an access wants to do with memory, in order of rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Want {
    /// Load.
    Read = 0,
    /// Store.
    Write = 1,
    /// Read-modify-write.
    Atomic = 2,
}

impl Want {
    /// The right with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Read),
            1 => Some(Self::Write),
            2 => Some(Self::Atomic),
            _ => None,
        }
    }
}

/// Why there was no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Reason {
    /// An entry on the way is not valid.
    NotPresent = 0,
    /// The page is there, but not for this.
    Permission = 1,
    /// An entry on the way is malformed: a reserved bit, an aperture or level that does not exist, or a table that
    /// cannot be read.
    BadTable = 2,
    /// The address has more than [`VA_BITS`] bits.
    BadAddress = 3,
}

impl Reason {
    /// The reason with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::NotPresent),
            1 => Some(Self::Permission),
            2 => Some(Self::BadTable),
            3 => Some(Self::BadAddress),
            _ => None,
        }
    }
}

/// Smallest allowed log2 of fault buffer entries.
pub const FAULT_ORDER_MIN: u32 = 4;
/// Largest allowed log2 of fault buffer entries.
pub const FAULT_ORDER_MAX: u32 = 12;
/// Size of a fault buffer entry in bytes.
pub const FAULT_SIZE: usize = 32;

/// Offset in the fault shadow page of the put index (`u32`, written by the device, with release order after the entry).
pub const FAULT_SHADOW_PUT: usize = 0x00;
/// Offset of the number of faults that found the buffer full (`u32`, wrapping, written by the device). Their jobs stall
/// like the others, and report again after the next replay.
pub const FAULT_SHADOW_OVERFLOW: usize = 0x04;
/// Offset in the fault shadow page of the get index (`u32`, written by the driver, with release order after it has
/// read the entries). On its own cache line.
pub const FAULT_SHADOW_GET: usize = 0x40;
/// Offset of the event index (`u32`, written by the driver): the device raises `VECTOR_FAULT` when its put index
/// moves past it ([`needs_doorbell`](super::ring::needs_doorbell) with the roles changed).
pub const FAULT_SHADOW_EVENT: usize = 0x80;

/// One entry of the fault buffer, decoded. On the wire: four little-endian `u64` words.
///
/// | word | bits  | field |
/// |------|-------|-------|
/// | 0    |       | virtual address, aligned down to 4 KiB |
/// | 1    | 31:0  | sequence number, for `FAULT_CANCEL` |
/// | 1    | 47:32 | ASID |
/// | 1    | 55:48 | [`Want`] |
/// | 1    | 63:56 | [`Reason`] |
/// | 2    | 15:0  | channel of the job that faulted first |
/// | 2    | 63:16 | reserved, zero |
/// | 3    |       | reserved, zero |
///
/// A fault on a page for which the buffer holds an entry of the same address space that wants as much or more, and
/// that no replay has followed yet, is *coalesced*: it leaves no entry of its own, and whatever happens to that entry
/// happens to it too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Virtual address, aligned down to 4 KiB.
    pub va: u64,
    /// Number of this fault; runs freely, never 0.
    pub sequence: u32,
    /// Address space.
    pub asid: u16,
    /// What the job wanted.
    pub want: Want,
    /// Why it did not get it.
    pub reason: Reason,
    /// Channel of the job that faulted first.
    pub channel: u16,
}

impl Fault {
    /// The four words of the entry.
    pub const fn to_words(self) -> [u64; 4] {
        [
            self.va,
            self.sequence as u64
                | (self.asid as u64) << 32
                | (self.want as u64) << 48
                | (self.reason as u64) << 56,
            self.channel as u64,
            0,
        ]
    }
    /// Decodes an entry; `None` if it is none that this description knows.
    pub const fn from_words(w: [u64; 4]) -> Option<Self> {
        let (Some(want), Some(reason)) =
            (Want::from_u8((w[1] >> 48) as u8), Reason::from_u8((w[1] >> 56) as u8))
        else {
            return None;
        };
        if w[2] >> 16 != 0 || w[3] != 0 {
            return None;
        }
        Some(Self {
            va: w[0],
            sequence: w[1] as u32,
            asid: (w[1] >> 32) as u16,
            want,
            reason,
            channel: w[2] as u16,
        })
    }
}

// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Channel rings: descriptors, scatter lists, shadow page, fences.
//!
//! A channel executes the descriptors of its ring in order. Indices run freely (`u32`, wrapping); entry `i` stands
//! at `i % entries`. The driver owns entries `head..head + entries` that it has not published; publishing is a store
//! of the new tail to [`SHADOW_TAIL`], with release order. Then it must look (after a full barrier) whether the
//! channel sleeps, i.e. whether `new_tail` moved past the event index that the device left at [`SHADOW_EVENT`]
//! ([`needs_doorbell`]); only then it writes the trapped doorbell.
//!
//! A descriptor completes in this order: its data is in memory, then its fence slot, then (if asked) the interrupt. Who
//! looks at the fence himself for a while asks for the interrupt only when he goes to sleep: see [`FENCE_ARM`].

/// Smallest allowed log2 of ring entries.
pub const RING_ORDER_MIN: u32 = 4;
/// Largest allowed log2 of ring entries.
pub const RING_ORDER_MAX: u32 = 12;

/// Size of a descriptor in bytes.
pub const DESCRIPTOR_SIZE: usize = 64;
/// Size of a scatter-list entry in bytes.
pub const SG_ENTRY_SIZE: usize = 32;
/// Largest number of entries of one scatter list: a 2 MiB migration of 4 KiB pages, several times over.
pub const SG_ENTRIES_MAX: u32 = 4096;
/// Size of a fence slot in bytes, and its alignment.
pub const FENCE_SIZE: usize = 16;

/// Offset in the shadow page of the tail (`u32`, written by the driver).
pub const SHADOW_TAIL: usize = 0x00;
/// Offset in the shadow page of the event index (`u32`, written by the device): the tail at which the device went
/// to sleep. On its own cache line.
pub const SHADOW_EVENT: usize = 0x40;
/// Offset in the shadow page of the head (`u32`, written by the device): descriptors consumed.
pub const SHADOW_HEAD: usize = 0x80;

/// Whether a driver that moved its tail from `old` to `new` must ring the doorbell of a device whose event index is
/// `event`: the device sleeps at `event`, and this publication passed it (virtio 1.2, 2.7.7.2, same rule).
pub const fn needs_doorbell(event: u32, new: u32, old: u32) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// What a descriptor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opcode {
    /// Nothing but its fence.
    Nop = 0,
    /// Copy `length` bytes from `src` to `dst`.
    Copy = 1,
    /// Write the 64-bit `pattern` over `length` bytes at `dst`; address and length are multiples of 8.
    Fill = 2,
    /// Copy every entry of the scatter list of `count` [`SgEntry`] in guest memory at `src`.
    CopyList = 3,
    /// Bind address space `count` to the page table whose root is at `src`, with `length` 4096; or, with `length` 0, to
    /// none. Translations of the old table are forgotten as by [`Opcode::Invalidate`].
    Bind = 4,
    /// Forget the translations of address space `count` for `length` bytes of virtual addresses from `dst.address` on
    /// (aperture 0, 4 KiB aligned both), or all of its translations with `length` 0. Completes when no access made with
    /// one of them is under way any more.
    Invalidate = 5,
    /// Run the [`Job`](super::job::Job) at `src` in address space `count`. A page fault stalls the channel until a
    /// replay or a cancel.
    Access = 6,
}

impl Opcode {
    /// The opcode with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Nop),
            1 => Some(Self::Copy),
            2 => Some(Self::Fill),
            3 => Some(Self::CopyList),
            4 => Some(Self::Bind),
            5 => Some(Self::Invalidate),
            6 => Some(Self::Access),
            _ => None,
        }
    }
}

/// Which memory an address belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aperture {
    /// Guest memory, by DMA address.
    System,
    /// The executing GPU's VRAM, by offset.
    Vram,
    /// The VRAM of the GPU with this index ([`GPU_INDEX`](super::regs::GPU_INDEX)), by offset.
    Peer(u8),
}

impl Aperture {
    const PEER0: u8 = 0x10;

    /// The encoding in descriptors and scatter lists.
    pub const fn to_u8(self) -> u8 {
        match self {
            Self::System => 0,
            Self::Vram => 1,
            Self::Peer(gpu) => Self::PEER0 + (gpu & 0xf),
        }
    }
    /// The aperture with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::System),
            1 => Some(Self::Vram),
            Self::PEER0..=0x1f => Some(Self::Peer(value - Self::PEER0)),
            _ => None,
        }
    }
}

/// An address and the memory it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Which memory.
    pub aperture: Aperture,
    /// DMA address, or offset in VRAM.
    pub address: u64,
}

impl Location {
    /// Guest memory at DMA address `address`.
    pub const fn system(address: u64) -> Self {
        Self { aperture: Aperture::System, address }
    }
    /// The executing GPU's VRAM at offset `address`.
    pub const fn vram(address: u64) -> Self {
        Self { aperture: Aperture::Vram, address }
    }
    /// The VRAM of GPU `gpu` at offset `address`.
    pub const fn peer(gpu: u8, address: u64) -> Self {
        Self { aperture: Aperture::Peer(gpu), address }
    }
}

/// How a fence ended; the code in a fence slot and in `CH_STATUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// The work is done.
    Ok = 0,
    /// Unknown opcode, unknown flag, or a reserved field that is not zero.
    BadDescriptor = 1,
    /// An aperture that does not exist, or a VRAM range outside it.
    BadAddress = 2,
    /// A DMA address range that is not mapped (or not writable).
    DmaFault = 3,
    /// A scatter list that is too long or that cannot be read.
    BadList = 4,
    /// The channel was reset before the descriptor completed.
    Aborted = 5,
    /// A failure that the chaos plan asked for.
    Injected = 6,
    /// A page fault of a job that software cancelled.
    PageFault = 7,
    /// VRAM that the chaos plan poisoned was read.
    Poisoned = 8,
    /// A job that contradicts itself or cannot be read, or an address space that does not exist or has no page table.
    BadJob = 9,
}

impl Status {
    /// The status with this encoding, if there is one.
    pub const fn from_u32(value: u32) -> Option<Self> {
        match value {
            0 => Some(Self::Ok),
            1 => Some(Self::BadDescriptor),
            2 => Some(Self::BadAddress),
            3 => Some(Self::DmaFault),
            4 => Some(Self::BadList),
            5 => Some(Self::Aborted),
            6 => Some(Self::Injected),
            7 => Some(Self::PageFault),
            8 => Some(Self::Poisoned),
            9 => Some(Self::BadJob),
            _ => None,
        }
    }
}

/// Flag of a descriptor: write the fence slot on completion. Without it, the outcome shows only in the statistics.
pub const FLAG_FENCE: u8 = 1 << 0;
/// Flag of a descriptor: raise the channel's interrupt after the fence.
pub const FLAG_IRQ: u8 = 1 << 1;
/// Flag of a descriptor with both of the others: raise the interrupt only if somebody waits for it, i.e. if the word at
/// [`FENCE_ARM`] of the fence slot is not zero once the fence is written.
pub const FLAG_IRQ_ARMED: u8 = 1 << 2;

/// One ring entry, decoded. On the wire: eight little-endian `u64` words.
///
/// | word | bits  | field |
/// |------|-------|-------|
/// | 0    | 7:0   | opcode |
/// | 0    | 15:8  | flags |
/// | 0    | 23:16 | source aperture |
/// | 0    | 31:24 | destination aperture |
/// | 0    | 63:32 | count (entries of a scatter list, or ASID) |
/// | 1    |       | source address, or DMA address of the scatter list |
/// | 2    |       | destination address |
/// | 3    |       | length in bytes |
/// | 4    |       | DMA address of the fence slot, 16-byte aligned |
/// | 5    |       | fence value |
/// | 6    |       | fill pattern |
/// | 7    |       | reserved, zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// What to do.
    pub opcode: Opcode,
    /// [`FLAG_FENCE`], [`FLAG_IRQ`], [`FLAG_IRQ_ARMED`].
    pub flags: u8,
    /// Number of scatter-list entries for [`Opcode::CopyList`]; ASID for [`Opcode::Bind`], [`Opcode::Invalidate`] and
    /// [`Opcode::Access`]; zero for the others.
    pub count: u32,
    /// Source; for [`Opcode::CopyList`] the list itself, in [`Aperture::System`].
    pub src: Location,
    /// Destination.
    pub dst: Location,
    /// Length in bytes.
    pub length: u64,
    /// DMA address of the fence slot.
    pub fence_address: u64,
    /// Value to write there.
    pub fence_value: u64,
    /// What [`Opcode::Fill`] writes.
    pub pattern: u64,
}

impl Descriptor {
    /// A descriptor that does nothing.
    pub const NOP: Self = Self {
        opcode: Opcode::Nop,
        flags: 0,
        count: 0,
        src: Location::system(0),
        dst: Location::system(0),
        length: 0,
        fence_address: 0,
        fence_value: 0,
        pattern: 0,
    };

    /// Copies `length` bytes.
    pub const fn copy(src: Location, dst: Location, length: u64) -> Self {
        Self { opcode: Opcode::Copy, src, dst, length, ..Self::NOP }
    }
    /// Fills `length` bytes at `dst` with `pattern`.
    pub const fn fill(dst: Location, length: u64, pattern: u64) -> Self {
        Self { opcode: Opcode::Fill, dst, length, pattern, ..Self::NOP }
    }
    /// Copies the `count` entries of the scatter list at DMA address `list`.
    pub const fn copy_list(list: u64, count: u32) -> Self {
        Self { opcode: Opcode::CopyList, src: Location::system(list), count, ..Self::NOP }
    }
    /// The same, completing with `value` in the fence slot at DMA address `address`, with an interrupt if `irq`.
    pub const fn with_fence(mut self, address: u64, value: u64, irq: bool) -> Self {
        self.flags = FLAG_FENCE | if irq { FLAG_IRQ } else { 0 };
        self.fence_address = address;
        self.fence_value = value;
        self
    }

    /// The same with an interrupt only for a waiter that has armed the fence slot.
    pub const fn with_armed_fence(self, address: u64, value: u64) -> Self {
        let mut this = self.with_fence(address, value, true);
        this.flags |= FLAG_IRQ_ARMED;
        this
    }

    /// The eight words of the ring entry.
    pub const fn to_words(self) -> [u64; 8] {
        [
            self.opcode as u64
                | (self.flags as u64) << 8
                | (self.src.aperture.to_u8() as u64) << 16
                | (self.dst.aperture.to_u8() as u64) << 24
                | (self.count as u64) << 32,
            self.src.address,
            self.dst.address,
            self.length,
            self.fence_address,
            self.fence_value,
            self.pattern,
            0,
        ]
    }

    /// Decodes a ring entry.
    ///
    /// # Errors
    /// [`Status::BadDescriptor`] for an unknown opcode, aperture or flag, flags that do not go together, a fence slot that
    /// is not aligned, or a reserved word that is not zero. Ranges are the device's to check.
    pub const fn from_words(w: [u64; 8]) -> Result<Self, Status> {
        let flags = (w[0] >> 8) as u8;
        let (Some(opcode), Some(src), Some(dst)) = (
            Opcode::from_u8(w[0] as u8),
            Aperture::from_u8((w[0] >> 16) as u8),
            Aperture::from_u8((w[0] >> 24) as u8),
        ) else {
            return Err(Status::BadDescriptor);
        };
        let armed = FLAG_FENCE | FLAG_IRQ | FLAG_IRQ_ARMED;
        if flags & !armed != 0 || flags & FLAG_IRQ_ARMED != 0 && flags != armed {
            return Err(Status::BadDescriptor);
        }
        if w[7] != 0 || !w[4].is_multiple_of(FENCE_SIZE as u64) {
            return Err(Status::BadDescriptor);
        }
        Ok(Self {
            opcode,
            flags,
            count: (w[0] >> 32) as u32,
            src: Location { aperture: src, address: w[1] },
            dst: Location { aperture: dst, address: w[2] },
            length: w[3],
            fence_address: w[4],
            fence_value: w[5],
            pattern: w[6],
        })
    }
}

/// The fence a broken descriptor asks for, so that even garbage ends in an error fence: address and value, if its
/// fence flag is set and the address is aligned.
pub const fn fence_of_words(w: [u64; 8]) -> Option<(u64, u64)> {
    if (w[0] >> 8) as u8 & FLAG_FENCE != 0 && w[4].is_multiple_of(FENCE_SIZE as u64) {
        Some((w[4], w[5]))
    } else {
        None
    }
}

/// One entry of a scatter list. On the wire: four little-endian `u64` words.
///
/// | word | bits  | field |
/// |------|-------|-------|
/// | 0    |       | source address |
/// | 1    |       | destination address |
/// | 2    | 31:0  | length in bytes |
/// | 2    | 39:32 | source aperture |
/// | 2    | 47:40 | destination aperture |
/// | 2    | 63:48 | reserved, zero |
/// | 3    |       | reserved, zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SgEntry {
    /// Source.
    pub src: Location,
    /// Destination.
    pub dst: Location,
    /// Length in bytes.
    pub length: u32,
}

impl SgEntry {
    /// The four words of the entry.
    pub const fn to_words(self) -> [u64; 4] {
        [
            self.src.address,
            self.dst.address,
            self.length as u64
                | (self.src.aperture.to_u8() as u64) << 32
                | (self.dst.aperture.to_u8() as u64) << 40,
            0,
        ]
    }

    /// Decodes an entry.
    ///
    /// # Errors
    /// [`Status::BadList`] for an unknown aperture or a reserved field that is not zero.
    pub const fn from_words(w: [u64; 4]) -> Result<Self, Status> {
        let (Some(src), Some(dst)) =
            (Aperture::from_u8((w[2] >> 32) as u8), Aperture::from_u8((w[2] >> 40) as u8))
        else {
            return Err(Status::BadList);
        };
        if w[2] >> 48 != 0 || w[3] != 0 {
            return Err(Status::BadList);
        }
        Ok(Self {
            src: Location { aperture: src, address: w[0] },
            dst: Location { aperture: dst, address: w[1] },
            length: w[2] as u32,
        })
    }
}

/// A fence slot in memory: `u64` value, then `u32` [`Status`], then the `u32` at [`FENCE_ARM`]. The device writes the status
/// first and the value last, with release order: a reader that sees the value it waits for (with acquire order) sees
/// the status and the data too.
pub const FENCE_VALUE: usize = 0;
/// Offset of the status in a fence slot.
pub const FENCE_STATUS: usize = 8;
/// Offset in a fence slot of a `u32` that the driver alone writes: not zero while somebody sleeps until the interrupt. The
/// device reads it after a full barrier that follows its store of the value; who arms the slot must look at the value
/// after a full barrier that follows his store, and may sleep if it is not there.
pub const FENCE_ARM: usize = 12;

// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Register file of the hsgpu (BAR 0).
//!
//! Every register is 32 bits wide, little-endian, and accessed with naturally aligned 32-bit accesses. A 64-bit
//! quantity is a pair `_LO`, `_HI`. Reads of offsets that hold no register give 0, writes there do nothing; the
//! device counts both. A device that is *dead* reads as all ones everywhere.

/// What software may do with a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads give the value, writes are ignored (and counted).
    ReadOnly,
    /// Reads give what was last written.
    ReadWrite,
    /// Writes act, reads give 0.
    WriteOnly,
}

/// One row of the register table.
#[derive(Clone, Copy, Debug)]
pub struct Register {
    /// Name, as in the hardware manual.
    pub name: &'static str,
    /// Offset in bytes, from BAR 0 or from the channel's block.
    pub offset: usize,
    /// What software may do with it.
    pub access: Access,
    /// First sentence of its description.
    pub doc: &'static str,
}

macro_rules! registers {
    ($(#[$table_doc:meta])* $table:ident: $( #[doc = $doc:literal] $name:ident = $offset:literal, $access:ident; )*) => {
        $( #[doc = $doc] pub const $name: usize = $offset; )*
        $(#[$table_doc])*
        pub const $table: &[Register] = &[
            $( Register { name: stringify!($name), offset: $offset, access: Access::$access, doc: $doc }, )*
        ];
    };
}

registers! {
    /// The registers of the device as a whole.
    GLOBAL:
    #[doc = "Identification: always [`ID_MAGIC`]."]
    ID = 0x000, ReadOnly;
    #[doc = "Interface version: major in bits 31:16, minor in bits 15:0; see [`INTERFACE_VERSION`]."]
    VERSION = 0x004, ReadOnly;
    #[doc = "Capabilities; see [`Caps`]."]
    CAPS = 0x008, ReadOnly;
    #[doc = "Device status; see [`STATUS_READY`]."]
    STATUS = 0x00c, ReadOnly;
    #[doc = "Device control: writing [`CONTROL_RESET`] resets every channel; the bit reads as 0."]
    CONTROL = 0x010, ReadWrite;
    #[doc = "Position of this GPU among the GPUs of its process."]
    GPU_INDEX = 0x014, ReadOnly;
    #[doc = "Number of GPUs that can address each other's VRAM, this one included."]
    GPU_COUNT = 0x018, ReadOnly;
    #[doc = "VRAM size in bytes, low half."]
    VRAM_SIZE_LO = 0x020, ReadOnly;
    #[doc = "VRAM size in bytes, high half."]
    VRAM_SIZE_HI = 0x024, ReadOnly;
    #[doc = "Bytes of VRAM that BAR 2 shows, low half; may be less than the VRAM."]
    VRAM_APERTURE_LO = 0x028, ReadOnly;
    #[doc = "Bytes of VRAM that BAR 2 shows, high half."]
    VRAM_APERTURE_HI = 0x02c, ReadOnly;
    #[doc = "DMA address of the fault buffer, low half; 4 KiB aligned; writable while the buffer is disabled."]
    FAULT_RING_LO = 0x040, ReadWrite;
    #[doc = "DMA address of the fault buffer, high half."]
    FAULT_RING_HI = 0x044, ReadWrite;
    #[doc = "Log2 of the fault buffer's entries, [`FAULT_ORDER_MIN`](super::mmu::FAULT_ORDER_MIN) to [`FAULT_ORDER_MAX`](super::mmu::FAULT_ORDER_MAX); writable while disabled."]
    FAULT_ORDER = 0x048, ReadWrite;
    #[doc = "DMA address of the fault shadow page, low half; 4 KiB aligned; writable while disabled."]
    FAULT_SHADOW_LO = 0x050, ReadWrite;
    #[doc = "DMA address of the fault shadow page, high half."]
    FAULT_SHADOW_HI = 0x054, ReadWrite;
    #[doc = "Fault buffer control: [`FAULT_CONTROL_ENABLE`]; without a fault buffer, faults end their jobs at once."]
    FAULT_CONTROL = 0x058, ReadWrite;
    #[doc = "Replay: writing 1 makes every job that stalled on a fault look again; of a synchronous device, it is answered when they are done or have stalled again."]
    FAULT_REPLAY = 0x060, WriteOnly;
    #[doc = "Cancel: the sequence number of a fault whose jobs end with [`Status::PageFault`](super::ring::Status::PageFault)."]
    FAULT_CANCEL = 0x064, WriteOnly;
}

/// Offset of channel 0's register block.
pub const CHANNEL_BASE: usize = 0x1000;
/// Distance between the blocks of two channels.
pub const CHANNEL_STRIDE: usize = 0x100;

/// Offset in BAR 0 of register `reg` (one of [`CHANNEL`]) of channel `channel`.
pub const fn channel_reg(channel: usize, reg: usize) -> usize {
    CHANNEL_BASE + channel * CHANNEL_STRIDE + reg
}

registers! {
    /// The registers of one channel, relative to its block; see [`channel_reg`].
    CHANNEL:
    #[doc = "DMA address of the descriptor ring, low half; 4 KiB aligned; writable while disabled."]
    CH_RING_LO = 0x00, ReadWrite;
    #[doc = "DMA address of the descriptor ring, high half."]
    CH_RING_HI = 0x04, ReadWrite;
    #[doc = "Log2 of the ring's entries, [`RING_ORDER_MIN`](super::ring::RING_ORDER_MIN) to [`RING_ORDER_MAX`](super::ring::RING_ORDER_MAX); writable while disabled."]
    CH_RING_ORDER = 0x08, ReadWrite;
    #[doc = "DMA address of the shadow page, low half; 4 KiB aligned; writable while disabled."]
    CH_SHADOW_LO = 0x10, ReadWrite;
    #[doc = "DMA address of the shadow page, high half."]
    CH_SHADOW_HI = 0x14, ReadWrite;
    #[doc = "Channel control: [`CH_CONTROL_ENABLE`] and [`CH_CONTROL_RESET`]."]
    CH_CONTROL = 0x18, ReadWrite;
    #[doc = "Channel status: [`CH_STATUS_ENABLED`], [`CH_STATUS_HALTED`], and in bits 15:8 the [`Status`](super::ring::Status) that halted it."]
    CH_STATUS = 0x1c, ReadOnly;
    #[doc = "Doorbell: the free-running tail; only needed when the shadow page says that the channel sleeps."]
    CH_DOORBELL = 0x20, WriteOnly;
}

/// Value of [`ID`]: the bytes `HSGP` in memory order.
pub const ID_MAGIC: u32 = u32::from_le_bytes(*b"HSGP");
/// Value of [`VERSION`] that this description belongs to.
pub const INTERFACE_VERSION: u32 = 2 << 16 | 1;

/// Bit of [`STATUS`]: the device is up and answers.
pub const STATUS_READY: u32 = 1 << 0;
/// Bit of [`CONTROL`]: reset all channels.
pub const CONTROL_RESET: u32 = 1 << 0;
/// Bit of [`FAULT_CONTROL`]: report faults; setting it latches buffer and shadow page and starts at index 0, clearing it
/// cancels what is stalled.
pub const FAULT_CONTROL_ENABLE: u32 = 1 << 0;
/// Bit of [`CH_CONTROL`]: run the channel; setting it latches ring and shadow page and starts at index 0.
pub const CH_CONTROL_ENABLE: u32 = 1 << 0;
/// Bit of [`CH_CONTROL`]: stop the channel, abort what it holds (fences complete with `Aborted`), clear the rest.
/// The write is answered when nothing of the channel touches memory any more. Reads as 0.
pub const CH_CONTROL_RESET: u32 = 1 << 1;
/// Bit of [`CH_STATUS`]: the channel runs.
pub const CH_STATUS_ENABLED: u32 = 1 << 0;
/// Bit of [`CH_STATUS`]: the channel met a ring it cannot read and waits for a reset.
pub const CH_STATUS_HALTED: u32 = 1 << 1;
/// Bit of [`CH_STATUS`]: a job of the channel stalls on a page fault.
pub const CH_STATUS_STALLED: u32 = 1 << 2;
/// Lowest bit of the status code in [`CH_STATUS`].
pub const CH_STATUS_CODE_SHIFT: u32 = 8;

/// The fields of [`CAPS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps(pub u32);

impl Caps {
    /// A device with `channels` channels and `spaces` address spaces; `synchronous` if a doorbell returns with the
    /// work done.
    pub const fn new(channels: u8, spaces: u8, synchronous: bool) -> Self {
        Self(channels as u32 | (synchronous as u32) << 8 | (spaces as u32) << 16)
    }
    /// Number of channels.
    pub const fn channels(self) -> u8 {
        self.0 as u8
    }
    /// Number of address spaces.
    pub const fn spaces(self) -> u8 {
        (self.0 >> 16) as u8
    }
    /// Whether the write of a doorbell returns only when every descriptor before the new tail has completed, or a job
    /// among them stalls on a page fault, so that fences and faults are in memory by then. Such a device sends no completion interrupts: an interrupt would reach
    /// the guest at a moment that the host's clock chooses.
    pub const fn synchronous(self) -> bool {
        self.0 & (1 << 8) != 0
    }
}

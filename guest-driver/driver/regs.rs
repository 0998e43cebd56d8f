// SPDX-License-Identifier: GPL-2.0

//! Typed access to the registers of BAR 0.
//!
//! Offsets, bits and their meaning are those of [`crate::abi::regs`], which the device model compiles too. Nothing
//! outside this file names an offset.

use kernel::{
    fmt,
    pci,
    prelude::*, //
};

use crate::{
    abi::{
        pci::BAR_REGS_SIZE,
        regs::{
            self,
            Caps, //
        },
        ring::Status, //
    },
    compat::bar, //
};

/// The mapped register BAR.
pub(crate) type Bar0 = pci::Bar<BAR_REGS_SIZE>;

/// The registers of the device as a whole.
#[derive(Clone, Copy)]
pub(crate) struct Regs<'a>(&'a Bar0);

/// What every register of a device reads as that does not answer any more.
const DEAD: u32 = u32::MAX;

impl<'a> Regs<'a> {
    /// The registers behind `bar`.
    pub(crate) fn new(bar: &'a Bar0) -> Self {
        Self(bar)
    }

    /// The identification register; [`regs::ID_MAGIC`] for a live hsgpu.
    pub(crate) fn id(self) -> u32 {
        bar::read32(self.0, regs::ID)
    }

    /// Interface version: major in bits 31:16, minor in bits 15:0.
    pub(crate) fn version(self) -> u32 {
        bar::read32(self.0, regs::VERSION)
    }

    /// Capabilities.
    pub(crate) fn caps(self) -> Caps {
        Caps(bar::read32(self.0, regs::CAPS))
    }

    /// Whether the device says that it is up.
    pub(crate) fn is_ready(self) -> bool {
        let status = bar::read32(self.0, regs::STATUS);

        status != DEAD && status & regs::STATUS_READY != 0
    }

    /// Position of this GPU among those of its process; also its address as a peer.
    pub(crate) fn gpu_index(self) -> u32 {
        bar::read32(self.0, regs::GPU_INDEX)
    }

    /// Size of VRAM in bytes.
    pub(crate) fn vram_size(self) -> u64 {
        let low = bar::read32(self.0, regs::VRAM_SIZE_LO);
        let high = bar::read32(self.0, regs::VRAM_SIZE_HI);

        u64::from(high) << 32 | u64::from(low)
    }

    /// Number of GPUs that can address each other, this one included.
    pub(crate) fn gpu_count(self) -> u32 {
        bar::read32(self.0, regs::GPU_COUNT)
    }

    /// Bytes of VRAM that BAR 2 shows.
    pub(crate) fn vram_aperture(self) -> u64 {
        let low = bar::read32(self.0, regs::VRAM_APERTURE_LO);
        let high = bar::read32(self.0, regs::VRAM_APERTURE_HI);

        u64::from(high) << 32 | u64::from(low)
    }

    /// Resets every channel; returns when nothing of the device touches memory any more.
    ///
    /// # Errors
    ///
    /// `EIO` if the device does not come back ready.
    pub(crate) fn reset(self) -> Result {
        bar::write32(self.0, regs::CONTROL_RESET, regs::CONTROL);
        // The read also flushes the posted write.
        if self.is_ready() {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Starts the fault buffer: `ring` and `shadow` are 4 KiB aligned DMA addresses, `order` is the log2 of the buffer's
    /// entries. It must be disabled.
    ///
    /// # Errors
    ///
    /// `EIO` if it does not run afterwards.
    pub(crate) fn enable_faults(self, ring: u64, order: u32, shadow: u64) -> Result {
        self.write_pair(regs::FAULT_RING_LO, ring);
        bar::write32(self.0, order, regs::FAULT_ORDER);
        self.write_pair(regs::FAULT_SHADOW_LO, shadow);
        bar::write32(self.0, regs::FAULT_CONTROL_ENABLE, regs::FAULT_CONTROL);

        match bar::read32(self.0, regs::FAULT_CONTROL) {
            DEAD => Err(EIO),
            control if control & regs::FAULT_CONTROL_ENABLE != 0 => Ok(()),
            _ => Err(EIO),
        }
    }

    /// Lets every job that stalled on a fault look again. Of a synchronous device, this returns when they are done or
    /// have stalled again.
    pub(crate) fn replay_faults(self) {
        bar::write32(self.0, 1, regs::FAULT_REPLAY);
    }

    /// Ends the jobs that stalled on the fault with this sequence number.
    pub(crate) fn cancel_fault(self, sequence: u32) {
        bar::write32(self.0, sequence, regs::FAULT_CANCEL);
    }

    /// Writes the two halves of a register pair, of which the low one is at `low`.
    fn write_pair(self, low: usize, value: u64) {
        // The pairs of this register file are inside the BAR, so that neither can fail.
        // CAST: the two halves of the value.
        let _ = bar::try_write32(self.0, value as u32, low);
        let _ = bar::try_write32(self.0, (value >> 32) as u32, low + size_of::<u32>());
    }

    /// The registers of channel `index`.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the block of that channel is not inside the BAR.
    pub(crate) fn channel(self, index: usize) -> Result<ChannelRegs<'a>> {
        let end = regs::channel_reg(index.checked_add(1).ok_or(EINVAL)?, 0);

        if end > BAR_REGS_SIZE {
            return Err(EINVAL);
        }
        Ok(ChannelRegs { bar: self.0, index })
    }
}

/// The registers of one channel.
///
/// # Invariants
///
/// The block of channel `index` is inside the BAR.
#[derive(Clone, Copy)]
pub(crate) struct ChannelRegs<'a> {
    bar: &'a Bar0,
    index: usize,
}

impl ChannelRegs<'_> {
    fn read(self, reg: usize) -> u32 {
        // The invariant makes the error impossible; a dead device is the answer that callers handle anyway.
        bar::try_read32(self.bar, regs::channel_reg(self.index, reg)).unwrap_or(DEAD)
    }

    fn write(self, reg: usize, value: u32) {
        // By the invariant, the offset is inside the BAR, so that this cannot fail.
        let _ = bar::try_write32(self.bar, value, regs::channel_reg(self.index, reg));
    }

    fn write_pair(self, low: usize, high: usize, value: u64) {
        // CAST: the two halves of the value.
        self.write(low, value as u32);
        self.write(high, (value >> 32) as u32);
    }

    /// Sets ring (4 KiB aligned DMA address, log2 of its entries) and shadow page, and starts the channel at index 0.
    /// The channel must have been reset before.
    ///
    /// # Errors
    ///
    /// `EIO` if the channel does not run afterwards.
    pub(crate) fn enable(self, ring: u64, order: u32, shadow: u64) -> Result {
        self.write_pair(regs::CH_RING_LO, regs::CH_RING_HI, ring);
        self.write(regs::CH_RING_ORDER, order);
        self.write_pair(regs::CH_SHADOW_LO, regs::CH_SHADOW_HI, shadow);
        self.write(regs::CH_CONTROL, regs::CH_CONTROL_ENABLE);

        let status = self.status();
        if status.is_enabled() {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Stops the channel, aborts what it holds and clears it; returns when nothing of it touches memory any more.
    ///
    /// # Errors
    ///
    /// `EIO` if the channel does not say that it stopped: then it must be assumed to write to memory still.
    pub(crate) fn reset(self) -> Result {
        self.write(regs::CH_CONTROL, regs::CH_CONTROL_RESET);

        // The read also flushes the posted write.
        let status = self.status();
        if status.is_dead() || !status.is_enabled() {
            // A dead device answers nothing and does no DMA either.
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// What the channel says about itself.
    pub(crate) fn status(self) -> ChannelStatus {
        ChannelStatus(self.read(regs::CH_STATUS))
    }

    /// Wakes the channel, whose free-running tail is now `tail`. The write is ordered after all earlier stores.
    pub(crate) fn doorbell(self, tail: u32) {
        self.write(regs::CH_DOORBELL, tail);
    }
}

/// Value of a channel's status register.
#[derive(Clone, Copy)]
pub(crate) struct ChannelStatus(u32);

impl ChannelStatus {
    /// Whether the whole device is dead.
    pub(crate) fn is_dead(self) -> bool {
        self.0 == DEAD
    }

    /// Whether a job of the channel waits for a page fault to be served.
    pub(crate) fn is_stalled(self) -> bool {
        !self.is_dead() && self.0 & regs::CH_STATUS_STALLED != 0
    }

    /// Whether the channel runs.
    pub(crate) fn is_enabled(self) -> bool {
        !self.is_dead() && self.0 & regs::CH_STATUS_ENABLED != 0
    }
}

impl fmt::Display for ChannelStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_dead() {
            return f.write_str("device dead");
        }
        f.write_str(if self.is_enabled() {
            "enabled"
        } else {
            "disabled"
        })?;
        if self.0 & regs::CH_STATUS_HALTED != 0 {
            let code = self.0 >> regs::CH_STATUS_CODE_SHIFT & 0xff;

            match Status::from_u32(code) {
                Some(status) => write!(f, ", halted: {status:?}")?,
                None => write!(f, ", halted: code {code}")?,
            }
        }
        Ok(())
    }
}

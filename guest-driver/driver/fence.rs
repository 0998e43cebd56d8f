// SPDX-License-Identifier: GPL-2.0

//! Fence slots: where the device says that a descriptor is done, and the driver whether somebody sleeps until then.
//!
//! A slot is owned by one job at a time ([`crate::channel`]). The device writes the status first and the value last,
//! both with release order. So a reader that sees the value it waits for, and then orders its reads, sees the status
//! and the data of the job too. Values are never used twice on a channel, so that a stale one cannot be mistaken.

use kernel::{
    device::{
        Bound,
        Device, //
    },
    prelude::*,
    sync::barrier::{
        dma_rmb,
        mb, //
    }, //
};

use crate::{
    abi::ring::{
        Status,
        FENCE_ARM,
        FENCE_SIZE,
        FENCE_STATUS,
        FENCE_VALUE, //
    },
    compat::CoherentArray, //
};

const WORD: usize = size_of::<u32>();
const SLOT_WORDS: usize = FENCE_SIZE / WORD;

/// The fence slots of a channel, in coherent memory.
pub(crate) struct Fences {
    words: CoherentArray<u32>,
}

impl Fences {
    /// Allocates `count` slots.
    pub(crate) fn new(dev: &Device<Bound>, count: usize) -> Result<Self> {
        Ok(Self {
            // Zeroed memory; fence values start at 1.
            words: CoherentArray::new(dev, count * SLOT_WORDS)?,
        })
    }

    /// The DMA address of a slot.
    pub(crate) fn dma_address(&self, slot: usize) -> Result<u64> {
        self.words.dma_handle_at(slot * SLOT_WORDS)
    }

    /// How the job that asked for `value` in `slot` ended, or `None` if it has not yet. The inner error is a status
    /// code that this driver does not know.
    ///
    /// After `Some`, everything that the device wrote for the job can be read.
    pub(crate) fn poll(&self, slot: usize, value: u64) -> Option<Result<Status, u32>> {
        let base = slot * SLOT_WORDS;
        let at = base + FENCE_VALUE / WORD;

        // The device stores both halves at once. One of them differs from that of the value before, so that the new
        // value is there if both are found.
        //
        // CAST: the two halves of the value.
        if u32::from_le(self.words.get(at).ok()?) != value as u32
            || u32::from_le(self.words.get(at + 1).ok()?) != (value >> 32) as u32
        {
            return None;
        }
        dma_rmb();
        let code = u32::from_le(self.words.get(base + FENCE_STATUS / WORD).ok()?);

        Some(Status::from_u32(code).ok_or(code))
    }

    /// Asks for the interrupt of the job in `slot`. Who sleeps until then must look once more before: the fence may have
    /// been written without an interrupt.
    pub(crate) fn arm(&self, slot: usize) {
        self.set_arm(slot, 1);
        // The device stores the value before it looks at this word: of the two, one is seen by the other side.
        mb();
    }

    /// Takes that back; before the next job is published in `slot`.
    pub(crate) fn disarm(&self, slot: usize) {
        self.set_arm(slot, 0);
    }

    fn set_arm(&self, slot: usize, value: u32) {
        // The word of a slot that exists is in the array.
        let _ = self
            .words
            .set(slot * SLOT_WORDS + FENCE_ARM / WORD, value.to_le());
    }
}

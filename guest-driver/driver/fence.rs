// SPDX-License-Identifier: GPL-2.0

//! Fence slots: where the device says that a descriptor is done.
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
    sync::barrier::dma_rmb, //
};

use crate::{
    abi::ring::{
        Status,
        FENCE_SIZE,
        FENCE_STATUS,
        FENCE_VALUE, //
    },
    compat::CoherentArray, //
};

const WORD: usize = size_of::<u64>();
const SLOT_WORDS: usize = FENCE_SIZE / WORD;

/// The fence slots of a channel, in coherent memory.
pub(crate) struct Fences {
    words: CoherentArray<u64>,
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

        if u64::from_le(self.words.get(base + FENCE_VALUE / WORD).ok()?) != value {
            return None;
        }
        dma_rmb();
        // CAST: the status is the low half of its word.
        let code = u64::from_le(self.words.get(base + FENCE_STATUS / WORD).ok()?) as u32;

        Some(Status::from_u32(code).ok_or(code))
    }
}

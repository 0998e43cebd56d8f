//! One channel of the GPU, driven by hand: ring, shadow page, fences. The order of loads and stores is the hardware
//! manual's (docs/hardware.md, "Channels").

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::fence;
use std::time::Duration;

use hmmstorm_abi::regs::{
    CH_CONTROL, CH_CONTROL_ENABLE, CH_CONTROL_RESET, CH_DOORBELL, CH_RING_HI, CH_RING_LO, CH_RING_ORDER,
    CH_SHADOW_HI, CH_SHADOW_LO, CH_STATUS, CH_STATUS_ENABLED, channel_reg,
};
use hmmstorm_abi::ring::{
    DESCRIPTOR_SIZE, Descriptor, FENCE_SIZE, FENCE_STATUS, FENCE_VALUE, SHADOW_EVENT, SHADOW_HEAD,
    SHADOW_TAIL, Status, needs_doorbell,
};
use hmmstorm_abi::uapi::PAGE_SIZE;

use super::Bar0;
use crate::clock::poll;
use crate::scenario::WorkError;
use crate::sys::vfio::Dma;

/// Bytes of a cell of the memory.
const CELL: usize = size_of::<u64>();
/// Log2 of the ring's entries: one page of them.
pub(super) const ORDER: u32 = (PAGE_SIZE / DESCRIPTOR_SIZE).trailing_zeros();
/// Entries of the ring.
pub(super) const ENTRIES: u32 = 1 << ORDER;
/// Fence slots, one page of them.
const FENCES: u64 = (PAGE_SIZE / FENCE_SIZE) as u64;
/// Pages that a channel needs: ring, shadow page, fences.
pub(super) const PAGES: usize = 3;
/// Guest time that a fence may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A channel that runs.
#[derive(Debug)]
pub(super) struct Channel<'a> {
    bar: Bar0<'a>,
    number: usize,
    memory: &'a Dma<'a>,
    /// First of its pages in `memory`.
    first: usize,
    tail: u32,
    /// Descriptors submitted since the start; the next fence's value is one more.
    submitted: u64,
}

impl<'a> Channel<'a> {
    /// Resets channel `number` and starts it on the pages `first..first + PAGES` of `memory`.
    ///
    /// # Errors
    /// [`WorkError::Condition`] if it does not run then.
    pub(super) fn start(
        bar: Bar0<'a>,
        number: usize,
        memory: &'a Dma<'a>,
        first: usize,
    ) -> Result<Self, WorkError> {
        let channel = Self { bar, number, memory, first, tail: 0, submitted: 0 };
        channel.write(CH_CONTROL, CH_CONTROL_RESET)?;
        for page in first..first + PAGES {
            for cell in memory.memory().page(page) {
                cell.store(0, Relaxed);
            }
        }
        let (ring, shadow) = (memory.page(first), memory.page(first + 1));
        channel.write(CH_RING_LO, ring as u32)?;
        channel.write(CH_RING_HI, (ring >> 32) as u32)?;
        channel.write(CH_RING_ORDER, ORDER)?;
        channel.write(CH_SHADOW_LO, shadow as u32)?;
        channel.write(CH_SHADOW_HI, (shadow >> 32) as u32)?;
        channel.write(CH_CONTROL, CH_CONTROL_ENABLE)?;
        match channel.status()? {
            CH_STATUS_ENABLED => Ok(channel),
            status => Err(WorkError::Condition(format!(
                "channel {number} does not start on ring {ring:#x}, shadow page {shadow:#x}: status {status:#x}"
            ))),
        }
    }

    fn write(&self, register: usize, value: u32) -> Result<(), WorkError> {
        self.bar.write(channel_reg(self.number, register), value)
    }

    /// The status register.
    pub(super) fn status(&self) -> Result<u32, WorkError> {
        self.bar.read(channel_reg(self.number, CH_STATUS))
    }

    /// Descriptors that the device has consumed.
    pub(super) fn head(&self) -> u32 {
        self.shadow(SHADOW_HEAD)
    }

    fn shadow(&self, offset: usize) -> u32 {
        self.memory.memory().page(self.first + 1)[offset / CELL].load(Acquire) as u32
    }

    /// Publishes `descriptor` with a fence of its own, and gives the fence's value. The ring must have room.
    ///
    /// # Errors
    /// Of the doorbell's register.
    pub(super) fn submit(&mut self, descriptor: Descriptor, interrupt: bool) -> Result<u64, WorkError> {
        let value = self.submitted + 1;
        let slot = self.memory.page(self.first + 2) + (value % FENCES) * FENCE_SIZE as u64;
        self.publish(descriptor.with_fence(slot, value, interrupt).to_words())?;
        Ok(value)
    }

    /// Publishes the entry `words`, whatever it is; its fence is to be what [`Channel::submit`] would give it.
    ///
    /// # Errors
    /// Of the doorbell's register.
    pub(super) fn publish(&mut self, words: [u64; 8]) -> Result<(), WorkError> {
        let ring = self.memory.memory().page(self.first);
        let entry = (self.tail % ENTRIES) as usize * words.len();
        for (cell, word) in ring[entry..].iter().zip(words) {
            cell.store(word, Relaxed);
        }
        let old = self.tail;
        self.tail = old.wrapping_add(1);
        self.submitted += 1;
        self.memory.memory().page(self.first + 1)[SHADOW_TAIL / CELL].store(self.tail.into(), Release);
        // The tail must be visible before the event index is looked at.
        fence(SeqCst);
        if needs_doorbell(self.shadow(SHADOW_EVENT), self.tail, old) {
            self.write(CH_DOORBELL, self.tail)?;
        }
        Ok(())
    }

    /// The status in the fence of value `value`, once it is there.
    ///
    /// # Errors
    /// [`WorkError::Condition`] if it never comes, or holds no status.
    pub(super) fn wait(&self, value: u64) -> Result<Status, WorkError> {
        let slot = (value % FENCES) as usize * FENCE_SIZE / CELL;
        let slot = &self.memory.memory().page(self.first + 2)[slot..];
        let there = || (slot[FENCE_VALUE / CELL].load(Acquire) == value).then_some(());
        if poll(LIMIT, there).is_none() {
            return Err(WorkError::Condition(format!(
                "channel {}: fence {value} has not come after {} s; head {}, tail {}, status {:#x}",
                self.number,
                LIMIT.as_secs(),
                self.head(),
                self.tail,
                self.status()?
            )));
        }
        let status = slot[FENCE_STATUS / CELL].load(Relaxed) as u32;
        Status::from_u32(status).ok_or_else(|| {
            WorkError::Condition(format!("fence {value} holds status {status}, which is none"))
        })
    }

    /// Submits `descriptor` and waits until it ended as `expected`.
    ///
    /// # Errors
    /// [`WorkError::Condition`] if it ended otherwise.
    pub(super) fn run(&mut self, descriptor: Descriptor, expected: Status) -> Result<(), WorkError> {
        let value = self.submit(descriptor, false)?;
        self.ended(value, expected, &format!("{descriptor:?}"))
    }

    /// Waits until fence `value`, of what `what` says, ended as `expected`.
    ///
    /// # Errors
    /// [`WorkError::Condition`] if it ended otherwise.
    pub(super) fn ended(&self, value: u64, expected: Status, what: &str) -> Result<(), WorkError> {
        match self.wait(value)? {
            status if status == expected => Ok(()),
            status => Err(WorkError::Condition(format!("{what} ended as {status:?}, not {expected:?}"))),
        }
    }

    /// Resets the channel; the write is answered when it touches no memory any more.
    ///
    /// # Errors
    /// Of the register.
    pub(super) fn reset(&self) -> Result<(), WorkError> {
        self.write(CH_CONTROL, CH_CONTROL_RESET)
    }

    /// What [`Channel::submit`] gives the next descriptor as fence: address and value.
    pub(super) fn next_fence(&self) -> (u64, u64) {
        let value = self.submitted + 1;
        (self.memory.page(self.first + 2) + (value % FENCES) * FENCE_SIZE as u64, value)
    }
}

//! What a channel's thread holds while it executes: the DMA map, given back every now and then, and the ear for a
//! reset.

use std::sync::atomic::{AtomicU8, Ordering};

use super::Failure;
use crate::core::Core;
use crate::guest_memory::DmaGuard;
use crate::reset::Held;

/// Bytes that are moved before the DMA map is released for a moment: some hundred microseconds of copying.
const QUANTUM: u64 = 2 << 20;

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
    /// The GPU.
    pub core: &'a Core,
    /// The channel whose descriptor this is.
    pub channel: u16,
    cancel: &'a Cancel,
    guard: Option<DmaGuard<'a>>,
    left: u64,
}

impl<'a> Session<'a> {
    /// Takes the DMA map.
    pub fn new(core: &'a Core, channel: u16, cancel: &'a Cancel) -> Self {
        Self { core, channel, cancel, guard: Some(core.memory.guard()), left: QUANTUM }
    }

    /// The DMA map.
    pub fn guard(&mut self) -> &DmaGuard<'a> {
        self.guard.get_or_insert_with(|| self.core.memory.guard())
    }

    /// Bytes that may be moved before the next [`Session::moved`].
    pub const fn left(&self) -> u64 {
        self.left
    }

    /// Accounts for `bytes` moved; after a quantum, lets others at the map and looks whether to stop.
    ///
    /// # Errors
    /// [`Failure::Aborted`] if a reset wants the channel.
    pub fn moved(&mut self, bytes: u64) -> Result<(), Failure> {
        self.left = self.left.saturating_sub(bytes);
        if self.left > 0 { Ok(()) } else { self.breathe() }
    }

    /// Lets others at the map and looks whether to stop.
    ///
    /// # Errors
    /// [`Failure::Aborted`] if a reset wants the channel.
    pub fn breathe(&mut self) -> Result<(), Failure> {
        self.left = QUANTUM;
        self.guard = None;
        self.cancel.requested().map_or(Ok(()), |held| Err(Failure::Aborted(held)))
    }
}

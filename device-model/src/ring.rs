//! A channel's ring and shadow page in guest memory, seen from the device.

use std::sync::atomic::{Ordering, fence};

use hmmstorm_abi::ring::{
    DESCRIPTOR_SIZE, RING_ORDER_MAX, RING_ORDER_MIN, SHADOW_EVENT, SHADOW_HEAD, SHADOW_TAIL, Status,
};

use crate::core::Core;
use crate::guest_memory::{DmaFault, DmaGuard};

/// Alignment of ring and shadow page.
const ALIGNMENT: u64 = 4096;

/// Why a channel cannot go on with its ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The driver has not set bus mastering in the PCI command register.
    #[error("bus mastering is off; the driver has to set it in the PCI command register")]
    NotBusMaster,
    /// `CH_RING_ORDER` out of range.
    #[error("ring of 2^{0} entries; allowed are 2^{RING_ORDER_MIN} to 2^{RING_ORDER_MAX}")]
    Order(u32),
    /// An address that is not 4 KiB aligned, or a ring that wraps around.
    #[error(
        "ring at {ring:#x} and shadow page at {shadow:#x} are not both 4 KiB aligned inside the address space"
    )]
    Address {
        /// The ring.
        ring: u64,
        /// The shadow page.
        shadow: u64,
    },
    /// The tail is further ahead of the head than the ring is long.
    #[error("{pending} descriptors published in a ring of {entries}")]
    Overrun {
        /// Tail minus head.
        pending: u32,
        /// Length of the ring.
        entries: u32,
    },
    /// Ring or shadow page cannot be reached.
    #[error("ring or shadow page: {0}")]
    Dma(#[from] DmaFault),
}

impl RingError {
    /// The code that `CH_STATUS` gives for it.
    pub const fn status(self) -> Status {
        match self {
            Self::NotBusMaster | Self::Dma(_) => Status::DmaFault,
            Self::Order(_) | Self::Overrun { .. } => Status::BadDescriptor,
            Self::Address { .. } => Status::BadAddress,
        }
    }
}

/// What the driver writes to a channel's registers before it enables the channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// DMA address of the ring.
    pub ring: u64,
    /// Log2 of its entries.
    pub order: u32,
    /// DMA address of the shadow page.
    pub shadow: u64,
}

/// A ring in use: settings latched, and the index of the next descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    base: u64,
    entries: u32,
    shadow: u64,
    head: u32,
}

impl Ring {
    /// Latches `settings` and starts at index 0: head and event index in the shadow page become 0.
    ///
    /// # Errors
    /// [`RingError`] if the settings make no ring.
    pub fn open(settings: Settings, core: &Core) -> Result<Self, RingError> {
        let Settings { ring, order, shadow } = settings;
        if !(RING_ORDER_MIN..=RING_ORDER_MAX).contains(&order) {
            return Err(RingError::Order(order));
        }
        let entries = 1_u32 << order;
        let bytes = u64::from(entries) * DESCRIPTOR_SIZE as u64;
        let aligned = ring.is_multiple_of(ALIGNMENT) && shadow.is_multiple_of(ALIGNMENT);
        let fits = ring.checked_add(bytes).is_some() && shadow.checked_add(ALIGNMENT).is_some();
        if !aligned || !fits {
            return Err(RingError::Address { ring, shadow });
        }
        let this = Self { base: ring, entries, shadow, head: 0 };
        let guard = this.guard(core)?;
        guard.store_u32(shadow + SHADOW_HEAD as u64, 0)?;
        guard.store_u32(shadow + SHADOW_EVENT as u64, 0)?;
        drop(guard);
        Ok(this)
    }

    /// Index of the next descriptor.
    pub const fn head(&self) -> u32 {
        self.head
    }

    fn guard<'a>(&self, core: &'a Core) -> Result<DmaGuard<'a>, RingError> {
        if core.may_master() { Ok(core.memory.guard()) } else { Err(RingError::NotBusMaster) }
    }

    /// How many descriptors are published and not consumed.
    ///
    /// # Errors
    /// [`RingError`] if the shadow page cannot be read, or names more than the ring holds.
    pub fn pending(&self, core: &Core) -> Result<u32, RingError> {
        self.pending_from(self.head, &self.guard(core)?)
    }

    /// The same, for another idea of the head and under a guard that the caller has.
    ///
    /// # Errors
    /// As [`Ring::pending`].
    pub fn pending_from(&self, head: u32, guard: &DmaGuard<'_>) -> Result<u32, RingError> {
        // Acquire: the descriptors before this tail are visible.
        let tail = guard.load_u32(self.shadow + SHADOW_TAIL as u64)?;
        let pending = tail.wrapping_sub(head);
        if pending > self.entries {
            return Err(RingError::Overrun { pending, entries: self.entries });
        }
        Ok(pending)
    }

    /// The words of the next descriptor, read once: the guest may change them meanwhile, but not what is checked and
    /// executed.
    ///
    /// # Errors
    /// [`RingError::Dma`] if the entry cannot be read.
    pub fn fetch(&self, guard: &DmaGuard<'_>) -> Result<[u64; 8], RingError> {
        let entry = u64::from(self.head % self.entries);
        let mut bytes = [0; DESCRIPTOR_SIZE];
        guard.read(self.base + entry * DESCRIPTOR_SIZE as u64, &mut bytes)?;
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        Ok(words)
    }

    /// Moves on to the next entry and tells the driver that this one is free.
    ///
    /// # Errors
    /// [`RingError::Dma`] if the shadow page cannot be written; the head has moved all the same.
    pub fn consume(&mut self, guard: &DmaGuard<'_>) -> Result<(), RingError> {
        self.head = self.head.wrapping_add(1);
        Ok(guard.store_u32(self.shadow + SHADOW_HEAD as u64, self.head)?)
    }

    /// Asks for a doorbell at the next publication after the tail `at`, and says how far the tail is past the head
    /// now: a publication that came too early to see the request shows here.
    ///
    /// # Errors
    /// As [`Ring::pending`].
    pub fn arm(&self, core: &Core, at: u32) -> Result<u32, RingError> {
        let guard = self.guard(core)?;
        guard.store_u32(self.shadow + SHADOW_EVENT as u64, at)?;
        // Pairs with the driver's full barrier between its store of the tail and its load of the event index: of
        // the two stores, at least one is seen by the other side.
        fence(Ordering::SeqCst);
        self.pending_from(self.head, &guard)
    }
}

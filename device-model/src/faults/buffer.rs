//! The fault buffer in guest memory, seen from the device.

use std::sync::atomic::{Ordering, fence};

use hmmstorm_abi::mmu::{
    FAULT_ORDER_MAX, FAULT_ORDER_MIN, FAULT_SHADOW_EVENT, FAULT_SHADOW_GET, FAULT_SHADOW_OVERFLOW,
    FAULT_SHADOW_PUT, FAULT_SIZE, Fault,
};
use hmmstorm_abi::ring::needs_doorbell;

use crate::core::Core;
use crate::guest_memory::{DmaFault, DmaGuard};

/// Alignment of buffer and shadow page.
const ALIGNMENT: u64 = 4096;

/// Why there is no fault buffer, or none any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// The driver has not set bus mastering in the PCI command register.
    #[error("{}", self.why())]
    NotBusMaster,
    /// `FAULT_ORDER` out of range.
    #[error("{}", self.why())]
    Order,
    /// An address that is not 4 KiB aligned, or a buffer that wraps around.
    #[error("{}", self.why())]
    Address,
    /// Buffer or shadow page cannot be reached.
    #[error("buffer or shadow page: {0}")]
    Dma(#[from] DmaFault),
}

impl BufferError {
    /// The same in words that are known beforehand.
    pub const fn why(self) -> &'static str {
        match self {
            Self::NotBusMaster => {
                "bus mastering is off; the driver has to set it in the PCI command register"
            }
            Self::Order => "the buffer's order is out of range",
            Self::Address => "buffer and shadow page are not both 4 KiB aligned inside the address space",
            Self::Dma(_) => "buffer or shadow page cannot be reached by DMA",
        }
    }
}

/// What the driver writes to the registers before it enables the buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// DMA address of the buffer.
    pub ring: u64,
    /// Log2 of its entries.
    pub order: u32,
    /// DMA address of the shadow page.
    pub shadow: u64,
}

/// What became of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It is in the buffer.
    Entered {
        /// Its number.
        sequence: u32,
        /// The put index moved past the event index.
        interrupt: bool,
    },
    /// There was no room; that is counted in the shadow page.
    Full,
}

/// A buffer in use.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    base: u64,
    entries: u32,
    shadow: u64,
    put: u32,
    overflow: u32,
}

impl Buffer {
    /// Latches `settings` and starts at index 0, with no overflow.
    ///
    /// # Errors
    /// [`BufferError`] if the settings make no buffer.
    pub fn open(settings: Settings, core: &Core, guard: &DmaGuard<'_>) -> Result<Self, BufferError> {
        let Settings { ring, order, shadow } = settings;
        if !(FAULT_ORDER_MIN..=FAULT_ORDER_MAX).contains(&order) {
            return Err(BufferError::Order);
        }
        let entries = 1_u32 << order;
        let aligned = ring.is_multiple_of(ALIGNMENT) && shadow.is_multiple_of(ALIGNMENT);
        let fits = ring.checked_add(u64::from(entries) * FAULT_SIZE as u64).is_some()
            && shadow.checked_add(ALIGNMENT).is_some();
        if !aligned || !fits {
            return Err(BufferError::Address);
        }
        let this = Self { base: ring, entries, shadow, put: 0, overflow: 0 };
        if !core.may_master() {
            return Err(BufferError::NotBusMaster);
        }
        guard.store_u32(this.field(FAULT_SHADOW_PUT), 0)?;
        guard.store_u32(this.field(FAULT_SHADOW_OVERFLOW), 0)?;
        Ok(this)
    }

    const fn field(&self, field: usize) -> u64 {
        self.shadow + field as u64
    }

    /// Counts a fault for which there is no room.
    ///
    /// # Errors
    /// [`BufferError`] if the shadow page cannot be reached any more.
    pub fn overflow(&mut self, guard: &DmaGuard<'_>) -> Result<Put, BufferError> {
        self.overflow = self.overflow.wrapping_add(1);
        guard.store_u32(self.field(FAULT_SHADOW_OVERFLOW), self.overflow)?;
        Ok(Put::Full)
    }

    /// Puts `fault` in, if there is room.
    ///
    /// # Errors
    /// [`BufferError`] if the buffer cannot be reached any more.
    pub fn put(&mut self, core: &Core, guard: &DmaGuard<'_>, fault: Fault) -> Result<Put, BufferError> {
        if !core.may_master() {
            return Err(BufferError::NotBusMaster);
        }
        // Acquire: the driver has read the entries before this index.
        let get = guard.load_u32(self.field(FAULT_SHADOW_GET))?;
        // An index that makes no sense leaves no room either.
        if self.put.wrapping_sub(get) >= self.entries {
            return self.overflow(guard);
        }
        let entry = self.base + u64::from(self.put % self.entries) * FAULT_SIZE as u64;
        for (at, word) in (entry..).step_by(8).zip(fault.to_words()) {
            guard.store_u64(at, word)?;
        }
        let old = self.put;
        self.put = old.wrapping_add(1);
        guard.store_u32(self.field(FAULT_SHADOW_PUT), self.put)?;
        // Pairs with the driver's full barrier between its store of the event index and its load of the put index: of
        // the two stores, at least one is seen by the other side.
        fence(Ordering::SeqCst);
        let event = guard.load_u32(self.field(FAULT_SHADOW_EVENT))?;
        Ok(Put::Entered { sequence: fault.sequence, interrupt: needs_doorbell(event, self.put, old) })
    }
}

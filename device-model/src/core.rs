//! What the engines and channels of one GPU share: the memories, the MMU, the vectors, the counters, the chaos plan.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::chaos::Plan;
use crate::config::Mode;
use crate::faults::Faults;
use crate::guest_memory::GuestMemory;
use crate::irq::Interrupts;
use crate::mmu::Mmu;
use crate::stats::{Complaints, Stats};
use crate::vram::Vram;

/// One GPU without its registers and channels.
#[derive(Debug)]
pub struct Core {
    /// Position among the GPUs.
    pub index: u8,
    /// When work is done.
    pub mode: Mode,
    /// How long an idle channel looks for work before it sleeps.
    pub poll: Duration,
    /// The DMA map.
    pub memory: GuestMemory,
    /// VRAM of every GPU of the process, by index.
    pub vrams: Arc<[Arc<Vram>]>,
    /// Address spaces and TLB.
    pub mmu: Mmu,
    /// Page faults of jobs.
    pub faults: Faults,
    /// MSI-X vectors.
    pub interrupts: Interrupts,
    /// The referee's counters.
    pub stats: Stats,
    /// What the log says about the guest.
    pub complaints: Complaints,
    /// The faults asked for.
    pub chaos: Plan,
    /// Whether the driver lets the device reach guest memory.
    pub bus_master: AtomicBool,
}

impl Core {
    /// This GPU's own VRAM.
    pub fn vram(&self) -> &Arc<Vram> {
        &self.vrams[usize::from(self.index)]
    }

    /// Raises an interrupt, unless the chaos plan loses it. A synchronous device has none.
    pub fn raise(&self, vector: u16) {
        if self.mode == Mode::Synchronous {
            return;
        }
        if self.chaos.drops_interrupt() {
            self.stats.chaos.increment();
            return;
        }
        self.stats.interrupts.increment();
        self.interrupts.raise(vector);
    }

    /// Whether the driver lets the device reach guest memory.
    pub fn may_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }
}

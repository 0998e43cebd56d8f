//! What the engines and channels of one GPU share: the memories, the MMU, the vectors, the counters, the chaos plan.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::chaos::late::Late;
use crate::chaos::order::Order;
use crate::chaos::{InterruptFate, Plan};
use crate::config::Mode;
use crate::engine::atomics::BusAtomics;
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
    /// Longest that an idle channel looks for work before it sleeps.
    pub poll: Duration,
    /// The DMA map.
    pub memory: GuestMemory,
    /// VRAM of every GPU of the process, by index.
    pub vrams: Arc<[Arc<Vram>]>,
    /// Address spaces and TLB.
    pub mmu: Mmu,
    /// Atomics of jobs beyond its own VRAM.
    pub bus_atomics: BusAtomics,
    /// Page faults of jobs.
    pub faults: Faults,
    /// MSI-X vectors.
    pub interrupts: Arc<Interrupts>,
    /// Interrupts that the chaos plan delays.
    pub late: Late,
    /// Channels that the chaos plan makes wait for one another.
    pub order: Order,
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

    /// Raises an interrupt, as far as the chaos plan lets it. A synchronous device has none.
    pub fn raise(&self, vector: u16) {
        if self.mode == Mode::Synchronous {
            return;
        }
        let fate = self.chaos.interrupt();
        if fate != InterruptFate::Raised {
            self.stats.chaos.increment();
        }
        let times = match fate {
            InterruptFate::Dropped => return,
            InterruptFate::Late(time) => {
                self.stats.interrupts.increment();
                return self.late.raise(vector, time);
            }
            InterruptFate::Raised => 1,
            InterruptFate::Doubled => 2,
        };
        for _ in 0..times {
            self.stats.interrupts.increment();
            self.interrupts.raise(vector);
        }
    }

    /// Whether the chaos plan keeps `channel` from executing now.
    pub fn holds(&self, channel: u16) -> bool {
        let held = self.chaos.holds(channel);
        if held == Some(true) {
            self.stats.chaos.increment();
        }
        held.is_some()
    }

    /// Whether the driver lets the device reach guest memory.
    pub fn may_master(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }
}

//! The referee's counters of one GPU, and the log lines for what the guest does wrong.
//!
//! Counters only grow. They are what the control socket serves, so they must not depend on anything that the guest
//! can write.

use std::fmt::Arguments;
use std::sync::atomic::{AtomicU64, Ordering};

use hmmstorm_abi::wire::control::GpuStats;

macro_rules! counters {
    ($( $(#[$doc:meta])* $name:ident )*) => {
        /// Counters of one GPU; see [`GpuStats`] for what each counts.
        #[derive(Debug, Default)]
        pub struct Stats {
            $( $(#[$doc])* pub $name: Counter, )*
        }

        impl Stats {
            /// The counters as the control socket reports them; what is `queued` and `stalled` now is the caller's to
            /// know.
            pub fn snapshot(&self, queued: u64, stalled: u64) -> GpuStats {
                GpuStats { queued, stalled, $( $name: self.$name.get(), )* }
            }
        }
    };
}

counters! {
    /// Descriptors completed, errors included.
    completions
    /// Of these, with an error status.
    errors
    /// Bytes copied or filled.
    bytes
    /// Segments copied or filled.
    segments
    /// Trapped register reads.
    register_reads
    /// Trapped register writes.
    register_writes
    /// Doorbells rung.
    doorbells
    /// Register accesses that break a rule.
    bad_accesses
    /// Interrupts raised.
    interrupts
    /// Accesses of an engine to an address that the DMA map does not allow.
    dma_faults
    /// Device and channel resets.
    resets
    /// Times that the chaos plan struck.
    chaos
    /// Accesses that jobs made.
    accesses
    /// Words that did not hold what a job said they should.
    mismatches
    /// Page faults reported in the fault buffer.
    faults
    /// Page faults that an entry in the buffer stood for already.
    faults_coalesced
    /// Page faults that found the buffer full.
    faults_overflowed
    /// Replays asked for.
    replays
    /// Jobs that were cancelled.
    cancels
    /// Translations found in the TLB.
    tlb_hits
    /// Translations read from page tables.
    tlb_misses
    /// Invalidations of translations.
    tlb_invalidations
}

/// A number that only grows, shared by all threads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one, and returns the count with it.
    pub fn increment(&self) -> u64 {
        self.add(1)
    }
    /// Adds `n`, and returns the sum.
    pub fn add(&self, n: u64) -> u64 {
        self.0.fetch_add(n, Ordering::Relaxed).wrapping_add(n)
    }
    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many lines of one complaint are written before only each doubling is.
const LINES_IN_FULL: u64 = 8;

/// A complaint about the guest. It can be provoked at will, so after the first few only the 16th, 32nd, 64th… time
/// reaches the log: a bound that needs no clock.
#[derive(Debug, Default)]
pub struct Complaint(Counter);

impl Complaint {
    /// Counts one, and logs it unless the log has seen enough of them.
    pub fn log(&self, gpu: u8, what: Arguments<'_>) {
        let times = self.0.increment();
        if times <= LINES_IN_FULL {
            log::warn!("gpu{gpu}: {what}");
        } else if times.is_power_of_two() {
            log::warn!("gpu{gpu}: {what} (and {} like it before; only each doubling is logged)", times - 1);
        }
    }
}

/// The complaints that are told apart.
#[derive(Debug, Default)]
pub struct Complaints {
    /// About registers.
    pub register: Complaint,
    /// About descriptors.
    pub descriptor: Complaint,
    /// About rings, shadow pages and fences.
    pub ring: Complaint,
    /// About requests of the VMM, which the guest may have provoked.
    pub request: Complaint,
}

//! The device's control socket: a Unix stream socket; a client writes one [`Request`] a line and gets one [`Reply`]
//! a line. It is the *referee*: what it counts, the guest cannot fake.

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::str::FromStr;
use serde::{Deserialize, Serialize};

/// What a client asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Counters of every GPU.
    Stats,
    /// Replaces the chaos plan of a GPU (of all, without `gpu`).
    Chaos {
        /// Which GPU.
        #[serde(default)]
        gpu: Option<u8>,
        /// The plan.
        plan: Chaos,
    },
    /// Ends the process cleanly.
    Shutdown,
}

/// What the device answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Stats`].
    Stats {
        /// One entry a GPU, by index.
        gpus: Vec<GpuStats>,
    },
    /// Done.
    Ok,
    /// Not done.
    Error {
        /// Why.
        message: String,
    },
}

/// Counters of one GPU since the process started. All but `queued` and `stalled` only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GpuStats {
    /// Descriptors completed, errors included.
    pub completions: u64,
    /// Of these, with an error status.
    pub errors: u64,
    /// Descriptors published to the device and not completed, without those of channels that are `stalled`: work that
    /// the guest waits for.
    pub queued: u64,
    /// Channels with a job that waits for the driver to serve a page fault, now: work that waits for the guest.
    pub stalled: u64,
    /// Bytes copied or filled.
    pub bytes: u64,
    /// Segments copied: one a copy or fill, one an entry of a scatter list.
    pub segments: u64,
    /// Trapped register reads.
    pub register_reads: u64,
    /// Trapped register writes, doorbells included.
    pub register_writes: u64,
    /// Doorbells rung.
    pub doorbells: u64,
    /// Accesses to offsets with no register, writes to read-only ones, and accesses of a wrong width.
    pub bad_accesses: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Accesses of an engine to a DMA address that is not mapped.
    pub dma_faults: u64,
    /// Device and channel resets.
    pub resets: u64,
    /// Times that the chaos plan struck.
    pub chaos: u64,
    /// Accesses that jobs made.
    pub accesses: u64,
    /// Words that did not hold what a job said they should.
    pub mismatches: u64,
    /// Page faults reported in the fault buffer.
    pub faults: u64,
    /// Page faults that an entry in the buffer stood for already.
    pub faults_coalesced: u64,
    /// Page faults that found the buffer full.
    pub faults_overflowed: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Jobs that were cancelled.
    pub cancels: u64,
    /// Translations found in the TLB.
    pub tlb_hits: u64,
    /// Translations read from page tables.
    pub tlb_misses: u64,
    /// Invalidations of translations.
    pub tlb_invalidations: u64,
}

/// A seeded fault plan; the default does nothing. *Every n-th* counts from the moment the plan comes into force, by
/// GPU; 0 means never.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Chaos {
    /// Seed of every choice below.
    pub seed: u64,
    /// Break the data of every n-th copied segment silently: the bench's own check that it would notice.
    pub corrupt_every: u64,
    /// End every n-th descriptor with an error fence and do nothing.
    pub fail_every: u64,
    /// The same for every n-th copy, scatter list or fill.
    pub fail_copy_every: u64,
    /// Wait this long before each descriptor, in microseconds; threaded mode only.
    pub latency_us: u64,
    /// And this long before each copy, scatter list or fill.
    pub copy_latency_us: u64,
    /// And this long before each job.
    pub access_latency_us: u64,
    /// Latencies are the means of exponential distributions, and not the same each time.
    pub exponential: bool,
    /// Hold every n-th descriptor back until another channel has completed one. Of a synchronous device: serve the
    /// channels in a random order after every n-th replay.
    pub reorder_every: u64,
    /// But hold it no longer than this, in microseconds (0: 1000).
    pub reorder_us: u64,
    /// Drop every n-th interrupt.
    pub drop_interrupt_every: u64,
    /// Raise every n-th interrupt twice.
    pub duplicate_interrupt_every: u64,
    /// Raise every n-th interrupt late.
    pub delay_interrupt_every: u64,
    /// By this much, in microseconds (0: 10,000).
    pub interrupt_delay_us: u64,
    /// Poison one in n pages of VRAM, chosen by the seed.
    pub poison_every: u64,
    /// Poison `poison_pages` pages of VRAM from this one on, too.
    pub poison_first: u64,
    /// How many.
    pub poison_pages: u64,
    /// This channel stops executing until it is reset or the plan is replaced.
    pub hang_channel: Option<u16>,
    /// But not before it has begun this many descriptors.
    pub hang_after: u64,
    /// Lose every n-th report of a page fault.
    pub drop_fault_every: u64,
    /// Report every n-th page fault twice.
    pub duplicate_fault_every: u64,
    /// Report a page fault that nobody had after every n-th real one.
    pub spurious_fault_every: u64,
    /// Do with every n-th report of a page fault as if the buffer were full.
    pub overflow_fault_every: u64,
    /// The device is gone: registers, config space and trapped VRAM read as all ones, nothing runs.
    pub dead: bool,
    /// The same from this descriptor on, of whatever channel; 0 means never.
    pub dead_after: u64,
}

/// Reads `key=value,…`. Keys are the fields above, with `-` or `_`; an empty text is the plan that does nothing.
impl FromStr for Chaos {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut plan = serde_json::Map::new();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("'{pair}' is not KEY=VALUE"))?;
            let value = serde_json::from_str(value)
                .map_err(|_| format!("'{value}' is neither a number nor true or false"))?;
            plan.insert(key.replace('-', "_"), value);
        }
        serde_json::from_value(plan.into()).map_err(|error| error.to_string())
    }
}

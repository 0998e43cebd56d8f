//! What the storm in the guest tells the host: one [`Record`] a line on the virtio-serial port [`PORT_NAME`].
//!
//! The port carries nothing but records and is read as a file; the console is the kernel's. A record is written with
//! one `write()`, so a line is whole or absent.

use alloc::collections::BTreeMap;
use alloc::string::String;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.hmmstorm.events";

/// Kernel command-line parameters that the storm reads from `/proc/cmdline`. The kernel hands on none of them, since
/// each has a dot in its name.
pub mod cmdline {
    /// `storm.mode=run|shell`: run a scenario and power off, or give a shell.
    pub const MODE: &str = "storm.mode";
    /// `storm.scenario=NAME`.
    pub const SCENARIO: &str = "storm.scenario";
    /// `storm.seed=N`: seed of every choice of the workload, and (by its mere presence) of the guest's schedule.
    pub const SEED: &str = "storm.seed";
    /// Prefix of a scenario parameter: `storm.p.rounds=200`.
    pub const PARAMETER_PREFIX: &str = "storm.p.";
    /// `storm.modules=hsgpu`: modules to load, by comma, in order; from `/lib/modules/`.
    pub const MODULES: &str = "storm.modules";
    /// `storm.gpus=2`: hsgpu nodes to wait for before work begins.
    pub const GPUS: &str = "storm.gpus";
    /// `storm.heartbeat_ms=500`: guest time between two [`Progress`](super::Progress) records.
    pub const HEARTBEAT_MS: &str = "storm.heartbeat_ms";
}

/// One line of the event stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Guest `CLOCK_MONOTONIC`, nanoseconds.
    pub t: u64,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened in the guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// PID 1 runs; the first record of every boot.
    Hello {
        /// Version of the storm binary.
        version: String,
        /// `uname -r`, `uname -v`.
        kernel: String,
        /// Online CPUs.
        cpus: u32,
    },
    /// The driver is loaded and its nodes are there.
    Bound {
        /// Nodes found.
        gpus: u32,
        /// Where the loaded modules' code is: by module name, the text sections of `/sys/module/NAME/sections/`
        /// (`.text`, `.text.unlikely`, ...) with their addresses. The host names sampled stack frames by it.
        #[serde(default)]
        modules: BTreeMap<String, BTreeMap<String, u64>>,
    },
    /// A scenario begins.
    Start {
        /// Its name.
        scenario: String,
        /// Seed in force.
        seed: u64,
        /// Every parameter in force, defaults included.
        parameters: BTreeMap<String, String>,
        /// Worker names, in the order of [`Progress::workers`].
        workers: Vec<String>,
    },
    /// A program of tests begins; which ones it will run, in this order.
    Tests {
        /// Their full names.
        names: Vec<String>,
    },
    /// A line that a program printed which runs under the storm.
    Output {
        /// Without its end.
        line: String,
    },
    /// One value of a benchmark.
    Sample {
        /// What was measured: a driver.
        series: String,
        /// Round, from 0.
        round: u64,
        /// Name of the figure.
        name: String,
        /// Its value, in the unit that the name implies.
        value: f64,
    },
    /// Heartbeat while a scenario runs; sent by a thread that does no other work.
    Progress(Progress),
    /// A data oracle failed. The run goes on or ends as the scenario decides; the verdict is `corruption`.
    Corruption {
        /// Worker that saw it.
        worker: String,
        /// Page index in the scenario's mapping.
        page: u64,
        /// What the page should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// An accounting oracle failed after the run (device pages not returned, counters off, …).
    Invariant {
        /// Which one.
        name: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// A device access that the driver has given up. The run ends; the verdict depends on what others did meanwhile.
    Unserved(Unserved),
    /// Counters of each GPU's driver, by name: whenever nothing has completed for a while, and before [`Event::Unserved`].
    Counters {
        /// One entry a GPU.
        stats: Vec<BTreeMap<String, u64>>,
    },
    /// What the workers measured so far: before [`Event::Done`], and whenever nothing has completed for a while, since a
    /// guest that hangs says nothing more.
    Measured(Measured),
    /// The scenario ended by itself.
    Done {
        /// Operations and faults at the end.
        progress: Progress,
        /// Guest time from start to end, nanoseconds.
        elapsed_ns: u64,
        /// Driver statistics of each GPU at the end, by counter name.
        stats: Vec<BTreeMap<String, u64>>,
    },
    /// The storm itself could not do what was asked (unknown scenario, missing node, failed system call).
    Error {
        /// What was tried, and what came back.
        message: String,
    },
    /// PID 1 powers the machine off.
    Bye,
}

/// A device access for which the driver got no page that it could use, for as long as it tries
/// ([`STALE_LIMIT_MS`](crate::uapi::STALE_LIMIT_MS)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unserved {
    /// Who asked for it.
    pub worker: String,
    /// What was called, and on which GPU.
    pub call: String,
    /// Page index in the scenario's mapping.
    pub page: u64,
    /// Guest time that it took, nanoseconds.
    pub waited_ns: u64,
    /// Calls of `hmm_range_fault()` meanwhile: for this access, or where only the GPU's are counted, for all of its own.
    pub tries: u64,
    /// Calls of `handle_mm_fault()` by the task that asked: one `hmm_range_fault()` may make any number.
    pub mm_faults: u64,
    /// The longest part of that time in which no worker completed an operation, nanoseconds.
    pub idle_ns: u64,
}

/// Where the workers of a scenario stand.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Round under way.
    pub round: u64,
    /// Operations completed, all workers together.
    pub operations: u64,
    /// Device page faults resolved, i.e. device accesses that returned with the right data.
    pub faults: u64,
    /// Workers that are inside an operation now.
    pub outstanding: u32,
    /// Operations completed, by worker.
    pub workers: Vec<u64>,
    /// Thread or process id of each worker, as the kernel's reports name it.
    pub pids: Vec<u32>,
    /// Whether each worker is inside an operation: one that is not has nothing to wait for.
    #[serde(default)]
    pub busy: Vec<bool>,
}

/// What the workers of a scenario measured, all of them together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// How long operations took that resolved at least one fault on a device page, from the call to its return: pairs of
    /// nanoseconds and count, ascending. Values are the lower ends of HdrHistogram's buckets of two significant digits.
    pub latency_ns: Vec<(u64, u64)>,
    /// Faults that these operations resolved.
    pub resolved: u64,
    /// Calls of `handle_mm_fault()` that these operations took, of their own task alone.
    pub mm_faults: u64,
    /// Of these, calls beyond the first for each fault that was resolved: tries that were in vain.
    pub retries: u64,
    /// Longest time, nanoseconds, through which a worker is known to have kept its CPU: between two looks at its context
    /// switches that found no new one.
    pub unswitched_ns: u64,
    /// What was asked of migrations.
    pub migrations: Migrations,
}

/// Migrations that the workers asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Migrations {
    /// Calls of `migrate_vma_setup()`.
    pub attempts: u64,
    /// Pages in their ranges.
    pub pages: u64,
    /// Of these, pages that were collected, isolated and unmapped.
    pub collected: u64,
    /// Of these, pages that moved.
    pub migrated: u64,
}

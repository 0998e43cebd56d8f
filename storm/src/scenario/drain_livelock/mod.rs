//! `drain-livelock`: a migration of system and device folios drains the LRU batches of every CPU while device faults
//! spin on the folios that it holds locked. The definition (`scenarios/drain-livelock.toml`) tells the whole story.
//!
//! What keeps the conditions true in *every* round, and is easily lost:
//!
//! * The device pages are migrated to GPU 0 before the round, with the faulters idle, and a snapshot checks that all of
//!   them are there: else the mixed range is a system-only range from the second round on.
//! * The system page is discarded and touched anew on CPU 1 *after* that, since a migration of system pages drains every
//!   batch. The parent migrates on CPU 0: a folio in its own CPU's batch is drained locally, without waiting for anyone.
//! * The faulters put a folio into their batches *before* the system page is touched: nothing of theirs drains CPU 1.
//! * Nobody writes the shared pages between two forks, so every address space keeps its mapping of every folio.
//! * The faulters read away from the system page. The pages that they brought back to RAM are then always on its side,
//!   and `order = device-first` has no system folio before a device folio, whoever is how far.
//! * The range is one VMA, and one `migrate_vma_setup()`: the driver says how many it made. It has no huge pages, or one:
//!   then the VMA has no room for a second, so that the system page is a small one.

mod faulter;
mod migrator;

use std::ops::Range;

use crate::machine::Machine;
use crate::scenario::definition::Parameters;
use crate::scenario::{Context, ScenarioError, Stopped, Workload, idle};
use crate::sys::memory::BLOCK_PAGES;

/// GPU whose memory holds the device pages.
const HOLDER: usize = 0;
/// The other GPU.
const FOREIGN: usize = 1;
/// CPU that migrates.
const MIGRATOR_CPU: usize = 0;
/// Looks at another worker's counter before one goes on without it.
const LEAD_LOOKS: u32 = 1 << 22;
/// CPU in whose LRU batch the system page waits.
const BATCH_CPU: usize = 1;

/// Where the system page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    SystemFirst,
    DeviceFirst,
}

/// What starts the device faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    Call,
    Job,
}

/// Whose the faulters' reads are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Foreign,
    Nobody,
    Own,
}

/// The workload.
#[derive(Clone, Debug)]
pub(crate) struct DrainLivelock {
    rounds: u64,
    /// Pages of the mixed range.
    pages: usize,
    /// Pages that a faulter reads in a round.
    reads: usize,
    /// The device pages are one folio of 2 MiB.
    huge: bool,
    start: Start,
    faulters: usize,
    order: Order,
    reader: Reader,
    /// Faulters are threads: device folios have one mapping.
    threads: bool,
    drained: bool,
    /// Faulters run under `SCHED_FIFO`.
    real_time: bool,
    fork_every: u64,
    lead: u64,
    jitter: u64,
}

impl DrainLivelock {
    /// From its parameters.
    ///
    /// # Errors
    /// [`ScenarioError::Machine`] if the faulters do not find a CPU each.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Result<Self, ScenarioError> {
        let drained = parameters.flag("drained");
        let first_cpu = first_faulter_cpu(drained);
        let asked = parameters.integer("faulters") as usize;
        let (faulters, reason) = match asked {
            0 => (machine.cpus.saturating_sub(first_cpu).clamp(1, 62), "drained=1".to_owned()),
            n => (n, format!("faulters={n}")),
        };
        if first_cpu + faulters > machine.cpus {
            return Err(ScenarioError::Machine {
                scenario: format!("drain-livelock ({reason})"),
                needed: first_cpu + faulters,
                what: "CPU",
                found: machine.cpus,
            });
        }
        let (asked, huge) = (parameters.integer("pages") as usize, parameters.choice("folio") == "2M");
        Ok(Self {
            rounds: parameters.integer("rounds"),
            pages: if huge { 1 + BLOCK_PAGES } else { asked },
            reads: asked - 1,
            huge,
            start: if parameters.choice("start") == "job" { Start::Job } else { Start::Call },
            faulters,
            order: match parameters.choice("order") {
                "device-first" => Order::DeviceFirst,
                _ => Order::SystemFirst,
            },
            reader: match parameters.choice("owner") {
                "own" => Reader::Own,
                "none" => Reader::Nobody,
                _ => Reader::Foreign,
            },
            threads: parameters.integer("mapcount") == 1,
            drained,
            real_time: parameters.choice("sched") == "fifo",
            fork_every: parameters.integer("fork_every"),
            // The first read that gets through takes a huge folio away from the migration.
            lead: if huge { 0 } else { parameters.integer("lead") },
            jitter: parameters.integer("jitter"),
        })
    }

    /// Index of the page that stays in system memory.
    fn system_page(&self) -> usize {
        match self.order {
            Order::SystemFirst => 0,
            Order::DeviceFirst => self.pages - 1,
        }
    }

    /// The pages that are on the device when a round begins.
    fn device_pages(&self) -> Range<usize> {
        match self.order {
            Order::SystemFirst => 1..self.pages,
            Order::DeviceFirst => 0..self.pages - 1,
        }
    }

    /// The `i`-th page that a faulter reads: away from the system page, and evenly over the device pages.
    fn nth_read(&self, i: usize) -> usize {
        let i = i * (self.device_pages().len() / self.reads);
        match self.order {
            Order::SystemFirst => self.device_pages().start + i,
            Order::DeviceFirst => self.device_pages().end - 1 - i,
        }
    }

    /// The pages that faulter `faulter` reads while the migration runs, in this order.
    ///
    /// All of them, but only one if its CPU's batches are to stay empty: the first read that finds its page unlocked
    /// leaves a folio there, the migration may queue its work item for that at any moment from then on, and nothing
    /// that the faulter can do tells it whether one is still to come.
    fn overlapping_reads(&self, faulter: usize) -> impl Iterator<Item = usize> {
        let all = self.reads;
        let which = if self.drained { faulter % all..faulter % all + 1 } else { 0..all };
        which.map(|i| self.nth_read(i))
    }

    /// The pages that it reads when the migration is over.
    fn other_reads(&self, faulter: usize) -> impl Iterator<Item = usize> {
        let all = self.reads;
        (0..all).filter(move |i| self.drained && *i != faulter % all).map(|i| self.nth_read(i))
    }

    /// What `jitter` is multiplied with before a faulter's first read. From the first collected folio on, a migration waits
    /// for as long as the CPUs take to get to their drains; the faulters are to come in that time, and not before it.
    fn patience(&self) -> u64 {
        if self.huge { 10 } else { 1 }
    }

    fn faulter_cpu(&self, faulter: usize) -> usize {
        first_faulter_cpu(self.drained) + faulter
    }
}

/// With drained faulters, the CPU whose batch holds the system page has none: draining it would undo that.
fn first_faulter_cpu(drained: bool) -> usize {
    BATCH_CPU + usize::from(drained)
}

impl Workload for DrainLivelock {
    fn workers(&self) -> Vec<String> {
        let faulters = (0..self.faulters).map(|i| format!("faulter{i}@cpu{}", self.faulter_cpu(i)));
        [format!("migrator@cpu{MIGRATOR_CPU}")].into_iter().chain(faulters).collect()
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        migrator::run(self, context).map_err(|error| {
            error.post(context.board.slot(0));
            Stopped
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::definition::Definition;

    fn scenario(overrides: &[(&'static str, &'static str)]) -> DrainLivelock {
        let definition =
            Definition::parse(include_str!("../../../scenarios/drain-livelock.toml")).expect("valid");
        let parameters = definition.parameters(None, overrides.iter().copied()).expect("valid");
        DrainLivelock::new(&parameters, Machine { cpus: 4, gpus: 2 }).expect("big enough")
    }

    #[test]
    fn the_defaults_make_at_least_5000_faults_on_4_cpus() {
        let s = scenario(&[]);
        assert_eq!(s.faulters, 3);
        assert!(s.rounds as usize * s.faulters * s.device_pages().len() >= 5000);
    }

    #[test]
    fn faulters_read_every_device_page_away_from_the_system_page() {
        for order in ["system-first", "device-first"] {
            let s = scenario(&[("order", order), ("pages", "5")]);
            let reads: Vec<_> = s.overlapping_reads(0).collect();
            assert_eq!((reads.len(), s.other_reads(0).count()), (4, 0));
            let distance = |page: &usize| page.abs_diff(s.system_page());
            assert!(reads.is_sorted_by_key(distance), "{order}: {reads:?}");
            assert!(reads.iter().all(|page| s.device_pages().contains(page)), "{order}: {reads:?}");
            assert!(!s.device_pages().contains(&s.system_page()));
        }
    }

    #[test]
    fn reads_of_a_huge_folio_are_spread_over_it() {
        for order in ["system-first", "device-first"] {
            let s = scenario(&[("order", order), ("folio", "2M")]);
            let reads: Vec<_> = s.overlapping_reads(0).collect();
            assert_eq!((s.pages, reads.len(), s.lead), (513, 31, 0));
            assert!(reads.iter().all(|page| s.device_pages().contains(page)), "{order}: {reads:?}");
            assert!(reads.windows(2).all(|pair| pair[0].abs_diff(pair[1]) == 16), "{order}: {reads:?}");
        }
    }

    #[test]
    fn drained_faulters_read_one_page_during_the_migration_and_the_rest_after_it() {
        let s = scenario(&[("drained", "1"), ("pages", "5")]);
        for faulter in 0..2 {
            let mut pages: Vec<_> = s.overlapping_reads(faulter).collect();
            assert_eq!(pages, [faulter + 1]);
            pages.extend(s.other_reads(faulter));
            pages.sort_unstable();
            assert_eq!(pages, [1, 2, 3, 4]);
        }
    }

    #[test]
    fn drained_faulters_stay_off_the_cpu_that_holds_the_system_page() {
        let names = scenario(&[("drained", "1")]).workers();
        assert_eq!(names, ["migrator@cpu0", "faulter0@cpu2", "faulter1@cpu3"]);
        assert_eq!(scenario(&[("faulters", "1")]).workers(), ["migrator@cpu0", "faulter0@cpu1"]);
    }
}

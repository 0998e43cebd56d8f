//! `bench`: hmm-tests' own benchmark and a fault test, on hsgpu and on the kernel's test_hmm in turn.
//!
//! Both drivers make nodes of the same names, and hmm-tests knows no others. So both stay loaded, and their nodes take
//! turns: those of the one that rests are in a folder of its own. (Unloading `test_hmm` makes 6.19.6 warn of its devices,
//! which have no release method.)

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hmmstorm_abi::uapi::Stats;
use hmmstorm_abi::wire::event::Event;
use rustix::process::{WaitOptions, waitpid};

use super::conformance::spawn;
use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::clock::{monotonic_ns, poll};
use crate::gpu;
use crate::init::modules;
use crate::machine::unpin;
use crate::sys::ioctl;
use crate::sys::memory::Mapping;
use crate::sys::process::fork;

/// The benchmark among the kernel's tests.
const BENCHMARK: &str = "hmm.hmm_device_private.benchmark_thp_migration";
/// The driver under test, and the kernel's own.
const OURS: &str = "hsgpu";
const STOCK: &str = "test_hmm";
/// How many pages a CPU fault brings back, of GPU 0.
const FAULT_PAGES: &str = "/sys/kernel/debug/hsgpu0/fault_pages";
/// Where device nodes are.
const DEV: &str = "/dev";
/// Guest time that a driver gets to make its nodes.
const NODES: Duration = Duration::from_secs(30);
/// Bytes for which traps and the like are counted.
const HUGE: f64 = (2 << 20) as f64;

/// The workload.
#[derive(Debug)]
pub(crate) struct Bench {
    rounds: u64,
    processes: usize,
    pages: usize,
    limit: Duration,
    migration: bool,
}

impl Bench {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self {
            rounds: parameters.integer("rounds"),
            processes: parameters.integer("processes") as usize,
            pages: parameters.integer("pages") as usize,
            limit: Duration::from_millis(parameters.integer("milliseconds")),
            migration: parameters.flag("migration"),
        }
    }
}

impl Workload for Bench {
    fn workers(&self) -> Vec<String> {
        vec!["bench".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("bench");
        self.all(slot, context).map_err(|error| {
            error.post(slot);
            Stopped
        })
    }
}

impl Bench {
    fn all(&self, slot: Slot<'_>, context: &Context<'_>) -> Result<(), WorkError> {
        unpin().map_err(WorkError::system("sched_setaffinity"))?;
        // PID 1 loaded hsgpu; devtmpfs makes no node where there is one.
        let ours = Nodes::park(OURS)?;
        load(STOCK)?;
        let stock = Nodes::park(STOCK)?;
        for round in 0..self.rounds {
            context.board.set_round(round);
            // The other one goes first in every other round.
            let mut drivers = [&ours, &stock];
            if round % 2 == 1 {
                drivers.reverse();
            }
            for nodes in drivers {
                nodes.put_up()?;
                let turn = Turn { bench: self, driver: nodes.driver, round, slot, context };
                let result = turn.run();
                nodes.take_down()?;
                result?;
            }
        }
        // Where devtmpfs finds them when the driver goes.
        ours.put_up()
    }
}

/// One driver's turn in a round.
#[derive(Clone, Copy)]
struct Turn<'a> {
    bench: &'a Bench,
    driver: &'static str,
    round: u64,
    slot: Slot<'a>,
    context: &'a Context<'a>,
}

impl Turn<'_> {
    fn run(self) -> Result<(), WorkError> {
        if self.bench.migration {
            let before = self.counters()?;
            self.migrate()?;
            self.traffic("migration", before, self.counters()?)?;
        }
        // First like test_hmm, which brings back no more than the page that is touched, then as each driver does by itself.
        let own = self.set_fault_pages("1")?;
        self.touch("faults")?;
        if let Some(own) = own {
            self.set_fault_pages(&own)?;
        }
        self.touch("pages")
    }

    /// The fault test, with one process and with several.
    fn touch(self, what: &str) -> Result<(), WorkError> {
        let before = self.counters()?;
        for processes in [1, self.bench.processes] {
            self.slot.begin();
            let rate = fault_rate(processes, self.bench.pages, self.bench.limit)?;
            self.slot.complete(0);
            self.sample(&format!("cpu-{what}/{processes}"), rate)?;
        }
        self.traffic(what, before, self.counters()?)
    }

    /// Sets how many pages a CPU fault on GPU 0 brings back, if its driver can; returns what it was.
    fn set_fault_pages(self, pages: &str) -> Result<Option<String>, WorkError> {
        if self.driver != OURS {
            return Ok(None);
        }
        let old = fs::read_to_string(FAULT_PAGES)
            .map_err(WorkError::system("read(/sys/kernel/debug/hsgpu0/fault_pages)"))?;
        fs::write(FAULT_PAGES, pages)
            .map_err(WorkError::system("write(/sys/kernel/debug/hsgpu0/fault_pages)"))?;
        Ok(Some(old))
    }

    /// The counters of GPU 0, if its driver is hsgpu.
    fn counters(self) -> Result<Option<Stats>, WorkError> {
        if self.driver != OURS {
            return Ok(None);
        }
        Ok(gpu::all_stats()?.into_iter().next())
    }

    fn sample(self, name: &str, value: f64) -> Result<(), WorkError> {
        let event =
            Event::Sample { series: self.driver.to_owned(), round: self.round, name: name.to_owned(), value };
        self.context.sink.emit(event).map_err(WorkError::system("write an event"))
    }

    /// What the device was bothered with for each 2 MiB that it copied, if the driver counts it.
    fn traffic(self, what: &str, before: Option<Stats>, after: Option<Stats>) -> Result<(), WorkError> {
        let (Some(before), Some(after)) = (before, after) else { return Ok(()) };
        let copied = (after.copied - before.copied) as f64;
        for (name, count) in [
            ("traps", after.doorbells - before.doorbells),
            ("interrupts", after.interrupts - before.interrupts),
            ("fences", after.fences - before.fences),
        ] {
            self.sample(&format!("{name}-per-2M/{what}"), count as f64 * HUGE / copied.max(1.0))?;
        }
        Ok(())
    }

    /// Runs the kernel's benchmark and passes on what it found.
    fn migrate(self) -> Result<(), WorkError> {
        self.slot.begin();
        let (mut program, output) = spawn(["-r", BENCHMARK])?;
        let mut table = Table::default();
        let mut passed = false;
        for line in output.lines() {
            let line = line.map_err(WorkError::system("read hmm-tests' output"))?;
            for (name, value) in table.line(&line) {
                self.sample(&name, value)?;
                self.slot.complete(0);
                self.slot.begin();
            }
            passed |= line.starts_with("ok ") && !line.contains("# SKIP");
            let event = Event::Output { line };
            self.context.sink.emit(event).map_err(WorkError::system("write an event"))?;
        }
        program.wait().map_err(WorkError::system("wait for hmm-tests"))?;
        self.slot.complete(0);
        if passed {
            return Ok(());
        }
        Err(WorkError::Condition(format!("{BENCHMARK} does not pass on {}: see its output", self.driver)))
    }
}

/// Reads the tables of `benchmark_thp_migration`.
#[derive(Debug, Default)]
struct Table {
    bytes: f64,
}

impl Table {
    /// What a line adds: GB/s, by direction, size of the buffer and size of the pages.
    fn line(&mut self, line: &str) -> Vec<(String, f64)> {
        // === Single THP Size (2MB) (2.0 MB) ===
        if let Some(title) = line.strip_prefix("=== ") {
            let size = title.rsplit_once('(').and_then(|(_, size)| size.split_once(" MB)"));
            self.bytes = size.and_then(|(size, _)| size.parse().ok()).unwrap_or(0.0) * f64::from(1 << 20);
        }
        // Sys->Dev Migration   | 15.490 ms        | 14.537 ms        | -6.6%
        let direction = match line.split_once(" Migration") {
            Some(("Sys->Dev", _)) => "sys-to-dev",
            Some(("Dev->Sys", _)) => "dev-to-sys",
            _ => return Vec::new(),
        };
        let columns = line.split('|').skip(1).zip(["2M", "4K"]);
        let rate = |(column, pages): (&str, &str)| {
            let milliseconds: f64 = column.trim().strip_suffix(" ms")?.parse().ok()?;
            let size = self.bytes / f64::from(1 << 10);
            (milliseconds > 0.0)
                .then(|| (format!("{direction}/{size}K/{pages}"), self.bytes / milliseconds / 1e6))
        };
        columns.filter_map(rate).collect()
    }
}

/// Device pages that `processes` processes at once touch a second; each touch is a fault.
fn fault_rate(processes: usize, pages: usize, limit: Duration) -> Result<f64, WorkError> {
    let shared: Mapping =
        Mapping::shared(1 + processes).map_err(WorkError::system("mmap of the fault test's counters"))?;
    let mut children = Vec::new();
    for index in 0..processes {
        let page = shared.page(1 + index);
        let child = fork(|| match touch(pages, limit, &shared, processes) {
            Ok((touched, ns)) => {
                page[0].store(touched, Relaxed);
                page[1].store(ns, Relaxed);
                0
            }
            Err(error) => {
                eprintln!("storm: fault test: {error}");
                1
            }
        });
        children.push(child.map_err(WorkError::system("fork of the fault test"))?);
    }
    for child in children {
        let status = waitpid(Some(child), WaitOptions::empty())
            .map_err(WorkError::system("wait for the fault test"))?;
        if status.and_then(|(_, status)| status.exit_status()) != Some(0) {
            return Err(WorkError::Condition("the fault test failed; the console says why".to_owned()));
        }
    }
    let rate = |index| {
        let page = shared.page(1 + index);
        page[0].load(Relaxed) as f64 * 1e9 / (page[1].load(Relaxed) as f64).max(1.0)
    };
    Ok((0..processes).map(rate).sum())
}

/// One process of it: pages touched, and nanoseconds that this took.
fn touch(pages: usize, limit: Duration, shared: &Mapping, processes: usize) -> Result<(u64, u64), WorkError> {
    let node = open_node()?;
    let mapping: Mapping = Mapping::private(pages).map_err(WorkError::system("mmap of the fault test"))?;
    let buffer: Mapping = Mapping::private(pages).map_err(WorkError::system("mmap of the fault test"))?;
    let range = mapping.span(0..pages).ok_or_else(|| WorkError::Condition("no pages to touch".to_owned()))?;
    let (mut touched, mut ns, mut generation) = (0, 0, 0);
    let limit = limit.as_nanos() as u64;
    let ready = &shared.page(0)[0];
    ready.fetch_add(1, Relaxed);
    // All of them at once; a sibling that failed ends the wait.
    let _all = poll(NODES, || (ready.load(Relaxed) >= processes as u64).then_some(()));
    while ns < limit {
        generation += 1;
        for page in 0..pages {
            mapping.page(page)[0].store(generation ^ page as u64, Relaxed);
        }
        ioctl::migrate_to_device(&node, range, &buffer)
            .map_err(WorkError::system("HMM_DMIRROR_MIGRATE_TO_DEV"))?;
        let start = monotonic_ns();
        let wrong = (0..pages).find(|&page| mapping.page(page)[0].load(Relaxed) != generation ^ page as u64);
        ns += monotonic_ns() - start;
        touched += pages as u64;
        if let Some(page) = wrong {
            return Err(WorkError::Condition(format!("page {page} came back with other contents")));
        }
    }
    Ok((touched, ns))
}

fn open_node() -> Result<File, WorkError> {
    let open = OpenOptions::new().read(true).write(true).open(gpu::node(0));
    open.map_err(WorkError::system("open(/dev/hmm_dmirror0)"))
}

/// Loads a driver and waits for its node.
fn load(driver: &'static str) -> Result<(), WorkError> {
    modules::load(driver).map_err(|error| WorkError::Condition(error.to_string()))?;
    let there = || Path::new(&gpu::node(0)).exists().then_some(());
    poll(NODES, there).ok_or_else(|| {
        WorkError::Condition(format!("{driver} made no {} within {} s", gpu::node(0), NODES.as_secs()))
    })
}

/// The nodes of a driver, which are under their names only while it has its turn.
#[derive(Debug)]
struct Nodes {
    driver: &'static str,
    folder: PathBuf,
    names: Vec<OsString>,
}

impl Nodes {
    /// Takes down the nodes that are there, which are those of `driver`.
    fn park(driver: &'static str) -> Result<Self, WorkError> {
        let folder = Path::new(DEV).join(driver);
        fs::create_dir(&folder).map_err(WorkError::system("mkdir(/dev/<driver>)"))?;
        let prefix = gpu::node(0).trim_start_matches(DEV).trim_matches(['/', '0']).to_owned();
        let entries = fs::read_dir(DEV).map_err(WorkError::system("read_dir(/dev)"))?;
        let names = entries.flatten().map(|entry| entry.file_name());
        let names = names.filter(|name| name.to_string_lossy().starts_with(&prefix)).collect();
        let this = Self { driver, folder, names };
        this.take_down()?;
        Ok(this)
    }

    fn put_up(&self) -> Result<(), WorkError> {
        self.rename(&self.folder, Path::new(DEV))
    }

    fn take_down(&self) -> Result<(), WorkError> {
        self.rename(Path::new(DEV), &self.folder)
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<(), WorkError> {
        let mut names = self.names.iter();
        names
            .try_for_each(|name| fs::rename(from.join(name), to.join(name)))
            .map_err(WorkError::system("rename of a device node"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarks_tables_are_read() {
        let mut table = Table::default();
        let mut found = Vec::new();
        for line in [
            "=== Single THP Size (2MB) (2.0 MB) ===",
            "                     | With THP        | Without THP     | Improvement",
            "Sys->Dev Migration   | 20.971 ms        | 10.000 ms        | -6.6%",
            "Dev->Sys Migration   | 0.000 ms        | 2.000 ms        | 5.2%",
            "S->D Throughput      | 0.13 GB/s      | 0.13 GB/s      | -6.2%",
        ] {
            found.extend(table.line(line));
        }
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["sys-to-dev/2048K/2M", "sys-to-dev/2048K/4K", "dev-to-sys/2048K/4K"]);
        assert!((found[0].1 - 0.1).abs() < 1e-4, "{found:?}");
    }
}

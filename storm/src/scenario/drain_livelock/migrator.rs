//! The migrator: leads the rounds, and makes the mixed migrations.

use std::cell::Cell;
use std::thread;

use hmmstorm_abi::uapi::{SELECT_DEVICE_PRIVATE, SELECT_HUGE, SELECT_SYSTEM};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::faulter::{Faulter, STARTED, Step, stage};
use super::{BATCH_CPU, DrainLivelock, HOLDER, LEAD_LOOKS, MIGRATOR_CPU, idle};
use crate::board::{Board, Slot};
use crate::gpu::{Gpu, Owner};
use crate::machine::pin;
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::scenario::gate::{END, Gate};
use crate::scenario::real_time::Unthrottled;
use crate::scenario::{Context, WorkError};
use crate::sys::memory::{Mapping, PageSpan};
use crate::sys::process::fork;

/// Times that the device pages are asked to move before a round: a page whose folio somebody holds for a moment stays.
const PREPARE_TRIES: usize = 100;
/// Runs the scenario in this process.
pub(super) fn run(scenario: &DrainLivelock, context: &Context<'_>) -> Result<(), WorkError> {
    pin(MIGRATOR_CPU).map_err(WorkError::system("sched_setaffinity of the migrator"))?;
    let slot = context.board.slot(0);
    slot.enter("migrator");
    let _unthrottled = scenario.real_time.then(Unthrottled::new).transpose()?;
    let page = |pages| Mapping::private(pages).map_err(WorkError::system("mmap of the range"));
    let mapping = if scenario.huge {
        Mapping::block_beside_page(scenario.system_page() == 0)
            .map_err(WorkError::system("mmap of the range"))?
    } else {
        page(scenario.pages)?
    };
    let migrator = Migrator {
        scenario,
        board: context.board,
        slot,
        seed: context.seed,
        mapping,
        buffer: page(1)?,
        gpu: Gpu::open(HOLDER)?,
        gate: Gate::new(scenario.faulters).map_err(WorkError::system("mmap of the gate"))?,
        system_generation: Cell::new(0),
    };
    let mut rng = Rng::new(context.seed, 0);
    let mut first = 0;
    for crew in 0.. {
        let rounds = first..scenario.rounds.min(first + scenario.fork_every);
        if rounds.is_empty() {
            return migrator.check_by_cpu(crew);
        }
        first = rounds.end;
        migrator.new_generation(crew)?;
        migrator.with_crew(crew, |crew| migrator.rounds(crew, rounds, &mut rng))?;
    }
    Ok(())
}

struct Migrator<'a> {
    scenario: &'a DrainLivelock,
    board: &'a Board,
    slot: Slot<'a>,
    seed: u64,
    mapping: Mapping,
    buffer: Mapping,
    gpu: Gpu,
    gate: Gate,
    /// Writings of the system page so far.
    system_generation: Cell<u64>,
}

/// The faulters at work, as their leader sees them.
#[derive(Clone, Copy)]
struct Crew<'a> {
    /// Forked children; none if they are threads.
    children: &'a [Pid],
}

impl Migrator<'_> {
    fn span(&self, pages: std::ops::Range<usize>) -> Result<PageSpan<'_>, WorkError> {
        self.mapping
            .span(pages.clone())
            .ok_or_else(|| WorkError::Condition(format!("the mapping has no pages {pages:?}")))
    }

    /// What `page` holds while crew `crew` works.
    fn stamp(&self, page: usize, crew: u64) -> Stamp {
        let system = page == self.scenario.system_page();
        let generation = if system { self.system_generation.get() } else { crew + 1 };
        Stamp { seed: self.seed, page: page as u64, generation }
    }

    fn write_system_page(&self) {
        self.system_generation.set(self.system_generation.get() + 1);
        let page = self.scenario.system_page();
        self.stamp(page, 0).write(self.mapping.page(page));
    }

    /// Touches every page by the CPU, wherever it is, and checks what the crew before `crew` left.
    fn check_by_cpu(&self, crew: u64) -> Result<(), WorkError> {
        for page in (0..self.scenario.pages).filter(|_| crew > 0) {
            self.slot.begin();
            self.stamp(page, crew - 1)
                .check(self.mapping.page(page))
                .map_err(WorkError::seen("read by the CPU"))?;
            self.slot.complete(0);
        }
        Ok(())
    }

    /// Checks and rewrites all pages. Every other crew is forked with them in RAM, the others with them on the device.
    fn new_generation(&self, crew: u64) -> Result<(), WorkError> {
        self.check_by_cpu(crew)?;
        if self.scenario.huge {
            // Whatever became of it, the next touch makes one folio again.
            self.mapping
                .discard(self.scenario.device_pages())
                .map_err(WorkError::system("madvise(MADV_DONTNEED) of the huge page"))?;
        }
        for page in self.scenario.device_pages() {
            self.stamp(page, crew).write(self.mapping.page(page));
        }
        self.write_system_page();
        if crew.is_multiple_of(2) { self.move_device_pages() } else { Ok(()) }
    }

    /// Starts the faulters of crew `crew`, lets `lead` lead them, ends them.
    fn with_crew(
        &self,
        crew: u64,
        lead: impl FnOnce(Crew<'_>) -> Result<(), WorkError>,
    ) -> Result<(), WorkError> {
        self.gate.reset();
        let system = self.stamp(self.scenario.system_page(), crew);
        let faulter = |number| Faulter {
            scenario: self.scenario,
            mapping: &self.mapping,
            gate: &self.gate,
            slot: self.board.slot(number + 1),
            migrator: self.slot,
            number,
            seed: self.seed,
            crew,
            generation: crew + 1,
            system: (!self.scenario.threads).then_some(system),
        };
        if self.scenario.threads {
            return thread::scope(|scope| {
                for faulter in (0..self.scenario.faulters).map(faulter) {
                    scope.spawn(move || work(&faulter));
                }
                let led = lead(Crew { children: &[] });
                self.gate.announce(END);
                led
            });
        }
        let mut children = Vec::new();
        for faulter in (0..self.scenario.faulters).map(faulter) {
            let child = fork(|| {
                // The parent's end is the child's.
                let tied = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
                if tied.is_ok() && work(&faulter) { 0 } else { 1 }
            });
            match child {
                Ok(pid) => children.push(pid),
                Err(source) => {
                    kill(&children);
                    return Err(WorkError::System { call: "fork of a faulter", source });
                }
            }
        }
        let led = lead(Crew { children: &children });
        self.gate.announce(END);
        if led.is_err() {
            kill(&children);
            return led;
        }
        children.iter().try_for_each(|&child| match waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) if status.exit_status() == Some(0) => Ok(()),
            Ok(_) | Err(_) if self.board.has_finding() => Err(WorkError::Elsewhere),
            other => Err(WorkError::Condition(format!("faulter process {child} ended with {other:?}"))),
        })
    }

    /// Whether the faulters still can do what is asked of them.
    fn check_crew(&self, crew: Crew<'_>) -> Result<(), WorkError> {
        if self.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        for &child in crew.children {
            if let Ok(Some((_, status))) = waitpid(Some(child), WaitOptions::NOHANG) {
                let how = match status.terminating_signal() {
                    Some(signal) => format!("was killed by signal {signal}"),
                    None => format!("ended with status {:?}", status.exit_status()),
                };
                return Err(WorkError::Condition(format!(
                    "faulter process {child} {how} in the middle of its work"
                )));
            }
        }
        Ok(())
    }

    fn stage(&self, crew: Crew<'_>, stage: u32) -> Result<(), WorkError> {
        self.gate.announce(stage);
        self.await_stage(crew, stage)
    }

    fn await_stage(&self, crew: Crew<'_>, stage: u32) -> Result<(), WorkError> {
        self.gate.await_all(stage, || self.check_crew(crew))
    }

    fn rounds(&self, crew: Crew<'_>, rounds: std::ops::Range<u64>, rng: &mut Rng) -> Result<(), WorkError> {
        self.stage(crew, STARTED)?;
        for (n, round) in rounds.enumerate() {
            self.board.set_round(round);
            self.move_device_pages()?;
            self.stage(crew, stage(n as u64, Step::Prepare))?;
            self.touch_system_page_elsewhere()?;

            let reading = stage(n as u64, Step::Read);
            let leader = rng.up_to(self.scenario.faulters as u64 - 1) as usize;
            let lead =
                rng.up_to(self.scenario.lead.min(self.scenario.overlapping_reads(leader).count() as u64));
            let pause = rng.up_to(self.scenario.jitter);
            let target = self.board.slot(leader + 1).begun() + lead;
            self.gate.announce(reading);
            self.await_lead(leader, target);
            idle(pause);
            self.migrate_mixed_range()?;
            self.await_stage(crew, reading)?;
            if self.scenario.drained {
                self.stage(crew, stage(n as u64, Step::Rest))?;
            }
            self.check_system_page()?;
        }
        Ok(())
    }

    /// Brings every device page to the device.
    fn move_device_pages(&self) -> Result<(), WorkError> {
        let range = self.scenario.device_pages();
        for _ in 0..PREPARE_TRIES {
            self.slot.begin();
            let answer = self.gpu.migrate_here(self.span(range.clone())?, self.select(SELECT_SYSTEM))?;
            self.slot.migrated(range.len(), &answer);
            self.slot.complete(0);
            if self.gpu.holds(self.span(range.clone())?)? == range.len() {
                return self.check_huge();
            }
            thread::yield_now();
        }
        let held = self.gpu.holds(self.span(range.clone())?)?;
        Err(WorkError::Condition(format!(
            "{held} of {} pages are on GPU {HOLDER} after {PREPARE_TRIES} migrations while nobody used them",
            range.len()
        )))
    }

    fn select(&self, select: u32) -> u32 {
        if self.scenario.huge { select | SELECT_HUGE } else { select }
    }

    /// Small folios would prove nothing of huge ones.
    fn check_huge(&self) -> Result<(), WorkError> {
        if self.scenario.huge && self.gpu.stats()?.huge_to_device == 0 {
            return Err(WorkError::Condition("the device pages are not one folio of 2 MiB".to_owned()));
        }
        Ok(())
    }

    /// A fresh folio for the system page, in CPU 1's LRU batch.
    fn touch_system_page_elsewhere(&self) -> Result<(), WorkError> {
        let page = self.scenario.system_page();
        self.mapping
            .discard(page..page + 1)
            .map_err(WorkError::system("madvise(MADV_DONTNEED) of the system page"))?;
        pin(BATCH_CPU).map_err(WorkError::system("sched_setaffinity to the CPU of the batch"))?;
        self.write_system_page();
        pin(MIGRATOR_CPU).map_err(WorkError::system("sched_setaffinity back"))
    }

    /// Waits until the faulter has begun `target` reads in all.
    fn await_lead(&self, faulter: usize, target: u64) {
        for look in 1..LEAD_LOOKS {
            if self.board.slot(faulter + 1).begun() >= target {
                return;
            }
            if look.is_multiple_of(256) {
                if self.board.has_finding() {
                    return;
                }
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    /// The migration that the scenario is about.
    fn migrate_mixed_range(&self) -> Result<(), WorkError> {
        let range = self.span(0..self.scenario.pages)?;
        self.slot.begin();
        let done = self.gpu.migrate_here(range, self.select(SELECT_SYSTEM | SELECT_DEVICE_PRIVATE))?;
        self.slot.migrated(range.pages(), &done);
        self.slot.complete(0);
        if done.calls != 1 {
            return Err(WorkError::Condition(format!(
                "the mixed range took {} calls of migrate_vma_setup(): it is not one range any more",
                done.calls
            )));
        }
        Ok(())
    }

    /// The system page as the device sees it, on the device or not.
    fn check_system_page(&self) -> Result<(), WorkError> {
        let page = self.scenario.system_page();
        self.slot.begin();
        self.gpu.read(self.span(page..page + 1)?, &self.buffer, Owner::Own)?;
        self.stamp(page, 0)
            .check(self.buffer.page(0))
            .map_err(WorkError::seen(format!("read by GPU {HOLDER}")))?;
        self.slot.complete(0);
        Ok(())
    }
}

/// Works as `faulter`; whether that went well.
fn work(faulter: &Faulter<'_>) -> bool {
    faulter.run().inspect_err(|error| error.post(faulter.slot)).is_ok()
}

fn kill(children: &[Pid]) {
    for &child in children {
        // One that has ended already needs no signal; PID 1 reaps them.
        let _gone = kill_process(child, Signal::KILL);
    }
}

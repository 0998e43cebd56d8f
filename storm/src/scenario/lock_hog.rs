//! `lock-hog`: something keeps locking device folios and migrates none, while faults want them.

use std::time::Duration;

use super::access::Faults;
use super::definition::Parameters;
use super::range::Range;
use super::real_time::Unthrottled;
use super::team::{Crew, Member, Shape};
use super::{Context, ScenarioError, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::{Machine, pin};
use crate::rng::Rng;
use crate::sys::memory::{BLOCK_PAGES, Mapping};
use crate::sys::process::run_real_time;

/// GPU whose memory holds the pages.
const HOLDER: usize = 0;
/// The GPU that faults on them.
const FOREIGN: usize = 1;
/// Guest time of one call of the hog: it looks in between whether it is to stop.
const CALL: Duration = Duration::from_millis(200);

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LockHog {
    shape: Shape,
    hog: bool,
    holders_cpu: bool,
    faults: Faults,
    pages: usize,
    /// The pages are one folio of 2 MiB.
    huge: bool,
    /// Waiters run under `SCHED_FIFO`.
    real_time: bool,
    hold: Duration,
    gap: Duration,
    time: Duration,
}

impl LockHog {
    /// From its parameters.
    ///
    /// # Errors
    /// [`ScenarioError::Machine`] if waiters that are to stay off the hog's CPU find no others.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Result<Self, ScenarioError> {
        let waiters = parameters.integer("waiters") as usize;
        let holders_cpu = parameters.flag("holders_cpu");
        // The leader's CPU counts: a worker that spins there keeps the leader waiting, and nobody else.
        if !holders_cpu && waiters + 1 > machine.cpus {
            return Err(ScenarioError::Machine {
                scenario: format!("lock-hog (holders_cpu=0, waiters={waiters})"),
                needed: waiters + 1,
                what: "CPU",
                found: machine.cpus,
            });
        }
        let huge = parameters.choice("folio") == "2M";
        Ok(Self {
            shape: Shape::new(1 + waiters, 1, machine),
            hog: parameters.flag("hog"),
            holders_cpu,
            faults: Faults::from_parameters(parameters),
            pages: if huge { BLOCK_PAGES } else { parameters.integer("pages") as usize },
            huge,
            real_time: parameters.choice("sched") == "fifo",
            hold: Duration::from_micros(parameters.integer("hold_us")),
            gap: Duration::from_micros(parameters.integer("gap_us")),
            time: Duration::from_secs(parameters.integer("seconds")),
        })
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        let _unthrottled = self.real_time.then(Unthrottled::new).transpose()?;
        let mapping = if self.huge { Mapping::blocks(1, true) } else { Mapping::private(self.pages) };
        let range = Range::stamped(mapping.map_err(WorkError::system("mmap of the range"))?, context.seed, 0);
        let gpu = Gpu::open(HOLDER)?;
        let before = gpu.stats()?.huge_to_system;
        self.put_on_device(&range, 0..self.pages, &gpu, slot)?;
        self.shape.run(
            context,
            "waiter",
            |_| Ok(&range),
            |range, member| match member.number {
                0 => self.hog(range, member),
                _ => self.wait(range, context.seed, member),
            },
            |crew: &Crew<'_>| crew.let_run(self.time),
        )?;
        // Small folios would prove nothing of huge ones.
        if self.huge && gpu.stats()?.huge_to_system == before {
            return Err(WorkError::Condition("no fault found a folio of 2 MiB on the GPU".to_owned()));
        }
        range.check_all(slot)
    }

    /// Moves `pages` to the GPU; with a huge folio, all of it, as it is.
    fn put_on_device(
        &self,
        range: &Range,
        pages: std::ops::Range<usize>,
        gpu: &Gpu,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        if self.huge { range.migrate_huge(0..self.pages, gpu, slot) } else { range.migrate(pages, gpu, slot) }
    }

    /// The hog's work.
    fn hog(&self, range: &Range, member: Member<'_>) -> Result<(), WorkError> {
        member.slot.enter("hog");
        let gpu = Gpu::open(HOLDER)?;
        let once = self.hold + self.gap;
        let times = (CALL.as_nanos() / once.as_nanos().max(1)).clamp(1, 1000) as u64;
        let mut held = 0;
        while self.hog && !member.stopped() {
            member.slot.begin();
            held += gpu.hold(range.span(0..self.pages)?, times, self.hold, self.gap)?.held;
            member.slot.complete(0);
        }
        if self.hog && held == 0 && !member.failed() {
            return Err(WorkError::Condition(
                "no page was on the GPU when the hog wanted to lock it".to_owned(),
            ));
        }
        Ok(())
    }

    /// A waiter's work.
    fn wait(&self, range: &Range, seed: u64, member: Member<'_>) -> Result<(), WorkError> {
        if self.holders_cpu && member.number == 1 {
            pin(self.shape.cpu(0)).map_err(WorkError::system("sched_setaffinity to the hog's CPU"))?;
        }
        if self.real_time {
            run_real_time().map_err(WorkError::system("sched_setscheduler(SCHED_FIFO) of a waiter"))?;
        }
        let (here, other) = (Gpu::open(HOLDER)?, Gpu::open(FOREIGN)?);
        let buffer = Mapping::private(1).map_err(WorkError::system("mmap of a waiter's buffer"))?;
        let mut rng = Rng::new(seed, member.number as u64);
        while !member.stopped() {
            let page = rng.up_to(self.pages as u64 - 1) as usize;
            if self.faults.by_cpu(&mut rng) {
                range.check_by_cpu(page, member.slot)?;
            } else {
                range.check_by_gpu(page, &other, &buffer, Owner::Own, member.slot)?;
            }
            self.put_on_device(range, page..page + 1, &here, member.slot)?;
        }
        Ok(())
    }
}

impl Workload for LockHog {
    fn workers(&self) -> Vec<String> {
        let mut names = self.shape.names("leader", "waiter");
        names[1] = format!("hog@cpu{}", self.shape.cpu(0));
        if self.holders_cpu {
            names[2] = format!("waiter1@cpu{}", self.shape.cpu(0));
        }
        names
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

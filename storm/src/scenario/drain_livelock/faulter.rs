//! The faulters: device reads of pages that somebody is migrating.

use hmmstorm_abi::uapi;

use super::{DrainLivelock, FOREIGN, HOLDER, LEAD_LOOKS, Reader, Start, idle};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::pin;
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::scenario::WorkError;
use crate::scenario::access::{check_sum, page_sum};
use crate::scenario::gate::{END, Gate};
use crate::sys::memory::{Mapping, PageSpan};
use crate::sys::process::run_real_time;

/// What a faulter does at a stage; see [`stage`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Get ready for a round.
    Prepare,
    /// Read device pages while the migration runs.
    Read,
    /// Read those that were left out.
    Rest,
}

/// The gate's stage for `step` of the crew's `round`-th round. Stage 1 is "has started".
pub(super) fn stage(round: u64, step: Step) -> u32 {
    // Rounds of one crew are at most `fork_every`, a million.
    STARTED + 1 + 3 * round as u32 + step as u32
}

/// What a stage after [`STARTED`] asks for.
fn step(stage: u32) -> Step {
    match (stage - STARTED - 1) % 3 {
        0 => Step::Prepare,
        1 => Step::Read,
        _ => Step::Rest,
    }
}

/// Stage at which a crew has opened its GPUs and touched all memory that it will use.
pub(super) const STARTED: u32 = 1;

/// Index by which a faulter's own page is known; no page of the range has it.
const SCRATCH: u64 = u32::MAX as u64;

/// One faulter of one crew.
#[derive(Clone, Debug)]
pub(super) struct Faulter<'a> {
    pub(super) scenario: &'a DrainLivelock,
    pub(super) mapping: &'a Mapping,
    pub(super) gate: &'a Gate,
    pub(super) slot: Slot<'a>,
    /// The migrator's place on the board.
    pub(super) migrator: Slot<'a>,
    /// Its number, from 0.
    pub(super) number: usize,
    pub(super) seed: u64,
    /// Crews before this one.
    pub(super) crew: u64,
    /// Generation of the device pages.
    pub(super) generation: u64,
    /// For a forked child: what its own copy of the system page holds for good, whatever the parent does with its own.
    pub(super) system: Option<Stamp>,
}

impl Faulter<'_> {
    /// Works until the gate says end.
    pub(super) fn run(&self) -> Result<(), WorkError> {
        self.slot.enter(&format!("faulter{}", self.number));
        pin(self.scenario.faulter_cpu(self.number))
            .map_err(WorkError::system("sched_setaffinity of a faulter"))?;
        if self.scenario.real_time {
            run_real_time().map_err(WorkError::system("sched_setscheduler(SCHED_FIFO) of a faulter"))?;
        }
        let reader = Reading::new(self)?;
        let mut rng = Rng::new(self.seed, self.crew << 8 | (self.number as u64 + 1));
        let (mut last, mut begun) = (0, 0);
        loop {
            last = self.gate.await_stage(last).map_err(WorkError::system("futex wait of a faulter"))?;
            match last {
                END => return Ok(()),
                STARTED => reader.warm_up()?,
                stage => match step(stage) {
                    Step::Prepare => {
                        self.check_system_page()?;
                        reader.prepare()?;
                        begun = self.migrator.begun();
                    }
                    Step::Read => {
                        self.await_migration(begun);
                        idle(rng.up_to(self.scenario.jitter * self.scenario.patience()));
                        self.scenario
                            .overlapping_reads(self.number)
                            .try_for_each(|page| reader.read(page))?;
                    }
                    Step::Rest => {
                        self.scenario.other_reads(self.number).try_for_each(|page| reader.read(page))?
                    }
                },
            }
            self.gate.done(self.number, last);
        }
    }

    /// With a huge folio, waits until the mixed migration is about to begin, which is the migrator's next operation after
    /// `begun`: before that, one read would take the only device folio away from it.
    fn await_migration(&self, begun: u64) {
        let looks = if self.scenario.huge { LEAD_LOOKS } else { 0 };
        for _ in 0..looks {
            if self.migrator.begun() > begun {
                return;
            }
            std::hint::spin_loop();
        }
    }

    fn check_system_page(&self) -> Result<(), WorkError> {
        let Some(stamp) = self.system else { return Ok(()) };
        stamp
            .check(self.mapping.page(self.scenario.system_page()))
            .map_err(WorkError::seen("the child's own copy, read by the CPU"))
    }
}

/// What a faulter reads with.
struct Reading<'a> {
    faulter: &'a Faulter<'a>,
    gpu: Gpu,
    owner: Owner,
    buffer: Mapping,
    /// One page to put a fresh folio into this CPU's LRU batch with.
    scratch: Mapping,
    /// Never touched; see [`Mapping::drain_local_lru`].
    untouched: Mapping,
}

impl<'a> Reading<'a> {
    fn new(faulter: &'a Faulter<'a>) -> Result<Self, WorkError> {
        let (index, owner) = match faulter.scenario.reader {
            Reader::Foreign => (FOREIGN, Owner::Own),
            Reader::Nobody => (HOLDER, Owner::None),
            Reader::Own => (HOLDER, Owner::Own),
        };
        let page = || Mapping::private(1).map_err(WorkError::system("mmap of a faulter's page"));
        let gpu = Gpu::open(index)?;
        if faulter.scenario.start == Start::Job {
            // A job's page comes to system memory, as a call's does.
            gpu.set_policy(owner.policy(uapi::PLACE_STAY))?;
        }
        Ok(Self { faulter, gpu, owner, buffer: page()?, scratch: page()?, untouched: page()? })
    }

    /// One read of an ordinary page, checked: whatever the path needs for the first time, it gets here and not in a round.
    fn warm_up(&self) -> Result<(), WorkError> {
        let stamp = Stamp { seed: self.faulter.seed, page: SCRATCH, generation: 1 };
        stamp.write(self.scratch.page(0));
        let span =
            self.scratch.span(0..1).ok_or_else(|| WorkError::Condition("no scratch page".to_owned()))?;
        self.load(span, stamp)?;
        self.drain()
    }

    /// Has the GPU read a page and checks what it found, as soon as `after` has taken note of its return. Gives the number of
    /// times that the GPU had to fault.
    fn load_then(&self, span: PageSpan<'_>, stamp: Stamp, after: impl FnOnce()) -> Result<u64, WorkError> {
        match self.faulter.scenario.start {
            Start::Call => {
                let faults = self.gpu.read(span, &self.buffer, self.owner)?.faults;
                after();
                stamp
                    .check(self.buffer.page(0))
                    .map_err(WorkError::seen(format!("read by GPU {}", self.gpu.index())))?;
                Ok(faults)
            }
            Start::Job => {
                let outcome = self.gpu.run_here(span, page_sum(span))?;
                after();
                check_sum(stamp, &outcome, &self.gpu)?;
                Ok(outcome.faults)
            }
        }
    }

    fn load(&self, span: PageSpan<'_>, stamp: Stamp) -> Result<u64, WorkError> {
        self.load_then(span, stamp, || ())
    }

    fn drain(&self) -> Result<(), WorkError> {
        self.untouched
            .drain_local_lru()
            .map_err(WorkError::system("madvise(MADV_COLD), to drain the LRU batches"))
    }

    /// Gives this CPU a folio to drain, or makes sure that it has none.
    fn prepare(&self) -> Result<(), WorkError> {
        if self.faulter.scenario.drained {
            return self.drain();
        }
        self.scratch
            .discard(0..1)
            .map_err(WorkError::system("madvise(MADV_DONTNEED) of the scratch page"))?;
        Stamp { seed: self.faulter.seed, page: SCRATCH, generation: 2 }.write(self.scratch.page(0));
        Ok(())
    }

    fn read(&self, page: usize) -> Result<(), WorkError> {
        let Faulter { mapping, slot, seed, generation, .. } = self.faulter;
        let span =
            mapping.span(page..page + 1).ok_or_else(|| WorkError::Condition(format!("no page {page}")))?;
        slot.begin();
        let stamp = Stamp { seed: *seed, page: page as u64, generation: *generation };
        let faults = self.load_then(span, stamp, || slot.returned())?;
        slot.complete(u64::from(faults > 0));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_come_in_order_and_tell_their_steps() {
        let steps = [Step::Prepare, Step::Read, Step::Rest];
        let mut last = STARTED;
        for round in [0, 1, 2, 999_999] {
            for wanted in steps {
                let stage = stage(round, wanted);
                assert!(last < stage && stage < END);
                assert_eq!(step(stage), wanted);
                last = stage;
            }
        }
    }
}

//! The access engine: jobs of loads, stores and atomics at virtual addresses.
//!
//! A job runs in stretches of some thousand accesses. Between two of them it holds neither DMA map nor address space,
//! so that removals and invalidations get their turn, and it looks whether a reset wants the channel. A page fault
//! ends a stretch too: the job keeps its place, and what the driver does to the fault decides how it goes on.

use hmmstorm_abi::job::{JOB_SIZE, Job, OUTCOME_SIZE, Outcome};
use hmmstorm_abi::mmu::{Fault, PAGE_SHIFT, Reason, Want};
use hmmstorm_abi::ring::{Descriptor, Location};

use super::place::Place;
use super::session::Session;
use super::shader::{self, Pause, Walker};
use super::{Failure, Progress, words_of};
use crate::faults::{Report, Verdict};
use crate::guest_memory::Need;

/// Why a job keeps its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspended {
    /// It waits for the driver to serve a page fault.
    Fault {
        /// The driver is to be told by an interrupt.
        interrupt: bool,
    },
    /// The chaos plan does not let the channel run.
    Held,
}

/// A job under way.
#[derive(Debug)]
pub struct Running {
    words: [u64; 8],
    asid: u32,
    /// Where its description is; the outcome follows.
    at: Location,
    job: Job,
    walker: Walker,
    outcome: Outcome,
    /// The address at which it stalled last.
    fault_va: u64,
}

impl Running {
    /// Reads and checks the job of a descriptor with these words.
    ///
    /// # Errors
    /// [`Failure::Job`].
    pub fn start(
        session: &mut Session<'_>,
        words: [u64; 8],
        descriptor: &Descriptor,
    ) -> Result<Self, Failure> {
        const BOTH: u64 = (JOB_SIZE + OUTCOME_SIZE) as u64;
        let Descriptor { count: asid, src: at, .. } = *descriptor;
        let core = session.core;
        let unreachable = |_| Failure::Job("job and outcome are not in memory that can be read and written");
        let place = Place::of(core, at, BOTH).map_err(unreachable)?;
        let guard = session.guard();
        place.check(guard, BOTH, Need::Write).map_err(unreachable)?;
        let mut bytes = [0; JOB_SIZE];
        place.read(guard, &mut bytes).map_err(unreachable)?;
        let job = Job::from_words(words_of(&bytes))
            .ok_or(Failure::Job("an unknown operation or pattern, or fields that contradict each other"))?;
        let walker = Walker::new(&job);
        Ok(Self { words, asid, at, job, walker, outcome: Outcome::default(), fault_va: 0 })
    }

    /// The words of its descriptor.
    pub const fn words(&self) -> [u64; 8] {
        self.words
    }

    /// Runs until the end, a page fault that has to wait, or a plan that holds the channel.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn run(&mut self, session: &mut Session<'_>) -> Result<Progress, Failure> {
        let core = session.core;
        match core.faults.verdict(session.channel) {
            Verdict::Pending => return Ok(Progress::Suspended(Suspended::Fault { interrupt: false })),
            Verdict::Cancelled => return Err(self.page_fault()),
            Verdict::None | Verdict::Replayed => {}
        }
        loop {
            session.breathe()?;
            if core.holds(session.channel) {
                return Ok(Progress::Suspended(Suspended::Held));
            }
            match self.stretch(session)? {
                Pause::Done => return Ok(Progress::Done),
                Pause::Breath => {}
                Pause::Fault { va, want, reason } => return self.stall(session, va, want, reason),
            }
        }
    }

    /// One stretch of accesses, with DMA map and address space held.
    fn stretch(&mut self, session: &mut Session<'_>) -> Result<Pause, Failure> {
        let core = session.core;
        let guard = session.guard();
        let space = core
            .mmu
            .space(self.asid)
            .ok_or(Failure::Job("an address space that does not exist or has no page table"))?;
        let before = self.outcome;
        let pause = shader::run(core, guard, &space, &self.job, &mut self.walker, &mut self.outcome);
        core.stats.accesses.add(self.outcome.done - before.done);
        core.stats.mismatches.add(self.outcome.mismatches - before.mismatches);
        pause
    }

    fn stall(
        &mut self,
        session: &mut Session<'_>,
        va: u64,
        want: Want,
        reason: Reason,
    ) -> Result<Progress, Failure> {
        self.fault_va = va;
        self.outcome.faults += 1;
        let fault = Fault {
            va: va >> PAGE_SHIFT << PAGE_SHIFT,
            sequence: 0,
            // It is bound, so it is one of the few there are.
            asid: self.asid as u16,
            want,
            reason,
            channel: session.channel,
        };
        match session.core.faults.report(session.core, session.guard(), fault) {
            Report::Stalled { interrupt } => Ok(Progress::Suspended(Suspended::Fault { interrupt })),
            Report::Unreported => Err(self.page_fault()),
        }
    }

    const fn page_fault(&self) -> Failure {
        Failure::PageFault { asid: self.asid, va: self.fault_va }
    }

    /// Writes what came out behind the job.
    ///
    /// # Errors
    /// [`Failure`] if that memory is gone meanwhile.
    pub fn put_outcome(&self, session: &mut Session<'_>) -> Result<(), Failure> {
        let at = Location { address: self.at.address + JOB_SIZE as u64, ..self.at };
        let place = Place::of(session.core, at, OUTCOME_SIZE as u64)?;
        let guard = session.guard();
        place.check(guard, OUTCOME_SIZE as u64, Need::Write)?;
        let mut bytes = [0; OUTCOME_SIZE];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(self.outcome.to_words()) {
            *bytes = word.to_le_bytes();
        }
        place.write(guard, &bytes)
    }
}

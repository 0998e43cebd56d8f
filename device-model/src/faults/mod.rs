//! Page faults of jobs: who waits for what, and the buffer that tells the driver.
//!
//! A job that faults is *pending* until a replay lets it look again or a cancel ends it. The entry that stands for
//! it may stand for others too: see [`hmmstorm_abi::mmu::Fault`]. Each channel has one job, so there are at most as
//! many pending faults as channels.
//!
//! The lock here is innermost: taken with the DMA map held, and never held while anything waits.

pub mod buffer;

use std::sync::{Mutex, MutexGuard, PoisonError};

use hmmstorm_abi::mmu::{Fault, PAGE_SHIFT, Reason, Want};
use hmmstorm_abi::pci::{CHANNELS, VECTOR_DEVICE};

use crate::chaos::ReportFate;
use crate::core::Core;
use crate::guest_memory::DmaGuard;
use buffer::{Buffer, BufferError, Put, Settings};

/// What became of the fault of a channel's job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// It has none.
    #[default]
    None,
    /// It waits for the driver.
    Pending,
    /// The job is to look again.
    Replayed,
    /// The job is to end.
    Cancelled,
}

/// What became of a report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    /// The job has to wait.
    Stalled {
        /// The driver is to be told by an interrupt.
        interrupt: bool,
    },
    /// There is no buffer to report in: the job has to end.
    Unreported,
}

/// The fault of one channel's job.
#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    verdict: Verdict,
    /// Number of the entry that stands for it; none if the buffer was full.
    sequence: Option<u32>,
}

/// A set of channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Channels(u32);

const _: () = assert!(CHANNELS <= u32::BITS as usize);

impl Channels {
    /// Whether `channel` is one of them.
    pub const fn has(self, channel: usize) -> bool {
        self.0 & (1 << channel) != 0
    }
    /// How many they are.
    pub const fn count(self) -> u64 {
        self.0.count_ones() as u64
    }
}

#[derive(Debug, Default)]
struct State {
    settings: Settings,
    buffer: Option<Buffer>,
    /// Number of the entry reported last.
    sequence: u32,
    /// Entries that neither a replay nor a cancel has followed yet; each has a job that waits.
    open: Vec<Fault>,
    waiting: [Waiting; CHANNELS],
}

/// The page faults of one GPU.
#[derive(Debug, Default)]
pub struct Faults(Mutex<State>);

impl Faults {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports a fault of the job of `fault.channel`, whose sequence number is found here.
    pub fn report(&self, core: &Core, guard: &DmaGuard<'_>, fault: Fault) -> Report {
        let mut state = self.lock();
        let channel = usize::from(fault.channel);
        if state.buffer.is_none() {
            state.waiting[channel] = Waiting::default();
            return Report::Unreported;
        }
        let covering =
            |open: &&Fault| open.asid == fault.asid && open.va == fault.va && open.want >= fault.want;
        if let Some(open) = state.open.iter().find(covering) {
            let sequence = Some(open.sequence);
            core.stats.faults_coalesced.increment();
            state.waiting[channel] = Waiting { verdict: Verdict::Pending, sequence };
            return Report::Stalled { interrupt: false };
        }
        let fate = core.chaos.report();
        if fate != ReportFate::default() {
            core.stats.chaos.increment();
        }
        if fate.dropped {
            // Like an overflow, but nobody is told.
            state.waiting[channel] = Waiting { verdict: Verdict::Pending, sequence: None };
            return Report::Stalled { interrupt: false };
        }
        match state.put_as_planned(core, guard, fault, fate) {
            Ok(Put::Entered { sequence, interrupt }) => {
                core.stats.faults.increment();
                state.open.push(Fault { sequence, ..fault });
                state.waiting[channel] = Waiting { verdict: Verdict::Pending, sequence: Some(sequence) };
                Report::Stalled { interrupt }
            }
            Ok(Put::Full) => {
                core.stats.faults_overflowed.increment();
                state.waiting[channel] = Waiting { verdict: Verdict::Pending, sequence: None };
                // The driver may have looked at the overflow count for the last time already.
                Report::Stalled { interrupt: true }
            }
            Err(error) => {
                // Jobs that wait already find no buffer either when they look again.
                (state.buffer, state.open) = (None, Vec::new());
                state.waiting[channel] = Waiting::default();
                drop(state);
                core.stats.dma_faults.increment();
                core.complaints.ring.log(core.index, format_args!("the fault buffer is turned off: {error}"));
                core.raise(VECTOR_DEVICE);
                Report::Unreported
            }
        }
    }

    /// What became of the fault of `channel`'s job. One that was decided is forgotten by the question.
    pub fn verdict(&self, channel: u16) -> Verdict {
        let mut state = self.lock();
        let waiting = &mut state.waiting[usize::from(channel)];
        match waiting.verdict {
            Verdict::Pending => Verdict::Pending,
            decided => {
                *waiting = Waiting::default();
                decided
            }
        }
    }

    /// Whether `channel`'s job waits for the driver.
    pub fn is_pending(&self, channel: u16) -> bool {
        self.lock().waiting[usize::from(channel)].verdict == Verdict::Pending
    }

    /// Channels whose job waits for the driver.
    pub fn pending(&self) -> u64 {
        let pending = |waiting: &&Waiting| waiting.verdict == Verdict::Pending;
        self.lock().waiting.iter().filter(pending).count() as u64
    }

    /// Lets every job that waits look again; says whose.
    pub fn replay(&self) -> Channels {
        let mut state = self.lock();
        state.open.clear();
        state.decide(Verdict::Replayed, |_| true)
    }

    /// Ends the jobs that entry `sequence` stands for; says whose.
    pub fn cancel(&self, sequence: u32) -> Channels {
        let mut state = self.lock();
        state.open.retain(|open| open.sequence != sequence);
        state.decide(Verdict::Cancelled, |waiting| waiting.sequence == Some(sequence))
    }

    /// Forgets the fault of `channel`'s job, which is no more.
    pub fn forget(&self, channel: u16) {
        let mut state = self.lock();
        let sequence = std::mem::take(&mut state.waiting[usize::from(channel)]).sequence;
        // An entry that nobody waits for must stand for nobody who comes later: the driver may be done with it.
        let waited_for =
            state.waiting.iter().any(|other| other.sequence.is_some() && other.sequence == sequence);
        if !waited_for {
            state.open.retain(|open| Some(open.sequence) != sequence);
        }
    }

    /// The settings, as the registers show them.
    pub fn settings(&self) -> Settings {
        self.lock().settings
    }

    /// Whether faults are reported.
    pub fn is_enabled(&self) -> bool {
        self.lock().buffer.is_some()
    }

    /// Changes the settings; false if the buffer is enabled, which changes nothing then.
    pub fn set(&self, change: impl FnOnce(&mut Settings)) -> bool {
        let mut state = self.lock();
        let disabled = state.buffer.is_none();
        if disabled {
            change(&mut state.settings);
        }
        disabled
    }

    /// Begins to report, from index 0 on. To enable an enabled buffer changes nothing.
    ///
    /// # Errors
    /// [`BufferError`] if the settings make no buffer.
    pub fn enable(&self, core: &Core) -> Result<(), BufferError> {
        let guard = core.memory.guard();
        let mut state = self.lock();
        if state.buffer.is_none() {
            state.buffer = Some(Buffer::open(state.settings, core, &guard)?);
        }
        Ok(())
    }

    /// Reports no more, and ends every job that waits; says whose.
    pub fn disable(&self) -> Channels {
        self.lock().disable()
    }

    /// Back to the state after power-on.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.disable();
        state.settings = Settings::default();
    }
}

impl State {
    fn decide(&mut self, verdict: Verdict, of: impl Fn(&Waiting) -> bool) -> Channels {
        let mut decided = Channels::default();
        for (at, waiting) in self.waiting.iter_mut().enumerate() {
            if waiting.verdict == Verdict::Pending && of(waiting) {
                *waiting = Waiting { verdict, sequence: None };
                decided.0 |= 1 << at;
            }
        }
        decided
    }

    fn disable(&mut self) -> Channels {
        self.buffer = None;
        self.open.clear();
        self.decide(Verdict::Cancelled, |_| true)
    }

    /// Puts `fault` into the buffer, and what the chaos plan adds to it.
    fn put_as_planned(
        &mut self,
        core: &Core,
        guard: &DmaGuard<'_>,
        fault: Fault,
        fate: ReportFate,
    ) -> Result<Put, BufferError> {
        if fate.overflowed
            && let Some(buffer) = &mut self.buffer
        {
            return buffer.overflow(guard);
        }
        let put = self.put(core, guard, fault)?;
        let Put::Entered { sequence, mut interrupt } = put else { return Ok(put) };
        let mut add = |put: Put| {
            if let Put::Entered { interrupt: wanted, .. } = put {
                interrupt |= wanted;
            }
        };
        if fate.doubled
            && let Some(buffer) = &mut self.buffer
        {
            add(buffer.put(core, guard, Fault { sequence, ..fault })?);
        }
        if let Some(away) = fate.spurious {
            let va = fault.va.wrapping_add(away << PAGE_SHIFT);
            // No job waits for it, so it is not remembered: it stands for none that comes later.
            add(self.put(
                core,
                guard,
                Fault { va, want: Want::Read, reason: Reason::NotPresent, ..fault },
            )?);
        }
        Ok(Put::Entered { sequence, interrupt })
    }

    /// Numbers `fault` and puts it into the buffer.
    fn put(&mut self, core: &Core, guard: &DmaGuard<'_>, fault: Fault) -> Result<Put, BufferError> {
        let Some(buffer) = &mut self.buffer else { return Ok(Put::Full) };
        // 0 is no number.
        let sequence = self.sequence.checked_add(1).unwrap_or(1);
        let put = buffer.put(core, guard, Fault { sequence, ..fault })?;
        if put != Put::Full {
            self.sequence = sequence;
        }
        Ok(put)
    }
}

//! The loop that works through a channel's ring.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hmmstorm_abi::pci::{VECTOR_CHANNEL0, VECTOR_DEVICE, VECTOR_FAULT};
use hmmstorm_abi::ring::{FLAG_IRQ, FLAG_IRQ_ARMED, Opcode, Status, fence_of_words};

use super::vigil::Vigil;
use super::{Channel, Run, State};
use crate::config::Mode;
use crate::core::Core;
use crate::engine::access::Suspended;
use crate::engine::session::Session;
use crate::engine::{Engine, Failure, Progress};
use crate::fence;
use crate::guest_memory::DmaGuard;
use crate::reset::Held;
use crate::ring::{Ring, RingError};

/// How often a synchronous doorbell looks again for a publication that raced with it.
const ARM_ATTEMPTS: u32 = 16;

/// Why work on a ring stopped.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Nothing is pending, and the event index asks for a doorbell.
    Idle,
    /// The chaos plan does not let the channel run.
    Held,
    /// A job waits for the driver to serve a page fault.
    Stalled,
    /// The ring cannot be used.
    Halted(Status),
    /// A reset wants the channel.
    Cancelled,
}

/// What became of one descriptor.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// It is complete; whether it wants an interrupt.
    Completed(bool),
    /// It keeps its place.
    Suspended(Suspended),
    /// A reset dropped it.
    Dropped,
}

impl Channel {
    /// The worker thread of threaded mode; returns after [`Channel::stop`].
    pub(crate) fn work(&self, core: &Core) {
        let mut vigil = Vigil::new(core.poll);
        loop {
            let mut state = self.lock();
            let ring = loop {
                match state.run {
                    _ if state.exit => return,
                    Run::Enabled(ring) if state.doorbell => break ring,
                    _ => state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            state.doorbell = false;
            state.busy = true;
            drop(state);
            self.work_on(core, ring, |ring| self.serve(core, ring, &mut vigil));
        }
    }

    /// Synchronous mode: works on the ring here and now.
    pub(super) fn serve_now(&self, core: &Core, state: MutexGuard<'_, State>) {
        let mut state =
            self.idle.wait_while(state, |state| state.busy).unwrap_or_else(PoisonError::into_inner);
        if let Run::Enabled(ring) = state.run {
            state.busy = true;
            drop(state);
            self.work_on(core, ring, |ring| self.serve_doorbell(core, ring));
        }
    }

    /// Serves `ring`, with the channel marked busy, and puts down how it ended.
    fn work_on(&self, core: &Core, mut ring: Ring, serve: impl FnOnce(&mut Ring) -> Rest) {
        // A fault of our own must not leave a channel busy for good, nor take the other GPU down.
        let rest = catch_unwind(AssertUnwindSafe(|| serve(&mut ring))).unwrap_or_else(|_| {
            log::error!(
                "gpu{}: channel {} met a fault of the device model and halts",
                core.index,
                self.index
            );
            Rest::Halted(Status::BadDescriptor)
        });
        let mut state = self.lock();
        state.busy = false;
        state.run = match rest {
            Rest::Halted(status) => Run::Halted(status),
            Rest::Idle | Rest::Held | Rest::Stalled | Rest::Cancelled => Run::Enabled(ring),
        };
        drop(state);
        self.idle.notify_all();
        if matches!(rest, Rest::Halted(_)) {
            core.raise(VECTOR_DEVICE);
        }
    }

    /// Threaded mode: drains the ring, looks for more for a while, then asks for a doorbell.
    fn serve(&self, core: &Core, ring: &mut Ring, vigil: &mut Vigil) -> Rest {
        vigil.ends(Instant::now());
        loop {
            match self.drain(core, ring, u32::MAX) {
                Ok(Rest::Idle) => {}
                Ok(rest) => return rest,
                Err(error) => return Rest::Halted(self.halt(core, error)),
            }
            match self.await_more(core, ring, vigil) {
                Ok(true) => {}
                Ok(false) => return Rest::Idle,
                Err(error) => return Rest::Halted(self.halt(core, error)),
            }
        }
    }

    /// Polls for a publication as long as is worth while, then asks for a doorbell; true if there is work now.
    fn await_more(&self, core: &Core, ring: &Ring, vigil: &mut Vigil) -> Result<bool, RingError> {
        let start = Instant::now();
        let length = vigil.begins(start);
        while start.elapsed() < length && self.cancel.requested().is_none() {
            if ring.pending(core)? > 0 {
                vigil.ends(Instant::now());
                return Ok(true);
            }
            // Whoever could publish may be waiting for this CPU.
            std::thread::yield_now();
        }
        Ok(ring.arm(core, ring.head())? > 0)
    }

    /// Synchronous mode: executes what is published. The event index moves to the tail *before* the work, so that a
    /// publication from now on finds that it has to ring, however long this takes.
    fn serve_doorbell(&self, core: &Core, ring: &mut Ring) -> Rest {
        let published = || {
            let mut pending = ring.pending(core)?;
            for _ in 0..ARM_ATTEMPTS {
                let again = ring.arm(core, ring.head().wrapping_add(pending))?;
                if again == pending {
                    break;
                }
                pending = again;
            }
            Ok(pending)
        };
        match published().and_then(|pending| self.drain(core, ring, pending)) {
            Ok(rest) => rest,
            Err(error) => Rest::Halted(self.halt(core, error)),
        }
    }

    /// Executes descriptors until none is pending, `most` are done, or something else comes first.
    fn drain(&self, core: &Core, ring: &mut Ring, most: u32) -> Result<Rest, RingError> {
        let mut engine = self.engine();
        for _ in 0..most {
            if core.holds(self.index) {
                return Ok(Rest::Held);
            }
            // A job that kept its place stands before everything else, whatever the ring says by now.
            if engine.suspended().is_none() {
                if ring.pending(core)? == 0 {
                    break;
                }
                if core.mode == Mode::Threaded && core.chaos.delays() {
                    self.wait_as_planned(core, ring)?;
                }
            }
            if self.cancel.requested().is_some() {
                return Ok(Rest::Cancelled);
            }
            match self.step(core, ring, &mut engine)? {
                Step::Completed(false) => {}
                Step::Completed(true) => core.raise(VECTOR_CHANNEL0 + self.index),
                Step::Suspended(Suspended::Held) => return Ok(Rest::Held),
                Step::Suspended(Suspended::Fault { interrupt }) => {
                    if interrupt {
                        core.raise(VECTOR_FAULT);
                    }
                    return Ok(Rest::Stalled);
                }
                Step::Dropped => return Ok(Rest::Cancelled),
            }
        }
        Ok(Rest::Idle)
    }

    /// Executes the next descriptor, or goes on with the one that kept its place, and completes it.
    fn step(&self, core: &Core, ring: &mut Ring, engine: &mut Engine) -> Result<Step, RingError> {
        let mut session = Session::new(core, self.index, &self.cancel);
        let (words, outcome) = match engine.suspended() {
            Some(words) => (words, engine.resume(&mut session)),
            None => {
                let words = ring.fetch(session.guard())?;
                (words, engine.execute(&mut session, words))
            }
        };
        let outcome = match outcome {
            Ok(Progress::Suspended(why)) => return Ok(Step::Suspended(why)),
            Ok(Progress::Done) => Ok(()),
            Err(Failure::Aborted(Held::Drop)) => return Ok(Step::Dropped),
            Err(failure) => Err(failure),
        };
        self.complete(core, &mut session, ring, words, outcome)?;
        Ok(Step::Completed(wants_interrupt(session.guard(), words)))
    }

    /// Puts down how a descriptor ended: statistics, log, fence, head.
    fn complete(
        &self,
        core: &Core,
        session: &mut Session<'_>,
        ring: &mut Ring,
        words: [u64; 8],
        outcome: Result<(), Failure>,
    ) -> Result<(), RingError> {
        let status = outcome.map_or_else(Failure::status, |()| Status::Ok);
        let channel = self.index;
        match outcome {
            Ok(()) => {}
            Err(failure) if failure.is_expected() => {}
            Err(failure) => {
                if matches!(failure, Failure::Dma(_)) {
                    core.stats.dma_faults.increment();
                }
                let at = ring.head();
                core.complaints
                    .descriptor
                    .log(core.index, format_args!("channel {channel} entry {at}: {failure}"));
            }
        }
        let signalled = match fence_of_words(words) {
            Some((address, value)) => fence::signal(session.guard(), address, value, status),
            None => Ok(()),
        };
        if let Err(fault) = signalled {
            core.stats.dma_faults.increment();
            core.complaints.ring.log(core.index, format_args!("channel {channel} fence: {fault}"));
        }
        core.stats.completions.increment();
        core.order.moved();
        if status != Status::Ok || signalled.is_err() {
            core.stats.errors.increment();
        }
        let consumed = ring.consume(session.guard());
        self.head.store(ring.head(), Ordering::Relaxed);
        consumed
    }

    /// Forgets a job that keeps its place.
    pub(super) fn give_up_job(&self) {
        *self.engine() = Engine::default();
    }

    fn engine(&self) -> MutexGuard<'_, Engine> {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes everything that is pending as aborted.
    pub(super) fn abort_pending(&self, core: &Core, mut ring: Ring) {
        // At most a ring's length, even if the guest publishes more meanwhile.
        let mut abort = || {
            for _ in 0..ring.pending(core)? {
                let mut session = Session::new(core, self.index, &self.cancel);
                let words = match self.engine().abort(&mut session) {
                    Some(words) => words,
                    None => ring.fetch(session.guard())?,
                };
                let aborted = Err(Failure::Aborted(Held::Abort));
                self.complete(core, &mut session, &mut ring, words, aborted)?;
                let interrupt = wants_interrupt(session.guard(), words);
                drop(session);
                if interrupt {
                    core.raise(VECTOR_CHANNEL0 + self.index);
                }
            }
            Ok(())
        };
        if let Err(error) = abort() {
            self.halt(core, error);
        }
    }

    /// Waits before the next descriptor as the chaos plan wants it.
    fn wait_as_planned(&self, core: &Core, ring: &Ring) -> Result<(), RingError> {
        let words = ring.fetch(&core.memory.guard())?;
        self.pause(core.chaos.latency(Opcode::from_u8(words[0] as u8)));
        if let Some(time) = core.chaos.holds_back() {
            core.stats.chaos.increment();
            core.order.wait(time, || self.cancel.requested().is_some());
        }
        Ok(())
    }

    /// Waits, but not past a reset.
    fn pause(&self, time: Duration) {
        if !time.is_zero() {
            let state = self.lock();
            let undisturbed = |_: &mut State| self.cancel.requested().is_none();
            drop(self.wake.wait_timeout_while(state, time, undisturbed));
        }
    }

    /// Logs why the channel halts, and gives the code for it.
    pub(super) fn halt(&self, core: &Core, error: RingError) -> Status {
        if matches!(error, RingError::Dma(_)) {
            core.stats.dma_faults.increment();
        }
        core.complaints.ring.log(core.index, format_args!("channel {} halts: {error}", self.index));
        error.status()
    }
}

/// Whether a descriptor that is complete wants its interrupt.
fn wants_interrupt(guard: &DmaGuard<'_>, words: [u64; 8]) -> bool {
    let flags = (words[0] >> 8) as u8;
    if flags & FLAG_IRQ == 0 {
        return false;
    }
    match fence_of_words(words) {
        // A slot that cannot be read any more has nobody that looks at it.
        Some((address, _)) if flags & FLAG_IRQ_ARMED != 0 => fence::is_armed(guard, address).unwrap_or(true),
        _ => true,
    }
}

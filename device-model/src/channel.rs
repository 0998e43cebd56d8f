//! A channel: its registers, its life (disabled, enabled, halted), and the loop that works through its ring.
//!
//! Threaded mode: a worker thread executes, register writes only change state and wake it. Synchronous mode: the
//! doorbell write executes on the thread that brings it. Either way at most one thread is *busy* with a channel.
//!
//! Locks, outermost first: a channel's state, then the DMA map. Neither is held while a descriptor waits or an
//! interrupt is raised.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hmmstorm_abi::pci::{VECTOR_CHANNEL0, VECTOR_DEVICE};
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{FLAG_IRQ, Status, fence_of_words};

use crate::config::Mode;
use crate::core::Core;
use crate::engine::{Cancel, Engine, Failure, Session};
use crate::fence;
use crate::registers::{BadAccess, Target};
use crate::reset::Held;
use crate::ring::{Ring, RingError, Settings};

/// How often a synchronous doorbell looks again for a publication that raced with it.
const ARM_ATTEMPTS: u32 = 16;

/// Where a channel is in its life.
#[derive(Clone, Copy, Debug, Default)]
enum Run {
    #[default]
    Disabled,
    Enabled(Ring),
    Halted(Status),
}

#[derive(Debug, Default)]
struct State {
    settings: Settings,
    run: Run,
    /// The worker should look at the ring.
    doorbell: bool,
    /// A thread works on the ring, on its own copy of it.
    busy: bool,
    /// The worker should end.
    exit: bool,
}

/// Why work on a ring stopped.
#[derive(Clone, Copy, Debug)]
enum Rest {
    /// Nothing is pending, and the event index asks for a doorbell.
    Idle,
    /// The device plays dead.
    Dead,
    /// The ring cannot be used.
    Halted(Status),
    /// A reset wants the channel.
    Cancelled,
}

/// One channel of a GPU.
#[derive(Debug)]
pub struct Channel {
    index: u16,
    state: Mutex<State>,
    /// Wakes the worker: a doorbell, a reset, the end.
    wake: Condvar,
    /// Says that nobody is busy any more.
    idle: Condvar,
    cancel: Cancel,
    /// Index of the next descriptor, for whoever counts what is queued.
    head: AtomicU32,
    engine: Mutex<Engine>,
}

impl Channel {
    /// Channel `index` of a GPU, disabled.
    pub fn new(index: u16) -> Self {
        Self {
            index,
            state: Mutex::default(),
            wake: Condvar::new(),
            idle: Condvar::new(),
            cancel: Cancel::default(),
            head: AtomicU32::new(0),
            engine: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the register at `offset` in the channel's block.
    pub fn read(&self, offset: usize) -> u32 {
        let state = self.lock();
        match offset {
            regs::CH_RING_LO => low(state.settings.ring),
            regs::CH_RING_HI => high(state.settings.ring),
            regs::CH_RING_ORDER => state.settings.order,
            regs::CH_SHADOW_LO => low(state.settings.shadow),
            regs::CH_SHADOW_HI => high(state.settings.shadow),
            regs::CH_CONTROL if !matches!(state.run, Run::Disabled) => regs::CH_CONTROL_ENABLE,
            regs::CH_STATUS => match state.run {
                Run::Disabled => 0,
                Run::Enabled(_) => regs::CH_STATUS_ENABLED,
                Run::Halted(status) => regs::CH_STATUS_HALTED | (status as u32) << regs::CH_STATUS_CODE_SHIFT,
            },
            _ => 0,
        }
    }

    /// Writes `value` to the register `target`, one of this channel's.
    ///
    /// # Errors
    /// [`BadAccess::Refused`] if the register cannot take it now; nothing has changed then.
    pub fn write(&self, core: &Core, target: Target, value: u32) -> Result<(), BadAccess> {
        match target.register.offset {
            regs::CH_CONTROL => self.control(core, target, value),
            regs::CH_DOORBELL => self.doorbell(core, target, value),
            offset => {
                let mut state = self.lock();
                if !matches!(state.run, Run::Disabled) {
                    return Err(target.refuse(value, "writable only while the channel is disabled"));
                }
                let settings = &mut state.settings;
                match offset {
                    regs::CH_RING_LO => set_low(&mut settings.ring, value),
                    regs::CH_RING_HI => set_high(&mut settings.ring, value),
                    regs::CH_RING_ORDER => settings.order = value,
                    regs::CH_SHADOW_LO => set_low(&mut settings.shadow, value),
                    regs::CH_SHADOW_HI => set_high(&mut settings.shadow, value),
                    _ => {}
                }
                Ok(())
            }
        }
    }

    fn control(&self, core: &Core, target: Target, value: u32) -> Result<(), BadAccess> {
        if value & !(regs::CH_CONTROL_ENABLE | regs::CH_CONTROL_RESET) != 0 {
            return Err(target.refuse(value, "unknown bits"));
        }
        if value & regs::CH_CONTROL_RESET != 0 {
            self.reset(core, Held::Abort);
            core.stats.resets.increment();
            return Ok(());
        }
        let mut state = self.lock();
        match (value & regs::CH_CONTROL_ENABLE != 0, state.run) {
            (true, Run::Disabled) => {}
            // Writing what is there already changes nothing.
            (true, _) | (false, Run::Disabled) => return Ok(()),
            (false, _) => return Err(target.refuse(value, "only a reset stops a channel")),
        }
        match Ring::open(state.settings, core) {
            Ok(ring) => {
                self.head.store(ring.head(), Ordering::Relaxed);
                state.run = Run::Enabled(ring);
                // Descriptors that were published before are looked at without a doorbell.
                state.doorbell = core.mode == Mode::Threaded;
                drop(state);
                self.wake.notify_one();
            }
            Err(error) => {
                state.run = Run::Halted(self.halt(core, error));
                drop(state);
                core.raise(VECTOR_DEVICE);
            }
        }
        Ok(())
    }

    fn doorbell(&self, core: &Core, target: Target, value: u32) -> Result<(), BadAccess> {
        core.stats.doorbells.increment();
        let mut state = self.lock();
        let Run::Enabled(ring) = state.run else {
            return Err(target.refuse(value, "the channel is not enabled"));
        };
        if core.mode == Mode::Threaded {
            state.doorbell = true;
            drop(state);
            self.wake.notify_one();
        } else {
            state.busy = true;
            drop(state);
            self.work_on(core, ring, Self::serve_doorbell);
        }
        Ok(())
    }

    /// Stops the channel and waits until nothing of it touches memory any more: at most one piece of a copy.
    pub fn reset(&self, core: &Core, held: Held) {
        let mut state = self.lock();
        self.cancel.request(held);
        self.wake.notify_all();
        state = self.idle.wait_while(state, |state| state.busy).unwrap_or_else(PoisonError::into_inner);
        if let (Run::Enabled(ring), Held::Abort) = (state.run, held) {
            self.abort_pending(core, ring);
        }
        let exit = state.exit;
        *state = State { exit, ..State::default() };
        self.head.store(0, Ordering::Relaxed);
        self.cancel.clear();
    }

    /// Makes the worker look at the ring, as after a doorbell.
    pub fn kick(&self) {
        self.lock().doorbell = true;
        self.wake.notify_one();
    }

    /// Makes the worker end.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.exit = true;
        self.cancel.request(Held::Drop);
        self.wake.notify_all();
    }

    /// How many descriptors are published and not completed.
    pub fn queued(&self, core: &Core) -> u64 {
        match self.lock().run {
            Run::Enabled(ring) if core.may_master() => {
                let head = self.head.load(Ordering::Relaxed);
                ring.pending_from(head, &core.memory.guard()).map_or(0, u64::from)
            }
            _ => 0,
        }
    }

    /// The worker thread of threaded mode; returns after [`Channel::stop`].
    pub fn work(&self, core: &Core) {
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
            self.work_on(core, ring, Self::serve);
        }
    }

    /// Serves `ring`, with the channel marked busy, and puts down how it ended.
    fn work_on(&self, core: &Core, mut ring: Ring, serve: fn(&Self, &Core, &mut Ring) -> Rest) {
        // A fault of our own must not leave a channel busy for good, nor take the other GPU down.
        let rest = catch_unwind(AssertUnwindSafe(|| serve(self, core, &mut ring))).unwrap_or_else(|_| {
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
            Rest::Idle | Rest::Dead | Rest::Cancelled => Run::Enabled(ring),
        };
        drop(state);
        self.idle.notify_all();
        if matches!(rest, Rest::Halted(_)) {
            core.raise(VECTOR_DEVICE);
        }
    }

    /// Threaded mode: drains the ring, looks for more for a while, then asks for a doorbell.
    fn serve(&self, core: &Core, ring: &mut Ring) -> Rest {
        loop {
            match self.drain(core, ring, u32::MAX) {
                Ok(Rest::Idle) => {}
                Ok(rest) => return rest,
                Err(error) => return Rest::Halted(self.halt(core, error)),
            }
            match self.await_more(core, ring) {
                Ok(true) => {}
                Ok(false) => return Rest::Idle,
                Err(error) => return Rest::Halted(self.halt(core, error)),
            }
        }
    }

    /// Polls for a publication for [`Core::poll`], then asks for a doorbell; true if there is work now.
    fn await_more(&self, core: &Core, ring: &Ring) -> Result<bool, RingError> {
        let start = Instant::now();
        while start.elapsed() < core.poll && self.cancel.requested().is_none() {
            if ring.pending(core)? > 0 {
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
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..most {
            if core.chaos.dead() {
                return Ok(Rest::Dead);
            }
            if ring.pending(core)? == 0 {
                break;
            }
            if core.mode == Mode::Threaded {
                self.pause(core.chaos.latency());
            }
            if self.cancel.requested().is_some() {
                return Ok(Rest::Cancelled);
            }
            let Some(irq) = self.step(core, ring, &mut engine)? else { return Ok(Rest::Cancelled) };
            if irq {
                core.raise(VECTOR_CHANNEL0 + self.index);
            }
        }
        Ok(Rest::Idle)
    }

    /// Executes and completes the next descriptor. Says whether it wants an interrupt; nothing if a reset came in
    /// between that drops it.
    fn step(&self, core: &Core, ring: &mut Ring, engine: &mut Engine) -> Result<Option<bool>, RingError> {
        let mut session = Session::new(core, &self.cancel);
        let words = ring.fetch(session.guard())?;
        let outcome = engine.execute(&mut session, words);
        if outcome == Err(Failure::Aborted(Held::Drop)) {
            return Ok(None);
        }
        self.complete(core, &mut session, ring, words, outcome)?;
        Ok(Some(wants_interrupt(words)))
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
            Ok(()) | Err(Failure::Aborted(_) | Failure::Injected) => {}
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
        if status != Status::Ok || signalled.is_err() {
            core.stats.errors.increment();
        }
        let consumed = ring.consume(session.guard());
        self.head.store(ring.head(), Ordering::Relaxed);
        consumed
    }

    /// Completes everything that is pending as aborted.
    fn abort_pending(&self, core: &Core, mut ring: Ring) {
        // At most a ring's length, even if the guest publishes more meanwhile.
        let mut abort = || {
            for _ in 0..ring.pending(core)? {
                let mut session = Session::new(core, &self.cancel);
                let words = ring.fetch(session.guard())?;
                let aborted = Err(Failure::Aborted(Held::Abort));
                self.complete(core, &mut session, &mut ring, words, aborted)?;
                drop(session);
                if wants_interrupt(words) {
                    core.raise(VECTOR_CHANNEL0 + self.index);
                }
            }
            Ok(())
        };
        if let Err(error) = abort() {
            self.halt(core, error);
        }
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
    fn halt(&self, core: &Core, error: RingError) -> Status {
        if matches!(error, RingError::Dma(_)) {
            core.stats.dma_faults.increment();
        }
        core.complaints.ring.log(core.index, format_args!("channel {} halts: {error}", self.index));
        error.status()
    }
}

fn wants_interrupt(words: [u64; 8]) -> bool {
    (words[0] >> 8) as u8 & FLAG_IRQ != 0
}

const fn low(value: u64) -> u32 {
    value as u32
}

const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

fn set_low(value: &mut u64, half: u32) {
    *value = *value & !0xffff_ffff | u64::from(half);
}

fn set_high(value: &mut u64, half: u32) {
    *value = *value & 0xffff_ffff | u64::from(half) << 32;
}

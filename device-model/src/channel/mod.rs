//! A channel: its registers and its life (disabled, enabled, halted); [`work`] is the loop through its ring.
//!
//! Threaded mode: a worker thread executes, register writes only change state and wake it. Synchronous mode: the
//! doorbell write executes on the thread that brings it. Either way at most one thread is *busy* with a channel.
//!
//! A job that stalls on a page fault keeps its place in the engine, and its descriptor stays at the head of the ring.
//! Nobody is busy with the channel then; a replay or a cancel wakes it like a doorbell.
//!
//! Locks, outermost first: a channel's state, its engine, the DMA map, an address space, the page faults. All but the
//! engine are free while a descriptor waits.

mod vigil;
mod work;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use hmmstorm_abi::pci::VECTOR_DEVICE;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::Status;

use crate::config::Mode;
use crate::core::Core;
use crate::engine::Engine;
use crate::engine::session::Cancel;
use crate::registers::{BadAccess, Target, high, low, set_high, set_low};
use crate::reset::Held;
use crate::ring::{Ring, Settings};

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
    pub fn read(&self, core: &Core, offset: usize) -> u32 {
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
                Run::Enabled(_) if core.faults.is_pending(self.index) => {
                    regs::CH_STATUS_ENABLED | regs::CH_STATUS_STALLED
                }
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
        if !matches!(state.run, Run::Enabled(_)) {
            return Err(target.refuse(value, "the channel is not enabled"));
        }
        if core.mode == Mode::Threaded {
            state.doorbell = true;
            drop(state);
            self.wake.notify_one();
        } else {
            self.serve_now(core, state);
        }
        Ok(())
    }

    /// Lets a job go on whose page fault was decided. A synchronous device is done with it, and with what is published
    /// behind it, when this returns.
    pub fn resume(&self, core: &Core) {
        if core.mode == Mode::Threaded {
            self.kick();
            return;
        }
        self.serve_now(core, self.lock());
    }

    /// Stops the channel and waits until nothing of it touches memory any more: at most one piece of a copy.
    pub fn reset(&self, core: &Core, held: Held) {
        let mut state = self.lock();
        self.cancel.request(held);
        self.wake.notify_all();
        core.order.moved();
        state = self.idle.wait_while(state, |state| state.busy).unwrap_or_else(PoisonError::into_inner);
        if let (Run::Enabled(ring), Held::Abort) = (state.run, held) {
            self.abort_pending(core, ring);
        }
        self.give_up_job();
        core.faults.forget(self.index);
        core.chaos.unhang(self.index);
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
    pub fn stop(&self, core: &Core) {
        let mut state = self.lock();
        state.exit = true;
        self.cancel.request(Held::Drop);
        self.wake.notify_all();
        core.order.moved();
    }

    /// How many descriptors are published and not completed, unless they wait for the driver to serve a page fault.
    pub fn queued(&self, core: &Core) -> u64 {
        match self.lock().run {
            Run::Enabled(_) if core.faults.is_pending(self.index) => 0,
            Run::Enabled(ring) if core.may_master() => {
                let head = self.head.load(Ordering::Relaxed);
                ring.pending_from(head, &core.memory.guard()).map_or(0, u64::from)
            }
            _ => 0,
        }
    }
}

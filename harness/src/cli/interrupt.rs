//! Ctrl-C, SIGTERM and SIGHUP: a flag to ask, and a descriptor to poll beside others.
//!
//! The first signal asks the command to end what it started and return; the second ends the process at once (children
//! then die by their parent-death signal).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Whether the user has asked to stop. Clones share one state.
#[derive(Clone, Debug)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    raised: AtomicBool,
    /// While set, SIGINT belongs to a program in the foreground (gdb) and is not for us.
    keyboard_is_lent: AtomicBool,
    /// Readable from the first signal on; never drained.
    event: OwnedFd,
}

impl Interrupt {
    /// An interrupt that no signal is bound to yet: for tests, and for [`Interrupt::install`].
    pub fn detached() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let raised = AtomicBool::new(false);
        Ok(Self { shared: Arc::new(Shared { raised, keyboard_is_lent: AtomicBool::new(false), event }) })
    }

    /// Binds the process's SIGINT, SIGTERM and SIGHUP to a new interrupt.
    pub fn install() -> io::Result<Self> {
        let interrupt = Self::detached()?;
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let shared = interrupt.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in &mut signals {
                if signal == SIGINT && shared.shared.keyboard_is_lent.load(Ordering::Relaxed) {
                    continue;
                }
                if shared.is_raised() {
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
                shared.raise();
            }
        })?;
        Ok(interrupt)
    }

    /// What the first signal does.
    pub fn raise(&self) {
        self.shared.raised.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.shared.event, &1u64.to_ne_bytes());
    }

    /// True from the first signal on.
    pub fn is_raised(&self) -> bool {
        self.shared.raised.load(Ordering::Acquire)
    }

    /// Leaves the keyboard's SIGINT to a program in the foreground until the guard is dropped.
    pub fn lend_keyboard(&self) -> Lent<'_> {
        self.shared.keyboard_is_lent.store(true, Ordering::Relaxed);
        Lent { interrupt: self }
    }
}

impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

/// See [`Interrupt::lend_keyboard`].
#[derive(Debug)]
pub struct Lent<'a> {
    interrupt: &'a Interrupt,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.interrupt.shared.keyboard_is_lent.store(false, Ordering::Relaxed);
    }
}

//! `selftest`: brings the guest into a known bad state, so that the judge can be judged.

use std::ffi::CString;
use std::fs::{self, File};
use std::thread;
use std::time::Duration;

use hmmstorm_abi::uapi::SELECT_SYSTEM;
use rustix::io::Errno;
use rustix::system::finit_module;

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::clock::monotonic_ns;
use crate::gpu::{Gpu, Owner};
use crate::machine::pin;
use crate::oracle::Stamp;
use crate::sys::memory::Mapping;

/// CPU of the trouble; the supervisor has CPU 0.
const CPU: usize = 1;
/// Pages that go to the GPU and back in an ordinary operation.
const PAGES: usize = 16;
/// Ordinary operations before the trouble, and after it.
const ORDINARY: usize = 8;
/// "For good": longer than any limit of the host.
const FOR_GOOD: u64 = 3600;
/// Where lkdtm takes the name of a crash.
const PROVOKE: &str = "/sys/kernel/debug/provoke-crash/DIRECT";

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    /// Nothing.
    None,
    /// test_lockup with these parameters.
    Lockup(&'static str),
    /// test_lockup holds the mmap_lock and sleeps.
    MmapLock,
    /// A loop in user mode.
    UserLoop,
    /// An interruptible sleep.
    Wait,
    /// Ordinary operations until the GPU stops answering.
    Device,
    /// A crash of lkdtm.
    Crash(&'static str),
}

/// The workload.
#[derive(Debug)]
pub(crate) struct Selftest {
    how: How,
    seconds: u64,
}

impl Selftest {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        let how = match parameters.choice("how") {
            "loop" => How::Lockup("state=R"),
            "preempt-off" => How::Lockup("state=R disable_preempt=Y"),
            "irq-off" => How::Lockup("state=R disable_irq=Y"),
            "sleep" => How::Lockup("state=D"),
            "mmap-lock" => How::MmapLock,
            "user-loop" => How::UserLoop,
            "wait" => How::Wait,
            "device" => How::Device,
            "oops" => How::Crash("EXCEPTION"),
            "bug" => How::Crash("BUG"),
            "warn" => How::Crash("WARNING"),
            _ => How::None,
        };
        let seconds = match parameters.integer("seconds") {
            0 => FOR_GOOD,
            seconds => seconds,
        };
        Self { how, seconds }
    }
}

impl Workload for Selftest {
    fn workers(&self) -> Vec<String> {
        let mut names = vec![format!("breaker@cpu{CPU}")];
        if self.how == How::MmapLock {
            names.push("toucher@cpu0".to_owned());
        }
        names
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        thread::scope(|scope| {
            scope.spawn(|| {
                let slot = context.board.slot(0);
                if let Err(error) = self.breaker(context, slot) {
                    error.post(slot);
                }
            });
            if self.how == How::MmapLock {
                scope.spawn(|| {
                    let slot = context.board.slot(1);
                    if let Err(error) = self.toucher(slot) {
                        error.post(slot);
                    }
                });
            }
        });
        if context.board.has_finding() { Err(Stopped) } else { Ok(()) }
    }
}

impl Selftest {
    fn breaker(&self, context: &Context<'_>, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.enter("breaker");
        pin(CPU).map_err(WorkError::system("sched_setaffinity of the breaker"))?;
        let mut traffic = Traffic::new(context.seed)?;
        for _ in 0..ORDINARY {
            traffic.operation(slot)?;
        }
        slot.begin();
        match self.how {
            How::None => (),
            How::Lockup(state) => self.lockup(state)?,
            How::MmapLock => self.lockup("state=D lock_mmap_sem=Y")?,
            How::UserLoop => self.loop_in_user_mode(),
            How::Wait => thread::sleep(Duration::from_secs(self.seconds)),
            How::Crash(name) => crash(name)?,
            How::Device => {
                let end = monotonic_ns() + Duration::from_secs(self.seconds).as_nanos() as u64;
                while monotonic_ns() < end {
                    slot.complete(0);
                    traffic.operation(slot)?;
                    slot.begin();
                }
            }
        }
        slot.complete(0);
        for _ in 0..ORDINARY {
            traffic.operation(slot)?;
        }
        Ok(())
    }

    /// Needs its address space's mmap_lock again and again.
    fn toucher(&self, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.enter("toucher");
        pin(0).map_err(WorkError::system("sched_setaffinity of the toucher"))?;
        let end = monotonic_ns() + Duration::from_secs(self.seconds).as_nanos() as u64;
        while monotonic_ns() < end {
            slot.begin();
            drop(Mapping::<std::sync::atomic::AtomicU64>::private(1).map_err(WorkError::system("mmap"))?);
            slot.complete(0);
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// test_lockup does its work while it is being loaded, and then refuses to be: `EAGAIN` is its success.
    fn lockup(&self, state: &str) -> Result<(), WorkError> {
        let file = module("/lib/modules/test_lockup.ko")?;
        let parameters = CString::new(format!("time_secs={} {state}", self.seconds));
        let parameters = parameters.map_err(|nul| WorkError::Condition(nul.to_string()))?;
        match finit_module(&file, &parameters, 0) {
            Err(Errno::AGAIN) => Ok(()),
            Ok(()) => Err(WorkError::Condition("test_lockup stayed loaded, so it did nothing".to_owned())),
            Err(error) => Err(WorkError::system("finit_module(test_lockup)")(error)),
        }
    }

    fn loop_in_user_mode(&self) {
        let end = monotonic_ns() + Duration::from_secs(self.seconds).as_nanos() as u64;
        while monotonic_ns() < end {
            for _ in 0..1_000_000 {
                std::hint::spin_loop();
            }
        }
    }
}

fn module(path: &'static str) -> Result<File, WorkError> {
    File::open(path).map_err(|error| {
        WorkError::Condition(format!(
            "cannot open {path}: {error}. Is the module in the kernel's configuration?"
        ))
    })
}

/// Has lkdtm crash the kernel. Returns after a WARN only.
fn crash(name: &str) -> Result<(), WorkError> {
    match finit_module(&module("/lib/modules/lkdtm.ko")?, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => (),
        Err(error) => return Err(WorkError::system("finit_module(lkdtm)")(error)),
    }
    fs::write(PROVOKE, name).map_err(WorkError::system("write(/sys/kernel/debug/provoke-crash/DIRECT)"))
}

/// What a healthy guest does: pages go to GPU 0, are read there, and come back, all of it checked.
struct Traffic {
    gpu: Gpu,
    mapping: Mapping,
    buffer: Mapping,
    seed: u64,
    generation: u64,
}

impl Traffic {
    fn new(seed: u64) -> Result<Self, WorkError> {
        let map = || Mapping::private(PAGES).map_err(WorkError::system("mmap of the pages"));
        Ok(Self { gpu: Gpu::open(0)?, mapping: map()?, buffer: map()?, seed, generation: 0 })
    }

    fn operation(&mut self, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.begin();
        self.generation += 1;
        let stamp = |page| Stamp { seed: self.seed, page: page as u64, generation: self.generation };
        for page in 0..PAGES {
            stamp(page).write(self.mapping.page(page));
        }
        let all = self.mapping.span(0..PAGES);
        let all = all.ok_or_else(|| WorkError::Condition("no pages".to_owned()))?;
        self.gpu.migrate_here(all, SELECT_SYSTEM)?;
        let access = self.gpu.read(all, &self.buffer, Owner::Own)?;
        for page in 0..PAGES {
            stamp(page).check(self.buffer.page(page)).map_err(WorkError::seen("read by GPU 0"))?;
            stamp(page).check(self.mapping.page(page)).map_err(WorkError::seen("read by the CPU"))?;
        }
        slot.complete(u64::from(access.faults > 0));
        Ok(())
    }
}

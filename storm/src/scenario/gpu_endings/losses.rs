//! Endings that the device brings about, by its chaos plan: a channel hangs, memory is poisoned, it is pulled out.

use std::fs;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use hmmstorm_abi::job::{Op, WORD, word_at};
use hmmstorm_abi::ring::Status;
use hmmstorm_abi::uapi::{self, SELECT_SYSTEM};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};

use super::{GPU, GpuEndings, pci_device};
use crate::gpu::Gpu;
use crate::scenario::WorkError;
use crate::sys::memory::Mapping;
use crate::sys::process::fork;

/// Times that is tried what the plan is to break.
const TRIES: u64 = 64;
/// Time that a job has without any progress, in milliseconds.
const LIMIT_MS: u32 = 1500;
/// Time in which the driver must let go of a device, whatever has become of it.
const UNBOUND: Duration = Duration::from_secs(60);

/// What a look at every page has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Found {
    good: usize,
    /// Accesses are answered by an error.
    lost: usize,
}

impl GpuEndings {
    /// Jobs, migrations and evictions go on until one of them has timed out, and then once more.
    pub(super) fn hang(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let all = memory.span(0..self.pages).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let mut timeouts = 0;
        for _ in 0..TRIES {
            let job = self.job(&memory, Op::Check, tag, 1);
            let (status, outcome) = gpu.submit_limited(all, job, LIMIT_MS)?.end()?;
            match status {
                uapi::JOB_TIMEOUT => timeouts += 1,
                status if status == Status::Ok as u32 && outcome.mismatches == 0 => (),
                status => {
                    return Err(WorkError::Condition(format!(
                        "a job ended with status {status:#x} and {} wrong words",
                        outcome.mismatches
                    )));
                }
            }
            for moved in [gpu.evict(all), gpu.migrate_here(all, SELECT_SYSTEM).map(|done| done.migrated)] {
                match moved {
                    Ok(_) => (),
                    Err(error) if error.errno() == Some(Errno::TIMEDOUT) => timeouts += 1,
                    Err(error) => return Err(error.into()),
                }
            }
            if timeouts != 0 {
                self.check(&memory, tag, "after a channel hung")?;
                return self.works(tag);
            }
        }
        Err(WorkError::Condition(
            "nothing hung: use --chaos hang_channel=4,hang_after=8, or another channel".into(),
        ))
    }

    /// Some pages of the GPU cannot be read: their owners are told, all others are as they were, also once the driver is
    /// unbound.
    pub(super) fn poison(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let all = memory.span(0..self.pages).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        gpu.migrate_here(all, SELECT_SYSTEM)?;
        let (status, _) = gpu.submit(all, self.job(&memory, Op::Check, tag, 1))?.end()?;
        if status != Status::Poisoned as u32 {
            return Err(WorkError::Condition(format!(
                "a job over all pages ended with status {status:#x}, as if none were poisoned: use --chaos poison_first=128,poison_pages=4"
            )));
        }
        // Half of the pages come back by CPU faults, the others when the driver is unbound.
        let half = self.pages / 2;
        let before = self.look(&memory, 0..half, tag)?;
        drop(gpu);
        let bind_again = self.let_go()?;
        let after = self.look(&memory, 0..self.pages, tag)?;
        if before.lost > after.lost || after.lost == 0 {
            return lost(format!(
                "{before:?} by touching half of the pages, {after:?} of all of them once unbound"
            ));
        }
        self.dies_of(&memory, tag)?;
        bind_again()
    }

    /// The device is pulled out while jobs run. The driver lets go of it in bounded time, and what was in its memory is an
    /// error to who touches it.
    pub(super) fn surprise(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let mut tries = 0;
        while tries < TRIES {
            let jobs = self.start(&gpu, &memory, tag).map_err(ended);
            let outcome = jobs.and_then(|running| {
                running.into_iter().try_for_each(|job| match job.end().map_err(ended)? {
                    (status, outcome) if outcome.mismatches == 0 && status == Status::Ok as u32 => Ok(()),
                    (uapi::JOB_DEAD | uapi::JOB_TIMEOUT | uapi::JOB_CANCELLED, _) => Err(Ended::Gone),
                    (status, outcome) if outcome.mismatches == 0 && status == Status::PageFault as u32 => {
                        Err(Ended::Gone)
                    }
                    (status, outcome) => Err(Ended::Wrong(WorkError::Condition(format!(
                        "a job ended with status {status:#x} and {} wrong words",
                        outcome.mismatches
                    )))),
                })
            });
            match outcome {
                Ok(()) => tries += 1,
                Err(Ended::Gone) => break,
                Err(Ended::Wrong(error)) => return Err(error),
            }
        }
        if tries == TRIES {
            return Err(WorkError::Condition("the device is still there: use --chaos dead_after=80".into()));
        }
        drop(gpu);
        // Nobody binds a device that is gone.
        let _ = self.let_go()?;
        let found = self.look(&memory, 0..self.pages, tag)?;
        if found.lost == 0 {
            return lost(format!(
                "{found:?}, though half of the pages were in the memory of a device that is gone"
            ));
        }
        // No job takes pages out of coherent memory: the GPU reaches them where they are.
        let half = self.look(&memory, 0..self.pages / 2, tag)?;
        if self.coherent.is_some() && half.good != 0 {
            return lost(format!("{half:?} of the pages in coherent memory of a device that is gone"));
        }
        self.dies_of(&memory, tag)
    }

    /// Unbinds the driver, which must not take longer than it may. Returns what binds it again.
    fn let_go(&self) -> Result<impl FnOnce() -> Result<(), WorkError>, WorkError> {
        let (driver, device) = pci_device()?;
        let start = Instant::now();
        fs::write(driver.join("unbind"), &device)
            .map_err(WorkError::system("write to the driver's `unbind`"))?;
        let took = start.elapsed();
        if took > UNBOUND {
            return lost(format!("the driver was unbound in {} s", took.as_secs()));
        }
        Ok(move || {
            fs::write(driver.join("bind"), &device).map_err(WorkError::system("write to the driver's `bind`"))
        })
    }

    /// Looks at `pages`: each holds what it should, or gives an error.
    fn look(&self, memory: &Mapping, pages: std::ops::Range<usize>, tag: u64) -> Result<Found, WorkError> {
        let mut found = Found::default();
        for page in pages {
            if !memory.is_readable(page).map_err(WorkError::system("write of a page to a pipe"))? {
                found.lost += 1;
                continue;
            }
            let start = memory.address(page);
            for (cell, va) in memory.page(page).iter().zip((start..).step_by(WORD as usize)) {
                let (value, wanted) = (cell.load(Relaxed), word_at(va, tag));
                if value != wanted {
                    return Err(WorkError::Word {
                        page: page as u64,
                        expected: format!("{wanted:#018x} at {va:#x}, or an error"),
                        found: format!("{value:#018x} (read by the CPU)"),
                    });
                }
            }
            found.good += 1;
        }
        Ok(found)
    }

    /// A process that touches a lost page dies of it, and of nothing else.
    fn dies_of(&self, memory: &Mapping, tag: u64) -> Result<(), WorkError> {
        let child = fork(|| i32::from(self.check(memory, tag, "in a child").is_err()))
            .map_err(WorkError::system("fork of a victim"))?;
        let ended = waitpid(Some(child), WaitOptions::empty()).map_err(WorkError::system("waitpid"))?;
        match ended.and_then(|(_, status)| status.terminating_signal()) {
            Some(libc::SIGBUS) => Ok(()),
            _ => lost(format!("a process that touched every page ended with {ended:?}, and not by SIGBUS")),
        }
    }
}

/// Why jobs come to no result.
enum Ended {
    /// The device is gone.
    Gone,
    /// Something else.
    Wrong(WorkError),
}

fn ended<E: Into<WorkError>>(error: E) -> Ended {
    let error = error.into();
    if dead(&error) { Ended::Gone } else { Ended::Wrong(error) }
}

/// Whether an error is that of a device that is gone.
fn dead(error: &WorkError) -> bool {
    matches!(error, WorkError::Gpu(error) if matches!(error.errno(), Some(Errno::NODEV | Errno::TIMEDOUT)))
}

fn lost<T>(detail: String) -> Result<T, WorkError> {
    Err(WorkError::Invariant { name: "loss-reported", detail })
}

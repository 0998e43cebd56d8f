//! `gpu-endings`: jobs of the GPU lose what they stand on.

mod losses;

use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::time::Duration;

use hmmstorm_abi::job::{Job, Op, Pattern, WORD, word_at};
use hmmstorm_abi::ring::Status;
use hmmstorm_abi::uapi::{self, PAGE_SIZE, SELECT_SYSTEM};
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::clock::poll;
use crate::gpu::{Gpu, GpuError, Running, coherent_node};
use crate::machine::Machine;
use crate::sys::memory::Mapping;
use crate::sys::process::fork;

/// The GPU under test.
const GPU: usize = 1;
/// Words of a page.
const PAGE_WORDS: u64 = PAGE_SIZE as u64 / WORD;
/// Times that a job goes around its window: long enough to be running when it should be, and far shorter than the
/// driver's limit for a job that shows no progress.
const LAPS: u64 = 20;
/// Guest time in which a child must be where it should be, and in which the driver must let go of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// The workload.
#[derive(Debug)]
pub(crate) struct GpuEndings {
    endings: Vec<Ending>,
    rounds: u64,
    pages: usize,
    jobs: usize,
    /// Node of the coherent memory that the pages go to, in place of the GPU's private memory.
    coherent: Option<usize>,
}

/// Memory with contents.
#[derive(Debug)]
struct Memory {
    mapping: Mapping,
    /// Whose memory a part of it is in, where that is another node than the one under test.
    _holder: Option<Gpu>,
}

impl Deref for Memory {
    type Target = Mapping;

    fn deref(&self) -> &Mapping {
        &self.mapping
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Close,
    Kill,
    Unmap,
    Protect,
    Unbind,
    Hang,
    Poison,
    Surprise,
}

impl Ending {
    /// What `all` stands for: what needs no help of the device.
    const OF_ALL: usize = 5;
    const EACH: [(&'static str, Self); 8] = [
        ("close", Self::Close),
        ("kill", Self::Kill),
        ("unmap", Self::Unmap),
        ("protect", Self::Protect),
        ("unbind", Self::Unbind),
        ("hang", Self::Hang),
        ("poison", Self::Poison),
        ("surprise", Self::Surprise),
    ];
}

impl GpuEndings {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        let wanted = parameters.choice("ending");
        let endings = match wanted {
            "all" => &Ending::EACH[..Ending::OF_ALL],
            _ => &Ending::EACH[..],
        };
        let endings = endings
            .iter()
            .filter(|(name, _)| wanted == "all" || wanted == *name)
            .map(|(_, ending)| *ending)
            .collect();
        Self {
            endings,
            rounds: parameters.integer("rounds"),
            pages: parameters.integer("pages") as usize,
            jobs: parameters.integer("jobs") as usize,
            coherent: (parameters.choice("memory") == "coherent").then(|| coherent_node(GPU, machine.gpus)),
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("endings");
        for round in 0..self.rounds {
            context.board.set_round(round);
            for (step, ending) in self.endings.iter().enumerate() {
                slot.begin();
                let tag = context.seed.wrapping_add(round << 8).wrapping_add(step as u64);
                match ending {
                    Ending::Close => self.close(tag)?,
                    Ending::Kill => self.kill(tag)?,
                    Ending::Unmap => self.unmap(tag)?,
                    Ending::Protect => self.protect(tag)?,
                    Ending::Unbind => self.unbind(tag)?,
                    Ending::Hang => self.hang(tag)?,
                    Ending::Poison => self.poison(tag)?,
                    Ending::Surprise => self.surprise(tag)?,
                }
                // What is gone or poisoned stays so.
                if !matches!(ending, Ending::Poison | Ending::Surprise) {
                    self.works(tag)?;
                }
                slot.complete(0);
                if *ending == Ending::Surprise {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Memory with contents, half of it on the GPU.
    fn memory(&self, gpu: &Gpu, tag: u64) -> Result<Memory, WorkError> {
        let memory: Mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap"))?;
        for page in 0..self.pages {
            for (i, cell) in memory.page(page).iter().enumerate() {
                cell.store(word_at(memory.address(page) + i as u64 * WORD, tag), Relaxed);
            }
        }
        let half = memory.span(0..self.pages / 2).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let holder = self.coherent.map(Gpu::open).transpose()?;
        holder.as_ref().unwrap_or(gpu).migrate_here(half, SELECT_SYSTEM)?;
        Ok(Memory { mapping: memory, _holder: holder })
    }

    /// Whether the CPU finds everything as it was.
    fn check(&self, memory: &Mapping, tag: u64, when: &str) -> Result<(), WorkError> {
        for page in 0..self.pages {
            for (i, cell) in memory.page(page).iter().enumerate() {
                let va = memory.address(page) + i as u64 * WORD;
                let (found, wanted) = (cell.load(Relaxed), word_at(va, tag));
                if found != wanted {
                    return Err(WorkError::Word {
                        page: page as u64,
                        expected: format!("{wanted:#018x} at {va:#x}"),
                        found: format!("{found:#018x} (read by the CPU {when})"),
                    });
                }
            }
        }
        Ok(())
    }

    fn job(&self, memory: &Mapping, op: Op, tag: u64, laps: u64) -> Job {
        let words = self.pages as u64 * PAGE_WORDS;
        Job {
            op,
            pattern: Pattern::Strided,
            va: memory.address(0),
            window: words * WORD,
            count: words * laps,
            stride: WORD * 513,
            tag,
            operand: 0,
        }
    }

    /// Jobs that check `memory` over and over again.
    fn start<'a>(&self, gpu: &'a Gpu, memory: &Mapping, tag: u64) -> Result<Vec<Running<'a>>, WorkError> {
        let span = memory.span(0..self.pages).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let job = self.job(memory, Op::Check, tag, LAPS);
        let running = (0..self.jobs).map(|_| gpu.submit(span, job)).collect::<Result<Vec<_>, GpuError>>()?;
        if self.jobs != 0 {
            // The first ones have faulted by now, or are about to.
            poll(PATIENCE, || gpu.stats().ok().filter(|s| s.gpu_faults != 0).map(drop));
        }
        Ok(running)
    }

    /// Waits for jobs that may have been ended, and must not have seen anything wrong.
    fn reap(running: Vec<Running<'_>>, allowed: &[u32]) -> Result<(), WorkError> {
        let ended = running.into_iter().map(Running::end).collect::<Result<Vec<_>, GpuError>>()?;
        for (status, outcome) in ended {
            if outcome.mismatches != 0 {
                return Err(WorkError::Word {
                    page: 0,
                    expected: format!("{:#018x} at {:#x}", outcome.first_wanted, outcome.first_va),
                    found: format!("{:#018x} (read by GPU {GPU})", outcome.first_found),
                });
            }
            if status != Status::Ok as u32 && !allowed.contains(&status) {
                return Err(WorkError::Condition(format!(
                    "a job ended with status {status:#x}, after {} accesses",
                    outcome.done
                )));
            }
        }
        Ok(())
    }

    /// The GPU works, in an address space of its own.
    fn works(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let span = memory.span(0..self.pages).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let running = gpu.submit(span, self.job(&memory, Op::Check, tag, 1))?;
        Self::reap(vec![running], &[])?;
        self.check(&memory, tag, "after a job")
    }

    fn close(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let running = self.start(&gpu, &memory, tag)?;
        drop(running);
        drop(gpu);
        self.check(&memory, tag, "after the file was closed")
    }

    fn kill(&self, tag: u64) -> Result<(), WorkError> {
        let ready: Mapping = Mapping::shared(1).map_err(WorkError::system("mmap"))?;
        let child = fork(|| {
            let result = Gpu::open(GPU).map_err(WorkError::from).and_then(|gpu| {
                let memory = self.memory(&gpu, tag)?;
                let running = self.start(&gpu, &memory, tag)?;
                ready.page(0)[0].store(1, Release);
                // The end comes from outside.
                for running in running {
                    running.wait()?;
                }
                loop {
                    std::thread::sleep(PATIENCE);
                }
            });
            let _: Result<(), WorkError> = result;
            ready.page(0)[0].store(2, Release);
            1
        })
        .map_err(WorkError::system("fork"))?;
        let state = poll(PATIENCE, || Some(ready.page(0)[0].load(Acquire)).filter(|&state| state != 0));
        kill_process(child, Signal::KILL).map_err(WorkError::system("kill"))?;
        waitpid(Some(child), WaitOptions::empty()).map_err(WorkError::system("waitpid"))?;
        match state {
            Some(1) => Ok(()),
            _ => Err(WorkError::Condition("the process that was to be killed did not get that far".into())),
        }
    }

    fn unmap(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let running = self.start(&gpu, &memory, tag)?;
        // To where there is nothing any more.
        let (job, gone) = (self.job(&memory, Op::Load, tag, 1), memory.address(0));
        drop(memory);
        Self::reap(running, &[Status::PageFault as u32])?;

        let other: Mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap"))?;
        if other.address(0) == gone {
            return Ok(());
        }
        match gpu.submit_anywhere(job)?.end()? {
            (status, _) if status == Status::PageFault as u32 => Ok(()),
            (status, outcome) => Err(WorkError::Condition(format!(
                "a job on unmapped memory ended with status {status:#x} after {} accesses",
                outcome.done
            ))),
        }
    }

    fn protect(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let span = memory.span(0..self.pages).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let running = self.start(&gpu, &memory, tag)?;
        memory.write_protect(0..self.pages).map_err(WorkError::system("mprotect"))?;
        // Who reads is not concerned.
        Self::reap(running, &[])?;
        let (status, outcome) = gpu.submit(span, self.job(&memory, Op::Store, tag + 1, 1))?.end()?;
        if status != Status::PageFault as u32 || outcome.done != 0 {
            return Err(WorkError::Condition(format!(
                "a job that stores to read-only memory ended with status {status:#x} after {} accesses",
                outcome.done
            )));
        }
        self.check(&memory, tag, "after a store was refused")
    }

    fn unbind(&self, tag: u64) -> Result<(), WorkError> {
        let gpu = Gpu::open(GPU)?;
        let memory = self.memory(&gpu, tag)?;
        let running = self.start(&gpu, &memory, tag)?;
        let (driver, device) = pci_device()?;
        let tell = |what: &'static str| {
            fs::write(driver.join(what), &device)
                .map_err(WorkError::system("write to the driver's sysfs file"))
        };
        tell("unbind")?;
        let after = Self::reap(running, &[Status::PageFault as u32, uapi::JOB_CANCELLED]);
        let checked = self.check(&memory, tag, "after the driver was unbound");
        drop(gpu);
        tell("bind")?;
        after?;
        checked?;
        poll(PATIENCE, || Gpu::open(GPU).ok().map(drop))
            .ok_or_else(|| WorkError::Condition(format!("GPU {GPU} has no node after it was bound again")))
    }
}

/// The driver's folder in sysfs, and the address of the GPU under test there.
fn pci_device() -> Result<(PathBuf, String), WorkError> {
    let driver = PathBuf::from("/sys/bus/pci/drivers/hsgpu");
    let mut devices = fs::read_dir(&driver)
        .map_err(WorkError::system("readdir of the driver's sysfs folder"))?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.contains(':'))
        .collect::<Vec<_>>();
    devices.sort();
    devices
        .into_iter()
        .nth(GPU)
        .map(|device| (driver, device))
        .ok_or_else(|| WorkError::Condition(format!("GPU {GPU} is not bound")))
}

impl Workload for GpuEndings {
    fn workers(&self) -> Vec<String> {
        vec!["endings".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| {
            error.post(context.board.slot(0));
            Stopped
        })
    }
}

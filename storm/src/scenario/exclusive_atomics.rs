//! `exclusive-atomics`: CPUs and GPUs add to the same words, in memory that stays where it is.

use std::sync::Mutex;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread;
use std::time::Duration;

use hmmstorm_abi::job::{Job, Op, Outcome, Pattern, WORD};
use hmmstorm_abi::uapi::{self, PAGE_SIZE};

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, GpuError};
use crate::machine::{Machine, pin};
use crate::rng::Rng;
use crate::sys::memory::Mapping;

/// Words of a page.
const PAGE_WORDS: usize = PAGE_SIZE / WORD as usize;
/// Words between two additions of a job: no divisor of any window, so that a job goes over all pages.
const STEP: u64 = 509;
/// Additions of a CPU between two pauses.
const BURST: usize = 24;

/// The workload.
#[derive(Debug)]
pub(crate) struct ExclusiveAtomics {
    pages: usize,
    jobs: u64,
    adds: u64,
    workers: usize,
    pause: Duration,
    placement: u32,
    cpu: bool,
    machine: Machine,
}

impl ExclusiveAtomics {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            pages: parameters.integer("pages") as usize,
            jobs: parameters.integer("jobs"),
            adds: parameters.integer("adds"),
            workers: parameters.integer("workers") as usize,
            pause: Duration::from_micros(parameters.integer("pause_us")),
            placement: match parameters.choice("placement") {
                "migrate" => uapi::PLACE_MIGRATE,
                _ => uapi::PLACE_STAY,
            },
            cpu: parameters.flag("cpu"),
            machine,
        }
    }

    /// Whether a worker has a GPU add, and which one.
    fn gpu_of(&self, worker: usize) -> Option<usize> {
        (!worker.is_multiple_of(2)).then_some(worker / 2 % self.machine.gpus)
    }

    /// Sum of a counter of the drivers of all GPUs.
    fn counted(&self, counter: impl Fn(&uapi::Stats) -> u64) -> Result<u64, GpuError> {
        (0..self.machine.gpus).try_fold(0, |sum, gpu| Ok(sum + counter(&Gpu::open(gpu)?.stats()?)))
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let memory: Mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap"))?;
        // In RAM, all of it, before a GPU looks.
        memory.cells().iter().for_each(|word| word.store(0, Relaxed));
        let before = (self.counted(|s| s.exclusive)?, self.counted(|s| s.to_device)?);
        let adders = (0..self.workers).filter(|worker| self.gpu_of(*worker).is_some()).count();
        let shared = Shared {
            scenario: self,
            context: *context,
            memory: &memory,
            wanted: Mutex::new(vec![0; self.pages * PAGE_WORDS]),
            going: AtomicUsize::new(adders),
            stop: AtomicBool::new(false),
        };
        thread::scope(|scope| {
            for worker in 0..self.workers {
                let shared = &shared;
                scope.spawn(move || {
                    let slot = context.board.slot(worker);
                    if let Err(error) = shared.work(worker, slot) {
                        error.post(slot);
                        shared.stop.store(true, Release);
                    }
                });
            }
        });
        if context.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        shared.judge()?;
        let exclusive = self.counted(|s| s.exclusive)? - before.0;
        let moved = self.counted(|s| s.to_device)? - before.1;
        let what = match (self.placement, exclusive, moved) {
            (uapi::PLACE_STAY, 0, _) => "no page became exclusive to a GPU",
            (uapi::PLACE_STAY, _, 1..) => "a page migrated that should have stayed",
            (uapi::PLACE_MIGRATE, _, 0) => "no page migrated",
            _ => return Ok(()),
        };
        Err(WorkError::Condition(what.to_owned()))
    }
}

/// What the workers have in common.
struct Shared<'a> {
    scenario: &'a ExclusiveAtomics,
    context: Context<'a>,
    memory: &'a Mapping,
    /// What each word must hold in the end.
    wanted: Mutex<Vec<u64>>,
    /// Workers that still have a GPU add.
    going: AtomicUsize,
    stop: AtomicBool,
}

impl Shared<'_> {
    fn work(&self, worker: usize, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.enter(&format!("worker{worker}"));
        pin(worker % self.scenario.machine.cpus)
            .map_err(WorkError::system("sched_setaffinity of a worker"))?;
        match self.scenario.gpu_of(worker) {
            Some(gpu) => {
                let result = self.add_by_gpu(gpu, worker, slot);
                self.going.fetch_sub(1, SeqCst);
                result
            }
            None if self.scenario.cpu => {
                self.add_by_cpu(worker, slot);
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn job(&self, op: Op, first: u64, stride: u64, count: u64) -> Job {
        let window = (self.scenario.pages * PAGE_SIZE) as u64 - first * WORD;
        let va = self.memory.address(0) + first * WORD;
        Job { op, pattern: Pattern::Strided, va, window, count, stride, tag: 0, operand: 1 }
    }

    fn run(&self, gpu: &Gpu, job: Job) -> Result<Outcome, WorkError> {
        let all = self.memory.span(0..self.scenario.pages);
        let all = all.ok_or_else(|| WorkError::Condition("no pages".to_owned()))?;
        Ok(gpu.submit(all, job)?.wait()?)
    }

    /// An address space of this GPU that does with pages what the scenario wants.
    fn open(&self, gpu: usize) -> Result<Gpu, GpuError> {
        let gpu = Gpu::open(gpu)?;
        gpu.set_policy(uapi::Policy {
            chunk: 4 << 10,
            placement: self.scenario.placement,
            owner: uapi::OWNER_OWN,
            limit: 0,
            window_ms: 100,
        })?;
        Ok(gpu)
    }

    fn add_by_gpu(&self, gpu: usize, worker: usize, slot: Slot<'_>) -> Result<(), WorkError> {
        let gpu = self.open(gpu)?;
        let mut rng = Rng::new(self.context.seed, worker as u64);
        for round in 0..self.scenario.jobs {
            if self.stop.load(Acquire) {
                return Err(WorkError::Elsewhere);
            }
            if worker == 1 {
                self.context.board.set_round(round);
            }
            slot.begin();
            let job = self.job(Op::AtomicAdd, rng.up_to(7), STEP * WORD, self.scenario.adds);
            let outcome = self.run(&gpu, job)?;
            if outcome.done != job.count {
                return Err(WorkError::Condition(format!(
                    "a job made {} additions of {}",
                    outcome.done, job.count
                )));
            }
            let mut wanted = self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            (0..job.count).for_each(|index| wanted[self.index_of(job.address(index))] += 1);
            slot.complete(u64::from(outcome.faults > 0));
        }
        Ok(())
    }

    fn index_of(&self, va: u64) -> usize {
        ((va - self.memory.address(0)) / WORD) as usize
    }

    /// Adds to words that jobs add to, for as long as there are jobs.
    fn add_by_cpu(&self, worker: usize, slot: Slot<'_>) {
        let mut rng = Rng::new(self.context.seed, worker as u64);
        let mut added = vec![0_u64; self.scenario.pages * PAGE_WORDS];
        while self.going.load(SeqCst) != 0 && !self.stop.load(Acquire) {
            slot.begin();
            for _ in 0..BURST {
                let job = self.job(Op::AtomicAdd, rng.up_to(7), STEP * WORD, self.scenario.adds);
                let index = self.index_of(job.address(rng.up_to(job.count - 1)));
                self.memory.cells()[index].fetch_add(1, SeqCst);
                added[index] += 1;
            }
            slot.complete(0);
            thread::sleep(self.scenario.pause);
        }
        let mut wanted = self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        wanted.iter_mut().zip(added).for_each(|(wanted, added)| *wanted += added);
    }

    /// Whether each word holds what was added to it, as a GPU sees the sum and a CPU each one.
    fn judge(&self) -> Result<(), WorkError> {
        let wanted = self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let gpu = self.open(0)?;
        let words = wanted.len() as u64;
        let (sum, all) =
            (self.run(&gpu, self.job(Op::Load, 0, WORD, words))?.sum, wanted.iter().sum::<u64>());
        for (index, (word, wanted)) in self.memory.cells().iter().zip(wanted.iter()).enumerate() {
            let found = word.load(SeqCst);
            if found != *wanted {
                return Err(WorkError::Word {
                    page: (index / PAGE_WORDS) as u64,
                    expected: format!("{wanted} additions in word {}", index % PAGE_WORDS),
                    found: found.to_string(),
                });
            }
        }
        if sum != all {
            return Err(WorkError::Word {
                page: 0,
                expected: format!("{all} additions in all words"),
                found: format!("{sum} (read by GPU 0; the CPU finds all of them)"),
            });
        }
        Ok(())
    }
}

impl Workload for ExclusiveAtomics {
    fn workers(&self) -> Vec<String> {
        let role = |worker| if self.gpu_of(worker).is_some() { "gpu-adder" } else { "cpu-adder" };
        (0..self.workers).map(|i| format!("{}{i}@cpu{}", role(i), i % self.machine.cpus)).collect()
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

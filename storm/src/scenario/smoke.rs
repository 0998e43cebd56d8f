//! `smoke`: pages to every GPU and back, every byte checked.

use std::thread;

use hmmstorm_abi::uapi::SELECT_SYSTEM;

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::{Machine, pin};
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::sys::memory::{Mapping, PageSpan};

/// Pages of one device access.
const CHUNK: usize = 16;
/// Times that pages are asked to move: one whose folio somebody holds for a moment stays.
const TRIES: usize = 100;

/// The workload.
#[derive(Debug)]
pub(crate) struct Smoke {
    rounds: u64,
    pages: usize,
    workers: usize,
    machine: Machine,
}

impl Smoke {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        let workers = match parameters.integer("workers") as usize {
            0 => machine.cpus,
            n => n,
        };
        Self {
            rounds: parameters.integer("rounds"),
            pages: parameters.integer("pages") as usize,
            workers,
            machine,
        }
    }
}

impl Workload for Smoke {
    fn workers(&self) -> Vec<String> {
        (0..self.workers).map(|i| format!("worker{i}@cpu{}", i % self.machine.cpus)).collect()
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        thread::scope(|scope| {
            for number in 0..self.workers {
                scope.spawn(move || {
                    let slot = context.board.slot(number);
                    let result =
                        Worker::new(self, *context, number, slot).and_then(|mut worker| worker.run());
                    if let Err(error) = result {
                        error.post(slot);
                    }
                });
            }
        });
        if context.board.has_finding() { Err(Stopped) } else { Ok(()) }
    }
}

struct Worker<'a> {
    smoke: &'a Smoke,
    context: Context<'a>,
    slot: Slot<'a>,
    number: usize,
    rng: Rng,
    gpus: Vec<Gpu>,
    mapping: Mapping,
    buffer: Mapping,
    /// Generation of each page.
    generations: Vec<u64>,
}

impl<'a> Worker<'a> {
    fn new(smoke: &'a Smoke, context: Context<'a>, number: usize, slot: Slot<'a>) -> Result<Self, WorkError> {
        slot.enter(&format!("worker{number}"));
        pin(number % smoke.machine.cpus).map_err(WorkError::system("sched_setaffinity of a worker"))?;
        let map = |pages| Mapping::private(pages).map_err(WorkError::system("mmap of a worker's pages"));
        Ok(Self {
            smoke,
            context,
            slot,
            number,
            rng: Rng::new(context.seed, number as u64),
            gpus: (0..smoke.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?,
            mapping: map(smoke.pages)?,
            buffer: map(CHUNK)?,
            generations: vec![0; smoke.pages],
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        for round in 0..self.smoke.rounds {
            if self.number == 0 {
                self.context.board.set_round(round);
            }
            let gpus = self.gpus.len();
            let first = self.rng.up_to(gpus as u64 - 1) as usize;
            for gpu in (0..gpus).map(|i| (first + i) % gpus) {
                if self.context.board.has_finding() {
                    return Err(WorkError::Elsewhere);
                }
                self.visit(gpu)?;
            }
        }
        Ok(())
    }

    /// Everything with GPU `gpu`.
    fn visit(&mut self, gpu: usize) -> Result<(), WorkError> {
        for page in 0..self.smoke.pages {
            self.next_stamp(page).write(self.mapping.page(page));
        }
        self.migrate(gpu)?;
        self.read(gpu, 0..self.smoke.pages)?;
        // The device rewrites a part of what it holds.
        let written = 0..self.rng.up_to(self.smoke.pages as u64 / 2) as usize + 1;
        self.write(gpu, written)?;
        // Another GPU reads the first half, which moves it to RAM; the CPU touches all, which moves the rest.
        let other = (gpu + 1) % self.gpus.len();
        self.read(other, 0..self.smoke.pages / 2)?;
        for page in 0..self.smoke.pages {
            self.operation(0, |w| {
                w.stamp(page).check(w.mapping.page(page)).map_err(WorkError::seen("read by the CPU"))
            })?;
        }
        Ok(())
    }

    fn stamp(&self, page: usize) -> Stamp {
        let page_number = (self.number as u64) << 32 | page as u64;
        Stamp { seed: self.context.seed, page: page_number, generation: self.generations[page] }
    }

    fn next_stamp(&mut self, page: usize) -> Stamp {
        self.generations[page] += 1;
        self.stamp(page)
    }

    fn span(&self, pages: std::ops::Range<usize>) -> Result<PageSpan<'_>, WorkError> {
        self.mapping.span(pages.clone()).ok_or_else(|| WorkError::Condition(format!("no pages {pages:?}")))
    }

    fn operation(
        &self,
        faults: u64,
        work: impl FnOnce(&Self) -> Result<(), WorkError>,
    ) -> Result<(), WorkError> {
        self.slot.begin();
        work(self)?;
        self.slot.complete(faults);
        Ok(())
    }

    fn migrate(&self, gpu: usize) -> Result<(), WorkError> {
        let gpu = &self.gpus[gpu];
        for _ in 0..TRIES {
            self.operation(0, |w| {
                gpu.migrate_here(w.span(0..w.smoke.pages)?, SELECT_SYSTEM)?;
                Ok(())
            })?;
            if gpu.holds(self.span(0..self.smoke.pages)?)? == self.smoke.pages {
                return Ok(());
            }
            thread::yield_now();
        }
        let held = gpu.holds(self.span(0..self.smoke.pages)?)?;
        Err(WorkError::Condition(format!(
            "{held} of {} pages are on GPU {} after {TRIES} migrations; is its VRAM full?",
            self.smoke.pages,
            gpu.index()
        )))
    }

    /// Reads and checks `pages` by GPU `gpu`.
    fn read(&self, gpu: usize, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        let gpu = &self.gpus[gpu];
        for first in pages.clone().step_by(CHUNK) {
            let chunk = first..pages.end.min(first + CHUNK);
            self.slot.begin();
            let access = gpu.read(self.span(chunk.clone())?, &self.buffer, Owner::Own)?;
            for (i, page) in chunk.enumerate() {
                self.stamp(page)
                    .check(self.buffer.page(i))
                    .map_err(WorkError::seen(format!("read by GPU {}", gpu.index())))?;
            }
            self.slot.complete(u64::from(access.faults > 0));
        }
        Ok(())
    }

    /// Gives `pages` new contents by GPU `gpu`.
    fn write(&mut self, gpu: usize, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        for first in pages.clone().step_by(CHUNK) {
            let chunk = first..pages.end.min(first + CHUNK);
            for (i, page) in chunk.clone().enumerate() {
                self.next_stamp(page).write(self.buffer.page(i));
            }
            self.slot.begin();
            let access = self.gpus[gpu].write(self.span(chunk)?, &self.buffer, Owner::Own)?;
            self.slot.complete(u64::from(access.faults > 0));
        }
        Ok(())
    }
}

//! `evict-pressure`: more memory on the device than it has.

use std::thread;

use hmmstorm_abi::uapi::{PAGE_SIZE, SELECT_SYSTEM};

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::{Machine, pin, total_memory};
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::sys::memory::{Mapping, PageSpan};

/// Pages that a worker uses at once.
const PIECE: usize = 16;
/// Below this factor everything fits.
const HALVES: u64 = 2;

/// The workload.
#[derive(Debug)]
pub(crate) struct EvictPressure {
    factor: u64,
    rounds: u64,
    workers: usize,
    machine: Machine,
}

impl EvictPressure {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        let workers = match parameters.integer("workers") as usize {
            0 => machine.cpus,
            n => n,
        };
        Self { factor: parameters.integer("factor"), rounds: parameters.integer("rounds"), workers, machine }
    }

    /// Pages of each worker.
    fn share(&self) -> Result<usize, WorkError> {
        let vram = Gpu::open(0)?.stats()?.vram_pages;
        let all = vram * self.factor / HALVES;
        let bytes = all * PAGE_SIZE as u64;
        let memory = total_memory().unwrap_or(u64::MAX);
        if bytes > memory / 2 {
            return Err(WorkError::Condition(format!(
                "{} MiB of pages are too much for a guest of {} MiB: give it more --memory, less --vram, or a smaller factor",
                bytes >> 20,
                memory >> 20
            )));
        }
        Ok((all as usize / self.workers).next_multiple_of(PIECE))
    }

    fn evicted(&self) -> Result<u64, WorkError> {
        Ok(Gpu::open(0)?.stats()?.evicted)
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let (pages, before) = (self.share()?, self.evicted()?);
        thread::scope(|scope| {
            for number in 0..self.workers {
                scope.spawn(move || {
                    let slot = context.board.slot(number);
                    let result = Worker::new(self, *context, number, pages, slot).and_then(|mut w| w.run());
                    if let Err(error) = result {
                        error.post(slot);
                    }
                });
            }
        });
        if context.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        let evicted = self.evicted()? - before;
        match (self.factor > HALVES, evicted) {
            (true, 0) => Err(WorkError::Condition("nothing was evicted: there was no pressure".to_owned())),
            (false, 1..) if self.factor < HALVES => {
                Err(WorkError::Condition(format!("{evicted} pages were evicted though all of them fit")))
            }
            _ => Ok(()),
        }
    }
}

impl Workload for EvictPressure {
    fn workers(&self) -> Vec<String> {
        (0..self.workers).map(|i| format!("worker{i}@cpu{}", i % self.machine.cpus)).collect()
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| {
            error.post(context.board.slot(0));
            Stopped
        })
    }
}

struct Worker<'a> {
    context: Context<'a>,
    slot: Slot<'a>,
    number: usize,
    rounds: u64,
    pages: usize,
    rng: Rng,
    gpu: Gpu,
    mapping: Mapping,
    buffer: Mapping,
    /// Generation of each page; 0 is one that was never written.
    generations: Vec<u64>,
}

impl<'a> Worker<'a> {
    fn new(
        scenario: &EvictPressure,
        context: Context<'a>,
        number: usize,
        pages: usize,
        slot: Slot<'a>,
    ) -> Result<Self, WorkError> {
        slot.enter(&format!("worker{number}"));
        pin(number % scenario.machine.cpus).map_err(WorkError::system("sched_setaffinity of a worker"))?;
        let map = |pages| Mapping::private(pages).map_err(WorkError::system("mmap of a worker's pages"));
        Ok(Self {
            context,
            slot,
            number,
            rounds: scenario.rounds,
            pages,
            rng: Rng::new(context.seed, number as u64),
            gpu: Gpu::open(0)?,
            mapping: map(pages)?,
            buffer: map(PIECE)?,
            generations: vec![0; pages],
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        let pieces = self.pages / PIECE;
        // Every page has contents and has been on the device once before chance takes over.
        for piece in 0..pieces {
            self.write_by_cpu(piece)?;
            self.migrate(piece)?;
        }
        for round in 0..self.rounds {
            if self.number == 0 {
                self.context.board.set_round(round);
            }
            for _ in 0..pieces {
                let piece = self.rng.up_to(pieces as u64 - 1) as usize;
                match self.rng.up_to(4) {
                    0 => self.write_by_cpu(piece)?,
                    1 => self.read_by_cpu(piece)?,
                    2 => self.write_by_gpu(piece)?,
                    3 => self.read_by_gpu(piece)?,
                    _ => self.migrate(piece)?,
                }
            }
        }
        (0..pieces).try_for_each(|piece| self.read_by_cpu(piece))
    }

    fn stamp(&self, page: usize) -> Stamp {
        let page_number = (self.number as u64) << 32 | page as u64;
        Stamp { seed: self.context.seed, page: page_number, generation: self.generations[page] }
    }

    fn next_stamp(&mut self, page: usize) -> Stamp {
        self.generations[page] += 1;
        self.stamp(page)
    }

    fn span(&self, piece: usize) -> Result<PageSpan<'_>, WorkError> {
        let pages = piece * PIECE..(piece + 1) * PIECE;
        self.mapping.span(pages.clone()).ok_or_else(|| WorkError::Condition(format!("no pages {pages:?}")))
    }

    fn begin(&self) -> Result<(), WorkError> {
        if self.context.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        self.slot.begin();
        Ok(())
    }

    fn write_by_cpu(&mut self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        for page in piece * PIECE..(piece + 1) * PIECE {
            self.next_stamp(page).write(self.mapping.page(page));
        }
        self.slot.complete(0);
        Ok(())
    }

    fn read_by_cpu(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        for page in piece * PIECE..(piece + 1) * PIECE {
            self.stamp(page).check(self.mapping.page(page)).map_err(WorkError::seen("read by the CPU"))?;
        }
        self.slot.complete(0);
        Ok(())
    }

    fn migrate(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        let answer = self.gpu.migrate_here(self.span(piece)?, SELECT_SYSTEM)?;
        self.slot.migrated(PIECE, &answer);
        self.slot.complete(0);
        Ok(())
    }

    fn write_by_gpu(&mut self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        for i in 0..PIECE {
            self.next_stamp(piece * PIECE + i).write(self.buffer.page(i));
        }
        let access = self.gpu.write(self.span(piece)?, &self.buffer, Owner::Own)?;
        self.slot.complete(u64::from(access.faults > 0));
        Ok(())
    }

    fn read_by_gpu(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        let access = self.gpu.read(self.span(piece)?, &self.buffer, Owner::Own)?;
        self.slot.returned();
        for i in 0..PIECE {
            self.stamp(piece * PIECE + i)
                .check(self.buffer.page(i))
                .map_err(WorkError::seen("read by GPU 0"))?;
        }
        self.slot.complete(u64::from(access.faults > 0));
        Ok(())
    }
}

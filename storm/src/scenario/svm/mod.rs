//! `svm`: CPU and GPU work on the same memory, by address.

mod huge;
mod worker;

use std::thread;

use hmmstorm_abi::uapi::{self, PAGE_SIZE};

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::gpu::Gpu;
use crate::machine::{Machine, total_memory};
use crate::sys::memory::BLOCK_PAGES;
use worker::Worker;

/// Pages that are written at once, and so have one generation.
const PIECE: usize = 16;
/// Below this factor everything fits.
const HALVES: u64 = 2;

/// The workload.
#[derive(Debug)]
pub(crate) struct Svm {
    factor: u64,
    rounds: u64,
    workers: usize,
    policy: uapi::Policy,
    machine: Machine,
}

impl Svm {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        let workers = match parameters.integer("workers") as usize {
            0 => machine.cpus,
            n => n,
        };
        let policy = uapi::Policy {
            chunk: match parameters.choice("chunk") {
                "4K" => 4 << 10,
                "2M" => 2 << 20,
                _ => 64 << 10,
            },
            placement: match parameters.choice("placement") {
                "stay" => uapi::PLACE_STAY,
                _ => uapi::PLACE_MIGRATE,
            },
            owner: match parameters.choice("owner") {
                "none" => uapi::OWNER_NONE,
                _ => uapi::OWNER_OWN,
            },
            limit: parameters.integer("limit") as u32,
            window_ms: 100,
        };
        Self {
            factor: parameters.integer("factor"),
            rounds: parameters.integer("rounds"),
            workers,
            policy,
            machine,
        }
    }

    /// Whether workers use huge pages: what the driver moves at once is as large.
    fn huge(&self) -> bool {
        self.policy.chunk == (BLOCK_PAGES * PAGE_SIZE) as u64
    }

    /// Pages of each worker.
    fn share(&self) -> Result<usize, WorkError> {
        let vram = Gpu::open(0)?.stats()?.vram_pages;
        let pages = vram * self.factor / HALVES;
        let bytes = pages * PAGE_SIZE as u64;
        let memory = total_memory().unwrap_or(u64::MAX);
        if bytes > memory / 2 {
            return Err(WorkError::Condition(format!(
                "{} MiB of pages are too much for a guest of {} MiB: give it more --memory, less --vram, or a smaller factor",
                bytes >> 20,
                memory >> 20
            )));
        }
        let share =
            (pages as usize / self.workers).next_multiple_of(if self.huge() { BLOCK_PAGES } else { PIECE });
        if self.factor < HALVES && (share * self.workers) as u64 * HALVES > vram {
            return Err(WorkError::Condition(format!(
                "{} workers with a huge page each do not fit into half of {vram} pages of VRAM: more --vram, or fewer --param workers",
                self.workers
            )));
        }
        Ok(share)
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let gpu = Gpu::open(0)?;
        let pages = self.share()?;
        if self.huge() && self.policy.owner == uapi::OWNER_OWN {
            huge::round_trip(context, self.policy)?;
        }
        let before = gpu.stats()?;
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
        self.judge(before, gpu.stats()?)
    }

    /// Whether what should have been provoked was.
    fn judge(&self, before: uapi::Stats, after: uapi::Stats) -> Result<(), WorkError> {
        let migrates = self.policy.placement == uapi::PLACE_MIGRATE && self.policy.owner == uapi::OWNER_OWN;
        let checks = [
            (after.gpu_faults == before.gpu_faults, "the GPU had no page fault"),
            (after.gpu_unmapped == before.gpu_unmapped, "no page was taken back from the GPU"),
            (migrates && after.to_device == before.to_device, "no page migrated to the GPU"),
            (
                migrates && self.factor > HALVES && after.evicted == before.evicted,
                "nothing was evicted: there was no pressure",
            ),
            (
                self.factor < HALVES && after.evicted != before.evicted,
                "pages were evicted though all of them fit",
            ),
            (
                !migrates && after.exclusive == before.exclusive,
                "the GPU was atomic on no page that stays in system memory",
            ),
            (
                self.policy.limit != 0 && after.thrashing == before.thrashing,
                "no chunk moved so often that it had to stay",
            ),
            (
                migrates && self.huge() && after.huge_to_device == before.huge_to_device,
                "no huge page migrated to the GPU",
            ),
            (
                migrates && self.huge() && after.huge_to_system == before.huge_to_system,
                "no huge page came back from the GPU",
            ),
            (
                self.huge() && after.gpu_mapped_huge == before.gpu_mapped_huge,
                "no huge page was mapped by one entry",
            ),
        ];
        match checks.iter().find(|(failed, _)| *failed) {
            Some((_, what)) => Err(WorkError::Condition((*what).to_owned())),
            None => Ok(()),
        }
    }
}

impl Workload for Svm {
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

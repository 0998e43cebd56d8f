//! `fork-cow`: families of processes write copy-on-write device pages, by CPU and GPU, while they migrate.

use rustix::process::{WaitOptions, waitpid};

use super::access::Faults;
use super::definition::Parameters;
use super::range::Range;
use super::team::{Crew, Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::Mapping;
use crate::sys::process::fork;

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkCow {
    shape: Shape,
    pages: usize,
    generations: u64,
    rounds: u64,
    faults: Faults,
    migrate: bool,
    machine: Machine,
}

impl ForkCow {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            shape: Shape::new(parameters.integer("processes") as usize, 1, machine),
            pages: parameters.integer("pages") as usize,
            generations: parameters.integer("generations"),
            rounds: parameters.integer("rounds"),
            faults: Faults::from_parameters(parameters),
            migrate: parameters.flag("migrate"),
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("parent");
        let mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap of the range"))?;
        let range = Range::stamped(mapping, context.seed, 0);
        for round in 0..self.rounds {
            context.board.set_round(round);
            let mut rng = Rng::new(context.seed, round << 16);
            let mut parent = Relative::new(self, &range, slot)?;
            // What is forked is in RAM, on devices, or both.
            parent.take(&mut rng)?;
            self.shape.run(
                context,
                "child",
                |_| Ok(&range),
                |range, member: Member<'_>| {
                    let seed = context.seed ^ round << 32;
                    self.relative(range, seed, 1 + member.number as u64, 1, member.slot)
                },
                |crew: &Crew<'_>| {
                    for _ in 0..2 {
                        crew.check()?;
                        parent.visit_all(&mut rng)?;
                    }
                    Ok(())
                },
            )?;
            range.check_all(slot)?;
        }
        Ok(())
    }

    /// All of one process's life: it uses what it has of the range, forks one of its own, and goes on meanwhile.
    fn relative(
        &self,
        range: &Range,
        seed: u64,
        number: u64,
        generation: u64,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        let mut rng = Rng::new(seed, number << 8 | generation);
        // A GPU's file belongs to the address space that opened it.
        let mut relative = Relative::new(self, range, slot)?;
        relative.take(&mut rng)?;
        relative.visit_all(&mut rng)?;
        let child = if generation < self.generations {
            let descend = || match self.relative(range, seed, number, generation + 1, slot) {
                Ok(()) => 0,
                Err(error) => {
                    error.post(slot);
                    1
                }
            };
            Some(fork(descend).map_err(WorkError::system("fork of a grandchild"))?)
        } else {
            None
        };
        relative.take(&mut rng)?;
        relative.visit_all(&mut rng)?;
        if let Some(child) = child {
            let ended = waitpid(Some(child), WaitOptions::empty())
                .map_err(WorkError::system("waitpid for a grandchild"))?;
            if ended.is_none_or(|(_, status)| status.exit_status() != Some(0)) {
                let detail = format!("a grandchild ended with {ended:?}");
                return Err(WorkError::Invariant { name: "memory-kept", detail });
            }
        }
        range.check_all(slot)
    }
}

/// One process and what it has of the range.
struct Relative<'a> {
    scenario: &'a ForkCow,
    range: &'a Range,
    gpus: Vec<Gpu>,
    buffer: Mapping,
    slot: Slot<'a>,
}

impl<'a> Relative<'a> {
    fn new(scenario: &'a ForkCow, range: &'a Range, slot: Slot<'a>) -> Result<Self, WorkError> {
        Ok(Self {
            scenario,
            range,
            gpus: (0..scenario.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?,
            buffer: Mapping::private(1).map_err(WorkError::system("mmap of a buffer"))?,
            slot,
        })
    }

    fn gpu(&self, rng: &mut Rng) -> &Gpu {
        &self.gpus[rng.up_to(self.gpus.len() as u64 - 1) as usize]
    }

    /// Migrates a part of the range to a GPU.
    fn take(&self, rng: &mut Rng) -> Result<(), WorkError> {
        if !self.scenario.migrate {
            return Ok(());
        }
        let first = rng.up_to(self.range.pages() as u64 - 1) as usize;
        self.range.migrate(first / 2..self.range.pages(), self.gpu(rng), self.slot)
    }

    /// Reads or writes every page in a random order.
    fn visit_all(&mut self, rng: &mut Rng) -> Result<(), WorkError> {
        let mut order: Vec<_> = (0..self.range.pages()).collect();
        rng.shuffle(&mut order);
        for page in order {
            let by_cpu = self.scenario.faults.by_cpu(rng);
            match (by_cpu, rng.up_to(2) == 0) {
                (true, false) => self.range.check_by_cpu(page, self.slot)?,
                (true, true) => self.range.write_by_cpu(page, self.slot),
                (false, false) => {
                    let gpu = self.gpu(rng);
                    self.range.check_by_gpu(page, gpu, &self.buffer, Owner::Own, self.slot)?;
                }
                (false, true) => self.range.write_by_gpu(page, self.gpu(rng), &self.buffer, self.slot)?,
            }
        }
        Ok(())
    }
}

impl Workload for ForkCow {
    fn workers(&self) -> Vec<String> {
        self.shape.names("parent", "child")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

//! `ref-livelock`: many faulters on one device page.

use super::access::Faults;
use super::definition::Parameters;
use super::gate::{END, Gate};
use super::range::Range;
use super::team::{Crew, Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner, all_stats};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::Mapping;

/// GPU whose memory holds the page.
const HOLDER: usize = 0;

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RefLivelock {
    shape: Shape,
    pages: usize,
    rounds: u64,
    faults: Faults,
    machine: Machine,
}

impl RefLivelock {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            shape: Shape::from_parameters(parameters, machine),
            pages: parameters.integer("pages") as usize,
            rounds: parameters.integer("rounds"),
            faults: Faults::from_parameters(parameters),
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        let mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap of the range"))?;
        let range = Range::stamped(mapping, context.seed, 0);
        let gate = Gate::new(self.shape.members()).map_err(WorkError::system("mmap of the gate"))?;
        let gpu = Gpu::open(HOLDER)?;
        self.shape.run(
            context,
            "faulter",
            |_| Ok(&range),
            |range, member| self.fault(range, &gate, context.seed, member),
            |crew| {
                let led = self.lead(context, &range, &gate, &gpu, crew, slot);
                gate.announce(END);
                led
            },
        )?;
        let stats = all_stats()?;
        let back: u64 = stats.iter().map(|s| s.to_system).sum();
        if back < self.rounds {
            return Err(WorkError::Condition(format!("{back} pages came back in {} rounds", self.rounds)));
        }
        Ok(())
    }

    /// Brings the pages to the device and lets everybody at them, again and again.
    fn lead(
        &self,
        context: &Context<'_>,
        range: &Range,
        gate: &Gate,
        gpu: &Gpu,
        crew: &Crew<'_>,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        for round in 0..self.rounds {
            context.board.set_round(round);
            range.migrate_all(gpu, slot)?;
            // Stage 0 is the one that nobody waits for; rounds are at most a million.
            let stage = round as u32 + 1;
            gate.announce(stage);
            gate.await_all(stage, || crew.check())?;
        }
        Ok(())
    }

    fn fault(&self, range: &Range, gate: &Gate, seed: u64, member: Member<'_>) -> Result<(), WorkError> {
        // Whoever is not the holder is a stranger to its pages; with one GPU, nobody's eyes are.
        let (gpu, owner) = match self.machine.gpus {
            1 => (Gpu::open(HOLDER)?, Owner::None),
            gpus => (Gpu::open(HOLDER + 1 + member.number % (gpus - 1))?, Owner::Own),
        };
        let buffer = Mapping::private(1).map_err(WorkError::system("mmap of a faulter's buffer"))?;
        let mut rng = Rng::new(seed, 1 + member.number as u64);
        let mut last = 0;
        loop {
            last = gate.await_stage(last).map_err(WorkError::system("futex wait of a faulter"))?;
            if last == END {
                return Ok(());
            }
            for page in 0..self.pages {
                if self.faults.by_cpu(&mut rng) {
                    range.check_by_cpu(page, member.slot)?;
                } else {
                    range.check_by_gpu(page, &gpu, &buffer, owner, member.slot)?;
                }
            }
            gate.done(member.number, last);
        }
    }
}

impl Workload for RefLivelock {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "faulter")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

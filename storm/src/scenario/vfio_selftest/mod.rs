//! `vfio-selftest`: every part of the GPU, driven from user space through `vfio-pci`, with no driver of ours.
//!
//! The GPU stands behind the emulated IOMMU: `vfio-ioctls` takes type 1 containers only, and the bench's own device
//! is told of the IOMMU's mappings page by page, so that DMA to what is not mapped fails as it should.

mod bind;
mod channel;
mod mmu;
mod steps;

use hmmstorm_abi::pci::BAR_REGS;

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::sys::vfio::Function;

/// The workload.
#[derive(Debug)]
pub(crate) struct VfioSelftest {
    rounds: u64,
}

impl VfioSelftest {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        Self { rounds: parameters.integer("rounds") }
    }

    fn run_steps(&self, context: &Context<'_>, slot: Slot<'_>) -> Result<(), WorkError> {
        let functions = bind::functions()?;
        if functions.is_empty() {
            return Err(WorkError::Condition("there is no hsgpu on the PCI bus".to_owned()));
        }
        for round in 0..self.rounds {
            context.board.set_round(round);
            for address in &functions {
                bind::to_vfio(address)?;
                let function = Function::open(&bind::folder(address))
                    .map_err(|error| WorkError::Condition(format!("vfio of {address}: {error}")))?;
                let bench = steps::Bench { function: &function, seed: context.seed.wrapping_add(round) };
                for (name, step) in steps::STEPS {
                    slot.begin();
                    step(&bench).map_err(|error| named(error, name, address))?;
                    slot.complete(0);
                }
            }
        }
        Ok(())
    }
}

/// Says where `error` happened.
fn named(error: WorkError, step: &str, address: &str) -> WorkError {
    match error {
        WorkError::Data { mismatch, seen } => WorkError::Data { mismatch, seen: format!("{step}: {seen}") },
        other => WorkError::Condition(format!("{address}, {step}: {other}")),
    }
}

impl Workload for VfioSelftest {
    fn workers(&self) -> Vec<String> {
        vec!["vfio".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("vfio");
        match self.run_steps(context, slot) {
            Ok(()) => Ok(()),
            Err(error) => {
                error.post(slot);
                Err(Stopped)
            }
        }
    }
}

/// The registers.
#[derive(Clone, Copy, Debug)]
struct Bar0<'a>(&'a Function);

impl Bar0<'_> {
    /// Reads a register.
    fn read(self, register: usize) -> Result<u32, WorkError> {
        let bytes =
            self.0.read(BAR_REGS, register as u64).map_err(WorkError::system("pread of a register"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Writes a register.
    fn write(self, register: usize, value: u32) -> Result<(), WorkError> {
        let bytes = value.to_le_bytes();
        self.0.write(BAR_REGS, register as u64, bytes).map_err(WorkError::system("pwrite of a register"))
    }
}

//! All GPUs of the process and their worker threads.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hmmstorm_abi::pci::CHANNELS;
use hmmstorm_abi::wire::control::{Chaos, GpuStats};

use crate::chaos::Plan;
use crate::chaos::late::Late;
use crate::chaos::order::Order;
use crate::config::{Config, Mode};
use crate::core::Core;
use crate::engine::atomics::BusAtomics;
use crate::faults::Faults;
use crate::gpu::Gpu;
use crate::guest_memory::GuestMemory;
use crate::irq::Interrupts;
use crate::mmu::Mmu;
use crate::stats::{Complaints, Stats};
use crate::vram::{Vram, VramError};

/// Why the GPUs could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No VRAM.
    #[error(transparent)]
    Vram(#[from] VramError),
    /// No thread.
    #[error("cannot start worker thread {name}: {source}")]
    Thread {
        /// Its name.
        name: String,
        /// What the host said.
        source: io::Error,
    },
}

/// The GPUs. Dropping it ends their workers.
#[derive(Debug)]
pub struct Machine {
    gpus: Vec<Arc<Gpu>>,
    workers: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Makes the GPUs that `config` asks for and starts their workers.
    ///
    /// # Errors
    /// [`MachineError`] if the host gives no memory or no threads.
    pub fn new(config: &Config) -> Result<Self, MachineError> {
        let vrams: Arc<[Arc<Vram>]> =
            (0..config.gpus).map(|_| Vram::new(config.vram).map(Arc::new)).collect::<Result<_, _>>()?;
        let gpu = |index| {
            let interrupts = Arc::new(Interrupts::default());
            let core = Core {
                index,
                mode: config.mode,
                poll: Duration::from_micros(config.poll_us),
                memory: GuestMemory::default(),
                vrams: Arc::clone(&vrams),
                mmu: Mmu::new(config.tlb_entries as usize),
                bus_atomics: BusAtomics::default(),
                faults: Faults::default(),
                late: Late::new(Arc::clone(&interrupts)),
                interrupts,
                order: Order::default(),
                stats: Stats::default(),
                complaints: Complaints::default(),
                chaos: Plan::new(config.chaos.clone()),
                bus_master: AtomicBool::new(false),
            };
            core.vram().poison(&config.chaos);
            Arc::new(Gpu::new(core, config.aperture()))
        };
        let mut machine = Self { gpus: (0..config.gpus).map(gpu).collect(), workers: Vec::new() };
        if config.mode == Mode::Threaded {
            machine.start_workers()?;
        }
        Ok(machine)
    }

    fn start_workers(&mut self) -> Result<(), MachineError> {
        for gpu in &self.gpus {
            for channel in 0..CHANNELS {
                let name = format!("gpu{}-channel{channel}", gpu.index());
                let gpu = Arc::clone(gpu);
                let worker = thread::Builder::new().name(name.clone()).spawn(move || gpu.work(channel));
                self.workers.push(worker.map_err(|source| MachineError::Thread { name, source })?);
            }
        }
        Ok(())
    }

    /// The GPUs, by index.
    pub fn gpus(&self) -> &[Arc<Gpu>] {
        &self.gpus
    }

    /// Counters of every GPU, by index.
    pub fn stats(&self) -> Vec<GpuStats> {
        self.gpus.iter().map(|gpu| gpu.stats()).collect()
    }

    /// Puts a chaos plan in force on GPU `gpu`, or on all. False if there is no such GPU.
    pub fn set_chaos(&self, gpu: Option<u8>, plan: &Chaos) -> bool {
        match gpu.map(usize::from) {
            None => self.gpus.iter().for_each(|gpu| gpu.set_chaos(plan.clone())),
            Some(index) => match self.gpus.get(index) {
                Some(gpu) => gpu.set_chaos(plan.clone()),
                None => return false,
            },
        }
        true
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gpus.iter().for_each(|gpu| gpu.stop());
        for worker in self.workers.drain(..) {
            // A worker that panicked has said so on standard error.
            let _ = worker.join();
        }
    }
}

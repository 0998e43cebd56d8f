//! `fault-storm`: processes and threads fault on the same device pages, by CPU and GPU, while they migrate.

use hmmstorm_abi::uapi;

use super::access::Faults;
use super::definition::Parameters;
use super::ksm::Ksm;
use super::range::Range;
use super::team::{Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::gpu::{Gpu, Owner, all_stats};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::Mapping;

/// How address spaces come to map the same folios.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Fork,
    Ksm,
}

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FaultStorm {
    shape: Shape,
    pages: usize,
    rounds: u64,
    sharing: Sharing,
    faults: Faults,
    writes: u64,
    /// GPUs read by jobs.
    jobs: bool,
    machine: Machine,
}

impl FaultStorm {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            shape: Shape::from_parameters(parameters, machine),
            pages: parameters.integer("pages") as usize,
            rounds: parameters.integer("rounds"),
            sharing: if parameters.choice("sharing") == "ksm" { Sharing::Ksm } else { Sharing::Fork },
            faults: Faults::from_parameters(parameters),
            writes: parameters.integer("writes"),
            jobs: parameters.choice("device") == "job",
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let before = Counts::now()?;
        let slot = context.board.slot(0);
        slot.enter("leader");
        match self.sharing {
            Sharing::Fork => {
                let range = Range::stamped(self.map()?, context.seed, 0);
                self.shape.run(
                    context,
                    "faulter",
                    |_| Ok(&range),
                    |range, member| Worker::new(self, range, context, member)?.run(),
                    |_| Ok(()),
                )?;
                range.check_all(slot)?;
            }
            Sharing::Ksm => {
                let ksm = Ksm::start()?;
                self.shape.run(
                    context,
                    "faulter",
                    |_| {
                        let range = Range::stamped(self.map()?, context.seed, 0);
                        ksm.merge(range.mapping())?;
                        Ok(range)
                    },
                    |range, member| Worker::new(self, range, context, member)?.run(),
                    |_| Ok(()),
                )?;
            }
        }
        Counts::now()?.check(before, self.faults, self.jobs)
    }

    fn open(&self, gpu: usize) -> Result<Gpu, WorkError> {
        let gpu = Gpu::open(gpu)?;
        if self.jobs {
            gpu.set_policy(Owner::Own.policy(uapi::PLACE_MIGRATE))?;
        }
        Ok(gpu)
    }

    fn map(&self) -> Result<Mapping, WorkError> {
        Mapping::private(self.pages).map_err(WorkError::system("mmap of the range"))
    }
}

/// What the drivers of all GPUs counted.
#[derive(Clone, Copy)]
struct Counts {
    to_device: u64,
    cpu_faults: u64,
    device_faults: u64,
    jobs: u64,
}

impl Counts {
    fn now() -> Result<Self, WorkError> {
        let stats = all_stats()?;
        Ok(Self {
            to_device: stats.iter().map(|s| s.to_device).sum(),
            cpu_faults: stats.iter().map(|s| s.cpu_faults).sum(),
            device_faults: stats.iter().map(|s| s.device_faults).sum(),
            jobs: stats.iter().map(|s| s.gpu_faults).sum(),
        })
    }

    /// A storm in which nothing faulted proves nothing.
    fn check(self, before: Self, faults: Faults, jobs: bool) -> Result<(), WorkError> {
        let counts = [
            ("page went to a device", self.to_device - before.to_device, true),
            (
                "CPU fault found a page on a device",
                self.cpu_faults - before.cpu_faults,
                faults != Faults::Device,
            ),
            ("device fault was made", self.device_faults - before.device_faults, faults != Faults::Cpu),
            ("job of a GPU faulted", self.jobs - before.jobs, jobs && faults != Faults::Cpu),
        ];
        match counts.iter().find(|(_, count, wanted)| *wanted && *count == 0) {
            Some((what, ..)) => Err(WorkError::Condition(format!("not one {what}: there was no storm"))),
            None => Ok(()),
        }
    }
}

impl Workload for FaultStorm {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "faulter")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

struct Worker<'a> {
    scenario: &'a FaultStorm,
    range: &'a Range,
    member: Member<'a>,
    rng: Rng,
    gpus: Vec<Gpu>,
    buffer: Mapping,
    /// The pages, in the order of the round.
    order: Vec<usize>,
}

impl<'a> Worker<'a> {
    fn new(
        scenario: &'a FaultStorm,
        range: &'a Range,
        context: &Context<'_>,
        member: Member<'a>,
    ) -> Result<Self, WorkError> {
        Ok(Self {
            scenario,
            range,
            member,
            rng: Rng::new(context.seed, 1 + member.number as u64),
            gpus: (0..scenario.machine.gpus).map(|gpu| scenario.open(gpu)).collect::<Result<_, _>>()?,
            buffer: Mapping::private(1).map_err(WorkError::system("mmap of a worker's buffer"))?,
            order: (0..range.pages()).collect(),
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        for _ in 0..self.scenario.rounds {
            // The first worker of each address space always, the others now and then.
            if self.member.thread == 0 || self.rng.up_to(3) == 0 {
                self.migrate()?;
            }
            self.rng.shuffle(&mut self.order);
            for i in 0..self.order.len() {
                if self.member.stopped() {
                    return Err(WorkError::Elsewhere);
                }
                self.visit(self.order[i])?;
            }
        }
        Ok(())
    }

    fn gpu(&mut self) -> usize {
        self.rng.up_to(self.gpus.len() as u64 - 1) as usize
    }

    fn migrate(&mut self) -> Result<(), WorkError> {
        let gpu = self.gpu();
        self.range.migrate(0..self.range.pages(), &self.gpus[gpu], self.member.slot)
    }

    fn visit(&mut self, page: usize) -> Result<(), WorkError> {
        let own = page % self.scenario.shape.threads() == self.member.thread;
        let writes = own && self.rng.up_to(99) < self.scenario.writes;
        let by_cpu = self.scenario.faults.by_cpu(&mut self.rng);
        let gpu = self.gpu();
        let (gpu, slot) = (&self.gpus[gpu], self.member.slot);
        match (by_cpu, writes) {
            (true, false) => self.range.check_by_cpu(page, slot)?,
            (true, true) => self.range.write_by_cpu(page, slot),
            (false, false) if self.scenario.jobs => self.range.check_by_job(page, gpu, slot)?,
            (false, false) => self.range.check_by_gpu(page, gpu, &self.buffer, Owner::Own, slot)?,
            (false, true) => self.range.write_by_gpu(page, gpu, &self.buffer, slot)?,
        }
        Ok(())
    }
}

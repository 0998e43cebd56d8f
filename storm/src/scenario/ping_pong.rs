//! `ping-pong` and `peer-ping-pong`: CPU and GPUs, or two GPUs, fight for the same pages.

use std::sync::{Mutex, PoisonError};

use super::definition::Parameters;
use super::range::Range;
use super::team::{Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::gpu::{Gpu, Owner, all_stats};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::Mapping;

/// Who a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Cpu,
    Gpu(usize),
}

/// The workload.
#[derive(Clone, Debug)]
pub(crate) struct PingPong {
    shape: Shape,
    sides: Vec<Side>,
    pages: usize,
    rounds: u64,
    migrate: bool,
    direct: bool,
    gpus: usize,
}

/// What the workers share.
struct Table {
    range: Range,
    /// One for each page: who holds it is its writer.
    writer: Vec<Mutex<()>>,
}

impl PingPong {
    /// From its parameters. `peers` leaves the CPU out.
    pub(crate) fn new(parameters: &Parameters, machine: Machine, peers: bool) -> Self {
        let cpus = if peers { 0 } else { parameters.integer("cpu_workers") as usize };
        let gpus = parameters.integer("gpu_workers") as usize;
        let sides: Vec<_> = (0..cpus)
            .map(|_| Side::Cpu)
            .chain((0..gpus).map(|worker| Side::Gpu(worker % machine.gpus)))
            .collect();
        Self {
            shape: Shape::new(0, sides.len(), machine),
            sides,
            pages: parameters.integer("pages") as usize,
            rounds: parameters.integer("rounds"),
            migrate: parameters.flag("migrate"),
            direct: peers && parameters.flag("direct"),
            gpus: machine.gpus,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        let (before, direct) = (moved()?, from_peers()?);
        let table = |_| {
            let mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap of the range"))?;
            Ok(Table {
                range: Range::stamped(mapping, context.seed, 0),
                writer: (0..self.pages).map(|_| Mutex::new(())).collect(),
            })
        };
        self.shape.run(
            context,
            "player",
            table,
            |table, member| Player::new(self, table, context, member)?.run(),
            |_| Ok(()),
        )?;
        if context.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        if self.direct && from_peers()? == direct {
            return Err(WorkError::Condition("no page went from GPU to GPU".to_owned()));
        }
        match (self.migrate, moved()? - before) {
            (true, 0) => Err(WorkError::Condition("no page went to a device: nobody fought".to_owned())),
            (false, 1..) => {
                Err(WorkError::Condition("pages went to a device though none was asked to".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

/// Pages that went to devices.
fn moved() -> Result<u64, WorkError> {
    Ok(all_stats()?.iter().map(|s| s.to_device).sum())
}

/// Pages that went from one device to another.
fn from_peers() -> Result<u64, WorkError> {
    Ok(all_stats()?.iter().map(|s| s.from_peer).sum())
}

impl Workload for PingPong {
    fn workers(&self) -> Vec<String> {
        let mut names = self.shape.names("leader", "player");
        for (name, side) in names.iter_mut().skip(1).zip(&self.sides) {
            let side = match side {
                Side::Cpu => "cpu".to_owned(),
                Side::Gpu(gpu) => format!("gpu{gpu}"),
            };
            *name = name.replace("player", &format!("{side}-player"));
        }
        names
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

struct Player<'a> {
    scenario: &'a PingPong,
    table: &'a Table,
    member: Member<'a>,
    rng: Rng,
    /// The worker's own GPU; a CPU's worker needs none.
    gpu: Option<Gpu>,
    /// The others, if it takes pages from them by a copy from GPU to GPU.
    others: Vec<Gpu>,
    buffer: Mapping,
}

impl<'a> Player<'a> {
    fn new(
        scenario: &'a PingPong,
        table: &'a Table,
        context: &Context<'_>,
        member: Member<'a>,
    ) -> Result<Self, WorkError> {
        Ok(Self {
            scenario,
            table,
            member,
            rng: Rng::new(context.seed, 1 + member.number as u64),
            gpu: match scenario.sides[member.number] {
                Side::Cpu => None,
                Side::Gpu(gpu) => Some(Gpu::open(gpu)?),
            },
            others: match scenario.sides[member.number] {
                Side::Gpu(own) if scenario.direct => {
                    (0..scenario.gpus).filter(|gpu| *gpu != own).map(Gpu::open).collect::<Result<_, _>>()?
                }
                _ => Vec::new(),
            },
            buffer: Mapping::private(1).map_err(WorkError::system("mmap of a player's buffer"))?,
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        for _ in 0..self.scenario.rounds {
            for _ in 0..self.scenario.pages {
                if self.member.stopped() {
                    return Err(WorkError::Elsewhere);
                }
                let page = self.rng.up_to(self.scenario.pages as u64 - 1) as usize;
                self.take(page)?;
                if self.rng.up_to(1) == 0 {
                    self.look(page)?;
                } else {
                    self.turn(page)?;
                }
            }
        }
        Ok(())
    }

    /// A GPU first wants the page in its own memory, whoever uses it just now.
    fn take(&self, page: usize) -> Result<(), WorkError> {
        let Some(gpu) = self.gpu.as_ref().filter(|_| self.scenario.migrate) else { return Ok(()) };
        for other in &self.others {
            gpu.take_from(self.table.range.span(page..page + 1)?, other)?;
        }
        self.table.range.migrate(page..page + 1, gpu, self.member.slot)
    }

    /// Reads while somebody else may be writing.
    fn look(&self, page: usize) -> Result<(), WorkError> {
        let (range, slot) = (&self.table.range, self.member.slot);
        match &self.gpu {
            Some(gpu) => range.check_by_gpu(page, gpu, &self.buffer, Owner::Own, slot),
            None => range.check_by_cpu(page, slot),
        }
    }

    /// Reads and writes as the page's one writer: what the last one wrote, whoever it was, must be there.
    fn turn(&self, page: usize) -> Result<(), WorkError> {
        // Who panicked is seen elsewhere.
        let _writer = self.table.writer[page].lock().unwrap_or_else(PoisonError::into_inner);
        self.look(page)?;
        let (range, slot) = (&self.table.range, self.member.slot);
        match &self.gpu {
            Some(gpu) => range.write_by_gpu(page, gpu, &self.buffer, slot)?,
            None => range.write_by_cpu(page, slot),
        }
        Ok(())
    }
}

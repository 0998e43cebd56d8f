//! `thp-split`: parts of huge pages migrate, are discarded, protected, shared and written, so that the huge page must be
//! split in every way there is.

use std::fs;

use rustix::process::{WaitOptions, waitpid};

use super::definition::Parameters;
use super::range::Range;
use super::team::{Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::gpu::{Gpu, Owner};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::{BLOCK_PAGES, Mapping};
use crate::sys::process::fork;

/// Pages that are read by CPU or GPU after each operation.
const LOOKS: usize = 12;

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThpSplit {
    shape: Shape,
    blocks: usize,
    rounds: u64,
    huge: bool,
    share_on_gpu: bool,
    machine: Machine,
}

impl ThpSplit {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            shape: Shape::new(parameters.integer("processes") as usize, 1, machine),
            blocks: parameters.integer("blocks") as usize,
            rounds: parameters.integer("rounds"),
            huge: parameters.flag("huge"),
            share_on_gpu: parameters.flag("share_on_gpu"),
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        context.board.slot(0).enter("leader");
        let (before, driver_before) = (huge_faults(), self.driver()?);
        self.shape.run(
            context,
            "splitter",
            |process| {
                let mapping = Mapping::blocks(self.blocks, self.huge)
                    .map_err(WorkError::system("mmap of huge pages"))?;
                Ok(Range::stamped(mapping, context.seed, process as u64))
            },
            |range, member| Splitter::new(self, range, context.seed, member)?.run(),
            |_| Ok(()),
        )?;
        let (made, driver) = (huge_faults() - before, self.driver()?);
        match (self.huge, made) {
            (true, 0) => {
                Err(WorkError::Condition("not one huge page was made: nothing was split".to_owned()))
            }
            (true, _) if driver.0 == driver_before.0 => {
                Err(WorkError::Condition("no huge page came to a GPU whole".to_owned()))
            }
            (true, _) if driver.1 == driver_before.1 => {
                Err(WorkError::Condition("no huge page was split while it was on a GPU".to_owned()))
            }
            (false, 1..) => {
                Err(WorkError::Condition(format!("{made} huge pages were made and none was wanted")))
            }
            _ => Ok(()),
        }
    }

    /// Huge pages that came to the GPUs whole, and those of them that were split there.
    fn driver(&self) -> Result<(u64, u64), WorkError> {
        (0..self.machine.gpus).try_fold((0, 0), |(whole, splits), gpu| {
            let stats = Gpu::open(gpu)?.stats()?;
            Ok((whole + stats.huge_to_device, splits + stats.splits))
        })
    }
}

/// Huge pages that faults have made since boot.
fn huge_faults() -> u64 {
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let count = vmstat.lines().find_map(|line| line.strip_prefix("thp_fault_alloc "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

struct Splitter<'a> {
    scenario: &'a ThpSplit,
    range: &'a Range,
    member: Member<'a>,
    rng: Rng,
    gpus: Vec<Gpu>,
    buffer: Mapping,
}

impl<'a> Splitter<'a> {
    fn new(
        scenario: &'a ThpSplit,
        range: &'a Range,
        seed: u64,
        member: Member<'a>,
    ) -> Result<Self, WorkError> {
        Ok(Self {
            scenario,
            range,
            member,
            rng: Rng::new(seed, 1 + member.number as u64),
            gpus: (0..scenario.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?,
            buffer: Mapping::private(1).map_err(WorkError::system("mmap of a buffer"))?,
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        for _ in 0..self.scenario.rounds {
            if self.member.stopped() {
                return Err(WorkError::Elsewhere);
            }
            let block = self.rng.up_to(self.scenario.blocks as u64 - 1) as usize;
            let all = block * BLOCK_PAGES..(block + 1) * BLOCK_PAGES;
            // A whole huge page again, and somewhere.
            self.range.renew(all.clone(), self.member.slot)?;
            if self.rng.up_to(1) == 0 {
                self.migrate(all.clone())?;
            }
            let part = self.part(all.clone());
            match self.rng.up_to(4) {
                0 => self.migrate(part)?,
                1 => self.range.renew(part, self.member.slot)?,
                2 => self.protect(part)?,
                3 => {
                    if !self.scenario.share_on_gpu {
                        self.bring_back(all.clone())?;
                    }
                    self.share(part)?;
                }
                _ => self.write_by_gpu(part)?,
            }
            self.look(all)?;
        }
        self.range.check_all(self.member.slot)
    }

    /// A part of a block, aligned to nothing.
    fn part(&mut self, all: std::ops::Range<usize>) -> std::ops::Range<usize> {
        let first = all.start + self.rng.up_to(BLOCK_PAGES as u64 - 1) as usize;
        first..first + 1 + self.rng.up_to((all.end - first) as u64 - 1) as usize
    }

    fn gpu(&mut self) -> usize {
        self.rng.up_to(self.gpus.len() as u64 - 1) as usize
    }

    fn migrate(&mut self, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        let gpu = self.gpu();
        self.range.migrate_huge(pages, &self.gpus[gpu], self.member.slot)
    }

    /// Another protection for a part of a huge page, and back.
    fn protect(&mut self, part: std::ops::Range<usize>) -> Result<(), WorkError> {
        let mapping = self.range.mapping();
        mapping.protect(part.clone(), false).map_err(WorkError::system("mprotect(PROT_READ)"))?;
        self.look(part.clone())?;
        mapping.protect(part, true).map_err(WorkError::system("mprotect(PROT_READ|PROT_WRITE)"))
    }

    /// All of a block comes back from whichever GPU has it, as it is.
    fn bring_back(&self, all: std::ops::Range<usize>) -> Result<(), WorkError> {
        let span = self.range.span(all)?;
        self.gpus.iter().try_for_each(|gpu| Ok(gpu.evict(span).map(drop)?))
    }

    /// A child that shares the block, and writes a part while we write another.
    fn share(&mut self, part: std::ops::Range<usize>) -> Result<(), WorkError> {
        let (range, slot) = (self.range, self.member.slot);
        let childs = part.clone().step_by(7);
        let child = fork(|| {
            let work = || -> Result<(), WorkError> {
                childs.for_each(|page| range.write_by_cpu(page, slot));
                part.clone().try_for_each(|page| range.check_by_cpu(page, slot))
            };
            i32::from(work().inspect_err(|error| error.post(slot)).is_err())
        })
        .map_err(WorkError::system("fork of a sharer"))?;
        for page in part.clone().step_by(5) {
            self.range.write_by_cpu(page, slot);
        }
        let gpu = self.gpu();
        if self.scenario.share_on_gpu {
            self.range.migrate_huge(part.clone(), &self.gpus[gpu], slot)?;
        } else {
            self.range.migrate(part.clone(), &self.gpus[gpu], slot)?;
        }
        let ended =
            waitpid(Some(child), WaitOptions::empty()).map_err(WorkError::system("waitpid for a sharer"))?;
        match ended {
            Some((_, status)) if status.exit_status() == Some(0) => Ok(()),
            other => {
                let detail = format!("a sharer of a huge page ended with {other:?}");
                Err(WorkError::Invariant { name: "memory-kept", detail })
            }
        }
    }

    fn write_by_gpu(&mut self, part: std::ops::Range<usize>) -> Result<(), WorkError> {
        let gpu = self.gpu();
        for page in part.step_by(41) {
            self.range.write_by_gpu(page, &self.gpus[gpu], &self.buffer, self.member.slot)?;
        }
        Ok(())
    }

    /// Some pages of `pages`, by CPU or GPU.
    fn look(&mut self, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        for _ in 0..LOOKS {
            let page = pages.start + self.rng.up_to(pages.len() as u64 - 1) as usize;
            if self.rng.up_to(1) == 0 {
                self.range.check_by_cpu(page, self.member.slot)?;
            } else {
                let gpu = self.gpu();
                let (gpu, slot) = (&self.gpus[gpu], self.member.slot);
                self.range.check_by_gpu(page, gpu, &self.buffer, Owner::Own, slot)?;
            }
        }
        Ok(())
    }
}

impl Workload for ThpSplit {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "splitter")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

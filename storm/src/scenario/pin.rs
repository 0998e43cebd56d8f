//! `pin`: pages that the kernel has pinned or holds references to, against migrations of them.

use std::sync::atomic::AtomicU64;

use super::definition::Parameters;
use super::range::Range;
use super::team::{Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::gpu::{Gpu, Owner};
use crate::machine::Machine;
use crate::rng::Rng;
use crate::sys::memory::Mapping;
use crate::sys::pin::{LongtermPin, Spliced};

/// Pages that are pinned at once; a pipe has room for 16.
const PINNED: usize = 8;
/// Looks at pinned pages before they are unpinned.
const LOOKS: u64 = 6;

/// How pages are pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Longterm,
    Spliced,
    Both,
    Not,
}

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pin {
    shape: Shape,
    pages: usize,
    rounds: u64,
    how: How,
    machine: Machine,
}

impl Pin {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            // Two pinners, each with a half of the range for its own, and the migrators.
            shape: Shape::new(0, 2 + parameters.integer("migrators") as usize, machine),
            pages: 2 * PINNED * parameters.integer("pieces") as usize,
            rounds: parameters.integer("rounds"),
            how: match parameters.choice("how") {
                "longterm" => How::Longterm,
                "vmsplice" => How::Spliced,
                "not" => How::Not,
                _ => How::Both,
            },
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        self.shape.run(
            context,
            "worker",
            |_| {
                let mapping = Mapping::private(self.pages).map_err(WorkError::system("mmap of the range"))?;
                Ok((Range::stamped(mapping, context.seed, 0), AtomicU64::new(0)))
            },
            |(range, done), member| {
                let worker = Worker::new(self, range, context.seed, member)?;
                match member.thread {
                    0 | 1 => {
                        let pinned = worker.pin();
                        done.fetch_add(1, std::sync::atomic::Ordering::Release);
                        pinned
                    }
                    _ => worker.migrate(done),
                }
            },
            |_| Ok(()),
        )?;
        if context.board.has_finding() { Err(WorkError::Elsewhere) } else { Ok(()) }
    }
}

struct Worker<'a> {
    scenario: &'a Pin,
    range: &'a Range,
    member: Member<'a>,
    rng: Rng,
    gpus: Vec<Gpu>,
    buffer: Mapping,
    pinned: Mapping,
}

impl<'a> Worker<'a> {
    fn new(scenario: &'a Pin, range: &'a Range, seed: u64, member: Member<'a>) -> Result<Self, WorkError> {
        let map = |pages| Mapping::private(pages).map_err(WorkError::system("mmap of a buffer"));
        Ok(Self {
            scenario,
            range,
            member,
            rng: Rng::new(seed, 1 + member.number as u64),
            gpus: (0..scenario.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?,
            buffer: map(1)?,
            pinned: map(PINNED)?,
        })
    }

    fn gpu(&mut self) -> usize {
        self.rng.up_to(self.gpus.len() as u64 - 1) as usize
    }

    /// Migrates and reads everything, pinned or not, until both pinners are done.
    fn migrate(mut self, done: &AtomicU64) -> Result<(), WorkError> {
        while !self.member.stopped() && done.load(std::sync::atomic::Ordering::Acquire) < 2 {
            let gpu = self.gpu();
            self.range.migrate(0..self.range.pages(), &self.gpus[gpu], self.member.slot)?;
            for _ in 0..4 {
                let page = self.rng.up_to(self.range.pages() as u64 - 1) as usize;
                let gpu = self.gpu();
                self.range.check_by_gpu(page, &self.gpus[gpu], &self.buffer, Owner::Own, self.member.slot)?;
            }
        }
        Ok(())
    }

    fn pin(mut self) -> Result<(), WorkError> {
        let half = self.range.pages() / 2;
        // There can be one long-term pin at a time, so it is the first pinner's.
        let longterm = self.member.thread == 0;
        for _ in 0..self.scenario.rounds {
            if self.member.stopped() {
                return Err(WorkError::Elsewhere);
            }
            let piece = self.rng.up_to((half / PINNED) as u64 - 1) as usize;
            let first = self.member.thread * half + piece * PINNED;
            let pages = first..first + PINNED;
            match (self.scenario.how, longterm) {
                (How::Longterm | How::Both, true) => self.longterm(pages)?,
                (How::Spliced | How::Both, false) => self.spliced(pages)?,
                _ => self.unpinned(pages)?,
            }
        }
        Ok(())
    }

    /// While pages are pinned for long they stay in system memory, and the pages that the kernel has are the process's own.
    fn longterm(&mut self, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        let slot = self.member.slot;
        slot.begin();
        let pin = LongtermPin::new(self.range.span(pages.clone())?)
            .map_err(WorkError::system("PIN_LONGTERM_TEST_START of gup_test"))?;
        slot.complete_touch();
        for _ in 0..LOOKS {
            let gpu = self.gpu();
            for gpu in &self.gpus {
                let held = gpu.holds(self.range.span(pages.clone())?)?;
                if held > 0 {
                    let detail = format!("{held} of pages {pages:?} are on GPU {} while pinned", gpu.index());
                    return Err(WorkError::Invariant { name: "pinned-stays", detail });
                }
            }
            let page = pages.start + self.rng.up_to(PINNED as u64 - 1) as usize;
            if self.rng.up_to(1) == 0 {
                self.range.write_by_cpu(page, slot);
            } else {
                self.range.write_by_gpu(page, &self.gpus[gpu], &self.buffer, slot)?;
            }
            slot.begin();
            pin.read(&self.pinned).map_err(WorkError::system("PIN_LONGTERM_TEST_READ of gup_test"))?;
            for (i, page) in pages.clone().enumerate() {
                self.range
                    .current(page)
                    .check(self.pinned.page(i))
                    .map_err(WorkError::seen("read through the pin"))?;
            }
            slot.complete(0);
        }
        Ok(())
    }

    /// What a pipe was given is what comes out of it, whatever migrates meanwhile.
    fn spliced(&mut self, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        let slot = self.member.slot;
        slot.begin();
        let spliced = Spliced::new(self.range.span(pages.clone())?).map_err(WorkError::system("vmsplice"))?;
        slot.complete_touch();
        let gpu = self.gpu();
        for _ in 0..LOOKS {
            self.range.migrate(pages.clone(), &self.gpus[gpu], slot)?;
            let page = pages.start + self.rng.up_to(PINNED as u64 - 1) as usize;
            self.range.check_by_cpu(page, slot)?;
        }
        slot.begin();
        let words = spliced.read().map_err(WorkError::system("read of a pipe"))?;
        for (cell, word) in self.pinned.cells().iter().zip(words) {
            cell.store(word, std::sync::atomic::Ordering::Relaxed);
        }
        for (i, page) in pages.enumerate() {
            self.range
                .current(page)
                .check(self.pinned.page(i))
                .map_err(WorkError::seen("read from the pipe"))?;
        }
        slot.complete(0);
        Ok(())
    }

    /// Without a pin the pages go to the device: that they stay with one is the pin's doing.
    fn unpinned(&mut self, pages: std::ops::Range<usize>) -> Result<(), WorkError> {
        let slot = self.member.slot;
        let gpu = self.gpu();
        self.range.migrate(pages.clone(), &self.gpus[gpu], slot)?;
        for page in pages {
            if self.rng.up_to(1) == 0 {
                self.range.write_by_gpu(page, &self.gpus[gpu], &self.buffer, slot)?;
            }
            self.range.check_by_cpu(page, slot)?;
        }
        Ok(())
    }
}

impl Workload for Pin {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "worker")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

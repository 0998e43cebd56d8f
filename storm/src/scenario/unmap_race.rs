//! `unmap-race`: memory goes away, moves or changes its protection while others migrate it.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use rustix::io::Errno;
use rustix::process::{Signal, WaitOptions, kill_process, waitpid};

use super::definition::Parameters;
use super::range::Range;
use super::team::{Crew, Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::machine::Machine;
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::sys::memory::{Addresses, Mapping};
use crate::sys::process::fork;

/// What a call to a GPU may say about memory that is gone or changes.
const GONE: [Errno; 5] = [Errno::INVAL, Errno::FAULT, Errno::PERM, Errno::BUSY, Errno::NOENT];
/// Device accesses and migrations of a child that does not wait to be killed.
const CHILD_STEPS: u64 = 4;

/// What is done to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Munmap,
    Mremap,
    DontNeed,
    Free,
    Mprotect,
}

const OPS: [(&str, Op); 5] = [
    ("munmap", Op::Munmap),
    ("mremap", Op::Mremap),
    ("dontneed", Op::DontNeed),
    ("free", Op::Free),
    ("mprotect", Op::Mprotect),
];

/// The workload.
#[derive(Clone, Debug)]
pub(crate) struct UnmapRace {
    shape: Shape,
    pages: usize,
    rounds: u64,
    ops: Vec<Op>,
    children: bool,
    machine: Machine,
}

/// The memory of one process that is worked on, as its other threads know it.
#[derive(Default)]
struct Target {
    /// Where it was last; 0 before there was any.
    start: AtomicU64,
    /// Whether the owner is done.
    done: AtomicU64,
}

impl UnmapRace {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        let asked = parameters.choice("operation");
        // `exit` is what the leader's children do, and nothing to be done to memory.
        let ops = OPS.iter().filter(|(name, _)| asked == "all" || *name == asked).map(|&(_, op)| op);
        Self {
            shape: Shape::new(
                parameters.integer("processes") as usize,
                1 + parameters.integer("migrators") as usize,
                machine,
            ),
            pages: parameters.integer("pages") as usize,
            rounds: parameters.integer("rounds"),
            ops: ops.collect(),
            children: asked == "all" || asked == "exit",
            machine,
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        let mapping =
            Mapping::private(self.pages).map_err(WorkError::system("mmap of the leader's range"))?;
        let range = Range::stamped(mapping, context.seed, 0);
        self.shape.run(
            context,
            "worker",
            |_| Ok(Target::default()),
            |target, member| match member.thread {
                0 => {
                    let owned = Mutator::new(self, target, context.seed, member)?.run();
                    target.done.store(1, Release);
                    owned
                }
                _ => self.migrator(target, context.seed, member),
            },
            |crew| self.lead(context, &range, crew, slot),
        )?;
        range.check_all(slot)
    }

    /// Migrates and reads whatever is where the owner's memory was last.
    fn migrator(&self, target: &Target, seed: u64, member: Member<'_>) -> Result<(), WorkError> {
        let gpus: Vec<_> = (0..self.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?;
        let buffer =
            Mapping::private(self.pages).map_err(WorkError::system("mmap of a migrator's buffer"))?;
        let mut rng = Rng::new(seed, 1 + member.number as u64);
        while !member.stopped() && target.done.load(Acquire) == 0 {
            let start = target.start.load(Acquire);
            if start == 0 {
                std::thread::yield_now();
                continue;
            }
            let (all, gpu) = (Addresses::new(start, self.pages), rng.up_to(gpus.len() as u64 - 1) as usize);
            member.slot.begin();
            let answer = if rng.up_to(2) == 0 {
                gpus[gpu].read_at(all, &buffer).map(drop)
            } else {
                gpus[gpu].migrate_at(all).map(|answer| member.slot.migrated(self.pages, &answer))
            };
            match answer {
                Ok(()) => member.slot.complete(0),
                Err(errno) if GONE.contains(&errno) => member.slot.complete(0),
                Err(source) => {
                    return Err(WorkError::System {
                        call: "migration of memory that goes away",
                        source: source.into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Has children that share the leader's device pages end in all ways there are, and migrates those meanwhile.
    fn lead(
        &self,
        context: &Context<'_>,
        range: &Range,
        crew: &Crew<'_>,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        let gpus: Vec<_> = (0..self.machine.gpus).map(Gpu::open).collect::<Result<_, _>>()?;
        let buffer = Mapping::private(1).map_err(WorkError::system("mmap of the leader's buffer"))?;
        let mut rng = Rng::new(context.seed, 0);
        for round in (0..self.rounds).filter(|_| self.children) {
            context.board.set_round(round);
            crew.check()?;
            range.migrate(0..self.pages, &gpus[rng.up_to(gpus.len() as u64 - 1) as usize], slot)?;
            let (ending, seed) = (rng.up_to(2), rng.next());
            let child = fork(|| child(range, slot, ending, seed))
                .map_err(WorkError::system("fork of a child that ends"))?;
            for _ in 0..2 {
                let page = rng.up_to(self.pages as u64 - 1) as usize;
                let gpu = &gpus[rng.up_to(gpus.len() as u64 - 1) as usize];
                range.check_by_gpu(page, gpu, &buffer, Owner::Own, slot)?;
                range.migrate(0..self.pages, gpu, slot)?;
            }
            if ending == 2 {
                kill_process(child, Signal::KILL).map_err(WorkError::system("kill of a child"))?;
            }
            let status = waitpid(Some(child), WaitOptions::empty())
                .map_err(WorkError::system("waitpid for a child"))?;
            let well = status.is_some_and(|(_, status)| {
                status.exit_status() == Some(0)
                    || ending == 2 && status.terminating_signal() == Some(libc::SIGKILL)
            });
            if !well {
                let detail = format!("a child that shares the pages ended with {status:?}");
                return Err(WorkError::Invariant { name: "memory-kept", detail });
            }
            range.check_by_cpu(rng.up_to(self.pages as u64 - 1) as usize, slot)?;
        }
        Ok(())
    }
}

/// A child of the leader: uses its copy of the range, and ends with pages on devices.
fn child(range: &Range, slot: Slot<'_>, ending: u64, seed: u64) -> i32 {
    let mut rng = Rng::new(seed, 0);
    let mut use_it = || -> Result<(), WorkError> {
        let gpu = Gpu::open(0)?;
        gpu.migrate_here(range.span(0..range.pages())?, hmmstorm_abi::uapi::SELECT_SYSTEM)?;
        // The slot is the leader's; what a child completes is not counted.
        let page = rng.up_to(range.pages() as u64 - 1) as usize;
        range
            .current(page)
            .check(range.mapping().page(page))
            .map_err(WorkError::seen("read by a child's CPU"))
    };
    let mut steps = 0;
    let ended = loop {
        match use_it() {
            Ok(()) => steps += 1,
            Err(error) => break Err(error),
        }
        if ending != 2 && steps == CHILD_STEPS {
            break Ok(());
        }
    };
    match ended {
        Ok(()) if ending == 1 => {
            // Returns only if it fails.
            let failed = Command::new("/proc/self/exe").arg("--version").stdout(Stdio::null()).exec();
            WorkError::System { call: "execve", source: failed }.post(slot);
            1
        }
        Ok(()) => 0,
        Err(error) => {
            error.post(slot);
            1
        }
    }
}

/// The thread whose memory it is.
struct Mutator<'a> {
    scenario: &'a UnmapRace,
    target: &'a Target,
    member: Member<'a>,
    seed: u64,
    rng: Rng,
    gpu: Gpu,
    buffer: Mapping,
}

impl<'a> Mutator<'a> {
    fn new(
        scenario: &'a UnmapRace,
        target: &'a Target,
        seed: u64,
        member: Member<'a>,
    ) -> Result<Self, WorkError> {
        Ok(Self {
            scenario,
            target,
            member,
            seed,
            rng: Rng::new(seed, 1 + member.number as u64),
            gpu: Gpu::open(member.number % scenario.machine.gpus)?,
            buffer: Mapping::private(1).map_err(WorkError::system("mmap of an owner's buffer"))?,
        })
    }

    fn run(&mut self) -> Result<(), WorkError> {
        if self.scenario.ops.is_empty() {
            return Ok(());
        }
        for round in 0..self.scenario.rounds {
            if self.member.stopped() {
                return Err(WorkError::Elsewhere);
            }
            let last = self.scenario.ops.len() as u64 - 1;
            let op = self.scenario.ops[self.rng.up_to(last) as usize];
            self.round(round + 1, op)?;
        }
        Ok(())
    }

    fn stamp(&self, page: usize, generation: u64) -> Stamp {
        Stamp { seed: self.seed, page: (1 + self.member.number as u64) << 32 | page as u64, generation }
    }

    fn check(&self, mapping: &Mapping, page: usize, generation: u64, seen: &str) -> Result<(), WorkError> {
        self.stamp(page, generation).check(mapping.page(page)).map_err(WorkError::seen(seen))
    }

    /// New memory, the others let loose on it, and `op`.
    fn round(&mut self, generation: u64, op: Op) -> Result<(), WorkError> {
        let pages = self.scenario.pages;
        let mapping = Mapping::private(pages).map_err(WorkError::system("mmap"))?;
        for page in 0..pages {
            self.stamp(page, generation).write(mapping.page(page));
        }
        self.target.start.store(mapping.address(0), Release);
        self.member.slot.begin();
        if self.rng.up_to(1) == 0 {
            let span = mapping.span(0..pages).ok_or_else(|| WorkError::Condition("no pages".to_owned()))?;
            let answer = self.gpu.migrate_here(span, hmmstorm_abi::uapi::SELECT_SYSTEM)?;
            self.member.slot.migrated(pages, &answer);
        }
        super::idle(self.rng.up_to(20_000));
        let first = self.rng.up_to(pages as u64 - 1) as usize;
        let part = first..first + 1 + self.rng.up_to((pages - first) as u64 - 1) as usize;
        match op {
            // The end of the round.
            Op::Munmap => (),
            Op::Mremap => {
                let moved = mapping.relocate().map_err(WorkError::system("mremap"))?;
                (0..pages)
                    .try_for_each(|page| self.check(&moved, page, generation, "read after mremap()"))?;
            }
            Op::DontNeed => {
                mapping.discard(part.clone()).map_err(WorkError::system("madvise(MADV_DONTNEED)"))?;
                for page in 0..pages {
                    if !part.contains(&page) {
                        self.check(&mapping, page, generation, "read beside MADV_DONTNEED")?;
                    } else if !is_zero(&mapping, page) {
                        let detail = format!("page {page} holds data after MADV_DONTNEED");
                        return Err(WorkError::Invariant { name: "discarded", detail });
                    }
                }
            }
            Op::Free => {
                mapping.let_go(part.clone()).map_err(WorkError::system("madvise(MADV_FREE)"))?;
                for page in 0..pages {
                    if !(part.contains(&page) && is_zero(&mapping, page)) {
                        self.check(&mapping, page, generation, "read after MADV_FREE")?;
                    }
                }
            }
            Op::Mprotect => self.protect(&mapping, first, generation)?,
        }
        self.member.slot.complete(0);
        Ok(())
    }

    /// A page that may not be written is not written by a device either, and holds what it did.
    fn protect(&self, mapping: &Mapping, page: usize, generation: u64) -> Result<(), WorkError> {
        let span =
            mapping.span(page..page + 1).ok_or_else(|| WorkError::Condition(format!("no page {page}")))?;
        mapping.protect(0..mapping.pages(), false).map_err(WorkError::system("mprotect(PROT_READ)"))?;
        self.stamp(page, generation + 1).write(self.buffer.page(0));
        match self.gpu.write(span, &self.buffer, Owner::Own) {
            Err(error) if error.errno() == Some(Errno::PERM) => (),
            Err(error) if error.errno() == Some(Errno::BUSY) => (),
            Err(error) => return Err(error.into()),
            Ok(_) => {
                let detail = format!("a GPU wrote page {page}, which may only be read");
                return Err(WorkError::Invariant { name: "protection", detail });
            }
        }
        for page in 0..mapping.pages() {
            self.check(mapping, page, generation, "read after mprotect(PROT_READ)")?;
        }
        mapping
            .protect(0..mapping.pages(), true)
            .map_err(WorkError::system("mprotect(PROT_READ|PROT_WRITE)"))?;
        self.stamp(page, generation + 1).write(mapping.page(page));
        self.check(mapping, page, generation + 1, "read after mprotect(PROT_READ|PROT_WRITE)")
    }
}

fn is_zero(mapping: &Mapping, page: usize) -> bool {
    mapping.page(page).iter().all(|cell| cell.load(Relaxed) == 0)
}

impl Workload for UnmapRace {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "worker")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

//! A worker of `svm`: what it does to its memory, in what order, and what must come out.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use hmmstorm_abi::job::{Job, Op, Outcome, Pattern, WORD, mix, word_at};
use hmmstorm_abi::uapi::{PAGE_SIZE, SELECT_SYSTEM};

use super::{PIECE, Svm};
use crate::board::Slot;
use crate::gpu::{Gpu, coherent_node};
use crate::machine::pin;
use crate::rng::Rng;
use crate::scenario::{Context, WorkError};
use crate::sys::memory::{BLOCK_PAGES, Mapping, PageSpan};

/// Bytes of a piece.
const PIECE_BYTES: u64 = (PIECE * PAGE_SIZE) as u64;
/// Words of a piece.
const PIECE_WORDS: u64 = PIECE_BYTES / WORD;
/// Pieces of a huge page.
const BLOCK_PIECES: usize = BLOCK_PAGES / PIECE;
/// Jobs in flight when there are several.
const FLIGHT: usize = 4;
/// Pages on which a chain of pointers goes around, one a page.
const CHAIN: usize = PIECE;
/// What CPU and GPU each add to the counter.
const ADDS: u64 = 200;
/// One write of the CPU in so many makes a whole huge page anew.
const RENEWAL: u64 = 12;

/// One worker: its own memory, files and chance.
pub(super) struct Worker<'a> {
    context: Context<'a>,
    slot: Slot<'a>,
    number: usize,
    rounds: u64,
    rng: Rng,
    gpu: Gpu,
    /// Another one, which takes pages from the first.
    peer: Option<Gpu>,
    /// The coherent memory of the other one, if it has any.
    coherent: Option<Gpu>,
    /// What CPU and GPU write in turns.
    memory: Mapping,
    /// Whether it consists of huge pages.
    huge: bool,
    /// A chain of pointers.
    chain: Mapping,
    /// A counter.
    counter: Mapping,
    counted: u64,
    /// Generation of each piece.
    generations: Vec<u64>,
}

impl<'a> Worker<'a> {
    /// With memory and files of its own.
    pub(super) fn new(
        scenario: &Svm,
        context: Context<'a>,
        number: usize,
        pages: usize,
        slot: Slot<'a>,
    ) -> Result<Self, WorkError> {
        slot.enter(&format!("worker{number}"));
        pin(number % scenario.machine.cpus).map_err(WorkError::system("sched_setaffinity of a worker"))?;
        let map = |pages| Mapping::private(pages).map_err(WorkError::system("mmap of a worker's pages"));
        // A file of its own, so an address space of the GPU of its own.
        let gpu = Gpu::open(0)?;
        gpu.set_policy(scenario.policy)?;
        let peer = if scenario.machine.gpus > 1 { Some(Gpu::open(1)?) } else { None };
        if let Some(peer) = &peer {
            peer.set_policy(scenario.policy)?;
        }
        let coherent = match &peer {
            Some(peer) if peer.stats()?.coherent_pages != 0 => {
                Some(Gpu::open(coherent_node(peer.index(), scenario.machine.gpus))?)
            }
            _ => None,
        };
        Ok(Self {
            context,
            slot,
            number,
            rounds: scenario.rounds,
            rng: Rng::new(context.seed, number as u64),
            gpu,
            peer,
            coherent,
            memory: if scenario.huge() {
                Mapping::blocks(pages / BLOCK_PAGES, true).map_err(WorkError::system("mmap of huge pages"))?
            } else {
                map(pages)?
            },
            huge: scenario.huge(),
            chain: map(CHAIN)?,
            counter: map(1)?,
            counted: 0,
            generations: vec![0; pages / PIECE],
        })
    }

    /// Works, and checks everything at the end.
    pub(super) fn run(&mut self) -> Result<(), WorkError> {
        // Every piece has contents before chance takes over, one half from the CPU and one from the GPU.
        for piece in 0..self.pieces() {
            if piece % 2 == 0 { self.write_by_cpu(piece)? } else { self.write_by_gpu(piece)? }
        }
        for round in 0..self.rounds {
            if self.number == 0 {
                self.context.board.set_round(round);
            }
            for _ in 0..self.pieces() {
                self.step()?;
            }
        }
        self.count()?;
        self.follow()?;
        (0..self.pieces()).try_for_each(|piece| {
            if piece % 2 == 0 { self.check_by_gpu(piece, Pattern::Strided) } else { self.check_by_cpu(piece) }
        })
    }

    fn step(&mut self) -> Result<(), WorkError> {
        let piece = self.any_piece();
        match self.rng.up_to(16) {
            0 | 1 if self.huge && self.rng.up_to(RENEWAL - 1) == 0 => self.renew(piece),
            0 | 1 => self.write_by_cpu(piece),
            2 | 3 => self.check_by_cpu(piece),
            4 | 5 => self.write_by_gpu(piece),
            6 | 7 => self.check_by_gpu(piece, Pattern::Strided),
            8 => self.check_by_gpu(piece, Pattern::Random),
            9 | 10 => self.next_by_gpu(piece),
            11 => self.several(),
            12 => self.evict(piece),
            13 => self.count(),
            14 => self.follow(),
            15 if self.coherent.is_some() && self.rng.up_to(1) == 0 => self.in_coherent(piece),
            15 => self.check_by_peer(piece),
            _ => self.check_here(piece),
        }
    }

    fn pieces(&self) -> usize {
        self.generations.len()
    }

    fn any_piece(&mut self) -> usize {
        self.rng.up_to(self.pieces() as u64 - 1) as usize
    }

    /// What [`word_at`] wants for the piece's generation.
    fn tag(&self, piece: usize) -> u64 {
        let place = (self.number as u64) << 48 | (piece as u64) << 24;
        mix(self.context.seed ^ mix(place)).wrapping_add(self.generations[piece])
    }

    fn span(&self, piece: usize) -> Result<PageSpan<'_>, WorkError> {
        let pages = piece * PIECE..(piece + 1) * PIECE;
        self.memory.span(pages.clone()).ok_or_else(|| WorkError::Condition(format!("no pages {pages:?}")))
    }

    /// The piece, or the huge page that it is a part of.
    fn whole(&self, piece: usize) -> Result<PageSpan<'_>, WorkError> {
        if !self.huge {
            return self.span(piece);
        }
        let first = piece / BLOCK_PIECES * BLOCK_PAGES;
        let pages = first..first + BLOCK_PAGES;
        self.memory.span(pages.clone()).ok_or_else(|| WorkError::Condition(format!("no pages {pages:?}")))
    }

    /// Makes the huge page in which the piece is whole again, with new contents.
    fn renew(&mut self, piece: usize) -> Result<(), WorkError> {
        let first = piece / BLOCK_PIECES * BLOCK_PIECES;
        let pages = first * PIECE..first * PIECE + BLOCK_PAGES;
        self.memory.discard(pages).map_err(WorkError::system("madvise(MADV_DONTNEED) of a huge page"))?;
        (first..first + BLOCK_PIECES).try_for_each(|piece| self.write_by_cpu(piece))
    }

    fn begin(&self) -> Result<(), WorkError> {
        if self.context.board.has_finding() {
            return Err(WorkError::Elsewhere);
        }
        self.slot.begin();
        Ok(())
    }

    /// A job over a whole piece.
    fn job(&self, piece: usize, op: Op, pattern: Pattern, tag: u64) -> Result<Job, WorkError> {
        // A stride that shares no factor with the window visits every word, too.
        let stride = match pattern {
            Pattern::Strided if piece.is_multiple_of(3) => WORD * 521,
            Pattern::Strided => WORD,
            _ => tag,
        };
        Ok(Job {
            op,
            pattern,
            va: self.span(piece)?.address(),
            window: PIECE_BYTES,
            count: PIECE_WORDS,
            stride,
            tag,
            operand: tag.wrapping_add(1),
        })
    }

    fn run_job(&self, piece: usize, job: Job) -> Result<(), WorkError> {
        let outcome = self.gpu.submit(self.span(piece)?, job)?.wait()?;
        self.accept(piece, job, outcome)
    }

    fn accept(&self, piece: usize, job: Job, outcome: Outcome) -> Result<(), WorkError> {
        if outcome.mismatches != 0 {
            return Err(WorkError::Word {
                page: (piece * PIECE) as u64,
                expected: format!("{:#018x} at {:#x}", outcome.first_wanted, outcome.first_va),
                found: format!(
                    "{:#018x}, and {} of {} words are wrong (read by a GPU, {:?})",
                    outcome.first_found, outcome.mismatches, outcome.done, job
                ),
            });
        }
        if outcome.done != job.count {
            return Err(WorkError::Condition(format!(
                "GPU 0 made {} accesses of {}: {job:?}",
                outcome.done, job.count
            )));
        }
        self.slot.complete(u64::from(outcome.faults > 0));
        Ok(())
    }

    fn write_by_cpu(&mut self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        self.generations[piece] += 1;
        let (tag, start) = (self.tag(piece), self.span(piece)?.address());
        for page in 0..PIECE {
            for (i, cell) in self.memory.page(piece * PIECE + page).iter().enumerate() {
                let va = start + (page * PAGE_SIZE) as u64 + i as u64 * WORD;
                cell.store(word_at(va, tag), Relaxed);
            }
        }
        self.slot.complete(0);
        Ok(())
    }

    fn check_by_cpu(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        let (tag, start) = (self.tag(piece), self.span(piece)?.address());
        for page in 0..PIECE {
            for (i, cell) in self.memory.page(piece * PIECE + page).iter().enumerate() {
                let va = start + (page * PAGE_SIZE) as u64 + i as u64 * WORD;
                let (found, wanted) = (cell.load(Relaxed), word_at(va, tag));
                if found != wanted {
                    return Err(WorkError::Word {
                        page: (piece * PIECE + page) as u64,
                        expected: format!(
                            "{wanted:#018x} at {va:#x}, generation {}",
                            self.generations[piece]
                        ),
                        found: format!("{found:#018x} (read by the CPU)"),
                    });
                }
            }
        }
        self.slot.complete(0);
        Ok(())
    }

    fn write_by_gpu(&mut self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        self.generations[piece] += 1;
        let job = self.job(piece, Op::Store, Pattern::Strided, self.tag(piece))?;
        self.run_job(piece, job)
    }

    fn check_by_gpu(&self, piece: usize, pattern: Pattern) -> Result<(), WorkError> {
        self.begin()?;
        self.run_job(piece, self.job(piece, Op::Check, pattern, self.tag(piece))?)
    }

    /// Checks a piece in this thread, which serves the faults.
    fn check_here(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        let job = self.job(piece, Op::Check, Pattern::Strided, self.tag(piece))?;
        let outcome = self.gpu.run_here(self.span(piece)?, job)?;
        self.accept(piece, job, outcome)
    }

    /// The other GPU takes a piece from the first, and checks it. What did not move it fetches by way of system memory.
    fn check_by_peer(&self, piece: usize) -> Result<(), WorkError> {
        let Some(peer) = &self.peer else { return self.check_here(piece) };
        self.begin()?;
        let job = self.job(piece, Op::Check, Pattern::Strided, self.tag(piece))?;
        // So that there is something to take.
        self.accept(piece, job, self.gpu.submit(self.span(piece)?, job)?.wait()?)?;
        self.begin()?;
        peer.take_from(self.span(piece)?, &self.gpu)?;
        self.accept(piece, job, peer.submit(self.span(piece)?, job)?.wait()?)
    }

    /// A piece goes to the coherent memory of the other GPU, where this one checks it and gives it new contents.
    fn in_coherent(&mut self, piece: usize) -> Result<(), WorkError> {
        let Some(coherent) = &self.coherent else { return Ok(()) };
        self.begin()?;
        self.gpu.evict(self.whole(piece)?)?;
        coherent.migrate_here(self.span(piece)?, SELECT_SYSTEM)?;
        self.slot.complete(0);
        self.next_by_gpu(piece)?;
        self.check_by_cpu(piece)
    }

    /// The GPU checks a piece and writes its next generation, word by word.
    fn next_by_gpu(&mut self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        let job = self.job(piece, Op::CheckStore, Pattern::Strided, self.tag(piece))?;
        self.run_job(piece, job)?;
        self.generations[piece] += 1;
        Ok(())
    }

    /// Several jobs at once, while the CPU checks a piece of its own and takes one of theirs away.
    fn several(&mut self) -> Result<(), WorkError> {
        let first = self.rng.up_to((self.pieces() - FLIGHT) as u64) as usize;
        let own = self.any_piece();
        self.begin()?;
        let mut running = Vec::new();
        for piece in first..first + FLIGHT {
            let job = self.job(piece, Op::Check, Pattern::Strided, self.tag(piece))?;
            running.push((piece, job, self.gpu.submit(self.span(piece)?, job)?));
        }
        self.gpu.evict(self.whole(first)?)?;
        let checked = self.check_by_cpu(own);
        // All are waited for, whatever came out of the others.
        let outcomes =
            running.into_iter().map(|(piece, job, running)| (piece, job, running.wait())).collect::<Vec<_>>();
        checked?;
        for (piece, job, outcome) in outcomes {
            self.begin()?;
            self.accept(piece, job, outcome?)?;
        }
        self.slot.complete(0);
        Ok(())
    }

    fn evict(&self, piece: usize) -> Result<(), WorkError> {
        self.begin()?;
        self.gpu.evict(self.whole(piece)?)?;
        self.slot.complete(0);
        Ok(())
    }

    /// CPU and GPU add to one word at the same time.
    fn count(&mut self) -> Result<(), WorkError> {
        self.begin()?;
        let span = self.counter.span(0..1).ok_or_else(|| WorkError::Condition("no counter".to_owned()))?;
        let job = Job {
            op: Op::AtomicAdd,
            pattern: Pattern::Strided,
            va: span.address(),
            window: WORD,
            count: ADDS,
            stride: WORD,
            tag: 0,
            operand: 1,
        };
        let running = self.gpu.submit(span, job)?;
        for _ in 0..ADDS {
            self.counter.page(0)[0].fetch_add(1, SeqCst);
        }
        let outcome = running.wait()?;
        self.counted += 2 * ADDS;
        let found = self.counter.page(0)[0].load(SeqCst);
        if found != self.counted {
            return Err(WorkError::Word {
                page: 0,
                expected: format!("{} in a counter to which CPU and GPU 0 add", self.counted),
                found: format!("{found}"),
            });
        }
        self.slot.complete(u64::from(outcome.faults > 0));
        Ok(())
    }

    /// The GPU goes along a chain of pointers that the CPU made.
    fn follow(&mut self) -> Result<(), WorkError> {
        self.begin()?;
        // A cycle through all pages, in random order.
        let mut order = (0..CHAIN).collect::<Vec<_>>();
        for i in (1..CHAIN).rev() {
            order.swap(i, self.rng.up_to(i as u64) as usize);
        }
        let word = self.rng.up_to(PAGE_SIZE as u64 / WORD - 1) as usize;
        let address = |page: usize| self.chain.address(page) + word as u64 * WORD;
        for (i, page) in order.iter().enumerate() {
            self.chain.page(*page)[word].store(address(order[(i + 1) % CHAIN]), Relaxed);
        }
        let span = self.chain.span(0..CHAIN).ok_or_else(|| WorkError::Condition("no chain".to_owned()))?;
        let job = Job {
            op: Op::Load,
            pattern: Pattern::Chase,
            va: span.address() + word as u64 * WORD,
            window: self.chain.address(CHAIN - 1) + PAGE_SIZE as u64 - span.address() - word as u64 * WORD,
            count: 4 * CHAIN as u64,
            stride: 0,
            tag: 0,
            operand: 0,
        };
        let outcome = self.gpu.submit(span, job)?.wait()?;
        let round = (0..CHAIN).fold(0u64, |sum, page| sum.wrapping_add(address(page)));
        if outcome.sum != round.wrapping_mul(4) {
            return Err(WorkError::Word {
                page: 0,
                expected: format!("{:#x} as the sum of a chain of pointers", round.wrapping_mul(4)),
                found: format!("{:#x} after {} steps (read by GPU 0)", outcome.sum, outcome.done),
            });
        }
        self.accept(0, job, outcome)
    }
}

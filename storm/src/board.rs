//! The progress board: shared memory where workers count what they do, and where a supervisor in another address space
//! reads it without asking anybody.
//!
//! A worker writes its own slot only. Reading takes no lock and makes no system call, so a supervisor reports on workers
//! that hang in the kernel, whatever locks they hold.

use std::ffi::CString;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use hmmstorm_abi::uapi;
use hmmstorm_abi::wire::event::{Event, Measured, Progress, Unserved};
use serde::{Deserialize, Serialize};

use crate::clock::monotonic_ns;
use crate::measure::{self, Meter};
use crate::oracle::Mismatch;
use crate::sys::memory::Mapping;

/// Cells of the first page of a worker's slot.
const SLOT: usize = 512;
/// Pages of a worker's slot, so that no two workers share one: counts and finding, then what it measures.
const SLOT_PAGES: usize = 1 + measure::CELLS.div_ceil(SLOT);

/// Cells of the board's own page: the round, whether to stop, when an operation was last completed, the longest time
/// between two completions, and when that was over.
const ROUND: usize = 0;
const STOP: usize = 1;
const COMPLETED_AT: usize = 2;
const GAP: usize = 3;
const GAP_END: usize = 4;

const BEGUN: usize = 0;
const COMPLETED: usize = 1;
const FAULTS: usize = 2;
const PID: usize = 3;
const FINDING_STATE: usize = 8;
const FINDING_LENGTH: usize = 9;
const FINDING_TEXT: usize = 16;
const FINDING_BYTES: usize = (SLOT - FINDING_TEXT) * size_of::<u64>();

const NONE: u64 = 0;
const WRITING: u64 = 1;
const WRITTEN: u64 = 2;

/// What a worker found out that ends the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Finding {
    /// A page does not hold its stamp.
    Corruption {
        /// Its index.
        page: u64,
        /// Its stamp.
        expected: String,
        /// What it holds, and where that was seen.
        found: String,
    },
    /// Something besides contents is not as it must be.
    Invariant {
        /// Which invariant.
        name: String,
        /// What was expected and what was found.
        detail: String,
    },
    /// A device access that the driver has given up.
    Unserved {
        /// What was called, and on which GPU.
        call: String,
        /// First page that it is about.
        page: u64,
        /// Guest time that it took, nanoseconds.
        waited_ns: u64,
        /// Calls of `hmm_range_fault()` meanwhile.
        tries: u64,
        /// Calls of `handle_mm_fault()` by the worker's task.
        mm_faults: u64,
        /// The longest part of that time in which no worker completed an operation, nanoseconds.
        idle_ns: u64,
    },
    /// The worker cannot go on.
    Failure(String),
}

impl Finding {
    /// The finding for a page that was seen wrong `seen`, e.g. "read by GPU 1".
    pub(crate) fn corruption(mismatch: &Mismatch, seen: &str) -> Self {
        Self::Corruption {
            page: mismatch.expected.index(),
            expected: mismatch.expected.to_string(),
            found: format!("{mismatch} ({seen})"),
        }
    }

    /// The event that tells the host.
    pub(crate) fn into_event(self, worker: &str) -> Event {
        match self {
            Self::Corruption { page, expected, found } => {
                Event::Corruption { worker: worker.to_owned(), page, expected, found }
            }
            Self::Invariant { name, detail } => Event::Invariant { name, detail },
            Self::Unserved { call, page, waited_ns, tries, mm_faults, idle_ns } => {
                let worker = worker.to_owned();
                Event::Unserved(Unserved { worker, call, page, waited_ns, tries, mm_faults, idle_ns })
            }
            Self::Failure(message) => Event::Error { message: format!("{worker}: {message}") },
        }
    }
}

/// The board of one run.
#[derive(Debug)]
pub(crate) struct Board {
    /// Page 0: the round, and whether the workers are to stop. Then [`SLOT_PAGES`] a worker.
    memory: Mapping,
    workers: usize,
}

impl Board {
    /// A board for `workers` workers, all at zero.
    ///
    /// # Errors
    /// Of `mmap`.
    pub(crate) fn new(workers: usize) -> rustix::io::Result<Self> {
        let memory: Mapping = Mapping::shared(1 + workers * SLOT_PAGES)?;
        // Every page exists before the run: nobody's first count allocates one at an awkward moment.
        for page in 0..memory.pages() {
            memory.page(page)[0].store(0, Relaxed);
        }
        Ok(Self { memory, workers })
    }

    fn round_cell(&self) -> &AtomicU64 {
        &self.memory.page(0)[ROUND]
    }

    fn stop_cell(&self) -> &AtomicU64 {
        &self.memory.page(0)[STOP]
    }

    /// Tells workers that go on until they are told to stop, in whatever process they are.
    pub(crate) fn stop(&self) {
        self.stop_cell().store(1, Release);
    }

    /// Whether a worker should end: it was told to, or another one has found something.
    pub(crate) fn stopped(&self) -> bool {
        self.stop_cell().load(Acquire) != 0 || self.has_finding()
    }

    /// Notes that round `round` begins.
    pub(crate) fn set_round(&self, round: u64) {
        self.round_cell().store(round, Relaxed);
    }

    /// The slot of worker `index`.
    ///
    /// # Panics
    /// If there is no such worker.
    pub(crate) fn slot(&self, index: usize) -> Slot<'_> {
        assert!(index < self.workers);
        let first = (1 + index * SLOT_PAGES) * SLOT;
        let (counts, measures) = self.memory.cells()[first..first + SLOT_PAGES * SLOT].split_at(SLOT);
        Slot { counts, meter: Meter::new(measures), shared: self.memory.page(0) }
    }

    /// Where everything stands.
    pub(crate) fn progress(&self) -> Progress {
        let mut progress = Progress { round: self.round_cell().load(Relaxed), ..Progress::default() };
        for slot in (0..self.workers).map(|i| self.slot(i)) {
            // Completed first: a worker's begun is never behind it.
            let completed = slot.counts[COMPLETED].load(Acquire);
            progress.operations += completed;
            progress.faults += slot.counts[FAULTS].load(Relaxed);
            let busy = slot.begun() > completed;
            progress.outstanding += u32::from(busy);
            progress.busy.push(busy);
            progress.workers.push(completed);
            progress.pids.push(slot.counts[PID].load(Relaxed) as u32);
        }
        progress
    }

    /// What the workers measured so far.
    pub(crate) fn measured(&self) -> Measured {
        measure::sum((0..self.workers).map(|i| self.slot(i).meter))
    }

    /// Whether a worker has a finding.
    pub(crate) fn has_finding(&self) -> bool {
        (0..self.workers).any(|i| self.slot(i).counts[FINDING_STATE].load(Acquire) == WRITTEN)
    }

    /// The findings, by worker index.
    pub(crate) fn findings(&self) -> impl Iterator<Item = (usize, Finding)> {
        (0..self.workers).filter_map(|i| Some((i, self.slot(i).finding()?)))
    }
}

/// One worker's place on the board.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot<'a> {
    counts: &'a [AtomicU64],
    meter: Meter<'a>,
    /// The board's own page.
    shared: &'a [AtomicU64],
}

impl Slot<'_> {
    /// Notes that the calling task works here now, and gives it `name`, which the kernel's reports will show.
    pub(crate) fn enter(self, name: &str) {
        self.counts[PID]
            .store(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned().into(), Relaxed);
        // The kernel keeps the first 15 bytes. A task without its name works as well.
        let _named = CString::new(name).map(|name| rustix::thread::set_name(&name));
        self.meter.enter();
    }

    /// Notes that an operation begins.
    pub(crate) fn begin(self) {
        self.counts[BEGUN].store(self.begun() + 1, Release);
        self.meter.begin();
    }

    /// Notes that the operation that began has its result, which is checked next: its latency ends here. Without this it
    /// ends with [`Slot::complete`].
    pub(crate) fn returned(self) {
        self.meter.returned();
    }

    /// Notes what came of a migration of `pages` pages.
    pub(crate) fn migrated(self, pages: usize, answer: &uapi::Migrate) {
        self.meter.migrated(pages, answer);
    }

    /// Notes that the operation that began is complete and right, and was an access by the CPU.
    pub(crate) fn complete_touch(self) {
        self.meter.complete_touch();
        self.counts[COMPLETED].store(self.begun(), Release);
        self.note_completion();
    }

    /// Notes that the operation that began is complete and right, and how many resolved device faults that makes.
    pub(crate) fn complete(self, faults: u64) {
        self.meter.complete(faults);
        self.counts[FAULTS].store(self.counts[FAULTS].load(Relaxed) + faults, Relaxed);
        self.counts[COMPLETED].store(self.begun(), Release);
        self.note_completion();
    }

    fn note_completion(self) {
        let now = monotonic_ns();
        let before = self.shared[COMPLETED_AT].swap(now, Relaxed);
        let gap = now.saturating_sub(before);
        if before != 0 && gap > self.shared[GAP].load(Relaxed) {
            self.shared[GAP].store(gap, Relaxed);
            self.shared[GAP_END].store(now, Relaxed);
        }
    }

    /// Guest time in which no worker completed an operation, in nanoseconds: the longest piece of the last `window` of them.
    /// Not more than it was, as the longest one of the run may be older and hide another.
    pub(crate) fn idle(self, window: u64) -> u64 {
        let now = monotonic_ns();
        let from = now.saturating_sub(window);
        let open = now - self.shared[COMPLETED_AT].load(Relaxed).clamp(from, now);
        let end = self.shared[GAP_END].load(Relaxed);
        open.max(self.shared[GAP].load(Relaxed).min(end.saturating_sub(from)))
    }

    /// Calls of `handle_mm_fault()` by the calling task, which is this worker's, since its operation began.
    pub(crate) fn mm_faults(self) -> u64 {
        self.meter.mm_faults()
    }

    /// Operations begun.
    pub(crate) fn begun(self) -> u64 {
        self.counts[BEGUN].load(Acquire)
    }

    /// Posts `finding`. The first one stays; a text that does not fit is cut.
    pub(crate) fn post(self, finding: &Finding) {
        if self.counts[FINDING_STATE].compare_exchange(NONE, WRITING, Acquire, Relaxed).is_err() {
            return;
        }
        let text = to_json(finding);
        for (cell, chunk) in self.counts[FINDING_TEXT..].iter().zip(text.as_bytes().chunks(size_of::<u64>()))
        {
            let mut bytes = [0; size_of::<u64>()];
            bytes[..chunk.len()].copy_from_slice(chunk);
            cell.store(u64::from_ne_bytes(bytes), Relaxed);
        }
        self.counts[FINDING_LENGTH].store(text.len() as u64, Relaxed);
        self.counts[FINDING_STATE].store(WRITTEN, Release);
    }

    fn finding(self) -> Option<Finding> {
        if self.counts[FINDING_STATE].load(Acquire) != WRITTEN {
            return None;
        }
        let length = (self.counts[FINDING_LENGTH].load(Relaxed) as usize).min(FINDING_BYTES);
        let mut bytes: Vec<u8> =
            self.counts[FINDING_TEXT..].iter().flat_map(|cell| cell.load(Relaxed).to_ne_bytes()).collect();
        bytes.truncate(length);
        Some(serde_json::from_slice(&bytes).unwrap_or_else(|e| {
            Finding::Failure(format!(
                "left a finding that cannot be read ({e}): {}",
                String::from_utf8_lossy(&bytes)
            ))
        }))
    }
}

/// The finding as JSON of at most [`FINDING_BYTES`].
fn to_json(finding: &Finding) -> String {
    let cut = |text: &str| text.chars().take(FINDING_BYTES / 16).collect::<String>();
    let encode = |finding: &Finding| serde_json::to_string(finding).unwrap_or_default();
    let text = encode(finding);
    if text.len() <= FINDING_BYTES {
        return text;
    }
    encode(&match finding {
        Finding::Corruption { page, expected, found } => {
            Finding::Corruption { page: *page, expected: cut(expected), found: cut(found) }
        }
        Finding::Invariant { name, detail } => Finding::Invariant { name: cut(name), detail: cut(detail) },
        Finding::Unserved { call, page, waited_ns, tries, mm_faults, idle_ns } => Finding::Unserved {
            call: cut(call),
            page: *page,
            waited_ns: *waited_ns,
            tries: *tries,
            mm_faults: *mm_faults,
            idle_ns: *idle_ns,
        },
        Finding::Failure(message) => Finding::Failure(cut(message)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_worker_and_sums() {
        let board = Board::new(3).expect("mmap");
        board.set_round(7);
        for (worker, faults) in [(0, 0), (2, 1), (2, 0)] {
            board.slot(worker).begin();
            board.slot(worker).complete(faults);
        }
        board.slot(1).enter("worker1");
        assert_eq!(std::fs::read_to_string("/proc/thread-self/comm").expect("comm"), "worker1\n");
        let pid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        board.slot(1).begin();
        let expected = Progress {
            round: 7,
            operations: 3,
            faults: 1,
            outstanding: 1,
            workers: vec![1, 0, 2],
            pids: vec![0, pid, 0],
            busy: vec![false, true, false],
        };
        assert_eq!(board.progress(), expected);
        board.slot(1).complete(1);
        assert_eq!(board.progress().outstanding, 0);
    }

    #[test]
    fn idle_is_the_time_without_anybodys_completion() {
        let board = Board::new(2).expect("mmap");
        let pause = std::time::Duration::from_millis(40);
        let ns = pause.as_nanos() as u64;
        let complete = |worker| {
            board.slot(worker).begin();
            board.slot(worker).complete(0);
        };
        complete(0);
        std::thread::sleep(pause);
        // Still open, and no longer than what is asked for.
        assert!(board.slot(1).idle(u64::MAX) >= ns);
        assert_eq!(board.slot(1).idle(1000), 1000);
        complete(0);
        let closed = board.slot(1).idle(u64::MAX);
        assert!(closed >= ns, "{closed}");
        // One that was over before is nobody's business.
        std::thread::sleep(pause / 4);
        assert!(board.slot(1).idle(ns / 8) <= ns / 8);
    }

    #[test]
    fn the_first_finding_of_a_worker_stays() {
        let board = Board::new(2).expect("mmap");
        assert!(!board.has_finding());
        let first = Finding::Failure("ioctl: \"EIO\"\n".to_owned());
        board.slot(1).post(&first);
        board.slot(1).post(&Finding::Failure("second".to_owned()));
        assert!(board.has_finding());
        assert_eq!(board.findings().collect::<Vec<_>>(), [(1, first)]);
    }

    #[test]
    fn long_findings_are_cut_and_stay_readable() {
        let board = Board::new(1).expect("mmap");
        board.slot(0).post(&Finding::Corruption {
            page: 3,
            expected: "é\"".repeat(4000),
            found: "x".to_owned(),
        });
        let found = board.findings().next().expect("a finding").1;
        assert!(matches!(found, Finding::Corruption { page: 3, ref found, .. } if found == "x"), "{found:?}");
    }
}

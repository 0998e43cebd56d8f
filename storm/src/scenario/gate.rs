//! Stages: one process tells a crew of workers to go on, and waits until each has done so. Works across address spaces.

use std::io;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};

use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};

use crate::sys::memory::Mapping;

/// Stage that tells workers to end.
pub(crate) const END: u32 = u32::MAX;

/// Cells between two workers' acknowledgements: a cache line.
const STRIDE: usize = 16;
const COMMAND: usize = 0;
const SIGNAL: usize = STRIDE;
const WORKERS: usize = 2 * STRIDE;

/// How long the leader waits before it looks whether its workers still live.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The gate. Stages are announced in order; 0 is the one that nobody waits for.
#[derive(Debug)]
pub(crate) struct Gate {
    cells: Mapping<AtomicU32>,
    workers: usize,
}

impl Gate {
    /// A gate for `workers` workers (at most 62) at stage 0.
    ///
    /// # Errors
    /// Of `mmap`; `EINVAL` for too many workers.
    pub(crate) fn new(workers: usize) -> rustix::io::Result<Self> {
        let cells = Mapping::shared(1)?;
        if WORKERS + workers * STRIDE > cells.cells().len() {
            return Err(Errno::INVAL);
        }
        Ok(Self { cells, workers })
    }

    fn cell(&self, index: usize) -> &AtomicU32 {
        &self.cells.cells()[index]
    }

    /// Back to stage 0, for a new crew. Nobody may be waiting.
    pub(crate) fn reset(&self) {
        for cell in self.cells.cells() {
            cell.store(0, Release);
        }
    }

    /// Leader: announces `stage`.
    pub(crate) fn announce(&self, stage: u32) {
        self.cell(COMMAND).store(stage, Release);
        // A futex of memory that we hold can be woken; how many waited is of no interest.
        let _woken = futex::wake(self.cell(COMMAND), Flags::empty(), i32::MAX.cast_unsigned());
    }

    /// Leader: waits until every worker has done `stage`. Now and then asks `check` whether to wait on.
    ///
    /// # Errors
    /// Of `check`.
    pub(crate) fn await_all<E>(&self, stage: u32, mut check: impl FnMut() -> Result<(), E>) -> Result<(), E> {
        loop {
            let signal = self.cell(SIGNAL).load(Acquire);
            if (0..self.workers).all(|worker| self.cell(WORKERS + worker * STRIDE).load(Acquire) == stage) {
                return Ok(());
            }
            check()?;
            // However this ends (woken, changed meanwhile, timed out): the loop looks again.
            let _ended = futex::wait(self.cell(SIGNAL), Flags::empty(), signal, Some(&LOOK));
        }
    }

    /// Worker: waits for a stage other than `last`.
    ///
    /// # Errors
    /// Of `futex`, but for those that mean "look again".
    pub(crate) fn await_stage(&self, last: u32) -> io::Result<u32> {
        loop {
            let stage = self.cell(COMMAND).load(Acquire);
            if stage != last {
                return Ok(stage);
            }
            match futex::wait(self.cell(COMMAND), Flags::empty(), last, None) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR) => (),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Worker `worker`: has done `stage`.
    pub(crate) fn done(&self, worker: usize, stage: u32) {
        self.cell(WORKERS + worker * STRIDE).store(stage, Release);
        self.cell(SIGNAL).fetch_add(1, AcqRel);
        let _woken = futex::wake(self.cell(SIGNAL), Flags::empty(), 1);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn no_worker_starts_a_stage_before_all_have_done_the_last() {
        const WORKERS: usize = 3;
        const STAGES: u32 = 200;
        let gate = Gate::new(WORKERS).expect("mmap");
        let at_work = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for worker in 0..WORKERS {
                let (gate, at_work) = (&gate, &at_work);
                scope.spawn(move || {
                    let mut last = 0;
                    loop {
                        last = gate.await_stage(last).expect("futex");
                        if last == END {
                            return;
                        }
                        at_work.fetch_add(1, AcqRel);
                        gate.done(worker, last);
                    }
                });
            }
            for stage in 1..=STAGES {
                gate.announce(stage);
                gate.await_all(stage, || Ok::<_, ()>(())).expect("nothing fails");
                assert_eq!(at_work.load(Acquire), WORKERS * stage as usize);
            }
            gate.announce(END);
        });
    }

    #[test]
    fn the_leader_stops_waiting_when_the_check_fails() {
        let gate = Gate::new(1).expect("mmap");
        gate.announce(1);
        assert_eq!(gate.await_all(1, || Err("dead")), Err("dead"));
        assert!(Gate::new(63).is_err());
    }
}

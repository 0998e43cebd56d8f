//! Which run is next. A state machine without clocks and processes: it is told what ended, and says what to start.
//!
//! Cells take turns, so that a matrix that is interrupted has seen all of them, if seldom. A cell with a stopping rule has
//! one run at a time, and its decision depends on its seeds' order alone, never on which run happened to end first.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::statistics::{Decision, Sprt};

/// A part of a matrix, for one of several machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 1.
    pub index: u32,
    /// Of how many.
    pub of: u32,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { index: 1, of: 1 };

    /// Whether the `n`-th unit of work is its.
    fn has(self, n: usize) -> bool {
        n as u64 % u64::from(self.of) == u64::from(self.index) - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match numbers {
            Some((index, of)) if 1 <= index && index <= of => Ok(Self { index, of }),
            _ => Err("it has the form i/n, with i from 1 to n, as 2/4".to_owned()),
        }
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

/// What a cell takes and when it is enough.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Task {
    /// Seed of the first run.
    pub first_seed: u64,
    /// Runs, at most.
    pub seeds: u64,
    /// When fewer are enough.
    pub stop: Option<Sprt>,
    /// Cores that a run keeps busy.
    pub cores: u32,
    /// Memory that it takes, MiB.
    pub memory: u64,
}

/// A run to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Its cell.
    pub cell: usize,
    /// Its seed.
    pub seed: u64,
    /// Tries before this one.
    pub tries: u32,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel passed.
    Passed,
    /// It failed.
    Failed,
    /// The bench failed; says nothing about the kernel.
    HarnessError,
}

/// Where one seed of one cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seed {
    Waiting { tries: u32 },
    Running { tries: u32 },
    Judged { failed: bool },
    GivenUp,
}

#[derive(Clone, Debug)]
struct Cell {
    task: Task,
    /// By seed; only those of this shard.
    seeds: BTreeMap<u64, Seed>,
}

impl Cell {
    fn decision(&self) -> Decision {
        let Some(rule) = self.task.stop else { return Decision::GoOn };
        let known = self.seeds.values().map_while(|seed| match seed {
            Seed::Judged { failed } => Some(Some(*failed)),
            Seed::GivenUp => Some(None),
            _ => None,
        });
        rule.decide(known.flatten())
    }

    fn running(&self) -> usize {
        self.seeds.values().filter(|seed| matches!(seed, Seed::Running { .. })).count()
    }

    fn started(&self) -> usize {
        self.seeds.values().filter(|seed| !matches!(seed, Seed::Waiting { tries: 0 })).count()
    }

    fn next(&self) -> Option<(u64, u32)> {
        if self.decision() != Decision::GoOn || self.task.stop.is_some() && self.running() > 0 {
            return None;
        }
        self.seeds.iter().find_map(|(&seed, state)| match state {
            Seed::Waiting { tries } => Some((seed, *tries)),
            _ => None,
        })
    }
}

/// What is done and what is to do.
#[derive(Clone, Debug)]
pub struct Schedule {
    cells: Vec<Cell>,
    retries: u32,
    cores: u32,
    memory: u64,
}

impl Schedule {
    /// For these cells, on a machine of so many cores and MiB. Shards are dealt runs, and cells with a stopping rule as a
    /// whole, since a decision needs all runs before it.
    #[must_use]
    pub fn new(tasks: &[Task], shard: Shard, retries: u32, cores: u32, memory: u64) -> Self {
        let mut dealt = 0;
        let mut deal = || {
            dealt += 1;
            shard.has(dealt - 1)
        };
        let cell = |task: &Task| {
            let seeds = task.first_seed..task.first_seed + task.seeds;
            let waiting = |seed| (seed, Seed::Waiting { tries: 0 });
            let seeds = if task.stop.is_some() {
                seeds
                    .filter({
                        let ours = deal();
                        move |_| ours
                    })
                    .map(waiting)
                    .collect()
            } else {
                seeds.filter(|_| deal()).map(waiting).collect()
            };
            Cell { task: *task, seeds }
        };
        Self { cells: tasks.iter().map(cell).collect(), retries, cores, memory }
    }

    /// Whether this run is a part of the schedule that nobody has judged yet.
    #[must_use]
    pub fn wants(&self, cell: usize, seed: u64) -> bool {
        self.cells.get(cell).is_some_and(|cell| matches!(cell.seeds.get(&seed), Some(Seed::Waiting { .. })))
    }

    /// Seeds of a cell that are in this shard.
    pub fn seeds(&self, cell: usize) -> impl Iterator<Item = u64> {
        self.cells.get(cell).into_iter().flat_map(|cell| cell.seeds.keys().copied())
    }

    /// The next run to start, if there is one that fits beside those under way; it counts as started.
    pub fn start(&mut self) -> Option<Job> {
        let busy = |of: fn(&Task) -> u64| -> u64 {
            self.cells.iter().map(|cell| cell.running() as u64 * of(&cell.task)).sum()
        };
        let (cores, memory) = (busy(|task| task.cores.into()), busy(|task| task.memory));
        let idle = cores == 0;
        let fits = |task: &Task| {
            // A run that is too large for the machine runs alone.
            idle || (cores + u64::from(task.cores) <= u64::from(self.cores)
                && memory + task.memory <= self.memory)
        };
        let candidates = self.cells.iter().enumerate().filter(|(_, cell)| fits(&cell.task));
        let open = candidates.filter_map(|(index, cell)| Some((cell.started(), index, cell.next()?)));
        let (_, cell, (seed, tries)) = open.min_by_key(|&(started, index, _)| (started, index))?;
        self.set(cell, seed, Seed::Running { tries });
        Some(Job { cell, seed, tries })
    }

    fn set(&mut self, cell: usize, seed: u64, state: Seed) {
        if let Some(slot) = self.cells.get_mut(cell).and_then(|cell| cell.seeds.get_mut(&seed)) {
            *slot = state;
        }
    }

    /// A run ended. A harness error is tried again, so often.
    pub fn finish(&mut self, job: Job, outcome: Outcome) {
        let tries = job.tries + 1;
        let state = match outcome {
            Outcome::Passed => Seed::Judged { failed: false },
            Outcome::Failed => Seed::Judged { failed: true },
            Outcome::HarnessError if tries <= self.retries => Seed::Waiting { tries },
            Outcome::HarnessError => Seed::GivenUp,
        };
        self.set(job.cell, job.seed, state);
    }

    /// A run was done before: by this matrix before it was interrupted.
    pub fn was_done(&mut self, cell: usize, seed: u64, failed: bool) {
        self.set(cell, seed, Seed::Judged { failed });
    }

    /// Runs that are judged or given up, and runs that there will be at most.
    #[must_use]
    pub fn progress(&self) -> (usize, usize) {
        let (mut done, mut all) = (0, 0);
        for cell in &self.cells {
            let ended =
                cell.seeds.values().filter(|s| matches!(s, Seed::Judged { .. } | Seed::GivenUp)).count();
            let decided = cell.decision() != Decision::GoOn;
            done += ended;
            all += if decided { ended + cell.running() } else { cell.seeds.len() };
        }
        (done, all)
    }

    /// Runs that were given up.
    #[must_use]
    pub fn given_up(&self) -> usize {
        self.cells.iter().flat_map(|cell| cell.seeds.values()).filter(|s| **s == Seed::GivenUp).count()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn task(seeds: u64, cores: u32) -> Task {
        Task { first_seed: 1, seeds, stop: None, cores, memory: 1024 }
    }

    fn sequential(seeds: u64) -> Task {
        Task { stop: Some(Sprt::default()), ..task(seeds, 1) }
    }

    /// Runs everything, two cores, in the order in which it is started; `ends` says how each run ends.
    fn run(schedule: &mut Schedule, mut ends: impl FnMut(Job) -> Outcome) -> Vec<(usize, u64)> {
        let mut order = Vec::new();
        let mut under_way = std::collections::VecDeque::new();
        loop {
            while let Some(job) = schedule.start() {
                order.push((job.cell, job.seed));
                under_way.push_back(job);
            }
            let Some(job) = under_way.pop_front() else { return order };
            let outcome = ends(job);
            schedule.finish(job, outcome);
        }
    }

    #[test]
    fn cells_take_turns() {
        let mut schedule = Schedule::new(&[task(3, 1), task(2, 1)], Shard::WHOLE, 0, 2, 99_999);
        let order = run(&mut schedule, |_| Outcome::Passed);
        assert_eq!(order, [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]);
        assert_eq!(schedule.progress(), (5, 5));
    }

    #[test]
    fn cores_and_memory_are_not_given_out_twice() {
        let mut schedule = Schedule::new(&[task(2, 1), task(1, 2)], Shard::WHOLE, 0, 2, 99_999);
        let one = schedule.start().expect("a run");
        // The large one does not fit beside it, the small one does.
        assert_eq!(schedule.start().map(|job| (job.cell, job.seed)), Some((0, 2)));
        assert_eq!(schedule.start(), None);
        schedule.finish(one, Outcome::Passed);
        assert_eq!(schedule.start(), None);
        schedule.finish(Job { cell: 0, seed: 2, tries: 0 }, Outcome::Passed);
        assert_eq!(schedule.start().map(|job| job.cell), Some(1));
        let mut small = Schedule::new(&[task(2, 1)], Shard::WHOLE, 0, 8, 1500);
        assert!(small.start().is_some() && small.start().is_none());
        let mut large = Schedule::new(&[task(1, 64)], Shard::WHOLE, 0, 2, 1);
        assert!(large.start().is_some());
    }

    #[test]
    fn harness_errors_are_tried_again_and_then_given_up() {
        let mut schedule = Schedule::new(&[task(2, 1)], Shard::WHOLE, 2, 1, 99_999);
        let order =
            run(&mut schedule, |job| if job.seed == 1 { Outcome::HarnessError } else { Outcome::Failed });
        assert_eq!(order.iter().filter(|(_, seed)| *seed == 1).count(), 3);
        assert_eq!((schedule.given_up(), schedule.progress()), (1, (2, 2)));
    }

    #[test]
    fn a_clear_cell_stops_early() {
        let mut schedule = Schedule::new(&[sequential(20), sequential(20)], Shard::WHOLE, 0, 2, 99_999);
        let order = run(&mut schedule, |job| if job.cell == 0 { Outcome::Failed } else { Outcome::Passed });
        let runs = |cell| order.iter().filter(|(c, _)| *c == cell).count();
        assert_eq!((runs(0), runs(1)), (2, 5));
        assert_eq!(schedule.progress(), (7, 7));
    }

    #[test]
    fn shards_parse() {
        assert_eq!("2/4".parse(), Ok(Shard { index: 2, of: 4 }));
        for bad in ["0/4", "5/4", "1", "a/b", "1/0"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn shards_share_out_every_run_once(
            sizes in prop::collection::vec((1..6_u64, any::<bool>()), 1..6),
            of in 1..5_u32,
        ) {
            let tasks: Vec<_> =
                sizes.iter().map(|&(n, stop)| if stop { sequential(n) } else { task(n, 1) }).collect();
            let mut all = Vec::new();
            for index in 1..=of {
                let schedule = Schedule::new(&tasks, Shard { index, of }, 0, 1, 1);
                for cell in 0..tasks.len() {
                    all.extend(schedule.seeds(cell).map(|seed| (cell, seed)));
                }
            }
            all.sort_unstable();
            let wanted: Vec<_> =
                sizes.iter().enumerate().flat_map(|(c, &(n, _))| (1..=n).map(move |s| (c, s))).collect();
            prop_assert_eq!(all, wanted);
        }

        #[test]
        fn an_interrupted_matrix_ends_as_an_uninterrupted_one(
            fails in prop::collection::vec(any::<bool>(), 12),
            cut in 0..20_usize,
        ) {
            let tasks = [sequential(12), task(4, 2), sequential(6)];
            let ends = |job: Job| {
                if fails[(job.seed as usize + job.cell) % 12] { Outcome::Failed } else { Outcome::Passed }
            };
            let new = || Schedule::new(&tasks, Shard::WHOLE, 1, 2, 99_999);
            let mut whole: Vec<_> = run(&mut new(), ends);
            // What was judged before the cut is known again; what was under way is not.
            let mut first = new();
            let mut known = Vec::new();
            for _ in 0..cut {
                let Some(job) = first.start() else { break };
                first.finish(job, ends(job));
                known.push(job);
            }
            let mut second = new();
            for job in &known {
                second.was_done(job.cell, job.seed, ends(*job) == Outcome::Failed);
            }
            let mut resumed: Vec<_> = known.iter().map(|job| (job.cell, job.seed)).collect();
            resumed.extend(run(&mut second, ends));
            whole.sort_unstable();
            resumed.sort_unstable();
            prop_assert_eq!(resumed, whole);
        }
    }
}

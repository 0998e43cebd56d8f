//! Does what the schedule says: builds first, then runs, several at once.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::show::task;
use super::state::State;
use crate::build::{BuildError, Builder, Image, Request};
use crate::cli::{Context, Error, MachineArgs, Verbosity};
use crate::commands::prepare::Programs;
use crate::commands::storm::runner::{Bench, Runner, Wish, configure};
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;
use crate::matrix::{CellSpec, Job, Mode, Outcome, Plan, Schedule, Shard};
use crate::records::Union;
use crate::vm::command::QemuProgram;

/// Harness errors one after another, of whatever cells, after which the bench is not worth going on with.
const GIVE_UP: u32 = 6;
/// Host memory that a machine takes beside the guest's and the GPUs', MiB: QEMU's translations, and the device.
const OVERHEAD: u64 = 512;

/// A plan under way.
#[derive(Debug)]
pub(super) struct Execution<'a> {
    ctx: &'a Context,
    cells: &'a [CellSpec],
    runners: Vec<Runner<'a>>,
    schedule: Schedule,
    state: State,
}

impl<'a> Execution<'a> {
    /// Builds everything that the plan needs, each kernel once, and finds out what is done already. Runs get the quiet one
    /// of the two contexts.
    pub(super) fn new(
        plan: &Plan,
        cells: &'a [CellSpec],
        shard: Shard,
        jobs: Option<u32>,
        state: State,
        (ctx, quiet): (&'a Context, &'a Context),
    ) -> Result<Self, Error> {
        let programs = build(cells, ctx).map_err(BuildError::into_cli)?;
        let mut benches: BTreeMap<Request, Arc<Bench>> = BTreeMap::new();
        let mut runners = Vec::new();
        for cell in cells {
            let kernel = cell.request();
            let parameters: Vec<_> = cell.parameters.clone().into_iter().collect();
            let wish = Wish {
                scenario: &cell.scenario,
                control: cell.control.as_deref(),
                parameters: &parameters,
                seed: cell.first_seed,
            };
            let programs = || {
                let found = programs.get(&kernel).cloned();
                found.ok_or_else(|| Error::harness(format!("nothing was built for {}", cell.name())))
            };
            let configured = configure(wish, &machine(cell), quiet, programs)?;
            let bench = match benches.get(&kernel) {
                Some(bench) => bench.clone(),
                None => {
                    let bench = Arc::new(Bench::new(&configured.prepared, quiet)?);
                    benches.insert(kernel, bench.clone());
                    bench
                }
            };
            let runner = Runner::new(configured, cell.expected.clone(), bench, quiet);
            runners.push(runner.in_group(&cell.group));
        }
        let host = thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let cores = jobs.unwrap_or(host);
        let tasks: Vec<_> =
            cells.iter().zip(&runners).map(|(cell, runner)| task(cell, cores, memory(runner))).collect();
        let mut schedule = Schedule::new(&tasks, shard, plan.retries, cores, memory_of_host());
        for (index, runner) in runners.iter().enumerate() {
            let seeds: Vec<u64> = schedule.seeds(index).collect();
            for seed in seeds {
                if let Some(record) = state.union.judged(&runner.id(seed)) {
                    schedule.was_done(index, seed, record.judgement.verdict != Verdict::Pass);
                }
            }
        }
        let (done, all) = schedule.progress();
        let torn = if state.torn > 0 { "; a torn record was cut off" } else { "" };
        ctx.note(format_args!(
            "{}: {} cells, {all} runs at most, {done} of them done before{torn}; {cores} cores; {}",
            plan.name,
            cells.len(),
            state.dir.display()
        ));
        Ok(Self { ctx, cells, runners, schedule, state })
    }

    /// Runs everything that is left, and gives all records. What is under way when the user asks to stop is ended; what is
    /// done is kept.
    pub(super) fn run(self) -> Result<Union, Error> {
        let Self { ctx, cells, runners, mut schedule, mut state } = self;
        let mut display = Display::new(ctx);
        let (sender, ended) = mpsc::channel();
        let (mut failure, mut under_way, mut failing) = (None, 0, 0);
        thread::scope(|scope| {
            loop {
                while failure.is_none()
                    && !ctx.interrupt.is_raised()
                    && let Some(job) = schedule.start()
                {
                    let folder = folder(&state.dir, cells, job);
                    let (runner, sender) = (&runners[job.cell], sender.clone());
                    under_way += 1;
                    scope.spawn(move || {
                        let run = || runner.run(job.seed, &folder, |_| ());
                        let result = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
                            Err(Error::harness(format!(
                                "a run panicked; its logs are in {}",
                                folder.display()
                            )))
                        });
                        // The other end lives until every run has sent.
                        let _sent = sender.send((job, folder, result));
                    });
                }
                display.at(schedule.progress(), under_way);
                if under_way == 0 {
                    break;
                }
                let Ok((job, folder, result)) = ended.recv() else { break };
                under_way -= 1;
                let kept = result.and_then(|record| {
                    let outcome = outcome(&record);
                    failing = if outcome == Outcome::HarnessError { failing + 1 } else { 0 };
                    schedule.finish(job, outcome);
                    display.ended(&cells[job.cell], &record, schedule.progress());
                    let why = record.judgement.reason.clone();
                    state.keep(record, &folder)?;
                    if failing >= GIVE_UP {
                        return Err(Error::harness(format!(
                            "{GIVE_UP} runs in a row failed in the bench itself; the last one: {why}"
                        )));
                    }
                    Ok(())
                });
                if let Err(error) = kept {
                    failure.get_or_insert(error);
                }
            }
        });
        drop(display);
        match failure {
            Some(error) => Err(error),
            None if ctx.interrupt.is_raised() => Err(Error::Interrupted),
            None => Ok(state.union),
        }
    }
}

fn outcome(record: &Record) -> Outcome {
    match record.judgement.verdict {
        Verdict::Pass => Outcome::Passed,
        // A plan may ask for one, as a check of the bench.
        Verdict::HarnessError if record.as_expected => Outcome::Failed,
        Verdict::HarnessError => Outcome::HarnessError,
        _ => Outcome::Failed,
    }
}

/// Fetches and builds all that the cells need, those of one kernel after each other: they share its objects.
fn build(cells: &[CellSpec], ctx: &Context) -> Result<BTreeMap<Request, Programs>, BuildError> {
    let builder = Builder::new(ctx)?;
    let qemu = builder.qemu()?;
    let qemu = QemuProgram { program: qemu.program, leading_args: qemu.leading_args };
    let device = builder.device()?;
    let wanted: BTreeMap<Request, &CellSpec> = cells.iter().map(|cell| (cell.request(), cell)).collect();
    let count = wanted.len();
    let mut built = BTreeMap::new();
    for (number, (request, cell)) in wanted.into_iter().enumerate() {
        ctx.note(format_args!("kernel {} of {count}: {} {}", number + 1, cell.kernel, cell.variant));
        let image = Image::load(&builder.prepare(&request)?)?;
        built.insert(request, Programs { image, qemu: qemu.clone(), device: device.clone() });
    }
    Ok(built)
}

fn machine(cell: &CellSpec) -> MachineArgs {
    MachineArgs {
        cpus: Some(cell.cpus),
        memory: cell.memory,
        gpus: cell.gpus,
        vram: cell.vram,
        preempt: Some(cell.preempt),
        deterministic: cell.mode == Mode::Deterministic,
        append: cell.append.clone(),
        chaos: cell.chaos.clone(),
        ..MachineArgs::default()
    }
}

/// Memory that a run takes, MiB.
fn memory(runner: &Runner<'_>) -> u64 {
    let profile = &runner.prepared().boot.spec.profile;
    let vram = profile.vram.bytes() * u64::from(profile.gpus);
    ((profile.memory.bytes() + vram) >> 20) + OVERHEAD
}

/// Memory that all runs together may take, MiB: what the host has, less a fifth for everything else.
fn memory_of_host() -> u64 {
    let bytes = rustix::system::sysinfo();
    let total = (bytes.totalram as u64).saturating_mul(u64::from(bytes.mem_unit)) >> 20;
    total - total / 5
}

/// A folder for a run's logs that no run before has had.
fn folder(dir: &Path, cells: &[CellSpec], job: Job) -> PathBuf {
    let cell = &cells[job.cell];
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
    let control = cell.control.iter().map(|control| format!("-{control}")).collect::<String>();
    let name = format!(
        "{:03}-{}{control}-{}-{}-{}cpus-{}",
        job.cell, cell.scenario, cell.variant, cell.preempt, cell.cpus, cell.mode
    );
    let parent = dir.join("runs").join(name.chars().map(plain).collect::<String>());
    let nth = |n: u32| match n {
        1 => parent.join(format!("seed-{}", job.seed)),
        n => parent.join(format!("seed-{}-again-{n}", job.seed)),
    };
    (1..).map(nth).find(|path| !path.exists()).unwrap_or(parent)
}

/// Progress: a moving line on a terminal, a line a run elsewhere.
#[derive(Debug)]
struct Display<'a> {
    ctx: &'a Context,
    bar: Option<ProgressBar>,
}

impl<'a> Display<'a> {
    fn new(ctx: &'a Context) -> Self {
        let terminal = std::io::stderr().is_terminal() && ctx.verbosity >= Verbosity::Normal;
        let bar = terminal.then(|| {
            let bar = ProgressBar::no_length();
            let template = "{elapsed_precise} {bar:30} {pos}/{len} runs, {eta} left; {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        Self { ctx, bar }
    }

    fn at(&mut self, (done, all): (usize, usize), under_way: usize) {
        if let Some(bar) = &self.bar {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(format!("{under_way} under way"));
        }
    }

    fn ended(&mut self, cell: &CellSpec, record: &Record, (done, all): (usize, usize)) {
        let mark = if record.as_expected { "" } else { " (unexpected)" };
        let seconds = Duration::from_millis(record.timings.total_ms).as_secs_f64();
        let verdict = record.judgement.verdict;
        let line = format!(
            "[{done}/{all}] {verdict}{mark} after {seconds:.1} s: {} seed {}",
            cell.name(),
            record.run.seed
        );
        match &self.bar {
            Some(bar) => bar.println(line),
            None => self.ctx.note(line),
        }
    }
}

impl Drop for Display<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::expand;

    #[test]
    fn no_run_takes_the_folder_of_another() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let plan = Plan::load(&repo.join("ci/plans/small.toml")).expect("a plan");
        let cells = expand(&plan, &repo.join("storm/scenarios"), "6.19.6").expect("cells");
        let dir = tempfile::tempdir().expect("a folder");
        let job = Job { cell: 0, seed: 3, tries: 0 };
        let first = folder(dir.path(), &cells, job);
        std::fs::create_dir_all(&first).expect("made");
        let second = folder(dir.path(), &cells, job);
        assert!(first != second && second.starts_with(first.parent().expect("a parent")));
        assert!(
            !folder(dir.path(), &cells, Job { cell: 1, ..job }).starts_with(first.parent().expect("one"))
        );
    }
}

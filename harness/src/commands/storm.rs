//! `hmmstorm storm`: runs a scenario on a kernel, once a seed, and judges each run.

mod show;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::prepare::{Prepared, prepare};
use crate::build::Builder;
use crate::cli::{Context, Error, ImageArgs, MachineArgs, Outcome, Preempt};
use crate::judge::cycle::Cycle;
use crate::judge::record::{self, Provenance, Record, Run, Timings, Totals};
use crate::judge::sampler::Sampler;
use crate::judge::scenario::{self, Control, Scenario};
use crate::judge::structures::{self, Reader, Structures};
use crate::judge::symbols::Symbols;
use crate::judge::verdict::{Judge, Limits, Verdict};
use crate::vm::command::QemuProgram;
use crate::vm::{self, Guest, Machine, RunFolder, ram};
use show::{Progress, Summary};
use watch::{Seen, Watcher};

/// Harness errors in a row after which no further seed is tried.
const GIVE_UP: usize = 2;

/// Options of `hmmstorm storm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Scenario to run (`hmmstorm list scenarios`)
    scenario: String,
    /// Control of the scenario: a run with one condition of the bug removed, which must pass
    #[arg(long, value_name = "NAME")]
    control: Option<String>,
    /// Parameter of the scenario; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    param: Vec<(String, String)>,
    /// Seed of the first run; each further run takes the next one
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Number of runs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    runs: u64,
    /// Verdict that counts as success [default: pass, or the control's]
    #[arg(long, value_name = "VERDICT", value_enum)]
    expect: Option<Verdict>,
    /// Write all records and the summary to this file, after every run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Folder that gets a folder for each run [default: a new one in the cache]
    #[arg(long, value_name = "DIR", conflicts_with = "folder")]
    out: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it has the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// All that the runs of one command share.
struct Storm<'a> {
    ctx: &'a Context,
    prepared: Prepared,
    scenario: Scenario,
    control: Option<Control>,
    expected: Verdict,
    symbols: Symbols,
    image: serde_json::Value,
    binaries: BTreeMap<String, String>,
    commit: Option<String>,
    qemu_version: Option<String>,
    reader: Option<Reader>,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let scenario = Scenario::load(&ctx.repo.join("storm/scenarios"), &args.scenario).map_err(usage)?;
    let control =
        args.control.as_deref().map(|name| scenario.control(name)).transpose().map_err(usage)?.cloned();
    let parameters = scenario.parameters(control.as_ref(), &args.param).map_err(usage)?;
    let mut machine = args.machine.clone();
    if let Some(preempt) = control.as_ref().and_then(|control| control.preempt) {
        // A control that changes the preemption model *is* that change.
        if machine.preempt.is_some_and(|asked| asked != preempt) {
            let name = control.as_ref().map(|control| control.name.as_str()).unwrap_or_default();
            return Err(Error::usage(format!(
                "control {name} boots with --preempt {preempt}: leave out --preempt"
            )));
        }
        machine.preempt = Some(preempt);
    }
    let guest = Guest::Run { scenario: scenario.name.clone(), seed: args.seed, parameters };
    let mut prepared = prepare(&args.image, &machine, guest, ctx)?;
    prepared.boot.spec.append.splice(0..0, scenario.command_line().iter().cloned());
    scenario.fits(prepared.boot.spec.profile.cpus, prepared.boot.spec.profile.gpus).map_err(usage)?;
    if machine.dry_run {
        print!("{}", prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let expected = args.expect.or(control.as_ref().map(|control| control.expect)).unwrap_or(Verdict::Pass);
    let out = folder(args.out.or(machine.folder), ctx)?;
    let storm = Storm::new(prepared, scenario, control, expected, ctx)?;
    storm.announce(args.runs, &out);

    let mut records = Vec::new();
    let mut failures = 0;
    for index in 0..args.runs {
        let seed = args.seed.wrapping_add(index);
        let record = match storm.run(seed, &out.join(format!("{index:04}-seed-{seed}"))) {
            Ok(record) => record,
            Err(error) => {
                // What is done is done, and is told.
                if !records.is_empty() {
                    println!("{}", Summary::of(&records, args.runs));
                }
                return Err(error);
            }
        };
        failures = if record.judgement.verdict == Verdict::HarnessError { failures + 1 } else { 0 };
        records.push(record);
        let summary = Summary::of(&records, args.runs);
        if let Some(file) = &args.json {
            record::write_json(file, &serde_json::json!({ "summary": summary, "runs": records }))?;
        }
        if failures >= GIVE_UP && expected != Verdict::HarnessError {
            break;
        }
    }
    let summary = Summary::of(&records, args.runs);
    if args.runs > 1 {
        println!("{summary}");
    }
    if summary.harness_errors > 0 {
        let last = records.iter().rev().find(|record| record.judgement.verdict == Verdict::HarnessError);
        let why = last.map(|record| record.judgement.reason.as_str()).unwrap_or_default();
        return Err(Error::harness(format!(
            "{} of {} runs failed in the bench itself; the last one: {why}",
            summary.harness_errors,
            records.len()
        )));
    }
    let all = records.iter().all(|record| record.as_expected);
    Ok(if all { Outcome::Pass } else { Outcome::Problem })
}

fn usage(error: scenario::Error) -> Error {
    if error.is_usage() { Error::usage(error.to_string()) } else { error.into() }
}

/// The folder of all runs.
fn folder(asked: Option<PathBuf>, ctx: &Context) -> Result<PathBuf, Error> {
    let dir = asked.unwrap_or_else(|| {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        ctx.cache.join("runs").join(format!("{seconds}-{}-storm", process::id()))
    });
    std::fs::create_dir_all(&dir)
        .map_err(|error| Error::harness(format!("cannot make the folder {}: {error}", dir.display())))?;
    Ok(std::path::absolute(dir)?)
}

impl<'a> Storm<'a> {
    fn new(
        prepared: Prepared,
        scenario: Scenario,
        control: Option<Control>,
        expected: Verdict,
        ctx: &'a Context,
    ) -> Result<Self, Error> {
        let symbols = Symbols::from_vmlinux(&prepared.image.vmlinux)?;
        let files = [
            ("kernel", &prepared.boot.files.kernel),
            ("initramfs", &prepared.boot.files.initramfs),
            ("qemu", &prepared.boot.qemu.program),
            ("device", &prepared.boot.device),
        ];
        let mut binaries = BTreeMap::new();
        for (role, path) in files {
            // A program that is found by PATH has no file to hash here.
            if path.is_file() {
                binaries.insert(role.to_owned(), record::hash(path)?.sha256);
            }
        }
        let image = serde_json::to_value(&prepared.image.provenance)?;
        let commit = commit(&ctx.repo);
        let qemu_version = version(&prepared.boot.qemu);
        let reader = Builder::new(ctx).and_then(|builder| builder.drgn());
        let reader =
            reader.inspect_err(|error| ctx.detail(format_args!("no cycle from memory: {error}"))).ok();
        Ok(Self {
            ctx,
            prepared,
            scenario,
            control,
            expected,
            symbols,
            image,
            binaries,
            commit,
            qemu_version,
            reader,
        })
    }

    fn announce(&self, runs: u64, out: &Path) {
        let spec = &self.prepared.boot.spec;
        let provenance = &self.prepared.image.provenance;
        let control =
            self.control.as_ref().map_or(String::new(), |control| format!(", control {}", control.name));
        self.ctx.note(format_args!(
            "{}{control} on {} {}, preempt={}, {} CPUs, {} {}; {runs} run(s) to {}",
            self.scenario.name,
            provenance.kernel_version,
            provenance.variant,
            spec.preempt(),
            spec.profile.cpus,
            spec.engine.name(),
            self.mode(),
            out.display()
        ));
        let known: &[Preempt] = self.scenario.preempt();
        if self.control.is_none() && !known.contains(&spec.preempt()) {
            self.ctx.note(format_args!(
                "note: {} is not known to show anything under preempt={}",
                self.scenario.name,
                spec.preempt()
            ));
        }
    }

    fn mode(&self) -> &'static str {
        if self.prepared.boot.spec.deterministic() { "deterministic" } else { "real-time" }
    }

    fn limits(&self) -> Limits {
        let spec = &self.prepared.boot.spec;
        let (limits, detectors) = (&spec.profile.limits, &spec.profile.detectors);
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        let no_progress = self.scenario.no_progress();
        // A soft lockup is reported 2 to 2.8 thresholds after its beginning (kernel/watchdog.c), a hung task within its
        // timeout and one check; the printing takes its time too.
        let slowest = seconds(3 * detectors.soft_lockup)
            .max(seconds(detectors.hung_task + detectors.hung_task_interval));
        let waited = slowest + Duration::from_secs(2);
        Limits {
            no_progress,
            hello: seconds(limits.hello),
            start: seconds(limits.bound),
            run: seconds(limits.run),
            hard_stop: (no_progress * 10).max(waited * 2),
            detectors: waited,
            starvation: None,
            least_rate: None,
            guest_time_only: spec.deterministic(),
        }
    }

    /// One run, to its record, which is in the folder and on stdout when this returns.
    fn run(&self, seed: u64, dir: &Path) -> Result<Record, Error> {
        let folder = RunFolder::create(dir).map_err(|error| {
            Error::harness(format!("cannot make the run folder {}: {error}", dir.display()))
        })?;
        let mut prepared = self.prepared.clone();
        if let Guest::Run { seed: of_guest, .. } = &mut prepared.boot.spec.guest {
            *of_guest = seed;
        }
        let judge = Judge::new(self.limits());
        let sampler = Sampler::new(self.symbols.clone());
        let deterministic = prepared.boot.spec.deterministic();
        let watcher = Watcher::new(judge, sampler, &self.prepared.image.modules, deterministic);
        let mut progress = Progress::new(self.ctx, format!("seed {seed}"));
        let began = Instant::now();
        let mut structures = None;
        let seen = match prepared.start(folder.clone(), self.ctx) {
            Ok(mut machine) => {
                let seen = watcher.watch(&mut machine, |phase| progress.phase(phase))?;
                structures = self.structures(&seen, &mut machine);
                machine.stop();
                seen
            }
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(Error::Harness(error)) => match error.downcast::<vm::Error>() {
                Ok(error) if matches!(*error, vm::Error::Interrupted) => return Err(Error::Interrupted),
                Ok(error) => watcher.stillborn(&folder.console(), &error, began.elapsed()),
                Err(error) => return Err(Error::Harness(error)),
            },
            Err(error) => return Err(error),
        };
        drop(progress);
        let mut record = self.record(seed, &prepared, &folder, seen, began.elapsed())?;
        record.structures = structures;
        record::write_json(&folder.dir().join("verdict.json"), &record)?;
        print!("{}", show::run(&record, folder.dir()));
        Ok(record)
    }

    /// The cycle out of the guest's memory. A machine in deterministic mode has ended by itself when the verdict is
    /// certain, and takes its memory with it.
    fn structures(&self, seen: &Seen, machine: &mut Machine) -> Option<Structures> {
        let reader = self.reader.as_ref()?;
        if seen.judgement.verdict != Verdict::Livelock || self.prepared.boot.spec.deterministic() {
            return None;
        }
        let mut read = || -> Result<Structures, Box<dyn std::error::Error>> {
            machine.qmp().stop()?;
            let registers = machine.qmp().registers()?;
            let modules: Vec<&Path> = self.prepared.image.modules.values().map(PathBuf::as_path).collect();
            let guest = structures::Guest {
                memory: &ram::file(machine.qemu_id())?,
                segments: &ram::segments(self.prepared.boot.spec.profile.memory.bytes()),
                registers: &registers,
                vmlinux: &self.prepared.image.vmlinux,
                release: &self.prepared.image.provenance.kernel_version,
                modules: &modules,
            };
            let folder = machine.folder().dir();
            let structures = reader.read(&guest, folder)?;
            if let Some(picture) = structures::svg(&structures) {
                std::fs::write(folder.join("cycle.svg"), picture)?;
            }
            Ok(structures)
        };
        // It is evidence on top: without it the verdict is what it was.
        match read() {
            Ok(structures) => Some(structures),
            Err(error) => {
                self.ctx.note(format_args!("the cycle was not read from the guest's memory: {error}"));
                None
            }
        }
    }

    fn record(
        &self,
        seed: u64,
        prepared: &Prepared,
        folder: &RunFolder,
        seen: Seen,
        total: Duration,
    ) -> Result<Record, Error> {
        let Seen { judgement, verdict_at, judge, findings, device, driver, parameters, sampler } = seen;
        if judgement.verdict != Verdict::Pass && sampler.cpus() > 0 {
            record::write_samples(&folder.dir().join("samples.jsonl"), &sampler)?;
        }
        let spec = &prepared.boot.spec;
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let cycle = (judgement.verdict == Verdict::Livelock).then(|| {
            Cycle::name(
                &judgement.spinners,
                judge.summaries(),
                &judge.findings().cloned().collect::<Vec<_>>(),
                judge.workers(),
                judge.progress(),
            )
        });
        let asked = match &spec.guest {
            Guest::Run { parameters, .. } => parameters.clone(),
            Guest::Shell => BTreeMap::new(),
        };
        let [hello, bound, start, done] = judge.milestones().map(|at| at.map(milliseconds));
        let text = |path: PathBuf| std::fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned());
        let mut files = BTreeMap::new();
        for path in [folder.console(), folder.events()] {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            files.insert(name, record::hash(&path)?);
        }
        let run = Run {
            scenario: self.scenario.name.clone(),
            control: self.control.as_ref().map(|control| control.name.clone()),
            parameters: parameters.unwrap_or(asked),
            variant: prepared.image.provenance.variant.clone(),
            preempt: spec.preempt().to_string(),
            cpus: spec.profile.cpus,
            gpus: spec.profile.gpus,
            mode: self.mode().to_owned(),
            engine: spec.engine.name().to_owned(),
            profile: spec.profile_name.clone(),
            seed,
            chaos: spec.chaos.clone(),
        };
        let host = rustix::system::uname();
        let host = [host.sysname(), host.release(), host.version(), host.machine()]
            .map(|part| part.to_string_lossy().into_owned())
            .join(" ");
        Ok(Record {
            schema: record::SCHEMA,
            run,
            expected: self.expected,
            as_expected: judgement.verdict == self.expected,
            title: record::title(&judgement),
            identity: record::identity(&judgement, cycle.as_ref()),
            cycle,
            structures: None,
            progress: totals(&judge),
            device,
            driver,
            cpus: if judgement.verdict == Verdict::Pass { Vec::new() } else { judge.summaries().to_vec() },
            complaints: findings,
            timings: Timings {
                hello_ms: hello,
                bound_ms: bound,
                start_ms: start,
                done_ms: done,
                verdict_ms: milliseconds(verdict_at),
                total_ms: milliseconds(total),
                guest_elapsed_ms: judge.elapsed().map(milliseconds),
            },
            provenance: Provenance {
                image: self.image.clone(),
                binaries: self.binaries.clone(),
                qemu_version: self.qemu_version.clone(),
                harness_version: env!("CARGO_PKG_VERSION").to_owned(),
                harness_commit: self.commit.clone(),
                command_line: std::env::args().collect(),
                qemu_command_line: text(folder.qemu_command()).unwrap_or_default(),
                device_command_line: text(folder.device_command()),
                kernel_command_line: spec.kernel_command_line(),
                host,
            },
            files,
            judgement,
        })
    }
}

fn totals(judge: &Judge) -> Totals {
    let Some(progress) = judge.progress() else { return Totals::default() };
    Totals {
        round: progress.round,
        operations: progress.operations,
        faults: progress.faults,
        workers: judge.workers().iter().cloned().zip(progress.workers.iter().copied()).collect(),
    }
}

/// QEMU's version in its own words. Not by QMP: in deterministic mode a guest is not to be disturbed.
fn version(qemu: &QemuProgram) -> Option<String> {
    let output = Command::new(&qemu.program).args(&qemu.leading_args).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    output.status.success().then(|| text.lines().next().unwrap_or_default().trim().to_owned())
}

/// The commit that the source tree is at. A tree without git has none.
fn commit(repo: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git").arg("-C").arg(repo).args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let head = git(&["rev-parse", "HEAD"])?;
    let changes = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changes.is_empty() { head } else { format!("{head}-dirty") })
}

//! Runs one configuration of a scenario, seed by seed, each to its record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hmmstorm_abi::wire::event;

use super::watch::{Seen, Watcher};
use crate::build::Builder;
use crate::capsule::{self, Capsule};
use crate::cli::{Context, Error, MachineArgs, Preempt};
use crate::commands::prepare::{Prepared, Programs, prepare_with};
use crate::judge::cycle::Cycle;
use crate::judge::measures::Measures;
use crate::judge::record::{self, Provenance, Record, Run, Timings, Totals};
use crate::judge::sampler::Sampler;
use crate::judge::scenario::{self, Control, Scenario};
use crate::judge::structures::{self, Reader, Structures};
use crate::judge::symbols::Symbols;
use crate::judge::verdict::{Judge, Limits, Phase, SETTLE, Verdict};
use crate::records::id::run_id;
use crate::vm::command::QemuProgram;
use crate::vm::{self, Guest, Machine, RunFolder, Spec, ram};

/// A scenario set up for a kernel and a machine, with every wish checked.
#[derive(Clone, Debug)]
pub(crate) struct Configured {
    /// What boots.
    pub(crate) prepared: Prepared,
    /// The scenario.
    pub(crate) scenario: Scenario,
    /// Its control.
    pub(crate) control: Option<Control>,
}

/// What is asked for of a scenario.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// Its name.
    pub(crate) scenario: &'a str,
    /// Control of it.
    pub(crate) control: Option<&'a str>,
    /// Parameters that are to differ from their defaults.
    pub(crate) parameters: &'a [(String, String)],
    /// Seed of the first run.
    pub(crate) seed: u64,
}

/// Checks scenario, control and parameters against the machine; then asks for the programs to run them with.
pub(crate) fn configure(
    wish: Wish<'_>,
    machine: &MachineArgs,
    ctx: &Context,
    programs: impl FnOnce() -> Result<Programs, Error>,
) -> Result<Configured, Error> {
    let Wish { scenario, control, parameters, seed } = wish;
    let scenario = Scenario::load(&ctx.repo.join("storm/scenarios"), scenario).map_err(usage)?;
    let control = control.map(|name| scenario.control(name)).transpose().map_err(usage)?.cloned();
    let parameters = scenario.parameters(control.as_ref(), parameters).map_err(usage)?;
    let mut machine = machine.clone();
    if let Some((control, preempt)) = control.as_ref().and_then(|control| Some((control, control.preempt?))) {
        // A control that changes the preemption model *is* that change.
        if machine.preempt.is_some_and(|asked| asked != preempt) {
            let name = &control.name;
            return Err(Error::usage(format!(
                "control {name} boots with --preempt {preempt}: leave out --preempt"
            )));
        }
        machine.preempt = Some(preempt);
    }
    machine.vram = machine.vram.or(scenario.vram());
    machine.memory = machine.memory.or(scenario.memory());
    let guest = Guest::Run { scenario: scenario.name.clone(), seed, parameters };
    let mut prepared = prepare_with(&machine, guest, ctx, programs)?;
    prepared.boot.spec.append.splice(0..0, scenario.command_line().iter().cloned());
    if scenario.vfio() {
        prepared.boot.spec.give_gpus_to_vfio();
    }
    scenario.fits(prepared.boot.spec.profile.cpus, prepared.boot.spec.profile.gpus).map_err(usage)?;
    Ok(Configured { prepared, scenario, control })
}

/// The fault plans in force, as a record has them.
fn chaos(spec: &Spec) -> Option<String> {
    let late = spec.chaos_at_start.as_ref().and_then(|plan| serde_json::to_string(plan).ok());
    let late = late.map(|plan| format!("at-start:{plan}"));
    spec.chaos.iter().cloned().chain(late).reduce(|plans, late| format!("{plans} {late}"))
}

pub(crate) fn usage(error: scenario::Error) -> Error {
    if error.is_usage() { Error::usage(error.to_string()) } else { error.into() }
}

/// What all runs of one image share.
#[derive(Debug)]
pub(crate) struct Bench {
    symbols: Symbols,
    image: serde_json::Value,
    binaries: BTreeMap<String, String>,
    commit: Option<String>,
    qemu_version: Option<String>,
    reader: Option<Reader>,
}

impl Bench {
    /// For the image, QEMU and device of `prepared`.
    pub(crate) fn new(prepared: &Prepared, ctx: &Context) -> Result<Self, Error> {
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
        let reader = Builder::new(ctx).and_then(|builder| builder.drgn());
        let reader =
            reader.inspect_err(|error| ctx.detail(format_args!("no cycle from memory: {error}"))).ok();
        Ok(Self {
            symbols: Symbols::from_vmlinux(&prepared.image.vmlinux)?,
            image: serde_json::to_value(&prepared.image.provenance)?,
            binaries,
            commit: commit(&ctx.repo),
            qemu_version: version(&prepared.boot.qemu),
            reader,
        })
    }
}

/// All that the runs of one configuration share.
#[derive(Debug)]
pub(crate) struct Runner<'a> {
    ctx: &'a Context,
    prepared: Prepared,
    scenario: Scenario,
    control: Option<Control>,
    expected: Vec<Verdict>,
    bench: Arc<Bench>,
    /// Group of a plan that asks for the runs.
    group: Option<String>,
    /// CPUs are sampled all the time, and the samples kept.
    profiling: bool,
}

impl<'a> Runner<'a> {
    /// Without any `expected` verdict, the control's or `pass` is.
    pub(crate) fn new(
        configured: Configured,
        mut expected: Vec<Verdict>,
        bench: Arc<Bench>,
        ctx: &'a Context,
    ) -> Self {
        let Configured { prepared, scenario, control } = configured;
        if expected.is_empty() {
            expected.push(control.as_ref().map_or(Verdict::Pass, |control| control.expect));
        }
        Self { ctx, prepared, scenario, control, expected, bench, group: None, profiling: false }
    }

    /// The same for a group of a plan, which its records will name.
    pub(crate) fn in_group(self, group: &str) -> Self {
        Self { group: Some(group.to_owned()), ..self }
    }

    /// The same, with the CPUs sampled all the time and the samples kept, if `profiling`.
    pub(crate) fn profiling(self, profiling: bool) -> Self {
        Self { profiling, ..self }
    }

    /// The same, speaking and being interrupted as another context says.
    pub(crate) fn with_context(self, ctx: &'a Context) -> Self {
        Self { ctx, ..self }
    }

    /// Verdicts that are as expected.
    pub(crate) fn expected(&self) -> &[Verdict] {
        &self.expected
    }

    /// The machine that it runs in.
    pub(crate) fn prepared(&self) -> &Prepared {
        &self.prepared
    }

    /// Id of the run with this seed, before there is one.
    pub(crate) fn id(&self, seed: u64) -> String {
        let (run, provenance) = self.definition(seed, &self.prepared);
        run_id(&run, &provenance)
    }

    /// What defines the run with this seed: all of [`Run`], and of its provenance what is known beforehand.
    pub(crate) fn definition(&self, seed: u64, prepared: &Prepared) -> (Run, Provenance) {
        let spec = &prepared.boot.spec;
        let set = match &spec.guest {
            Guest::Run { parameters, .. } => parameters.clone(),
            Guest::Shell => BTreeMap::new(),
        };
        let run = Run {
            scenario: self.scenario.name.clone(),
            control: self.control.as_ref().map(|control| control.name.clone()),
            parameters: self.scenario.in_force(&set),
            variant: prepared.image.provenance.variant.clone(),
            preempt: spec.preempt().to_string(),
            cpus: spec.profile.cpus,
            gpus: spec.profile.gpus,
            mode: self.mode().to_owned(),
            engine: spec.engine.name().to_owned(),
            profile: spec.profile_name.clone(),
            seed,
            chaos: chaos(spec),
            memory: spec.profile.memory.to_string(),
            vram: spec.profile.vram.to_string(),
            append: spec.append.clone(),
        };
        let host = rustix::system::uname();
        let host = [host.sysname(), host.release(), host.version(), host.machine()]
            .map(|part| part.to_string_lossy().into_owned())
            .join(" ");
        let provenance = Provenance {
            image: self.bench.image.clone(),
            binaries: self.bench.binaries.clone(),
            qemu_version: self.bench.qemu_version.clone(),
            harness_version: env!("CARGO_PKG_VERSION").to_owned(),
            harness_commit: self.bench.commit.clone(),
            command_line: std::env::args().collect(),
            qemu_command_line: String::new(),
            device_command_line: None,
            kernel_command_line: spec.kernel_command_line(),
            host,
        };
        (run, provenance)
    }

    /// The kernel under test, for people.
    pub(crate) fn kernel(&self) -> String {
        let provenance = &self.prepared.image.provenance;
        format!("{} {} ({})", provenance.kernel_version, provenance.variant, provenance.flavour)
    }

    pub(crate) fn announce(&self, runs: u64, out: &Path) {
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
            run: self.scenario.run_limit().unwrap_or(seconds(limits.run)),
            hard_stop: (no_progress * 10).max(waited * 2),
            detectors: waited,
            starvation: self.scenario.starvation(),
            least_rate: None,
            after_complaint: self.scenario.after_complaint().unwrap_or(SETTLE),
            guest_time_only: spec.deterministic(),
        }
    }

    /// One run, to its record, which is in the folder when this returns. `progress` is called at every look.
    pub(crate) fn run(&self, seed: u64, dir: &Path, progress: impl FnMut(Phase)) -> Result<Record, Error> {
        self.run_listening(seed, dir, progress, |_| ())
    }

    /// The same; `listen` hears every record of the guest's storm.
    pub(crate) fn run_listening(
        &self,
        seed: u64,
        dir: &Path,
        progress: impl FnMut(Phase),
        listen: impl FnMut(&event::Record),
    ) -> Result<Record, Error> {
        let folder = RunFolder::create(dir).map_err(|error| {
            Error::harness(format!("cannot make the run folder {}: {error}", dir.display()))
        })?;
        let mut prepared = self.prepared.clone();
        if let Guest::Run { seed: of_guest, .. } = &mut prepared.boot.spec.guest {
            *of_guest = seed;
        }
        let judge = Judge::new(self.limits());
        let sampler = Sampler::new(self.bench.symbols.clone());
        let deterministic = prepared.boot.spec.deterministic();
        let watcher = Watcher::new(judge, sampler, &self.prepared.image.modules, deterministic);
        let watcher =
            watcher.chaos_at_start(prepared.boot.spec.chaos_at_start.clone()).profiling(self.profiling);
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let began = Instant::now();
        let mut structures = None;
        let seen = match prepared.start(folder.clone(), self.ctx) {
            Ok(mut machine) => {
                let seen = watcher.watch(&mut machine, progress, listen)?;
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
        let mut record = self.record(seed, &prepared, &folder, seen, began.elapsed())?;
        record.began = since_1970;
        // After the finding has its identity, which is to be the same where nobody can read the memory.
        if let Some((cycle, structures)) = record.cycle.as_mut().zip(structures.as_ref()) {
            cycle.complete(structures);
        }
        record.structures = structures;
        record::write_json(&folder.dir().join("verdict.json"), &record)?;
        if record.identity.is_some() {
            let saved = Capsule::of(&record, &prepared.image, folder.dir())
                .and_then(|capsule| capsule.save(&folder.dir().join(capsule::FILE)));
            if let Err(error) = saved {
                self.ctx.note(format_args!("no capsule was made: {error}"));
            }
        }
        Ok(record)
    }

    /// The cycle out of the guest's memory. A machine in deterministic mode has ended by itself when the verdict is
    /// certain, and takes its memory with it.
    fn structures(&self, seen: &Seen, machine: &mut Machine) -> Option<Structures> {
        let reader = self.bench.reader.as_ref()?;
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
        let Seen { judgement, verdict_at, judge, findings, device, driver, measured, parameters, sampler } =
            seen;
        if (self.profiling || judgement.verdict != Verdict::Pass) && sampler.cpus() > 0 {
            record::write_samples(&folder.dir().join("samples.jsonl"), &sampler)?;
        }
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
        let [hello, bound, start, done] = judge.milestones().map(|at| at.map(milliseconds));
        let text = |path: PathBuf| std::fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned());
        let mut files = BTreeMap::new();
        for path in [folder.console(), folder.events()] {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            files.insert(name, record::hash(&path)?);
        }
        let (mut run, mut provenance) = self.definition(seed, prepared);
        let id = run_id(&run, &provenance);
        if let Some(parameters) = parameters {
            run.parameters = parameters; // as the storm itself says
        }
        provenance.qemu_command_line = text(folder.qemu_command()).unwrap_or_default();
        provenance.device_command_line = text(folder.device_command());
        Ok(Record {
            schema: record::SCHEMA,
            id,
            began: 0,
            group: self.group.clone(),
            folder: None,
            run,
            expected: self.expected.first().copied().unwrap_or(Verdict::Pass),
            as_expected: self.expected.contains(&judgement.verdict),
            title: record::title(&judgement),
            identity: record::identity(&judgement, cycle.as_ref()),
            cycle,
            structures: None,
            progress: totals(&judge),
            measures: Measures::new(measured.as_ref(), judge.span(judgement.verdict), &findings),
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
            provenance,
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

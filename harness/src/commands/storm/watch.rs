//! Watches one machine until the judge is sure.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hmmstorm_abi::wire::control::{Chaos, GpuStats};
use hmmstorm_abi::wire::event::{Event, Measured, Record};

use crate::cli::Error;
use crate::judge::console::{Finding, Kind, Scanner};
use crate::judge::sampler::{CpuRegisters, GuestProbe, Sampler, TreeRules, registers};
use crate::judge::verdict::{Ended, Judge, Judgement, Observation, Phase};
use crate::vm::qmp::{self, Qmp};
use crate::vm::{self, End, Machine, Occurrence};

/// Host time between two looks at device and CPUs.
const TICK: Duration = Duration::from_millis(100);
/// The same where guest time may run far ahead of the host's.
const DETERMINISTIC_TICK: Duration = Duration::from_millis(20);
/// The same once a deterministic guest is stuck: most end themselves within a second of the host's time.
const LAST_LOOKS: Duration = Duration::from_millis(4);
/// So many of these.
const FEW_LOOKS: usize = 500;
/// Part of the host's time that summing up the samples may take. It takes all of them each time, and a hang may last for
/// minutes.
const SUMMING_UP: u32 = 20;
/// Host time without progress after which CPUs are sampled.
const SUSPICION: Duration = Duration::from_millis(700);
/// Host time that QMP or the control socket may fail before the bench gives up: a machine that is ending fails there first.
const FORBEARANCE: Duration = Duration::from_secs(3);

/// Sees into the guest over QMP.
struct QmpProbe<'a> {
    qmp: &'a mut Qmp,
    /// A file that QEMU writes memory to.
    scratch: &'a Path,
}

impl GuestProbe for QmpProbe<'_> {
    type Error = qmp::Error;

    fn registers(&mut self) -> Result<Vec<CpuRegisters>, qmp::Error> {
        Ok(registers::parse(&self.qmp.registers()?))
    }

    fn read_memory(&mut self, cpu: u32, address: u64, length: usize) -> Result<Option<Vec<u8>>, qmp::Error> {
        match self.qmp.read_virtual(cpu, address, length as u64, self.scratch) {
            Ok(bytes) => Ok(Some(bytes)),
            // Nothing mapped there. The file may be there all the same.
            Err(qmp::Error::Refused { .. }) => {
                let _ = std::fs::remove_file(self.scratch);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// What was seen of a run.
#[derive(Debug)]
pub(super) struct Seen {
    /// The verdict.
    pub(super) judgement: Judgement,
    /// Host time from QEMU's start to the verdict.
    pub(super) verdict_at: Duration,
    /// The judge, for milestones and totals.
    pub(super) judge: Judge,
    /// The kernel's complaints.
    pub(super) findings: Vec<Finding>,
    /// The device's counters at the end.
    pub(super) device: Vec<GpuStats>,
    /// The driver's counters at the end.
    pub(super) driver: Vec<BTreeMap<String, u64>>,
    /// What the storm measured, as far as it came to tell it.
    pub(super) measured: Option<Measured>,
    /// Parameters in force, once the scenario began.
    pub(super) parameters: Option<BTreeMap<String, String>>,
    /// What the CPUs were seen doing.
    pub(super) sampler: Sampler,
}

/// What a watcher knows beforehand.
#[derive(Debug)]
pub(super) struct Watcher<'a> {
    judge: Judge,
    sampler: Sampler,
    modules: &'a BTreeMap<String, PathBuf>,
    deterministic: bool,
    profiling: bool,
    chaos_at_start: Option<Chaos>,
    scanner: Scanner,
    console_grew: bool,
    /// When the judge is to be told of the samples again, and whether there are some that it was not told of.
    next_summary: Duration,
    unsummarised: bool,
    device: Vec<GpuStats>,
    driver: Vec<BTreeMap<String, u64>>,
    measured: Option<Measured>,
    parameters: Option<BTreeMap<String, String>>,
    garbled: Option<String>,
    failing: Option<(Instant, String)>,
    warnings: Vec<String>,
}

impl<'a> Watcher<'a> {
    /// A watcher with a judge and a sampler of its own; `modules` are the image's unstripped modules.
    pub(super) fn new(
        judge: Judge,
        sampler: Sampler,
        modules: &'a BTreeMap<String, PathBuf>,
        deterministic: bool,
    ) -> Self {
        Self {
            judge,
            sampler,
            modules,
            deterministic,
            profiling: false,
            chaos_at_start: None,
            scanner: Scanner::new(),
            console_grew: false,
            next_summary: Duration::ZERO,
            unsummarised: false,
            device: Vec::new(),
            driver: Vec::new(),
            measured: None,
            parameters: None,
            garbled: None,
            failing: None,
            warnings: Vec::new(),
        }
    }

    /// The device gets this fault plan when the scenario begins.
    pub(super) fn chaos_at_start(self, plan: Option<Chaos>) -> Self {
        Self { chaos_at_start: plan, ..self }
    }

    /// CPUs are sampled at every look, and not only when something seems to be wrong.
    pub(super) fn profiling(self, profiling: bool) -> Self {
        Self { profiling, ..self }
    }

    /// Watches until the verdict is certain. `progress` is called at every look, `listen` with each of the storm's records. The machine may still run afterwards.
    pub(super) fn watch(
        mut self,
        machine: &mut Machine,
        mut progress: impl FnMut(Phase),
        mut listen: impl FnMut(&Record),
    ) -> Result<Seen, Error> {
        let started = machine.started();
        let scratch = machine.sockets().dir.join("memory");
        let mut next = Instant::now();
        loop {
            match machine.next(next) {
                Ok(Occurrence::Record(record)) => {
                    listen(&record);
                    let begins = matches!(record.event, Event::Start { .. });
                    self.record(record, started.elapsed());
                    if let Some(plan) = self.chaos_at_start.take_if(|_| begins)
                        && let Some(device) = machine.device()
                        && let Err(error) = device.chaos(None, plan)
                    {
                        return Ok(self.ended(Ended::BenchFailed(error.to_string()), started.elapsed()));
                    }
                }
                Ok(Occurrence::BadRecord { line, why }) => {
                    self.garbled.get_or_insert(format!("{why}: {line:.200}"));
                }
                Ok(Occurrence::Console(line)) => {
                    self.scanner.feed(line.as_bytes());
                    self.scanner.feed(b"\n");
                    self.console_grew = true;
                }
                Ok(Occurrence::Panicked) => {}
                Ok(Occurrence::Ended(end)) => {
                    // The device outlives QEMU: its last counters are what the guest's last work was.
                    let _ = self.referee(machine, started.elapsed());
                    return Ok(self.ended(ended(end), started.elapsed()));
                }
                Ok(Occurrence::Deadline) => {
                    next = Instant::now() + self.tick(started.elapsed());
                    if let Some(why) = self.look(machine, &scratch, started) {
                        return Ok(self.ended(Ended::BenchFailed(why), started.elapsed()));
                    }
                    progress(self.judge.phase());
                    if let Some(judgement) = self.judge.decide(started.elapsed()) {
                        return Ok(self.seen(judgement, started.elapsed()));
                    }
                }
                Err(vm::Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => return Ok(self.ended(Ended::BenchFailed(error.to_string()), started.elapsed())),
            }
        }
    }

    /// The judgement on a machine that did not even say hello: what its console says, and else what went wrong.
    pub(super) fn stillborn(mut self, console: &Path, why: &vm::Error, after: Duration) -> Seen {
        if let Ok(bytes) = std::fs::read(console) {
            self.scanner.feed(&bytes);
        }
        let end = match why {
            vm::Error::Ended { end: end @ (End::PoweredOff | End::Reset), .. } => ended(*end),
            _ => Ended::BenchFailed(why.to_string()),
        };
        self.ended(end, after)
    }

    fn record(&mut self, record: Record, at: Duration) {
        match &record.event {
            Event::Bound { modules, .. } => {
                for (name, sections) in modules {
                    let Some(path) = self.modules.get(name) else { continue };
                    if let Err(error) = self.sampler.symbols_mut().add_module(name, path, sections) {
                        self.warnings.push(error.to_string());
                    }
                }
            }
            Event::Start { parameters, .. } => self.parameters = Some(parameters.clone()),
            Event::Measured(measured) => self.measured = Some(measured.clone()),
            Event::Counters { stats } | Event::Done { stats, .. } => self.driver.clone_from(stats),
            _ => {}
        }
        self.judge.observe(at, Observation::Storm(record));
    }

    /// Looks at device, CPUs and console. Gives the reason if the bench cannot see any more.
    fn look(&mut self, machine: &mut Machine, scratch: &Path, started: Instant) -> Option<String> {
        if let Err(error) = machine.folder().has_space() {
            return Some(format!("cannot go on writing to {}: {error}", machine.folder().dir().display()));
        }
        self.hand_over(started.elapsed());
        let mut trouble = self.referee(machine, started.elapsed()).err();
        let now = started.elapsed();
        if self.suspicious(now) {
            let mut probe = QmpProbe { qmp: machine.qmp(), scratch };
            match self.sampler.sample(now, &mut probe) {
                Ok(()) => {
                    self.unsummarised = true;
                    if started.elapsed() >= self.next_summary {
                        let begun = Instant::now();
                        self.summarise(now);
                        self.next_summary = started.elapsed() + begun.elapsed() * SUMMING_UP;
                    }
                }
                Err(error) => trouble = Some(error.to_string()),
            }
        }
        let Some(trouble) = trouble else {
            self.failing = None;
            return None;
        };
        let (since, first) = self.failing.get_or_insert((Instant::now(), trouble));
        (since.elapsed() >= FORBEARANCE).then(|| first.clone())
    }

    /// Host time until the next look.
    fn tick(&self, now: Duration) -> Duration {
        match (self.deterministic, self.suspicious(now)) {
            (false, _) => TICK,
            (true, false) => DETERMINISTIC_TICK,
            (true, true) if self.sampler.samples(0).count() < FEW_LOOKS => LAST_LOOKS,
            (true, true) => TICK,
        }
    }

    /// Whether to sample the CPUs. In deterministic mode every QMP command wakes QEMU's main loop, and that may see a guest
    /// that has just gone idle before its last instructions are counted, and move the clock too far. So nothing is asked
    /// there until the kernel says that a CPU is stuck: a guest of which one CPU is always busy is never idle. Or until
    /// it hangs for so long that it will not end by itself.
    fn suspicious(&self, now: Duration) -> bool {
        let Phase::Running { stalled, .. } = self.judge.phase() else { return false };
        if self.deterministic {
            let stuck = |finding: &Finding| {
                matches!(finding.kind, Kind::WorkqueueLockup { .. } | Kind::SoftLockup { .. })
            };
            return self.judge.findings().any(stuck) || stalled >= self.judge.limits().detectors * 2;
        }
        self.profiling || now.saturating_sub(self.judge.stalled_since()) >= SUSPICION
    }

    /// Tells the judge what the CPUs were seen doing since the last completion.
    fn summarise(&mut self, at: Duration) {
        if std::mem::take(&mut self.unsummarised) {
            let summaries = self.sampler.summaries(self.judge.stalled_since(), &TreeRules::default());
            self.judge.observe(at, Observation::Samples(summaries));
        }
    }

    fn referee(&mut self, machine: &mut Machine, at: Duration) -> Result<(), String> {
        let Some(device) = machine.device() else { return Ok(()) };
        let stats = device.stats().map_err(|error| error.to_string())?;
        self.device.clone_from(&stats);
        self.judge.observe(at, Observation::Device(stats));
        Ok(())
    }

    /// Hands what the console said to the judge.
    fn hand_over(&mut self, at: Duration) {
        if !std::mem::take(&mut self.console_grew) {
            return;
        }
        if let Some(time) = self.scanner.latest_time() {
            self.judge.observe(at, Observation::GuestTime(time));
        }
        if self.scanner.count() > 0 {
            self.judge.observe(at, Observation::Console(self.scanner.findings()));
        }
    }

    fn ended(mut self, mut ended: Ended, at: Duration) -> Seen {
        self.scanner.finish();
        self.console_grew = true;
        self.hand_over(at);
        self.summarise(at);
        if let (Ended::PoweredOff, Phase::Booting | Phase::Binding, Some(garbled)) =
            (&ended, self.judge.phase(), &self.garbled)
        {
            ended = Ended::BenchFailed(format!("the storm's records make no sense: {garbled}"));
        }
        self.judge.observe(at, Observation::Ended(ended));
        let judgement = self.judge.conclude(at);
        self.seen(judgement, at)
    }

    fn seen(mut self, mut judgement: Judgement, verdict_at: Duration) -> Seen {
        self.scanner.finish();
        let notes = self
            .garbled
            .iter()
            .map(|garbled| format!("a line of events.jsonl is no record: {garbled}"))
            .chain(self.warnings);
        judgement.also.extend(notes);
        Seen {
            judgement,
            verdict_at,
            judge: self.judge,
            findings: self.scanner.findings(),
            device: self.device,
            driver: self.driver,
            measured: self.measured,
            parameters: self.parameters,
            sampler: self.sampler,
        }
    }
}

fn ended(end: End) -> Ended {
    match end {
        End::PoweredOff => Ended::PoweredOff,
        End::Reset => Ended::Reset,
        End::Asked => Ended::QemuFailed("somebody asked it to".to_owned()),
        End::QemuDied(status) => Ended::QemuFailed(status.to_string()),
        End::DeviceDied(status) => Ended::DeviceFailed(status.to_string()),
    }
}

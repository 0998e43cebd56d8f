//! What to call a run in which nothing completes any more: the conjunctions behind `livelock`, `deadlock` and
//! `device-stall`, and the honest weaker thing when one of their parts is missing.

use std::time::Duration;

use super::state::State;
use super::types::{Evidence, Judgement, Limits, Source, Verdict, Weight};
use crate::judge::console::{Class, Finding, Kind};
use crate::judge::sampler::CpuSummary;
use crate::judge::stack::{chain, contains, from_loop, is_entry, stable, waits_for_another_cpu};

/// What a run without completions looks like.
#[derive(Clone, Debug)]
pub(super) struct Stuck {
    looks_like: Verdict,
    reason: String,
    frames: Vec<String>,
    spinners: Vec<u32>,
    evidence: Vec<Evidence>,
}

impl Stuck {
    /// Every part of the conjunction is there.
    pub(super) fn is_certain(&self) -> bool {
        self.missing().is_none()
    }

    /// It looks like a loop that the kernel's soft-lockup detector will end.
    pub(super) fn is_livelock(&self) -> bool {
        self.looks_like == Verdict::Livelock
    }

    fn missing(&self) -> Option<&str> {
        let gap = self
            .evidence
            .iter()
            .find(|evidence| matches!(evidence.weight, Weight::Missing | Weight::Against));
        gap.map(|evidence| evidence.says.as_str())
    }

    /// The verdict, or a harness error that says what would have made it one.
    pub(super) fn into_judgement(self) -> Judgement {
        let (verdict, reason) = match self.missing() {
            None => (self.looks_like, self.reason.clone()),
            Some(missing) => (
                Verdict::HarnessError,
                format!(
                    "inconclusive: {}; it looks like {}, but {missing}",
                    self.reason,
                    article(self.looks_like)
                ),
            ),
        };
        let certain = verdict == self.looks_like;
        Judgement {
            verdict,
            reason,
            frames: if certain { self.frames } else { Vec::new() },
            spinners: if certain { self.spinners } else { Vec::new() },
            evidence: self.evidence,
            recovered: None,
            also: Vec::new(),
        }
    }
}

fn article(verdict: Verdict) -> String {
    format!("a {}", verdict.name())
}

/// Examines a run: none if it is not stuck, i.e. something completed within *T* or no scenario runs.
pub(super) fn examine(state: &State, limits: &Limits, host: Duration) -> Option<Stuck> {
    if state.started.is_none() || state.done.is_some() {
        return None;
    }
    let guest = state.guest_stall();
    let host_stall = host.saturating_sub(state.last_progress.host);
    if guest < limits.no_progress || (!limits.guest_time_only && host_stall < limits.no_progress) {
        return None;
    }
    let mut evidence = vec![no_completion(state, guest, host_stall)];
    evidence.push(outstanding(state, limits));
    evidence.push(heartbeat(state));
    let idle = !state.summaries.is_empty() && state.summaries.iter().all(|cpu| cpu.idle);
    let spinning: Vec<&CpuSummary> = state.summaries.iter().filter(|cpu| cpu.spins).collect();
    let for_long = format!("nothing has completed for {:.1} s of guest time", guest.as_secs_f64());

    let queued = state.queued_since.filter(|since| {
        // The queue must have been there for as long as nothing completes, or T at least.
        let since_guest = Duration::from_nanos(state.now.guest.saturating_sub(since.guest));
        let since_host = host.saturating_sub(since.host);
        since_guest >= limits.no_progress || (!limits.guest_time_only && since_host >= limits.no_progress)
    });
    if queued.is_some() {
        evidence.push(Evidence::new(
            Source::Device,
            Weight::For,
            format!("{} descriptors queued, none completed", state.queued()),
        ));
        evidence.extend(state.summaries.iter().map(|cpu| samples(cpu, Weight::Note)));
        evidence.extend(
            state
                .since_stall()
                .filter(|finding| finding.class() == Class::Detector)
                .map(|finding| complaint(finding, Weight::Note)),
        );
        return Some(Stuck {
            looks_like: Verdict::DeviceStall,
            reason: format!("{for_long} while the GPU holds {} queued descriptors", state.queued()),
            frames: waiters(state),
            spinners: Vec::new(),
            evidence,
        });
    }
    evidence.push(Evidence::new(Source::Device, Weight::For, device_waits(state)));
    if !spinning.is_empty() {
        return Some(livelock(state, &spinning, &for_long, evidence));
    }
    if idle {
        return Some(deadlock(state, &for_long, evidence));
    }
    evidence.extend(state.summaries.iter().map(|cpu| samples(cpu, Weight::Note)));
    evidence.push(Evidence::new(Source::Samples, Weight::Missing, unclear(state)));
    evidence.extend(
        state
            .since_stall()
            .filter(|finding| finding.class() == Class::Detector)
            .map(|finding| complaint(finding, Weight::Note)),
    );
    let looks_like = if state.since_stall().any(|finding| matches!(finding.kind, Kind::HungTask { .. })) {
        Verdict::Deadlock
    } else {
        Verdict::Livelock
    };
    Some(Stuck { looks_like, reason: for_long, frames: Vec::new(), spinners: Vec::new(), evidence })
}

fn livelock(state: &State, spinning: &[&CpuSummary], for_long: &str, mut evidence: Vec<Evidence>) -> Stuck {
    let mut advancing = Vec::new();
    for &cpu in spinning {
        if cpu.advances() {
            advancing.push(cpu);
            evidence.push(samples(cpu, Weight::For));
        } else {
            evidence.push(samples(cpu, Weight::Note));
        }
    }
    if advancing.is_empty() {
        let says = "no CPU moved between two samples: the emulator stands still, not the kernel";
        evidence.push(Evidence::new(Source::Samples, Weight::Against, says));
    }
    let moving: Vec<u32> = advancing.iter().map(|cpu| cpu.cpu).collect();
    evidence.extend(
        state.summaries.iter().filter(|cpu| !moving.contains(&cpu.cpu)).map(|cpu| samples(cpu, Weight::Note)),
    );
    let mut agrees = false;
    for finding in state.since_stall().filter(|finding| finding.class() == Class::Detector) {
        let weight = if confirms(finding, &advancing) { Weight::For } else { Weight::Note };
        agrees |= weight == Weight::For;
        evidence.push(complaint(finding, weight));
    }
    if !agrees {
        let says = "the kernel's own detectors say nothing of these CPUs";
        evidence.push(Evidence::new(Source::Console, Weight::Missing, says));
    }
    let (looping, waiting) = culprits(&advancing);
    evidence.extend(waiting.iter().map(|cpu| {
        let says = format!("CPU {} is in no loop of its own: it waits for another CPU", cpu.cpu);
        Evidence::new(Source::Samples, Weight::Note, says)
    }));
    let frames = loop_frames(&looping);
    let loops = chain(&frames, 3);
    let spinners: Vec<u32> = looping.iter().map(|cpu| cpu.cpu).collect();
    let cpus: Vec<String> = spinners.iter().map(u32::to_string).collect();
    Stuck {
        looks_like: Verdict::Livelock,
        reason: format!(
            "{for_long} while CPU {} spin{} in {loops}",
            cpus.join(", "),
            if cpus.len() == 1 { "s" } else { "" }
        ),
        frames,
        spinners,
        evidence,
    }
}

/// The spinning CPUs that loop of themselves, and those that only wait for an answer or a lock of another: an IPI to a CPU
/// with its interrupts off makes two CPUs spin, and one of them is to blame. All of them, if all wait.
fn culprits<'a>(spinning: &[&'a CpuSummary]) -> (Vec<&'a CpuSummary>, Vec<&'a CpuSummary>) {
    let waits = |cpu: &&CpuSummary| from_loop(&cpu.trunk).iter().any(|frame| waits_for_another_cpu(frame));
    let (waiting, looping): (Vec<_>, Vec<_>) = spinning.iter().copied().partition(waits);
    if looping.is_empty() { (waiting, Vec::new()) } else { (looping, waiting) }
}

/// Whether a report of the kernel speaks of one of the spinning CPUs, and of the loop seen there.
fn confirms(finding: &Finding, spinning: &[&CpuSummary]) -> bool {
    match &finding.kind {
        Kind::SoftLockup { .. } | Kind::HardLockup => spinning.iter().any(|cpu| {
            let mut trunk = cpu.trunk.iter().filter(|function| !is_entry(function));
            finding.cpu == Some(cpu.cpu)
                && (finding.stack.is_empty() || trunk.any(|function| contains(&finding.stack, function)))
        }),
        Kind::WorkqueueLockup { pools, .. } => {
            pools.iter().any(|pool| spinning.iter().any(|cpu| pool.cpus.contains(&cpu.cpu)))
        }
        _ => false,
    }
}

fn deadlock(state: &State, for_long: &str, mut evidence: Vec<Evidence>) -> Stuck {
    evidence.extend(state.summaries.iter().map(|cpu| samples(cpu, Weight::For)));
    let sleepers: Vec<&Finding> = state.since_stall().filter(|finding| sleeps(finding)).collect();
    evidence.extend(sleepers.iter().map(|finding| complaint(finding, Weight::For)));
    if sleepers.is_empty() {
        evidence.push(Evidence::new(
            Source::Console,
            Weight::Missing,
            "the kernel reports no task in uninterruptible sleep",
        ));
    }
    let frames = waiters(state);
    let who = match frames.first() {
        Some(function) => format!(" and tasks sleep in {function}"),
        None => String::new(),
    };
    Stuck {
        looks_like: Verdict::Deadlock,
        reason: format!("{for_long} while every CPU is idle{who}"),
        frames,
        spinners: Vec::new(),
        evidence,
    }
}

fn sleeps(finding: &Finding) -> bool {
    matches!(finding.kind, Kind::HungTask { .. } | Kind::TaskDump { state: 'D' })
}

/// The frames of the first task that sleeps.
fn waiters(state: &State) -> Vec<String> {
    state
        .since_stall()
        .find(|finding| sleeps(finding))
        .map(|finding| stable(&finding.stack, 3))
        .unwrap_or_default()
}

/// The frames that name the loop: what all spinning CPUs have in common. If they have nothing in common, what most of
/// them have, or the first of them: a finding without a name is none.
fn loop_frames(spinning: &[&CpuSummary]) -> Vec<String> {
    let common = common_frames(spinning);
    if !common.is_empty() {
        return common;
    }
    let outermost = |cpu: &CpuSummary| named(&cpu.trunk).last().cloned();
    let share = |cpu: &CpuSummary| spinning.iter().filter(|other| outermost(other) == outermost(cpu)).count();
    let Some(first) = spinning.iter().rev().max_by_key(|cpu| share(cpu)) else { return Vec::new() };
    let alike: Vec<&CpuSummary> =
        spinning.iter().copied().filter(|cpu| outermost(cpu) == outermost(first)).collect();
    common_frames(&alike)
}

/// The functions of the loop that have the same name in the next boot, leaf first: no address of a module that nobody
/// told of.
fn named(functions: &[String]) -> Vec<String> {
    let mut frames = from_loop(functions);
    frames.retain(|function| !function.starts_with("0x"));
    frames
}

/// From the known loop on, what all these CPUs have in common.
fn common_frames(spinning: &[&CpuSummary]) -> Vec<String> {
    let Some(first) = spinning.first() else { return Vec::new() };
    let roots = |cpu: &CpuSummary| cpu.trunk.iter().rev().cloned().collect::<Vec<String>>();
    let mut common = roots(first);
    for cpu in spinning {
        let agreed = common.iter().zip(roots(cpu)).take_while(|(a, b)| *a == b).count();
        common.truncate(agreed);
    }
    common.reverse();
    let mut frames = named(&common);
    frames.truncate(3);
    frames
}

fn no_completion(state: &State, guest: Duration, host: Duration) -> Evidence {
    let (operations, faults) = state.counts();
    let says = format!(
        "no completion for {:.1} s of guest time ({:.1} s of host time): {} descriptors of the GPUs, {operations} operations and {faults} device faults before",
        guest.as_secs_f64(),
        host.as_secs_f64(),
        state.completions(),
    );
    Evidence::new(Source::Device, Weight::For, says)
}

/// Work must be outstanding: a guest that rests is not stuck. A heartbeat that went silent leaves it open, and the
/// scenario, which has not ended, decides.
fn outstanding(state: &State, limits: &Limits) -> Evidence {
    let workers = state.worker_names.len();
    match &state.progress {
        Some(progress) if progress.outstanding > 0 => {
            let says = format!(
                "{} of {workers} workers are inside an operation, round {}",
                progress.outstanding, progress.round
            );
            Evidence::new(Source::Storm, Weight::For, says)
        }
        Some(_) if state.silence() < limits.no_progress => {
            Evidence::new(Source::Storm, Weight::Against, "no worker is inside an operation")
        }
        _ => Evidence::new(
            Source::Storm,
            Weight::For,
            format!("the scenario has {workers} workers and has not ended"),
        ),
    }
}

fn heartbeat(state: &State) -> Evidence {
    let silence = state.silence().as_secs_f64();
    let says = match state.heartbeat {
        None => format!("no heartbeat came since the scenario began, {silence:.1} s of guest time ago"),
        Some(_) if silence < 2.0 => "the storm's heartbeat is alive".to_owned(),
        Some(_) => format!("the storm's heartbeat has been silent for {silence:.1} s of guest time"),
    };
    Evidence::new(Source::Storm, Weight::Note, says)
}

/// What a device without queued work says for itself.
fn device_waits(state: &State) -> String {
    let done = format!("{} descriptors completed, none queued", state.completions());
    match state.stalled() {
        0 => format!("{done}: the GPU waits for the guest"),
        stalled => format!(
            "{done}, {stalled} jobs stalled on page faults: the GPU waits for the guest to serve them"
        ),
    }
}

fn unclear(state: &State) -> String {
    if state.summaries.iter().all(|cpu| cpu.samples == 0) {
        return "there are no samples of the CPUs".to_owned();
    }
    let least = state.summaries.iter().map(|cpu| cpu.samples).min().unwrap_or(0);
    format!("{least} samples a CPU show neither one call tree nor idleness")
}

fn samples(cpu: &CpuSummary, weight: Weight) -> Evidence {
    let says = if cpu.spins {
        let trunk = from_loop(&cpu.trunk);
        format!(
            "CPU {}: {} of {} samples in {}, at {} addresses with {} contents of the registers",
            cpu.cpu,
            cpu.in_tree,
            cpu.judged - cpu.torn,
            chain(&trunk, 4),
            cpu.distinct_ips,
            cpu.distinct_states
        )
    } else {
        format!(
            "CPU {}: {} samples, {} halted, {} in the kernel, {} in user mode",
            cpu.cpu, cpu.samples, cpu.halted, cpu.kernel, cpu.user
        )
    };
    Evidence::new(Source::Samples, weight, says)
}

fn complaint(finding: &Finding, weight: Weight) -> Evidence {
    let mut says = finding.title.clone();
    let frames = stable(&finding.stack, 4);
    if !frames.is_empty() {
        says = format!("{says}: {}", chain(&frames, 4));
    }
    Evidence::new(Source::Console, weight, says).at(finding.line)
}

/// Whether waiting longer can add to a certain verdict: each of the kernel's detectors has either spoken of the CPUs and
/// tasks concerned or had its time.
pub(super) fn detectors_have_spoken(state: &State, limits: &Limits) -> bool {
    let whole = |finding: &&Finding| finding.complete;
    let hung = state.since_stall().filter(|finding| sleeps(finding)).any(|finding| whole(&finding));
    // With sysctl kernel.softlockup_all_cpu_backtrace the first report shows the other CPUs too.
    let shown = |cpu: &CpuSummary| {
        let of_cpu = |finding: &Finding| {
            matches!(finding.kind, Kind::SoftLockup { .. } | Kind::CpuDump) && finding.cpu == Some(cpu.cpu)
        };
        state.since_stall().filter(whole).any(of_cpu)
    };
    let soft = state.summaries.iter().filter(|cpu| cpu.spins).all(shown);
    (hung && soft) || state.guest_stall() >= limits.detectors
}

//! A run as a timeline, in the JSON of Chrome's trace viewer, which [Perfetto](https://ui.perfetto.dev) opens: what the storm told,
//! what each CPU was sampled doing, what the kernel complained of.
//!
//! Storm and kernel tell guest time. Samples have the host's; in real-time mode both clocks go alike, and the storm's first
//! record, whose host time is in the verdict, says how far they are apart. In deterministic mode they do not, so there the
//! samples have a track group of their own that says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hmmstorm_abi::wire::event::{Event, Record as Told};
use serde::Deserialize;
use serde_json::{Value, json};

use super::text::clean;
use crate::judge::record::Record;

/// Groups of tracks, as process ids of the trace.
const STORM: u32 = 1;
const CPUS: u32 = 2;
const KERNEL: u32 = 3;

/// A file of the run's folder that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no record.
    #[error("{} is no run record: {source}", path.display())]
    Record {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// A line of `samples.jsonl`.
#[derive(Deserialize)]
struct Sample {
    at_ms: u64,
    cpu: u32,
    mode: String,
    /// Leaf first.
    stack: Vec<String>,
}

/// The timeline of the run in a folder. Lines that break off are left out.
pub fn trace(folder: &Path) -> Result<Value, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        fs::read_to_string(&path).map_err(|source| Error::Io { path, source })
    };
    let path = folder.join("verdict.json");
    let record: Record =
        serde_json::from_str(&read("verdict.json")?).map_err(|source| Error::Record { path, source })?;
    let told: Vec<Told> =
        read("events.jsonl")?.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    // A run that passed has no samples.
    let samples: Vec<Sample> = read("samples.jsonl")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let mut events = Vec::new();
    storm(&told, &mut events);
    cpus(&record, &told, &samples, &mut events);
    kernel(&record, &mut events);
    let run = &record.run;
    Ok(json!({
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "scenario": run.scenario, "variant": run.variant, "preempt": run.preempt, "seed": run.seed,
            "verdict": record.judgement.verdict, "reason": clean(&record.judgement.reason),
        },
    }))
}

/// Microseconds, as the format has it.
#[expect(clippy::cast_precision_loss, reason = "guest time of a run is far below 2^52 nanoseconds")]
fn us(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1000.0
}

fn name(kind: &str, pid: u32, tid: u32, name: &str) -> Value {
    json!({ "ph": "M", "name": kind, "pid": pid, "tid": tid, "args": { "name": clean(name) } })
}

fn storm(told: &[Told], events: &mut Vec<Value>) {
    events.push(name("process_name", STORM, 0, "storm (guest time)"));
    events.push(name("thread_name", STORM, 0, "phases"));
    let mut workers: Vec<String> = Vec::new();
    let mut phase: Option<(&str, u64)> = Some(("boot", 0));
    let mut last = 0;
    let close = |phase: &mut Option<(&str, u64)>, at: u64, events: &mut Vec<Value>| {
        if let Some((name, from)) = phase.take() {
            let duration = us(at.saturating_sub(from));
            events.push(
                json!({ "ph": "X", "name": name, "pid": STORM, "tid": 0, "ts": us(from), "dur": duration }),
            );
        }
    };
    let instant = |at: u64, name: &str, says: String| json!({ "ph": "i", "s": "g", "name": name, "pid": STORM, "tid": 0, "ts": us(at), "args": { "says": clean(&says) } });
    for Told { t, event } in told {
        last = last.max(*t);
        match event {
            Event::Hello { .. } => {
                close(&mut phase, *t, events);
                phase = Some(("bind the GPUs", *t));
            }
            Event::Bound { .. } => close(&mut phase, *t, events),
            Event::Start { workers: names, .. } => {
                workers.clone_from(names);
                phase = Some(("scenario", *t));
            }
            Event::Progress(progress) => {
                let counter = |name: &str, value: u64| json!({ "ph": "C", "name": clean(name), "pid": STORM, "ts": us(*t), "args": { "value": value } });
                events.push(counter("operations", progress.operations));
                events.push(counter("device faults resolved", progress.faults));
                events.push(counter("workers inside an operation", progress.outstanding.into()));
                events.push(counter("round", progress.round));
                for (worker, count) in workers.iter().zip(&progress.workers) {
                    events.push(counter(&format!("operations of {worker}"), *count));
                }
            }
            Event::Corruption { worker, page, expected, found } => {
                let says = format!("{worker}: page {page} should hold {expected} and holds {found}");
                events.push(instant(*t, "corruption", says));
            }
            Event::Invariant { name, detail } => events.push(instant(*t, name, detail.clone())),
            Event::Unserved(unserved) => {
                let says = format!("{}: {}, page {}", unserved.worker, unserved.call, unserved.page);
                events.push(instant(*t, "unserved", says));
            }
            Event::Error { message } => events.push(instant(*t, "error", message.clone())),
            Event::Done { .. } => close(&mut phase, *t, events),
            _ => {}
        }
    }
    // A scenario that hangs has no end but that of the log.
    close(&mut phase, last, events);
}

/// Each CPU as a flame graph over time: consecutive samples that have a frame in common, from the root on, share its slice.
fn cpus(record: &Record, told: &[Told], samples: &[Sample], events: &mut Vec<Value>) {
    let hello = told.iter().find(|told| matches!(told.event, Event::Hello { .. })).map(|told| told.t);
    let ahead = match (hello, record.timings.hello_ms) {
        (Some(guest), Some(host)) if record.run.mode != "deterministic" => {
            Some((host * 1_000_000).saturating_sub(guest))
        }
        _ => None,
    };
    let clock = if ahead.is_some() { "guest time" } else { "host time since the start" };
    events.push(name("process_name", CPUS, 0, &format!("CPUs, sampled ({clock})")));
    for cpu in 0..record.run.cpus {
        events.push(name("thread_name", CPUS, cpu, &format!("CPU {cpu}")));
        let mut open: Vec<String> = Vec::new();
        let mut last = 0.0;
        for sample in samples.iter().filter(|sample| sample.cpu == cpu) {
            let at = us((sample.at_ms * 1_000_000).saturating_sub(ahead.unwrap_or(0)));
            let frames: Vec<String> = match sample.mode.as_str() {
                "kernel" => sample.stack.iter().rev().map(|frame| clean(frame).into_owned()).collect(),
                mode => vec![clean(mode).into_owned()],
            };
            let same = open.iter().zip(&frames).take_while(|(a, b)| a == b).count();
            for name in open.drain(same..).rev() {
                events.push(json!({ "ph": "E", "name": name, "pid": CPUS, "tid": cpu, "ts": at }));
            }
            for name in &frames[same..] {
                events.push(json!({ "ph": "B", "name": name, "pid": CPUS, "tid": cpu, "ts": at }));
                open.push(name.clone());
            }
            last = at;
        }
        for name in open.drain(..).rev() {
            events.push(json!({ "ph": "E", "name": name, "pid": CPUS, "tid": cpu, "ts": last }));
        }
    }
}

fn kernel(record: &Record, events: &mut Vec<Value>) {
    events.push(name("process_name", KERNEL, 0, "kernel's complaints (guest time)"));
    for complaint in &record.complaints {
        let Some(time) = complaint.time else { continue };
        let stack: Vec<String> =
            complaint.stack.iter().map(|frame| clean(&frame.to_string()).into_owned()).collect();
        let tid = complaint.cpu.unwrap_or(0);
        events.push(json!({
            "ph": "i", "s": "p", "name": clean(&complaint.title), "pid": KERNEL, "tid": tid, "ts": us(time),
            "args": { "stack": stack.join("\n"), "line of console.log": complaint.line },
        }));
    }
}

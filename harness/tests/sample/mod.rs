//! Run records for tests, made here: a small matrix with a bug, its cure and a hostile guest.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Serializer, V2Serializer};
use serde_json::{Value, json};

/// What a hostile guest calls its tasks and prints on its console: markup of every format, control characters, text that
/// is shown in another order than it is written.
pub(crate) const HOSTILE: &str = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'`|*_[x](javascript:y)&amp;]]>--><!--\x1b[2J\u{202e}\u{0}\r\nok 99 forged\n# <b>";

/// A run to make a record of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Fix candidate.
    pub(crate) variant: &'static str,
    /// Preemption model.
    pub(crate) preempt: &'static str,
    /// CPUs.
    pub(crate) cpus: u32,
    /// Size of device folios.
    pub(crate) folio: &'static str,
    /// Seed.
    pub(crate) seed: u64,
    /// Verdict.
    pub(crate) verdict: &'static str,
    /// What was expected.
    pub(crate) expected: &'static str,
}

/// The record of a run.
#[must_use]
pub(crate) fn record(sample: Sample) -> Value {
    let Sample { variant, preempt, cpus, folio, seed, verdict, expected } = sample;
    let failed = verdict != "pass";
    let id = format!("{variant}-{preempt}-{cpus}-{folio}-{seed}");
    // Any number will do that differs from run to run.
    let noise = id.bytes().fold(7_u64, |sum, byte| (sum * 31 + u64::from(byte)) % 9973);
    let faults = if failed { 40 + noise % 900 } else { 5580 };
    let patches = match variant {
        "trylock" => json!([]),
        name => {
            json!([{ "name": format!("{name}.patch"), "origin": { "variant": name }, "sha256": "5f".repeat(32) }])
        }
    };
    let mut record = json!({
        "schema": 1,
        "id": id,
        "run": {
            "scenario": "drain-livelock", "control": null,
            "parameters": { "folio": folio, "pages": "32", "faulters": (cpus - 1).to_string() },
            "variant": variant, "preempt": preempt, "cpus": cpus, "gpus": 2, "mode": "real-time", "engine": "tcg",
            "profile": "smoke", "seed": seed, "chaos": null, "memory": "1G", "vram": "64M",
        },
        "expected": expected,
        "as_expected": verdict == expected,
        "verdict": verdict,
        "reason": if failed { "nothing has completed for 12.0 s of guest time while CPU 1, 2, 3 spin in hmm_range_fault" } else { "the scenario ended, every check held" },
        "frames": if failed { json!(["hmm_range_fault", "Mirror::access"]) } else { json!([]) },
        "evidence": [],
        "progress": { "round": noise % 60, "operations": faults * 2, "faults": faults, "workers": {} },
        "device": [],
        "timings": {
            "hello_ms": 1900, "bound_ms": 2800, "start_ms": 2900, "done_ms": null, "verdict_ms": 9000 + noise,
            "total_ms": 10_000 + noise, "guest_elapsed_ms": if failed { Value::Null } else { json!(9000 + noise) },
        },
        "provenance": {
            "image": {
                "kernel_version": "6.19.6", "kernel_source_sha256": "60".repeat(32), "patches": patches, "variant": variant,
                "flavour": "default", "config_sha256": "c0".repeat(32), "driver_sha256": "d1".repeat(32), "storm_sha256": "57".repeat(32),
                "rustc": "rustc 1.95.0", "bindgen": "bindgen 0.72.1", "cc": "gcc 12.2.0", "libclang": "19",
            },
            "binaries": {}, "qemu_version": "QEMU emulator version 11.1.3", "harness_version": "0.1.0", "harness_commit": "0123456789abcdef",
            "command_line": ["hmmstorm"], "qemu_command_line": "qemu-system-x86_64 -machine q35", "device_command_line": "hmmstorm-device --gpus 2",
            "kernel_command_line": format!("console=ttyS0 storm.p.folio={folio}"), "host": "Linux 6.1 x86_64",
        },
        "files": { "console.log": { "bytes": 100, "sha256": "ab".repeat(32) } },
        "measures": {
            "observed_ms": if failed { 300 + noise } else { 9000 + noise }, "failed": failed, "resolved": faults, "mm_faults": faults * 2,
            "migrations": { "attempts": 200, "pages": 6400, "collected": 6300, "migrated": 6200 - noise % 50 }, "unswitched_ms": 40,
        },
    });
    record["measures"]["fault_latency"] = latency(noise, if variant == "trylock" { 1 } else { 2 });
    if failed {
        record["title"] = json!("livelock in hmm_range_fault ← Mirror::access");
        record["identity"] = json!("livelock-0123456789ab");
        record["cycle"] = cycle();
        record["structures"] = structures();
        record["complaints"] = json!([{
            "kind": "soft-lockup", "seconds": 13, "title": "watchdog: BUG: soft lockup - CPU#1 stuck for 13s! [faulter:58]", "line": 512,
            "time": 21_000_000_000_u64, "task": { "comm": "faulter", "pid": 58 }, "cpu": 1, "complete": true,
            "stack": [
                { "function": "do_swap_page", "offset": 257, "reliable": true }, { "function": "__handle_mm_fault", "offset": 90, "reliable": true },
                { "function": "hmm_vma_walk_pmd", "offset": 400, "reliable": true }, { "function": "hmm_range_fault", "offset": 120, "reliable": true },
                { "function": "Mirror::access", "offset": 3000, "module": "hsgpu", "reliable": true },
            ],
        }]);
    }
    record
}

/// Times with a body and a tail.
fn latency(noise: u64, factor: u64) -> Value {
    let mut histogram = Histogram::<u64>::new_with_bounds(1, 1 << 37, 2).expect("bounds");
    for at in 0..2000_u64 {
        let tail = if at % 97 == 0 { 40 } else { 1 };
        histogram.saturating_record(factor * tail * (90_000 + (at * 7919 + noise * 31) % 60_000));
    }
    let mut bytes = Vec::new();
    V2Serializer::new().serialize(&histogram, &mut bytes).expect("a histogram");
    json!({ "hdr": STANDARD.encode(bytes) })
}

fn cycle() -> Value {
    let says = |says: &str, line: u64| json!({ "says": says, "source": "console", "line": line });
    json!({
        "spinners": [{ "cpu": 1, "task": { "comm": "faulter", "pid": 58, "worker": "faulter0@cpu1" }, "frames": ["hmm_range_fault"] }],
        "closed": true,
        "statements": [
            says("faulter0@cpu1 (pid 58) spins on CPU 1 in hmm_range_fault ← Mirror::access (83 of 84 samples)", 512),
            says("they want a device-private folio that is locked: do_swap_page() only tries to lock it and returns 0", 520),
            says("migrator@cpu0 (pid 57) sleeps in __lru_add_drain_all ← migrate_device_unmap ← migrate_vma_setup", 247),
            says("pid 57 waits for lru_add_drain_per_cpu of workqueue mm_percpu_wq, which is pending on CPU 1", 245),
        ],
    })
}

fn structures() -> Value {
    let task = |pid: u32, comm: &str| json!({ "pid": pid, "comm": comm });
    json!({
        "spinners": [{
            "cpu": 1, "task": task(58, "faulter"), "function": "hmm_range_fault", "address": 0x7f65_3ee9_0000_u64, "mm": 1, "entry": 0xf000,
            "size": 4096, "pfn": 0xfcf_0003, "folio": 2, "locked": true, "memory": "MEMORY_DEVICE_PRIVATE",
        }],
        "holders": [{
            "task": task(57, "migrator"), "state": "D (disk sleep)", "function": "__lru_add_drain_all", "migrate": 2, "start": 0x7f65_3ee8_d000_u64,
            "end": 0x7f65_3eea_d000_u64, "held": [{ "index": 3, "pfn": 0xfcf_0003 }],
            "waits_for": {
                "work": 1, "function": "lru_add_drain_per_cpu", "workqueue": "mm_percpu_wq", "cpu": 1, "queued": true,
                "worker": task(54, "kworker/1:2"), "current": task(58, "faulter"),
            },
        }],
        "closed": true,
        "statements": [
            "CPU 1 runs faulter (pid 58), in hmm_range_fault at 0x7f653ee90000, where its page table has a swap entry for pfn 0xfcf0003, a folio of MEMORY_DEVICE_PRIVATE with PG_locked set",
            "so faulter waits for migrator, and migrator for faulter: the cycle is closed",
        ],
    })
}

/// A matrix of 4 variants, 4 preemption models, 2 numbers of CPUs, 2 folio sizes, as many seeds as asked for: stock hangs
/// without preemption, one cure hangs with huge folios, one cell has an unexpected failure.
#[must_use]
pub(crate) fn matrix(seeds: u64) -> Vec<Value> {
    let mut records = Vec::new();
    for variant in ["trylock", "wait-on-locked", "wait-on-locked-pmd", "unmap-before-drain"] {
        for preempt in ["none", "voluntary", "lazy", "full"] {
            for cpus in [2, 4] {
                for folio in ["4K", "2M"] {
                    for seed in 1..=seeds {
                        let open = matches!(preempt, "none" | "voluntary");
                        let hangs = match variant {
                            "trylock" => open,
                            "wait-on-locked" => open && folio == "2M" && seed % 3 == 0,
                            _ => false,
                        };
                        let verdict = if hangs { "livelock" } else { "pass" };
                        let expected = if variant == "trylock" { verdict } else { "pass" };
                        records.push(record(Sample {
                            variant,
                            preempt,
                            cpus,
                            folio,
                            seed,
                            verdict,
                            expected,
                        }));
                    }
                }
            }
        }
    }
    records
}

/// A record in which everything that a guest can write is [`HOSTILE`].
#[must_use]
pub(crate) fn hostile() -> Value {
    let sample = Sample {
        variant: "trylock",
        preempt: "none",
        cpus: 4,
        folio: "4K",
        seed: 666,
        verdict: "livelock",
        expected: "pass",
    };
    let mut record = record(sample);
    record["id"] = json!(format!("evil {HOSTILE}"));
    for path in [
        "/run/scenario",
        "/run/variant",
        "/run/control",
        "/run/preempt",
        "/run/chaos",
        "/run/profile",
        "/run/engine",
        "/reason",
        "/title",
        "/identity",
        "/frames/0",
        "/cycle/statements/0/says",
        "/cycle/spinners/0/task/comm",
        "/structures/statements/0",
        "/structures/spinners/0/task/comm",
        "/structures/spinners/0/function",
        "/structures/spinners/0/memory",
        "/structures/holders/0/task/comm",
        "/structures/holders/0/function",
        "/structures/holders/0/waits_for/current/comm",
        "/structures/holders/0/waits_for/function",
        "/structures/holders/0/waits_for/worker/comm",
        "/complaints/0/title",
        "/complaints/0/task/comm",
        "/complaints/0/stack/0/function",
        "/complaints/0/stack/0/module",
        "/provenance/host",
        "/provenance/qemu_version",
        "/provenance/qemu_command_line",
        "/provenance/kernel_command_line",
        "/provenance/device_command_line",
        "/provenance/image/kernel_version",
        "/provenance/image/cc",
        "/provenance/image/flavour",
        "/run/parameters/folio",
    ] {
        let at = path.rsplit_once('/').map(|(parent, name)| (parent.to_owned(), name.to_owned()));
        if let Some((parent, name)) = at {
            match record.pointer_mut(&parent) {
                Some(Value::Object(fields)) => {
                    fields.insert(name, json!(HOSTILE));
                }
                Some(Value::Array(items)) => items[name.parse::<usize>().expect("an index")] = json!(HOSTILE),
                _ => panic!("{path} is not in the sample"),
            }
        }
    }
    record["evidence"] = json!([{ "source": "console", "weight": "for", "says": HOSTILE, "line": 3 }]);
    record["also"] = json!([HOSTILE]);
    record["provenance"]["image"]["patches"] =
        json!([{ "name": HOSTILE, "origin": "user", "sha256": HOSTILE }]);
    record["run"]["parameters"][HOSTILE] = json!(HOSTILE);
    record
}

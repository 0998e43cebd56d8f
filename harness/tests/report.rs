//! `hmmstorm report` as a user sees it: what it writes is read back, what was killed is told, what is hostile stays text.
//!
//! `HMMSTORM_BLESS=1` writes the expected outputs in `tests/data/report/` anew.

mod sample;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use sample::{HOSTILE, Sample, hostile, matrix, record};
use serde_json::{Value, json};

struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn report(place: &Path, args: &[&str]) -> Said {
    let cache = tempfile::tempdir().expect("folder");
    let output = Command::new(env!("CARGO_BIN_EXE_hmmstorm"))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .env("HMMSTORM_CACHE", cache.path())
        .arg("report")
        .arg(place)
        .args(args)
        .output()
        .expect("hmmstorm");
    Said {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The report in a format, which has to come about.
#[track_caller]
fn rendered(place: &Path, format: &str) -> String {
    let said = report(place, &["--format", format, "--out", "-"]);
    assert_eq!(said.code, Some(0), "{format}: {}", said.stderr);
    said.stdout
}

/// A folder with these records, as a matrix leaves them.
fn folder(records: &[Value]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("folder");
    let lines: Vec<String> = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(folder.path().join("runs.jsonl"), lines.concat()).expect("records");
    let path = folder.path().to_owned();
    (folder, path)
}

/// Two variants, two models, two seeds: small enough to read.
fn small() -> Vec<Value> {
    let wanted = |record: &Value| {
        let run = &record["run"];
        ["trylock", "wait-on-locked"].contains(&run["variant"].as_str().expect("a variant"))
            && ["none", "full"].contains(&run["preempt"].as_str().expect("a model"))
            && run["cpus"] == 4
    };
    matrix(3).into_iter().filter(wanted).collect()
}

#[test]
fn outputs_are_what_they_were() {
    let (_folder, place) = folder(&small());
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/report");
    for (format, file) in [("markdown", "mail.md"), ("ktap", "report.ktap"), ("github", "summary.md")] {
        let got = rendered(&place, format);
        let file = data.join(file);
        if std::env::var_os("HMMSTORM_BLESS").is_some() {
            fs::create_dir_all(&data).expect("folder");
            fs::write(&file, &got).expect("blessed");
        }
        let wanted = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        assert_eq!(got, wanted, "{}; if that is intended: HMMSTORM_BLESS=1", file.display());
    }
}

#[test]
fn a_mail_is_narrow_ascii_without_html() {
    for records in [matrix(2), vec![hostile()]] {
        let (_folder, place) = folder(&records);
        for line in rendered(&place, "markdown").lines() {
            assert!(line.len() <= 76, "{} columns: {line}", line.len());
            assert!(line.is_ascii() && !line.contains('\x1b'), "{line:?}");
            let code = line.starts_with("    ");
            assert!(code || !line.contains("<script") || line.contains("\\<script"), "{line}");
        }
    }
}

/// Reads KTAP: numbers of tests and of failures, by depth; panics where it is not well-formed.
fn read_ktap(text: &str) -> Vec<(usize, usize)> {
    let mut counts: Vec<(usize, usize)> = vec![(0, 0); 2];
    // Plan, and the next number, of each open depth.
    let mut open: Vec<(usize, usize)> = Vec::new();
    for line in text.lines() {
        let depth = (line.len() - line.trim_start().len()) / 2;
        let line = line.trim_start();
        if line.starts_with('#') {
            continue;
        }
        if line == "KTAP version 1" {
            assert_eq!(open.len(), depth, "a version out of place");
            open.push((0, 1));
        } else if let Some(plan) = line.strip_prefix("1..") {
            open.last_mut().expect("a version before a plan").0 = plan.parse().expect("a plan");
        } else {
            let failed = line.starts_with("not ok ");
            let rest = line.strip_prefix("not ok ").or(line.strip_prefix("ok ")).expect("a result");
            if open.len() == depth + 2 {
                let (plan, next) = open.pop().expect("subtests");
                assert_eq!(next, plan + 1, "subtests before {line}");
            }
            let number: usize = rest.split(' ').next().expect("a number").parse().expect("a number");
            let (_, next) = open.last_mut().expect("a plan before results");
            assert_eq!(number, *next, "{line}");
            *next += 1;
            counts[depth].0 += 1;
            counts[depth].1 += usize::from(failed);
        }
    }
    let (plan, next) = open.pop().expect("a plan");
    assert!(open.is_empty() && next == plan + 1, "{plan} tests were planned");
    counts
}

#[test]
fn ktap_reads_back() {
    let (_folder, place) = folder(&matrix(3));
    // 64 cells of 3 runs; one seed of 3 hangs in the four cells of one variant with huge folios.
    assert_eq!(read_ktap(&rendered(&place, "ktap")), [(64, 4), (192, 4)]);
    let (_folder, place) = folder(&[hostile()]);
    assert_eq!(read_ktap(&rendered(&place, "ktap")), [(1, 1), (1, 1)]);
}

#[test]
fn junit_reads_back() {
    let (_folder, place) = folder(&matrix(3));
    let read = quick_junit::Report::deserialize_from_str(&rendered(&place, "junit")).expect("JUnit");
    assert_eq!((read.test_suites.len(), read.tests, read.failures, read.errors), (64, 192, 4, 0));
    let (_folder, place) = folder(&[hostile()]);
    let read = quick_junit::Report::deserialize_from_str(&rendered(&place, "junit")).expect("JUnit");
    assert_eq!((read.tests, read.failures), (1, 1));
}

#[test]
fn json_has_counts_findings_and_comparisons() {
    let (_folder, place) = folder(&matrix(20));
    let read: Value = serde_json::from_str(&rendered(&place, "json")).expect("JSON");
    assert_eq!((&read["runs"], read["cells"].as_array().map(Vec::len)), (&json!(1280), Some(64)));
    assert_eq!(read["findings"].as_array().map(Vec::len), Some(1), "one livelock, however often");
    let shown = read["comparisons"].as_array().expect("comparisons");
    let said = |variant: &str, quantity: &str, call: &str| {
        shown
            .iter()
            .any(|one| one["variant"] == variant && one["quantity"] == quantity && one["call"] == call)
    };
    assert!(said("wait-on-locked", "failures", "better"), "{shown:#?}");
    assert!(said("wait-on-locked", "latency-p50", "worse"), "{shown:#?}");
}

#[test]
fn a_hostile_guest_writes_no_markup() {
    let mut records = small();
    records.push(hostile());
    let (_folder, place) = folder(&records);
    for format in ["html", "github", "markdown", "ktap", "junit", "json"] {
        let text = rendered(&place, format);
        let hidden = |c: char| c.is_control() && c != '\n' || ('\u{202a}'..='\u{202e}').contains(&c);
        assert!(!text.contains(hidden), "{format} has a hidden character");
        // Where a line is a statement, it makes none.
        let forged = |line: &str| line.trim_start().starts_with("ok 99");
        assert!(format != "ktap" || !text.lines().any(forged), "{text}");
        if matches!(format, "html" | "github" | "junit") {
            for markup in ["<script", "<img src=http", "<b>\n", "]]>"] {
                assert!(!text.contains(markup), "{format} has {markup}");
            }
        }
    }
    let html = rendered(&place, "html");
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"), "it is shown as what it is");
    assert!(html.contains("default-src 'none'"));
    // Each row of a table has as many cells as its head.
    let github = rendered(&place, "github");
    let mut columns = 0;
    for line in github.lines().filter(|line| line.starts_with('|')) {
        let bars = line.matches('|').count();
        columns = if line.starts_with("| |") { bars } else { columns };
        assert_eq!(bars, columns, "{line}");
    }
    assert!(HOSTILE.contains("<script>"));
}

#[test]
fn pages_need_nothing_from_elsewhere() {
    let (_folder, place) = folder(&matrix(20));
    let html = rendered(&place, "html");
    assert!(html.len() < 3_000_000, "{} bytes", html.len());
    for word in ["<script", "<link rel=\"stylesheet", "@import", "url(", "src=\"http", "href=\"http"] {
        assert!(!html.contains(word), "{word}");
    }
    for part in [
        "Matrix",
        "Comparison",
        "Findings",
        "Latency",
        "Survival",
        "Provenance",
        "hmmstorm storm drain-livelock",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // A page goes beside the records unless told otherwise.
    assert_eq!(report(&place, &[]).code, Some(0));
    assert_eq!(fs::read_to_string(place.join("report.html")).expect("a page"), html);
}

#[test]
fn what_was_killed_is_reported_with_what_is_missing() {
    let records = small();
    let (_folder, place) = folder(&records);
    let file = place.join("runs.jsonl");
    let whole = fs::read_to_string(&file).expect("records");
    let other_schema = whole.lines().next().expect("a line").replacen("\"schema\":1", "\"schema\":99", 1);
    let torn = &whole[..whole.len() - 700];
    fs::write(&file, format!("{other_schema}\nnonsense\n{torn}")).expect("records");
    let running = place.join("runs/cell/seed-9");
    fs::create_dir_all(&running).expect("folder");
    fs::write(running.join("console.log"), "[ 0.1] booting\n").expect("console");
    for format in ["html", "markdown", "ktap", "junit", "github", "json"] {
        let text = rendered(&place, format);
        assert!(text.contains("schema 99"), "{format}: {text:.2000}");
        let flat = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(flat.contains("breaks off"), "{format}");
        assert!(flat.contains("a run without a verdict"), "{format}");
    }
    let read: Value = serde_json::from_str(&rendered(&place, "json")).expect("JSON");
    assert_eq!(read["runs"], json!(records.len() - 1));
    assert_eq!(read["troubles"].as_array().map(Vec::len), Some(4));
}

#[test]
fn a_plan_says_what_is_missing_even_of_nothing() {
    let (_folder, place) = folder(&[]);
    let said = report(&place, &["--plan", "ci/plans/small.toml", "--format", "markdown", "--out", "-"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stdout.contains("0 of 2 runs are there"), "{}", said.stdout);
    let said = report(&place, &[]);
    assert_eq!(said.code, Some(2), "a folder without anything is a wrong command line");
    assert!(said.stderr.contains("holds no run record"), "{}", said.stderr);
}

#[test]
fn the_same_run_counts_once_and_two_outcomes_of_it_are_told() {
    let sample = Sample {
        variant: "trylock",
        preempt: "none",
        cpus: 4,
        folio: "4K",
        seed: 1,
        verdict: "livelock",
        expected: "livelock",
    };
    let mut once = record(sample);
    once["run"]["mode"] = json!("deterministic");
    let (_folder, place) = folder(&[once.clone()]);
    let run = place.join("runs/a");
    fs::create_dir_all(&run).expect("folder");
    fs::write(run.join("verdict.json"), once.to_string()).expect("verdict");
    let read: Value = serde_json::from_str(&rendered(&place, "json")).expect("JSON");
    assert_eq!((&read["runs"], &read["conflicts"]), (&json!(1), &json!([])));
    let mut again = once;
    again["files"]["console.log"]["sha256"] = json!("cd".repeat(32));
    fs::write(run.join("verdict.json"), again.to_string()).expect("verdict");
    let read: Value = serde_json::from_str(&rendered(&place, "json")).expect("JSON");
    assert_eq!(read["conflicts"][0]["what"], "console.log");
    let flat = rendered(&place, "markdown").split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("not deterministic"), "{flat}");
}

/// A run's folder: it boots, storms, hangs; one CPU was sampled.
fn run_folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("folder");
    let sample = Sample {
        variant: "trylock",
        preempt: "none",
        cpus: 2,
        folio: "4K",
        seed: 1,
        verdict: "livelock",
        expected: "livelock",
    };
    let write = |name: &str, text: String| fs::write(folder.path().join(name), text).expect("written");
    write("verdict.json", record(sample).to_string());
    let progress = |t: u64, operations: u64| {
        json!({ "t": t, "event": "progress", "round": 1, "operations": operations, "faults": operations, "outstanding": 1,
                "workers": [operations], "pids": [58] })
    };
    let events = [
        json!({ "t": 1_000_000_000_u64, "event": "hello", "version": "1", "kernel": "6.19.6", "cpus": 2 }),
        json!({ "t": 1_500_000_000_u64, "event": "bound", "gpus": 2 }),
        json!({ "t": 2_000_000_000_u64, "event": "start", "scenario": "s", "seed": 1, "parameters": {}, "workers": [HOSTILE] }),
        progress(2_500_000_000, 10),
        progress(3_000_000_000, 20),
    ];
    write("events.jsonl", events.map(|event| format!("{event}\n")).concat() + "{\"t\": 3");
    let stack = |at: u64, stack: &[&str]| {
        format!("{}\n", json!({ "at_ms": at, "cpu": 1, "mode": "kernel", "complete": true, "stack": stack }))
    };
    let samples = stack(4000, &["do_swap_page", "hmm_range_fault", "ioctl"])
        + &stack(4100, &["hmm_range_fault", "ioctl"]);
    write("samples.jsonl", samples);
    folder
}

#[test]
fn a_timeline_has_phases_counters_and_balanced_stacks() {
    let folder = run_folder();
    let cache = tempfile::tempdir().expect("folder");
    let trace = |place: &Path| {
        Command::new(env!("CARGO_BIN_EXE_hmmstorm"))
            .env("HMMSTORM_CACHE", cache.path())
            .arg("trace")
            .arg(place)
            .output()
            .expect("hmmstorm")
    };
    let output = trace(folder.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(folder.path().join("trace.json")).expect("a trace");
    assert!(!text.contains('\x1b'));
    let read: Value = serde_json::from_str(&text).expect("JSON");
    let events = read["traceEvents"].as_array().expect("events");
    let of = |ph: &str| events.iter().filter(|event| event["ph"] == ph).collect::<Vec<_>>();
    let phases: Vec<_> = of("X").iter().map(|event| (event["name"].clone(), event["dur"].clone())).collect();
    let wanted = [("boot", 1e6), ("bind the GPUs", 0.5e6), ("scenario", 1e6)];
    assert_eq!(phases, wanted.map(|(name, dur)| (json!(name), json!(dur))));
    assert_eq!(of("C").iter().filter(|event| event["name"] == "operations").count(), 2);
    // Three slices opened, and each closed, in the reverse order.
    let opened: Vec<_> = of("B").iter().map(|event| event["name"].clone()).collect();
    let closed: Vec<_> = of("E").iter().map(|event| event["name"].clone()).collect();
    assert_eq!(opened, ["ioctl", "hmm_range_fault", "do_swap_page"]);
    assert_eq!(closed, ["do_swap_page", "hmm_range_fault", "ioctl"]);
    // 1900 ms of host time are 1000 ms of guest time.
    assert_eq!(of("B")[0]["ts"], json!(3_100_000.0));
    assert_eq!(of("i").len(), 1, "the kernel's complaint");
    assert_eq!(trace(cache.path()).status.code(), Some(2));
}

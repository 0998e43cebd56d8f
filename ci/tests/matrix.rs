//! A matrix that is killed goes on where it was, shards merge into the whole, and the capsule of what was found makes the
//! same bytes again.

use std::path::Path;
use std::process::{Child, Output};
use std::time::{Duration, Instant};

use hmmstorm_smoke::{code, evidence, hmmstorm, text};

/// Two cells of two seeds: the bug and its cure. A shard of two has one run of each.
const PLAN: &str = "format = 1\nname = 'two'\nsummary = 'bug and cure'\n\
    [[group]]\nname = 'both'\nabout = 'bug and cure'\nscenario = 'drain-livelock'\n\
    variant = ['trylock', 'wait-on-locked']\npreempt = 'none'\ncpus = 2\nmode = 'deterministic'\n\
    parameters = { rounds = 30 }\nseeds = 2\nexpect = [{ when = { variant = 'trylock' }, verdict = 'livelock' }]\n";

/// Time for builds and one run, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(1800);

fn records(folder: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(folder.join("runs.jsonl")).unwrap_or_default();
    // A line without an end is not written yet.
    let lines = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    lines.map(|line| serde_json::from_str(line).expect("a record")).collect()
}

fn verdicts(records: &[serde_json::Value]) -> Vec<&str> {
    let mut verdicts: Vec<_> = records.iter().map(|r| r["verdict"].as_str().expect("a verdict")).collect();
    verdicts.sort_unstable();
    verdicts
}

fn matrix(plan: &Path, arguments: &[&str], out: &Path) -> Output {
    let mut command = hmmstorm();
    command.arg("matrix").arg(plan).args(arguments).arg("--out").arg(out);
    command.output().expect("hmmstorm runs")
}

/// Waits until the matrix has kept its first run, and is within its second.
fn wait_for_a_record(matrix: &mut Child, folder: &Path) {
    let end = Instant::now() + PATIENCE;
    while records(folder).is_empty() {
        let status = matrix.try_wait().expect("waitable");
        assert!(status.is_none(), "the matrix ended before it had kept a run: {status:?}");
        assert!(Instant::now() < end, "no run within {} s", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn killed_resumed_merged_and_replayed() {
    let folder = evidence("matrix");
    let plan = folder.join("two.toml");
    std::fs::write(&plan, PLAN).expect("write the plan");
    let [one, two, all] = ["one", "two", "all"].map(|name| folder.join(name));

    let mut first = hmmstorm()
        .arg("matrix")
        .arg(&plan)
        .args(["--shard", "1/2", "--jobs", "1", "--quiet", "--out"])
        .arg(&one)
        .spawn()
        .expect("hmmstorm runs");
    wait_for_a_record(&mut first, &one);
    first.kill().expect("killed");
    first.wait().expect("ended");
    let before = records(&one);
    assert_eq!(before.len(), 1, "killed within the second run");

    let resumed = matrix(&plan, &["--shard", "1/2"], &one);
    assert_eq!(code(&resumed), 0, "{}", text(&resumed));
    assert!(text(&resumed).contains("1 of them done before"), "{}", text(&resumed));
    let after = records(&one);
    assert_eq!(after[0], before[0], "what was done is not done again");
    assert_eq!(verdicts(&after), ["livelock", "pass"]);

    let other = matrix(&plan, &["--shard", "2/2"], &two);
    assert_eq!(code(&other), 0, "{}", text(&other));
    let shards = [one.to_str().expect("a path"), two.to_str().expect("a path")];
    let merged = matrix(&plan, &["--merge", shards[1], shards[0], shards[0]], &all);
    assert_eq!(code(&merged), 0, "{}", text(&merged));
    let whole = records(&all);
    assert_eq!(verdicts(&whole), ["livelock", "livelock", "pass", "pass"]);

    let findings = std::fs::read_to_string(all.join("findings.json")).expect("findings");
    let findings: serde_json::Value = serde_json::from_str(&findings).expect("findings");
    assert_eq!(findings.as_array().map(Vec::len), Some(1), "one bug, one finding: {findings:#}");
    assert_eq!(findings[0]["runs"].as_array().map(Vec::len), Some(2));
    let capsule = all.join(findings[0]["capsule"].as_str().expect("a capsule"));
    let mut replay = hmmstorm();
    replay.arg("replay").arg(&capsule).arg("--out").arg(folder.join("replay"));
    let replay = replay.output().expect("hmmstorm runs");
    assert_eq!(code(&replay), 0, "{}", text(&replay));
    for says in ["built here as it was, to the byte", "by the same finding, with the same bytes"] {
        assert!(text(&replay).contains(says), "{}", text(&replay));
    }
}

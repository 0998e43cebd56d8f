//! `hmmstorm ctl` and `hmmstorm top` on a machine that runs: counters that move, and a fault plan that is put in force from
//! outside and found out by the storm's oracle.

use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use hmmstorm_smoke::{code, evidence, hmmstorm, text};

/// Time for a boot, or for a change to show, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn ctl(run: &Path, arguments: &[&str]) -> Output {
    hmmstorm().args(["ctl", "--run"]).arg(run).args(arguments).output().expect("hmmstorm runs")
}

/// Waits until something holds, while the storm runs.
fn wait_until<T>(storm: &mut Child, what: &str, mut holds: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = holds() {
            return value;
        }
        let ended = storm.try_wait().expect("waitable");
        assert!(ended.is_none(), "the storm ended before {what}: {ended:?}");
        assert!(Instant::now() < end, "not within {} s: {what}", PATIENCE.as_secs());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Descriptors that all GPUs completed, of a machine that answers.
fn completions(run: &Path) -> Option<u64> {
    let output = ctl(run, &["stats", "--json"]);
    let gpus: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).ok()?;
    assert_eq!(gpus.len(), 2, "{}", text(&output));
    Some(gpus.iter().map(|gpu| gpu["completions"].as_u64().expect("a counter")).sum())
}

#[test]
fn counters_move_and_a_fault_plan_from_outside_is_found_out() {
    let folder = evidence("ctl");
    let log = std::fs::File::create(folder.join("storm.log")).expect("a log");
    let mut storm = hmmstorm()
        .args([
            "storm",
            "smoke",
            "--cpus",
            "2",
            "--param",
            "rounds=1000000",
            "--expect",
            "corruption",
            "--out",
        ])
        .arg(&folder)
        .stdout(Stdio::from(log))
        .stderr(Stdio::null())
        .spawn()
        .expect("hmmstorm runs");
    let run = folder.join("0000-seed-1");
    let before = wait_until(&mut storm, "its GPUs work", || completions(&run).filter(|&count| count > 0));
    wait_until(&mut storm, "they complete more", || completions(&run).filter(|&count| count > before));

    let top = hmmstorm().args(["top", "--once"]).output().expect("hmmstorm runs");
    assert_eq!(code(&top), 0, "{}", text(&top));
    assert!(text(&top).contains("0000-seed-1"), "{}", text(&top));
    let wrong = ctl(&run, &["chaos", "corrupt-evry=1"]);
    assert_eq!(code(&wrong), 2, "{}", text(&wrong));

    let broken = ctl(&run, &["chaos", "corrupt-every=1"]);
    assert_eq!(code(&broken), 0, "{}", text(&broken));
    // It ends by itself, or the test's own limit ends it.
    assert_eq!(storm.wait().expect("ended").code(), Some(0), "see {}", folder.join("storm.log").display());
    let gone = ctl(&run, &["stats"]);
    assert_eq!(code(&gone), 2, "{}", text(&gone));
}

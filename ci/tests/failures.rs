//! When the bench itself breaks: a clear error, exit code 2 or 3, never a verdict about the kernel, nothing left.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hmmstorm_smoke::{code, evidence, hmmstorm, processes_with, root, text};
use rustix::process::{Pid, Signal, kill_process};

/// A running `hmmstorm`, ended with the test that started it.
struct Harness(Option<Child>);

impl Harness {
    /// Starts a long storm that keeps its evidence in `folder`, and waits until the guest reports progress.
    fn storming(folder: &Path) -> Self {
        let arguments = ["drain-livelock", "--variant", "wait-on-locked", "--param", "rounds=100000"];
        let child = hmmstorm()
            .arg("storm")
            .args(arguments)
            .arg("--out")
            .arg(folder)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("hmmstorm starts");
        let mut harness = Self(Some(child));
        let deadline = Instant::now() + Duration::from_secs(120);
        while !find(folder, "events.jsonl").is_some_and(|file| {
            std::fs::read_to_string(file).unwrap_or_default().contains(r#""event":"progress""#)
        }) {
            if harness.0.as_mut().is_some_and(|child| child.try_wait().expect("our own child").is_some()) {
                panic!("it ended before the storm began:\n{}", text(&harness.finish()));
            }
            assert!(Instant::now() < deadline, "no progress within 120 s; see {}", folder.display());
            std::thread::sleep(Duration::from_millis(100));
        }
        harness
    }

    fn id(&self) -> u32 {
        self.0.as_ref().expect("running").id()
    }

    fn finish(mut self) -> Output {
        self.0.take().expect("running").wait_with_output().expect("hmmstorm ends")
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // It may have ended by itself; then there is nothing to kill.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn find(folder: &Path, name: &str) -> Option<std::path::PathBuf> {
    std::fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() { find(&path, name) } else { (entry.file_name() == name).then_some(path) }
    })
}

/// Processes below `parent` whose command line contains `needle`.
fn children_of(parent: u32, needle: &str) -> Vec<u32> {
    let parent_of = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    processes_with(needle).into_iter().filter(|&pid| parent_of(pid) == Some(parent)).collect()
}

fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("not zero");
    kill_process(pid, signal).expect("signal our own process");
}

/// Waits until none of `pids` is left.
fn gone(pids: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while pids.iter().any(|pid| {
        // A zombie that waits for its reaper runs no more.
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }) {
        assert!(Instant::now() < deadline, "processes {pids:?} outlive the harness");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn family(parent: u32) -> Vec<u32> {
    let mut all = children_of(parent, "qemu-system");
    all.extend(children_of(parent, "hmmstorm-device"));
    assert_eq!(all.len(), 2, "a QEMU and a device expected");
    all
}

/// Kills `victim` under a running storm; the harness must say harness-error and end with 3.
fn killed(name: &str, victim: &str) {
    let folder = evidence(name);
    let harness = Harness::storming(&folder);
    let family = family(harness.id());
    signal(children_of(harness.id(), victim)[0], Signal::KILL);
    let output = harness.finish();
    assert_eq!(code(&output), 3, "{}", text(&output));
    let verdict = find(&folder, "verdict.json").expect("a verdict.json even so");
    let verdict = std::fs::read_to_string(verdict).expect("readable");
    assert!(verdict.contains("harness-error"), "{verdict}");
    gone(&family);
}

#[test]
fn killed_device_is_a_harness_error() {
    killed("killed-device", "hmmstorm-device");
}

#[test]
fn killed_qemu_is_a_harness_error() {
    killed("killed-qemu", "qemu-system");
}

#[test]
fn killed_harness_leaves_nothing_running() {
    let harness = Harness::storming(&evidence("killed-harness"));
    let family = family(harness.id());
    signal(harness.id(), Signal::KILL);
    drop(harness);
    gone(&family);
}

#[test]
fn interrupt_ends_everything() {
    let harness = Harness::storming(&evidence("interrupted"));
    let family = family(harness.id());
    signal(harness.id(), Signal::INT);
    let output = harness.finish();
    assert_ne!(code(&output), 0, "an interrupted storm has not passed: {}", text(&output));
    gone(&family);
}

#[test]
fn wrong_usage_is_exit_code_two() {
    for arguments in [
        &["storm", "no-such-scenario"][..],
        &["storm", "drain-livelock", "--variant", "no-such-variant"],
        &["storm", "drain-livelock", "--control", "no-such-control"],
        &["storm", "drain-livelock", "--param", "rounds=none"],
        &["storm", "drain-livelock", "--param", "no-such-parameter=1"],
        &["storm", "drain-livelock", "--expect", "sunshine"],
        &["storm", "drain-livelock", "--no-such-option"],
        &["build", "--kernel", "0.0.1"],
        &["run", "--chaos", "no-such-key=1"],
    ] {
        let output = hmmstorm().args(arguments).output().expect("hmmstorm runs");
        assert_eq!(code(&output), 2, "{arguments:?}: {}", text(&output));
        assert!(!text(&output).trim().is_empty(), "{arguments:?} fails without a word");
    }
}

/// A file system of 40 MiB, in a mount namespace of the test's own, that something else fills while the storm runs.
#[test]
fn disk_that_fills_up_is_a_harness_error() {
    const SCRIPT: &str = r#"
        mount -t tmpfs -o size=40m tmpfs "$1" || exit 77
        "$2" storm drain-livelock --variant wait-on-locked --param rounds=100000 --out "$1/out" &
        until grep -q '"event":"progress"' "$1"/out/*/events.jsonl 2>/dev/null; do
            kill -0 $! 2>/dev/null || break
            sleep 0.1
        done
        cat /dev/zero > "$1/fill" 2>/dev/null
        wait $!"#;
    let folder = evidence("full-disk");
    let started = Instant::now();
    let output = Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", SCRIPT, "sh"])
        .arg(&folder)
        .arg(hmmstorm().get_program())
        .current_dir(root())
        .output()
        .expect("unshare");
    if output.status.code() == Some(77) || text(&output).contains("unshare failed") {
        println!("skipped: this host allows no mount in a namespace: {}", text(&output));
        return;
    }
    assert_eq!(code(&output), 3, "{}", text(&output));
    let said = text(&output);
    assert!(said.contains("No space left") || said.contains("MiB free"), "{said}");
    assert!(started.elapsed() < Duration::from_secs(60), "it went on for {:?}", started.elapsed());
}

//! Machines made of fakes in place of QEMU and device: how each end of a machine is told, and that nothing is left
//! behind. The fakes are this test binary itself: see `fake_device` and `fake_qemu`.

use std::env;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Time in which something must have happened that takes milliseconds.
const SOON: Duration = Duration::from_secs(20);

/// A folder with a fake QEMU, a fake device, and an image of empty files.
struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new(qemu: &str, device: &str) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let lab = Self { dir };
        lab.script("qemu", qemu);
        lab.script("device", device);
        for file in ["kernel", "initramfs", "vmlinux"] {
            fs::write(lab.path(file), "").expect(file);
        }
        let image = serde_json::json!({
            "boot_kernel": lab.path("kernel"),
            "vmlinux": lab.path("vmlinux"),
            "initramfs": lab.path("initramfs"),
            "modules": {},
            "provenance": {
                "kernel_version": "0", "kernel_source_sha256": "", "patches": [], "variant": "", "flavour": "",
                "config_sha256": "", "driver_sha256": "", "storm_sha256": "", "rustc": "", "bindgen": "", "cc": "",
                "libclang": "",
            },
        });
        fs::write(lab.path("image.json"), image.to_string()).expect("image.json");
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, body: &str) {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{body}\n")).expect(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect(name);
    }

    fn run(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hmmstorm"));
        command
            .args(["run", "--accel", "tcg"])
            .arg("--image")
            .arg(self.path("image.json"))
            .arg("--qemu")
            .arg(self.path("qemu"))
            .arg("--device")
            .arg(self.path("device"))
            .arg("--folder")
            .arg(self.path("run"))
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
            .env("HMMSTORM_CACHE", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.dir.path())
            .stdin(Stdio::null());
        command
    }

    /// Exit code and stderr.
    fn fails(&self) -> (Option<i32>, String) {
        let output = self.run().output().expect("hmmstorm");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn socket_folders(&self) -> usize {
        let names = fs::read_dir(self.dir.path()).expect("folder").flatten().map(|e| e.file_name());
        names.filter(|n| n.to_string_lossy().starts_with("hmmstorm-")).count()
    }
}

/// A script that becomes one of the fakes below.
fn fake(test: &str, setting: &str) -> String {
    let me = env::current_exe().expect("path");
    format!(
        r#"echo $$ > "$0.pid"; FAKE={setting} FAKE_ARGS="$*" exec '{}' --ignored --exact {test} --nocapture"#,
        me.display()
    )
}

/// What follows `before` in the arguments of a fake, up to a blank or comma.
fn argument(before: &str) -> Option<PathBuf> {
    let args = env::var("FAKE_ARGS").ok()?;
    let (_, rest) = args.split_once(before)?;
    rest.split([' ', ',']).next().map(PathBuf::from)
}

#[test]
#[ignore = "a device for the other tests"]
fn fake_device() {
    let Some(dir) = argument("--socket-dir ") else { return };
    let _control = UnixListener::bind(dir.join("control.sock")).expect("bind");
    println!("{{\"ready\":true}}");
    std::io::stdin().read_to_end(&mut Vec::new()).expect("stdin");
    process::exit(0);
}

#[test]
#[ignore = "a QEMU for the other tests"]
fn fake_qemu() {
    let (Some(console), Some(qmp)) =
        (argument("id=console,server=off,path="), argument("id=qmp,server=off,path="))
    else {
        return;
    };
    let mut console = UnixStream::connect(console).expect("console");
    let mut qmp = UnixStream::connect(qmp).expect("QMP");
    let version = r#"{"qemu":{"micro":3,"minor":1,"major":11},"package":""}"#;
    writeln!(qmp, r#"{{"QMP":{{"version":{version},"capabilities":[]}}}}"#).expect("greeting");
    BufReader::new(qmp.try_clone().expect("clone")).read_line(&mut String::new()).expect("qmp_capabilities");
    writeln!(qmp, r#"{{"return":{{}}}}"#).expect("answer");
    let mut events =
        fs::File::options().append(true).open(argument("id=events,path=").expect("events")).expect("events");
    // In two pieces, as the follower must cope with.
    write!(events, r#"{{"t":1,"event":"hello","version":"0","#).expect("events");
    writeln!(events, r#""kernel":"fake","cpus":1}}"#).expect("events");
    writeln!(console, "a line from the guest").expect("console");
    let mut shutdown = |reason: &str| {
        let data = format!(r#"{{"guest":true,"reason":"{reason}"}}"#);
        let stamp = r#"{"seconds":1,"microseconds":0}"#;
        writeln!(qmp, r#"{{"timestamp":{stamp},"event":"SHUTDOWN","data":{data}}}"#).expect("event");
    };
    match env::var("FAKE").as_deref() {
        Ok("poweroff") => shutdown("guest-shutdown"),
        Ok("reset") => shutdown("guest-reset"),
        Ok("crash") => {
            eprintln!("util/error.c:62: assertion");
            process::abort();
        }
        _ => {
            console.read_to_end(&mut Vec::new()).expect("console");
        }
    }
    process::exit(0);
}

fn good_device() -> String {
    fake("fake_device", "")
}

#[test]
fn a_qemu_that_refuses_to_start_is_exit_code_3_with_its_own_words() {
    let lab = Lab::new("echo 'qemu: no such machine' >&2; exit 1", &good_device());
    let (code, stderr) = lab.fails();
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("QEMU ended by itself (exit status: 1)"), "{stderr}");
    assert!(stderr.contains("qemu: no such machine") && stderr.contains("qemu.log"), "{stderr}");
    assert_eq!(lab.socket_folders(), 0);
}

#[test]
fn a_device_that_dies_is_exit_code_3_with_its_own_words() {
    let lab = Lab::new("exec sleep 1000", "echo 'no memory for VRAM' >&2; exit 9");
    let (code, stderr) = lab.fails();
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("exit status: 9") && stderr.contains("no memory for VRAM"), "{stderr}");
    assert_eq!(lab.socket_folders(), 0);
}

#[test]
fn every_end_of_a_guest_has_its_exit_code() {
    for (end, expected, words) in [
        ("poweroff", 0, ""),
        ("reset", 1, "the guest reset itself"),
        ("crash", 3, "QEMU ended by itself (signal: 6 (SIGABRT)"),
    ] {
        let lab = Lab::new(&fake("fake_qemu", end), &good_device());
        let output = lab.run().output().expect("hmmstorm");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(expected), "{end}: {stderr}");
        assert!(stderr.contains(words), "{end}: {stderr}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "a line from the guest\n", "{end}");
        assert_eq!(lab.socket_folders(), 0, "{end}");
        for file in ["qemu.cmdline", "device.cmdline", "events.jsonl", "console.log"] {
            assert!(lab.path("run").join(file).is_file(), "{end}: {file}");
        }
    }
}

#[test]
fn a_device_that_is_killed_under_a_running_guest_is_named() {
    let lab = Lab::new(&fake("fake_qemu", "stay"), &good_device());
    let mut harness = lab.run().stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("hmmstorm");
    // The guest's first words: both run.
    let mut stdout = BufReader::new(harness.stdout.take().expect("piped"));
    stdout.read_line(&mut String::new()).expect("a line");
    let device = pid_from(&lab.path("device.pid"), &mut harness);
    let qemu = pid_from(&lab.path("qemu.pid"), &mut harness);
    rustix::process::kill_process(device, rustix::process::Signal::KILL).expect("kill");
    let output = harness.wait_with_output().expect("wait");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("the device ended while the guest ran (signal: 9 (SIGKILL))"), "{stderr}");
    ends(qemu, "QEMU");
}

/// Waits until a fake has written its pid.
fn pid_from(path: &Path, harness: &mut Child) -> Pid {
    let limit = Instant::now() + SOON;
    loop {
        let written =
            fs::read_to_string(path).ok().and_then(|t| t.trim().parse().ok()).and_then(Pid::from_raw);
        if let Some(pid) = written {
            return pid;
        }
        assert!(harness.try_wait().expect("wait").is_none(), "hmmstorm ended early");
        assert!(Instant::now() < limit, "no {}", path.display());
        std::thread::yield_now();
    }
}

fn ends(pid: Pid, what: &str) {
    let Ok(fd) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec { tv_sec: SOON.as_secs() as i64, tv_nsec: 0 };
    let n = rustix::event::poll(&mut fds, Some(&timeout)).expect("poll");
    assert_eq!(n, 1, "{what} (pid {pid:?}) still runs");
}

/// A QEMU that never connects to anybody.
const STUCK_QEMU: &str = r#"echo $$ > "$0.pid"; exec sleep 1000"#;

#[test]
fn a_killed_harness_takes_everything_with_it() {
    let lab = Lab::new(STUCK_QEMU, &good_device());
    let mut harness = lab.run().stderr(Stdio::null()).spawn().expect("hmmstorm");
    let qemu = pid_from(&lab.path("qemu.pid"), &mut harness);
    let device = pid_from(&lab.path("device.pid"), &mut harness);
    harness.kill().expect("kill");
    harness.wait().expect("wait");
    ends(qemu, "QEMU");
    ends(device, "the device");
}

#[test]
fn an_interrupted_harness_ends_everything_and_says_so() {
    let lab = Lab::new(STUCK_QEMU, &good_device());
    let mut harness = lab.run().stderr(Stdio::piped()).spawn().expect("hmmstorm");
    let qemu = pid_from(&lab.path("qemu.pid"), &mut harness);
    let pid = Pid::from_child(&harness);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("kill");
    let output = harness.wait_with_output().expect("wait");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("interrupted"), "{stderr}");
    ends(qemu, "QEMU");
    assert_eq!(lab.socket_folders(), 0);
}

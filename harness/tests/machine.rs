//! Machines made of scripts in place of QEMU and device: what goes wrong, and that nothing is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
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

/// Says ready, makes a control socket that nobody serves, and lives until stdin ends.
const GOOD_DEVICE: &str = r#"
while [ $# -gt 1 ]; do [ "$1" = --socket-dir ] && dir=$2; shift; done
python3 - "$dir" <<'P' >&2
import socket, sys
socket.socket(socket.AF_UNIX).bind(sys.argv[1] + "/control.sock")
s = socket.socket(socket.AF_UNIX)
import os
os.unlink(sys.argv[1] + "/control.sock")
s.bind(sys.argv[1] + "/control.sock")
s.listen()
if os.fork() == 0:
    os.setsid()
    import time
    s.settimeout(30)
    try: s.accept()
    except OSError: pass
    os._exit(0)
P
echo $$ > "${0%device}device.pid"
echo '{"ready":true}'
exec cat > /dev/null
"#;

#[test]
fn a_qemu_that_refuses_to_start_is_exit_code_3_with_its_own_words() {
    let lab = Lab::new("echo 'qemu: no such machine' >&2; exit 1", GOOD_DEVICE);
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

/// Waits until the fake QEMU has written its pid.
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

/// A QEMU that never connects to anybody, and has a child of its own.
const STUCK_QEMU: &str = r#"echo $$ > "${0%qemu}qemu.pid"; exec sleep 1000"#;

#[test]
fn a_killed_harness_takes_everything_with_it() {
    let lab = Lab::new(STUCK_QEMU, GOOD_DEVICE);
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
    let lab = Lab::new(STUCK_QEMU, GOOD_DEVICE);
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

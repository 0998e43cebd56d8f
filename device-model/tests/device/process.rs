//! The process: its ready line, its control socket, its ways to end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};

use hmmstorm_abi::wire::control::{Chaos, Reply, Request};
use tempfile::TempDir;

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hmmstorm-device"));
    command.args(["--vram", "1M", "--socket-dir"]).arg(dir);
    command
}

/// A device process that is ready; killed if a test forgets it.
struct Device {
    child: Child,
    stdin: Option<ChildStdin>,
    dir: TempDir,
}

impl Device {
    fn start(options: &[&str]) -> Self {
        let dir = TempDir::new().expect("a folder");
        let mut child = command(dir.path())
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let ready: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(ready["ready"], true);
        let stdin = child.stdin.take();
        Self { child, stdin, dir }
    }

    fn ends(&mut self) -> ExitStatus {
        let status = self.child.wait().expect("a child");
        let left = std::fs::read_dir(self.dir.path()).expect("the folder").count();
        assert_eq!(left, 0, "sockets left behind");
        status
    }

    fn control(&self) -> Control {
        let stream = UnixStream::connect(self.dir.path().join("control.sock")).expect("the control socket");
        Control { reader: BufReader::new(stream.try_clone().expect("a descriptor")), stream }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("our child");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Fails if it has ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Control {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Control {
    fn send(&mut self, line: &str) -> Option<Reply> {
        // The other side may have hung up on us.
        let _ = self.stream.write_all(line.as_bytes());
        let mut reply = String::new();
        self.reader.read_line(&mut reply).ok()?;
        (!reply.is_empty()).then(|| serde_json::from_str(&reply).expect("a reply of the ABI"))
    }

    fn ask(&mut self, request: &Request) -> Reply {
        let line = serde_json::to_string(request).expect("JSON") + "\n";
        self.send(&line).expect("a reply")
    }
}

#[test]
fn it_ends_when_asked_and_leaves_no_socket() {
    let mut device = Device::start(&["--gpus", "3"]);
    assert!(device.dir.path().join("gpu2.sock").exists());
    assert_eq!(device.control().ask(&Request::Shutdown), Reply::Ok);
    assert!(device.ends().success());
}

#[test]
fn it_ends_on_sigterm_and_sigint() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut device = Device::start(&[]);
        device.signal(signal);
        assert!(device.ends().success());
    }
}

#[test]
fn it_ends_with_its_standard_input_if_so_asked() {
    let mut device = Device::start(&["--exit-with-stdin"]);
    let mut stdin = device.stdin.take().expect("piped");
    stdin.write_all(b"noise").expect("open");
    drop(stdin);
    assert!(device.ends().success());
}

#[test]
fn it_ends_though_a_client_is_connected() {
    let mut device = Device::start(&[]);
    let _client = vfio_user::Client::new(&device.dir.path().join("gpu0.sock")).expect("a session");
    device.signal(rustix::process::Signal::TERM);
    assert!(device.ends().success());
}

#[test]
fn the_control_socket_serves_several_and_survives_nonsense() {
    let device = Device::start(&["--chaos", "fail-every=5"]);
    let (mut a, mut b) = (device.control(), device.control());
    let Reply::Stats { gpus } = a.ask(&Request::Stats) else { panic!("no statistics") };
    assert_eq!(gpus.len(), 2);
    let plan = Chaos { dead: true, ..Chaos::default() };
    assert_eq!(b.ask(&Request::Chaos { gpu: Some(1), plan: plan.clone() }), Reply::Ok);
    assert_eq!(b.ask(&Request::Chaos { gpu: None, plan: plan.clone() }), Reply::Ok);
    assert!(matches!(b.ask(&Request::Chaos { gpu: Some(2), plan }), Reply::Error { .. }));
    let nonsense =
        ["\n", "{}\n", "{\"op\":\"reboot\"}\n", "\u{fffd}\n", "{\"op\":\"chaos\",\"plan\":{\"x\":1}}\n"];
    for line in nonsense {
        assert!(matches!(a.send(line), Some(Reply::Error { .. })), "{line:?}");
    }
    // Two requests in one piece, and one in two.
    let Some(Reply::Stats { .. }) = a.send("{\"op\":\"stats\"}\n{\"op\":") else { panic!("no statistics") };
    let Some(Reply::Stats { .. }) = a.send("\"stats\"}\n") else { panic!("no statistics") };
    // A line without end costs its sender the connection.
    assert!(matches!(a.send(&"x".repeat(1 << 20)), Some(Reply::Error { .. }) | None));
    assert_eq!(a.reader.read_to_end(&mut Vec::new()).unwrap_or(0), 0);
    assert!(matches!(b.ask(&Request::Stats), Reply::Stats { .. }));
}

fn run(dir: &Path, options: &[&str]) -> Output {
    command(dir).args(options).stdin(Stdio::null()).output().expect("the binary")
}

#[test]
fn a_second_process_in_the_same_folder_is_refused() {
    let device = Device::start(&[]);
    let second = run(device.dir.path(), &[]);
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("gpu0.sock is served by another process"), "{said}");
    assert!(matches!(device.control().ask(&Request::Stats), Reply::Stats { .. }));
}

#[test]
fn wrong_options_are_usage_errors() {
    let dir = TempDir::new().expect("a folder");
    for options in [
        &["--vram", "3M"][..],
        &["--aperture", "2M"],
        &["--mode", "fast"],
        &["--chaos", "frobnicate=1"],
        &["--gpus", "0"],
    ] {
        let output = run(dir.path(), options);
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

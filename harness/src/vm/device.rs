//! The GPU's process: started before QEMU, asked over its control socket, ended after QEMU.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use hmmstorm_abi::wire::control::{Chaos, GpuStats, Reply, Request};

use super::children::{Child, SpawnError};
use super::command::CommandLine;
use super::control::Control;
use super::events::Tail;
use super::poll;
use crate::cli::Interrupt;

/// Time for the device to listen on all its sockets.
const START: Duration = Duration::from_secs(10);

/// The running device, with a connection to its control socket.
#[derive(Debug)]
pub struct Device {
    control: Control,
    /// Open as long as the device shall live (`--exit-with-stdin`).
    stdin: Option<ChildStdin>,
    child: Child,
}

/// What went wrong with the device.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It ended before it was ready.
    #[error("the device ended before it was ready ({status}); its log is {}{}", log.display(), super::error::last_words(log))]
    Died {
        /// How.
        status: ExitStatus,
        /// Its stderr.
        log: PathBuf,
    },
    /// It is not ready in time.
    #[error("waited {} s for the device's ready line; its log is {}{}", START.as_secs(), log.display(), super::error::last_words(log))]
    NotReady {
        /// Its stderr.
        log: PathBuf,
    },
    /// The user does not want to wait.
    #[error("interrupted while the device started")]
    Interrupted,
    /// The control socket failed.
    #[error("the device's control socket, at {request}: {source}; the device's log is {}", log.display())]
    Control {
        /// What was asked.
        request: &'static str,
        /// Why there is no answer.
        source: io::Error,
        /// Its stderr.
        log: PathBuf,
    },
    /// The device refused.
    #[error("the device refused {request}: {message}")]
    Refused {
        /// What was asked.
        request: &'static str,
        /// The device's words.
        message: String,
    },
    /// A pipe or file failed.
    #[error("the device's {what}: {source}")]
    Io {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl Device {
    /// Starts the device and waits until it listens on all its sockets.
    pub fn start(
        line: &CommandLine,
        control: &Path,
        log: &Path,
        interrupt: &Interrupt,
    ) -> Result<Self, Error> {
        let io = |what| move |source| Error::Io { what, source };
        let stderr = File::options().append(true).create(true).open(log).map_err(io("log"))?;
        let mut command = Command::new(&line.program);
        command.args(&line.args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = Child::spawn("the device", command, log)?;
        let stdin = child.take_stdin();
        let stdout = child.take_stdout().ok_or_else(|| io("stdout")(io::ErrorKind::NotFound.into()))?;

        // Non-blocking, so that a line that comes in two pieces cannot hold us.
        rustix::io::ioctl_fionbio(&stdout, true).map_err(|e| io("stdout")(e.into()))?;
        let mut ready = Tail::new(Whole(stdout));
        let deadline = Instant::now() + START;
        loop {
            if ready.lines().map_err(io("stdout"))?.iter().any(|line| is_ready(line)) {
                break;
            }
            let fds = [Some(ready.source().0.as_fd()), Some(child.as_fd()), Some(interrupt.as_fd())];
            let [_, ended, interrupted] = poll::readable(fds, Some(deadline)).map_err(io("stdout"))?;
            if interrupted {
                return Err(Error::Interrupted);
            }
            if ended && let Some(status) = child.ended().map_err(io("status"))? {
                return Err(Error::Died { status, log: log.into() });
            }
            if Instant::now() >= deadline {
                return Err(Error::NotReady { log: log.into() });
            }
        }

        let failed = |source| Error::Control { request: "connect", source, log: log.into() };
        let control = Control::connect(control).map_err(failed)?;
        Ok(Self { control, stdin, child })
    }

    /// Counters of every GPU.
    pub fn stats(&mut self) -> Result<Vec<GpuStats>, Error> {
        match self.ask("stats", &Request::Stats)? {
            Reply::Stats { gpus } => Ok(gpus),
            other => Err(self.nonsense("stats", &other)),
        }
    }

    /// Replaces the fault plan of one GPU, or of all.
    pub fn chaos(&mut self, gpu: Option<u8>, plan: Chaos) -> Result<(), Error> {
        match self.ask("chaos", &Request::Chaos { gpu, plan })? {
            Reply::Ok => Ok(()),
            other => Err(self.nonsense("chaos", &other)),
        }
    }

    /// Ends the device; to be called when QEMU is gone. True if it went by itself within the limit and said that all
    /// was well.
    pub fn end(mut self, limit: Duration) -> bool {
        drop(self.stdin.take()); // --exit-with-stdin
        let status = self.child.wait_until(Instant::now() + limit);
        matches!(status, Ok(Some(status)) if status.success())
    }

    /// Its exit status if it has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.ended()
    }

    /// Its exit status, or none within the limit.
    pub fn wait_until(&mut self, deadline: Instant) -> io::Result<Option<ExitStatus>> {
        self.child.wait_until(deadline)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    fn ask(&mut self, request: &'static str, body: &Request) -> Result<Reply, Error> {
        match self.control.ask(body) {
            Ok(Reply::Error { message }) => Err(Error::Refused { request, message }),
            Ok(reply) => Ok(reply),
            Err(source) => Err(self.control_error(request, source)),
        }
    }

    fn control_error(&self, request: &'static str, source: io::Error) -> Error {
        Error::Control { request, source, log: self.child.log().into() }
    }

    fn nonsense(&self, request: &'static str, reply: &Reply) -> Error {
        self.control_error(
            request,
            io::Error::new(io::ErrorKind::InvalidData, format!("it answered {reply:?}")),
        )
    }
}

/// Readable once the device has ended.
impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

fn is_ready(line: &str) -> bool {
    serde_json::from_str::<serde_json::Value>(line).is_ok_and(|v| v["ready"] == true)
}

/// A pipe that gives `Ok(0)` where it is empty for now, as [`Tail`] wants it.
struct Whole<R>(R);

impl<R: io::Read> io::Read for Whole<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device made of a shell script.
    fn fake(script: &str) -> (tempfile::TempDir, Result<Device, Error>) {
        let dir = tempfile::tempdir().expect("folder");
        let line = CommandLine { program: "sh".into(), args: vec!["-c".into(), script.into()] };
        let interrupt = Interrupt::detached().expect("eventfd");
        let control = dir.path().join("control.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&control).expect("bind");
        let device = Device::start(&line, &control, &dir.path().join("device.log"), &interrupt);
        (dir, device)
    }

    #[test]
    fn a_device_that_dies_at_once_is_named_with_its_last_words() {
        let (_dir, device) = fake("echo 'cannot bind' >&2; exit 3");
        let text = device.expect_err("dies").to_string();
        assert!(text.contains("exit status: 3") && text.contains("cannot bind"), "{text}");
    }

    #[test]
    fn a_ready_line_in_two_pieces() {
        let (_dir, device) =
            fake("echo chatter; printf '{\"ready\"'; sleep 0.05; echo ':true}'; cat >/dev/null");
        let device = device.expect("ready");
        assert!(device.end(Duration::from_secs(10)), "the end of stdin ends it");
    }

    #[test]
    fn a_control_socket_that_hangs_up_is_an_error() {
        let (_dir, device) = fake("echo '{\"ready\":true}'; cat >/dev/null");
        let error = device.expect("ready").stats().expect_err("the listener is gone");
        assert!(error.to_string().contains("control socket, at stats"), "{error}");
    }
}

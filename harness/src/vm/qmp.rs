//! QEMU's machine protocol over a Unix socket: commands and events from the `qapi` crate, with a deadline on everything.
//!
//! The transport is ours because `qapi`'s own has no deadlines, and because an event that its schema does not know
//! (QEMU is newer) must not end the connection.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use qapi::qmp::{self, Event, QapiCapabilities};
use qapi::{Command, Execute};
use serde::Deserialize;

use super::poll;

/// Time for a command's answer. QEMU answers within milliseconds, unless its main loop waits for the device.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A connection on which capabilities have been negotiated.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    inbox: Vec<u8>,
    events: VecDeque<Event>,
    open: bool,
}

/// Why QMP gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU refused.
    #[error("QEMU refused {command}: {reason}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's words.
        reason: String,
    },
    /// QEMU did not answer in time; the connection cannot be used any more.
    #[error("QEMU did not answer {command} within {} s", PATIENCE.as_secs())]
    Timeout {
        /// The command.
        command: &'static str,
    },
    /// QEMU has ended or closed the connection.
    #[error("QEMU closed the QMP connection at {command}")]
    Closed {
        /// The command.
        command: &'static str,
    },
    /// What came is no QMP.
    #[error("QEMU's answer to {command} makes no sense: {source}")]
    Garbled {
        /// The command.
        command: &'static str,
        /// Why.
        source: serde_json::Error,
    },
    /// The socket failed.
    #[error("QMP socket, at {command}: {source}")]
    Io {
        /// The command.
        command: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl Qmp {
    /// Takes a fresh connection through greeting and capabilities.
    pub fn negotiate(stream: UnixStream) -> Result<Self, Error> {
        let command = "qmp_capabilities";
        stream.set_nonblocking(true).map_err(|source| Error::Io { command, source })?;
        let mut qmp = Self { stream, inbox: Vec::new(), events: VecDeque::new(), open: true };
        let greeting = qmp.line(command, Instant::now() + PATIENCE)?;
        serde_json::from_slice::<QapiCapabilities>(&greeting)
            .map_err(|source| Error::Garbled { command, source })?;
        qmp.execute(&qmp::qmp_capabilities { enable: None })?;
        Ok(qmp)
    }

    /// Runs a command and waits for its answer. Events that come meanwhile are kept.
    pub fn execute<C: Command>(&mut self, arguments: &C) -> Result<C::Ok, Error> {
        let command = C::NAME;
        let deadline = Instant::now() + PATIENCE;
        let execute: Execute<&C> = Execute::from(arguments);
        let mut request =
            serde_json::to_vec(&execute).map_err(|source| Error::Garbled { command, source })?;
        request.push(b'\n');
        self.send(command, &request, deadline)?;
        loop {
            let line = self.line(command, deadline)?;
            if let Some(answer) = self.sort(command, &line)? {
                return match answer {
                    Message::Return { value } => {
                        serde_json::from_value(value).map_err(|source| Error::Garbled { command, source })
                    }
                    Message::Error { error } => Err(Error::Refused { command, reason: error.desc }),
                };
            }
        }
    }

    /// Runs a command of the human monitor and gives what it prints.
    pub fn human(&mut self, command_line: &str) -> Result<String, Error> {
        self.execute(&qmp::human_monitor_command { cpu_index: None, command_line: command_line.into() })
    }

    /// Registers of all CPUs, as the human monitor prints them: one block a CPU, each begun by `CPU#n`.
    pub fn registers(&mut self) -> Result<String, Error> {
        self.human("info registers -a")
    }

    /// Stops all CPUs.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.execute(&qmp::stop {}).map(|_| ())
    }

    /// Lets the CPUs go on, or start.
    pub fn cont(&mut self) -> Result<(), Error> {
        self.execute(&qmp::cont {}).map(|_| ())
    }

    /// Ends QEMU.
    pub fn quit(&mut self) -> Result<(), Error> {
        self.execute(&qmp::quit {}).map(|_| ())
    }

    /// Reads guest memory by virtual address, as CPU `cpu` maps it. `scratch` is a file that QEMU writes and that is
    /// removed again.
    pub fn read_virtual(
        &mut self,
        cpu: u32,
        address: u64,
        length: u64,
        scratch: &Path,
    ) -> Result<Vec<u8>, Error> {
        let filename = scratch.to_string_lossy().into_owned();
        self.execute(&qmp::memsave { cpu_index: Some(cpu.into()), filename, size: length, val: address })?;
        read_and_remove(scratch).map_err(|source| Error::Io { command: "memsave", source })
    }

    /// Reads guest memory by physical address; see [`Qmp::read_virtual`].
    pub fn read_physical(&mut self, address: u64, length: u64, scratch: &Path) -> Result<Vec<u8>, Error> {
        let filename = scratch.to_string_lossy().into_owned();
        self.execute(&qmp::pmemsave { filename, size: length, val: address })?;
        read_and_remove(scratch).map_err(|source| Error::Io { command: "pmemsave", source })
    }

    /// The next event, without waiting.
    pub fn event(&mut self) -> Result<Option<Event>, Error> {
        let command = "(event)";
        while self.events.is_empty() {
            if let Some(line) = self.buffered_line() {
                self.sort(command, &line)?;
            } else if !self.open || !self.fill(command)? {
                break;
            }
        }
        Ok(self.events.pop_front())
    }

    /// The descriptor to poll for events; `None` once QEMU has closed the connection.
    pub fn pollable(&self) -> Option<BorrowedFd<'_>> {
        self.open.then(|| self.stream.as_fd())
    }

    /// Keeps an event, returns an answer, and passes over what this schema does not know.
    fn sort(&mut self, command: &'static str, line: &[u8]) -> Result<Option<Message>, Error> {
        let value: serde_json::Value =
            serde_json::from_slice(line).map_err(|source| Error::Garbled { command, source })?;
        if value.get("event").is_some() {
            self.events.extend(serde_json::from_value::<Event>(value).ok());
            return Ok(None);
        }
        serde_json::from_value(value).map(Some).map_err(|source| Error::Garbled { command, source })
    }

    fn send(&mut self, command: &'static str, mut request: &[u8], deadline: Instant) -> Result<(), Error> {
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Error::Closed { command },
            _ => Error::Io { command, source },
        };
        while !request.is_empty() {
            match self.stream.write(request) {
                Ok(n) => request = &request[n..],
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // A request is far smaller than a socket's buffer: a full one means that nobody reads.
                Err(e) if e.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                    std::thread::yield_now();
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(Error::Timeout { command }),
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(())
    }

    fn line(&mut self, command: &'static str, deadline: Instant) -> Result<Vec<u8>, Error> {
        loop {
            if let Some(line) = self.buffered_line() {
                return Ok(line);
            }
            if !self.open {
                return Err(Error::Closed { command });
            }
            if !self.fill(command)? && self.open {
                let ready = poll::readable([Some(self.stream.as_fd())], Some(deadline))
                    .map_err(|source| Error::Io { command, source })?;
                if !ready[0] {
                    // The answer may still come, and would be taken for the next command's.
                    self.open = false;
                    return Err(Error::Timeout { command });
                }
            }
        }
    }

    fn buffered_line(&mut self) -> Option<Vec<u8>> {
        let end = self.inbox.iter().position(|&b| b == b'\n')?;
        Some(self.inbox.drain(..=end).collect())
    }

    /// Takes what is there. False: nothing was, or the connection is at its end.
    fn fill(&mut self, command: &'static str) -> Result<bool, Error> {
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.open = false;
                    return Ok(false);
                }
                Ok(n) => {
                    self.inbox.extend_from_slice(&buffer[..n]);
                    return Ok(true);
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                    self.open = false;
                    return Ok(false);
                }
                Err(source) => return Err(Error::Io { command, source }),
            }
        }
    }
}

/// An answer. Not `qapi`'s own type: that one is untagged with events, and an unknown one would be an error.
#[derive(Deserialize)]
#[serde(untagged)]
enum Message {
    Return {
        #[serde(rename = "return")]
        value: serde_json::Value,
    },
    Error {
        error: Refusal,
    },
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

fn read_and_remove(path: &Path) -> io::Result<Vec<u8>> {
    let bytes = std::fs::read(path);
    let removed = std::fs::remove_file(path);
    let bytes = bytes?;
    removed?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"micro":3,"minor":1,"major":11},"package":""},"capabilities":["oob"]}}"#;

    /// A QEMU that answers each request with the next text, then hangs up.
    fn scripted(answers: &'static [&'static str]) -> (UnixStream, thread::JoinHandle<Vec<String>>) {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        let script = thread::spawn(move || {
            let mut requests = BufReader::new(theirs.try_clone().expect("clone")).lines();
            let mut seen = Vec::new();
            let mut theirs = theirs;
            writeln!(theirs, "{GREETING}").expect("greeting");
            for answer in answers {
                seen.extend(requests.next().and_then(Result::ok));
                theirs.write_all(answer.as_bytes()).expect("answer");
            }
            seen
        });
        (ours, script)
    }

    #[test]
    fn commands_and_events() {
        let (stream, script) = scripted(&[
            "{\"return\":{}}\n",
            concat!(
                "{\"timestamp\":{\"seconds\":1,\"microseconds\":0},\"event\":\"FROM_THE_FUTURE\",\"data\":{}}\n",
                "{\"timestamp\":{\"seconds\":1,\"microseconds\":0},\"event\":\"SHUTDOWN\",",
                "\"data\":{\"guest\":true,\"reason\":\"guest-reset\"}}\r\n",
                "{\"return\":\"RIP=1\"}\n"
            ),
            "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}\n",
        ]);
        let mut qmp = Qmp::negotiate(stream).expect("negotiate");
        assert_eq!(qmp.registers().expect("registers"), "RIP=1");
        assert!(matches!(qmp.event(), Ok(Some(Event::SHUTDOWN { data, .. })) if data.guest));
        assert!(matches!(qmp.stop(), Err(Error::Refused { command: "stop", reason }) if reason == "no"));
        assert!(matches!(qmp.event(), Ok(None)));
        let seen = script.join().expect("script");
        assert!(seen[1].contains("info registers -a"), "{seen:?}");
    }

    #[test]
    fn a_qemu_that_dies_is_an_error_and_not_a_panic() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        assert!(matches!(Qmp::negotiate(ours), Err(Error::Closed { .. })));
        let (stream, script) = scripted(&["{\"return\":{}}\n"]);
        let mut qmp = Qmp::negotiate(stream).expect("negotiate");
        script.join().expect("script");
        assert!(matches!(qmp.cont(), Err(Error::Closed { .. })));
        assert!(qmp.event().expect("no event").is_none());
        assert!(qmp.pollable().is_none());
    }
}

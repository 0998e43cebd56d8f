//! A running guest: device, QEMU and what they say, from boot to end.
//!
//! Everything is waited for in one place, [`Machine::next`]: the guest's records and console lines, QEMU's events, and
//! the ends of both processes. QEMU connects to *our* sockets, so nothing has to be awaited by trial.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hmmstorm_abi::wire::event::Record;
use qapi::qmp::{Event, ShutdownCause};

use super::children::Child;
use super::command::{self, BootFiles, QemuProgram, Sockets};
use super::device::Device;
use super::error::{End, Error, ended, io_error};
use super::events::{Tail, Watch};
use super::freeze::Frozen;
use super::qmp::Qmp;
use super::sockets::SocketDir;
use super::{Console, RunFolder, Spec, poll};
use crate::cli::Interrupt;

/// Time for QEMU to set the machine up and connect to us.
const START: Duration = Duration::from_secs(30);
/// Time for QEMU and the device to end when asked to.
const END: Duration = Duration::from_secs(5);

/// All that a machine is made of.
#[derive(Clone, Debug)]
pub struct Boot {
    /// What to run.
    pub spec: Spec,
    /// QEMU.
    pub qemu: QemuProgram,
    /// The `hmmstorm-device` binary.
    pub device: PathBuf,
    /// Kernel and initramfs.
    pub files: BootFiles,
}

impl Boot {
    /// The command lines of device (if there are GPUs) and QEMU, for `--dry-run` and for the record.
    pub fn command_lines(
        &self,
        sockets: &Sockets,
        folder: &RunFolder,
    ) -> (Option<command::CommandLine>, command::CommandLine) {
        let device = (self.spec.profile.gpus > 0).then(|| command::device(&self.spec, &self.device, sockets));
        (device, command::qemu(&self.spec, &self.qemu, &self.files, sockets, folder))
    }
}

/// Something that happened, in order of its coming to light.
#[derive(Clone, Debug, PartialEq)]
pub enum Occurrence {
    /// The storm in the guest said something.
    Record(Record),
    /// A line of the event stream that is no record, and why.
    BadRecord {
        /// The line.
        line: String,
        /// What is wrong with it.
        why: String,
    },
    /// A line of the console.
    Console(String),
    /// The kernel rang pvpanic; more console lines follow.
    Panicked,
    /// The machine is gone. Always the last occurrence; later calls give it again.
    Ended(End),
    /// The deadline passed and nothing else happened.
    Deadline,
}

/// A guest that runs, or has run. Dropping it ends every process of it.
#[derive(Debug)]
pub struct Machine {
    // Fields drop in this order: QEMU ends before the device, whose sudden absence can abort it.
    qmp: Qmp,
    qemu: Child,
    /// Only of a deterministic machine.
    _frozen: Option<Frozen>,
    device: Option<Device>,
    console_socket: Option<UnixStream>,
    sockets: SocketDir,
    folder: RunFolder,
    watch: Watch,
    records: Tail,
    console: Tail,
    shutdown: Option<ShutdownCause>,
    queue: VecDeque<Occurrence>,
    end: Option<End>,
    interrupt: Interrupt,
    started: Instant,
}

impl Machine {
    /// Starts device and QEMU. Returns when QEMU's first CPUs may run (with `gdb`: when they wait for gdb).
    pub fn boot(boot: &Boot, folder: RunFolder, interrupt: &Interrupt) -> Result<Self, Error> {
        let sockets = SocketDir::create()
            .map_err(|source| Error::Io { what: "cannot create a folder for sockets".into(), source })?;
        sockets
            .describe(folder.dir())
            .map_err(|source| Error::Io { what: "cannot write to the folder for sockets".into(), source })?;
        let (device_line, qemu_line) = boot.command_lines(sockets.paths(), &folder);

        let device = match &device_line {
            Some(line) => {
                write(&folder.device_command(), &format!("{line}\n"))?;
                Some(Device::start(line, &sockets.paths().control(), &folder.device_log(), interrupt)?)
            }
            None => None,
        };

        let watch = Watch::new().map_err(io_error("inotify"))?;
        let follow = |path: &Path| -> Result<Tail, Error> {
            watch.add(path).map_err(io_error(path.display()))?;
            Tail::open(path).map_err(io_error(path.display()))
        };
        let (records, console) = (follow(&folder.events())?, follow(&folder.console())?);

        let qmp_listener = listen(&sockets.paths().qmp())?;
        let console_listener = match boot.spec.console {
            Console::Interactive => Some(listen(&sockets.paths().console())?),
            Console::Log => None,
        };
        write(&folder.qemu_command(), &format!("{qemu_line}\n"))?;
        let log = folder.qemu_log();
        let output = File::options().append(true).create(true).open(&log).map_err(io_error(log.display()))?;
        let errors = output.try_clone().map_err(io_error(log.display()))?;
        let mut command = Command::new(&qemu_line.program);
        command.args(&qemu_line.args).stdin(Stdio::null()).stdout(output).stderr(errors);
        let started = Instant::now();
        let mut qemu = Child::spawn("QEMU", command, &log)?;

        // QEMU makes its chardevs in the order of the command line, and connects as it makes them.
        let console_socket = console_listener
            .map(|l| accept(&l, &mut qemu, "QEMU's console connection", interrupt))
            .transpose()?;
        let stream = accept(&qmp_listener, &mut qemu, "QEMU's QMP connection", interrupt)?;
        let mut qmp = match Qmp::negotiate(stream) {
            Ok(qmp) => qmp,
            // The more telling message, if QEMU is about to end.
            Err(source) => match qemu.wait_until(Instant::now() + END) {
                Ok(Some(status)) => return Err(ended(End::QemuDied(status), "QMP's greeting", &folder)),
                _ => return Err(Error::Qmp { source, log }),
            },
        };
        let frozen = boot.spec.deterministic().then(|| Frozen::hold(qemu.id())).transpose()?;
        if frozen.is_some() && !boot.spec.gdb {
            qmp.cont().map_err(|source| Error::Qmp { source, log })?;
        }
        Ok(Self {
            qmp,
            qemu,
            _frozen: frozen,
            device,
            console_socket,
            sockets,
            folder,
            watch,
            records,
            console,
            shutdown: None,
            queue: VecDeque::new(),
            end: None,
            interrupt: interrupt.clone(),
            started,
        })
    }

    /// Where the logs are.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }

    /// The machine's sockets.
    pub fn sockets(&self) -> &Sockets {
        self.sockets.paths()
    }

    /// When QEMU was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// QEMU's process id.
    pub fn qemu_id(&self) -> u32 {
        self.qemu.id()
    }

    /// The device, if there are GPUs.
    pub fn device(&mut self) -> Option<&mut Device> {
        self.device.as_mut()
    }

    /// QMP. After an error, [`Machine::next`] tells whether the machine is gone.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// The other end of the guest's console, once; only of an interactive machine.
    pub fn take_console(&mut self) -> Option<UnixStream> {
        self.console_socket.take()
    }

    /// The next thing that happens, or [`Occurrence::Deadline`].
    pub fn next(&mut self, deadline: Instant) -> Result<Occurrence, Error> {
        self.next_until(None, deadline)
    }

    /// As [`Machine::next`], and [`Occurrence::Deadline`] also when `other` becomes readable.
    pub fn next_or(&mut self, other: BorrowedFd<'_>, deadline: Instant) -> Result<Occurrence, Error> {
        self.next_until(Some(other), deadline)
    }

    fn next_until(&mut self, other: Option<BorrowedFd<'_>>, deadline: Instant) -> Result<Occurrence, Error> {
        loop {
            if let Some(occurrence) = self.queue.pop_front() {
                return Ok(occurrence);
            }
            if let Some(end) = self.end {
                return Ok(Occurrence::Ended(end));
            }
            let fds = [
                Some(self.interrupt.as_fd()),
                Some(self.watch.as_fd()),
                self.qmp.pollable(),
                Some(self.qemu.as_fd()),
                self.device.as_ref().map(AsFd::as_fd),
                other,
            ];
            let ready = poll::readable(fds, Some(deadline)).map_err(io_error("poll"))?;
            let [interrupted, written, talked, qemu, device, _] = ready;
            if interrupted {
                return Err(Error::Interrupted);
            }
            if written {
                self.watch.clear().map_err(io_error("inotify"))?;
                self.read_logs()?;
            }
            if talked {
                self.read_events();
            }
            if qemu || device {
                self.finish()?;
            }
            if !(written || talked || qemu || device) {
                return Ok(Occurrence::Deadline);
            }
        }
    }

    /// Puts occurrences back, to be given again first. For those who look ahead.
    pub fn unread(&mut self, seen: Vec<Occurrence>) {
        for occurrence in seen.into_iter().rev() {
            self.queue.push_front(occurrence);
        }
    }

    /// Waits until `found` gives something for an occurrence, and returns that. `waited_for` names it for messages.
    /// All occurrences on the way go to `found` alone.
    pub fn wait_for<T>(
        &mut self,
        waited_for: &str,
        limit: Duration,
        mut found: impl FnMut(&Occurrence) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + limit;
        loop {
            let occurrence = self.next(deadline)?;
            if let Some(it) = found(&occurrence) {
                return Ok(it);
            }
            match occurrence {
                Occurrence::Ended(end) => return Err(ended(end, waited_for, &self.folder)),
                Occurrence::Deadline => {
                    let log = self.folder.console();
                    return Err(Error::Timeout { waited_for: waited_for.into(), limit, log });
                }
                _ => {}
            }
        }
    }

    /// Ends the machine: QEMU first, then the device. Says how it ended; if it had not ended yet, [`End::Asked`].
    pub fn stop(mut self) -> End {
        if self.end.is_none() {
            let _ = self.qmp.quit();
            if !matches!(self.qemu.wait_until(Instant::now() + END), Ok(Some(_))) {
                self.qemu.kill();
            }
        }
        let end = self.end.unwrap_or(End::Asked);
        if let Some(device) = self.device.take() {
            device.end(END);
        }
        end
    }

    fn read_logs(&mut self) -> Result<(), Error> {
        for line in self.records.lines().map_err(io_error("events.jsonl"))? {
            self.queue.push_back(record(line));
        }
        let lines = self.console.lines().map_err(io_error("console.log"))?;
        self.queue.extend(lines.into_iter().map(Occurrence::Console));
        Ok(())
    }

    fn read_events(&mut self) {
        // An error here is QEMU's end, which its process tells better.
        while let Ok(Some(event)) = self.qmp.event() {
            match event {
                Event::GUEST_PANICKED { .. } => self.queue.push_back(Occurrence::Panicked),
                Event::SHUTDOWN { data, .. } => self.shutdown = Some(data.reason),
                _ => {}
            }
        }
    }

    /// Called when a process has ended: finds out how, after the last words have been read.
    fn finish(&mut self) -> Result<(), Error> {
        let device =
            self.device.as_mut().map(Device::ended).transpose().map_err(io_error("device"))?.flatten();
        let mut qemu = self.qemu.ended().map_err(io_error("QEMU"))?;
        if device.is_some() && qemu.is_none() {
            // A QEMU whose device is gone answers every access after 5 s, if it does not abort.
            self.qemu.kill();
            qemu = self.qemu.ended().map_err(io_error("QEMU"))?;
        }
        self.read_events();
        self.read_logs()?;
        self.queue.extend(self.records.rest().map(record));
        self.queue.extend(self.console.rest().map(Occurrence::Console));
        let Some(status) = qemu else { return Ok(()) };
        let end = match (device, self.shutdown) {
            (Some(status), None) => End::DeviceDied(status),
            (_, Some(ShutdownCause::guest_shutdown)) if status.success() => End::PoweredOff,
            (_, Some(ShutdownCause::guest_reset | ShutdownCause::guest_panic)) if status.success() => {
                End::Reset
            }
            (_, Some(_)) if status.success() => End::Asked,
            (Some(status), Some(_)) => End::DeviceDied(status),
            (None, _) => End::QemuDied(status),
        };
        self.end = Some(end);
        self.queue.push_back(Occurrence::Ended(end));
        Ok(())
    }
}

fn record(line: String) -> Occurrence {
    match serde_json::from_str(&line) {
        Ok(record) => Occurrence::Record(record),
        Err(why) => Occurrence::BadRecord { line, why: why.to_string() },
    }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(io_error(format!("cannot write {}", path.display())))
}

fn listen(path: &Path) -> Result<UnixListener, Error> {
    let listener =
        UnixListener::bind(path).map_err(io_error(format!("cannot listen on {}", path.display())))?;
    listener.set_nonblocking(true).map_err(io_error(path.display()))?;
    Ok(listener)
}

/// The connection that QEMU makes to `listener`.
fn accept(
    listener: &UnixListener,
    qemu: &mut Child,
    waited_for: &str,
    interrupt: &Interrupt,
) -> Result<UnixStream, Error> {
    let deadline = Instant::now() + START;
    loop {
        let fds = [Some(listener.as_fd()), Some(qemu.as_fd()), Some(interrupt.as_fd())];
        let [called, died, interrupted] = poll::readable(fds, Some(deadline)).map_err(io_error("poll"))?;
        let log = qemu.log().to_path_buf();
        let waited_for = waited_for.to_owned();
        if interrupted {
            return Err(Error::Interrupted);
        }
        if called {
            match listener.accept() {
                Ok((stream, _)) => return Ok(stream),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(e) => return Err(io_error(waited_for)(e)),
            }
        }
        if died && let Some(status) = qemu.ended().map_err(io_error("QEMU"))? {
            return Err(Error::Ended { end: End::QemuDied(status), waited_for, log });
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { waited_for, limit: START, log });
        }
    }
}

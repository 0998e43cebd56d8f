//! Child processes that end with us: by their guard when it is dropped, by the kernel when we are killed.
//!
//! The kernel's part is the parent-death signal, which fires when the *thread* that made the child ends, not the
//! process. So one thread makes all children, and it lives as long as the process.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::poll;

/// A child process, in a process group of its own; killed with the group, and reaped, when this is dropped.
#[derive(Debug)]
pub struct Child {
    name: &'static str,
    log: PathBuf,
    process: process::Child,
    pid: Pid,
    pidfd: OwnedFd,
    leads_group: bool,
    status: Option<ExitStatus>,
}

/// A program could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start {name} ({}): {source}", program.display())]
pub struct SpawnError {
    /// What it is to us.
    pub name: &'static str,
    /// What was executed.
    pub program: PathBuf,
    /// Why not.
    pub source: io::Error,
}

impl Child {
    /// Starts `command`. `name` and `log` (where its stderr goes) are for messages.
    pub fn spawn(name: &'static str, mut command: Command, log: &Path) -> Result<Self, SpawnError> {
        command.process_group(0);
        Self::start(name, command, log, true)
    }

    /// Starts `command` in our own process group: it may use the terminal, and gets the keyboard's signals. Only the
    /// process itself is killed when this is dropped.
    pub fn spawn_in_foreground(name: &'static str, command: Command, log: &Path) -> Result<Self, SpawnError> {
        Self::start(name, command, log, false)
    }

    fn start(
        name: &'static str,
        command: Command,
        log: &Path,
        leads_group: bool,
    ) -> Result<Self, SpawnError> {
        let program = PathBuf::from(command.get_program());
        let begin = || -> io::Result<Self> {
            let mut process = spawn_on_the_lasting_thread(command)?;
            let opened = pid_of(&process).and_then(|pid| {
                rustix::process::pidfd_open(pid, PidfdFlags::empty())
                    .map(|fd| (pid, fd))
                    .map_err(io::Error::from)
            });
            match opened {
                Ok((pid, pidfd)) => {
                    Ok(Self { name, log: log.into(), process, pid, pidfd, leads_group, status: None })
                }
                Err(error) => {
                    let _ = process.kill();
                    let _ = process.wait();
                    Err(error)
                }
            }
        };
        begin().map_err(|source| SpawnError { name, program, source })
    }

    /// What it is to us, as given to [`Child::spawn`].
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Where its stderr goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Its stdin, if it was piped and not taken yet. Dropping it closes the pipe.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.process.stdin.take()
    }

    /// Its stdout, if it was piped and not taken yet.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.process.stdout.take()
    }

    /// Its exit status if it has ended.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.process.try_wait()?;
        }
        Ok(self.status)
    }

    /// Its exit status as soon as it has one; `None` when the deadline passes first.
    pub fn wait_until(&mut self, deadline: Instant) -> io::Result<Option<ExitStatus>> {
        if self.status.is_none() {
            poll::readable([Some(self.pidfd.as_fd())], Some(deadline))?;
        }
        self.ended()
    }

    /// Kills the whole process group and reaps the child.
    pub fn kill(&mut self) {
        if self.status.is_some() {
            return;
        }
        // Not reaped yet, so both ids are still this child's.
        let _ = if self.leads_group {
            rustix::process::kill_process_group(self.pid, Signal::KILL)
        } else {
            rustix::process::kill_process(self.pid, Signal::KILL)
        };
        self.status = self.process.wait().ok();
    }
}

/// Readable once the child has ended.
impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

fn pid_of(process: &process::Child) -> io::Result<Pid> {
    i32::try_from(process.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| io::Error::other(format!("{} is no process id", process.id())))
}

type Order = (Command, mpsc::SyncSender<io::Result<process::Child>>);

/// Starts `command` from a thread that never ends, with SIGKILL for it when this process dies.
fn spawn_on_the_lasting_thread(mut command: Command) -> io::Result<process::Child> {
    static SPAWNER: OnceLock<Result<mpsc::SyncSender<Order>, io::ErrorKind>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (orders, inbox) = mpsc::sync_channel::<Order>(0);
        thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, answer) in inbox {
                    let _ = answer.send(command.spawn());
                }
            })
            .map(|_| orders)
            .map_err(|e| e.kind())
    });
    let spawner = spawner.as_ref().map_err(|kind| io::Error::from(*kind))?;

    die_with_parent(&mut command);
    let (answer, inbox) = mpsc::sync_channel(1);
    let gone = |_| io::Error::other("the thread that starts processes has ended");
    spawner.send((command, answer)).map_err(|_| gone(()))?;
    inbox.recv().map_err(|_| gone(()))?
}

#[expect(
    unsafe_code,
    reason = "std offers no other way to set the parent-death signal between fork and exec"
)]
fn die_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let prepare = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // The parent may have died before the line above.
        if rustix::process::getppid() != Some(parent) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe work is allowed; the closure makes two system calls, and
    // neither allocates nor takes a lock (errors are made of plain numbers).
    unsafe { command.pre_exec(prepare) };
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn shell(script: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped());
        Child::spawn("test", command, Path::new("none")).expect("sh")
    }

    #[test]
    fn dropping_the_guard_kills_the_whole_group() {
        use std::io::{BufRead, BufReader};
        let mut child = shell("sleep 1000 & echo $!; wait");
        let mut line = String::new();
        BufReader::new(child.take_stdout().expect("piped")).read_line(&mut line).expect("pid");
        let grandchild = Pid::from_raw(line.trim().parse().expect("pid")).expect("pid");
        let ended = rustix::process::pidfd_open(grandchild, PidfdFlags::empty()).expect("runs");
        drop(child);
        assert_eq!(poll::readable([Some(ended.as_fd())], Some(soon())).expect("poll"), [true]);
    }

    #[test]
    fn children_outlive_the_thread_that_asked_for_them() {
        let mut child = thread::spawn(|| shell("read x; exit 7")).join().expect("thread");
        // stdin is null, so `read` ends at once; a child killed with its thread would show a signal.
        let status = child.wait_until(soon()).expect("wait").expect("ends");
        assert_eq!(status.code(), Some(7));
        assert_eq!(child.ended().expect("again"), Some(status));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error =
            Child::spawn("QEMU", Command::new("/no/such/qemu"), Path::new("none")).expect_err("missing");
        assert!(error.to_string().starts_with("cannot start QEMU (/no/such/qemu): No such file"), "{error}");
    }
}

//! Runs a program as part of a build: everything it says goes to a log, every line is offered to the caller, a signal
//! to the harness ends it, and it does not outlive the harness.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::error::{IoContext, no_space};
use super::{BuildError, Progress};

/// Time between two looks at the clock, the child and the interrupt.
const TICK: Duration = Duration::from_millis(100);
/// How long a program may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
/// Lines kept for the error message.
const KEPT_LINES: usize = 400;
/// Lines of the error message.
const TAIL_LINES: usize = 12;

/// What programs say, in the C locale, when a file system is full.
const FULL: &str = "No space left on device";

/// A command that gets SIGTERM when the thread that starts it ends, however that comes about.
///
/// `setpriv` sets the parent-death signal and becomes the program. Without it (it is part of util-linux) the program
/// is started as it is.
pub(super) fn guarded(program: impl AsRef<OsStr>) -> Command {
    if which("setpriv").is_none() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// Where on `PATH` a program is.
pub fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Distributions keep some tools where ordinary users do not look.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(file).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// A program's run: what it is for, and where what it says is kept.
#[derive(Debug)]
pub(super) struct Job<'a> {
    /// For messages: "building the kernel".
    pub(super) what: &'a str,
    /// Appended to.
    pub(super) log: &'a Path,
    /// Asked whether to go on.
    pub(super) progress: &'a Progress,
}

impl Job<'_> {
    /// Runs `command` to its end. `line` sees each line of its stdout and stderr, `tick` is called about ten times a
    /// second. Fails when the program does, with the lines of its log that say why.
    pub(super) fn run(
        &self,
        mut command: Command,
        mut line: impl FnMut(&str),
        mut tick: impl FnMut(),
    ) -> Result<(), BuildError> {
        self.progress.check()?;
        let program = show(&command);
        command.env("LC_ALL", "C");
        self.progress.detail(format_args!("+ {program}"));
        let mut log = open_log(self.log)?;
        writeln!(log, "+ {program}").on("write", self.log)?;
        let (reader, writer) = io::pipe().on("make a pipe for", self.log)?;
        let stderr = writer.try_clone().on("make a pipe for", self.log)?;
        let child = command.stdin(Stdio::null()).stdout(writer).stderr(stderr).spawn().map_err(|e| {
            BuildError::Tool {
                tool: program.clone(),
                reason: format!("cannot be started: {e}; `hmmstorm doctor` says what this host lacks"),
            }
        })?;
        let mut child = Running(child);
        drop(command); // and with it the pipe's write ends, or the reader would never see the end
        let lines = read_lines(reader);
        let mut kept = VecDeque::new();
        let mut exited = None;
        loop {
            match lines.recv_timeout(TICK) {
                Ok(text) => {
                    writeln!(log, "{text}").on("write", self.log)?;
                    line(&text);
                    if kept.len() == KEPT_LINES {
                        kept.pop_front();
                    }
                    kept.push_back(text);
                }
                Err(RecvTimeoutError::Timeout) if exited.is_some() => break, // somebody else holds the pipe: let him
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if exited.is_some() => break,
                Err(RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(5)),
            }
            tick();
            if self.progress.check().is_err() {
                let _ = log.flush();
                return Err(BuildError::Interrupted);
            }
            if exited.is_none() {
                exited = child.0.try_wait().on("wait for the program behind", self.log)?;
            }
        }
        log.flush().on("write", self.log)?;
        match exited {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.failure(&program, status, &kept)),
            None => Err(BuildError::Interrupted),
        }
    }

    fn failure(&self, program: &str, status: ExitStatus, lines: &VecDeque<String>) -> BuildError {
        if lines.iter().any(|l| l.contains(FULL)) {
            return no_space(&format!("{} failed", self.what), self.log, None);
        }
        BuildError::Command {
            what: self.what.to_owned(),
            program: program.split(' ').next().unwrap_or(program).to_owned(),
            status: status.to_string(),
            log: self.log.to_owned(),
            tail: telling_lines(lines),
        }
    }
}

/// The lines of a failed program's output that say why: its first complaints, else its last words.
fn telling_lines(lines: &VecDeque<String>) -> String {
    let tells = |l: &&String| {
        let lower = l.to_ascii_lowercase();
        lower.contains("error")
            || lower.contains("undefined reference")
            || l.starts_with("E: ")
            || l.contains("***")
    };
    let mut telling: Vec<&str> = lines.iter().filter(tells).take(TAIL_LINES).map(String::as_str).collect();
    if telling.is_empty() {
        telling = lines.iter().rev().take(TAIL_LINES).map(String::as_str).collect();
        telling.reverse();
    }
    telling.join("\n")
}

fn read_lines(reader: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        // Not `lines()`: a compiler may print what is no UTF-8.
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
            bytes.clear();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    receiver
}

/// A child that is ended, if it has not ended by itself, when this is dropped: by SIGTERM, and by SIGKILL when that does
/// not help.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(None)) {
            return;
        }
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(TICK);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn open_log(path: &Path) -> Result<BufWriter<File>, BuildError> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).on("create", dir)?;
    }
    let file = File::options().create(true).append(true).open(path).on("open", path)?;
    Ok(BufWriter::new(file))
}

/// What a short program prints on stdout, trimmed; its stderr is part of the error when it fails.
pub(super) fn capture(command: &mut Command) -> Result<String, BuildError> {
    let program = show(command);
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).output().map_err(|e| BuildError::Tool {
        tool: program.clone(),
        reason: format!("cannot be started: {e}; `hmmstorm doctor` says what this host lacks"),
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        if said.contains(FULL) {
            let place = command
                .get_args()
                .map(Path::new)
                .filter(|a| a.is_absolute())
                .last()
                .unwrap_or(Path::new("."));
            return Err(no_space(&program, place, None));
        }
        let reason = format!("ended with {}: {}", output.status, said.trim());
        return Err(BuildError::Tool { tool: program, reason });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A command line for people, without the guard in front.
fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|w| w.to_string_lossy().into_owned())
        .collect();
    let own = if words.first().is_some_and(|w| w == "setpriv") { 4 } else { 0 };
    words.get(own..).unwrap_or(&words).join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = guarded("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn output_is_seen_and_logged() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let progress = Progress::silent().expect("progress");
        let log = dir.path().join("logs/x.log");
        let mut seen = Vec::new();
        Job { what: "test", log: &log, progress: &progress }
            .run(shell("echo one; echo two >&2"), |l| seen.push(l.to_owned()), || ())
            .expect("it works");
        assert_eq!(seen, ["one", "two"]);
        assert!(fs::read_to_string(&log).expect("log").contains("two"));
    }

    #[test]
    fn failure_quotes_the_complaint_and_names_the_log() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let progress = Progress::silent().expect("progress");
        let log = dir.path().join("x.log");
        let job = Job { what: "test", log: &log, progress: &progress };
        let error =
            job.run(shell("echo noise; echo 'a.c:1: error: no'; exit 2"), |_| (), || ()).expect_err("fails");
        let text = error.to_string();
        assert!(text.contains("a.c:1: error: no") && !text.contains("noise"), "{text}");
        assert!(text.contains(&log.display().to_string()), "{text}");
    }

    #[test]
    fn full_disk_is_recognised() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let progress = Progress::silent().expect("progress");
        let job = Job { what: "test", log: &dir.path().join("x.log"), progress: &progress };
        let error = job.run(shell("echo 'ld: x.o: No space left on device'; exit 1"), |_| (), || ());
        assert!(matches!(error, Err(BuildError::NoSpace { .. })));
    }

    #[test]
    fn interrupt_ends_the_program() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let interrupt = crate::cli::Interrupt::detached().expect("interrupt");
        let progress = Progress::interruptible(interrupt.clone());
        let pid_file = dir.path().join("pid");
        let script = format!("echo $$ >{}; echo up; exec sleep 1000", pid_file.display());
        let job = Job { what: "test", log: &dir.path().join("x.log"), progress: &progress };
        let result = job.run(shell(&script), |_| interrupt.raise(), || ());
        assert!(matches!(result, Err(BuildError::Interrupted)));
        let pid = fs::read_to_string(pid_file).expect("pid").trim().to_owned();
        assert!(!Path::new("/proc").join(pid).exists(), "the program is still there");
    }
}

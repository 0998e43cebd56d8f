//! A shell for a person.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, ioctl_tiocsctty, setsid, wait};
use thiserror::Error;

use crate::cli::preempt_model;
use crate::gpu;
use crate::machine::Machine;
use crate::sys::process::{block_signals, fork, unblock_signals, wait_signal};

const BUSYBOX: &str = "/bin/busybox";
/// What busybox's `poweroff`, `halt` and `reboot` send to PID 1.
const END: [Signal; 4] = [Signal::USR2, Signal::USR1, Signal::TERM, Signal::INT];
/// How often PID 1 looks at its children without having been told.
const LOOK: Duration = Duration::from_secs(1);

/// A shell that cannot be given.
#[derive(Debug, Error)]
pub(crate) enum ShellError {
    /// No busybox, or one that does not run.
    #[error("cannot run {BUSYBOX} --install: {0}. Is busybox in the initramfs?")]
    Busybox(io::Error),
    /// busybox says no.
    #[error("{BUSYBOX} --install failed: {0}")]
    Install(String),
    /// No process for it.
    #[error("cannot fork the shell: {0}")]
    Fork(io::Error),
    /// No signals.
    #[error("cannot wait for signals: {0}")]
    Wait(io::Error),
}

/// Gives a shell on the console's terminal, until it ends or somebody asks for power-off.
///
/// # Errors
/// [`ShellError`].
pub(crate) fn run(kernel: &str) -> Result<(), ShellError> {
    let installed =
        Command::new(BUSYBOX).args(["--install", "-s", "/bin"]).output().map_err(ShellError::Busybox)?;
    if !installed.status.success() {
        return Err(ShellError::Install(String::from_utf8_lossy(&installed.stderr).trim().to_owned()));
    }
    let _only_a_name = rustix::system::sethostname(b"hmmstorm");
    block_signals(&[&END[..], &[Signal::CHILD]].concat());
    let banner = banner(kernel);
    let shell = fork(|| {
        unblock_signals();
        let error = become_shell(&banner);
        eprintln!("storm: cannot start the shell: {error}");
        1
    })
    .map_err(ShellError::Fork)?;
    let signals = [&END[..], &[Signal::CHILD]].concat();
    loop {
        let signal = wait_signal(&signals, LOOK).map_err(ShellError::Wait)?;
        if reap(shell) || signal.is_some_and(|signal| signal != Signal::CHILD.as_raw()) {
            return Ok(());
        }
    }
}

/// Reaps whatever has ended; whether `shell` has.
fn reap(shell: Pid) -> bool {
    let mut ended = false;
    // Not waitpid(None), which is about this process group only: the shell has its own.
    while let Ok(Some((pid, _))) = wait(WaitOptions::NOHANG) {
        ended |= pid == shell;
    }
    ended
}

/// Executes the shell on the console's terminal, as the leader of a session that the terminal controls, so that job
/// control and Ctrl-C work. Returns only if it cannot.
fn become_shell(banner: &str) -> io::Error {
    let prepare = || -> io::Result<[Stdio; 3]> {
        setsid()?;
        // `console` itself can be nobody's controlling terminal.
        let active = fs::read_to_string("/sys/class/tty/console/active")?;
        let name = active.split_ascii_whitespace().last().unwrap_or("ttyS0");
        let terminal = OpenOptions::new().read(true).write(true).open(format!("/dev/{name}"))?;
        ioctl_tiocsctty(&terminal)?;
        io::Write::write_all(&mut &terminal, banner.replace('\n', "\r\n").as_bytes())?;
        Ok([terminal.try_clone()?.into(), terminal.try_clone()?.into(), terminal.into()])
    };
    match prepare() {
        Ok([stdin, stdout, stderr]) => Command::new("/bin/sh")
            .arg0("-sh")
            .env_clear()
            .envs([("PATH", "/bin"), ("HOME", "/"), ("TERM", "linux"), ("PS1", "hmmstorm:\\w# ")])
            .current_dir("/")
            .stdin(stdin)
            .stdout(stdout)
            .stderr(stderr)
            .exec(),
        Err(error) => error,
    }
}

/// What is there, what to type next, how to leave.
fn banner(kernel: &str) -> String {
    let machine = Machine::detect();
    let mut text = format!(
        "\nhmmstorm {}: Linux {kernel}\n  {} CPUs, preempt={}\n",
        env!("CARGO_PKG_VERSION"),
        machine.cpus,
        preempt_model()
    );
    match gpu::all_stats() {
        Ok(stats) if stats.is_empty() => text += "  no GPU\n",
        Ok(stats) => {
            for (index, stats) in stats.iter().enumerate() {
                // 256 pages of 4 KiB are a MiB.
                let (total, free) = (stats.vram_pages / 256, stats.vram_free / 256);
                text +=
                    &format!("  GPU {index} at {}: {total} MiB of VRAM, {free} MiB free\n", gpu::node(index));
            }
        }
        Err(error) => text += &format!("  GPUs: {error}\n"),
    }
    text + "\n  storm list                 what storms there are\n  \
            storm run drain-livelock   the livelock: hangs this guest if its kernel has the bug\n  \
            storm stats                the driver's counters\n  \
            poweroff                   leaves; if the guest hangs, Ctrl-A X ends QEMU\n\n"
}

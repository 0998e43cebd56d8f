//! How a machine ends, and why one cannot be started or watched.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use super::children::SpawnError;
use super::{RunFolder, device, freeze, qmp};

/// How a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset itself: with `panic=-1`, the end of a panic.
    Reset,
    /// QEMU was asked to end, by us or by a signal that it handled.
    Asked,
    /// QEMU ended by itself: it crashed, was killed, or refused its command line.
    QemuDied(ExitStatus),
    /// The device ended while the machine ran (whatever became of QEMU then).
    DeviceDied(ExitStatus),
}

/// Why a machine cannot be started or watched. Nothing of this says anything about the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or socket of ours failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// QMP failed.
    #[error("{source}; QEMU's log is {}{}", log.display(), last_words(log))]
    Qmp {
        /// How.
        source: qmp::Error,
        /// QEMU's stderr.
        log: PathBuf,
    },
    /// A deterministic machine would not be one.
    #[error(
        "{0}; without that, equal runs need not give equal bytes: allow ptrace (containers: the capability SYS_PTRACE), \
         or leave out --deterministic"
    )]
    Freeze(#[from] freeze::Error),
    /// The machine ended when it should not.
    #[error("{} while waiting for {waited_for}; the log is {}{}", describe(end), log.display(), last_words(log))]
    Ended {
        /// How.
        end: End,
        /// What was waited for.
        waited_for: String,
        /// The log that says most about it.
        log: PathBuf,
    },
    /// Something took too long.
    #[error("waited {} s for {waited_for}; the log is {}{}", limit.as_secs(), log.display(), last_words(log))]
    Timeout {
        /// What was waited for.
        waited_for: String,
        /// How long.
        limit: Duration,
        /// Where to look.
        log: PathBuf,
    },
    /// The user wants it to stop.
    #[error("interrupted")]
    Interrupted,
}

/// The error of a machine that ended while something else was waited for; names the log that says most about it.
pub(super) fn ended(end: End, waited_for: &str, folder: &RunFolder) -> Error {
    let log = match end {
        End::QemuDied(_) => folder.qemu_log(),
        End::DeviceDied(_) => folder.device_log(),
        End::PoweredOff | End::Reset | End::Asked => folder.console(),
    };
    Error::Ended { end, waited_for: waited_for.into(), log }
}

fn describe(end: &End) -> String {
    match end {
        End::PoweredOff => "the guest powered off".into(),
        End::Reset => "the guest reset itself (a panic does)".into(),
        End::Asked => "QEMU was told to end".into(),
        End::QemuDied(status) => format!("QEMU ended by itself ({status})"),
        End::DeviceDied(status) => format!("the device ended ({status})"),
    }
}

/// The last lines of a log, for a message: `:` and the lines, indented; nothing if there are none.
pub(super) fn last_words(log: &Path) -> String {
    const LINES: usize = 6;
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(4096)..]).into_owned();
    let lines: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    if lines.is_empty() {
        return ", and is empty".into();
    }
    lines[lines.len().saturating_sub(LINES)..]
        .iter()
        .fold(":".into(), |all, line| format!("{all}\n    {line}"))
}

/// The error of a file or socket; `what` says what was tried, on what.
pub(super) fn io_error(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Error {
    let what = what.to_string();
    move |source| Error::Io { what, source }
}

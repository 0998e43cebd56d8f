//! Why something could not be fetched or built: what was tried, on what, and what to do next.

use std::io;
use std::path::{Path, PathBuf};

use super::patches::Origin;
use crate::cli;

/// Any failure of this module's parts.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,

    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as an infinitive.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What came back.
        source: io::Error,
    },

    /// The file system is full, or would be before the work is done. Nothing half-written was kept.
    #[error("no space left: {what}{}; where {} is, {available_mib} MiB are free; free some, or choose another place \
             with --cache DIR or HMMSTORM_CACHE", needs(*needed_mib), path.display())]
    NoSpace {
        /// The work that needs the space.
        what: String,
        /// Where.
        path: PathBuf,
        /// Estimate, MiB, if there is one.
        needed_mib: Option<u64>,
        /// Free for this user, MiB.
        available_mib: u64,
    },

    /// A data file of `images/` cannot be understood.
    #[error("cannot understand {}: {reason}", file.display())]
    Data {
        /// The file.
        file: PathBuf,
        /// Why.
        reason: String,
    },

    /// A name that is in no list.
    #[error("there is no {kind} '{name}'; there is {known}")]
    Unknown {
        /// What it should name.
        kind: &'static str,
        /// What was asked for.
        name: String,
        /// What could have been asked for.
        known: String,
    },

    /// Options or files of the user that cannot be used.
    #[error("{0}")]
    Usage(String),

    /// Distribution packages are missing and this process may not install them.
    #[error("this host lacks {what}; install it with\n\n    {command}\n\nand start again")]
    HostPackages {
        /// Missing packages or tools.
        what: String,
        /// The one command to run.
        command: String,
    },

    /// A tool is missing or unfit.
    #[error("{tool}: {reason}")]
    Tool {
        /// Its name.
        tool: String,
        /// What is wrong, and what to do.
        reason: String,
    },

    /// A program failed.
    #[error("{what} failed: {program} ended with {status}{}\nfull log: {}", indent(tail), log.display())]
    Command {
        /// What it was to do.
        what: String,
        /// Which program.
        program: String,
        /// Its exit status, in words.
        status: String,
        /// Everything it said.
        log: PathBuf,
        /// The lines that matter most.
        tail: String,
    },

    /// A file is not what its checksum says.
    #[error("{} is damaged or is not what it should be: its SHA-256 is {found}, and {expected} was expected; {after}",
            file.display())]
    Checksum {
        /// The file.
        file: PathBuf,
        /// From the signed index or the pin.
        expected: String,
        /// Of what is there.
        found: String,
        /// What became of the file, and what to do.
        after: &'static str,
    },

    /// No package archive is known from which to fetch.
    #[error("{0}")]
    NoArchive(String),

    /// A patch does not apply.
    #[error("{name} does not apply to {onto}:{}\n{advice}", indent(detail))]
    Patch {
        /// File name of the patch.
        name: String,
        /// What it was applied to.
        onto: String,
        /// File, line and hunk.
        detail: String,
        /// What to do.
        advice: String,
        /// Who asked for it.
        origin: Origin,
    },

    /// `olddefconfig` dropped or changed lines of a fragment.
    #[error("kernel {kernel} did not keep these lines of {fragment}:{}\n\
             the option is gone, renamed, or something that it depends on is off; full log: {}",
            indent(&lost.join("\n")), log.display())]
    Config {
        /// Kernel name.
        kernel: String,
        /// Fragment files.
        fragment: String,
        /// Each line with what came of it.
        lost: Vec<String>,
        /// Log of the configuration.
        log: PathBuf,
    },
}

fn needs(mib: Option<u64>) -> String {
    mib.map_or_else(String::new, |mib| format!(" needs about {mib} MiB"))
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("\n    {line}")).collect()
}

impl BuildError {
    /// As the command line's error: what the user can mend by another command line is a usage error.
    pub fn into_cli(self) -> cli::Error {
        match self {
            Self::Interrupted => cli::Error::Interrupted,
            Self::Unknown { .. }
            | Self::Usage(_)
            | Self::Patch { origin: Origin::Variant(_) | Origin::User, .. } => {
                cli::Error::Usage(self.to_string())
            }
            other => cli::Error::Harness(Box::new(other)),
        }
    }
}

/// Gives an I/O result its context.
pub(super) trait IoContext<T> {
    /// `action` is an infinitive ("create", "read"), `path` what it was tried on.
    fn on(self, action: &'static str, path: &Path) -> Result<T, BuildError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, BuildError> {
        self.map_err(|source| {
            if source.kind() == io::ErrorKind::StorageFull {
                return no_space(&format!("cannot {action} {}", path.display()), path, None);
            }
            BuildError::Io { action, path: path.to_owned(), source }
        })
    }
}

/// A [`BuildError::NoSpace`] that says how much is free where `path` is.
pub(super) fn no_space(what: &str, path: &Path, needed_mib: Option<u64>) -> BuildError {
    BuildError::NoSpace {
        what: what.to_owned(),
        path: path.to_owned(),
        needed_mib,
        available_mib: available_mib(path).unwrap_or(0),
    }
}

/// MiB that this user may still write where `path` is, or where its nearest ancestor that exists is.
pub(super) fn available_mib(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists())?;
    let stat = rustix::fs::statvfs(existing).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize) >> 20)
}

/// Fails unless about `needed_mib` are free where `path` is.
pub(super) fn require_space(what: &str, path: &Path, needed_mib: u64) -> Result<(), BuildError> {
    match available_mib(path) {
        Some(available) if available < needed_mib => Err(no_space(what, path, Some(needed_mib))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_disk_is_said_as_such() {
        let full: io::Result<()> = Err(io::ErrorKind::StorageFull.into());
        let error = full.on("write", Path::new("/tmp/x")).expect_err("it is full");
        assert!(matches!(error, BuildError::NoSpace { .. }), "{error}");
        assert!(require_space("x", Path::new("/"), u64::MAX).is_err());
        assert!(require_space("x", Path::new("/"), 0).is_ok());
    }
}

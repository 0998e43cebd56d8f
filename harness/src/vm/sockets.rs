//! The folder of one machine's sockets: short-named, private, gone with the machine.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use super::command::Sockets;

const PREFIX: &str = "hmmstorm-";
const LOCK: &str = "lock";
const RUN: &str = "run";

/// Removed on drop. What a killed harness leaves is removed by the next one: the lock tells whether it still lives.
#[derive(Debug)]
pub(super) struct SocketDir {
    paths: Sockets,
    _lock: File,
    _dir: TempDir,
}

impl SocketDir {
    /// A new folder below `$XDG_RUNTIME_DIR`, or below the folder for temporary files.
    pub(super) fn create() -> io::Result<Self> {
        let base = base();
        sweep(&base);
        Self::create_in(&base)
    }

    fn create_in(base: &Path) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(PREFIX).rand_bytes(6).tempdir_in(base)?;
        let lock = File::create(dir.path().join(LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { paths: Sockets { dir: dir.path().into() }, _lock: lock, _dir: dir })
    }

    /// Says whose sockets these are, for [`running`].
    pub(super) fn describe(&self, run: &Path) -> io::Result<()> {
        fs::write(self.paths.dir.join(RUN), run.as_os_str().as_bytes())
    }

    /// The sockets' paths.
    pub(super) fn paths(&self) -> &Sockets {
        &self.paths
    }
}

fn base() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_dir());
    runtime.unwrap_or_else(std::env::temp_dir)
}

/// A machine whose device answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Running {
    /// Its run folder.
    pub run: PathBuf,
    /// Its device's control socket.
    pub control: PathBuf,
}

/// The machines that run now, of this user's harnesses, by run folder.
pub fn running() -> Vec<Running> {
    running_in(&base())
}

fn running_in(base: &Path) -> Vec<Running> {
    let mut found: Vec<Running> = fs::read_dir(base)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .filter_map(|entry| {
            let control = Sockets { dir: entry.path() }.control();
            let run = fs::read(entry.path().join(RUN)).ok()?;
            // Not the lock: to try it would get in the way of whoever is about to take it.
            UnixStream::connect(&control).ok()?;
            Some(Running { run: OsString::from_vec(run).into(), control })
        })
        .collect();
    found.sort();
    found
}

/// Removes the folders of harnesses that have been killed. A failure is of no consequence.
fn sweep(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let dir = entry.path();
            // No lock file: not ours, or made this moment.
            if let Ok(lock) = File::open(dir.join(LOCK))
                && flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok()
            {
                let _ = fs::remove_dir_all(dir);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_swept_and_the_living_are_not() {
        let base = tempfile::tempdir().expect("folder");
        let alive = SocketDir::create_in(base.path()).expect("alive");
        let dead = base.path().join(format!("{PREFIX}dead"));
        fs::create_dir(&dead).expect("dead");
        File::create(dead.join(LOCK)).expect("lock");
        File::create(dead.join("qmp.sock")).expect("socket");
        let young = base.path().join(format!("{PREFIX}young"));
        fs::create_dir(&young).expect("young");
        sweep(base.path());
        assert!(alive.paths().dir.exists() && young.exists() && !dead.exists());
        let dir = alive.paths().dir.clone();
        drop(alive);
        assert!(!dir.exists());
    }

    #[test]
    fn machines_that_run_are_found_and_others_are_not() {
        let base = tempfile::tempdir().expect("folder");
        let start = |run: &str| {
            let dir = SocketDir::create_in(base.path()).expect("a folder");
            dir.describe(Path::new(run)).expect("written");
            dir
        };
        let (alive, silent) = (start("/runs/b"), start("/runs/a"));
        let listener = std::os::unix::net::UnixListener::bind(alive.paths().control()).expect("bind");
        drop(std::os::unix::net::UnixListener::bind(silent.paths().control()).expect("bind"));
        let running = || running_in(base.path());
        let expected = Running { run: "/runs/b".into(), control: alive.paths().control() };
        assert_eq!(running(), [expected]);
        drop(listener);
        assert_eq!(running(), []);
    }

    #[test]
    fn socket_paths_fit_into_an_address() {
        let sockets = SocketDir::create().expect("folder");
        assert!(sockets.paths().control().as_os_str().len() < 108);
    }
}

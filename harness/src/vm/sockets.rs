//! The folder of one machine's sockets: short-named, private, gone with the machine.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

use super::command::Sockets;

const PREFIX: &str = "hmmstorm-";
const LOCK: &str = "lock";

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
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|d| d.is_dir());
        let base = runtime.unwrap_or_else(std::env::temp_dir);
        sweep(&base);
        Self::create_in(&base)
    }

    fn create_in(base: &Path) -> io::Result<Self> {
        let dir = tempfile::Builder::new().prefix(PREFIX).rand_bytes(6).tempdir_in(base)?;
        let lock = File::create(dir.path().join(LOCK))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { paths: Sockets { dir: dir.path().into() }, _lock: lock, _dir: dir })
    }

    /// The sockets' paths.
    pub(super) fn paths(&self) -> &Sockets {
        &self.paths
    }
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
    fn socket_paths_fit_into_an_address() {
        let sockets = SocketDir::create().expect("folder");
        assert!(sockets.paths().control().as_os_str().len() < 108);
    }
}

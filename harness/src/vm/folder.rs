//! The run folder: everything that one machine leaves behind, under fixed names.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// A folder with the logs of one machine. Its files:
///
/// | file | written by |
/// |---|---|
/// | `console.log` | the guest kernel, and the shell of an interactive run |
/// | `events.jsonl` | the storm in the guest, one `Record` a line |
/// | `qemu.log` | QEMU's stdout and stderr |
/// | `device.log` | the device's stderr |
/// | `qemu.cmdline`, `device.cmdline` | the harness: what was run, quoted for a shell |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunFolder {
    dir: PathBuf,
}

/// Bytes that must be free for a run's logs before it begins.
const LEAST_SPACE: u64 = 32 << 20;
/// Bytes below which a run ends: what it still writes is lost soon.
const LAST_SPACE: u64 = 1 << 20;

impl RunFolder {
    /// A folder that may not exist yet.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Creates the folder, or takes an existing one and empties the files named above.
    pub fn create(dir: impl AsRef<Path>) -> io::Result<Self> {
        let dir = std::path::absolute(dir)?;
        fs::create_dir_all(&dir)?;
        enough_space(&dir, LEAST_SPACE)?;
        let folder = Self { dir };
        for path in [folder.console(), folder.events(), folder.qemu_log(), folder.device_log()] {
            File::create(path)?;
        }
        Ok(folder)
    }

    /// Whether there is still room for what the machine writes.
    ///
    /// # Errors
    /// [`io::ErrorKind::StorageFull`], or what stops the file system from being asked.
    pub fn has_space(&self) -> io::Result<()> {
        enough_space(&self.dir, LAST_SPACE)
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// `console.log`.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// `events.jsonl`.
    pub fn events(&self) -> PathBuf {
        self.dir.join("events.jsonl")
    }

    /// `qemu.log`.
    pub fn qemu_log(&self) -> PathBuf {
        self.dir.join("qemu.log")
    }

    /// `device.log`.
    pub fn device_log(&self) -> PathBuf {
        self.dir.join("device.log")
    }

    /// `qemu.cmdline`.
    pub fn qemu_command(&self) -> PathBuf {
        self.dir.join("qemu.cmdline")
    }

    /// `device.cmdline`.
    pub fn device_command(&self) -> PathBuf {
        self.dir.join("device.cmdline")
    }
}

/// QEMU drops what it cannot write, and a guest that seems to say nothing would be taken for a dead one.
fn enough_space(dir: &Path, least: u64) -> io::Result<()> {
    let stat = rustix::fs::statvfs(dir)?;
    if stat.f_bavail.saturating_mul(stat.f_frsize) < least {
        let why = format!("less than {} MiB free there", least >> 20);
        return Err(io::Error::new(io::ErrorKind::StorageFull, why));
    }
    Ok(())
}

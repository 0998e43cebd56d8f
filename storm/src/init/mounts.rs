//! The file systems of a guest.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use thiserror::Error;

/// Source and type, target, whether the guest can do without it.
const MOUNTS: [(&str, &str, bool); 6] = [
    ("proc", "/proc", false),
    ("sysfs", "/sys", false),
    ("devtmpfs", "/dev", false),
    ("tmpfs", "/tmp", false),
    ("tmpfs", "/run", false),
    ("debugfs", "/sys/kernel/debug", true),
];

/// A file system that cannot be mounted.
#[derive(Debug, Error)]
pub(crate) enum MountError {
    /// No directory to mount it on.
    #[error("cannot make {target}: {source}")]
    Directory {
        /// The directory.
        target: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot mount {fs} on {target}: {source}. Is it in the kernel's configuration?")]
    Mount {
        /// Its type.
        fs: &'static str,
        /// Where.
        target: &'static str,
        /// Why.
        source: Errno,
    },
}

/// Mounts everything.
///
/// # Errors
/// [`MountError`].
pub(crate) fn mount_all() -> Result<(), MountError> {
    for (fs, target, optional) in MOUNTS {
        let made = match fs::create_dir_all(target) {
            Err(source) if !optional => return Err(MountError::Directory { target, source }),
            made => made.is_ok(),
        };
        if !made {
            continue;
        }
        match mount(fs, target, fs, MountFlags::empty(), None) {
            // EBUSY: the kernel mounts devtmpfs itself when told to.
            Ok(()) | Err(Errno::BUSY) => (),
            Err(_) if optional => (),
            Err(source) => return Err(MountError::Mount { fs, target, source }),
        }
    }
    Ok(())
}

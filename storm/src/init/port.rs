//! The virtio-serial port to the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hmmstorm_abi::wire::event::PORT_NAME;
use rustix::event::{PollFd, PollFlags, Timespec, poll as poll_fds};
use thiserror::Error;

use crate::clock::poll;

/// Guest time that the device gets to announce the port, and the host to listen on it.
const LIMIT: Duration = Duration::from_secs(5);
const PORTS: &str = "/sys/class/virtio-ports";

/// A port that cannot be used.
#[derive(Debug, Error)]
pub(crate) enum PortError {
    /// There is none of that name.
    #[error("no virtio-serial port named {PORT_NAME} in {PORTS} after {} s", LIMIT.as_secs())]
    Missing,
    /// It cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Its node.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Nobody takes what is written.
    #[error("the host does not listen on {PORT_NAME} after {} s", LIMIT.as_secs())]
    Deaf,
}

/// Opens the port for writing. Writes block until the host has taken them, so a record that was written is in the
/// host's file whatever happens next.
///
/// # Errors
/// [`PortError`].
pub(crate) fn open() -> Result<File, PortError> {
    // A guest without virtio ports needs no wait: the class is there as soon as the kernel has them built in, the ports
    // appear when the device has answered.
    if !fs::exists(PORTS).unwrap_or(false) {
        return Err(PortError::Missing);
    }
    let node = poll(LIMIT, find).ok_or(PortError::Missing)?;
    let file = OpenOptions::new()
        .write(true)
        .open(&node)
        .map_err(|source| PortError::Open { path: node.display().to_string(), source })?;
    let limit = Timespec { tv_sec: LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
    match poll_fds(&mut [PollFd::new(&file, PollFlags::OUT)], Some(&limit)) {
        Ok(1..) => Ok(file),
        _ => Err(PortError::Deaf),
    }
}

/// The node of the port, once both exist.
fn find() -> Option<PathBuf> {
    let ports = fs::read_dir(PORTS).ok()?;
    let port = ports.flatten().find(|port| {
        fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT_NAME)
    })?;
    Some(PathBuf::from("/dev").join(port.file_name())).filter(|node| node.exists())
}

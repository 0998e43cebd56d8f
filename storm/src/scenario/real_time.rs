//! Real-time tasks that the kernel does not hold back: it keeps a part of each CPU's time for the others by default.

use std::fs;
use std::path::PathBuf;

use super::WorkError;

/// Microseconds of a second that real-time tasks may have; -1 for all of it.
const THROTTLING: &str = "/proc/sys/kernel/sched_rt_runtime_us";
/// A folder a CPU, whose `runtime` is the time that ordinary tasks are given before real-time ones (kernel/sched/debug.c).
const FAIR_SERVERS: &str = "/sys/kernel/debug/sched/fair_server";

/// Both of the kernel's reserves switched off; put back when this is dropped.
#[derive(Debug)]
pub(crate) struct Unthrottled {
    before: Vec<(PathBuf, String)>,
    process: u32,
}

impl Unthrottled {
    /// Switches them off.
    ///
    /// # Errors
    /// [`WorkError::System`] if the kernel does not let us.
    pub(crate) fn new() -> Result<Self, WorkError> {
        let mut this = Self { before: Vec::new(), process: std::process::id() };
        let servers = fs::read_dir(FAIR_SERVERS).map_err(WorkError::system("read_dir(sched/fair_server)"))?;
        for server in servers {
            let server = server.map_err(WorkError::system("read_dir(sched/fair_server)"))?;
            this.set(server.path().join("runtime"), "0")?;
        }
        this.set(THROTTLING.into(), "-1")?;
        Ok(this)
    }

    fn set(&mut self, path: PathBuf, value: &str) -> Result<(), WorkError> {
        let before = fs::read_to_string(&path).map_err(WorkError::system("read of a scheduler's limit"))?;
        fs::write(&path, value).map_err(WorkError::system("write of a scheduler's limit"))?;
        self.before.push((path, before));
        Ok(())
    }
}

impl Drop for Unthrottled {
    fn drop(&mut self) {
        // A forked worker's copy has nothing to put back.
        if self.process == std::process::id() {
            for (path, value) in self.before.iter().rev() {
                // The guest ends soon; nothing depends on it.
                drop(fs::write(path, value.trim()));
            }
        }
    }
}

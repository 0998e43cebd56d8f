//! The kernel's same-page merging, at full speed for the time of a run.

use std::fs;
use std::time::Duration;

use super::WorkError;
use crate::clock::poll;
use crate::sys::memory::Mapping;

/// Its controls (Documentation/admin-guide/mm/ksm.rst).
const FOLDER: &str = "/sys/kernel/mm/ksm";
/// Guest time within which pages that are alike must have been merged: two scans, of which ksmd makes many a second.
const LIMIT: Duration = Duration::from_secs(30);
/// `run`: stop, and take all merged pages apart.
const UNMERGE: &str = "2";

/// ksmd at work; it stops, and takes apart what it merged, when this is dropped.
#[derive(Debug)]
pub(crate) struct Ksm {
    process: u32,
}

impl Ksm {
    /// Starts it.
    ///
    /// # Errors
    /// [`WorkError::System`]: a kernel without `CONFIG_KSM`.
    pub(crate) fn start() -> Result<Self, WorkError> {
        for (name, value) in [("sleep_millisecs", "10"), ("pages_to_scan", "4096"), ("run", "1")] {
            set(name, value)?;
        }
        Ok(Self { process: std::process::id() })
    }

    /// Offers `mapping` for merging and waits until a part of this process's pages are merged.
    ///
    /// # Errors
    /// [`WorkError::System`]; [`WorkError::Condition`] if nothing is merged: no other page is alike.
    pub(crate) fn merge(&self, mapping: &Mapping) -> Result<(), WorkError> {
        mapping.mergeable().map_err(WorkError::system("madvise(MADV_MERGEABLE)"))?;
        let merged = || (merged_pages()? > 0).then_some(());
        poll(LIMIT, merged).ok_or_else(|| {
            WorkError::Condition(format!(
                "ksmd merged nothing within {} s: nothing is shared",
                LIMIT.as_secs()
            ))
        })
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // Forked workers have a copy of this, and end without dropping it; were they to drop it, ksmd still belongs to us.
        if self.process == std::process::id() {
            // What cannot be taken apart now is when the processes end.
            drop(set("run", UNMERGE));
        }
    }
}

fn set(name: &str, value: &str) -> Result<(), WorkError> {
    fs::write(format!("{FOLDER}/{name}"), value).map_err(WorkError::system("write to /sys/kernel/mm/ksm"))
}

/// Pages of this process that are merged.
fn merged_pages() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/ksm_stat").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("ksm_merging_pages"))?;
    line.trim().parse().ok()
}

//! The accounting oracle: what must be as it was once a run is over and everything is unmapped.

use std::fs;
use std::time::Duration;

use hmmstorm_abi::uapi::Stats;
use hmmstorm_abi::wire::event::{Event, Progress};

use crate::clock::poll;
use crate::gpu::{self, GpuError};
use crate::machine::Machine;

/// Guest time that the kernel gets to return what the run held.
const QUIESCE: Duration = Duration::from_secs(5);
/// Pages by which an RSS counter may be off, for each CPU: the kernel counts in per-CPU batches (mm_types.h,
/// `percpu_counter_batch`).
const RSS_SLACK_PER_CPU: u64 = 64;

/// How things stood before the run.
#[derive(Debug)]
pub(crate) struct Baseline {
    machine: Machine,
    stats: Vec<Stats>,
    rss_anon_kb: Option<u64>,
}

impl Baseline {
    /// Looks.
    ///
    /// # Errors
    /// [`GpuError`].
    pub(crate) fn take(machine: Machine) -> Result<Self, GpuError> {
        Ok(Self { machine, stats: gpu::all_stats()?, rss_anon_kb: rss_anon_kb() })
    }

    /// What is wrong after the run, and the statistics at the end. All that the run mapped must be unmapped.
    ///
    /// # Errors
    /// [`GpuError`].
    pub(crate) fn verify(&self, progress: &Progress) -> Result<(Vec<Event>, Vec<Stats>), GpuError> {
        let mut wrong = Vec::new();
        let mut report = |name: &str, detail: String| {
            wrong.push(Event::Invariant { name: name.to_owned(), detail });
        };
        let mut failure = None;
        let returned = poll(QUIESCE, || match gpu::all_stats() {
            Ok(stats) => stats.iter().all(|s| s.vram_free == s.vram_pages).then_some(()),
            Err(error) => {
                failure = Some(error);
                Some(())
            }
        });
        if let Some(error) = failure {
            return Err(error);
        }
        let stats = gpu::all_stats()?;
        if returned.is_none() {
            for (gpu, s) in stats.iter().enumerate().filter(|(_, s)| s.vram_free != s.vram_pages) {
                report(
                    "vram-returned",
                    format!(
                        "GPU {gpu}: {} of {} pages of VRAM are free {} s after everything was unmapped",
                        s.vram_free,
                        s.vram_pages,
                        QUIESCE.as_secs()
                    ),
                );
            }
        }
        // A driver that was bound anew counts from zero.
        let seen = |s: &Stats| s.device_faults + s.gpu_faults;
        let faults: u64 =
            stats.iter().zip(&self.stats).map(|(now, then)| seen(now).saturating_sub(seen(then))).sum();
        if faults < progress.faults {
            report(
                "fault-count",
                format!("the driver counts {faults} device faults, the workers saw {}", progress.faults),
            );
        }
        if let Some(isolated) = isolated_anon().filter(|&n| n != 0) {
            report("isolated-anon", format!("nr_isolated_anon is {isolated} with nothing under migration"));
        }
        if let (Some(then), Some(now)) = (self.rss_anon_kb, rss_anon_kb()) {
            let slack = RSS_SLACK_PER_CPU * self.machine.cpus as u64 * 4;
            if now > then + slack {
                report("rss", format!("RssAnon was {then} kB before the run and is {now} kB after it"));
            }
        }
        Ok((wrong, stats))
    }
}

/// `RssAnon` of this process.
fn rss_anon_kb() -> Option<u64> {
    field(&fs::read_to_string("/proc/self/status").ok()?, "RssAnon:")
}

/// `nr_isolated_anon`, with the CPUs' own counts folded in first.
fn isolated_anon() -> Option<u64> {
    // Writing folds the per-CPU counts in; where that is not allowed, the sum may be a little old.
    drop(fs::write("/proc/sys/vm/stat_refresh", "1"));
    field(&fs::read_to_string("/proc/vmstat").ok()?, "nr_isolated_anon")
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_fields() {
        let vmstat = "nr_isolated_anon_x 7\nnr_isolated_anon 3\nnr_isolated_file 9\n";
        assert_eq!(field(vmstat, "nr_isolated_anon"), Some(3));
        assert_eq!(field("RssAnon:\t     128 kB\n", "RssAnon:"), Some(128));
        assert_eq!(field(vmstat, "absent"), None);
        assert!(rss_anon_kb().is_some());
    }
}

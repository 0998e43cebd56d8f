//! The accounting oracle: what must hold once a run is over and everything is unmapped, whatever the scenario.
//!
//! The kernel gets [`QUIESCE`] of guest time to return what it holds for a moment; what does not hold then is told by the
//! name of its invariant. What needs no look from here is judged elsewhere: contents and generations by the workers
//! ([`crate::oracle`]), WARN, BUG and bad pages by the host, from the console, and with them the counters of every
//! address space that has ended, which the kernel checks itself (`check_mm()`, kernel/fork.c).

mod bits;
mod huge;
pub(crate) mod rss;
mod tasks;

use std::fs;
use std::time::Duration;

use hmmstorm_abi::uapi::Stats;
use hmmstorm_abi::wire::event::{Event, Progress};

use crate::clock::poll;
use crate::gpu::{self, GpuError};
use bits::Bit;
use huge::HugePages;

/// Guest time that the kernel gets to return what the run held.
const QUIESCE: Duration = Duration::from_secs(5);

/// How things stood before the run.
#[derive(Debug)]
pub(crate) struct Baseline {
    stats: Vec<Stats>,
    mapped_huge: HugePages,
    anon_huge: HugePages,
}

/// What is wrong, if something is.
type Check<'a> = &'a dyn Fn() -> Option<String>;

impl Baseline {
    /// Looks.
    ///
    /// # Errors
    /// [`GpuError`].
    pub(crate) fn take() -> Result<Self, GpuError> {
        Ok(Self {
            stats: gpu::all_stats()?,
            mapped_huge: HugePages::mapped(),
            anon_huge: HugePages::by_size(),
        })
    }

    /// What is wrong after the run, but for the `waived` invariants, and the statistics at the end. All that the run mapped must be unmapped, and all
    /// processes that it made must have ended.
    ///
    /// # Errors
    /// [`GpuError`].
    pub(crate) fn verify(
        &self,
        progress: &Progress,
        waived: &[String],
    ) -> Result<(Vec<Event>, Vec<Stats>), GpuError> {
        // That the nodes answer is known after this one; the checks need not tell.
        gpu::all_stats()?;
        let device_faults = || self.device_faults(progress);
        let mapped = || self.mapped_huge.changed();
        let anon = || self.anon_huge.changed();
        let invariants: [(&str, Check<'_>); 7] = [
            ("vram-returned", &vram_in_use),
            ("fault-count", &device_faults),
            ("isolated-anon", &isolated_anon),
            ("rss", &rss::difference),
            ("huge-pages", &mapped),
            ("huge-pages-by-size", &anon),
            ("tasks", &tasks::uninterruptible),
        ];
        let judged = |name: &str| !waived.iter().any(|waived| waived == name);
        let told = |(name, detail): (&str, String)| Event::Invariant { name: name.to_owned(), detail };
        let mut wrong: Vec<Event> = invariants
            .into_iter()
            .filter(|(name, _)| judged(name))
            .filter_map(|(name, check)| Some((name, settled(check)?)))
            .map(told)
            .collect();
        // Last, for they send pages to the GPU.
        let bits = Bit::ALL.into_iter().filter(|bit| judged(bit.invariant()));
        wrong.extend(bits.filter_map(|bit| Some((bit.invariant(), bit.changed()?))).map(told));
        Ok((wrong, gpu::all_stats()?))
    }

    fn device_faults(&self, progress: &Progress) -> Option<String> {
        let now = gpu::all_stats().ok()?;
        // A driver that was bound anew counts from zero.
        let seen = |s: &Stats| s.device_faults + s.gpu_faults;
        let faults: u64 =
            now.iter().zip(&self.stats).map(|(now, then)| seen(now).saturating_sub(seen(then))).sum();
        (faults < progress.faults)
            .then(|| format!("the driver counts {faults} device faults, the workers saw {}", progress.faults))
    }
}

/// What is wrong and stays wrong.
fn settled(check: Check<'_>) -> Option<String> {
    let mut wrong = None;
    poll(QUIESCE, || {
        wrong = check();
        wrong.is_none().then_some(())
    });
    wrong.map(|wrong| format!("{wrong}, {} s after everything was unmapped", QUIESCE.as_secs()))
}

/// A page of VRAM is free when its last reference is gone: then, and only then, the kernel calls the driver's
/// `folio_free`. So a free list that is complete says that no device page is referenced.
fn vram_in_use() -> Option<String> {
    let stats = gpu::all_stats().ok()?;
    let (gpu, s) = stats.iter().enumerate().find(|(_, s)| s.vram_free != s.vram_pages)?;
    Some(format!("{} of {} pages of GPU {gpu}'s VRAM are free", s.vram_free, s.vram_pages))
}

/// `nr_isolated_anon`, with the CPUs' own counts folded in first.
fn isolated_anon() -> Option<String> {
    // Writing folds the per-CPU counts in; where that is not allowed, the sum may be a little old.
    drop(fs::write("/proc/sys/vm/stat_refresh", "1"));
    let isolated = field(&fs::read_to_string("/proc/vmstat").ok()?, "nr_isolated_anon")?;
    (isolated != 0).then(|| format!("nr_isolated_anon is {isolated} with nothing under migration"))
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
    }

    #[test]
    fn what_passes_once_is_not_wrong() {
        let looks = std::cell::Cell::new(0);
        let check = || {
            looks.set(looks.get() + 1);
            (looks.get() < 3).then(|| "not yet".to_owned())
        };
        assert_eq!(settled(&check), None);
        assert_eq!(looks.get(), 3);
    }
}

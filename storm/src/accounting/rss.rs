//! Resident memory of this process, counted twice: by the counters that the kernel keeps as it maps and unmaps, and by a
//! walk over the page tables. Device-private entries and migration entries count in both.

use std::fs;

use super::field;

/// What each counter of `/proc/self/status` is in `/proc/self/smaps_rollup`.
const TOTALS: [(&str, &str); 2] = [("RssAnon:", "Anonymous:"), ("VmRSS:", "Rss:")];

/// The first counter that differs from what is mapped. The kernel sums its per-CPU parts exactly
/// (`get_mm_counter_sum()`, fs/proc/task_mmu.c), so a difference that stays is a page counted in and never out, or the
/// reverse. With other threads at work, it may be a page that moved between the two looks.
pub(crate) fn difference() -> Option<String> {
    let (status, walked) = (read("status")?, read("smaps_rollup")?);
    TOTALS.iter().find_map(|(counter, total)| {
        let (counted, mapped) = (field(&status, counter)?, field(&walked, total)?);
        (counted != mapped)
            .then(|| format!("{counter} {counted} kB are counted and {total} {mapped} kB are mapped"))
    })
}

fn read(file: &str) -> Option<String> {
    fs::read_to_string(format!("/proc/self/{file}")).ok()
}

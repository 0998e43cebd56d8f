//! Where the time of a CPU fault goes: the samples of a run, by driver and by what the faulting task was about.
//!
//! Counts samples of CPUs that were in a fault on device memory. A task that sleeps is on no CPU, so waiting shows only as
//! far as it is done by looking.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use serde::Deserialize;

/// A stack that has one of these comes from a CPU fault on device memory (`mm/memory.c`, `mm/huge_memory.c`).
const FAULTS: [&str; 2] = ["do_swap_page", "do_huge_pmd_device_private"];
/// Part of the functions' names of our driver.
const OURS: &str = "hsgpu_main";
/// What a fault does, by part of a function's name. The outermost frame that fits one of them counts.
const PHASES: [(&str, &str); 10] = [
    ("migrate_vma_setup", "collect and unmap the pages"),
    ("migrate_vma_pages", "put the new pages in place"),
    ("migrate_vma_finalize", "map the new pages, free the old ones"),
    ("alloc_pages", "allocate the new pages"),
    ("folio_alloc", "allocate the new pages"),
    ("PageMapping", "map the new pages for DMA"),
    ("dma_map", "map the new pages for DMA"),
    ("Session>::copy", "have the device copy: submit, ring, look at the fence"),
    ("channel::", "have the device copy: submit, ring, look at the fence"),
    ("copy_page", "copy"),
];
const OTHER: &str = "all else between the fault and the driver's return";

/// A line of `samples.jsonl`.
#[derive(Deserialize)]
struct Sample {
    /// Leaf first.
    stack: Vec<String>,
}

/// Samples by driver and phase.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Profile(BTreeMap<(&'static str, &'static str), u64>);

impl Profile {
    /// From the samples in a run's folder.
    pub(super) fn of(folder: &Path) -> io::Result<Self> {
        let text = fs::read_to_string(folder.join("samples.jsonl"))?;
        let samples = text.lines().filter_map(|line| serde_json::from_str::<Sample>(line).ok());
        Ok(Self::count(samples.map(|sample| sample.stack)))
    }

    fn count(stacks: impl Iterator<Item = Vec<String>>) -> Self {
        let mut profile = Self::default();
        for stack in stacks {
            let is_fault = |function: &String| FAULTS.iter().any(|name| function.contains(name));
            let Some(fault) = stack.iter().rposition(is_fault) else { continue };
            let inside = &stack[..fault];
            let driver =
                if stack.iter().any(|function| function.contains(OURS)) { super::OURS } else { super::STOCK };
            let phase = inside.iter().rev().find_map(|function| {
                PHASES.iter().find(|(name, _)| function.contains(name)).map(|(_, phase)| *phase)
            });
            *profile.0.entry((driver, phase.unwrap_or(OTHER))).or_default() += 1;
        }
        profile
    }

    /// A table, the largest part first.
    pub(super) fn table(&self) -> String {
        let mut text = String::new();
        for driver in [super::OURS, super::STOCK] {
            let mut rows: Vec<_> = self.0.iter().filter(|((of, _), _)| *of == driver).collect();
            rows.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            let all: u64 = rows.iter().map(|(_, count)| **count).sum();
            let _ = writeln!(text, "{driver}: {all} samples in CPU faults");
            for ((_, phase), count) in rows {
                let _ = writeln!(text, "{:>6.1} %  {phase}", *count as f64 * 100.0 / all.max(1) as f64);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_told_apart_by_driver_and_phase() {
        let stack = |functions: &[&str]| functions.iter().map(|name| (*name).to_owned()).collect();
        let ours = "<hsgpu_main::pagemap::VramPart as PagemapOps>::migrate_to_ram";
        let profile = Profile::count(
            [
                // The outermost frame decides: collecting also allocates.
                stack(&["__folio_alloc", "migrate_vma_setup", ours, "do_swap_page", "handle_mm_fault"]),
                stack(&["<hsgpu_main::channel::Channel>::wait", ours, "do_swap_page"]),
                stack(&["lock_page", ours, "do_swap_page"]),
                stack(&["migrate_vma_setup", "do_swap_page"]),
                // Not in a fault.
                stack(&["migrate_vma_setup", "ioctl"]),
            ]
            .into_iter(),
        );
        let count = |driver, phase: &str| {
            profile.0.iter().find(|((of, name), _)| *of == driver && name.contains(phase)).map(|(_, n)| *n)
        };
        assert_eq!(count(super::super::OURS, "collect"), Some(1));
        assert_eq!(count(super::super::OURS, "device copy"), Some(1));
        assert_eq!(count(super::super::OURS, "all else"), Some(1));
        assert_eq!(count(super::super::STOCK, "collect"), Some(1));
        assert_eq!(profile.0.values().sum::<u64>(), 4);
        assert!(profile.table().contains("33.3 %"), "{}", profile.table());
    }
}

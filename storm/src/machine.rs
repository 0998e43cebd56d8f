//! What this guest has.

use std::fs;

use crate::gpu;

/// CPUs and GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// CPUs online; they are numbered from 0 without gaps in every hmmstorm guest.
    pub(crate) cpus: usize,
    /// GPUs with a node.
    pub(crate) gpus: usize,
}

impl Machine {
    /// Looks.
    pub(crate) fn detect() -> Self {
        let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        Self { cpus: count_cpus(&online).max(1), gpus: gpu::count() }
    }
}

/// Counts the CPUs of a list like `0-3,6`.
fn count_cpus(list: &str) -> usize {
    let count = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some(last.parse::<usize>().ok()? + 1 - first.parse::<usize>().ok()?)
    };
    list.trim().split(',').filter_map(count).sum()
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
pub(crate) fn total_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Pins the calling thread to CPU `cpu`.
///
/// # Errors
/// Of `sched_setaffinity`: `EINVAL` if there is no such CPU.
pub(crate) fn pin(cpu: usize) -> rustix::io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
}

/// Lets the calling thread run on every CPU.
///
/// # Errors
/// Of `sched_setaffinity`.
pub(crate) fn unpin() -> rustix::io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    for cpu in 0..rustix::thread::CpuSet::MAX_CPU {
        set.set(cpu);
    }
    rustix::thread::sched_setaffinity(None, &set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_cpu_lists() {
        assert_eq!(count_cpus("0\n"), 1);
        assert_eq!(count_cpus("0-3\n"), 4);
        assert_eq!(count_cpus("0-1,4,6-7\n"), 5);
        assert_eq!(count_cpus(""), 0);
    }

    #[test]
    fn there_is_memory() {
        assert!(total_memory().is_some_and(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn pins_to_a_cpu() {
        pin(0).expect("CPU 0 exists");
        assert_eq!(rustix::thread::sched_getcpu(), 0);
        assert!(pin(1023).is_err());
        unpin().expect("any CPU will do");
    }
}

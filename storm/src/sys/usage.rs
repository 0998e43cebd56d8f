//! What the kernel counts for the calling thread.

#![expect(unsafe_code, reason = "getrusage(2) has no safe form")]

use std::mem::MaybeUninit;

/// Counters of the calling thread since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Calls of `handle_mm_fault()` that did not fail, on whatever address space: its own accesses, and those that
    /// `hmm_range_fault()` and `get_user_pages()` made for it (mm/memory.c, `mm_account_fault()`).
    pub(crate) faults: u64,
    /// Times that it left its CPU, by itself or by force.
    pub(crate) switches: u64,
}

impl Usage {
    /// As of now.
    pub(crate) fn of_this_thread() -> Self {
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: the pointer is to an rusage, which the call fills.
        let failed = unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) };
        debug_assert_eq!(failed, 0);
        // SAFETY: zeroed, and filled if the call succeeded; all bit patterns are values of its integers.
        let usage = unsafe { usage.assume_init() };
        let count = |value: libc::c_long| u64::try_from(value).unwrap_or(0);
        Self {
            faults: count(usage.ru_minflt) + count(usage.ru_majflt),
            switches: count(usage.ru_nvcsw) + count(usage.ru_nivcsw),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;
    use crate::sys::memory::Mapping;

    #[test]
    fn touching_pages_and_sleeping_counts() {
        let mapping: Mapping = Mapping::private(64).expect("mmap");
        let before = Usage::of_this_thread();
        for page in 0..64 {
            mapping.page(page)[0].store(1, Relaxed);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
        let after = Usage::of_this_thread();
        assert!(after.faults >= before.faults + 64, "{before:?} {after:?}");
        assert!(after.switches > before.switches, "{before:?} {after:?}");
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Counters of one GPU's driver, read by `HSGPU_STATS` and in debugfs.

use kernel::{
    fmt,
    sync::atomic::{
        Atomic,
        Relaxed, //
    }, //
};

use crate::abi::uapi;

/// An event counter that any context may bump.
pub(crate) struct Counter(Atomic<u64>);

impl Counter {
    /// A counter at zero.
    pub(crate) const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// Counts one event.
    #[inline]
    pub(crate) fn inc(&self) {
        self.add(1);
    }

    /// Counts `n` events.
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        self.0.add(n, Relaxed);
    }

    /// Events so far.
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

macro_rules! stats {
    ($( $(#[$doc:meta])* $name:ident, )*) => {
        /// The counters of one GPU; each only grows. Their meaning is that of the fields of [`uapi::Stats`].
        pub(crate) struct Stats {
            $( $(#[$doc])* pub(crate) $name: Counter, )*
        }

        impl Stats {
            /// All zero.
            pub(crate) const fn new() -> Self {
                Self { $( $name: Counter::new(), )* }
            }

            /// Copies every counter into the field of its name.
            pub(crate) fn store(&self, to: &mut uapi::Stats) {
                $( to.$name = self.$name.get(); )*
            }
        }

        impl fmt::Display for Stats {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $( writeln!(f, "{} {}", stringify!($name), self.$name.get())?; )*
                Ok(())
            }
        }
    };
}

stats! {
    /// CPU faults on device pages that `migrate_to_ram` served.
    cpu_faults,
    /// Of these, those that failed.
    cpu_faults_failed,
    /// Pages migrated to the device.
    to_device,
    /// Pages migrated to system memory, CPU faults included.
    to_system,
    /// Pages collected by a migration and then not moved.
    not_migrated,
    /// Calls of `hmm_range_fault()`.
    device_faults,
    /// Of these, those whose result was stale.
    device_fault_retries,
    /// `mmu_interval_notifier` invalidations.
    invalidations,
    /// Descriptors submitted.
    submitted,
    /// Doorbells that had to be rung.
    doorbells,
    /// Fences waited for.
    fences,
    /// Fences that ended in an error or timed out.
    fences_failed,
    /// Interrupts taken.
    interrupts,
    /// Pages evicted to make room for others.
    evicted,
    /// Entries read from the fault buffer.
    gpu_faults,
    /// Of these, those that could not be served.
    gpu_faults_failed,
    /// Of these, those that found the page mapped by then.
    gpu_faults_stale,
    /// Faults that found the buffer full.
    fault_overflows,
    /// Replays asked for.
    replays,
    /// Pages entered in GPU page tables.
    gpu_mapped,
    /// Huge entries made.
    gpu_mapped_huge,
    /// Pages taken from GPU page tables.
    gpu_unmapped,
    /// Invalidations of the GPU's TLB.
    tlb_invalidations,
    /// Pages that stayed in system memory because they had moved too often.
    thrashing,
    /// Access jobs that ended.
    jobs,
    /// Of these, those that ended in an error.
    jobs_failed,
    /// Pages that came from the memory of another GPU.
    from_peer,
    /// Folios of 2 MiB that were migrated to the device whole.
    huge_to_device,
    /// The same, to system memory.
    huge_to_system,
    /// Folios of 2 MiB on the device that the kernel split.
    splits,
    /// Pages that became exclusive to the device.
    exclusive,
    /// Bytes that the copy engine moved or filled.
    copied,
    /// Pages that a CPU fault wanted and `migrate_vma_setup()` did not give out.
    abort_busy,
    /// Pages that had a destination, and then did not move.
    abort_referenced,
    /// Pages for which there was no room.
    abort_no_room,
    /// Pages that could not be copied.
    abort_copy,
    /// Pages whose contents are lost.
    lost,
}

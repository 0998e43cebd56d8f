//! The GPUs' nodes, `/dev/hmm_dmirror<n>`, as typed calls with errors that say what was asked.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hmmstorm_abi::job::{Job, Outcome};
use hmmstorm_abi::ring::Status;
use hmmstorm_abi::uapi::{self, PAGE_SIZE};
use rustix::io::Errno;
use thiserror::Error;

use crate::clock::monotonic_ns;
use crate::sys::ioctl;
use crate::sys::memory::{Addresses, Mapping, PageSpan};

/// Path of GPU `index`'s node.
pub(crate) fn node(index: usize) -> String {
    format!("/dev/hmm_dmirror{index}")
}

/// Number of GPUs that have a node. The nodes of the kernel's test_hmm, which has the same names, are no GPUs', and those of
/// coherent memory are no further ones.
pub(crate) fn count() -> usize {
    let bound = fs::read_dir("/sys/bus/pci/drivers/hsgpu").map_or(0, |devices| {
        let names = devices.filter_map(|device| device.ok()?.file_name().into_string().ok());
        // By their addresses; everything else in the folder has a plain name.
        names.filter(|name| name.contains(':')).count()
    });
    (0..bound).take_while(|&index| std::path::Path::new(&node(index)).exists()).count()
}

/// Number of the node of the coherent memory of GPU `index` of `gpus`, if it has any.
pub(crate) fn coherent_node(index: usize, gpus: usize) -> usize {
    // Where hmm-tests looks for it.
    gpus.max(2) + index
}

/// A call to a GPU that failed.
#[derive(Debug, Error)]
pub(crate) enum GpuError {
    /// The node cannot be opened.
    #[error(
        "cannot open {path}: {source}. Is hsgpu.ko loaded, and did it bind that GPU? (dmesg | grep hsgpu)"
    )]
    Open {
        /// The node.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// An ioctl came back with an error.
    #[error("{call} on GPU {gpu}, pages {first}..{end} at {address:#x}: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        /// The GPU.
        gpu: usize,
        /// First page.
        first: usize,
        /// Page after the last.
        end: usize,
        /// User address of the first page.
        address: u64,
        /// Why.
        source: Errno,
    },
    /// The driver gave a device access up: whatever page it got for it was another one by the time it came to use it.
    #[error(
        "{call} on GPU {gpu}, page {page}: not served in {:.1} s and {tries} calls of hmm_range_fault()",
        *waited_ns as f64 / 1e9
    )]
    Unserved {
        /// Its name.
        call: &'static str,
        /// The GPU.
        gpu: usize,
        /// First page that it is about.
        page: usize,
        /// Guest time that it took, nanoseconds.
        waited_ns: u64,
        /// Calls of `hmm_range_fault()` meanwhile.
        tries: u64,
    },
    /// A job failed.
    #[error("a job on GPU {gpu} ended with `{status}` after {done} accesses: {job:?}")]
    Job {
        /// The GPU.
        gpu: usize,
        /// The job.
        job: Job,
        /// How it ended.
        status: String,
        /// How far it came.
        done: u64,
    },
    /// A job cannot be started.
    #[error("HSGPU_SUBMIT on GPU {gpu} of {job:?}: {source}")]
    Submit {
        /// The GPU.
        gpu: usize,
        /// The job.
        job: Job,
        /// Why.
        source: Errno,
    },
    /// A job cannot be waited for.
    #[error("HSGPU_WAIT on GPU {gpu} for {job:?}: {source}")]
    Wait {
        /// The GPU.
        gpu: usize,
        /// The job.
        job: Job,
        /// Why.
        source: Errno,
    },
    /// A policy is refused.
    #[error("HSGPU_POLICY on GPU {gpu}, {policy:?}: {source}")]
    Policy {
        /// The GPU.
        gpu: usize,
        /// The policy.
        policy: uapi::Policy,
        /// Why.
        source: Errno,
    },
    /// A call that is about no memory came back with an error.
    #[error("{call} on GPU {gpu}: {source}")]
    Device {
        /// Its name.
        call: &'static str,
        /// The GPU.
        gpu: usize,
        /// Why.
        source: Errno,
    },
    /// A buffer for a snapshot cannot be had.
    #[error("no memory for a snapshot: {0}")]
    Memory(Errno),
}

impl GpuError {
    /// The number that the call came back with, if it came back.
    pub(crate) fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { source, .. }
            | Self::Device { source, .. }
            | Self::Submit { source, .. }
            | Self::Wait { source, .. }
            | Self::Policy { source, .. } => Some(*source),
            Self::Unserved { .. } => Some(Errno::BUSY),
            Self::Open { .. } | Self::Memory(_) | Self::Job { .. } => None,
        }
    }
}

/// Whose a device access or a migration is: what `hmm_range_fault()` or `migrate_vma_setup()` gets as owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The GPU's own.
    Own,
    /// Nobody's: every device-private page is foreign.
    None,
}

impl Owner {
    const fn to_abi(self) -> u32 {
        match self {
            Self::Own => uapi::OWNER_OWN,
            Self::None => uapi::OWNER_NONE,
        }
    }

    /// What the driver does at faults of jobs whose owner this is: one page at a time, at `placement`, however often.
    pub(crate) fn policy(self, placement: u32) -> uapi::Policy {
        uapi::Policy { chunk: PAGE_SIZE as u64, placement, owner: self.to_abi(), limit: 0, window_ms: 100 }
    }
}

/// An open node. The driver ties it to the address space that opened it: a forked child opens its own.
#[derive(Debug)]
pub(crate) struct Gpu {
    file: File,
    index: usize,
}

impl Gpu {
    /// Opens GPU `index` for this address space.
    ///
    /// # Errors
    /// [`GpuError::Open`].
    pub(crate) fn open(index: usize) -> Result<Self, GpuError> {
        let path = node(index);
        match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => Ok(Self { file, index }),
            Err(source) => Err(GpuError::Open { path, source }),
        }
    }

    /// Its number.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    fn call_error(&self, call: &'static str, range: PageSpan<'_>) -> impl FnOnce(Errno) -> GpuError {
        let (gpu, first, pages, address) = (self.index, range.first(), range.pages(), range.address());
        move |source| GpuError::Call { call, gpu, first, end: first + pages, address, source }
    }

    /// Migrates the pages of `range` that are where `select` says to this GPU.
    ///
    /// # Errors
    /// [`GpuError::Call`]. That pages stayed where they were is no error: see `migrated` and [`Gpu::holds`].
    pub(crate) fn migrate_here(&self, range: PageSpan<'_>, select: u32) -> Result<uapi::Migrate, GpuError> {
        let request = uapi::Migrate {
            select,
            owner: uapi::OWNER_OWN,
            direction: uapi::TO_DEVICE,
            ..Default::default()
        };
        ioctl::migrate(&self.file, range, request).map_err(self.call_error("HSGPU_MIGRATE", range))
    }

    /// Migrates what is at these addresses, if anything is, to this GPU.
    ///
    /// # Errors
    /// Of the driver, as a number; `EINVAL` and `EFAULT` mean that nothing is there.
    pub(crate) fn migrate_at(&self, range: Addresses) -> Result<uapi::Migrate, Errno> {
        let request = uapi::Migrate {
            select: uapi::SELECT_SYSTEM,
            owner: uapi::OWNER_OWN,
            direction: uapi::TO_DEVICE,
            ..Default::default()
        };
        ioctl::migrate(&self.file, range, request)
    }

    /// Has the GPU read what is at these addresses, if anything is, into `buffer`.
    ///
    /// # Errors
    /// As [`Gpu::migrate_at`].
    pub(crate) fn read_at(&self, range: Addresses, buffer: &Mapping) -> Result<uapi::Access, Errno> {
        ioctl::read(&self.file, range, buffer, uapi::OWNER_OWN)
    }

    /// Has the GPU read `range` into `buffer`.
    ///
    /// # Errors
    /// [`GpuError::Unserved`], [`GpuError::Call`].
    pub(crate) fn read(
        &self,
        range: PageSpan<'_>,
        buffer: &Mapping,
        owner: Owner,
    ) -> Result<uapi::Access, GpuError> {
        self.access("HSGPU_ACCESS (read)", 0, range, buffer, owner)
    }

    /// Has the GPU write `buffer` to `range`.
    ///
    /// # Errors
    /// [`GpuError::Unserved`], [`GpuError::Call`].
    pub(crate) fn write(
        &self,
        range: PageSpan<'_>,
        buffer: &Mapping,
        owner: Owner,
    ) -> Result<uapi::Access, GpuError> {
        self.access("HSGPU_ACCESS (write)", 1, range, buffer, owner)
    }

    fn access(
        &self,
        call: &'static str,
        write: u32,
        range: PageSpan<'_>,
        buffer: &Mapping,
        owner: Owner,
    ) -> Result<uapi::Access, GpuError> {
        let mut request = uapi::Access { write, owner: owner.to_abi(), ..Default::default() };
        let began = monotonic_ns();
        match ioctl::access(&self.file, range, buffer, &mut request) {
            Ok(()) => Ok(request),
            Err(Errno::BUSY) => Err(GpuError::Unserved {
                call,
                gpu: self.index,
                page: range.first(),
                waited_ns: monotonic_ns() - began,
                tries: request.faults,
            }),
            Err(source) => Err(self.call_error(call, range)(source)),
        }
    }

    /// Has the driver lock the folio of each page of `range` in turn, `times` times all together, for `hold`, with `gap`
    /// between two, and migrate none. Pages that are not on this GPU are passed over.
    ///
    /// # Errors
    /// [`GpuError::Call`]; `EINVAL` if that takes more than [`uapi::HOLD_LIMIT_US`].
    pub(crate) fn hold(
        &self,
        range: PageSpan<'_>,
        times: u64,
        hold: Duration,
        gap: Duration,
    ) -> Result<uapi::Hold, GpuError> {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let request = uapi::Hold { times, hold_us: micros(hold), gap_us: micros(gap), ..Default::default() };
        ioctl::hold(&self.file, range, request).map_err(self.call_error("HSGPU_HOLD", range))
    }

    /// Has this GPU's driver refuse CPU faults by `mode` (`uapi::REFUSE_*`) for `time`; says how many it has refused so far.
    ///
    /// # Errors
    /// [`GpuError::Device`].
    pub(crate) fn refuse(&self, mode: u32, time: Duration) -> Result<u64, GpuError> {
        let for_us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        ioctl::refuse(&self.file, uapi::Refuse { mode, for_us, ..Default::default() })
            .map(|answer| answer.refused)
            .map_err(|source| GpuError::Device { call: "HSGPU_REFUSE", gpu: self.index, source })
    }

    /// How many pages of `range` are in this GPU's memory; faults nothing in.
    ///
    /// # Errors
    /// [`GpuError::Call`], [`GpuError::Memory`].
    pub(crate) fn holds(&self, range: PageSpan<'_>) -> Result<usize, GpuError> {
        let buffer = Mapping::private(range.pages().div_ceil(PAGE_SIZE)).map_err(GpuError::Memory)?;
        ioctl::snapshot(&self.file, range, &buffer)
            .map_err(self.call_error("HMM_DMIRROR_SNAPSHOT", range))?;
        let local = |&byte: &u8| {
            byte != uapi::HMM_DMIRROR_PROT_ERROR
                && byte & uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE
                    == uapi::HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
        };
        let bytes = buffer.cells().iter().flat_map(|cell| cell.load(Relaxed).to_ne_bytes());
        Ok(bytes.take(range.pages()).filter(local).count())
    }

    /// Starts an access job over `range` and comes back at once.
    ///
    /// # Errors
    /// [`GpuError::Call`].
    pub(crate) fn submit(&self, range: PageSpan<'_>, job: Job) -> Result<Running<'_>, GpuError> {
        let submitted = ioctl::submit(&self.file, range, job, uapi::Submit::default())
            .map_err(self.call_error("HSGPU_SUBMIT", range))?;
        Ok(Running { gpu: self, handle: submitted.handle, job })
    }

    /// The same for a job that may be without progress for `limit_ms` only.
    ///
    /// # Errors
    /// [`GpuError::Call`].
    pub(crate) fn submit_limited(
        &self,
        range: PageSpan<'_>,
        job: Job,
        limit_ms: u32,
    ) -> Result<Running<'_>, GpuError> {
        let request = uapi::Submit { limit_ms, ..Default::default() };
        let submitted = ioctl::submit(&self.file, range, job, request)
            .map_err(self.call_error("HSGPU_SUBMIT (limited)", range))?;
        Ok(Running { gpu: self, handle: submitted.handle, job })
    }

    /// Starts an access job that only loads, at addresses where there may be nothing.
    ///
    /// # Errors
    /// [`GpuError::Submit`], also if the job stores.
    pub(crate) fn submit_anywhere(&self, job: Job) -> Result<Running<'_>, GpuError> {
        let gpu = self.index;
        let submitted =
            ioctl::submit_load(&self.file, job).map_err(|source| GpuError::Submit { gpu, job, source })?;
        Ok(Running { gpu: self, handle: submitted.handle, job })
    }

    /// Runs an access job over `range`, whose addresses are all valid, in this thread, which serves its page faults, too.
    ///
    /// # Errors
    /// [`GpuError::Unserved`], [`GpuError::Call`], [`GpuError::Job`].
    pub(crate) fn run_here(&self, range: PageSpan<'_>, job: Job) -> Result<Outcome, GpuError> {
        let request = uapi::Submit { flags: uapi::SUBMIT_DIRECT, ..Default::default() };
        let (began, faults) = (monotonic_ns(), self.stats()?.device_faults);
        let submitted = ioctl::submit(&self.file, range, job, request)
            .map_err(self.call_error("HSGPU_SUBMIT (direct)", range))?;
        let (status, outcome) = Running { gpu: self, handle: submitted.handle, job }.end()?;
        let waited_ns = monotonic_ns() - began;
        // A fault that takes so long to be cancelled was no bad address.
        let given_up = waited_ns >= u64::from(uapi::STALE_LIMIT_MS) * 1_000_000;
        if status == Status::PageFault as u32 && given_up {
            return Err(GpuError::Unserved {
                call: "HSGPU_SUBMIT (direct)",
                gpu: self.index,
                page: range.first(),
                waited_ns,
                tries: self.stats()?.device_faults - faults,
            });
        }
        self.judge(job, status, outcome)
    }

    fn judge(&self, job: Job, status: u32, outcome: Outcome) -> Result<Outcome, GpuError> {
        if status == Status::Ok as u32 {
            Ok(outcome)
        } else {
            let (gpu, status) = (self.index, status_name(status));
            Err(GpuError::Job { gpu, job, status, done: outcome.done })
        }
    }

    /// Sets what the driver does when the GPU faults in this address space.
    ///
    /// # Errors
    /// [`GpuError::Policy`].
    pub(crate) fn set_policy(&self, policy: uapi::Policy) -> Result<(), GpuError> {
        ioctl::policy(&self.file, policy).map_err(|source| GpuError::Policy {
            gpu: self.index,
            policy,
            source,
        })
    }

    /// Moves what GPU `from` has of `range` to this one; returns how many pages moved.
    ///
    /// # Errors
    /// [`GpuError::Call`].
    pub(crate) fn take_from(&self, range: PageSpan<'_>, from: &Gpu) -> Result<u64, GpuError> {
        ioctl::peer_migrate(&self.file, range, from.index as u32)
            .map(|done| done.migrated)
            .map_err(self.call_error("HSGPU_PEER_MIGRATE", range))
    }

    /// Moves what this GPU has of `range` back to system memory; returns how many pages moved.
    ///
    /// # Errors
    /// [`GpuError::Call`].
    pub(crate) fn evict(&self, range: PageSpan<'_>) -> Result<u64, GpuError> {
        ioctl::evict(&self.file, range)
            .map(|done| done.evicted)
            .map_err(self.call_error("HSGPU_EVICT", range))
    }

    /// The driver's counters.
    ///
    /// # Errors
    /// [`GpuError::Device`].
    pub(crate) fn stats(&self) -> Result<uapi::Stats, GpuError> {
        ioctl::stats(&self.file).map_err(|source| GpuError::Device {
            call: "HSGPU_STATS",
            gpu: self.index,
            source,
        })
    }
}

/// A job that was started. It goes on if this is dropped, until its GPU is closed.
#[derive(Debug)]
pub(crate) struct Running<'a> {
    gpu: &'a Gpu,
    handle: u64,
    job: Job,
}

impl Running<'_> {
    /// Waits for its end.
    ///
    /// # Errors
    /// [`GpuError::Job`] if it failed, [`GpuError::Wait`].
    pub(crate) fn wait(self) -> Result<Outcome, GpuError> {
        let (gpu, job) = (self.gpu, self.job);
        let (status, outcome) = self.end()?;
        gpu.judge(job, status, outcome)
    }

    /// Waits for its end, however it ends: [`uapi::Wait::status`] and what came out. Of a GPU that was unbound meanwhile,
    /// [`uapi::JOB_CANCELLED`] and nothing.
    ///
    /// # Errors
    /// [`GpuError::Wait`].
    pub(crate) fn end(self) -> Result<(u32, Outcome), GpuError> {
        let (gpu, job) = (self.gpu.index, self.job);
        match ioctl::wait(&self.gpu.file, self.handle, WAIT_MS) {
            Ok(ended) => Ok((ended.status, Outcome::from_words(ended.outcome))),
            Err(Errno::NODEV) => Ok((uapi::JOB_CANCELLED, Outcome::default())),
            Err(source) => Err(GpuError::Wait { gpu, job, source }),
        }
    }
}

/// How long a job is waited for: longer than the driver lets one live without progress.
const WAIT_MS: u32 = 600_000;

fn status_name(status: u32) -> String {
    match status {
        uapi::JOB_TIMEOUT => "no end in time".to_owned(),
        uapi::JOB_DEAD => "the device is dead".to_owned(),
        uapi::JOB_CANCELLED => "cancelled".to_owned(),
        code => Status::from_u32(code)
            .map_or_else(|| format!("unknown status {code}"), |status| format!("{status:?}")),
    }
}

/// The driver's counters of every GPU as debugfs has them: no node is opened, so nothing of the process that asks is tied to
/// the driver, and nothing is waited for. None where there is no driver.
pub(crate) fn counters() -> Vec<BTreeMap<String, u64>> {
    let pair = |line: &str| -> Option<(String, u64)> {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    };
    (0..)
        .map_while(|gpu| fs::read_to_string(format!("/sys/kernel/debug/hsgpu{gpu}/stats")).ok())
        .map(|text| text.lines().filter_map(pair).collect())
        .collect()
}

/// The driver's counters of every GPU.
///
/// # Errors
/// Of [`Gpu::open`] and [`Gpu::stats`].
pub(crate) fn all_stats() -> Result<Vec<uapi::Stats>, GpuError> {
    (0..count()).map(|index| Gpu::open(index)?.stats()).collect()
}

/// The counters by name, as events carry them.
pub(crate) fn named(stats: &uapi::Stats) -> BTreeMap<String, u64> {
    [
        ("vram_pages", stats.vram_pages),
        ("vram_free", stats.vram_free),
        ("cpu_faults", stats.cpu_faults),
        ("cpu_faults_failed", stats.cpu_faults_failed),
        ("to_device", stats.to_device),
        ("to_system", stats.to_system),
        ("not_migrated", stats.not_migrated),
        ("device_faults", stats.device_faults),
        ("device_fault_retries", stats.device_fault_retries),
        ("invalidations", stats.invalidations),
        ("submitted", stats.submitted),
        ("doorbells", stats.doorbells),
        ("fences", stats.fences),
        ("fences_failed", stats.fences_failed),
        ("interrupts", stats.interrupts),
        ("flags", stats.flags),
        ("evicted", stats.evicted),
        ("huge_to_device", stats.huge_to_device),
        ("huge_to_system", stats.huge_to_system),
        ("splits", stats.splits),
        ("exclusive", stats.exclusive),
        ("lost", stats.lost),
        ("coherent_pages", stats.coherent_pages),
        ("coherent_free", stats.coherent_free),
        ("copied", stats.copied),
        ("abort_busy", stats.abort_busy),
        ("abort_referenced", stats.abort_referenced),
        ("abort_no_room", stats.abort_no_room),
        ("abort_copy", stats.abort_copy),
        ("gpu_faults", stats.gpu_faults),
        ("gpu_faults_failed", stats.gpu_faults_failed),
        ("gpu_faults_stale", stats.gpu_faults_stale),
        ("fault_overflows", stats.fault_overflows),
        ("replays", stats.replays),
        ("gpu_mapped", stats.gpu_mapped),
        ("gpu_mapped_huge", stats.gpu_mapped_huge),
        ("gpu_unmapped", stats.gpu_unmapped),
        ("tlb_invalidations", stats.tlb_invalidations),
        ("thrashing", stats.thrashing),
        ("jobs", stats.jobs),
        ("jobs_failed", stats.jobs_failed),
        ("from_peer", stats.from_peer),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_a_name() {
        let named = named(&uapi::Stats { flags: 1, ..Default::default() });
        assert_eq!(named.len() * size_of::<u64>(), size_of::<uapi::Stats>());
        assert_eq!(named["flags"], 1);
    }

    #[test]
    fn a_missing_node_says_what_to_look_at() {
        let error = Gpu::open(4711).expect_err("no such node").to_string();
        assert!(error.contains("/dev/hmm_dmirror4711") && error.contains("hsgpu.ko"), "{error}");
    }
}

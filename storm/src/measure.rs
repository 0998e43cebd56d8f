//! Measuring from inside: how long operations take, how often the kernel tried, how long a worker kept its CPU.
//!
//! Everything is in one worker's pages of the board, which other address spaces read while it works, so it consists of
//! plain counters, and one worker writes each of them.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use hmmstorm_abi::uapi;
use hmmstorm_abi::wire::event::Measured;

use crate::clock::monotonic_ns;
use crate::sys::usage::Usage;

/// Bits of a value that a bucket keeps: HdrHistogram's geometry for two significant digits.
const PRECISION: u32 = 8;
/// Buckets of one power of two, from the first whose values do not fit [`PRECISION`] on.
const HALF: usize = 1 << (PRECISION - 1);
/// Values are below 2^this: 137 seconds of nanoseconds.
const BITS: u32 = 37;
/// Buckets.
const BUCKETS: usize = (1 << PRECISION) + (BITS - PRECISION) as usize * HALF;
/// Cells before the buckets.
const HEAD: usize = 16;

const BEGAN_AT: usize = 0;
/// 0: not yet.
const RETURNED_AT: usize = 1;
const FAULTS_BEFORE: usize = 2;
const FAULTS_AFTER: usize = 3;
const RESOLVED: usize = 4;
const MM_FAULTS: usize = 5;
const SWITCHES: usize = 6;
/// When the count above was first seen.
const SWITCHES_SINCE: usize = 7;
const UNSWITCHED: usize = 8;
const ATTEMPTS: usize = 9;
const PAGES: usize = 10;
const COLLECTED: usize = 11;
const MIGRATED: usize = 12;
const RETRIES: usize = 13;

/// Cells that a worker's measurements take.
pub(crate) const CELLS: usize = HEAD + BUCKETS;

/// One worker's measurements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter<'a>(&'a [AtomicU64]);

impl<'a> Meter<'a> {
    /// In the first [`CELLS`] of these cells.
    ///
    /// # Panics
    /// If there are fewer.
    pub(crate) fn new(cells: &'a [AtomicU64]) -> Self {
        Self(&cells[..CELLS])
    }

    fn get(self, cell: usize) -> u64 {
        self.0[cell].load(Relaxed)
    }

    fn set(self, cell: usize, value: u64) {
        self.0[cell].store(value, Relaxed);
    }

    fn add(self, cell: usize, value: u64) {
        self.set(cell, self.get(cell) + value);
    }

    /// The calling task works here from now on.
    pub(crate) fn enter(self) {
        self.set(SWITCHES, Usage::of_this_thread().switches);
        self.set(SWITCHES_SINCE, monotonic_ns());
    }

    /// An operation begins.
    pub(crate) fn begin(self) {
        let usage = Usage::of_this_thread();
        self.set(FAULTS_BEFORE, usage.faults);
        self.set(RETURNED_AT, 0);
        let now = monotonic_ns();
        self.look_at_switches(usage, now);
        self.set(BEGAN_AT, now);
    }

    /// What is to be timed is over: checks of its result follow, whose time and faults are not its own.
    pub(crate) fn returned(self) {
        let now = monotonic_ns();
        let usage = Usage::of_this_thread();
        self.look_at_switches(usage, now);
        self.set(FAULTS_AFTER, usage.faults);
        self.set(RETURNED_AT, now);
    }

    /// The operation that began is complete and has resolved `faults` faults on device pages.
    pub(crate) fn complete(self, faults: u64) {
        if self.get(RETURNED_AT) == 0 {
            self.returned();
        }
        if faults == 0 {
            return;
        }
        self.add(HEAD + bucket(self.get(RETURNED_AT).saturating_sub(self.get(BEGAN_AT))), 1);
        self.add(RESOLVED, faults);
        let tries = self.get(FAULTS_AFTER).saturating_sub(self.get(FAULTS_BEFORE));
        self.add(MM_FAULTS, tries);
        // Fewer tries than faults: somebody else brought the page back meanwhile.
        self.add(RETRIES, tries.saturating_sub(faults));
    }

    /// The operation that began is complete and was an access by the CPU: it resolved a fault if it took one.
    pub(crate) fn complete_touch(self) {
        if self.get(RETURNED_AT) == 0 {
            self.returned();
        }
        self.complete(u64::from(self.get(FAULTS_AFTER) > self.get(FAULTS_BEFORE)));
    }

    /// Calls of `handle_mm_fault()` by the calling task since the operation began.
    pub(crate) fn mm_faults(self) -> u64 {
        Usage::of_this_thread().faults.saturating_sub(self.get(FAULTS_BEFORE))
    }

    fn look_at_switches(self, usage: Usage, now: u64) {
        if usage.switches != self.get(SWITCHES) {
            self.set(SWITCHES, usage.switches);
            self.set(SWITCHES_SINCE, now);
        }
        let kept = now.saturating_sub(self.get(SWITCHES_SINCE));
        self.set(UNSWITCHED, self.get(UNSWITCHED).max(kept));
    }

    /// A migration of `pages` pages was asked for, and this came of it.
    pub(crate) fn migrated(self, pages: usize, answer: &uapi::Migrate) {
        self.add(ATTEMPTS, answer.calls);
        self.add(PAGES, pages as u64);
        self.add(COLLECTED, answer.collected);
        self.add(MIGRATED, answer.migrated);
    }
}

/// What the workers measured, all of them together.
pub(crate) fn sum<'a>(meters: impl Iterator<Item = Meter<'a>>) -> Measured {
    let mut sum = Measured::default();
    let mut latency = BTreeMap::new();
    for meter in meters {
        for index in 0..BUCKETS {
            let count = meter.get(HEAD + index);
            if count > 0 {
                *latency.entry(lower_end(index)).or_insert(0) += count;
            }
        }
        sum.resolved += meter.get(RESOLVED);
        sum.mm_faults += meter.get(MM_FAULTS);
        sum.retries += meter.get(RETRIES);
        sum.unswitched_ns = sum.unswitched_ns.max(meter.get(UNSWITCHED));
        sum.migrations.attempts += meter.get(ATTEMPTS);
        sum.migrations.pages += meter.get(PAGES);
        sum.migrations.collected += meter.get(COLLECTED);
        sum.migrations.migrated += meter.get(MIGRATED);
    }
    sum.latency_ns = latency.into_iter().collect();
    sum
}

/// The bucket of a value; the last one has all that are too large.
fn bucket(value: u64) -> usize {
    let value = value.min((1 << BITS) - 1);
    // Doublings beyond the values that are counted one by one.
    let exponent = (u64::BITS - value.leading_zeros()).saturating_sub(PRECISION);
    if exponent == 0 { value as usize } else { exponent as usize * HALF + (value >> exponent) as usize }
}

/// The least value of a bucket.
fn lower_end(bucket: usize) -> u64 {
    if bucket < 2 * HALF {
        return bucket as u64;
    }
    let exponent = bucket / HALF - 1;
    ((bucket - exponent * HALF) as u64) << exponent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memory::Mapping;

    #[test]
    fn buckets_are_gapless_and_keep_two_digits() {
        for bucket_index in 0..BUCKETS {
            assert_eq!(bucket(lower_end(bucket_index)), bucket_index);
            if bucket_index > 0 {
                assert_eq!(bucket(lower_end(bucket_index) - 1), bucket_index - 1);
            }
        }
        for value in [0, 1, 255, 256, 257, 511, 512, 1_000_000, 123_456_789, (1 << BITS) - 1] {
            let kept = lower_end(bucket(value));
            assert!(kept <= value && (value - kept) * 128 <= value, "{value} became {kept}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn operations_with_faults_are_timed_and_their_tries_counted() {
        let cells: Mapping = Mapping::private(CELLS.div_ceil(512)).expect("mmap");
        let pages: Mapping = Mapping::private(8).expect("mmap");
        let meter = Meter::new(cells.cells());
        meter.complete(0); // first touches of the meter's own memory
        meter.enter();
        for page in 0..4 {
            meter.begin();
            pages.page(page)[0].store(1, Relaxed);
            meter.returned();
            pages.page(4 + page)[0].store(1, Relaxed); // no part of the operation
            meter.complete(u64::from(page > 0));
        }
        let answer = uapi::Migrate { calls: 1, collected: 3, migrated: 2, ..Default::default() };
        meter.migrated(4, &answer);
        let measured = sum([meter, meter].into_iter());
        assert_eq!(measured.latency_ns.iter().map(|(_, count)| count).sum::<u64>(), 6);
        assert_eq!((measured.resolved, measured.mm_faults, measured.retries), (6, 6, 0));
        meter.begin();
        for page in 4..6 {
            pages.discard(page..page + 1).expect("madvise");
            pages.page(page)[0].store(1, Relaxed);
        }
        meter.complete(1);
        assert_eq!(sum([meter].into_iter()).retries, 1);
        assert!(measured.unswitched_ns > 0);
        let migrations = measured.migrations;
        assert_eq!((migrations.attempts, migrations.pages), (2, 8));
        assert_eq!((migrations.collected, migrations.migrated), (6, 4));
    }
}

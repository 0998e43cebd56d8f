//! What is measured of a run beside its verdict, made comparable: a histogram that can be merged, rates, ratios.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2Serializer};
use hmmstorm_abi::wire::event::{Measured, Migrations};
use serde::{Deserialize, Deserializer as SerdeDeserializer, Serialize};

use super::console::{Finding, Kind};
use super::verdict::Span;

/// Largest latency that is kept apart, nanoseconds: what the storm's own buckets end at.
const LONGEST: u64 = (1 << 37) - 1;
/// Significant decimal digits that are kept, in the storm's buckets as well.
const DIGITS: u8 = 2;

/// What was measured of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measures {
    /// Guest milliseconds from the scenario's beginning to the failure; for a run that did not fail, to its end; none
    /// if it did not begin.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_ms: Option<u64>,
    /// [`Measures::observed_ms`] ends with a failure; otherwise the observation is censored there.
    pub failed: bool,
    /// Time of operations that resolved a fault on a device page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_latency: Option<Latency>,
    /// Faults that these operations resolved.
    pub resolved: u64,
    /// Calls of `handle_mm_fault()` in them.
    pub mm_faults: u64,
    /// Of these, calls beyond the first for each fault that was resolved.
    pub retries: u64,
    /// Migrations that the workload asked for itself; those that serve CPU faults are the driver's to count.
    pub migrations: Migrations,
    /// Guest milliseconds through which a task kept its CPU in the kernel at the longest: as the workers measured it, or
    /// as the kernel's soft-lockup detector reported it.
    pub unswitched_ms: u64,
}

impl Measures {
    /// From what the storm told, the judge saw, and the kernel complained of.
    #[must_use]
    pub fn new(measured: Option<&Measured>, span: Option<Span>, complaints: &[Finding]) -> Self {
        let stuck = complaints.iter().map(|finding| match finding.kind {
            Kind::SoftLockup { seconds } => seconds * 1000,
            _ => 0,
        });
        let none = Measured::default();
        let measured = measured.unwrap_or(&none);
        Self {
            observed_ms: span.map(|span| u64::try_from(span.observed.as_millis()).unwrap_or(u64::MAX)),
            failed: span.is_some_and(|span| span.failed),
            fault_latency: Latency::from_pairs(&measured.latency_ns),
            resolved: measured.resolved,
            mm_faults: measured.mm_faults,
            retries: measured.retries,
            migrations: measured.migrations,
            unswitched_ms: stuck.fold(measured.unswitched_ns / 1_000_000, u64::max),
        }
    }

    /// Tries beyond the first that a resolved fault took; none without one.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of a run are far below 2^52")]
    pub fn retries_per_fault(&self) -> Option<f64> {
        (self.resolved > 0).then(|| self.retries as f64 / self.resolved as f64)
    }

    /// A rate per second of guest time, of something counted over the whole scenario.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of a run are far below 2^52")]
    pub fn per_second(&self, count: u64) -> Option<f64> {
        let observed = self.observed_ms.filter(|&ms| ms > 0)?;
        Some(count as f64 * 1000.0 / observed as f64)
    }
}

/// Why migrations did not move pages, by the driver's counters of all GPUs: pages by reason. Reasons are the counters that
/// begin with `abort_`, and `not_migrated` where there are none.
#[must_use]
pub fn aborts(driver: &[BTreeMap<String, u64>]) -> BTreeMap<String, u64> {
    let mut by_reason = BTreeMap::new();
    for (name, count) in driver.iter().flatten() {
        if let Some(reason) = name.strip_prefix("abort_") {
            *by_reason.entry(reason.to_owned()).or_insert(0) += count;
        }
    }
    if by_reason.is_empty() {
        let total: u64 = driver.iter().filter_map(|gpu| gpu.get("not_migrated")).sum();
        if !driver.is_empty() {
            by_reason.insert("not_migrated".to_owned(), total);
        }
    }
    by_reason
}

/// A distribution of times, as a record has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// HdrHistogram, format V2, Base64; nanoseconds, two significant digits.
    pub hdr: String,
    /// How many there are.
    pub count: u64,
    /// Half are at most this long, nanoseconds.
    pub p50_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Text that is no histogram.
#[derive(Debug, thiserror::Error)]
#[error("no HdrHistogram (V2, Base64): {0}")]
pub struct NoHistogram(String);

impl Latency {
    /// From pairs of value and count; none if there are none.
    #[must_use]
    pub fn from_pairs(pairs: &[(u64, u64)]) -> Option<Self> {
        let mut histogram = empty();
        for &(value, count) in pairs {
            histogram.saturating_record_n(value, count);
        }
        Self::from_histogram(&histogram)
    }

    /// From a histogram; none if it is empty.
    #[must_use]
    pub fn from_histogram(histogram: &Histogram<u64>) -> Option<Self> {
        if histogram.is_empty() {
            return None;
        }
        let mut bytes = Vec::new();
        // A vector takes all that is written to it, and the histogram is far from the format's limits.
        V2Serializer::new().serialize(histogram, &mut bytes).ok()?;
        Some(Self {
            hdr: STANDARD.encode(bytes),
            count: histogram.len(),
            p50_ns: histogram.value_at_quantile(0.5),
            p99_ns: histogram.value_at_quantile(0.99),
            p999_ns: histogram.value_at_quantile(0.999),
            max_ns: histogram.max(),
        })
    }

    /// The distribution itself.
    ///
    /// # Errors
    /// [`NoHistogram`].
    pub fn histogram(&self) -> Result<Histogram<u64>, NoHistogram> {
        let bytes = STANDARD.decode(&self.hdr).map_err(|e| NoHistogram(e.to_string()))?;
        Deserializer::new().deserialize(&mut &bytes[..]).map_err(|e| NoHistogram(format!("{e:?}")))
    }

    /// All of them as one; none if there are none. What cannot be read, which [`Latency`]'s own check rules out for
    /// records from a file, is left out.
    #[must_use]
    pub fn merge<'a>(all: impl IntoIterator<Item = &'a Self>) -> Option<Histogram<u64>> {
        let mut sum = empty();
        for latency in all {
            if let Ok(histogram) = latency.histogram() {
                // Cannot fail: the sum grows as it must.
                sum.add(&histogram).ok()?;
            }
        }
        (!sum.is_empty()).then_some(sum)
    }
}

/// Numbers beside the histogram are those of the histogram, or the record is refused.
impl<'de> Deserialize<'de> for Latency {
    fn deserialize<D: SerdeDeserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            hdr: String,
        }
        let Raw { hdr } = Raw::deserialize(deserializer)?;
        let raw = Self { hdr, count: 0, p50_ns: 0, p99_ns: 0, p999_ns: 0, max_ns: 0 };
        let histogram = raw.histogram().map_err(serde::de::Error::custom)?;
        Self::from_histogram(&histogram).ok_or_else(|| serde::de::Error::custom("an empty histogram"))
    }
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = |ns: u64| ns.div_ceil(1000);
        let (p50, p99, p999, max) = (us(self.p50_ns), us(self.p99_ns), us(self.p999_ns), us(self.max_ns));
        write!(f, "p50 {p50} us, p99 {p99} us, p99.9 {p999} us, longest {max} us")
    }
}

fn empty() -> Histogram<u64> {
    let mut histogram = Histogram::new_with_bounds(1, LONGEST, DIGITS).expect("bounds are in order");
    histogram.auto(true);
    histogram
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn latency(values: &[u64]) -> Latency {
        let pairs: Vec<_> = values.iter().map(|&value| (value, 1)).collect();
        Latency::from_pairs(&pairs).expect("some")
    }

    #[test]
    fn a_histogram_survives_json_and_keeps_two_digits() {
        let mut values: Vec<u64> = (1..=1000).map(|us| us * 1000).collect();
        values.push(60_000_000_000);
        let latency = latency(&values);
        let text = serde_json::to_string(&latency).expect("encodes");
        let back: Latency = serde_json::from_str(&text).expect("decodes");
        assert_eq!(back, latency);
        let close = |value: u64, wanted: u64| value.abs_diff(wanted) * 100 <= wanted;
        assert!(close(back.p50_ns, 500_000), "{back}");
        assert!(close(back.p99_ns, 991_000), "{back}");
        assert!(close(back.max_ns, 60_000_000_000), "{back}");
        assert_eq!(back.count, 1001);
        for bad in [r#"{"hdr":"!"}"#, r#"{"hdr":"AAAA"}"#] {
            assert!(serde_json::from_str::<Latency>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn merging_shards_is_adding_their_operations() {
        let (a, b) = (latency(&[1_000, 2_000]), latency(&[2_000, 900_000]));
        let together = latency(&[1_000, 2_000, 2_000, 900_000]);
        let merged = Latency::merge([&a, &b]).expect("some");
        assert_eq!(Latency::from_histogram(&merged), Some(together));
        assert!(Latency::merge([]).is_none() && Latency::from_pairs(&[]).is_none());
    }

    #[test]
    fn ratios_need_something_to_divide_by() {
        let span = Span { observed: Duration::from_secs(2), failed: false };
        let measured = Measured { resolved: 100, mm_faults: 150, retries: 50, ..Measured::default() };
        let measures = Measures::new(Some(&measured), Some(span), &[]);
        assert_eq!(measures.retries_per_fault(), Some(0.5));
        assert_eq!(measures.per_second(100), Some(50.0));
        let nothing = Measures::new(None, None, &[]);
        assert_eq!((nothing.retries_per_fault(), nothing.per_second(1)), (None, None));
    }

    #[test]
    fn abort_reasons_are_summed_over_gpus() {
        let gpu = |pairs: &[(&str, u64)]| {
            pairs.iter().map(|&(name, n)| (name.to_owned(), n)).collect::<BTreeMap<_, _>>()
        };
        let plain = [gpu(&[("not_migrated", 2), ("evicted", 9)]), gpu(&[("not_migrated", 3)])];
        assert_eq!(aborts(&plain), gpu(&[("not_migrated", 5)]));
        let told = [gpu(&[("not_migrated", 5), ("abort_pinned", 4)]), gpu(&[("abort_pinned", 1)])];
        assert_eq!(aborts(&told), gpu(&[("pinned", 5)]));
        assert!(aborts(&[]).is_empty());
    }
}

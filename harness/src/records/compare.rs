//! Comparing two cells: each quantity by a stated test, never by eye.

use serde::Serialize;

use super::cell::{Cell, CellKey};
use crate::judge::record::Record;
use crate::statistics::survival::log_rank;
use crate::statistics::test::{Call, fisher, holm, mann_whitney};

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// Share of runs that failed; less is better. Fisher's exact test.
    Failures,
    /// Guest time to the failure; later is better. Log-rank test.
    TimeToFailure,
    /// Faults resolved a second, of runs that finished; more is better. Mann-Whitney, one value a run.
    FaultRate,
    /// Median fault latency; less is better. Mann-Whitney, one value a run.
    LatencyP50,
    /// 99th percentile of fault latency; less is better. Mann-Whitney, one value a run.
    LatencyP99,
    /// Tries beyond the first that a resolved fault took; fewer are better. Mann-Whitney, one value a run.
    Retries,
}

impl Quantity {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Failures,
        Self::TimeToFailure,
        Self::FaultRate,
        Self::LatencyP50,
        Self::LatencyP99,
        Self::Retries,
    ];

    /// The test that decides.
    #[must_use]
    pub fn test(self) -> &'static str {
        match self {
            Self::Failures => "Fisher's exact test",
            Self::TimeToFailure => "log-rank test",
            _ => "Mann-Whitney test",
        }
    }

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Failures => "share of runs that fail",
            Self::TimeToFailure => "time to failure",
            Self::FaultRate => "faults/s",
            Self::LatencyP50 => "fault latency p50",
            Self::LatencyP99 => "fault latency p99",
            Self::Retries => "retries per resolved fault",
        }
    }

    /// Its values of the runs of a cell, for those that have one a run. Runs that failed are left out: what they
    /// measured before they hung is another workload.
    #[must_use]
    pub fn values(self, cell: &Cell<'_>) -> Vec<f64> {
        #[expect(clippy::cast_precision_loss, reason = "nanoseconds of hours are far below 2^52")]
        let latency = |run: &Record, of: fn(&crate::judge::measures::Latency) -> u64| {
            run.measures.fault_latency.as_ref().map(|latency| of(latency) as f64)
        };
        let value = |run: &Record| match self {
            Self::FaultRate => run.measures.per_second(run.progress.faults),
            Self::LatencyP50 => latency(run, |latency| latency.p50_ns),
            Self::LatencyP99 => latency(run, |latency| latency.p99_ns),
            Self::Retries => run.measures.retries_per_fault(),
            Self::Failures | Self::TimeToFailure => None,
        };
        cell.runs.iter().filter(|run| !run.measures.failed).filter_map(|run| value(run)).collect()
    }
}

/// One quantity of two cells.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// The cells, without what tells them apart.
    pub cell: CellKey,
    /// Variant that is compared with.
    pub base: String,
    /// Variant that is judged.
    pub variant: String,
    /// What is compared.
    pub quantity: Quantity,
    /// Probability of a difference at least as large if there is none.
    pub p: f64,
    /// The same, corrected for all comparisons of the table (Holm).
    pub adjusted: f64,
    /// Whether what was seen of the variant is to the good.
    pub good: bool,
    /// What is said.
    pub call: Call,
}

/// Compares `variant` with `base` in every quantity that both have. Not corrected yet: see [`table`].
fn two(base: &Cell<'_>, variant: &Cell<'_>) -> Vec<Comparison> {
    let probability = |quantity: Quantity| match quantity {
        Quantity::Failures => {
            let (was, is) = (base.failures(), variant.failures());
            if was.runs == 0 || is.runs == 0 {
                return None;
            }
            let good = is.hits * was.runs <= was.hits * is.runs;
            Some((fisher((is.hits, is.runs), (was.hits, was.runs)), good))
        }
        Quantity::TimeToFailure => {
            let test = log_rank(&variant.survival_times(), &base.survival_times())?;
            Some((test.p, test.excess <= 0.0))
        }
        _ => {
            let (p, smaller) = mann_whitney(&quantity.values(variant), &quantity.values(base))?;
            Some((p, smaller != (quantity == Quantity::FaultRate)))
        }
    };
    let comparison = |quantity| {
        let (p, good) = probability(quantity)?;
        Some(Comparison {
            cell: base.key.without_variant(),
            base: base.key.variant.clone(),
            variant: variant.key.variant.clone(),
            quantity,
            p,
            adjusted: p,
            good,
            call: Call::of(p, good),
        })
    };
    Quantity::ALL.into_iter().filter_map(comparison).collect()
}

/// Compares every cell with that of the variant `base` which is equal in all else. The probabilities are corrected over
/// all comparisons of the table.
#[must_use]
pub fn table(cells: &[Cell<'_>], base: &str) -> Vec<Comparison> {
    let mut all = Vec::new();
    for cell in cells.iter().filter(|cell| cell.key.variant != base) {
        let wanted = cell.key.without_variant();
        let other = |other: &&Cell<'_>| other.key.variant == base && other.key.without_variant() == wanted;
        if let Some(base) = cells.iter().find(other) {
            all.extend(two(base, cell));
        }
    }
    let adjusted = holm(&all.iter().map(|comparison| comparison.p).collect::<Vec<_>>());
    for (comparison, adjusted) in all.iter_mut().zip(adjusted) {
        comparison.adjusted = adjusted;
        comparison.call = Call::of(adjusted, comparison.good);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::measures::Latency;
    use crate::judge::verdict::Verdict;
    use crate::records::cells;
    use crate::records::union::tests::record;

    fn run(variant: &str, seed: u64, failed: bool, latency: u64) -> Record {
        let mut run = record(seed);
        run.run.variant = variant.into();
        run.judgement.verdict = if failed { Verdict::Livelock } else { Verdict::Pass };
        run.measures.failed = failed;
        run.measures.observed_ms = Some(if failed { 100 + seed } else { 10_000 });
        run.measures.fault_latency = Latency::from_pairs(&[(latency, 10)]);
        run
    }

    #[test]
    fn a_cure_is_better_and_noise_is_nothing() {
        let mut records = Vec::new();
        for seed in 0..20 {
            records.push(run("stock", seed, true, 1000 + seed));
            records.push(run("cure", seed, false, 1_000_000 + seed * 20_000));
            records.push(run("slower", seed, false, 2_000_000 + seed * 20_000));
            records.push(run("same", seed, seed != 3, 1000));
        }
        let cells = cells(&records);
        let call = |base: &str, variant: &str, quantity| {
            let table = table(&cells, base);
            table.iter().find(|c| c.variant == variant && c.quantity == quantity).map(|c| c.call)
        };
        assert_eq!(call("stock", "cure", Quantity::Failures), Some(Call::Better));
        assert_eq!(call("stock", "cure", Quantity::TimeToFailure), Some(Call::Better));
        assert_eq!(call("cure", "stock", Quantity::Failures), Some(Call::Worse));
        assert_eq!(call("stock", "same", Quantity::Failures), Some(Call::NoDifferenceShown));
        // Of runs that hung no latencies are compared.
        assert_eq!(call("stock", "cure", Quantity::LatencyP50), None);
        assert_eq!(call("cure", "slower", Quantity::LatencyP99), Some(Call::Worse));
        assert_eq!(call("slower", "cure", Quantity::LatencyP99), Some(Call::Better));
        assert!(table(&cells, "no such variant").is_empty());
    }
}

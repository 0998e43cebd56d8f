//! Time to the first failure, of runs of which some ended without one.

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::Z95;

/// A time, and whether it ends with a failure; otherwise the run ended there for another reason (censored).
pub type Time = (u64, bool);

/// A moment at which runs failed.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Step {
    /// The time.
    pub at: u64,
    /// Runs that had not failed and were still observed just before it.
    pub at_risk: u64,
    /// Runs that failed then.
    pub failed: u64,
    /// Estimated share of runs that live longer.
    pub survival: f64,
    /// Lower end of its 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The Kaplan-Meier estimate of a survival curve: 1 until the first step, constant between steps.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Survival {
    /// Where it falls, ascending.
    pub steps: Vec<Step>,
    /// Runs in all.
    pub runs: u64,
    /// Runs that failed.
    pub failures: u64,
    /// Times of the censored runs, ascending: the ticks of a plot.
    pub censored: Vec<u64>,
}

impl Survival {
    /// The time by which half of the runs have failed; none if the curve does not come down to that.
    #[must_use]
    pub fn median(&self) -> Option<u64> {
        self.steps.iter().find(|step| step.survival <= 0.5).map(|step| step.at)
    }

    /// The estimate at a time.
    #[must_use]
    pub fn at(&self, time: u64) -> f64 {
        self.steps.iter().take_while(|step| step.at <= time).last().map_or(1.0, |step| step.survival)
    }
}

/// Estimates survival (Kaplan and Meier 1958), with Greenwood's variance and the interval on the log-log scale, which
/// stays within 0 and 1. A run that is censored at the time of a failure was still at risk then.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts of runs are far below 2^52")]
pub fn kaplan_meier(times: &[Time]) -> Survival {
    let mut censored: Vec<u64> = times.iter().filter(|(_, failed)| !failed).map(|&(at, _)| at).collect();
    censored.sort_unstable();
    let (mut survival, mut variance, mut high) = (1.0, 0.0, 1.0);
    let mut steps = Vec::new();
    for at in failure_times(times) {
        let at_risk = times.iter().filter(|(time, _)| *time >= at).count() as u64;
        let failed = times.iter().filter(|time| **time == (at, true)).count() as u64;
        let (n, d) = (at_risk as f64, failed as f64);
        survival *= 1.0 - d / n;
        let low = if failed == at_risk {
            // The variance has no meaning at 0; what was not excluded before is not excluded now.
            survival = 0.0;
            0.0
        } else {
            variance += d / (n * (n - d));
            let spread = Z95 * f64::sqrt(variance) / f64::ln(survival);
            high = f64::powf(survival, f64::exp(spread));
            f64::powf(survival, f64::exp(-spread))
        };
        steps.push(Step { at, at_risk, failed, survival, low, high });
    }
    let failures = (times.len() - censored.len()) as u64;
    Survival { steps, runs: times.len() as u64, failures, censored }
}

fn failure_times(times: &[Time]) -> Vec<u64> {
    let mut at: Vec<u64> = times.iter().filter(|(_, failed)| *failed).map(|&(at, _)| at).collect();
    at.sort_unstable();
    at.dedup();
    at
}

/// What a log-rank test says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogRank {
    /// Chi-squared with one degree of freedom.
    pub statistic: f64,
    /// Probability of a statistic at least as large if both samples survive alike.
    pub p: f64,
    /// Failures of the first sample, observed less expected: negative if it survives longer.
    pub excess: f64,
}

/// The log-rank test (Mantel 1966) of two samples; none if it can tell nothing: nobody failed, or only where one sample
/// alone was at risk.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts of runs are far below 2^52")]
pub fn log_rank(first: &[Time], second: &[Time]) -> Option<LogRank> {
    let all: Vec<Time> = first.iter().chain(second).copied().collect();
    let (mut excess, mut variance) = (0.0, 0.0);
    for at in failure_times(&all) {
        let at_risk = |times: &[Time]| times.iter().filter(|(time, _)| *time >= at).count() as f64;
        let failed = |times: &[Time]| times.iter().filter(|time| **time == (at, true)).count() as f64;
        let (n1, n, d1, d) = (at_risk(first), at_risk(&all), failed(first), failed(&all));
        excess += d1 - d * n1 / n;
        if n > 1.0 {
            variance += d * (n1 / n) * (1.0 - n1 / n) * (n - d) / (n - 1.0);
        }
    }
    if variance <= 0.0 {
        return None;
    }
    let statistic = excess * excess / variance;
    let p = ChiSquared::new(1.0).ok()?.sf(statistic);
    Some(LogRank { statistic, p, excess })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Remission of leukaemia in weeks, with 6-mercaptopurine: Freireich et al., Blood 21 (1963); `+` in the paper is censored.
    const TREATED: [Time; 21] = [
        (6, true),
        (6, true),
        (6, true),
        (6, false),
        (7, true),
        (9, false),
        (10, true),
        (10, false),
        (11, false),
        (13, true),
        (16, true),
        (17, false),
        (19, false),
        (20, false),
        (22, true),
        (23, true),
        (25, false),
        (32, false),
        (32, false),
        (34, false),
        (35, false),
    ];
    /// With a placebo; nobody censored.
    const PLACEBO: [u64; 21] = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23];

    fn placebo() -> Vec<Time> {
        PLACEBO.iter().map(|&at| (at, true)).collect()
    }

    #[test]
    fn published_curve() {
        let curve = kaplan_meier(&TREATED);
        let got: Vec<_> = curve.steps.iter().map(|step| (step.at, step.at_risk)).collect();
        assert_eq!(got, [(6, 21), (7, 17), (10, 15), (13, 12), (16, 11), (22, 7), (23, 6)]);
        for (step, wanted) in curve.steps.iter().zip([0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482])
        {
            assert!((step.survival - wanted).abs() < 5e-5, "{step:?}");
        }
        // The intervals on the log-log scale that R's survival package gives.
        let first = curve.steps[0];
        assert!((first.low - 0.6197).abs() < 5e-5 && (first.high - 0.9516).abs() < 5e-5, "{first:?}");
        assert_eq!((curve.median(), kaplan_meier(&placebo()).median()), (Some(23), Some(8)));
        assert_eq!((curve.failures, curve.censored.len()), (9, 12));
        assert_eq!((curve.at(5), curve.at(6) < 0.86), (1.0, true));
    }

    #[test]
    fn published_log_rank() {
        let test = log_rank(&TREATED, &placebo()).expect("a statistic");
        assert!((test.statistic - 16.793).abs() < 5e-4, "{test:?}");
        assert!((test.p - 4.17e-5).abs() < 1e-7, "{test:?}");
        assert!((test.excess + 10.251).abs() < 1e-3, "{test:?}");
        let mirrored = log_rank(&placebo(), &TREATED).expect("a statistic");
        assert!((mirrored.statistic - test.statistic).abs() < 1e-9);
        assert_eq!(log_rank(&[(5, false)], &[(7, false)]), None);
        assert_eq!(log_rank(&[], &TREATED), None);
    }

    proptest! {
        #[test]
        fn a_curve_falls_and_ends_where_the_counts_say(
            times in prop::collection::vec((0..30_u64, any::<bool>()), 0..40),
        ) {
            let curve = kaplan_meier(&times);
            let mut last = 1.0;
            for step in &curve.steps {
                prop_assert!(step.survival < last && step.failed >= 1 && step.failed <= step.at_risk);
                prop_assert!(0.0 <= step.low && step.low <= step.survival + 1e-12, "{:?}", step);
                prop_assert!(step.survival <= step.high + 1e-12 && step.high <= 1.0, "{:?}", step);
                last = step.survival;
            }
            prop_assert_eq!(curve.failures + curve.censored.len() as u64, times.len() as u64);
            // Without censoring it is one less the empirical distribution.
            let all_fail: Vec<Time> = times.iter().map(|&(at, _)| (at, true)).collect();
            let plain = kaplan_meier(&all_fail);
            for time in 0..30 {
                let beyond = all_fail.iter().filter(|(at, _)| *at > time).count() as f64;
                let share = if all_fail.is_empty() { 1.0 } else { beyond / all_fail.len() as f64 };
                prop_assert!((plain.at(time) - share).abs() < 1e-9);
            }
        }
    }
}

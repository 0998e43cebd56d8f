//! Tests of whether two columns differ, and what is said of their answers.

use statrs::distribution::{Discrete, Hypergeometric};
use statrs::stats_tests::Alternative;
use statrs::stats_tests::mannwhitneyu::{MannWhitneyUMethod, mannwhitneyu};

/// Probability at which a difference is said to be shown, after correction for the number of comparisons.
pub const ALPHA: f64 = 0.05;

/// What a comparison says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// The difference is shown, and to the good.
    Better,
    /// It is shown, and to the bad.
    Worse,
    /// It is not shown. That is not the same as "there is none".
    NoDifferenceShown,
}

impl Call {
    /// For an adjusted probability and the direction of what was seen.
    #[must_use]
    pub fn of(p: f64, good: bool) -> Self {
        match (p < ALPHA, good) {
            (true, true) => Self::Better,
            (true, false) => Self::Worse,
            (false, _) => Self::NoDifferenceShown,
        }
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Better => "better",
            Self::Worse => "worse",
            Self::NoDifferenceShown => "no difference shown",
        })
    }
}

/// Fisher's exact test, two-sided, of two counts "so many of so many": the probability, given the totals, of a table that
/// is at most as likely as the one seen. 1 where there is nothing to compare.
#[must_use]
pub fn fisher((hits, of): (u64, u64), (other_hits, other_of): (u64, u64)) -> f64 {
    let (population, successes) = (of + other_of, hits + other_hits);
    let Ok(table) = Hypergeometric::new(population, successes, of) else { return 1.0 };
    let seen = table.pmf(hits);
    // Equally likely tables differ in the last digits.
    let at_most = |p: &f64| *p <= seen * (1.0 + 1e-7);
    let least = of.saturating_sub(population - successes);
    (least..=of.min(successes)).map(|k| table.pmf(k)).filter(at_most).sum::<f64>().min(1.0)
}

/// The Mann-Whitney test, two-sided, of two samples, exact where they are small and without ties: the probability, and
/// whether the first sample tends to be the smaller. None without two samples, or if all values are equal.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "sizes of samples are far below 2^52")]
pub fn mann_whitney(first: &[f64], second: &[f64]) -> Option<(f64, bool)> {
    let value = first.first()?;
    if first.iter().chain(second).all(|other| other == value) {
        return None;
    }
    let (u, p) = mannwhitneyu(first, second, MannWhitneyUMethod::Automatic, Alternative::TwoSided).ok()?;
    p.is_finite().then_some((p.clamp(0.0, 1.0), u < first.len() as f64 * second.len() as f64 / 2.0))
}

/// Holm's step-down correction (1979): probabilities such that calling all those below a limit keeps the chance of any
/// wrong call below it, however the comparisons depend on each other. In the order given.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "numbers of comparisons are far below 2^52")]
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![1.0; p.len()];
    let mut least = 0.0;
    for (rank, &index) in order.iter().enumerate() {
        least = f64::max(least, (p[index] * (p.len() - rank) as f64).min(1.0));
        adjusted[index] = least;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn known_tables() {
        // R's fisher.test() and scipy's fisher_exact() on their manuals' examples.
        for (a, b, p) in [
            ((3, 4), (1, 4), 0.4857),
            ((8, 9), (2, 7), 0.0350),
            ((1, 12), (9, 12), 0.0028),
            ((0, 20), (20, 20), 1.45e-11),
            ((0, 20), (0, 20), 1.0),
            ((0, 0), (3, 5), 1.0),
        ] {
            let got = fisher(a, b);
            assert!((got - p).abs() < 5e-5 && (got - fisher(b, a)).abs() < 1e-9, "{a:?} {b:?}: {got}");
        }
    }

    #[test]
    fn known_ranks() {
        // The example of scipy's mannwhitneyu(): ages at a diagnosis.
        let (men, women) = ([19.0, 22.0, 16.0, 29.0, 24.0], [20.0, 11.0, 17.0, 12.0]);
        let (p, smaller) = mann_whitney(&men, &women).expect("a probability");
        assert!((p - 0.1111).abs() < 5e-5 && !smaller, "{p}");
        assert_eq!(mann_whitney(&women, &men).map(|(_, smaller)| smaller), Some(true));
        assert_eq!(mann_whitney(&[1.0, 1.0], &[1.0]), None);
        assert_eq!(mann_whitney(&[], &[1.0]), None);
        assert_eq!(mann_whitney(&[1.0], &[]), None);
    }

    #[test]
    fn known_correction() {
        assert_eq!(holm(&[0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02]);
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn nothing_is_said_without_a_small_probability() {
        assert_eq!(Call::of(0.049, true), Call::Better);
        assert_eq!(Call::of(0.049, false), Call::Worse);
        assert_eq!(Call::of(0.051, false), Call::NoDifferenceShown);
    }

    proptest! {
        #[test]
        fn fisher_is_a_probability_and_one_for_equal_counts(a in 0..12_u64, b in 0..12_u64, n in 12..20_u64) {
            let p = fisher((a, n), (b, n));
            prop_assert!(p > 0.0 && p <= 1.0);
            prop_assert!(a != b || (p - 1.0).abs() < 1e-9);
        }

        #[test]
        fn correction_never_lowers_and_keeps_the_order(p in prop::collection::vec(0.0..1.0_f64, 0..20)) {
            let adjusted = holm(&p);
            for i in 0..p.len() {
                prop_assert!(adjusted[i] >= p[i] && adjusted[i] <= 1.0);
                for j in 0..p.len() {
                    prop_assert!(p[i] > p[j] || adjusted[i] <= adjusted[j]);
                }
            }
        }
    }
}

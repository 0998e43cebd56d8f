//! Shares of runs with their intervals.

/// The 97.5th percentile of the normal distribution: for intervals of 95 %.
pub const Z95: f64 = 1.959_963_984_540_054;

/// A share with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Share {
    /// Runs of the kind in question.
    pub hits: u64,
    /// All runs.
    pub runs: u64,
    /// Lower end of the 95 % interval, 0 to 1.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Share {
    /// The Wilson score interval (Wilson 1927; Newcombe 1998, method 3): unlike the textbook's `p ± z·s` it keeps its
    /// promise for few runs and for shares near 0 and 1. No runs give the whole interval.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "counts of runs are far below 2^52")]
    pub fn wilson(hits: u64, runs: u64) -> Self {
        if runs == 0 {
            return Self { hits, runs, low: 0.0, high: 1.0 };
        }
        let n = runs as f64;
        let p = hits.min(runs) as f64 / n;
        let z2 = Z95 * Z95;
        let centre = p + z2 / (2.0 * n);
        let spread = Z95 * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
        let scale = 1.0 + z2 / n;
        Self {
            hits,
            runs,
            low: ((centre - spread) / scale).max(0.0),
            high: ((centre + spread) / scale).min(1.0),
        }
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { hits, runs, low, high } = self;
        write!(f, "{hits} of {runs} (95 % interval {:.1} to {:.1} %)", low * 100.0, high * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// R. G. Newcombe, "Two-sided confidence intervals for the single proportion", Statistics in Medicine 17 (1998),
    /// table I, method 3.
    #[test]
    fn published_values() {
        for (hits, runs, low, high) in [
            (81, 263, 0.2553, 0.3662),
            (15, 148, 0.0624, 0.1605),
            (0, 20, 0.0000, 0.1611),
            (1, 29, 0.0061, 0.1718),
        ] {
            let share = Share::wilson(hits, runs);
            assert!((share.low - low).abs() < 5e-5 && (share.high - high).abs() < 5e-5, "{share}");
        }
    }

    #[test]
    fn all_and_none_mirror_each_other() {
        let (all, none) = (Share::wilson(20, 20), Share::wilson(0, 20));
        assert!((all.low - (1.0 - none.high)).abs() < 1e-12);
        assert_eq!((all.high, none.low), (1.0, 0.0));
        assert_eq!(Share::wilson(0, 0).high, 1.0);
    }
}

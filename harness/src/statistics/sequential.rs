//! When a cell has been run often enough: Wald's sequential probability ratio test.

use serde::{Deserialize, Serialize};

/// The rule: stop as soon as what was seen speaks clearly for a share of failures of at least `high`, or of at most `low`.
/// Most cells fail always or never, and such a cell is decided within a few runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sprt {
    /// A share of failures that counts as "does not fail".
    pub low: f64,
    /// A share of failures that counts as "fails".
    pub high: f64,
    /// Chance of taking `low` for `high`, at most about.
    pub alpha: f64,
    /// Chance of taking `high` for `low`.
    pub beta: f64,
}

impl Default for Sprt {
    fn default() -> Self {
        Self { low: 0.05, high: 0.5, alpha: 0.05, beta: 0.05 }
    }
}

/// What the runs so far say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing yet.
    GoOn,
    /// It does not fail.
    Low,
    /// It fails.
    High,
}

impl Sprt {
    /// Whether the numbers make a rule.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let share = |p: f64| p > 0.0 && p < 1.0;
        [self.low, self.high, self.alpha, self.beta].into_iter().all(share)
            && self.low < self.high
            && self.alpha + self.beta < 1.0
    }

    /// The decision after these runs (true: it failed), in their order. Runs after the decision do not change it.
    pub fn decide(&self, failed: impl IntoIterator<Item = bool>) -> Decision {
        let (upper, lower) =
            (f64::ln((1.0 - self.beta) / self.alpha), f64::ln(self.beta / (1.0 - self.alpha)));
        let (hit, miss) = (f64::ln(self.high / self.low), f64::ln((1.0 - self.high) / (1.0 - self.low)));
        let mut ratio = 0.0;
        for failed in failed {
            ratio += if failed { hit } else { miss };
            if ratio >= upper {
                return Decision::High;
            }
            if ratio <= lower {
                return Decision::Low;
            }
        }
        Decision::GoOn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clear_cells_are_decided_soon() {
        let rule = Sprt::default();
        let after = |failed: bool| (1..).find(|&n| rule.decide(vec![failed; n]) != Decision::GoOn);
        assert_eq!((after(true), after(false)), (Some(2), Some(5)));
        assert_eq!(rule.decide([true, true]), Decision::High);
        assert_eq!(rule.decide([false; 5]), Decision::Low);
        assert_eq!(rule.decide([true, true, false, false, false, false, false, false]), Decision::High);
        assert_eq!(rule.decide([]), Decision::GoOn);
    }

    /// Exact: the chance of each decision for a cell that fails with probability `p`, over all courses of up to 400 runs.
    fn chances(rule: &Sprt, p: f64) -> (f64, f64) {
        // Undecided courses by their number of failures.
        let mut open = vec![(0_usize, 0_usize, 1.0)];
        let (mut low, mut high) = (0.0, 0.0);
        for _ in 0..400 {
            let mut next: std::collections::BTreeMap<(usize, usize), f64> = std::collections::BTreeMap::new();
            for &(failures, runs, chance) in &open {
                for (failed, share) in [(true, p), (false, 1.0 - p)] {
                    let failures = failures + usize::from(failed);
                    // The ratio depends on the counts alone.
                    let course = std::iter::repeat_n(true, failures)
                        .chain(std::iter::repeat_n(false, runs + 1 - failures));
                    let ratio: f64 = course
                        .map(|failed| {
                            if failed {
                                f64::ln(rule.high / rule.low)
                            } else {
                                f64::ln((1.0 - rule.high) / (1.0 - rule.low))
                            }
                        })
                        .sum();
                    if ratio >= f64::ln((1.0 - rule.beta) / rule.alpha) {
                        high += chance * share;
                    } else if ratio <= f64::ln(rule.beta / (1.0 - rule.alpha)) {
                        low += chance * share;
                    } else {
                        *next.entry((failures, runs + 1)).or_insert(0.0) += chance * share;
                    }
                }
            }
            open = next.into_iter().map(|((failures, runs), chance)| (failures, runs, chance)).collect();
        }
        (low, high)
    }

    #[test]
    fn errors_are_as_rare_as_asked_for() {
        let rule = Sprt::default();
        let (low, high) = chances(&rule, rule.low);
        assert!(low + high > 0.999 && high <= rule.alpha / (1.0 - rule.beta), "{low} {high}");
        let (low, high) = chances(&rule, rule.high);
        assert!(low + high > 0.999 && low <= rule.beta / (1.0 - rule.alpha), "{low} {high}");
    }

    #[test]
    fn unsound_rules_are_known() {
        assert!(Sprt::default().is_sound());
        assert!(!Sprt { low: 0.5, ..Sprt::default() }.is_sound());
        assert!(!Sprt { alpha: 0.0, ..Sprt::default() }.is_sound());
        assert!(!Sprt { high: 1.0, ..Sprt::default() }.is_sound());
    }
}

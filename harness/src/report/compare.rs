//! Each variant beside the one that it is compared with: what the tests say, over all cells that both have.

use std::collections::BTreeMap;

use super::cells::{Layout, median};
use super::run::{Axis, Run};
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;
use crate::records::compare::{self, Quantity};
use crate::records::{Cell, cells};
use crate::statistics::{Call, kaplan_meier};

/// Every comparison of a report.
#[derive(Clone, Debug, Default)]
pub struct Comparisons {
    /// The variant that the others are compared with.
    pub base: String,
    /// Quantities that could be compared anywhere, in their order.
    pub quantities: Vec<Quantity>,
    /// By variant: how the calls fell, by quantity.
    pub variants: Vec<(String, Vec<Tally>)>,
    /// The comparisons of which a difference was shown: the surest first.
    pub shown: Vec<Shown>,
    /// How many comparisons were made: what the probabilities are corrected for.
    pub made: usize,
}

/// How often each call was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Cells in which the variant is better.
    pub better: usize,
    /// Cells in which it is worse.
    pub worse: usize,
    /// Cells in which no difference was shown.
    pub same: usize,
}

impl Tally {
    /// Cells that could be compared.
    #[must_use]
    pub fn cells(self) -> usize {
        self.better + self.worse + self.same
    }
}

/// A comparison of which a difference was shown.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Shown {
    /// Which cell, without the variant.
    pub place: String,
    /// The variant.
    pub variant: String,
    /// What was compared.
    pub quantity: Quantity,
    /// Better or worse.
    pub call: Call,
    /// The base's value, in words.
    pub was: String,
    /// The variant's value.
    pub is: String,
    /// Probability, corrected.
    pub p: f64,
}

impl Comparisons {
    /// Of all runs; nothing if no cell has its like under `base`.
    #[must_use]
    pub fn new(runs: &[Run], layout: &Layout, base: &str, order: &[String]) -> Option<Self> {
        let cells = cells(runs.iter().map(|run| &run.record));
        let table = compare::table(&cells, base);
        if table.is_empty() {
            return None;
        }
        let quantities: Vec<Quantity> =
            Quantity::ALL.into_iter().filter(|of| table.iter().any(|one| one.quantity == *of)).collect();
        let mut variants: BTreeMap<(u64, String), Vec<Tally>> = BTreeMap::new();
        let mut shown = Vec::new();
        let place = |record: &Record| {
            let cell =
                layout.cells.iter().find(|cell| cell.runs.iter().any(|&at| runs[at].record.id == record.id));
            cell.map_or_else(String::new, |cell| layout.label_without(cell, &Axis::Variant))
        };
        for one in &table {
            let tallies = variants
                .entry(Axis::Variant.rank(&one.variant, order))
                .or_insert_with(|| vec![Tally::default(); quantities.len()]);
            let Some(at) = quantities.iter().position(|quantity| *quantity == one.quantity) else { continue };
            match one.call {
                Call::Better => tallies[at].better += 1,
                Call::Worse => tallies[at].worse += 1,
                Call::NoDifferenceShown => tallies[at].same += 1,
            }
            if one.call == Call::NoDifferenceShown {
                continue;
            }
            let find = |variant: &str| {
                cells
                    .iter()
                    .find(|cell| cell.key.variant == variant && cell.key.without_variant() == one.cell)
            };
            if let (Some(was), Some(is)) = (find(&one.base), find(&one.variant)) {
                shown.push(Shown {
                    place: is.runs.first().map(|record| place(record)).unwrap_or_default(),
                    variant: one.variant.clone(),
                    quantity: one.quantity,
                    call: one.call,
                    was: value(one.quantity, was),
                    is: value(one.quantity, is),
                    p: one.adjusted,
                });
            }
        }
        shown.sort_by(|a, b| a.p.total_cmp(&b.p));
        Some(Self {
            base: base.to_owned(),
            quantities,
            variants: variants.into_iter().map(|((_, name), tallies)| (name, tallies)).collect(),
            shown,
            made: table.len(),
        })
    }
}

/// A cell's value of a quantity, in words.
#[expect(clippy::cast_precision_loss, reason = "times for people")]
fn value(quantity: Quantity, cell: &Cell<'_>) -> String {
    match quantity {
        Quantity::Failures => {
            let share = cell.failures();
            format!("{} of {}", share.hits, share.runs)
        }
        Quantity::TimeToFailure => match kaplan_meier(&cell.survival_times()).median() {
            Some(ms) => format!("median {}", duration(ms as f64 * 1e6)),
            None if cell.share(Verdict::Pass).hits == cell.runs.len() as u64 => "none failed".to_owned(),
            None => "median not reached".to_owned(),
        },
        _ => {
            let mut values = quantity.values(cell);
            values.sort_by(f64::total_cmp);
            let Some(median) = median(&values) else { return String::new() };
            match quantity {
                Quantity::LatencyP50 | Quantity::LatencyP99 => duration(median),
                Quantity::FaultRate => format!("{}/s", short(median)),
                _ => format!("{median:.2}"),
            }
        }
    }
}

/// A probability as papers print it.
#[must_use]
pub fn probability(p: f64) -> String {
    if p < 0.001 { "p < 0.001".to_owned() } else { format!("p = {p:.3}") }
}

/// Nanoseconds, in the unit that fits.
#[must_use]
pub fn duration(nanoseconds: f64) -> String {
    let (value, unit) = match nanoseconds {
        n if n < 1e3 => (n, "ns"),
        n if n < 1e6 => (n / 1e3, "µs"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    let digits = match value {
        v if (v - v.round()).abs() < 0.005 => 0,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// A large number in few characters.
#[must_use]
pub fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.1}M", v / 1e6),
        v if v >= 1e4 => format!("{:.0}k", v / 1e3),
        v if v >= 1e3 => format!("{:.1}k", v / 1e3),
        v if v < 10.0 && v.fract() > 0.0 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(duration(1.0), "1 ns");
        assert_eq!(duration(10_000.0), "10 µs");
        assert_eq!(duration(1_234_000.0), "1.23 ms");
        assert_eq!(duration(45_600_000.0), "45.6 ms");
        assert_eq!(duration(2e9), "2 s");
        assert_eq!(short(1_200.0), "1.2k");
        assert_eq!(short(12_000.0), "12k");
        assert_eq!(probability(0.0001), "p < 0.001");
        assert_eq!(probability(0.0312), "p = 0.031");
    }
}

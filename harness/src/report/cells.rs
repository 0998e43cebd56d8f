//! Cells: runs that differ in their seed alone, counted; and the tables that cells are laid out in.

use std::collections::{BTreeMap, BTreeSet};

use hdrhistogram::Histogram;

use super::run::{Axis, Run};
use crate::judge::verdict::Verdict;
use crate::records::{self, CellKey};
use crate::statistics::{Share, Survival, kaplan_meier};

/// Runs that differ in their seed alone.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Its values on [`Layout::axes`], in their order.
    pub key: Vec<String>,
    /// Indices of its runs, by seed.
    pub runs: Vec<usize>,
    /// Runs by verdict, most frequent first; harness errors are apart.
    pub verdicts: Vec<(Verdict, u64)>,
    /// Runs that say something of the kernel.
    pub judged: u64,
    /// Runs in which the bench failed. They count neither way.
    pub harness_errors: u64,
    /// Runs whose verdict was not the expected one, harness errors excepted.
    pub unexpected: u64,
    /// What was expected, if of all runs the same.
    pub expected: Option<Verdict>,
    /// Runs that failed in any way, of those that say something of the kernel.
    pub failures: Share,
    /// What was measured.
    pub measures: Measures,
}

/// What was measured of the runs of a cell.
#[derive(Clone, Debug, Default)]
pub struct Measures {
    /// Device faults resolved.
    pub faults: u64,
    /// Faults resolved a second of guest time, the median of runs that finished.
    pub fault_rate: Option<f64>,
    /// Time of operations that resolved faults, nanoseconds.
    pub latency: Option<Histogram<u64>>,
    /// Tries beyond the first that a resolved fault took.
    pub retries: Option<f64>,
    /// Migrations asked for, pages in them, pages that moved.
    pub migrations: (u64, u64, u64),
    /// Pages that did not move, by reason.
    pub aborts: BTreeMap<String, u64>,
    /// Longest time that a task kept its CPU, guest milliseconds.
    pub unswitched_ms: u64,
    /// How long runs worked, guest milliseconds.
    pub survival: Survival,
}

impl Measures {
    fn of(cell: &records::Cell<'_>) -> Self {
        let mut rates = cell.fault_rates();
        rates.sort_by(f64::total_cmp);
        let mut migrations = (0, 0, 0);
        for run in &cell.runs {
            let of_run = run.measures.migrations;
            migrations.0 += of_run.attempts;
            migrations.1 += of_run.pages;
            migrations.2 += of_run.migrated;
        }
        Self {
            faults: cell.runs.iter().map(|run| run.progress.faults).sum(),
            fault_rate: median(&rates),
            latency: cell.latency(),
            retries: cell.retries_per_fault(),
            migrations,
            aborts: cell.aborts(),
            unswitched_ms: cell.runs.iter().map(|run| run.measures.unswitched_ms).max().unwrap_or(0),
            survival: kaplan_meier(&cell.survival_times()),
        }
    }
}

/// The median of sorted values.
pub(super) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[sorted.len() / 2 - 1], upper)
    } else {
        upper
    })
}

impl Cell {
    fn new(key: Vec<String>, mut members: Vec<usize>, runs: &[Run]) -> Self {
        members.sort_by_key(|&index| runs[index].record.run.seed);
        let (failed, judged): (Vec<usize>, Vec<usize>) =
            members.iter().partition(|&&index| runs[index].verdict() == Verdict::HarnessError);
        let of = |index: &usize| &runs[*index].record;
        let cell = records::Cell {
            key: CellKey::of(of(&members[0])),
            runs: judged.iter().map(of).collect(),
            harness_errors: failed.len(),
        };
        let mut verdicts: Vec<_> = cell.verdicts().into_iter().collect();
        verdicts.sort_by_key(|&(verdict, count)| (std::cmp::Reverse(count), verdict));
        let expected: BTreeSet<_> = members.iter().map(|index| of(index).expected).collect();
        Self {
            key,
            verdicts,
            judged: judged.len() as u64,
            harness_errors: failed.len() as u64,
            unexpected: judged.iter().filter(|index| !of(index).as_expected).count() as u64,
            expected: expected.first().copied().filter(|_| expected.len() == 1),
            failures: cell.failures(),
            measures: Measures::of(&cell),
            runs: members,
        }
    }

    /// What the cell is about: its most frequent defect, `pass` if it has none, nothing if no run says anything.
    #[must_use]
    pub fn headline(&self) -> Option<(Verdict, Share)> {
        let defect = self.verdicts.iter().find(|(verdict, _)| *verdict != Verdict::Pass);
        let &(verdict, count) = defect.or(self.verdicts.first())?;
        Some((verdict, Share::wilson(count, self.judged)))
    }
}

/// All cells, and how they are laid out.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// Properties in which the runs differ.
    pub axes: Vec<Axis>,
    /// Properties that all runs share.
    pub common: Vec<(Axis, String)>,
    /// The cells, in order of their values.
    pub cells: Vec<Cell>,
    /// The tables, which have every cell once.
    pub tables: Vec<Table>,
}

/// Cells that differ by rows and columns.
#[derive(Clone, Debug)]
pub struct Table {
    /// What all its cells have in common and other tables have not.
    pub about: Vec<(Axis, String)>,
    /// Axes of the rows.
    pub row_axes: Vec<Axis>,
    /// Values of each row.
    pub rows: Vec<Vec<String>>,
    /// Axes of the columns, outermost first.
    pub column_axes: Vec<Axis>,
    /// Values of each column.
    pub columns: Vec<Vec<String>>,
    /// Indices into [`Layout::cells`], by row and column.
    pub cells: Vec<Vec<Option<usize>>>,
}

impl Table {
    /// What the table is about, in words.
    #[must_use]
    pub fn title(&self) -> String {
        join(&self.about)
    }

    /// A row's name.
    #[must_use]
    pub fn row(&self, row: usize) -> String {
        let parts: Vec<_> = self.row_axes.iter().cloned().zip(self.rows[row].iter().cloned()).collect();
        join(&parts)
    }
}

/// Axes and values in words. Absent things are not mentioned.
fn join(parts: &[(Axis, String)]) -> String {
    let absent = |axis: &Axis, value: &str| {
        value == "none" && matches!(axis, Axis::Control | Axis::Chaos)
            || value == "default" && *axis == Axis::Flavour
    };
    let said = parts.iter().filter(|(axis, value)| !absent(axis, value));
    said.map(|(axis, value)| axis.says(value)).collect::<Vec<_>>().join(", ")
}

impl Layout {
    /// Lays out runs. `variants` is the order of the known fix candidates.
    #[must_use]
    pub fn new(runs: &[Run], variants: &[String]) -> Self {
        let (axes, common) = axes(runs);
        let mut by_key: BTreeMap<Vec<(u64, String)>, Vec<usize>> = BTreeMap::new();
        for (index, run) in runs.iter().enumerate() {
            let (properties, details) = (run.properties(), run.details());
            let value = |axis: &Axis| match axis {
                // A scenario that did not begin has no defaults.
                Axis::Detail(name) => details.get(name).cloned().unwrap_or_else(|| "default".to_owned()),
                axis => {
                    properties.iter().find(|(a, _)| a == axis).map(|(_, v)| v.clone()).unwrap_or_default()
                }
            };
            let key = axes.iter().map(|axis| axis.rank(&value(axis), variants)).collect();
            by_key.entry(key).or_default().push(index);
        }
        let cells: Vec<Cell> = by_key
            .into_iter()
            .map(|(key, members)| Cell::new(key.into_iter().map(|(_, value)| value).collect(), members, runs))
            .collect();
        let tables = tables(&axes, &cells);
        Self { axes, common, cells, tables }
    }

    /// A cell in words, without what all cells have in common.
    #[must_use]
    pub fn label(&self, cell: &Cell) -> String {
        let parts: Vec<_> = self.axes.iter().cloned().zip(cell.key.iter().cloned()).collect();
        let label = join(&parts);
        if label.is_empty() { "all runs".to_owned() } else { label }
    }

    /// A cell in words, without one of the properties.
    #[must_use]
    pub fn label_without(&self, cell: &Cell, axis: &Axis) -> String {
        let parts = self.axes.iter().cloned().zip(cell.key.iter().cloned());
        join(&parts.filter(|(of, _)| of != axis).collect::<Vec<_>>())
    }

    /// What all cells have in common, in words.
    #[must_use]
    pub fn common(&self) -> String {
        join(&self.common)
    }

    /// A cell's value on an axis, which may be one that all cells share.
    #[must_use]
    pub fn value<'a>(&'a self, cell: &'a Cell, axis: &Axis) -> Option<&'a str> {
        let shared = || self.common.iter().find(|(a, _)| a == axis).map(|(_, value)| value.as_str());
        let own = self.axes.iter().position(|a| a == axis).map(|at| cell.key[at].as_str());
        own.or_else(shared)
    }
}

/// The properties that vary, and the others. A detail varies if it does so between runs that are alike otherwise: many
/// follow from the control or from the number of CPUs, and say nothing that these do not say.
fn axes(runs: &[Run]) -> (Vec<Axis>, Vec<(Axis, String)>) {
    let (mut axes, mut common) = (Vec::new(), Vec::new());
    let properties: Vec<_> = runs.iter().map(Run::properties).collect();
    for at in 0..properties.first().map_or(0, Vec::len) {
        let values: BTreeSet<&str> = properties.iter().map(|all| all[at].1.as_str()).collect();
        let (axis, value) = properties[0][at].clone();
        if values.len() > 1 { axes.push(axis) } else { common.push((axis, value)) }
    }
    let mut alike: BTreeMap<String, Vec<&Run>> = BTreeMap::new();
    for (run, properties) in runs.iter().zip(&properties) {
        let key = properties.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>().join("\n");
        alike.entry(key).or_default().push(run);
    }
    let mut details = BTreeSet::new();
    for alike in alike.values() {
        let alike: Vec<_> = alike.iter().map(|run| run.details()).collect();
        for name in alike.iter().flat_map(BTreeMap::keys) {
            // A scenario that did not begin has those parameters alone that were asked for.
            let values: BTreeSet<_> = alike.iter().filter_map(|details| details.get(name)).collect();
            if values.len() > 1 {
                details.insert(name.clone());
            }
        }
    }
    axes.extend(details.into_iter().map(Axis::Detail));
    (axes, common)
}

fn tables(axes: &[Axis], cells: &[Cell]) -> Vec<Table> {
    let is_row = |axis: &Axis| matches!(axis, Axis::Kernel | Axis::Flavour | Axis::Variant | Axis::Control);
    // Where all runs are of one machine, scenarios stand side by side in place of one below the other.
    let of_machine = |axis: &Axis| matches!(axis, Axis::Preempt | Axis::Cpus);
    let one_machine = !axes.iter().any(of_machine);
    let is_column = |axis: &Axis| of_machine(axis) || one_machine && *axis == Axis::Scenario;
    let of = |key: &[String], which: &dyn Fn(&Axis) -> bool| -> Vec<String> {
        axes.iter().zip(key).filter(|(axis, _)| which(axis)).map(|(_, value)| value.clone()).collect()
    };
    let other = |axis: &Axis| !is_row(axis) && !is_column(axis);
    let named = |which: &dyn Fn(&Axis) -> bool| axes.iter().filter(|axis| which(axis)).cloned().collect();
    let mut abouts: Vec<Vec<String>> = Vec::new();
    for cell in cells {
        let about = of(&cell.key, &other);
        if !abouts.contains(&about) {
            abouts.push(about);
        }
    }
    let lay_out = |about: Vec<String>| {
        let members: Vec<usize> =
            (0..cells.len()).filter(|&index| of(&cells[index].key, &other) == about).collect();
        let distinct = |which: &dyn Fn(&Axis) -> bool| {
            let mut values: Vec<Vec<String>> = Vec::new();
            for &index in &members {
                let value = of(&cells[index].key, which);
                if !values.contains(&value) {
                    values.push(value);
                }
            }
            values
        };
        let rows = distinct(&is_row);
        let mut columns = distinct(&is_column);
        // Cells come row by row, so a column that only a later row has would be out of order.
        let column_axes: Vec<Axis> = named(&is_column);
        columns.sort_by_key(|values| {
            column_axes.iter().zip(values).map(|(axis, value)| axis.rank(value, &[])).collect::<Vec<_>>()
        });
        let find = |row: &Vec<String>, column: &Vec<String>| {
            members.iter().copied().find(|&index| {
                of(&cells[index].key, &is_row) == *row && of(&cells[index].key, &is_column) == *column
            })
        };
        Table {
            about: named(&other).into_iter().zip(about).collect(),
            row_axes: named(&is_row),
            cells: rows.iter().map(|row| columns.iter().map(|column| find(row, column)).collect()).collect(),
            rows,
            column_axes,
            columns,
        }
    };
    abouts.into_iter().map(lay_out).collect()
}

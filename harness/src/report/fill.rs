//! Tables in a text of one's own: a Markdown file says in comments which runs a table is of, and this writes the table
//! below, so that no figure in it is typed by hand.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Deserialize;

use super::run::Run;
use crate::judge::verdict::Verdict;
use crate::matrix::plan::OneOrMany;
use crate::statistics::Share;

/// First line of a comment that defines a table; the definition is TOML, up to [`END`].
const BEGIN: &str = "<!-- table of runs";
/// Its last line.
const END: &str = "-->";
/// Runs of a cell from which on it shows an interval: below, it would say little but that they are few.
const FEW: usize = 10;
/// A cell without runs.
const NOTHING: &str = "–";

/// A table, as its comment defines it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    /// Property whose values are the rows.
    rows: String,
    /// Heading of that column; the property's name otherwise.
    title: Option<String>,
    /// What all of its runs have. Runs of a control are left out unless `control` is among it.
    #[serde(rename = "where", default)]
    filter: Filter,
    /// The other columns.
    columns: Vec<Column>,
}

/// A column.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Column {
    title: String,
    #[serde(rename = "where", default)]
    filter: Filter,
    #[serde(default)]
    show: Show,
    /// Property whose values stand apart within a cell, as `2: pass 5 of 5; 4: …`.
    each: Option<String>,
}

/// Properties and what they may be.
type Filter = BTreeMap<String, OneOrMany<String>>;

/// What of its runs a cell shows. Measures are medians, with the least and the most of any run, of those that finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Show {
    /// How often each verdict came.
    #[default]
    Verdicts,
    /// How many runs finished.
    Finished,
    /// Guest time from the scenario's beginning to its end, seconds.
    Took,
    /// Tries beyond the first a resolved fault.
    Retries,
    /// Faults resolved in a second of guest time.
    FaultsPerSecond,
    /// Quantiles of the time that a fault took, milliseconds.
    P50,
    P99,
    P999,
    Longest,
}

/// Why a file's tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A comment that defines no table.
    #[error("line {line}: {why}")]
    Definition {
        /// Line of its beginning, from 1.
        line: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A table of which there is no run: what stands there now is not thrown away.
    #[error("line {line}: no run is of this table; its columns: {columns}")]
    Empty {
        /// Line of its beginning.
        line: usize,
        /// Their titles.
        columns: String,
    },
    /// A text without such comments.
    #[error("no line begins with '{BEGIN}'")]
    None,
}

/// `text` with its tables written anew; `variants` are the known ones, in their order.
///
/// # Errors
/// [`Error`].
pub fn fill(text: &str, runs: &[Run], variants: &[String]) -> Result<String, Error> {
    let mut out = String::with_capacity(text.len());
    let mut lines = text.lines().enumerate().peekable();
    let mut tables = 0;
    while let Some((number, line)) = lines.next() {
        let _ = writeln!(out, "{line}");
        if line.trim_end() != BEGIN {
            continue;
        }
        let at = number + 1;
        let mut definition = String::new();
        loop {
            let Some((_, line)) = lines.next() else {
                let why = format!("the comment does not end with a line '{END}'");
                return Err(Error::Definition { line: at, why });
            };
            let _ = writeln!(out, "{line}");
            if line.trim() == END {
                break;
            }
            let _ = writeln!(definition, "{line}");
        }
        let table: Table = toml::from_str(&definition)
            .map_err(|error| Error::Definition { line: at, why: error.to_string() })?;
        // What stands there now.
        while lines.next_if(|(_, line)| line.starts_with('|')).is_some() {}
        let written = table.write(runs, variants);
        if written.is_empty() {
            let columns: Vec<_> = table.columns.iter().map(|column| column.title.as_str()).collect();
            return Err(Error::Empty { line: at, columns: columns.join(", ") });
        }
        out.push_str(&written);
        tables += 1;
    }
    if tables == 0 { Err(Error::None) } else { Ok(out) }
}

impl Table {
    /// The table, empty if it has no row.
    fn write(&self, runs: &[Run], variants: &[String]) -> String {
        let runs: Vec<(&Run, BTreeMap<String, String>)> = runs
            .iter()
            .filter(|run| run.verdict() != Verdict::HarnessError)
            .map(|run| (run, properties(run)))
            .filter(|(_, properties)| fits(&self.filter, properties))
            .collect();
        let columns: Vec<Vec<&(&Run, BTreeMap<String, String>)>> =
            self.columns.iter().map(|column| column.of(&runs, &self.filter)).collect();
        let found = columns.iter().flatten().filter_map(|(_, properties)| properties.get(&self.rows));
        let values = sorted(found.map(String::as_str), variants);
        if values.is_empty() {
            return String::new();
        }
        let mut text = String::new();
        let titles: Vec<&str> = self.columns.iter().map(|column| column.title.as_str()).collect();
        let _ = writeln!(text, "| {} | {} |", self.title.as_ref().unwrap_or(&self.rows), titles.join(" | "));
        let _ = writeln!(text, "|{}", "---|".repeat(1 + titles.len()));
        for value in values {
            let cells = self.columns.iter().zip(&columns).map(|(column, runs)| {
                let of_row = |(_, properties): &&&(&Run, BTreeMap<String, String>)| {
                    properties.get(&self.rows).is_some_and(|found| found == value)
                };
                let of_row: Vec<_> = runs.iter().filter(of_row).copied().collect();
                column.cell(&of_row, variants)
            });
            let _ = writeln!(text, "| `{value}` | {} |", cells.collect::<Vec<_>>().join(" | "));
        }
        text
    }
}

impl Column {
    /// The runs that are of it.
    fn of<'a, 'r>(
        &self,
        runs: &'a [(&'r Run, BTreeMap<String, String>)],
        table: &Filter,
    ) -> Vec<&'a (&'r Run, BTreeMap<String, String>)> {
        let names_control = [table, &self.filter].iter().any(|filter| filter.contains_key("control"));
        let of = |(run, properties): &&(&Run, BTreeMap<String, String>)| {
            fits(&self.filter, properties) && (names_control || run.record.run.control.is_none())
        };
        runs.iter().filter(of).collect()
    }

    fn cell(&self, runs: &[&(&Run, BTreeMap<String, String>)], variants: &[String]) -> String {
        let Some(each) = &self.each else {
            let runs: Vec<&Run> = runs.iter().map(|(run, _)| *run).collect();
            return self.show.of(&runs).unwrap_or_else(|| NOTHING.to_owned());
        };
        let found = runs.iter().filter_map(|(_, properties)| properties.get(each)).map(String::as_str);
        let parts = sorted(found, variants).into_iter().filter_map(|value| {
            let has = |(_, properties): &&&(&Run, BTreeMap<String, String>)| {
                properties.get(each).is_some_and(|found| found == value)
            };
            let runs: Vec<&Run> = runs.iter().filter(has).map(|(run, _)| *run).collect();
            Some(format!("{value}: {}", self.show.of(&runs)?))
        });
        let parts: Vec<String> = parts.collect();
        if parts.is_empty() { NOTHING.to_owned() } else { parts.join("; ") }
    }
}

impl Show {
    /// What a cell with these runs shows; none if there is nothing to show.
    fn of(self, runs: &[&Run]) -> Option<String> {
        let finished = || runs.iter().filter(|run| !run.record.measures.failed).map(|run| &run.record);
        let latency = |which: fn(&crate::judge::measures::Latency) -> u64| {
            let found = finished().filter_map(|record| record.measures.fault_latency.as_ref());
            spread(found.map(|latency| ms(which(latency))), 0).map(|text| format!("{text} ms"))
        };
        match self {
            Self::Verdicts => verdicts(runs),
            Self::Finished => Some(finished().count()).filter(|&n| n > 0).map(|n| n.to_string()),
            Self::Took => {
                let took = finished().filter_map(|record| record.measures.observed_ms);
                spread(took.map(|took| ms(took * 1_000_000) / 1e3), 1).map(|text| format!("{text} s"))
            }
            Self::Retries => spread(
                finished().map(|record| &record.measures).filter(|m| m.resolved > 0).map(|m| {
                    #[expect(clippy::cast_precision_loss, reason = "counts of faults are far below 2^52")]
                    let ratio = m.retries as f64 / m.resolved as f64;
                    ratio
                }),
                2,
            ),
            Self::FaultsPerSecond => {
                spread(finished().filter_map(|record| record.measures.per_second(record.progress.faults)), 0)
            }
            Self::P50 => latency(|latency| latency.p50_ns),
            Self::P99 => latency(|latency| latency.p99_ns),
            Self::P999 => latency(|latency| latency.p999_ns),
            Self::Longest => latency(|latency| latency.max_ns),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a latency for people")]
fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// `livelock 20 of 21, pass 1 of 21 (77.3–99.2 %)`: the most frequent first, with its interval.
fn verdicts(runs: &[&Run]) -> Option<String> {
    let mut counts: BTreeMap<Verdict, usize> = BTreeMap::new();
    runs.iter().for_each(|run| *counts.entry(run.verdict()).or_insert(0) += 1);
    let mut counts: Vec<(Verdict, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|&(verdict, count)| (std::cmp::Reverse(count), verdict));
    let &(_, most) = counts.first()?;
    // A livelock in which no CPU spins is one of tries in vain (judge/verdict/unserved.rs).
    let spins = |run: &&&Run| run.verdict() == Verdict::Livelock && !run.record.judgement.spinners.is_empty();
    let in_vain = !runs.iter().any(|run| spins(&run));
    let part = |&(verdict, count): &(Verdict, usize)| {
        let how = if verdict == Verdict::Livelock && in_vain { " in vain" } else { "" };
        format!("{verdict}{how} {count} of {}", runs.len())
    };
    let mut text = counts.iter().map(part).collect::<Vec<_>>().join(", ");
    if runs.len() >= FEW {
        let share = Share::wilson(most as u64, runs.len() as u64);
        let (low, high) = (share.low * 100.0, share.high * 100.0);
        let _ = if most == runs.len() {
            write!(text, " (≥ {low:.1} %)")
        } else {
            write!(text, " ({low:.1}–{high:.1} %)")
        };
    }
    Some(text)
}

/// `1.74 (1.42–2.89)`: median, least and most.
fn spread(values: impl Iterator<Item = f64>, digits: usize) -> Option<String> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (least, most) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    };
    Some(format!("{median:.digits$} ({least:.digits$}–{most:.digits$})"))
}

/// What a definition may ask a run for: `scenario`, `variant`, `cpus`, `group` and so on, and every parameter by its name.
fn properties(run: &Run) -> BTreeMap<String, String> {
    let mut all = run.details();
    all.extend(run.properties().into_iter().map(|(axis, value)| (axis.name().to_lowercase(), value)));
    all.extend(run.record.group.iter().map(|group| ("group".to_owned(), group.clone())));
    all
}

fn fits(filter: &Filter, properties: &BTreeMap<String, String>) -> bool {
    filter
        .iter()
        .all(|(name, allowed)| properties.get(name).is_some_and(|value| allowed.as_slice().contains(value)))
}

/// The values that there are, each once: variants in their own order, numbers as numbers, all else by the alphabet.
fn sorted<'a>(values: impl Iterator<Item = &'a str>, variants: &[String]) -> Vec<&'a str> {
    let mut all: Vec<&str> = values.collect();
    let rank = |value: &str| {
        let known = variants.iter().position(|variant| variant == value).unwrap_or(variants.len());
        (known, value.parse::<u64>().unwrap_or(u64::MAX))
    };
    all.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| a.cmp(b)));
    all.dedup();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    fn run(seed: u64, variant: &str, cpus: u32, verdict: Verdict) -> Run {
        let mut record = record(seed);
        record.run.variant = variant.into();
        record.run.cpus = cpus;
        record.judgement.verdict = verdict;
        if verdict == Verdict::Livelock {
            record.judgement.spinners = vec![1];
        }
        Run::new(record)
    }

    fn variants() -> Vec<String> {
        ["trylock", "cure"].map(str::to_owned).to_vec()
    }

    const DEFINITION: &str = "<!-- table of runs\nrows = 'variant'\nwhere = { scenario = 'smoke' }\n\
        columns = [{ title = 'two', where = { cpus = '2' } }, { title = 'all', each = 'cpus' }]\n-->\n";

    #[test]
    fn a_table_is_written_below_its_comment_and_in_place_of_the_old_one() {
        let mut runs: Vec<Run> = (0..20).map(|seed| run(seed, "trylock", 2, Verdict::Livelock)).collect();
        runs.extend([run(30, "cure", 2, Verdict::Pass), run(31, "cure", 8, Verdict::Pass)]);
        runs.push(run(32, "cure", 2, Verdict::HarnessError));
        let text = format!("before\n\n{DEFINITION}| old |\n|---|\n| 1 |\n\nafter\n");
        let filled = fill(&text, &runs, &variants()).expect("filled");
        let table = "| variant | two | all |\n|---|---|---|\n\
            | `trylock` | livelock 20 of 20 (≥ 83.9 %) | 2: livelock 20 of 20 (≥ 83.9 %) |\n\
            | `cure` | pass 1 of 1 | 2: pass 1 of 1; 8: pass 1 of 1 |\n";
        assert_eq!(filled, format!("before\n\n{DEFINITION}{table}\nafter\n"));
        assert_eq!(fill(&filled, &runs, &variants()).expect("again"), filled);
    }

    #[test]
    fn cells_name_what_is_mixed_and_what_does_not_spin() {
        let mut runs: Vec<Run> = (0..11).map(|seed| run(seed, "trylock", 2, Verdict::Livelock)).collect();
        runs.iter_mut().for_each(|run| run.record.judgement.spinners.clear());
        runs.push(run(12, "trylock", 2, Verdict::Pass));
        let filled = fill(DEFINITION, &runs, &variants()).expect("filled");
        assert!(filled.contains("livelock in vain 11 of 12, pass 1 of 12 (64.6–98.5 %)"), "{filled}");
    }

    #[test]
    fn measures_are_medians_with_their_spread() {
        let definition = "<!-- table of runs\nrows = 'variant'\ncolumns = [{ title = 'tries', show = 'retries' }, \
            { title = 'n', show = 'finished' }, { title = 'rate', show = 'faults-per-second' }, \
            { title = 'p50', show = 'p50' }]\n-->\n";
        let mut runs: Vec<Run> = (0..4).map(|seed| run(seed, "cure", 2, Verdict::Pass)).collect();
        for (run, retries) in runs.iter_mut().zip([10, 20, 40, 0]) {
            let measures = &mut run.record.measures;
            (measures.retries, measures.resolved, measures.observed_ms) = (retries, 20, Some(2000));
        }
        runs[3].record.measures.failed = true;
        let filled = fill(definition, &runs, &variants()).expect("filled");
        assert!(filled.contains("| `cure` | 1.00 (0.50–2.00) | 3 | 2 (2–2) | – |"), "{filled}");
    }

    #[test]
    fn runs_of_a_control_are_not_the_scenarios() {
        let mut runs = vec![run(1, "cure", 2, Verdict::Pass), run(2, "cure", 2, Verdict::Pass)];
        runs[1].record.run.control = Some("alone".into());
        let of = |columns: &str| {
            let text = format!("<!-- table of runs\nrows = 'variant'\ncolumns = [{columns}]\n-->\n");
            fill(&text, &runs, &variants()).expect("filled")
        };
        assert!(of("{ title = 'x' }").contains("pass 1 of 1"));
        assert!(of("{ title = 'x', where = { control = ['none', 'alone'] } }").contains("pass 2 of 2"));
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        let runs = [run(1, "cure", 2, Verdict::Pass)];
        let error = |text: &str| fill(text, &runs, &variants()).expect_err("refused").to_string();
        assert!(error("a text\n").contains("no line begins"));
        assert!(
            error("\n<!-- table of runs\nrows = 'variant'\n").starts_with("line 2: the comment does not end")
        );
        assert!(error("<!-- table of runs\nrow = 'variant'\n-->\n").contains("unknown field `row`"));
        let none = DEFINITION.replace("smoke", "drain-livelock");
        assert_eq!(error(&none), "line 1: no run is of this table; its columns: two, all");
    }
}

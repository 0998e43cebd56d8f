//! `hmmstorm bench`: hsgpu against the kernel's own test_hmm, in the same boot, in turn.

mod profile;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use hmmstorm_abi::wire::event::{self, Event};
use serde::Serialize;

use self::profile::Profile;
use super::prepare::programs_with_selftests;
use super::storm::runner::{Bench, Runner, Wish, configure};
use crate::cli::{Context, Error, ImageArgs, MachineArgs, Outcome};
use crate::judge::record::{self, Record};
use crate::judge::verdict::Verdict;

/// The scenario that measures in the guest.
const SCENARIO: &str = "bench";
/// Version of the JSON; grows when a field changes its meaning or goes away.
const SCHEMA: u32 = 1;
/// Series of the driver under test, and of the one that it is compared with.
const OURS: &str = "hsgpu";
const STOCK: &str = "test_hmm";

/// What is wanted of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind", content = "value")]
enum Goal {
    /// Ours is at least so many times the stock driver's.
    Ratio(f64),
    /// Ours is at most this.
    AtMost(f64),
}

/// The goals: what hsgpu was built to reach on two cores under emulation.
const GOALS: [(&str, Goal); 7] = [
    ("sys-to-dev/2048K/2M", Goal::Ratio(3.0)),
    ("sys-to-dev/262144K/2M", Goal::Ratio(3.0)),
    ("dev-to-sys/2048K/2M", Goal::Ratio(1.5)),
    ("dev-to-sys/262144K/2M", Goal::Ratio(1.5)),
    ("cpu-faults/1", Goal::Ratio(1.0)),
    ("cpu-pages/1", Goal::Ratio(1.0)),
    ("traps-per-2M/migration", Goal::AtMost(1.0)),
];

/// Options of `hmmstorm bench`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Times that each driver gets its turn [default: the scenario's]
    #[arg(long, value_name = "N")]
    rounds: Option<u64>,
    /// Parameter of the scenario `bench`; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = super::storm::pair)]
    param: Vec<(String, String)>,
    /// End with exit code 1 if a goal is missed
    #[arg(long)]
    check: bool,
    /// Sample the CPUs all the time, which slows the guest a little, and show what CPU faults spend their time on
    #[arg(long)]
    sample: bool,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// One value, by its name.
#[derive(Clone, Debug, Serialize)]
struct Sample {
    series: String,
    round: u64,
    name: String,
    value: f64,
}

/// A figure of both drivers.
#[derive(Debug, PartialEq, Serialize)]
struct Figure {
    name: String,
    unit: &'static str,
    ours: Option<Spread>,
    stock: Option<Spread>,
    /// Ours by the stock driver's: of the medians, and the least and the most of any round.
    ratio: Option<Spread>,
    goal: Option<Goal>,
    reached: Option<bool>,
}

/// Values of several rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
    count: usize,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(*values.get(middle - 1)?, *values.get(middle)?),
            _ => *values.get(middle)?,
        };
        Some(Self { median, least, most, count: values.len() })
    }
}

/// What the JSON file holds.
#[derive(Debug, Serialize)]
struct Report<'a> {
    schema: u32,
    figures: &'a [Figure],
    samples: &'a [Sample],
    run: &'a Record,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let mut parameters = args.param.clone();
    parameters.extend(args.rounds.map(|rounds| ("rounds".to_owned(), rounds.to_string())));
    let wish = Wish { scenario: SCENARIO, control: None, parameters: &parameters, seed: 0 };
    let programs = || programs_with_selftests(&args.image, &args.machine, ctx);
    let configured = configure(wish, &args.machine, ctx, programs)?;
    let prepared = &configured.prepared;
    if args.machine.dry_run {
        print!("{}", prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let folder = prepared.folder(SCENARIO, ctx)?;
    let bench = Arc::new(Bench::new(prepared, ctx)?);
    let runner = Runner::new(configured, vec![Verdict::Pass], bench, ctx).profiling(args.sample);
    ctx.note(format_args!(
        "{OURS} against {STOCK} on {}; logs in {}",
        runner.kernel(),
        folder.dir().display()
    ));
    let mut samples = Vec::new();
    let record = runner.run_listening(
        0,
        folder.dir(),
        |_| (),
        |record: &event::Record| {
            if let Event::Sample { series, round, name, value } = &record.event {
                ctx.detail(format_args!("{series}, round {round}: {name} {value:.3}"));
                samples.push(Sample {
                    series: series.clone(),
                    round: *round,
                    name: name.clone(),
                    value: *value,
                });
            }
        },
    )?;
    let figures = figures(&samples);
    print!("{}", table(&figures));
    if args.sample {
        let profile = Profile::of(folder.dir())
            .map_err(|error| Error::harness(format!("no samples in {}: {error}", folder.dir().display())))?;
        print!("{}", profile.table());
    }
    let report = Report { schema: SCHEMA, figures: &figures, samples: &samples, run: &record };
    record::write_json(&folder.dir().join("bench.json"), &report)?;
    if let Some(file) = &args.json {
        record::write_json(file, &report)?;
    }
    let judgement = &record.judgement;
    match judgement.verdict {
        Verdict::Pass => {}
        Verdict::HarnessError => {
            return Err(Error::harness(format!(
                "the measurement was not finished: {}; evidence: {}",
                judgement.reason,
                folder.dir().display()
            )));
        }
        verdict => {
            println!("{verdict}: {}; evidence: {}", judgement.reason, folder.dir().display());
            return Ok(Outcome::Problem);
        }
    }
    let missed = figures.iter().any(|figure| figure.reached == Some(false));
    Ok(if args.check && missed { Outcome::Problem } else { Outcome::Pass })
}

/// All figures, in the order in which they were first measured.
fn figures(samples: &[Sample]) -> Vec<Figure> {
    let mut names: Vec<&str> = Vec::new();
    let mut values: BTreeMap<(&str, &str), BTreeMap<u64, f64>> = BTreeMap::new();
    for sample in samples {
        if !names.contains(&sample.name.as_str()) {
            names.push(&sample.name);
        }
        values.entry((&sample.name, &sample.series)).or_default().insert(sample.round, sample.value);
    }
    let figure = |name: &&str| {
        let of = |series| values.get(&(*name, series));
        let spread = |series| Spread::of(of(series)?.values().copied().collect());
        let (ours, stock) = (spread(OURS), spread(STOCK));
        let ratio = of(OURS).zip(of(STOCK)).zip(ours.zip(stock)).and_then(|((ours, stock), medians)| {
            // A round's two turns follow each other, so what slows the host slows both.
            let rounds = ours.iter().filter_map(|(round, value)| Some(value / stock.get(round)?));
            let spread = Spread::of(rounds.filter(|ratio| ratio.is_finite()).collect())?;
            Some(Spread { median: medians.0.median / medians.1.median, ..spread })
        });
        let goal = GOALS.iter().find(|(of, _)| of == name).map(|(_, goal)| *goal);
        let reached = match goal {
            Some(Goal::Ratio(least)) => ratio.map(|ratio| ratio.median >= least),
            Some(Goal::AtMost(most)) => ours.map(|ours| ours.median <= most),
            None => None,
        };
        Figure { name: (*name).to_owned(), unit: unit(name), ours, stock, ratio, goal, reached }
    };
    names.iter().map(figure).collect()
}

fn unit(name: &str) -> &'static str {
    match name.split('/').next() {
        Some("sys-to-dev" | "dev-to-sys") => "GB/s",
        Some("cpu-faults") => "faults/s",
        Some("cpu-pages") => "pages/s",
        _ => "per 2 MiB",
    }
}

fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<28} {:>9}  {:<26} {:<26} {:<22} goal\n",
        "median (least..most)", "", OURS, STOCK, "ratio"
    );
    for figure in figures {
        let spread = |spread: &Option<Spread>| {
            spread.map_or_else(String::new, |s| {
                format!("{} ({}..{})", short(s.median), short(s.least), short(s.most))
            })
        };
        let goal = match (figure.goal, figure.reached) {
            (Some(Goal::Ratio(least)), Some(reached)) => format!(">= {least}x: {}", word(reached)),
            (Some(Goal::AtMost(most)), Some(reached)) => format!("<= {most}: {}", word(reached)),
            _ => String::new(),
        };
        let line = format!(
            "{:<28} {:>9}  {:<26} {:<26} {:<22} {goal}",
            figure.name,
            figure.unit,
            spread(&figure.ours),
            spread(&figure.stock),
            spread(&figure.ratio)
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

fn word(reached: bool) -> &'static str {
    if reached { "reached" } else { "missed" }
}

/// Three significant digits or so.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(series: &str, round: u64, name: &str, value: f64) -> Sample {
        Sample { series: series.into(), round, name: name.into(), value }
    }

    #[test]
    fn figures_compare_the_two_drivers() {
        let name = "sys-to-dev/2048K/2M";
        let samples = [
            sample(OURS, 0, name, 0.75),
            sample(STOCK, 0, name, 0.25),
            sample(STOCK, 1, name, 0.3),
            sample(OURS, 1, name, 0.6),
            sample(OURS, 2, name, 0.9),
            sample(STOCK, 2, name, 0.1),
            sample(OURS, 0, "traps-per-2M/migration", 1.5),
        ];
        let figures = figures(&samples);
        let ratio = figures[0].ratio.expect("a ratio");
        assert!((ratio.median - 3.0).abs() < 1e-9 && (ratio.least - 2.0).abs() < 1e-9, "{ratio:?}");
        assert!((ratio.most - 9.0).abs() < 1e-9 && figures[0].reached == Some(true));
        assert_eq!((figures[1].stock, figures[1].reached), (None, Some(false)));
        let table = table(&figures);
        assert!(table.contains(">= 3x: reached") && table.contains("<= 1: missed"), "{table}");
    }

    #[test]
    fn medians_of_even_counts_lie_between() {
        let spread = Spread::of(vec![4.0, 1.0]).expect("values");
        assert_eq!((spread.median, spread.least, spread.most), (2.5, 1.0, 4.0));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}

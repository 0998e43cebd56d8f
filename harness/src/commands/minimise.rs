//! `hmmstorm minimise`: a smaller capsule with the same finding.

use std::path::{Path, PathBuf};

use super::reproduce::{Again, Parts, Reproduction, capsule_as_it_is, is_finding};
use super::storm;
use crate::capsule::shrink::{Dimension, shrink};
use crate::capsule::{self, Capsule};
use crate::cli::{Context, Error, Outcome};
use crate::judge::record::Record;
use crate::judge::scenario::Scenario;
use crate::judge::verdict::Verdict;

/// Name of the number that is no parameter of the scenario.
const CPUS: &str = "cpus";

/// Options of `hmmstorm minimise`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The capsule
    capsule: PathBuf,
    /// Where to write the smaller one [default: beside it, with .min before the extension]
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Folder for the logs of the runs [default: a new one in the cache]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Seeds to try with each set of numbers: another number is another schedule
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    seeds: u64,
    /// Runs after which it stops with what it has
    #[arg(long, value_name = "N", default_value_t = 200)]
    max_runs: u32,
    /// Any finding of the same verdict will do
    #[arg(long)]
    any_finding: bool,
    /// Leave a real-time capsule in real time; its runs are made deterministic otherwise
    #[arg(long)]
    real_time: bool,
    #[command(flatten)]
    parts: Parts,
}

/// Why the search ended early.
enum Stop {
    /// As many runs as allowed.
    Enough,
    /// An error.
    Failed(Error),
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let capsule = Capsule::load(&args.capsule).map_err(|error| Error::usage(error.to_string()))?;
    let then = &capsule.record;
    if !is_finding(then.judgement.verdict) {
        return Err(Error::usage(format!("the capsule holds no finding, but {}", then.judgement.verdict)));
    }
    let scenario = Scenario::load(&ctx.repo.join("storm/scenarios"), &then.run.scenario)
        .map_err(|error| Error::usage(error.to_string()))?;
    let start = Again {
        deterministic: !args.real_time || capsule_as_it_is(&capsule).deterministic,
        ..capsule_as_it_is(&capsule)
    };
    let dimensions = dimensions(&scenario, then);
    let output = args.output.clone().unwrap_or_else(|| args.capsule.with_extension("min.json"));
    let quiet = ctx.quietly();
    // Builds say what they do; the runs are told of in a line each.
    let reproduction = Reproduction::new(&capsule, &args.parts, ctx)?;
    let mut search = Search {
        ctx,
        quiet: &quiet,
        reproduction,
        then,
        start,
        dimensions: &dimensions,
        out: storm::folder(args.out.clone(), ctx)?,
        output: &output,
        args: &args,
        runs: 0,
        best: None,
    };
    let first: Vec<u64> = dimensions.iter().map(|dimension| dimension.now).collect();
    match search.holds(&first) {
        Ok(true) => {}
        Ok(false) => {
            return Err(Error::usage(format!(
                "the finding does not show here to begin with ({} seeds tried){}: see what `hmmstorm replay` says is different",
                args.seeds,
                if search.start.deterministic && then.run.mode != "deterministic" {
                    ", or not in deterministic mode: try --real-time"
                } else {
                    ""
                }
            )));
        }
        Err(Stop::Failed(error)) => return Err(error),
        Err(Stop::Enough) => return Err(Error::usage("--max-runs leaves no run")),
    }
    let ended = shrink(&dimensions, |values| search.holds(values));
    let Some((values, record)) = search.best.take() else {
        return Err(Error::harness("no run showed the finding"));
    };
    println!("{} after {} runs:", then.judgement.verdict, search.runs);
    for (dimension, value) in dimensions.iter().zip(&values) {
        println!("  {:<12} {} (was {})", dimension.name, value, dimension.now);
    }
    println!("  seed         {} (was {})", record.run.seed, then.run.seed);
    println!("{}\n{}", capsule::command(&record), output.display());
    match ended {
        Ok(_) => Ok(Outcome::Pass),
        Err(Stop::Enough) => {
            ctx.note(format_args!("stopped after {} runs; smaller may be possible", search.runs));
            Ok(Outcome::Pass)
        }
        Err(Stop::Failed(error)) => Err(error),
    }
}

/// What can be made smaller: the scenario's numbers in the order in which it lists them, then the CPUs. A number that is 0
/// by default means "as many as fit", and stays that.
fn dimensions(scenario: &Scenario, record: &Record) -> Vec<Dimension> {
    let run = &record.run;
    let parameter = |(name, least, default): (String, u64, u64)| {
        let now = run.parameters.get(&name)?.parse().ok()?;
        (now > 0).then(|| Dimension { name, least: if default == 0 { least.max(1) } else { least }, now })
    };
    let cpus = Dimension { name: CPUS.to_owned(), least: scenario.least_cpus().into(), now: run.cpus.into() };
    let mut dimensions: Vec<_> = scenario.numbers().filter_map(parameter).collect();
    dimensions.push(cpus);
    dimensions.retain(|dimension| dimension.now > dimension.least);
    dimensions
}

struct Search<'a> {
    ctx: &'a Context,
    quiet: &'a Context,
    reproduction: Reproduction<'a>,
    then: &'a Record,
    start: Again,
    dimensions: &'a [Dimension],
    out: PathBuf,
    output: &'a Path,
    args: &'a Args,
    runs: u32,
    /// The latest run that had the finding, with its numbers.
    best: Option<(Vec<u64>, Record)>,
}

impl Search<'_> {
    /// Whether the finding shows with these numbers, under any of a few seeds. If so, its capsule is written.
    fn holds(&mut self, values: &[u64]) -> Result<bool, Stop> {
        let again = self.again(values);
        let runner = match self.reproduction.runner(&again) {
            Ok(runner) => runner.with_context(self.quiet),
            // Numbers that do not go together are no finding.
            Err(Error::Usage(why)) => {
                self.ctx.detail(format_args!("{values:?}: {why}"));
                return Ok(false);
            }
            Err(error) => return Err(Stop::Failed(error)),
        };
        let first = self.best.as_ref().map_or(self.then.run.seed, |(_, record)| record.run.seed);
        for seed in first..first.saturating_add(self.args.seeds) {
            if self.runs >= self.args.max_runs {
                return Err(Stop::Enough);
            }
            let dir = self.out.join(format!("{:04}", self.runs));
            self.runs += 1;
            let record = runner.run(seed, &dir, |_| ()).map_err(Stop::Failed)?;
            let verdict = record.judgement.verdict;
            // A harness error here is mostly a machine too small for its numbers.
            let shows = verdict == self.then.judgement.verdict
                && (self.args.any_finding || record.identity == self.then.identity);
            self.ctx.note(format_args!(
                "{}: {verdict}{}",
                self.describe(values, seed),
                if shows || verdict == Verdict::Pass { "" } else { " (another finding)" }
            ));
            if shows {
                std::fs::copy(dir.join(capsule::FILE), self.output)
                    .map_err(|error| Stop::Failed(error.into()))?;
                self.best = Some((values.to_vec(), record));
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn again(&self, values: &[u64]) -> Again {
        let mut again = self.start.clone();
        for (dimension, &value) in self.dimensions.iter().zip(values) {
            if dimension.name == CPUS {
                again.cpus = u32::try_from(value).unwrap_or(u32::MAX);
            } else if value != dimension.now {
                again.parameters.retain(|(name, _)| *name != dimension.name);
                again.parameters.push((dimension.name.clone(), value.to_string()));
            }
        }
        again
    }

    fn describe(&self, values: &[u64], seed: u64) -> String {
        let pairs: Vec<_> =
            self.dimensions.iter().zip(values).map(|(d, value)| format!("{}={value}", d.name)).collect();
        format!("{} seed={seed}", pairs.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    #[test]
    fn numbers_that_mean_as_many_as_fit_are_left_alone() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/scenarios");
        let scenario = Scenario::load(&folder, "drain-livelock").expect("a scenario");
        let mut record = record(1);
        record.run.cpus = 4;
        record.run.parameters = scenario.in_force(&std::collections::BTreeMap::new());
        let found = dimensions(&scenario, &record);
        let of = |name: &str| found.iter().find(|d| d.name == name).map(|d| (d.least, d.now));
        assert_eq!(of("rounds"), Some((1, 60)));
        assert_eq!(of("cpus"), Some((2, 4)));
        assert_eq!(of("faulters"), None);
        assert_eq!(of("mapcount"), Some((1, 2)));
        record.run.parameters.insert("faulters".into(), "3".into());
        assert!(dimensions(&scenario, &record).iter().any(|d| d.name == "faulters" && d.least == 1));
    }
}

//! `hmmstorm replay`: a capsule's run again, and whether it came out the same.

use std::path::PathBuf;

use super::reproduce::{Parts, Reproduction, capsule_as_it_is};
use super::storm::{self, runner::Runner};
use crate::capsule::Capsule;
use crate::capsule::differences::{Difference, differences};
use crate::cli::{Context, Error, Outcome};
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;
use crate::statistics::Share;

/// Options of `hmmstorm replay`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The capsule
    capsule: PathBuf,
    /// Number of runs, all with the capsule's seed [default: 1; with --git-bisect 5, each with the next seed]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    runs: Option<u64>,
    /// For `git bisect run hmmstorm replay CAPSULE --git-bisect --tree .`: exit code 1 as soon as the capsule's verdict
    /// comes, 0 if it does not, 125 if this tree cannot be built or tested
    #[arg(long, requires = "tree")]
    git_bisect: bool,
    /// Folder that gets a folder for each run [default: a new one in the cache]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Build, say what is different here, and run nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    parts: Parts,
}

/// How a run compares with the capsule's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compared {
    /// The same verdict and finding, and, of a deterministic run, the same bytes.
    Same,
    /// The same verdict and finding, but other bytes.
    OtherBytes,
    /// The same verdict by another finding.
    OtherFinding,
    /// Another verdict.
    OtherVerdict,
}

impl Compared {
    fn of(then: &Record, now: &Record) -> Self {
        if now.judgement.verdict != then.judgement.verdict {
            Self::OtherVerdict
        } else if now.identity != then.identity {
            Self::OtherFinding
        } else if then.run.mode == "deterministic" && now.files != then.files {
            Self::OtherBytes
        } else {
            Self::Same
        }
    }
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let capsule = Capsule::load(&args.capsule).map_err(|error| Error::usage(error.to_string()))?;
    let then = &capsule.record;
    ctx.note(format_args!(
        "{} (seed {}, {}): {}",
        then.judgement.verdict, then.run.seed, then.run.mode, capsule.title
    ));
    if args.git_bisect {
        return bisect(&capsule, &args, ctx);
    }
    let runs = args.runs.unwrap_or(1);
    let reproduction = Reproduction::new(&capsule, &args.parts, ctx)?;
    let runner = reproduction.runner(&capsule_as_it_is(&capsule))?;
    let differences = here(then, &runner);
    for difference in &differences {
        println!("different: {difference}");
    }
    if differences.is_empty() {
        println!("built here as it was, to the byte");
    }
    if args.dry_run {
        print!("{}", runner.prepared().dry_run());
        return Ok(Outcome::Pass);
    }
    let out = storm::folder(args.out, ctx)?;
    let mut same = 0;
    let mut worst = Compared::Same;
    for index in 0..runs {
        let dir = out.join(format!("{index:04}-seed-{}", then.run.seed));
        let record = runner.run(then.run.seed, &dir, |_| ())?;
        if record.judgement.verdict == Verdict::HarnessError {
            return Err(Error::harness(format!(
                "the bench failed: {} (logs in {})",
                record.judgement.reason,
                dir.display()
            )));
        }
        let compared = Compared::of(then, &record);
        println!("{}; {}", describe(compared, then, &record), dir.display());
        same += u64::from(matches!(compared, Compared::Same | Compared::OtherBytes));
        if compared != Compared::Same {
            worst = compared;
        }
    }
    let deterministic = then.run.mode == "deterministic";
    if runs > 1 {
        println!("the finding of the capsule: {}", Share::wilson(same, runs));
    }
    Ok(match worst {
        Compared::Same => Outcome::Pass,
        // Other binaries have other bytes; from the same ones, the bench is not deterministic.
        Compared::OtherBytes if !differences.is_empty() => Outcome::Pass,
        // In real time a seed is not a schedule: a finding that shows is shown.
        _ if !deterministic && same > 0 => Outcome::Pass,
        _ => Outcome::Problem,
    })
}

/// Seeds after which a commit counts as good: what the stopping rule of a matrix asks for (`docs/matrix.md`).
const BISECT_SEEDS: u64 = 5;

/// `--git-bisect`. Another kernel is another schedule, so the capsule's seed alone proves nothing: each run takes the next.
fn bisect(capsule: &Capsule, args: &Args, ctx: &Context) -> Result<Outcome, Error> {
    let skip = |error: Error| match error {
        Error::Interrupted => Err(Error::Interrupted),
        // A patch that does not apply is the user's mistake elsewhere, and the commit's here.
        error => {
            eprint!("cannot be tested, skipped: {}", error.report());
            Ok(Outcome::Skip)
        }
    };
    let runner = Reproduction::new(capsule, &args.parts, ctx)
        .and_then(|reproduction| reproduction.runner(&capsule_as_it_is(capsule)));
    let runner = match runner {
        Ok(runner) => runner,
        Err(error) => return skip(error),
    };
    let out = storm::folder(args.out.clone(), ctx)?;
    let first = capsule.record.run.seed;
    for index in 0..args.runs.unwrap_or(BISECT_SEEDS) {
        let seed = first.wrapping_add(index);
        let record = match runner.run(seed, &out.join(format!("{index:04}-seed-{seed}")), |_| ()) {
            Ok(record) => record,
            Err(error) => return skip(error),
        };
        let verdict = record.judgement.verdict;
        println!("{}: seed {seed}: {verdict}", runner.kernel());
        if verdict == Verdict::HarnessError {
            return skip(Error::harness(record.judgement.reason));
        }
        if verdict == capsule.record.judgement.verdict {
            return Ok(Outcome::Problem);
        }
    }
    Ok(Outcome::Pass)
}

/// What is not here as it was then.
fn here(then: &Record, runner: &Runner<'_>) -> Vec<Difference> {
    let (run, provenance) = runner.definition(then.run.seed, runner.prepared());
    differences((&then.run, &then.provenance), (&run, &provenance))
}

fn describe(compared: Compared, then: &Record, now: &Record) -> String {
    let identity = |record: &Record| record.identity.clone().unwrap_or_else(|| "no finding".to_owned());
    match compared {
        Compared::Same if then.run.mode == "deterministic" => {
            format!("{} again, by the same finding, with the same bytes", now.judgement.verdict)
        }
        Compared::Same => format!("{} again, by the same finding", now.judgement.verdict),
        Compared::OtherBytes => {
            let files = now.files.iter().filter(|(name, file)| then.files.get(*name) != Some(file));
            let names: Vec<_> = files.map(|(name, _)| name.as_str()).collect();
            format!(
                "{} again, by the same finding, but with other bytes in {}",
                now.judgement.verdict,
                names.join(" and ")
            )
        }
        Compared::OtherFinding => format!(
            "{} again, but by {} instead of {}: {}",
            now.judgement.verdict,
            identity(now),
            identity(then),
            now.title.as_deref().unwrap_or_default()
        ),
        Compared::OtherVerdict => format!(
            "{} instead of {}: {}",
            now.judgement.verdict, then.judgement.verdict, now.judgement.reason
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    #[test]
    fn what_counts_as_the_same() {
        let mut then = record(1);
        then.judgement.verdict = Verdict::Livelock;
        then.identity = Some("livelock-1".into());
        let of = |change: &dyn Fn(&mut Record)| {
            let mut now = then.clone();
            change(&mut now);
            Compared::of(&then, &now)
        };
        assert_eq!(of(&|now| now.timings.total_ms += 1), Compared::Same);
        assert_eq!(of(&|now| now.files.clear()), Compared::OtherBytes);
        assert_eq!(of(&|now| now.identity = Some("livelock-2".into())), Compared::OtherFinding);
        assert_eq!(of(&|now| now.judgement.verdict = Verdict::Pass), Compared::OtherVerdict);
        let mut real = then.clone();
        real.run.mode = "real-time".into();
        let mut other = real.clone();
        other.files.clear();
        assert_eq!(Compared::of(&real, &other), Compared::Same);
    }
}

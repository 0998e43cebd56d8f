//! `hmmstorm storm`: runs a scenario on a kernel, once a seed, and judges each run.

pub(crate) mod runner;
mod show;
mod watch;

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::prepare::programs;
use crate::cli::{Context, Error, ImageArgs, MachineArgs, Outcome};
use crate::judge::record::{self, Record};
use crate::judge::verdict::Verdict;
use crate::records;
use runner::{Bench, Runner, Wish, configure};
use show::{Progress, Summary};

/// Harness errors in a row after which no further seed is tried.
const GIVE_UP: usize = 2;

/// Options of `hmmstorm storm`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Scenario to run (`hmmstorm list scenarios`)
    scenario: String,
    /// Control of the scenario: a run with one condition of the bug removed, which must pass
    #[arg(long, value_name = "NAME")]
    control: Option<String>,
    /// Parameter of the scenario; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    param: Vec<(String, String)>,
    /// Seed of the first run; each further run takes the next one
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Number of runs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    runs: u64,
    /// Verdict that counts as success [default: pass, or the control's]
    #[arg(long, value_name = "VERDICT", value_enum)]
    expect: Option<Verdict>,
    /// Write all records and the summary to this file, after every run
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Append the record of every run to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    records: Option<PathBuf>,
    /// Folder that gets a folder for each run [default: a new one in the cache]
    #[arg(long, value_name = "DIR", conflicts_with = "folder")]
    out: Option<PathBuf>,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

pub(super) fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("it has the form NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let wish = Wish {
        scenario: &args.scenario,
        control: args.control.as_deref(),
        parameters: &args.param,
        seed: args.seed,
    };
    let configured = configure(wish, &args.machine, ctx, || programs(&args.image, &args.machine, ctx))?;
    if args.machine.dry_run {
        print!("{}", configured.prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let out = folder(args.out.or(args.machine.folder), ctx)?;
    let bench = Arc::new(Bench::new(&configured.prepared, ctx)?);
    let runner = Runner::new(configured, args.expect.into_iter().collect(), bench, ctx);
    runner.announce(args.runs, &out);

    let mut records_file = match args.records {
        Some(path) => {
            let (writer, _) = records::Writer::open(&path)?;
            Some((path, writer))
        }
        None => None,
    };
    let mut records = Vec::new();
    let mut failures = 0;
    for index in 0..args.runs {
        let seed = args.seed.wrapping_add(index);
        let dir = out.join(format!("{index:04}-seed-{seed}"));
        let mut progress = Progress::new(ctx, format!("seed {seed}"));
        let result = runner.run(seed, &dir, |phase| progress.phase(phase));
        drop(progress);
        let record = match result {
            Ok(record) => record,
            Err(error) => {
                // What is done is done, and is told.
                if !records.is_empty() {
                    println!("{}", Summary::of(&records, args.runs));
                }
                return Err(error);
            }
        };
        print!("{}", show::run(&record, &dir));
        if let Some((path, writer)) = &mut records_file {
            let folder = Some(records::file::relative(&dir, path));
            writer.append(&Record { folder, ..record.clone() })?;
        }
        failures = if record.judgement.verdict == Verdict::HarnessError { failures + 1 } else { 0 };
        records.push(record);
        let summary = Summary::of(&records, args.runs);
        if let Some(file) = &args.json {
            record::write_json(file, &serde_json::json!({ "summary": summary, "runs": records }))?;
        }
        if failures >= GIVE_UP && !runner.expected().contains(&Verdict::HarnessError) {
            break;
        }
    }
    let summary = Summary::of(&records, args.runs);
    if args.runs > 1 {
        println!("{summary}");
    }
    if summary.harness_errors > 0 {
        let last = records.iter().rev().find(|record| record.judgement.verdict == Verdict::HarnessError);
        let why = last.map(|record| record.judgement.reason.as_str()).unwrap_or_default();
        return Err(Error::harness(format!(
            "{} of {} runs failed in the bench itself; the last one: {why}",
            summary.harness_errors,
            records.len()
        )));
    }
    let all = records.iter().all(|record| record.as_expected);
    Ok(if all { Outcome::Pass } else { Outcome::Problem })
}

/// The folder of all runs.
pub(crate) fn folder(asked: Option<PathBuf>, ctx: &Context) -> Result<PathBuf, Error> {
    let dir = asked.unwrap_or_else(|| {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        ctx.cache.join("runs").join(format!("{seconds}-{}-storm", process::id()))
    });
    std::fs::create_dir_all(&dir)
        .map_err(|error| Error::harness(format!("cannot make the folder {}: {error}", dir.display())))?;
    Ok(std::path::absolute(dir)?)
}

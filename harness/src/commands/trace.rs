//! `hmmstorm trace`: a run as a timeline for ui.perfetto.dev.

use std::path::PathBuf;

use super::report::write;
use crate::cli::{Context, Error, Outcome};
use crate::report::trace::trace;

/// Options of `hmmstorm trace`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of one run: with verdict.json, events.jsonl and (of a run that did not pass) samples.jsonl
    run: PathBuf,
    /// File to write to [default: trace.json in the run's folder]
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    if !args.run.join("verdict.json").is_file() {
        return Err(Error::usage(format!(
            "{} is no folder of a run: it has no verdict.json",
            args.run.display()
        )));
    }
    let timeline = trace(&args.run)?;
    let out = args.out.unwrap_or_else(|| args.run.join("trace.json"));
    write(&out, &timeline.to_string())?;
    ctx.note(format_args!("open it in https://ui.perfetto.dev: {}", out.display()));
    Ok(Outcome::Pass)
}

//! `hmmstorm matrix`: runs a plan, as many runs at once as the machine has cores for, and takes up what was interrupted.

mod execute;
mod show;
mod state;

use std::path::{Path, PathBuf};

use crate::build::Pins;
use crate::cli::{Context, Error, Outcome};
use crate::judge::record;
use crate::matrix::{CellSpec, Own, Plan, Shard, expand, plan};
use crate::records::{self, Union};
use execute::Execution;
use state::State;

/// Options of `hmmstorm matrix`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Plan of what to run (docs/matrix.md), as ci/plans/small.toml
    plan: PathBuf,
    /// Patch of your own, a diff or a mail: a variant beside those of the plan, in every group about the reference kernel;
    /// each one is a variant by itself
    #[arg(long, value_name = "FILE")]
    patch: Vec<PathBuf>,
    /// Series of your own in a mailbox, likewise
    #[arg(long, value_name = "FILE")]
    mbox: Vec<PathBuf>,
    /// Kernel source tree of your own with the branch to judge checked out: a variant in every group
    #[arg(long, value_name = "DIR")]
    tree: Vec<PathBuf>,
    /// Variant of the list that every --patch and --mbox comes on top of [default: the stock kernel]
    #[arg(long, value_name = "VARIANT")]
    on: Option<String>,
    /// Folder for records and logs; what is in it already is not run again [default: target/matrix/NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Do only this group of the plan; may be given several times. What is summed up is all that the folder has
    #[arg(long, value_name = "NAME", conflicts_with = "merge")]
    group: Vec<String>,
    /// Do only a part: i of n, to be merged later
    #[arg(long, value_name = "I/N", default_value_t = Shard::WHOLE)]
    shard: Shard,
    /// Run nothing: merge records files of shards, or folders with them, into the folder, and sum up
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["shard", "fresh"])]
    merge: Vec<PathBuf>,
    /// Cores to keep busy [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    jobs: Option<u32>,
    /// Throw away what is in the folder, and start anew
    #[arg(long)]
    fresh: bool,
    /// Go on with records that another version of the plan made: those of its runs that this one asks for as well count
    #[arg(long, conflicts_with = "fresh")]
    resume: bool,
    /// Print what would be run, with the command for each, and run nothing
    #[arg(long)]
    dry_run: bool,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let mut plan = Plan::load(&args.plan).map_err(usage)?;
    let pins = Pins::load(&ctx.repo).map_err(crate::build::BuildError::into_cli)?;
    let reference = pins.kernel(None).map_err(crate::build::BuildError::into_cli)?.name.clone();
    for own in own(&args)? {
        plan.add(&own, &reference).map_err(Error::usage)?;
    }
    let part = plan.only(&args.group).map_err(Error::usage)?;
    let cells = expand(&part, &ctx.repo.join("storm/scenarios"), &reference).map_err(usage)?;
    if args.dry_run {
        print!("{}", show::plan(&plan, &cells, args.shard));
        return Ok(Outcome::Pass);
    }
    let out = args.out.unwrap_or_else(|| ctx.repo.join("target/matrix").join(&plan.name));
    let out = std::path::absolute(out)?;
    if !args.merge.is_empty() {
        return merge(&args.merge, &plan, &cells, &out, ctx);
    }
    let state = State::open(&out, &plan, args.shard, args.fresh, args.resume)?;
    let quiet = ctx.quietly();
    let execution = Execution::new(&plan, &cells, args.shard, args.jobs, state, (ctx, &quiet))?;
    finish(execution.run()?, &plan, &cells, &out, ctx)
}

/// The columns that the options add.
fn own(args: &Args) -> Result<Vec<Own>, Error> {
    let there = |path: &Path| {
        std::fs::canonicalize(path)
            .map_err(|error| Error::usage(format!("cannot use {}: {error}", path.display())))
    };
    if args.on.is_some() && args.patch.is_empty() && args.mbox.is_empty() {
        return Err(Error::usage("--on says what a --patch or --mbox is on top of, and there is none"));
    }
    let on = |own: Own| Own { on: args.on.clone(), ..own };
    let mut all = Vec::new();
    for file in &args.patch {
        all.push(on(Own::of_patch(&there(file)?)));
    }
    for file in &args.mbox {
        all.push(on(Own::of_mailbox(&there(file)?)));
    }
    for dir in &args.tree {
        all.push(Own::of_tree(&there(dir)?));
    }
    Ok(all)
}

fn usage(error: plan::Error) -> Error {
    Error::usage(error.to_string())
}

/// `--merge`.
fn merge(
    files: &[PathBuf],
    plan: &Plan,
    cells: &[CellSpec],
    out: &Path,
    ctx: &Context,
) -> Result<Outcome, Error> {
    let target = out.join(state::RECORDS);
    let mut union = Union::default();
    let mut sources: Vec<PathBuf> = files.to_vec();
    if target.is_file() {
        sources.push(target.clone());
    }
    for source in &sources {
        let file = if source.is_dir() { source.join(state::RECORDS) } else { source.clone() };
        let loaded = records::load(&file)?;
        if loaded.torn > 0 {
            ctx.note(format_args!("{}: its last line is torn and was left out", file.display()));
        }
        let from = std::path::absolute(&file)?;
        let base = from.parent().unwrap_or(Path::new("/"));
        union.extend(loaded.records.into_iter().map(|mut record| {
            record.folder = record.folder.map(|folder| records::file::relative(&base.join(folder), &target));
            record
        }));
    }
    records::file::write(&target, union.records())?;
    ctx.note(format_args!("{} runs in {}", union.records().count(), target.display()));
    finish(union, plan, cells, out, ctx)
}

/// Sums up, and says how it ended.
fn finish(
    union: Union,
    plan: &Plan,
    cells: &[CellSpec],
    out: &Path,
    ctx: &Context,
) -> Result<Outcome, Error> {
    let conflicts = union.conflicts();
    let records = union.into_records();
    print!("{}", show::summary(&records, cells));
    let findings = records::findings(&records);
    record::write_json(&out.join(state::FINDINGS), &findings)?;
    for finding in &findings {
        println!("{}", show::finding(finding, out));
    }
    ctx.note(format_args!("records: {}", out.join(state::RECORDS).display()));
    let mut trouble: Vec<String> = conflicts.iter().map(ToString::to_string).collect();
    let errors = show::harness_errors(&records);
    if errors > 0 {
        trouble.push(format!("{errors} runs of plan {} failed in the bench itself", plan.name));
    }
    if !trouble.is_empty() {
        return Err(Error::harness(trouble.join("; ")));
    }
    let all = records.iter().all(|record| record.as_expected);
    Ok(if all { Outcome::Pass } else { Outcome::Problem })
}

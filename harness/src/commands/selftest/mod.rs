//! `hmmstorm selftest`: brings guests into known states and checks that the judge calls each by its name. With another
//! table it is a regression test of kernels: storm/known-bugs.toml.
//!
//! Every case is one `hmmstorm storm`, run as a user would: so its exit code and its files are tested too.

mod cases;
mod load;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::cli::{Context, Error, Outcome};
use crate::judge::record::{self, Record};
use crate::judge::verdict::Verdict;
use crate::vm::children::Child;
use cases::{Case, Table};
use load::HostLoad;

/// Machine of every case that names no other.
const PROFILE: &str = "selftest";
/// Longest that a case may take, its image's build included.
const LIMIT: Duration = Duration::from_secs(3600);
/// How often a running case is looked at for an interrupt.
const LOOK: Duration = Duration::from_millis(200);

/// Options of `hmmstorm selftest`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Cases to run [default: all]
    cases: Vec<String>,
    /// Table of cases [default: storm/selftest.toml]
    #[arg(long, value_name = "FILE")]
    table: Option<PathBuf>,
    /// Column of the table: the same cases under other options, as another kernel [default: the first, which needs none]
    #[arg(long, value_name = "NAME")]
    column: Option<String>,
    /// List the cases and run none
    #[arg(long)]
    list: bool,
    /// Write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Folder that gets a folder for each case [default: a new one in the cache]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Options of `hmmstorm storm` for every case, e.g. -- --variant wait-on-locked
    #[arg(last = true, value_name = "OPTION")]
    storm: Vec<OsString>,
}

/// How one case came out.
#[derive(Debug, serde::Serialize)]
struct Result {
    name: String,
    expected: Verdict,
    /// None if there is no record.
    verdict: Option<Verdict>,
    /// What is not as it should be; empty for a right verdict.
    wrong: Vec<String>,
    /// The judge's own words.
    reason: String,
    /// Host seconds.
    seconds: f64,
    folder: PathBuf,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> std::result::Result<Outcome, Error> {
    let file = args.table.unwrap_or_else(|| ctx.repo.join("storm/selftest.toml"));
    let Table { cases: all, options } = cases::load(&file, args.column.as_deref()).map_err(Error::usage)?;
    let width = all.iter().map(|case| case.name.len()).max().unwrap_or(0);
    if args.list {
        for case in &all {
            println!("{:width$}  {:13}  {}", case.name, case.expect, case.summary);
        }
        return Ok(Outcome::Pass);
    }
    let chosen = cases::choose(&all, &args.cases).map_err(Error::usage)?;
    let out = folder(args.out, ctx)?;
    ctx.note(format_args!("{} cases to {}", chosen.len(), out.display()));
    let storm: Vec<OsString> = options.into_iter().map(OsString::from).chain(args.storm).collect();
    let mut results: Vec<Result> = Vec::new();
    for case in &chosen {
        let result = examine(case, &storm, &out.join(&case.name), ctx)?;
        let mark = if result.wrong.is_empty() { "ok   " } else { "WRONG" };
        let verdict = result.verdict.map_or("-", Verdict::name);
        println!("{mark}  {:width$}  {verdict:13} {:6.1} s  {}", case.name, result.seconds, case.summary);
        for wrong in &result.wrong {
            println!("       {wrong}");
        }
        if !result.wrong.is_empty() {
            println!("       evidence: {}", result.folder.display());
        }
        results.push(result);
        if let Some(file) = &args.json {
            record::write_json(file, &results)?;
        }
    }
    let right = results.iter().filter(|result| result.wrong.is_empty()).count();
    println!("{right} of {} verdicts are right", results.len());
    Ok(if right == results.len() { Outcome::Pass } else { Outcome::Problem })
}

/// The folder of all cases.
fn folder(asked: Option<PathBuf>, ctx: &Context) -> std::result::Result<PathBuf, Error> {
    let dir = asked.unwrap_or_else(|| {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        ctx.cache.join("runs").join(format!("{seconds}-{}-selftest", std::process::id()))
    });
    Ok(std::path::absolute(dir)?)
}

/// Runs one case and looks at what it left.
fn examine(
    case: &Case,
    more: &[OsString],
    folder: &Path,
    ctx: &Context,
) -> std::result::Result<Result, Error> {
    // Results of an earlier run are no evidence.
    if folder.exists() {
        std::fs::remove_dir_all(folder)?;
    }
    std::fs::create_dir_all(folder)?;
    let json = folder.join("records.json");
    let log = folder.join("storm.log");
    let output = std::fs::File::create(&log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("--cache").arg(&ctx.cache).arg("storm").args(&case.run);
    if !case.run.iter().any(|argument| argument == "--profile") {
        command.args(["--profile", PROFILE]);
    }
    command.args(["--expect", case.expect.name()]).arg("--json").arg(&json).arg("--out").arg(folder);
    command.args(more).current_dir(&ctx.repo).stdin(Stdio::null());
    command.stdout(output.try_clone()?).stderr(output);
    let load = case.host_load.map(|loops| HostLoad::start(loops, LIMIT)).transpose()?;
    let began = Instant::now();
    let mut child = Child::spawn("hmmstorm storm", command, &log)?;
    let status = loop {
        if ctx.interrupt.is_raised() {
            return Err(Error::Interrupted);
        }
        if let Some(status) = child.wait_until(Instant::now() + LOOK)? {
            break status;
        }
        if began.elapsed() >= LIMIT {
            return Err(Error::harness(format!("case {} does not end; see {}", case.name, log.display())));
        }
    };
    drop(load);
    let record = read(&json);
    let (verdict, reason) = match &record {
        Ok(record) => (Some(record.judgement.verdict), record.judgement.reason.clone()),
        Err(_) => (None, String::new()),
    };
    let mut wrong = match &record {
        Ok(record) => case.compare(record),
        Err(why) => vec![format!("no record: {why}; {}", log.display())],
    };
    // `--expect` names one verdict; one of the others that will do is unexpected to the command.
    let right = i32::from(verdict != Some(case.expect));
    if status.code() != Some(right) && wrong.is_empty() {
        wrong.push(format!("the verdict is right, but the command ended with {status}"));
    }
    Ok(Result {
        name: case.name.clone(),
        expected: case.expect,
        verdict,
        wrong,
        reason,
        seconds: began.elapsed().as_secs_f64(),
        folder: folder.to_path_buf(),
    })
}

/// The only record of `hmmstorm storm --json`.
fn read(json: &Path) -> std::result::Result<Record, String> {
    #[derive(serde::Deserialize)]
    struct File {
        runs: Vec<Record>,
    }
    let text = std::fs::read_to_string(json).map_err(|error| error.to_string())?;
    let mut file: File = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    file.runs.pop().ok_or_else(|| "no run".to_owned())
}

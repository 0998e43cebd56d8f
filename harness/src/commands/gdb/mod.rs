//! `hmmstorm gdb`: the guest under gdb, with the symbols of kernel and modules.
//!
//! The guest waits for gdb before its first instruction, its watchdogs are off, and `script.py` loads a module's
//! symbols as the kernel loads the module. QEMU's stub listens on a Unix socket; nothing listens on TCP.

mod symbols;

use std::collections::BTreeMap;
use std::fs;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::prepare::{Prepared, prepare};
use crate::build::SOURCE_PREFIX;
use crate::cli::{Accel, Context, Error, ImageArgs, MachineArgs, Outcome};
use crate::vm::children::Child;
use crate::vm::{Guest, Machine, Occurrence, RunFolder};
use symbols::Function;

const SCRIPT: &str = include_str!("script.py");
/// More functions than this for one `--break` is a name that says nothing.
const MOST_BREAKS: usize = 16;
/// What the guest does in batch mode unless told otherwise: it goes down every road of the driver once.
const BATCH_SCENARIO: &str = "smoke";
/// Time for gdb to end after the guest has.
const END: Duration = Duration::from_secs(10);

/// Options of `hmmstorm gdb`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Stop in this function of kernel or modules; a Rust function by part of its readable name
    #[arg(long = "break", value_name = "SYMBOL")]
    breaks: Vec<String>,
    /// Ask nothing: stop there once, print the backtrace, end. Exit code 1 if it is not reached
    #[arg(long, requires = "breaks")]
    batch: bool,
    /// With --batch: give up after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "batch")]
    limit: u32,
    /// Run this scenario in place of a shell (`hmmstorm list scenarios`) [default with --batch: smoke]
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// Seed of the scenario
    #[arg(long, value_name = "N", default_value_t = 1, requires = "scenario")]
    seed: u64,
    /// Parameter of the scenario
    #[arg(long = "param", value_name = "NAME=VALUE", requires = "scenario", value_parser = parameter)]
    parameters: Vec<(String, String)>,
    /// gdb of your own
    #[arg(long = "gdb", value_name = "PROGRAM", env = "HMMSTORM_GDB_PROGRAM", default_value = "gdb")]
    program: PathBuf,
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

fn parameter(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write NAME=VALUE")?;
    Ok((name.into(), value.into()))
}

/// What `script.py` reads.
#[derive(Debug, Serialize)]
struct Config<'a> {
    socket: PathBuf,
    modules: &'a BTreeMap<String, PathBuf>,
    functions: PathBuf,
    breaks: Vec<Function>,
    result: Option<PathBuf>,
}

/// What `script.py` writes in batch mode.
#[derive(Debug, Deserialize)]
struct BatchResult {
    reached: bool,
    why: String,
    #[serde(default)]
    backtrace: String,
}

/// Runs the command.
pub fn run(mut args: Args, ctx: &Context) -> Result<Outcome, Error> {
    if args.batch && args.scenario.is_none() {
        // A shell that nobody types into reaches nothing.
        args.scenario = Some(BATCH_SCENARIO.into());
    }
    if args.machine.accel == Accel::Auto {
        // Any number of breakpoints, at any time; under KVM there are four before the kernel is in memory.
        args.machine.accel = Accel::Tcg;
    }
    let guest = match &args.scenario {
        Some(scenario) => Guest::Run {
            scenario: scenario.clone(),
            seed: args.seed,
            parameters: args.parameters.iter().cloned().collect(),
        },
        None => Guest::Shell,
    };
    let mut prepared = prepare(&args.image, &args.machine, guest, ctx)?;
    prepared.boot.spec.gdb = true;
    if args.machine.dry_run {
        print!("{}", prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let functions = all_functions(&prepared)?;
    let breaks = resolve(&functions, &args.breaks)?;
    let folder = prepared.folder("gdb", ctx)?;
    let files = Files::write(&folder, &functions)?;
    let machine = Machine::boot(&prepared.boot, folder.clone(), &ctx.interrupt)?;
    let config = Config {
        socket: machine.sockets().gdb(),
        modules: &prepared.image.modules,
        functions: files.functions.clone(),
        breaks,
        result: args.batch.then(|| files.result.clone()),
    };
    fs::write(&files.config, serde_json::to_vec_pretty(&config)?)?;
    let vmlinux = std::path::absolute(&prepared.image.vmlinux)?;
    let mut command = Command::new(&args.program);
    command.args(["-q", "-nx"]).env("HMMSTORM_GDB", &files.config);
    match kernel_scripts(&vmlinux) {
        // gdb loads it with vmlinux, from a folder that it trusts.
        Some(script) => {
            command.arg("-iex").arg(format!("add-auto-load-safe-path {}", script.display()));
        }
        None => ctx.note("the kernel's own gdb scripts (lx-…) are not beside vmlinux; going on without them"),
    }
    // lx-symbols looks for modules in the current folder (and, in 6.19, fails when it is given one).
    if let Some(dir) = prepared.image.modules.values().find_map(|m| m.parent()) {
        command.current_dir(dir);
    }
    // The driver's debug information says a prefix in place of the checkout it was built from.
    command.arg("-iex").arg(format!("set substitute-path {SOURCE_PREFIX} {}", ctx.repo.display()));
    command.arg(&vmlinux).arg("-x").arg(&files.script);
    if args.batch {
        batch(&args, command, machine, &files, ctx)
    } else {
        ctx.note(format_args!("the guest's console is {}", folder.console().display()));
        interactive(command, machine, ctx)
    }
}

/// Every function that can be stopped in.
fn all_functions(prepared: &Prepared) -> Result<Vec<Function>, Error> {
    let mut functions = symbols::functions(&prepared.image.vmlinux, None)?;
    for (name, path) in &prepared.image.modules {
        functions.extend(symbols::functions(path, Some(name))?);
    }
    Ok(functions)
}

fn resolve(functions: &[Function], wishes: &[String]) -> Result<Vec<Function>, Error> {
    let mut breaks = Vec::new();
    for wish in wishes {
        let found = symbols::find(functions, wish);
        if found.is_empty() {
            return Err(Error::usage(format!(
                "no function of the kernel or its modules has '{wish}' in its name"
            )));
        }
        if found.len() > MOST_BREAKS {
            let some: Vec<_> = found.iter().take(MOST_BREAKS).map(|f| format!("  {}", f.name)).collect();
            let text = format!("{} functions match '{wish}', among them\n{}", found.len(), some.join("\n"));
            return Err(Error::usage(text));
        }
        breaks.extend(found);
    }
    Ok(breaks)
}

/// `vmlinux-gdb.py`, where a build leaves it.
fn kernel_scripts(vmlinux: &Path) -> Option<PathBuf> {
    let script = vmlinux.with_file_name("vmlinux-gdb.py");
    script.exists().then_some(script)
}

/// gdb's files in the run folder.
#[derive(Debug)]
struct Files {
    script: PathBuf,
    config: PathBuf,
    functions: PathBuf,
    result: PathBuf,
    log: PathBuf,
}

impl Files {
    fn write(folder: &RunFolder, functions: &[Function]) -> Result<Self, Error> {
        let at = |name: &str| folder.dir().join(name);
        let files = Self {
            script: at("gdb.py"),
            config: at("gdb.json"),
            functions: at("gdb-functions.json"),
            result: at("gdb-result.json"),
            log: at("gdb.log"),
        };
        fs::write(&files.script, SCRIPT)?;
        fs::write(&files.functions, serde_json::to_vec(functions)?)?;
        if let Err(e) = fs::remove_file(&files.result)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(e.into());
        }
        Ok(files)
    }
}

/// gdb has the terminal; Ctrl-C is its.
fn interactive(command: Command, mut machine: Machine, ctx: &Context) -> Result<Outcome, Error> {
    let keyboard = ctx.interrupt.lend_keyboard();
    let mut gdb = Child::spawn_in_foreground("gdb", command, Path::new("the terminal"))?;
    loop {
        let occurrence = machine.next_or(gdb.as_fd(), Instant::now() + Duration::from_secs(3600));
        if let Some(status) = gdb.ended()? {
            drop(keyboard);
            machine.stop();
            return if status.success() {
                Ok(Outcome::Pass)
            } else {
                Err(Error::harness(format!("gdb ended with {status}")))
            };
        }
        match occurrence? {
            // gdb says so itself, and may have more questions to answer.
            Occurrence::Ended(_) => {
                while gdb.wait_until(Instant::now() + Duration::from_secs(3600))?.is_none() {}
            }
            _ => continue,
        }
    }
}

/// gdb stops once, or the limit passes.
fn batch(
    args: &Args,
    mut command: Command,
    mut machine: Machine,
    files: &Files,
    ctx: &Context,
) -> Result<Outcome, Error> {
    let log = File::create(&files.log)?;
    command.arg("-batch").stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    let wishes = args.breaks.join(", ");
    ctx.note(format_args!("waiting for {wishes}; gdb's log is {}", files.log.display()));
    let limit = Duration::from_secs(args.limit.into());
    let deadline = Instant::now() + limit;
    let mut gdb = Child::spawn("gdb", command, &files.log)?;
    let mut guest_ended = false;
    let status = loop {
        if let Some(status) = gdb.ended()? {
            break status;
        }
        if Instant::now() >= deadline {
            println!(
                "{wishes}: not reached within {} s; gdb's log is {}",
                limit.as_secs(),
                files.log.display()
            );
            return Ok(Outcome::Problem);
        }
        if guest_ended {
            gdb.wait_until(deadline.min(Instant::now() + END))?;
            if gdb.ended()?.is_none() {
                return Err(Error::harness(format!(
                    "gdb does not end though the guest has; its log is {}",
                    files.log.display()
                )));
            }
        } else if let Occurrence::Ended(_) = machine.next_or(gdb.as_fd(), deadline)? {
            guest_ended = true;
        }
    };
    let result = match fs::read(&files.result) {
        Ok(bytes) => serde_json::from_slice::<BatchResult>(&bytes)?,
        Err(_) => {
            let why = format!("gdb ended without a result ({status}); its log is {}", files.log.display());
            return Err(Error::harness(why));
        }
    };
    machine.stop();
    if result.reached {
        print!("{}", result.backtrace);
        Ok(Outcome::Pass)
    } else {
        println!("{wishes}: not reached: {}; gdb's log is {}", result.why, files.log.display());
        Ok(Outcome::Problem)
    }
}

//! `hmmstorm ctl`: asks the GPUs of a machine that runs, and changes their fault plan.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Subcommand;
use hmmstorm_abi::wire::control::{Chaos, GpuStats, Reply, Request};

use crate::cli::{Context, Error, Outcome};
use crate::vm::control::Control;
use crate::vm::poll;
use crate::vm::sockets::{Running, running};

/// Options of `hmmstorm ctl`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folder of the machine [default: the one that runs, if it is the only one]
    #[arg(long, value_name = "DIR", conflicts_with = "socket")]
    run: Option<PathBuf>,
    /// Control socket of a device that was started by hand
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List the machines that run
    List,
    /// Print the counters of every GPU
    Stats {
        /// Print them again every so many seconds, with what was added, until Ctrl-C or the machine's end
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              value_parser = clap::value_parser!(u64).range(1..))]
        watch: Option<u64>,
        /// Print JSON: an array with one object a GPU; with --watch, one array a line
        #[arg(long)]
        json: bool,
    },
    /// Replace the fault plan; without a plan, end all faults
    Chaos {
        /// This GPU's alone
        #[arg(long, value_name = "N")]
        gpu: Option<u8>,
        /// The plan, e.g. seed=7,fail-copy-every=100; docs/hardware.md lists the keys
        #[arg(value_name = "KEY=VALUE,…", default_value = "", hide_default_value = true)]
        plan: Chaos,
    },
    /// End the device cleanly, which is a surprise removal of all its GPUs
    Shutdown,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    if let What::List = args.what {
        for Running { run, control } in running() {
            println!("{}  {}", run.display(), control.display());
        }
        return Ok(Outcome::Pass);
    }
    let path = match args.socket {
        Some(path) => path,
        None => choose(args.run.as_deref(), running())?.control,
    };
    let mut device = Device::connect(path)?;
    match args.what {
        What::List => {}
        What::Stats { watch: None, json } => {
            let now = device.stats()?;
            println!("{}", if json { serde_json::to_string_pretty(&now)? } else { table(&now, None)? });
        }
        What::Stats { watch: Some(seconds), json } => watch(&mut device, seconds, json, ctx)?,
        What::Chaos { gpu, plan } => device.order(&Request::Chaos { gpu, plan })?,
        What::Shutdown => device.order(&Request::Shutdown)?,
    }
    Ok(Outcome::Pass)
}

/// The machine with this run folder, or the only one.
fn choose(run: Option<&Path>, mut running: Vec<Running>) -> Result<Running, Error> {
    let list = |running: &[Running]| -> String {
        running.iter().map(|machine| format!("\n  --run {}", machine.run.display())).collect()
    };
    if let Some(run) = run {
        let same = |machine: &Running| {
            std::fs::canonicalize(run)
                .is_ok_and(|run| std::fs::canonicalize(&machine.run).is_ok_and(|of| of == run))
        };
        return match running.iter().position(same) {
            Some(at) => Ok(running.swap_remove(at)),
            None if running.is_empty() => {
                Err(Error::usage(format!("no machine runs in {}, nor elsewhere", run.display())))
            }
            None => Err(Error::usage(format!(
                "no machine runs in {}; there are:{}",
                run.display(),
                list(&running)
            ))),
        };
    }
    match running.len() {
        0 => Err(Error::usage(
            "no machine runs; `hmmstorm run` starts one, --socket names a device started by hand",
        )),
        1 => Ok(running.remove(0)),
        _ => Err(Error::usage(format!("several machines run; choose one:{}", list(&running)))),
    }
}

/// Prints what changes until the user or the machine ends it.
fn watch(device: &mut Device, seconds: u64, json: bool, ctx: &Context) -> Result<(), Error> {
    let period = Duration::from_secs(seconds);
    let mut next = Instant::now();
    let mut before: Option<Vec<GpuStats>> = None;
    loop {
        let now = match device.stats() {
            // The machine's end is the end of the watch.
            Err(_) if before.is_some() => return Ok(()),
            now => now?,
        };
        if json {
            println!("{}", serde_json::to_string(&now)?);
        } else {
            // Clear the screen and begin at its top, where there is one.
            let clear = if io::stdout().is_terminal() { "\x1b[2J\x1b[H" } else { "" };
            println!("{clear}{}", table(&now, before.as_deref())?);
        }
        before = Some(now);
        next += period;
        let [interrupted] = poll::readable([Some(ctx.interrupt.as_fd())], Some(next))?;
        if interrupted {
            return Ok(());
        }
    }
}

/// Counters as rows and GPUs as columns; with `before`, what was added since then beside each.
fn table(now: &[GpuStats], before: Option<&[GpuStats]>) -> Result<String, Error> {
    let counters = |gpu: &GpuStats| -> Result<BTreeMap<String, u64>, Error> {
        Ok(serde_json::from_value(serde_json::to_value(gpu)?)?)
    };
    let columns = now.iter().map(counters).collect::<Result<Vec<_>, _>>()?;
    let earlier = before.unwrap_or_default().iter().map(counters).collect::<Result<Vec<_>, _>>()?;
    let mut text = format!("{:18}", "");
    (0..columns.len()).for_each(|gpu| text.push_str(&format!(" {:>24}", format!("gpu {gpu}"))));
    for name in columns.first().into_iter().flat_map(|column| column.keys()) {
        text.push_str(&format!("\n{name:18}"));
        for (gpu, column) in columns.iter().enumerate() {
            let value = column.get(name).copied().unwrap_or_default();
            let then = earlier.get(gpu).and_then(|column| column.get(name)).copied().unwrap_or(value);
            let cell = match i128::from(value) - i128::from(then) {
                0 => format!("{value}"),
                added => format!("{value} ({added:+})"),
            };
            text.push_str(&format!(" {cell:>24}"));
        }
    }
    Ok(text)
}

/// A device, with its socket's path for the messages.
struct Device {
    path: PathBuf,
    control: Control,
}

impl Device {
    fn connect(path: PathBuf) -> Result<Self, Error> {
        match Control::connect(&path) {
            Ok(control) => Ok(Self { path, control }),
            Err(error) => Err(Error::harness(format!("no device answers on {}: {error}", path.display()))),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, Error> {
        let failed = |error| Error::harness(format!("the device on {}: {error}", self.path.display()));
        match self.control.ask(request).map_err(failed)? {
            Reply::Error { message } => Err(Error::usage(format!("the device refuses: {message}"))),
            reply => Ok(reply),
        }
    }

    fn stats(&mut self) -> Result<Vec<GpuStats>, Error> {
        match self.ask(&Request::Stats)? {
            Reply::Stats { gpus } => Ok(gpus),
            other => Err(Error::harness(format!("the device answers {other:?} to a question for counters"))),
        }
    }

    fn order(&mut self, request: &Request) -> Result<(), Error> {
        match self.ask(request)? {
            Reply::Ok => Ok(()),
            other => Err(Error::harness(format!("the device answers {other:?} to an order"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(run: &Path) -> Running {
        Running { run: run.into(), control: run.join("control.sock") }
    }

    #[test]
    fn one_machine_is_chosen_by_itself_and_several_are_named() {
        let dirs = [tempfile::tempdir().expect("folder"), tempfile::tempdir().expect("folder")];
        let [a, b] = dirs.each_ref().map(|dir| machine(dir.path()));
        assert_eq!(choose(None, vec![a.clone()]).expect("the only one"), a);
        assert_eq!(choose(Some(&b.run.join(".")), vec![a.clone(), b.clone()]).expect("named"), b);
        let says = |error: Error| (error.exit_code(), error.report());
        assert!(
            matches!(says(choose(None, vec![]).expect_err("none")), (2, text) if text.contains("no machine runs"))
        );
        let (code, text) = says(choose(None, vec![a.clone(), b.clone()]).expect_err("two"));
        assert!(
            code == 2 && text.contains(&*a.run.to_string_lossy()) && text.contains(&*b.run.to_string_lossy())
        );
        let (_, text) = says(choose(Some(&a.run), vec![b.clone()]).expect_err("another"));
        assert!(text.contains(&*b.run.to_string_lossy()));
    }

    #[test]
    fn counters_stand_in_rows_with_what_was_added() {
        let before = GpuStats { completions: 5, queued: 3, ..GpuStats::default() };
        let now = GpuStats { completions: 12, queued: 1, ..before };
        let text = table(&[now, before], Some(&[before, before])).expect("a table");
        let row = |name: &str| text.lines().find(|line| line.starts_with(name)).expect("a row").to_owned();
        assert!(row("completions").contains("12 (+7)") && row("completions").ends_with(" 5"));
        assert!(row("queued").contains("1 (-2)"));
        let widths: Vec<usize> = text.lines().map(str::len).collect();
        assert!(widths.iter().all(|width| *width == widths[0]), "{text}");
    }
}

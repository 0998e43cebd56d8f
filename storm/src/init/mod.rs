//! PID 1: brings the guest up, does what the kernel command line asks for, and powers the machine off.
//!
//! Whatever goes wrong is told to the host (and to the kernel's log) and ends in power-off: a guest that cannot work must
//! not look like one that hangs.

pub(crate) mod modules;
mod mounts;
mod port;
mod shell;

use std::fs;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Duration;

use hmmstorm_abi::wire::event::Event;
use rustix::system::{RebootCommand, reboot};
use thiserror::Error;

use crate::clock::poll;
use crate::cmdline::{CmdlineError, Config, Mode};
use crate::gpu;
use crate::machine::Machine;
use crate::scenario::{ScenarioError, prepare};
use crate::sink::Sink;
use crate::supervisor::{SuperviseError, supervise};

/// Guest time that the driver gets to make its nodes.
const NODES_LIMIT: Duration = Duration::from_secs(30);
/// Guest time that the kernel gets to settle on a clock source.
const CLOCK_LIMIT: Duration = Duration::from_secs(5);

/// Why the guest cannot work.
#[derive(Debug, Error)]
enum InitError {
    #[error(transparent)]
    Mount(#[from] mounts::MountError),
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    #[error("cannot read {path}: {source}")]
    Read { path: &'static str, source: io::Error },
    #[error(transparent)]
    Port(#[from] port::PortError),
    #[error(transparent)]
    Module(#[from] modules::ModuleError),
    #[error(
        "{found} of {wanted} GPU nodes ({}...) are there {} s after the modules {modules} were loaded. Does the machine \
         have the GPUs, and did the driver bind them? The console has the driver's messages",
        gpu::node(0),
        NODES_LIMIT.as_secs()
    )]
    Nodes { found: usize, wanted: usize, modules: String },
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    #[error(transparent)]
    Supervise(#[from] SuperviseError),
    #[error(transparent)]
    Shell(#[from] shell::ShellError),
    #[error("cannot write an event: {0}")]
    Emit(#[from] io::Error),
}

/// Runs PID 1; never returns.
pub(crate) fn run() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| log(&panic.to_string())));
    let mut sink = Sink::Nowhere;
    let failure = match catch_unwind(AssertUnwindSafe(|| work(&mut sink))) {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_panic) => Some("PID 1 panicked; the message is in the kernel's log".to_owned()),
    };
    if let Some(message) = failure {
        log(&message);
        tell(&sink, Event::Error { message });
    }
    tell(&sink, Event::Bye);
    rustix::fs::sync();
    // Neither returns when it works.
    let _refused = reboot(RebootCommand::PowerOff);
    let _refused = reboot(RebootCommand::Restart);
    // The kernel panics when PID 1 ends, which ends the machine too.
    ExitCode::FAILURE
}

/// Tells the host if it can be told.
fn tell(sink: &Sink, event: Event) {
    if let Err(error) = sink.emit(event) {
        log(&format!("cannot write an event: {error}"));
    }
}

/// One error line in the kernel's log, and so on the console.
fn log(message: &str) {
    let line = format!("<3>storm: {}\n", message.replace('\n', " | "));
    let written = fs::OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut log| log.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}

fn work(sink: &mut Sink) -> Result<(), InitError> {
    mounts::mount_all()?;
    let cmdline = read("/proc/cmdline")?;
    // The port first: what else goes wrong can be told there.
    let port = port::open();
    let config = match (Config::parse(&cmdline), port) {
        (config, Ok(port)) => {
            *sink = Sink::Port(port);
            config?
        }
        // A person's guest needs no port.
        (Ok(config), Err(_)) if config.mode == Mode::Shell => config,
        (_, Err(error)) => return Err(error.into()),
    };
    let machine = Machine::detect();
    sink.emit(Event::Hello {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: kernel(),
        cpus: machine.cpus as u32,
    })?;
    let modules = config
        .modules
        .iter()
        .map(|name| Ok((name.clone(), modules::load(name)?)))
        .collect::<Result<_, InitError>>()?;
    if poll(NODES_LIMIT, || (gpu::count() >= config.gpus).then_some(())).is_none() {
        let modules = config.modules.join(", ");
        return Err(InitError::Nodes { found: gpu::count(), wanted: config.gpus, modules });
    }
    sink.emit(Event::Bound { gpus: gpu::count() as u32, modules })?;
    match config.mode {
        Mode::Shell => Ok(shell::run(&kernel())?),
        Mode::Run => storm(&config, sink),
    }
}

fn storm(config: &Config, sink: &Sink) -> Result<(), InitError> {
    let Some(scenario) = &config.scenario else { return Ok(()) };
    let machine = Machine::detect();
    let overrides = config.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let prepared = prepare(scenario, None, overrides, machine)?;
    settle();
    // How it ended is told already.
    supervise(&prepared, config.seed, sink, config.heartbeat)?;
    Ok(())
}

/// Waits until the kernel has left its early clock source. It changes it with stop_machine(), which a CPU that hangs in
/// the kernel keeps from ending, and then every CPU stands: the hang under test would be hidden behind that.
fn settle() {
    const CURRENT: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let settled = || fs::read_to_string(CURRENT).is_ok_and(|name| name.trim() != "tsc-early").then_some(());
    if poll(CLOCK_LIMIT, settled).is_none() {
        log("the kernel keeps its early clock source; a storm may be seen as a hang of stop_machine()");
    }
}

fn read(path: &'static str) -> Result<String, InitError> {
    fs::read_to_string(path).map_err(|source| InitError::Read { path, source })
}

/// `uname -r`, `uname -v`.
fn kernel() -> String {
    let uname = rustix::system::uname();
    format!("{} {}", uname.release().to_string_lossy(), uname.version().to_string_lossy())
}

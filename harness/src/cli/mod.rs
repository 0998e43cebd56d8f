//! The command line: the tree of commands, global options, exit codes.

mod context;
mod error;
mod interrupt;
mod options;

pub use context::{Context, Verbosity};
pub use error::{Error, Outcome};
pub use interrupt::Interrupt;
pub use options::{Accel, ImageArgs, MachineArgs, Preempt};

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::commands;
use crate::vm::{accel, kvm};

/// A GPU-less test bench for Linux device-private memory.
#[derive(Debug, Parser)]
#[command(name = "hmmstorm", version, disable_help_subcommand = true, max_term_width = 110)]
#[command(
    after_help = "Exit codes: 0 pass, or the verdict that --expect names; 1 a problem was found; 2 usage; \
                        3 the bench itself failed, which says nothing about the kernel."
)]
pub struct Cli {
    /// Say only what was asked for, and errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Say more; twice for everything
    #[arg(long, short, global = true, action = clap::ArgAction::Count, conflicts_with = "quiet")]
    verbose: u8,
    /// Folder for all that is fetched and built [default: $XDG_CACHE_HOME/hmmstorm or ~/.cache/hmmstorm]
    #[arg(long, global = true, value_name = "DIR", env = "HMMSTORM_CACHE")]
    cache: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this host has and lacks, and the command that mends it
    Doctor(commands::doctor::Args),
    /// Fetch and verify everything; afterwards nothing needs a network
    Setup(commands::setup::Args),
    /// Build kernel, driver, device and guest, and print where the image is
    Build(commands::build::Args),
    /// Boot the guest, GPUs bound, and give a shell in it
    Run(commands::run::Args),
    /// Storm a kernel and judge what happens
    Storm(commands::storm::Args),
    /// Run the kernel's own hmm-tests, unmodified, and report KTAP
    Conformance(commands::conformance::Args),
    /// Run a plan of many cells and seeds, and take up what was interrupted
    Matrix(commands::matrix::Args),
    /// Bring guests into known states, and check that each gets its right verdict
    Selftest(commands::selftest::Args),
    /// Run what a capsule holds again
    Replay(commands::replay::Args),
    /// Make a capsule smaller while its finding stays
    Minimise(commands::minimise::Args),
    /// Draw up a report of runs: a page, a mail, or for other tools
    Report(commands::report::Args),
    /// Make a timeline of a run, for ui.perfetto.dev
    Trace(commands::trace::Args),
    /// Watch what runs on this host: rates of device and storm
    Top(commands::top::Args),
    /// Measure hsgpu against the kernel's own test_hmm, in the same boot, in turn
    Bench(commands::bench::Args),
    /// Boot the guest under gdb, kernel and driver symbols loaded
    Gdb(commands::gdb::Args),
    /// Ask the GPUs of a machine that runs, or change their fault plan
    Ctl(commands::ctl::Args),
    /// List what there is to choose from
    List(commands::list::Args),
    /// Run 64-bit code in a KVM guest: exit code 0 if it works
    #[command(name = accel::PROBE_COMMAND, hide = true)]
    KvmProbe,
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse(); // exits with 2, and says why, on a wrong command line
    match run(cli) {
        Ok(Outcome::Pass) => ExitCode::SUCCESS,
        Ok(Outcome::Problem) => ExitCode::from(1),
        Ok(Outcome::Skip) => ExitCode::from(125),
        Err(error) => {
            eprint!("{}", error.report());
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: Cli) -> Result<Outcome, Error> {
    let verbosity = match (cli.quiet, cli.verbose) {
        (true, _) => Verbosity::Quiet,
        (false, 0) => Verbosity::Normal,
        (false, _) => Verbosity::Verbose,
    };
    if matches!(cli.command, Command::KvmProbe) {
        return Ok(kvm_probe());
    }
    let ctx = Context::new(verbosity, cli.cache)?;
    let result = dispatch(cli.command, &ctx);
    match result {
        // What breaks when everything is being ended is of no interest.
        Err(error @ Error::Harness(_)) if ctx.interrupt.is_raised() => {
            ctx.detail(error.report());
            Err(Error::Interrupted)
        }
        result => result,
    }
}

/// For [`accel::prove`], which reads the exit code and the line.
fn kvm_probe() -> Outcome {
    match kvm::prove() {
        Ok(()) => {
            println!("64-bit guest code ran");
            Outcome::Pass
        }
        Err(error) => {
            println!("{error}");
            Outcome::Problem
        }
    }
}

fn dispatch(command: Command, ctx: &Context) -> Result<Outcome, Error> {
    match command {
        Command::Doctor(args) => commands::doctor::run(args, ctx),
        Command::Setup(args) => commands::setup::run(args, ctx),
        Command::Build(args) => commands::build::run(args, ctx),
        Command::Run(args) => commands::run::run(args, ctx),
        Command::Storm(args) => commands::storm::run(args, ctx),
        Command::Conformance(args) => commands::conformance::run(args, ctx),
        Command::Matrix(args) => commands::matrix::run(args, ctx),
        Command::Selftest(args) => commands::selftest::run(args, ctx),
        Command::Replay(args) => commands::replay::run(args, ctx),
        Command::Minimise(args) => commands::minimise::run(args, ctx),
        Command::Report(args) => commands::report::run(args, ctx),
        Command::Trace(args) => commands::trace::run(args, ctx),
        Command::Top(args) => commands::top::run(args, ctx),
        Command::Bench(args) => commands::bench::run(args, ctx),
        Command::Gdb(args) => commands::gdb::run(args, ctx),
        Command::Ctl(args) => commands::ctl::run(args, ctx),
        Command::List(args) => commands::list::run(args, ctx),
        Command::KvmProbe => Ok(kvm_probe()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    /// clap checks its own tree only when asked: doubled names, defaults that do not parse.
    #[test]
    fn command_tree_is_sound() {
        super::Cli::command().debug_assert();
    }
}

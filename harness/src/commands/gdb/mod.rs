//! `hmmstorm gdb`.

use crate::cli::{Context, Error, Outcome};

/// Options of `hmmstorm gdb`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: Args, _ctx: &Context) -> Result<Outcome, Error> {
    Err(Error::harness("'gdb' is not in this build"))
}

//! `hmmstorm build`.

use crate::cli::{Context, Error, Outcome};

/// Options of `hmmstorm build`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_args: Args, _ctx: &Context) -> Result<Outcome, Error> {
    Err(Error::harness("'build' is not in this build"))
}

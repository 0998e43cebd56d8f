//! `hmmstorm setup`: everything that later commands need, fetched and verified.

use std::path::PathBuf;

use crate::build::{BuildError, Builder};
use crate::cli::{Context, Error, Outcome};

/// Options of `hmmstorm setup`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kernel to fetch (`hmmstorm list kernels`) [default: the reference kernel]
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// The kernel's tarball, if you have it already; its checksum must be the pinned one
    #[arg(long, value_name = "FILE")]
    tarball: Option<PathBuf>,
}

/// Fetches and verifies; builds what does not depend on a kernel.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    setup(&args, ctx).map_err(BuildError::into_cli)?;
    ctx.note("everything is here; nothing needs a network from now on");
    Ok(Outcome::Pass)
}

fn setup(args: &Args, ctx: &Context) -> Result<(), BuildError> {
    Builder::new(ctx)?.setup(args.kernel.as_deref(), args.tarball.as_deref())
}

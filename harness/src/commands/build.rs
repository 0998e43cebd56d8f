//! `hmmstorm build`: an image, without booting it.

use std::path::PathBuf;

use crate::build::{BuildError, Builder};
use crate::cli::{Context, Error, ImageArgs, Outcome};

/// Options of `hmmstorm build`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,
    /// The kernel's tarball, if you have it already; its checksum must be the pinned one
    #[arg(long, value_name = "FILE", conflicts_with_all = ["tree", "image"])]
    tarball: Option<PathBuf>,
}

/// Builds what is not in the cache, and prints the path of its `image.json`.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let path = build(&args, ctx).map_err(BuildError::into_cli)?;
    println!("{}", path.display());
    Ok(Outcome::Pass)
}

fn build(args: &Args, ctx: &Context) -> Result<PathBuf, BuildError> {
    let builder = Builder::new(ctx)?;
    if args.image.image.is_some() {
        return Err(BuildError::Usage("--image names what is built already; this command builds".into()));
    }
    if let Some(file) = &args.tarball {
        builder.import_tarball(args.image.kernel.as_deref(), file)?;
    }
    builder.prepare(&(&args.image).into())
}

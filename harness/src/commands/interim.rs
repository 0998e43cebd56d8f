//! Stands in for the build half until it is there.
use crate::cli::{Context, Error, ImageArgs};
use std::ffi::OsString;
use std::path::PathBuf;
pub use crate::build::Image;
pub fn obtain(args: &ImageArgs, _ctx: &Context) -> Result<Image, Error> {
    let file = args.image.as_ref().ok_or_else(|| Error::usage("--image FILE"))?;
    Ok(serde_json::from_slice(&std::fs::read(file)?)?)
}
#[derive(Debug)]
pub struct Programs {
    pub device: PathBuf,
}
pub fn programs(_ctx: &Context) -> Result<Programs, Error> {
    Err(Error::usage("--device"))
}
pub mod toolchain {
    #[derive(Debug)]
    pub struct Qemu {
        pub program: super::PathBuf,
        pub leading_args: Vec<super::OsString>,
    }
    pub fn qemu(_ctx: &super::Context) -> Result<Qemu, super::Error> {
        Err(super::Error::usage("--qemu"))
    }
}

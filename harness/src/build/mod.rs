//! Gives a bootable image: fetches and verifies what is missing, builds what is not in the cache.
//!
//! [`Builder`] is the entry. What there is to build is data in `images/` ([`pins`]); every result has its place in the
//! [`cache`], under a key of all that it depends on.

mod archive;
pub mod binaries;
mod bundle;
pub mod cache;
mod drgn;
mod error;
mod hash;
pub mod host;
pub mod image;
mod initramfs;
mod kbuild;
mod kconfig;
mod kernel;
mod module;
mod overlay;
pub mod patches;
pub mod pins;
mod prepare;
mod process;
pub mod progress;
mod selftests;
mod source;
mod sources;
pub mod toolchain;
mod variants;

pub use cache::Cache;
pub use error::BuildError;
pub use image::{Image, Provenance};
pub use module::SOURCE_PREFIX;
pub use pins::Pins;
pub use prepare::{Builder, Request};
pub use progress::Progress;
pub use sources::MIRROR_VARIABLE;
pub use variants::Stack;

//! The one definition of everything that crosses a boundary in hmmstorm.
//!
//! * [`pci`], [`regs`], [`ring`]: the GPU as its driver sees it.
//! * [`uapi`]: the ioctls of `/dev/hmm_dmirror*`.
//! * [`wire`] (feature `wire`): the JSON that the guest's storm and the device's control socket speak.
//!
//! Everything under `spec/` is also compiled into the kernel module by `#[path]`, so it is `no_std`, free of
//! `unsafe`, and depends on nothing.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(feature = "wire")]
extern crate alloc;

mod spec;
pub use spec::*;

#[cfg(feature = "wire")]
pub mod wire;

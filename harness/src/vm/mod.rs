//! Runs a guest: profile, command lines, device process, QEMU, QMP, and what comes out of them.
//!
//! [`Spec`] says what to run, [`command`] turns it into command lines (and nothing else), [`Machine`] runs them in a
//! run folder and tells what happens, one [`Occurrence`] at a time.

pub mod accel;
pub mod children;
pub mod command;
pub mod control;
pub mod device;
mod error;
pub mod events;
pub mod folder;
pub mod freeze;
pub mod kvm;
pub mod machine;
pub mod poll;
pub mod profile;
pub mod qmp;
pub mod ram;
mod size;
pub mod sockets;
pub mod spec;
pub mod terminal;

pub use error::{End, Error};
pub use folder::RunFolder;
pub use machine::{Boot, Machine, Occurrence};
pub use profile::{Detectors, Profile};
pub use size::Size;
pub use spec::{Clock, Console, Engine, Guest, Spec};

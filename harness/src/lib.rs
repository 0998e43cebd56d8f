//! The bench around the GPU and the guest: fetch, build, boot, watch, judge.
//!
//! [`cli`] parses the command line and makes the [`commands::Context`]; each module of [`commands`] is one command.
//! [`build`] gives a bootable image, [`vm`] runs it, [`judge`] says what happened, [`records`] keeps it,
//! [`statistics`] says how sure all that is, [`matrix`] what to run of very much.

pub mod build;
pub mod capsule;
pub mod cli;
pub mod commands;
pub mod judge;
pub mod matrix;
pub mod records;
pub mod report;
pub mod statistics;
pub mod vm;

//! One module a command: `Args` is its part of the command line, `run` does it.

pub mod bench;
pub mod build;
pub mod conformance;
pub mod ctl;
pub mod doctor;
pub mod gdb;
pub mod list;
pub mod matrix;
pub mod minimise;
pub mod prepare;
pub mod replay;
pub mod report;
pub mod reproduce;
pub mod run;
pub mod selftest;
pub mod setup;
pub mod storm;
pub mod top;
pub mod trace;

//! The bench around the GPU and the guest: fetch, build, boot, watch, judge.

pub mod build;
pub mod cli;
pub mod commands;
pub mod judge;
pub mod vm;

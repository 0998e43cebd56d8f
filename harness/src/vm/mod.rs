//! Runs a guest: profile, command line, device process, QEMU, QMP, and what comes out of them.

mod size;

pub use size::Size;

//! The matrix: from a plan file to the runs that it asks for, and in which order. No process is started here; the command
//! (`commands/matrix.rs`) does what [`schedule`] says. `docs/matrix.md` describes plan files.

pub mod candidate;
mod expand;
pub mod plan;
pub mod schedule;
mod select;

pub use candidate::{Candidate, Own};
pub use expand::{CellSpec, expand};
pub use plan::{Mode, Plan};
pub use schedule::{Job, Outcome, Schedule, Shard};

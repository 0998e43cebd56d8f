//! Run records as JSON lines: one line a run, the one source of every report.
//!
//! A line is a [`Record`](crate::judge::record::Record), as `verdict.json` has it, with the run's folder. [`file`] reads
//! and writes them, [`union`] merges shards, [`findings`] are the distinct ones of what they found, [`cell`] groups runs that differ in nothing but their seed, [`compare`]
//! says which are better, [`id`] which runs are the same. `docs/records.md` is the format's description.

pub mod cell;
pub mod compare;
pub mod file;
pub mod findings;
pub mod id;
pub mod union;

pub use cell::{Cell, CellKey, cells};
pub use file::{Error, Loaded, Writer, load};
pub use findings::{Finding, findings};
pub use union::{Conflict, Union};

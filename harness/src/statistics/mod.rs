//! Statistics over runs: how sure a count is, how long a kernel survives, whether two columns differ, when a cell has seen
//! enough, and which cells to run when there are too many. `docs/matrix.md` states each rule.

pub mod covering;
pub mod sequential;
pub mod share;
pub mod survival;
pub mod test;

pub use sequential::{Decision, Sprt};
pub use share::{Share, Z95};
pub use survival::{Survival, kaplan_meier};
pub use test::{Call, holm};

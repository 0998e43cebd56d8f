//! `boot`: nothing to do but to have booted.

use super::{Context, Stopped, Workload};

/// The workload.
#[derive(Debug)]
pub(crate) struct Boot;

impl Workload for Boot {
    fn workers(&self) -> Vec<String> {
        vec!["boot".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("boot");
        slot.begin();
        slot.complete(0);
        Ok(())
    }
}

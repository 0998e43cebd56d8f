//! `known-bugs`: bugs of device-private memory that were found elsewhere, one provoked at a time.

mod driver;
mod huge;
mod proc;
mod races;
mod small;

use super::definition::Parameters;
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use driver::Driver;

/// What a bug's steps get.
#[derive(Debug)]
struct Case<'a> {
    driver: Driver,
    /// Whether to take the step that the bug needs; the control does not.
    trigger: bool,
    seed: u64,
    slot: Slot<'a>,
}

type Steps = fn(&Case<'_>) -> Result<(), WorkError>;

/// The bugs by name, in the order of docs/known-bugs.md.
const BUGS: [(&str, Steps); 12] = [
    ("zap-private-file", small::zap_private_file),
    ("close-use-after-free", small::close_use_after_free),
    ("spurious-dirty", small::spurious_dirty),
    ("fork-write", huge::fork_write),
    ("bind-bogus-folio", huge::bind),
    ("write-protection-lost", huge::write_protection_lost),
    ("pagemap-warning", huge::pagemap),
    ("anon-count-leak", huge::anon_count_leak),
    ("zap-migration-entry", races::zap_migration_entry),
    ("free-race", races::free),
    ("pageout-race", races::pageout),
    ("split-order", races::split_order),
];

/// The workload.
#[derive(Debug)]
pub(crate) struct KnownBugs {
    steps: Steps,
    driver: Driver,
    trigger: bool,
    rounds: u64,
}

impl KnownBugs {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters) -> Self {
        let name = parameters.choice("bug");
        let steps = BUGS.iter().find(|(bug, _)| *bug == name).map(|&(_, steps)| steps);
        Self {
            steps: steps.unwrap_or_else(|| panic!("no steps for bug `{name}`")),
            driver: if parameters.choice("driver") == "hsgpu" { Driver::Hsgpu } else { Driver::TestHmm },
            trigger: parameters.flag("trigger"),
            rounds: parameters.integer("rounds"),
        }
    }
}

impl Workload for KnownBugs {
    fn workers(&self) -> Vec<String> {
        vec!["bug".to_owned()]
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        let slot = context.board.slot(0);
        slot.enter("bug");
        let Self { driver, trigger, rounds, .. } = *self;
        for round in 0..rounds {
            context.board.set_round(round);
            let case = Case { driver, trigger, seed: context.seed.wrapping_add(round), slot };
            slot.begin();
            if let Err(error) = (self.steps)(&case) {
                error.post(slot);
                return Err(Stopped);
            }
            slot.complete(0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::BUGS;
    use crate::scenario::definition::{Definition, Kind};

    #[test]
    fn every_bug_of_the_definition_has_steps() {
        let definition =
            Definition::parse(include_str!("../../../scenarios/known-bugs.toml")).expect("valid");
        let bug = definition.parameters.iter().find(|parameter| parameter.name == "bug").expect("bug");
        let Kind::Choice { choices, .. } = &bug.kind else { panic!("bug is a choice") };
        assert_eq!(choices.iter().map(String::as_str).collect::<Vec<_>>(), BUGS.map(|(name, _)| name));
    }
}

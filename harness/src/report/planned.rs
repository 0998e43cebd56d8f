//! What a plan asks for and the records do not have: a matrix that was killed says so in its report.

use super::input::Input;
use super::run::Run;
use crate::judge::verdict::Verdict;
use crate::matrix::{CellSpec, Mode};
use crate::statistics::Decision;

/// A cell of a plan that is not complete.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Missing {
    /// The cell.
    pub cell: String,
    /// Runs that it has, harness errors excepted.
    pub done: u64,
    /// Runs that the plan asks for.
    pub asked: u64,
    /// The command for the first run that is not there.
    pub next: String,
}

/// What is missing of a plan, cell by cell. A cell whose stopping rule has decided is complete.
#[must_use]
pub fn missing(plan: &[CellSpec], input: &Input) -> Vec<Missing> {
    let missing = |spec: &CellSpec| {
        let of_cell: Vec<&Run> = input
            .runs
            .iter()
            .filter(|run| run.verdict() != Verdict::HarnessError && is_of(run, spec))
            .collect();
        let find = |seed: u64| of_cell.iter().find(|run| run.record.run.seed == seed);
        let seeds = spec.first_seed..spec.first_seed + spec.seeds;
        let failed = seeds.clone().map_while(find).map(|run| run.verdict() != Verdict::Pass);
        if spec.stop.is_some_and(|rule| rule.decide(failed) != Decision::GoOn) {
            return None;
        }
        let next = seeds.clone().find(|&seed| find(seed).is_none())?;
        Some(Missing {
            cell: spec.name(),
            done: seeds.filter(|&seed| find(seed).is_some()).count() as u64,
            asked: spec.seeds,
            next: spec.command(next),
        })
    };
    plan.iter().filter_map(missing).collect()
}

/// Whether a run is one that the cell asks for.
fn is_of(run: &Run, spec: &CellSpec) -> bool {
    let asked = &run.record.run;
    let mode = match spec.mode {
        Mode::Deterministic => "deterministic",
        Mode::RealTime => "real-time",
    };
    asked.scenario == spec.scenario
        && asked.control == spec.control
        && asked.variant == spec.variant
        && asked.preempt == spec.preempt.to_string()
        && asked.cpus == spec.cpus
        && asked.mode == mode
        && asked.chaos == spec.chaos
        && (spec.is_of_tree() || run.image("kernel_version").is_some_and(|kernel| kernel == spec.kernel))
        && spec.flavour.as_deref().unwrap_or("default") == run.image("flavour").unwrap_or("default")
        && spec.gpus.is_none_or(|gpus| asked.gpus == gpus)
        && spec.parameters.iter().all(|(name, value)| asked.parameters.get(name) == Some(value))
}

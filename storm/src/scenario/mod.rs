//! Scenarios: what they are called, what they take, and how they run.

mod access;
mod bench;
mod boot;
mod conformance;
pub(crate) mod definition;
mod drain_livelock;
mod evict_pressure;
mod exclusive_atomics;
mod fault_storm;
mod fork_cow;
mod gate;
mod gpu_endings;
mod known_bugs;
mod ksm;
mod kunit;
mod lock_hog;
mod pin;
mod ping_pong;
mod range;
mod real_time;
mod ref_livelock;
mod refusing_driver;
mod selftest;
mod smoke;
mod svm;
mod team;
mod thp_split;
mod unmap_race;
mod vfio_selftest;

use thiserror::Error;

use crate::board::{Board, Finding, Slot};
use crate::gpu::GpuError;
use crate::machine::Machine;
use crate::oracle::Mismatch;
use crate::sink::Sink;
use definition::{Definition, DefinitionError, Parameters};

/// A workload with its parameters.
pub(crate) trait Workload: std::fmt::Debug {
    /// Names of the workers, by their place on the board. Worker 0 is the process that [`Workload::run`] runs in.
    fn workers(&self) -> Vec<String>;

    /// Runs to the end, in a process of its own that has one thread and may fork. All memory and files that it takes
    /// are given back when it returns.
    ///
    /// # Errors
    /// [`Stopped`] once a worker has posted a finding.
    fn run(&self, context: &Context<'_>) -> Result<(), Stopped>;
}

/// What a run shares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    /// Where workers count.
    pub(crate) board: &'a Board,
    /// Seed of every choice, and of the pages' contents.
    pub(crate) seed: u64,
    /// Where to tell what a worker's count does not say.
    pub(crate) sink: &'a Sink,
}

/// The run ended early; the reason is on the board.
#[derive(Debug)]
pub(crate) struct Stopped;

/// Why a worker cannot go on.
#[derive(Debug, Error)]
pub(crate) enum WorkError {
    /// A GPU refused a call.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A page does not hold its stamp.
    #[error("{seen}: {mismatch}")]
    Data {
        /// What it holds.
        mismatch: Mismatch,
        /// How that was seen.
        seen: String,
    },
    /// A word does not hold what it should.
    #[error("page {page} should hold {expected}, and holds {found}")]
    Word {
        /// Index of its page.
        page: u64,
        /// What it should hold.
        expected: String,
        /// What it holds, and how that was seen.
        found: String,
    },
    /// A system call failed.
    #[error("{call}: {source}")]
    System {
        /// Its name, and what it was for.
        call: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The scenario's conditions cannot be met or did not hold.
    #[error("{0}")]
    Condition(String),
    /// Something besides contents is not as it must be.
    #[error("{name}: {detail}")]
    Invariant {
        /// Which invariant.
        name: &'static str,
        /// What was expected and what was found.
        detail: String,
    },
    /// Another worker has a finding.
    #[error("another worker ended the run")]
    Elsewhere,
}

impl WorkError {
    /// For `map_err`: names the system call that failed.
    pub(crate) fn system<E: Into<std::io::Error>>(call: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { call, source: source.into() }
    }

    /// For `map_err`: names how a page was seen to be wrong.
    pub(crate) fn seen(seen: impl Into<String>) -> impl FnOnce(Mismatch) -> Self {
        |mismatch| Self::Data { mismatch, seen: seen.into() }
    }

    /// Puts it on the board as the leader's.
    fn stop(&self, context: &Context<'_>) -> Stopped {
        self.post(context.board.slot(0));
        Stopped
    }

    /// Puts it on the board.
    fn post(&self, slot: Slot<'_>) {
        match self {
            Self::Elsewhere => (),
            Self::Data { mismatch, seen } => slot.post(&Finding::corruption(mismatch, seen)),
            Self::Word { page, expected, found } => slot.post(&Finding::Corruption {
                page: *page,
                expected: expected.clone(),
                found: found.clone(),
            }),
            Self::Invariant { name, detail } => {
                slot.post(&Finding::Invariant { name: (*name).to_owned(), detail: detail.clone() });
            }
            Self::Gpu(GpuError::Unserved { call, gpu, page, waited_ns, tries }) => {
                slot.post(&Finding::Unserved {
                    call: format!("{call} on GPU {gpu}"),
                    page: *page as u64,
                    waited_ns: *waited_ns,
                    tries: *tries,
                    mm_faults: slot.mm_faults(),
                    idle_ns: slot.idle(*waited_ns),
                });
            }
            other => slot.post(&Finding::Failure(other.to_string())),
        }
    }
}

/// A scenario that cannot be run here.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum ScenarioError {
    /// Unknown name, parameter or value.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// The machine has too little.
    #[error("{scenario} needs {needed} {what}{} and this guest has {found}", if *needed == 1 { "" } else { "s" })]
    Machine {
        /// The scenario, with the parameter that asks for more than usual, if one does.
        scenario: String,
        /// How many.
        needed: usize,
        /// Of what, in the singular.
        what: &'static str,
        /// How many there are.
        found: usize,
    },
}

type Build = fn(&Parameters, Machine) -> Result<Box<dyn Workload>, ScenarioError>;

/// Each scenario's definition and constructor.
const SCENARIOS: &[(&str, Build)] = &[
    (include_str!("../../scenarios/drain-livelock.toml"), |p, m| {
        Ok(Box::new(drain_livelock::DrainLivelock::new(p, m)?))
    }),
    (include_str!("../../scenarios/smoke.toml"), |p, m| Ok(Box::new(smoke::Smoke::new(p, m)))),
    (include_str!("../../scenarios/evict-pressure.toml"), |p, m| {
        Ok(Box::new(evict_pressure::EvictPressure::new(p, m)))
    }),
    (include_str!("../../scenarios/svm.toml"), |p, m| Ok(Box::new(svm::Svm::new(p, m)))),
    (include_str!("../../scenarios/exclusive-atomics.toml"), |p, m| {
        Ok(Box::new(exclusive_atomics::ExclusiveAtomics::new(p, m)))
    }),
    (include_str!("../../scenarios/gpu-endings.toml"), |p, m| {
        Ok(Box::new(gpu_endings::GpuEndings::new(p, m)))
    }),
    (include_str!("../../scenarios/fault-storm.toml"), |p, m| {
        Ok(Box::new(fault_storm::FaultStorm::new(p, m)))
    }),
    (include_str!("../../scenarios/lock-hog.toml"), |p, m| Ok(Box::new(lock_hog::LockHog::new(p, m)?))),
    (include_str!("../../scenarios/ref-livelock.toml"), |p, m| {
        Ok(Box::new(ref_livelock::RefLivelock::new(p, m)))
    }),
    (include_str!("../../scenarios/ping-pong.toml"), |p, m| {
        Ok(Box::new(ping_pong::PingPong::new(p, m, false)))
    }),
    (include_str!("../../scenarios/peer-ping-pong.toml"), |p, m| {
        Ok(Box::new(ping_pong::PingPong::new(p, m, true)))
    }),
    (include_str!("../../scenarios/unmap-race.toml"), |p, m| Ok(Box::new(unmap_race::UnmapRace::new(p, m)))),
    (include_str!("../../scenarios/fork-cow.toml"), |p, m| Ok(Box::new(fork_cow::ForkCow::new(p, m)))),
    (include_str!("../../scenarios/pin.toml"), |p, m| Ok(Box::new(pin::Pin::new(p, m)))),
    (include_str!("../../scenarios/refusing-driver.toml"), |p, m| {
        Ok(Box::new(refusing_driver::RefusingDriver::new(p, m)))
    }),
    (include_str!("../../scenarios/thp-split.toml"), |p, m| Ok(Box::new(thp_split::ThpSplit::new(p, m)))),
    (include_str!("../../scenarios/boot.toml"), |_, _| Ok(Box::new(boot::Boot))),
    (include_str!("../../scenarios/kunit.toml"), |p, _| Ok(Box::new(kunit::Kunit::new(p)))),
    (include_str!("../../scenarios/bench.toml"), |p, _| Ok(Box::new(bench::Bench::new(p)))),
    (include_str!("../../scenarios/conformance.toml"), |p, _| Ok(Box::new(conformance::Conformance::new(p)))),
    (include_str!("../../scenarios/selftest.toml"), |p, _| Ok(Box::new(selftest::Selftest::new(p)))),
    (include_str!("../../scenarios/known-bugs.toml"), |p, _| Ok(Box::new(known_bugs::KnownBugs::new(p)))),
    (include_str!("../../scenarios/vfio-selftest.toml"), |p, _| {
        Ok(Box::new(vfio_selftest::VfioSelftest::new(p)))
    }),
];

/// The definitions of all scenarios.
///
/// # Errors
/// [`DefinitionError`]; never for the files of this repository, which a test reads.
pub(crate) fn definitions() -> Result<Vec<Definition>, DefinitionError> {
    SCENARIOS.iter().map(|(text, _)| Definition::parse(text)).collect()
}

/// A scenario with its parameters, ready to run.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// Its name.
    pub(crate) name: String,
    /// The parameters in force.
    pub(crate) parameters: Parameters,
    /// Invariants that are not judged after it.
    pub(crate) waived: Vec<String>,
    /// The workload.
    pub(crate) workload: Box<dyn Workload>,
}

/// Prepares scenario `name` with what `control` sets and then `overrides`.
///
/// # Errors
/// [`ScenarioError`].
pub(crate) fn prepare<'a>(
    name: &str,
    control: Option<&str>,
    overrides: impl IntoIterator<Item = (&'a str, &'a str)>,
    machine: Machine,
) -> Result<Prepared, ScenarioError> {
    let definitions = definitions()?;
    let Some((definition, (_, build))) = definitions.iter().zip(SCENARIOS).find(|(d, _)| d.name == name)
    else {
        let known = definitions.iter().map(|d| d.name.as_str()).collect::<Vec<_>>().join(", ");
        return Err(DefinitionError::UnknownScenario { name: name.to_owned(), known }.into());
    };
    let control = control.map(|control| definition.control(control)).transpose()?;
    let parameters = definition.parameters(control, overrides)?;
    let needs = &definition.needs;
    // A GPU on vfio-pci has no node; the workload finds it on the bus.
    let machine = if needs.vfio { Machine { gpus: needs.gpus, ..machine } } else { machine };
    for (what, needed, found) in [("GPU", needs.gpus, machine.gpus), ("CPU", needs.cpus, machine.cpus)] {
        if found < needed {
            return Err(ScenarioError::Machine { scenario: name.to_owned(), needed, what, found });
        }
    }
    Ok(Prepared {
        name: name.to_owned(),
        workload: build(&parameters, machine)?,
        waived: definition.waived.iter().map(|waiver| waiver.invariant.clone()).collect(),
        parameters,
    })
}

/// Runs an empty loop `turns` times: a delay that depends on nothing but the machine's instructions.
fn idle(turns: u64) {
    for turn in 0..turns {
        std::hint::black_box(turn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Machine = Machine { cpus: 4, gpus: 2 };

    #[test]
    fn every_scenario_and_control_can_be_prepared() {
        for definition in definitions().expect("valid definitions") {
            let prepared = prepare(&definition.name, None, [], MACHINE).expect("defaults are valid");
            assert!(!prepared.workload.workers().is_empty());
            for control in &definition.controls {
                prepare(&definition.name, Some(&control.name), [], MACHINE).expect("controls are valid");
                assert!(
                    definition.conditions.iter().any(|c| c.id == control.removes),
                    "control {} removes no condition of the list",
                    control.name
                );
                assert!(control.parameters.is_empty() == control.preempt.is_some(), "{}", control.name);
            }
        }
    }

    #[test]
    fn an_unknown_scenario_names_the_known_ones() {
        let error = prepare("drain", None, [], MACHINE).expect_err("unknown").to_string();
        assert!(
            error.starts_with("there is no scenario `drain`; there are: drain-livelock, smoke,"),
            "{error}"
        );
        for definition in definitions().expect("valid definitions") {
            assert!(error.contains(&definition.name), "{} is not in: {error}", definition.name);
        }
    }

    #[test]
    fn a_machine_that_is_too_small_is_refused() {
        let error = |cpus, gpus, overrides: &[(&'static str, &'static str)]| {
            prepare("drain-livelock", None, overrides.iter().copied(), Machine { cpus, gpus })
                .expect_err("too small")
                .to_string()
        };
        assert_eq!(error(1, 2, &[]), "drain-livelock needs 2 CPUs and this guest has 1");
        assert_eq!(error(4, 1, &[]), "drain-livelock needs 2 GPUs and this guest has 1");
        assert_eq!(
            error(2, 2, &[("drained", "1")]),
            "drain-livelock (drained=1) needs 3 CPUs and this guest has 2"
        );
        assert_eq!(
            error(4, 2, &[("faulters", "4")]),
            "drain-livelock (faulters=4) needs 5 CPUs and this guest has 4"
        );
    }
}

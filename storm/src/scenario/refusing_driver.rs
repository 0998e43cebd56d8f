//! `refusing-driver`: a `migrate_to_ram()` that returns without having migrated, and one that fails.

use std::time::Duration;

use hmmstorm_abi::uapi::{REFUSE_FAIL, REFUSE_NOTHING, REFUSE_STAY};
use rustix::io::Errno;
use rustix::process::{WaitOptions, waitpid};

use super::definition::Parameters;
use super::range::Range;
use super::team::{Crew, Member, Shape};
use super::{Context, Stopped, WorkError, Workload};
use crate::board::Slot;
use crate::clock::monotonic_ns;
use crate::gpu::{Gpu, Owner};
use crate::machine::Machine;
use crate::sys::memory::Mapping;
use crate::sys::process::fork;

/// GPU whose driver refuses.
const HOLDER: usize = 0;
/// GPU that faults on its pages.
const FOREIGN: usize = 1;
/// Longer than anything that is tried under [`REFUSE_FAIL`].
const FAILING: Duration = Duration::from_secs(10);

/// How faults are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Stay,
    Fail,
    Both,
    Nothing,
}

/// The workload.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RefusingDriver {
    shape: Shape,
    mode: Mode,
    time: Duration,
    rounds: u64,
}

impl RefusingDriver {
    /// From its parameters.
    pub(crate) fn new(parameters: &Parameters, machine: Machine) -> Self {
        Self {
            shape: Shape::new(parameters.integer("faulters") as usize, 1, machine),
            mode: match parameters.choice("mode") {
                "stay" => Mode::Stay,
                "fail" => Mode::Fail,
                "nothing" => Mode::Nothing,
                _ => Mode::Both,
            },
            time: Duration::from_millis(parameters.integer("refuse_ms")),
            rounds: parameters.integer("rounds"),
        }
    }

    fn storm(&self, context: &Context<'_>) -> Result<(), WorkError> {
        let slot = context.board.slot(0);
        slot.enter("leader");
        // A page for each faulter, so that each meets the refusal and not a page that another one brought back.
        let mapping =
            Mapping::private(self.shape.members()).map_err(WorkError::system("mmap of the range"))?;
        let range = Range::stamped(mapping, context.seed, 0);
        let gpu = Gpu::open(HOLDER)?;
        for round in 0..self.rounds {
            context.board.set_round(round);
            let before = gpu.refuse(REFUSE_NOTHING, Duration::ZERO)?;
            if self.mode != Mode::Fail {
                self.stay(context, &range, &gpu, slot)?;
            }
            if matches!(self.mode, Mode::Fail | Mode::Both) {
                self.fail(&range, &gpu, slot)?;
            }
            let refused = gpu.refuse(REFUSE_NOTHING, Duration::ZERO)? - before;
            if (refused == 0) != (self.mode == Mode::Nothing) {
                return Err(WorkError::Condition(format!("the driver refused {refused} faults")));
            }
            range.check_all(slot)?;
        }
        Ok(())
    }

    /// Faults come back without an error and without the page, until the time is over; then each gets its page.
    fn stay(&self, context: &Context<'_>, range: &Range, gpu: &Gpu, slot: Slot<'_>) -> Result<(), WorkError> {
        range.migrate_all(gpu, slot)?;
        let mode = if self.mode == Mode::Nothing { REFUSE_NOTHING } else { REFUSE_STAY };
        gpu.refuse(mode, self.time)?;
        let end = monotonic_ns() + self.time.as_nanos() as u64;
        self.shape.run(
            context,
            "faulter",
            |_| Ok(range),
            |range, member: Member<'_>| {
                let buffer = Mapping::private(1).map_err(WorkError::system("mmap of a buffer"))?;
                let asked = monotonic_ns();
                // Every other one by the device.
                if member.number.is_multiple_of(2) {
                    range.check_by_cpu(member.number, member.slot)?;
                } else {
                    let foreign = Gpu::open(FOREIGN)?;
                    range.check_by_gpu(member.number, &foreign, &buffer, Owner::Own, member.slot)?;
                }
                let served = monotonic_ns();
                // The driver's clock started a little earlier than ours.
                let slack = Duration::from_millis(20).as_nanos() as u64;
                if mode == REFUSE_STAY && asked + slack < end && served + slack < end {
                    let detail = format!("page {} came back while the driver refused it", member.number);
                    return Err(WorkError::Invariant { name: "refused", detail });
                }
                Ok(())
            },
            |crew: &Crew<'_>| crew.check(),
        )
    }

    /// A CPU that faults is killed by SIGBUS, a device's fault fails, and the data is there afterwards.
    fn fail(&self, range: &Range, gpu: &Gpu, slot: Slot<'_>) -> Result<(), WorkError> {
        range.migrate_all(gpu, slot)?;
        gpu.refuse(REFUSE_FAIL, FAILING)?;
        slot.begin();
        let victim = fork(|| i32::from(range.current(0).check(range.mapping().page(0)).is_err()))
            .map_err(WorkError::system("fork of a victim"))?;
        let ended = waitpid(Some(victim), WaitOptions::empty()).map_err(WorkError::system("waitpid"))?;
        if ended.and_then(|(_, status)| status.terminating_signal()) != Some(libc::SIGBUS) {
            let detail = format!("a CPU's fault that failed ended with {ended:?}, and not by SIGBUS");
            return Err(WorkError::Invariant { name: "failed-fault", detail });
        }
        slot.complete(0);
        slot.begin();
        let foreign = Gpu::open(FOREIGN)?;
        let buffer = Mapping::private(1).map_err(WorkError::system("mmap of a buffer"))?;
        match foreign.read(range.span(0..1)?, &buffer, Owner::Own) {
            Err(error) if error.errno() == Some(Errno::FAULT) => (),
            other => {
                let detail = format!("a device's fault that failed came back with {other:?}");
                return Err(WorkError::Invariant { name: "failed-fault", detail });
            }
        }
        slot.complete(0);
        gpu.refuse(REFUSE_NOTHING, Duration::ZERO)?;
        Ok(())
    }
}

impl Workload for RefusingDriver {
    fn workers(&self) -> Vec<String> {
        self.shape.names("leader", "faulter")
    }

    fn run(&self, context: &Context<'_>) -> Result<(), Stopped> {
        self.storm(context).map_err(|error| error.stop(context))
    }
}

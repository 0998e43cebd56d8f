//! Who accesses pages: the CPU, GPUs, or both; and pages read by a job of the GPU.

use hmmstorm_abi::job::{Job, Op, Outcome, Pattern, WORD};
use hmmstorm_abi::uapi::PAGE_SIZE;

use super::WorkError;
use super::definition::Parameters;
use crate::gpu::Gpu;
use crate::oracle::Stamp;
use crate::rng::Rng;
use crate::sys::memory::PageSpan;

/// A job that loads every word of the first page of `span`, to be checked by [`check_sum`].
pub(crate) fn page_sum(span: PageSpan<'_>) -> Job {
    let bytes = PAGE_SIZE as u64;
    Job {
        op: Op::Load,
        pattern: Pattern::Strided,
        va: span.address(),
        window: bytes,
        count: bytes / WORD,
        stride: WORD,
        tag: 0,
        operand: 0,
    }
}

/// Whether the words that a [`page_sum`] of `gpu` found are those of `stamp`.
///
/// # Errors
/// [`WorkError::Word`].
pub(crate) fn check_sum(stamp: Stamp, outcome: &Outcome, gpu: &Gpu) -> Result<(), WorkError> {
    if outcome.sum == stamp.sum() {
        return Ok(());
    }
    Err(WorkError::Word {
        page: stamp.index(),
        expected: format!("{stamp}, whose words have the sum {:#x}", stamp.sum()),
        found: format!("words with the sum {:#x} (loaded by a job of GPU {})", outcome.sum, gpu.index()),
    })
}

/// The parameter `faults`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Faults {
    /// The CPU.
    Cpu,
    /// A GPU.
    Device,
    /// Either, by chance.
    Both,
}

impl Faults {
    /// From the parameter `faults`.
    pub(crate) fn from_parameters(parameters: &Parameters) -> Self {
        match parameters.choice("faults") {
            "cpu" => Self::Cpu,
            "device" => Self::Device,
            _ => Self::Both,
        }
    }

    /// Whether the next access is the CPU's.
    pub(crate) fn by_cpu(self, rng: &mut Rng) -> bool {
        match self {
            Self::Cpu => true,
            Self::Device => false,
            Self::Both => rng.up_to(1) == 0,
        }
    }
}

//! Who accesses pages: the CPU, GPUs, or both.

use super::definition::Parameters;
use crate::rng::Rng;

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

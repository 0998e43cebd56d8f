//! What is to be run: a profile with the command line's wishes applied, and what the guest shall do.

use std::collections::BTreeMap;
use std::path::Path;

use abi::wire::control::Chaos;
use abi::wire::event::cmdline;
use hmmstorm_abi as abi;

use super::profile::{self, Profile};
use super::{Detectors, Size};
use crate::cli::{MachineArgs, Preempt};

/// What executes the guest's instructions. [`crate::cli::Accel::Auto`] has been decided when this is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// The host's CPUs.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Engine {
    /// As QEMU and people name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Whose clock the guest follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clock {
    /// The host's; one host thread a CPU, engines of the device on threads of their own.
    Real,
    /// Its own instruction count.
    Counted(CountedClock),
}

/// See [`profile::Deterministic`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountedClock {
    /// An instruction takes 2^shift nanoseconds.
    pub shift: u32,
    /// QEMU's own seed.
    pub seed: u64,
    /// Start date.
    pub rtc: String,
}

/// What PID 1 does once the GPUs are bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guest {
    /// A shell on the console.
    Shell,
    /// One scenario, then power off.
    Run {
        /// Its name.
        scenario: String,
        /// Seed of its choices, and of the schedule in deterministic mode.
        seed: u64,
        /// Parameters that differ from their defaults.
        parameters: BTreeMap<String, String>,
    },
}

/// Where the guest's console goes, besides console.log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Console {
    /// Nowhere.
    Log,
    /// To a socket that the harness holds the other end of.
    Interactive,
}

/// Everything that decides what runs in the machine. Two runs with equal specifications, images and programs differ
/// in nothing but paths.
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Profile, with overridden values replaced.
    pub profile: Profile,
    /// Its name.
    pub profile_name: String,
    /// KVM or TCG.
    pub engine: Engine,
    /// Real or counted time.
    pub clock: Clock,
    /// What the guest does.
    pub guest: Guest,
    /// Where its console goes.
    pub console: Console,
    /// Fault plan of the device, in its own notation.
    pub chaos: Option<String>,
    /// Fault plan that it gets when the scenario begins.
    pub chaos_at_start: Option<Chaos>,
    /// Whether the guest waits for gdb before its first instruction; mutes the detectors.
    pub gdb: bool,
    /// Further kernel parameters, after all others.
    pub append: Vec<String>,
    /// Modules that the guest loads, in order.
    pub modules: Vec<String>,
    /// The GPUs stand behind an emulated IOMMU, for vfio-pci in the guest; no driver makes nodes for them.
    pub vfio: bool,
}

/// What vfio-pci is made of, in the order in which it can be loaded.
const VFIO_MODULES: [&str; 5] = ["irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci"];

/// Why wishes cannot be met.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The profile cannot be used.
    #[error(transparent)]
    Profile(#[from] profile::Error),
    /// Two wishes contradict each other.
    #[error("{0}")]
    Contradiction(String),
}

impl Spec {
    /// Applies the command line to the profile that it names. `dir` is the folder of profiles.
    pub fn new(dir: &Path, args: &MachineArgs, engine: Engine, guest: Guest) -> Result<Self, Error> {
        let profile_name = args.profile.clone().unwrap_or_else(|| profile::DEFAULT.into());
        let mut profile = Profile::load(dir, &profile_name)?;
        let set = |value: &mut u32, wish: Option<u32>| *value = wish.unwrap_or(*value);
        if args.deterministic {
            profile.detectors.soft_lockup = profile.deterministic.soft_lockup;
        }
        set(&mut profile.cpus, args.cpus);
        set(&mut profile.gpus, args.gpus);
        let set = |value: &mut Size, wish: Option<Size>| *value = wish.unwrap_or(*value);
        set(&mut profile.memory, args.memory);
        set(&mut profile.vram, args.vram);
        profile.preempt = args.preempt.unwrap_or(profile.preempt);
        if args.deterministic && engine == Engine::Kvm {
            let why = "--deterministic counts instructions, which KVM cannot: leave out --accel kvm";
            return Err(Error::Contradiction(why.into()));
        }
        if (args.chaos.is_some() || args.chaos_at_start.is_some()) && profile.gpus == 0 {
            return Err(Error::Contradiction("--chaos needs a GPU, and there are none (--gpus 0)".into()));
        }
        let clock = if args.deterministic {
            let d = &profile.deterministic;
            Clock::Counted(CountedClock { shift: d.shift, seed: d.seed, rtc: d.rtc.clone() })
        } else {
            Clock::Real
        };
        // Without a device there is nothing to bind.
        let modules = if profile.gpus == 0 { Vec::new() } else { vec!["hsgpu".into()] };
        Ok(Self {
            profile,
            profile_name,
            engine,
            clock,
            guest,
            console: Console::Log,
            chaos: args.chaos.clone(),
            chaos_at_start: args.chaos_at_start.clone(),
            gdb: false,
            append: args.append.clone(),
            modules,
            vfio: false,
        })
    }

    /// Leaves the GPUs to user space in the guest, through vfio-pci.
    pub fn give_gpus_to_vfio(&mut self) {
        self.modules = VFIO_MODULES.map(String::from).to_vec();
        self.vfio = true;
    }

    /// Whether equal runs give equal bytes.
    pub fn deterministic(&self) -> bool {
        matches!(self.clock, Clock::Counted(_))
    }

    /// Preemption model of the guest.
    pub fn preempt(&self) -> Preempt {
        self.profile.preempt
    }

    /// The guest kernel's command line.
    pub fn kernel_command_line(&self) -> String {
        let mut parts = self.profile.kernel.command_line.clone();
        parts.push(format!("preempt={}", self.profile.preempt));
        if self.gdb {
            parts.extend(Detectors::muted());
        } else {
            let panic = self.deterministic() && self.profile.deterministic.panic_on_soft_lockup;
            parts.extend(self.profile.detectors.command_line(panic));
        }
        parts.push(format!("{}={}", cmdline::GPUS, if self.vfio { 0 } else { self.profile.gpus }));
        if self.vfio {
            parts.push("intel_iommu=on".into());
        }
        if !self.modules.is_empty() {
            parts.push(format!("{}={}", cmdline::MODULES, self.modules.join(",")));
        }
        match &self.guest {
            Guest::Shell => parts.push(format!("{}=shell", cmdline::MODE)),
            Guest::Run { scenario, seed, parameters } => {
                parts.push(format!("{}=run", cmdline::MODE));
                parts.push(format!("{}={scenario}", cmdline::SCENARIO));
                parts.push(format!("{}={seed}", cmdline::SEED));
                for (name, value) in parameters {
                    parts.push(format!("{}{name}={value}", cmdline::PARAMETER_PREFIX));
                }
            }
        }
        parts.extend(self.append.iter().cloned());
        parts.join(" ")
    }
}

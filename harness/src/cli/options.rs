//! Options that several commands share: which image to boot, and in which machine.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hmmstorm_abi::wire::control::Chaos;

/// Which kernel, and what is done to it.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Kernel under test")]
pub struct ImageArgs {
    /// Kernel of the list (`hmmstorm list kernels`) [default: the reference kernel]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["tree", "image"])]
    pub kernel: Option<String>,
    /// Kernel source tree of your own
    #[arg(long, value_name = "DIR", conflicts_with = "image")]
    pub tree: Option<PathBuf>,
    /// Patch to apply on top of the variant, a diff or a mail; may be given several times, applied in order
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    pub patch: Vec<PathBuf>,
    /// Mailbox with a series to apply on top, after every --patch; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "image")]
    pub mbox: Vec<PathBuf>,
    /// Fix candidate to apply (`hmmstorm list variants`), or several as A+B, applied in this order
    #[arg(long, value_name = "NAME", conflicts_with = "image")]
    pub variant: Option<String>,
    /// Kind of build (`hmmstorm list flavours`)
    #[arg(long, value_name = "NAME", conflicts_with = "image")]
    pub flavour: Option<String>,
    /// Boot what this image.json describes, and build nothing
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// Which machine to boot it in.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Machine profile (`hmmstorm list profiles`) [default: smoke]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// What runs the guest's code; auto takes KVM where it was proved to work
    #[arg(long, value_enum, default_value_t)]
    pub accel: Accel,
    /// Number of CPUs [default: the profile's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: Option<u32>,
    /// Guest memory, as 1G or 768M [default: the profile's]
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<crate::vm::Size>,
    /// Number of GPUs; 0 boots without the device [default: the profile's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4))]
    pub gpus: Option<u32>,
    /// Memory of each GPU, as 256M [default: the profile's]
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<crate::vm::Size>,
    /// Preemption model of the guest kernel [default: the profile's]
    #[arg(long, value_enum)]
    pub preempt: Option<Preempt>,
    /// Same seed, same bytes: instruction-counted time, one host thread, synchronous device
    #[arg(long)]
    pub deterministic: bool,
    /// Further kernel command line; may be given several times
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// Fault plan of the device, as KEY=VALUE[,KEY=VALUE]
    #[arg(long, value_name = "PLAN", value_parser = chaos)]
    pub chaos: Option<String>,
    /// Fault plan that the device gets when the scenario begins, in place of --chaos
    #[arg(long, value_name = "PLAN", value_parser = chaos_plan)]
    pub chaos_at_start: Option<Chaos>,
    /// QEMU of your own: 10.1 or later, with vfio-user-pci
    #[arg(long, value_name = "PROGRAM")]
    pub qemu: Option<PathBuf>,
    /// GPU process of your own, in place of this tree's hmmstorm-device
    #[arg(long, value_name = "PROGRAM", env = "HMMSTORM_DEVICE")]
    pub device: Option<PathBuf>,
    /// Folder for the logs of the run [default: a new one in the cache]
    #[arg(long, value_name = "DIR")]
    pub folder: Option<PathBuf>,
    /// Print the device's and QEMU's command lines and run nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Checks the keys of a fault plan before anything is built; the device checks the values.
fn chaos(plan: &str) -> Result<String, String> {
    let known = serde_json::to_value(Chaos::default()).map_err(|e| e.to_string())?;
    let known: Vec<_> = known.as_object().into_iter().flat_map(|keys| keys.keys()).collect();
    for pair in plan.split(',') {
        let (key, _) = pair.split_once('=').ok_or_else(|| format!("'{pair}' is not KEY=VALUE"))?;
        if !known.iter().any(|name| *name == key) {
            return Err(format!("no fault is called '{key}'; there are: {known:?}"));
        }
    }
    Ok(plan.to_owned())
}

/// A fault plan that the harness itself hands to the device, at run time.
fn chaos_plan(text: &str) -> Result<Chaos, String> {
    chaos(text)?.parse()
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Accel {
    /// KVM where `hmmstorm doctor` proved it, else TCG.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// QEMU's own translator.
    Tcg,
}

/// Preemption model of the guest kernel: `preempt=` of its command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preempt {
    /// The kernel yields only where it sleeps or returns to user mode.
    None,
    /// And at `might_sleep()`.
    Voluntary,
    /// And at the next tick, for ordinary tasks.
    Lazy,
    /// Wherever no lock is held.
    Full,
}

impl fmt::Display for Preempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Voluntary => "voluntary",
            Self::Lazy => "lazy",
            Self::Full => "full",
        })
    }
}

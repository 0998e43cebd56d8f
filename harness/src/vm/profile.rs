//! Machine profiles: `qemu-config/NAME.toml`, read and checked.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

use super::Size;
use crate::cli::Preempt;

/// The profile that is taken when none is named.
pub const DEFAULT: &str = "smoke";

/// A machine, its kernel's command line, and how long things may take in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Profile {
    /// One line for lists.
    pub about: String,
    /// Number of CPUs.
    pub cpus: u32,
    /// Guest memory.
    pub memory: Size,
    /// Number of GPUs.
    pub gpus: u32,
    /// Memory of each GPU.
    pub vram: Size,
    /// Preemption model.
    pub preempt: Preempt,
    /// The kernel's command line.
    pub kernel: Kernel,
    /// Limits of the kernel's detectors.
    pub detectors: Detectors,
    /// Limits of the host's patience.
    pub limits: Limits,
    /// Deterministic mode.
    pub deterministic: Deterministic,
}

/// The part of the kernel's command line that is the same for every run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Kernel {
    /// Parameters, in order.
    pub command_line: Vec<String>,
}

/// Limits of the hang detectors, seconds of guest time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Detectors {
    /// No completed operation with work outstanding (the host's own detector).
    pub progress: u32,
    /// `workqueue.watchdog_thresh`: reported between one and two of it.
    pub workqueue: u32,
    /// `kernel.hung_task_timeout_secs`: reported within this and one interval.
    pub hung_task: u32,
    /// `kernel.hung_task_check_interval_secs`.
    pub hung_task_interval: u32,
    /// `watchdog_thresh`: a soft lockup is reported after two of it.
    pub soft_lockup: u32,
    /// `rcupdate.rcu_cpu_stall_timeout`.
    pub rcu_stall: u32,
}

/// Limits of the host's patience, seconds of host time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Limits {
    /// From QEMU's start to the guest's hello.
    pub hello: u32,
    /// The same under KVM.
    pub hello_kvm: u32,
    /// From hello to all GPUs bound.
    pub bound: u32,
    /// From bound to the end of the run.
    pub run: u32,
}

/// Deterministic mode.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Deterministic {
    /// An instruction takes 2^shift nanoseconds of guest time.
    pub shift: u32,
    /// QEMU's own seed.
    pub seed: u64,
    /// Date at which the guest's clock starts.
    pub rtc: String,
    /// In place of the detectors' `soft-lockup`: guest time runs ahead of the host's, and the CPUs must be sampled, in
    /// host time, before the guest's end.
    pub soft_lockup: u32,
    /// Whether a soft lockup panics.
    pub panic_on_soft_lockup: bool,
}

/// Why a profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such file.
    #[error("there is no machine profile '{name}'; there are: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is, by comma.
        known: String,
    },
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is no profile.
    #[error("{} is no machine profile: {source}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// The values contradict each other.
    #[error("machine profile '{name}': {problem}")]
    Inconsistent {
        /// Which profile.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

impl Profile {
    /// Reads `NAME.toml` of the folder `dir`.
    pub fn load(dir: &Path, name: &str) -> Result<Self, Error> {
        let known = names(dir)?;
        if !known.iter().any(|n| n == name) {
            return Err(Error::Unknown { name: name.into(), known: known.join(", ") });
        }
        let path = dir.join(format!("{name}.toml"));
        let text = fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let profile: Self = toml::from_str(&text).map_err(|source| Error::Parse { path, source })?;
        profile.check().map_err(|problem| Error::Inconsistent { name: name.into(), problem })?;
        Ok(profile)
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=64).contains(&self.cpus) {
            return Err(format!("cpus = {} is not within 1 to 64", self.cpus));
        }
        if self.gpus > 4 {
            return Err(format!("gpus = {}: the device has at most 4", self.gpus));
        }
        if !(2..=7).contains(&self.deterministic.shift) {
            return Err(format!("deterministic.shift = {}: only 2 to 7 boot", self.deterministic.shift));
        }
        self.detectors.check()?;
        Detectors { soft_lockup: self.deterministic.soft_lockup, ..self.detectors }
            .check()
            .map_err(|problem| format!("in deterministic mode: {problem}"))
    }
}

impl Detectors {
    /// Each detector must have spoken before the next one can: else one hang gets different names by chance.
    fn check(&self) -> Result<(), String> {
        let soft_lockup = 2 * self.soft_lockup;
        let order = [
            ("workqueue, at the latest", 2 * self.workqueue),
            ("soft-lockup, at the earliest", soft_lockup),
            ("hung-task, at the latest", self.hung_task + self.hung_task_interval),
        ];
        for (name, latest) in [order[0], order[2]] {
            if latest >= soft_lockup {
                return Err(format!(
                    "the detectors are out of order: {name} speaks after {latest} s, {} after {soft_lockup} s",
                    order[1].0
                ));
            }
        }
        if self.rcu_stall < 3 * soft_lockup {
            return Err(format!("detectors.rcu-stall = {} is below {} s", self.rcu_stall, 3 * soft_lockup));
        }
        if self.workqueue == 0 || self.hung_task == 0 || self.hung_task_interval == 0 || self.progress == 0 {
            return Err("a detector's limit of 0 turns it off, and then nothing confirms a hang".into());
        }
        Ok(())
    }

    /// The kernel parameters that set these limits (`kernel/watchdog.c`, `kernel/workqueue.c`, `kernel/hung_task.c`,
    /// `kernel/rcu/update.c`). `panic` makes a soft lockup the end of the run.
    pub fn command_line(&self, panic: bool) -> Vec<String> {
        vec![
            format!("watchdog_thresh={}", self.soft_lockup),
            format!("softlockup_panic={}", u8::from(panic)),
            "sysctl.kernel.softlockup_all_cpu_backtrace=1".into(),
            format!("workqueue.watchdog_thresh={}", self.workqueue),
            format!("sysctl.kernel.hung_task_timeout_secs={}", self.hung_task),
            format!("sysctl.kernel.hung_task_check_interval_secs={}", self.hung_task_interval),
            "sysctl.kernel.hung_task_warnings=-1".into(),
            format!("rcupdate.rcu_cpu_stall_timeout={}", self.rcu_stall),
            "rcupdate.rcu_cpu_stall_suppress_at_boot=1".into(),
        ]
    }

    /// The kernel parameters that silence all of them: for gdb, which stops CPUs for as long as people think.
    pub fn muted() -> Vec<String> {
        [
            "nowatchdog",
            "workqueue.watchdog_thresh=0",
            "sysctl.kernel.hung_task_timeout_secs=0",
            "rcupdate.rcu_cpu_stall_suppress=1",
        ]
        .map(String::from)
        .to_vec()
    }
}

/// Names of the profiles in the folder `dir`, sorted.
pub fn names(dir: &Path) -> Result<Vec<String>, Error> {
    let read = |source| Error::Read { path: dir.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|e| e == "toml")
            && let Some(stem) = path.file_stem().and_then(|s| s.to_str())
        {
            names.push(stem.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::vm) fn shipped() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-config")
    }

    #[test]
    fn shipped_profiles_are_sound() {
        let names = names(&shipped()).expect("qemu-config");
        assert!(names.iter().any(|n| n == DEFAULT), "{names:?}");
        for name in names {
            Profile::load(&shipped(), &name).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    #[test]
    fn unknown_profile_names_the_known() {
        let error = Profile::load(&shipped(), "smok").expect_err("no such profile");
        assert!(error.to_string().contains("smoke"), "{error}");
    }

    #[test]
    fn detectors_out_of_order_are_refused() {
        let good = Profile::load(&shipped(), DEFAULT).expect("smoke").detectors;
        assert_eq!(good.check(), Ok(()));
        for bad in [
            Detectors { workqueue: 5, ..good },
            Detectors { hung_task: 9, ..good },
            Detectors { rcu_stall: 21, ..good },
            Detectors { hung_task: 0, ..good },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        let text = fs::read_to_string(shipped().join("smoke.toml")).expect("smoke.toml");
        assert!(toml::from_str::<Profile>(&text).is_ok());
        assert!(toml::from_str::<Profile>(&text.replace("cpus =", "cpu =")).is_err());
    }
}

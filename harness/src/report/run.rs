//! One run as a report sees it: its record, and by which properties it is told from others.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::findings::patches;
use crate::capsule;
use crate::judge::record::Record;
use crate::judge::verdict::Verdict;

/// One run.
#[derive(Clone, Debug)]
pub struct Run {
    /// What was asked for, what happened, what it was called.
    pub record: Record,
    /// The file that holds all that it takes to run it again elsewhere, where there is one.
    pub capsule: Option<PathBuf>,
}

impl Run {
    /// Of a record. Its capsule is in its folder.
    #[must_use]
    pub fn new(record: Record) -> Self {
        let capsule =
            record.folder.as_ref().map(|folder| folder.join(capsule::FILE)).filter(|file| file.is_file());
        Self { record, capsule }
    }

    /// The verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.record.judgement.verdict
    }

    /// A text of the build's record, e.g. `kernel_version`.
    #[must_use]
    pub fn image(&self, field: &str) -> Option<&str> {
        self.record.provenance.image.get(field).and_then(Value::as_str)
    }

    /// Every property that can tell this run from another, in the order in which a reader asks for them; what follows
    /// from others most of the time is in [`Self::details`].
    #[must_use]
    pub fn properties(&self) -> Vec<(Axis, String)> {
        let run = &self.record.run;
        let none = || "none".to_owned();
        vec![
            (Axis::Scenario, run.scenario.clone()),
            (Axis::Kernel, self.image("kernel_version").unwrap_or("unknown").to_owned()),
            (Axis::Flavour, self.image("flavour").unwrap_or("default").to_owned()),
            (Axis::Variant, run.variant.clone()),
            (Axis::Control, run.control.clone().unwrap_or_else(none)),
            (Axis::Preempt, run.preempt.clone()),
            (Axis::Cpus, run.cpus.to_string()),
            (Axis::Gpus, run.gpus.to_string()),
            (Axis::Mode, run.mode.clone()),
            (Axis::Engine, run.engine.clone()),
            (Axis::Profile, run.profile.clone()),
            (Axis::Chaos, run.chaos.clone().unwrap_or_else(none)),
        ]
    }

    /// Properties that tell runs apart which are alike in all of [`Self::properties`], by name: parameters of the
    /// scenario, sizes of memory, words of the kernel's command line, and the texts of patches that share a name.
    #[must_use]
    pub fn details(&self) -> BTreeMap<String, String> {
        let run = &self.record.run;
        let mut details = run.parameters.clone();
        let tested: Vec<String> = patches(self)
            .into_iter()
            .filter(|patch| patch.origin != "abstraction")
            .map(|patch| patch.sha256.chars().take(8).collect())
            .collect();
        let others = [
            ("memory", run.memory.clone()),
            ("vram", run.vram.clone()),
            ("append", run.append.join(" ")),
            ("patches", tested.join("+")),
        ];
        // A parameter of the same name goes first: it is what the scenario calls so.
        for (name, value) in others.into_iter().filter(|(_, value)| !value.is_empty()) {
            details.entry(name.to_owned()).or_insert(value);
        }
        details
    }
}

/// What tells runs apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Axis {
    /// Workload.
    Scenario,
    /// Kernel release.
    Kernel,
    /// Kind of build.
    Flavour,
    /// Fix candidate.
    Variant,
    /// Condition removed.
    Control,
    /// Preemption model.
    Preempt,
    /// CPUs.
    Cpus,
    /// GPUs.
    Gpus,
    /// Real-time or deterministic.
    Mode,
    /// What ran the guest's code.
    Engine,
    /// Machine profile.
    Profile,
    /// Fault plan of the device.
    Chaos,
    /// One of [`Run::details`].
    Detail(String),
}

impl Axis {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Scenario => "scenario",
            Self::Kernel => "kernel",
            Self::Flavour => "flavour",
            Self::Variant => "variant",
            Self::Control => "control",
            Self::Preempt => "preempt",
            Self::Cpus => "CPUs",
            Self::Gpus => "GPUs",
            Self::Mode => "mode",
            Self::Engine => "engine",
            Self::Profile => "profile",
            Self::Chaos => "chaos",
            Self::Detail(name) => name,
        }
    }

    /// A value of it as it is said: a bare `4` says nothing.
    #[must_use]
    pub fn says(&self, value: &str) -> String {
        match self {
            Self::Scenario | Self::Kernel | Self::Variant | Self::Mode | Self::Engine => value.to_owned(),
            Self::Cpus | Self::Gpus => {
                let name = self.name();
                format!("{value} {}", if value == "1" { &name[..name.len() - 1] } else { name })
            }
            Self::Control if value == "none" => "no control".to_owned(),
            Self::Flavour | Self::Control | Self::Profile => format!("{} {value}", self.name()),
            Self::Preempt | Self::Chaos | Self::Detail(_) => format!("{}={value}", self.name()),
        }
    }

    /// Where a value comes among others.
    pub(super) fn rank(&self, value: &str, variants: &[String]) -> (u64, String) {
        let position = |list: &[&str]| list.iter().position(|&known| known == value);
        let rank = match self {
            Self::Preempt => position(&["none", "voluntary", "lazy", "full"]),
            Self::Mode => position(&["real-time", "deterministic"]),
            Self::Control | Self::Chaos => position(&["none"]),
            Self::Flavour => position(&["default"]),
            // What is stacked comes after the first of its parts.
            Self::Variant => {
                let mut parts = value.split('+');
                let first = parts.next().unwrap_or_default();
                let more = usize::from(parts.next().is_some());
                variants.iter().position(|known| known == first).map(|at| 2 * at + more)
            }
            _ => None,
        };
        let rank = rank.map(|rank| rank as u64).or_else(|| number(value));
        (rank.unwrap_or(u64::MAX), value.to_owned())
    }
}

/// A number, or a size as 4K or 2M.
fn number(value: &str) -> Option<u64> {
    let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &value[digits.len()..] {
        "" => 1,
        "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        "G" | "GiB" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_in_the_order_that_people_expect() {
        let sorted = |axis: Axis, mut values: Vec<&'static str>| {
            values.sort_by_key(|value| axis.rank(value, &["stock".into(), "cure".into()]));
            values
        };
        assert_eq!(sorted(Axis::Preempt, vec!["full", "none", "lazy"]), ["none", "lazy", "full"]);
        assert_eq!(sorted(Axis::Cpus, vec!["16", "2", "8"]), ["2", "8", "16"]);
        assert_eq!(sorted(Axis::Detail("folio".into()), vec!["2M", "64K", "4K"]), ["4K", "64K", "2M"]);
        assert_eq!(
            sorted(Axis::Variant, vec!["a+b", "cure", "cure+x", "stock"]),
            ["stock", "cure", "cure+x", "a+b"]
        );
    }

    #[test]
    fn values_are_said() {
        assert_eq!(Axis::Cpus.says("1"), "1 CPU");
        assert_eq!(Axis::Cpus.says("4"), "4 CPUs");
        assert_eq!(Axis::Preempt.says("none"), "preempt=none");
        assert_eq!(Axis::Control.says("mapcount-1"), "control mapcount-1");
    }
}

//! Scenario definitions (`storm/scenarios/*.toml`) as the host needs them: parameters to check, controls to apply, limits
//! to judge by. The storm in the guest compiles the same files in; `drain-livelock.toml` explains the format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::verdict::Verdict;
use crate::cli::Preempt;
use crate::vm::Size;

/// Format read here.
const FORMAT: u32 = 1;

/// A scenario.
#[derive(Clone, Debug, Deserialize)]
pub struct Scenario {
    format: u32,
    /// Its name.
    pub name: String,
    /// One line.
    pub summary: String,
    needs: Needs,
    limits: Limits,
    #[serde(default)]
    parameters: Vec<Parameter>,
    #[serde(default)]
    conditions: Vec<Condition>,
    #[serde(default)]
    controls: Vec<Control>,
}

#[derive(Clone, Debug, Deserialize)]
struct Needs {
    gpus: u32,
    cpus: u32,
    preempt: Vec<Preempt>,
    #[serde(default)]
    command_line: Vec<String>,
    vram: Option<Size>,
    #[serde(default)]
    vfio: bool,
    memory: Option<Size>,
}

#[derive(Clone, Debug, Deserialize)]
struct Limits {
    no_progress_ms: u64,
    run_ms: Option<u64>,
    after_complaint_ms: Option<u64>,
    starvation_ms: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    id: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Parameter {
    name: String,
    default: Value,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Kind {
    Integer { min: u64, max: u64 },
    Flag {},
    Choice { choices: Vec<String> },
    Text {},
}

/// A run with one condition of the bug removed.
#[derive(Clone, Debug, Deserialize)]
pub struct Control {
    /// Its name.
    pub name: String,
    /// The condition that it removes.
    pub removes: String,
    /// How.
    pub summary: String,
    /// The verdict that it must get, on every variant.
    pub expect: Verdict,
    #[serde(default)]
    parameters: BTreeMap<String, Value>,
    /// Preemption model that it boots with.
    pub preempt: Option<Preempt>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Value {
    Flag(bool),
    Integer(u64),
    Choice(String),
}

impl Value {
    fn text(&self) -> String {
        match self {
            Self::Flag(flag) => u8::from(*flag).to_string(),
            Self::Integer(integer) => integer.to_string(),
            Self::Choice(word) => word.clone(),
        }
    }
}

/// Why a scenario cannot be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such scenario.
    #[error("there is no scenario '{name}'; there are: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No such parameter or control.
    #[error("scenario {scenario} has no {what} '{name}'; it has: {known}")]
    UnknownPart {
        /// The scenario.
        scenario: String,
        /// `parameter` or `control`.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A value that the parameter cannot have.
    #[error("parameter {name} cannot be '{value}': it is {allowed}")]
    BadValue {
        /// The parameter.
        name: String,
        /// What was asked for.
        value: String,
        /// What it may be.
        allowed: String,
    },
    /// The machine is too small.
    #[error("scenario {scenario} needs {needed} {what}, the machine has {has}")]
    TooSmall {
        /// The scenario.
        scenario: String,
        /// `CPUs` or `GPUs`.
        what: &'static str,
        /// At least.
        needed: u32,
        /// What there is.
        has: u32,
    },
    /// The file cannot be used.
    #[error("cannot use {}: {why}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// The user asked for something that does not exist or does not fit; otherwise the tree is broken.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        !matches!(self, Self::File { .. })
    }
}

impl Scenario {
    /// Reads the scenario of this name from the folder of scenarios.
    pub fn load(dir: &Path, name: &str) -> Result<Self, Error> {
        let file = |path: &Path, why: &dyn std::fmt::Display| Error::File {
            path: path.into(),
            why: why.to_string(),
        };
        let mut known = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|e| file(dir, &e))? {
            let path = entry.map_err(|e| file(dir, &e))?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            if let Some(stem) = stem.filter(|_| path.extension().is_some_and(|extension| extension == "toml"))
            {
                known.push(stem.to_owned());
            }
        }
        known.sort();
        if !known.iter().any(|known| known == name) {
            return Err(Error::Unknown { name: name.to_owned(), known: known.join(", ") });
        }
        let path = dir.join(format!("{name}.toml"));
        let text = std::fs::read_to_string(&path).map_err(|e| file(&path, &e))?;
        let scenario: Self = toml::from_str(&text).map_err(|e| file(&path, &e))?;
        scenario.check().map_err(|why| Error::File { path, why })?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("it has format {}, this hmmstorm reads {FORMAT}", self.format));
        }
        for control in &self.controls {
            if !self.conditions.iter().any(|condition| condition.id == control.removes) {
                return Err(format!(
                    "control {} removes '{}', which is no condition",
                    control.name, control.removes
                ));
            }
            self.parameters(Some(control), &[]).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// *T* of the verdicts: without a completion for so long a run is stuck.
    #[must_use]
    pub fn no_progress(&self) -> Duration {
        Duration::from_millis(self.limits.no_progress_ms)
    }

    /// Judges by another *T*.
    pub fn set_no_progress(&mut self, limit: Duration) {
        self.limits.no_progress_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    }

    /// Host time that it may take, if it is not the profile's to say.
    #[must_use]
    pub fn run_limit(&self) -> Option<Duration> {
        self.limits.run_ms.map(Duration::from_millis)
    }

    /// Host time for which it goes on after the kernel complained, if it is not ended for that.
    #[must_use]
    pub fn after_complaint(&self) -> Option<Duration> {
        self.limits.after_complaint_ms.map(Duration::from_millis)
    }

    /// Guest time after which a worker inside one operation, while others complete theirs, starves. None: a worker may wait
    /// for others, or for long.
    #[must_use]
    pub fn starvation(&self) -> Option<Duration> {
        self.limits.starvation_ms.map(Duration::from_millis)
    }

    /// Preemption models under which the scenario shows what it is for.
    #[must_use]
    pub fn preempt(&self) -> &[Preempt] {
        &self.needs.preempt
    }

    /// What the guest kernel's command line needs for it, before the user's own words.
    #[must_use]
    pub fn command_line(&self) -> &[String] {
        &self.needs.command_line
    }

    /// Whether the GPUs are user space's, through vfio-pci.
    #[must_use]
    pub fn vfio(&self) -> bool {
        self.needs.vfio
    }

    /// VRAM of each GPU, unless the user says otherwise.
    #[must_use]
    pub fn vram(&self) -> Option<Size> {
        self.needs.vram
    }

    /// Guest memory, unless the user says otherwise.
    #[must_use]
    pub fn memory(&self) -> Option<Size> {
        self.needs.memory
    }

    /// The least number of CPUs.
    #[must_use]
    pub fn least_cpus(&self) -> u32 {
        self.needs.cpus
    }

    /// Its numeric parameters: name, least value, default.
    pub fn numbers(&self) -> impl Iterator<Item = (String, u64, u64)> {
        self.parameters.iter().filter_map(|parameter| match (&parameter.kind, &parameter.default) {
            (Kind::Integer { min, .. }, Value::Integer(default)) => {
                Some((parameter.name.clone(), *min, *default))
            }
            _ => None,
        })
    }

    /// The control of this name.
    pub fn control(&self, name: &str) -> Result<&Control, Error> {
        let found = self.controls.iter().find(|control| control.name == name);
        found.ok_or_else(|| {
            self.unknown("control", name, self.controls.iter().map(|control| control.name.as_str()))
        })
    }

    /// Parameters that differ from their defaults: what the control sets, then what the user sets. In the storm's own spelling, so
    /// that the guest's command line, which the log of a deterministic run depends on, says the same of the same run.
    pub fn parameters(
        &self,
        control: Option<&Control>,
        overrides: &[(String, String)],
    ) -> Result<BTreeMap<String, String>, Error> {
        let set = control
            .iter()
            .flat_map(|control| &control.parameters)
            .map(|(name, value)| (name.clone(), value.text()));
        let mut values = BTreeMap::new();
        for (name, value) in set.chain(overrides.iter().cloned()) {
            let parameter = self.parameters.iter().find(|parameter| parameter.name == name);
            let parameter = parameter.ok_or_else(|| {
                self.unknown(
                    "parameter",
                    &name,
                    self.parameters.iter().map(|parameter| parameter.name.as_str()),
                )
            })?;
            if !parameter.kind.allows(&value) {
                return Err(Error::BadValue { name, value, allowed: parameter.kind.allowed() });
            }
            let value = parameter.kind.spelt(&value);
            // A default that takes back what the control sets has to be said.
            if value == parameter.default.text() && !values.contains_key(&name) {
                continue;
            }
            values.insert(name, value);
        }
        Ok(values)
    }

    /// Every parameter in force: the defaults, and on top what [`Scenario::parameters`] gave. As the storm writes them,
    /// whatever the user's spelling.
    #[must_use]
    pub fn in_force(&self, set: &BTreeMap<String, String>) -> BTreeMap<String, String> {
        let value = |parameter: &Parameter| {
            let text = set.get(&parameter.name).cloned().unwrap_or_else(|| parameter.default.text());
            parameter.kind.spelt(&text)
        };
        self.parameters.iter().map(|parameter| (parameter.name.clone(), value(parameter))).collect()
    }

    /// Whether a machine of this size can run it.
    pub fn fits(&self, cpus: u32, gpus: u32) -> Result<(), Error> {
        for (what, needed, has) in [("CPUs", self.needs.cpus, cpus), ("GPUs", self.needs.gpus, gpus)] {
            if has < needed {
                return Err(Error::TooSmall { scenario: self.name.clone(), what, needed, has });
            }
        }
        Ok(())
    }

    fn unknown<'a>(&self, what: &'static str, name: &str, known: impl Iterator<Item = &'a str>) -> Error {
        let known = known.collect::<Vec<_>>().join(", ");
        let known = if known.is_empty() { "none".to_owned() } else { known };
        Error::UnknownPart { scenario: self.name.clone(), what, name: name.to_owned(), known }
    }
}

impl Kind {
    fn allows(&self, value: &str) -> bool {
        match self {
            Self::Integer { min, max } => {
                value.parse::<u64>().is_ok_and(|value| (min..=max).contains(&&value))
            }
            Self::Flag {} => matches!(value, "0" | "1" | "true" | "false"),
            Self::Choice { choices } => choices.iter().any(|choice| choice == value),
            Self::Text {} => !value.contains(char::is_whitespace),
        }
    }

    /// An allowed value as the storm writes it.
    fn spelt(&self, value: &str) -> String {
        match (self, value) {
            (Self::Flag {}, "true") => "1".to_owned(),
            (Self::Flag {}, "false") => "0".to_owned(),
            (Self::Integer { .. }, digits) => {
                digits.parse::<u64>().map_or_else(|_| digits.to_owned(), |n| n.to_string())
            }
            (_, text) => text.to_owned(),
        }
    }

    fn allowed(&self) -> String {
        match self {
            Self::Integer { min, max } => format!("an integer from {min} to {max}"),
            Self::Flag {} => "a flag, 0 or 1".to_owned(),
            Self::Choice { choices } => format!("one of {}", choices.join(", ")),
            Self::Text {} => "a text without blanks".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/scenarios")
    }

    fn drain() -> Scenario {
        Scenario::load(&shipped(), "drain-livelock").expect("drain-livelock")
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn shipped_scenarios_are_sound() {
        for entry in std::fs::read_dir(shipped()).expect("storm/scenarios") {
            let path = entry.expect("an entry").path();
            let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name").to_owned();
            let scenario = Scenario::load(&shipped(), &name).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(scenario.name, name);
            assert!(scenario.no_progress() >= Duration::from_secs(1));
        }
    }

    #[test]
    fn each_control_of_the_livelock_removes_a_condition_and_must_pass() {
        let scenario = drain();
        for name in ["device-before-system", "mapcount-1", "same-owner", "drained-cpu", "preempt-full"] {
            let control = scenario.control(name).expect(name);
            assert_eq!(control.expect, Verdict::Pass);
            let changed = scenario.parameters(Some(control), &[]).expect("parameters");
            assert!(changed.is_empty() != control.preempt.is_none(), "{name} changes one thing");
        }
    }

    #[test]
    fn overrides_win_over_controls_and_are_checked() {
        let scenario = drain();
        let control = scenario.control("mapcount-1").expect("mapcount-1");
        let values = scenario
            .parameters(Some(control), &[pair("mapcount", "2"), pair("rounds", "7")])
            .expect("parameters");
        assert_eq!(values, BTreeMap::from([pair("mapcount", "2"), pair("rounds", "7")]));
        for bad in [
            pair("rounds", "none"),
            pair("rounds", "0"),
            pair("no-such-parameter", "1"),
            pair("order", "x"),
            pair("drained", "2"),
        ] {
            let error = scenario.parameters(None, std::slice::from_ref(&bad)).expect_err("refused");
            assert!(error.is_usage(), "{bad:?}: {error}");
        }
    }

    #[test]
    fn spelling_does_not_change_what_is_in_force() {
        let scenario = drain();
        let defaults = scenario.in_force(&BTreeMap::new());
        assert_eq!(
            (defaults["rounds"].as_str(), defaults["drained"].as_str(), defaults["order"].as_str()),
            ("60", "0", "system-first")
        );
        let spelt =
            BTreeMap::from([pair("rounds", "060"), pair("drained", "false"), pair("order", "system-first")]);
        assert_eq!(scenario.in_force(&spelt), defaults);
        assert_eq!(scenario.in_force(&BTreeMap::from([pair("drained", "true")]))["drained"], "1");
        // Nor what the guest is told: two logs of one run would differ by their first line.
        let told = |set: &[(String, String)]| scenario.parameters(None, set).expect("parameters");
        assert_eq!(
            told(&[pair("rounds", "060"), pair("folio", "4K"), pair("drained", "0")]),
            BTreeMap::new()
        );
        assert_eq!(told(&[pair("rounds", "07")]), told(&[pair("rounds", "7")]));
    }

    #[test]
    fn unknown_names_list_the_known_ones() {
        assert!(
            Scenario::load(&shipped(), "drain").expect_err("unknown").to_string().contains("drain-livelock")
        );
        assert!(drain().control("x").expect_err("unknown").to_string().contains("mapcount-1"));
    }

    #[test]
    fn small_machines_are_refused() {
        assert!(drain().fits(4, 2).is_ok());
        assert!(drain().fits(1, 2).expect_err("too small").to_string().contains("CPUs"));
        assert!(drain().fits(4, 1).expect_err("too small").to_string().contains("GPUs"));
    }
}

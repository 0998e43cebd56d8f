//! Scenario definitions (`storm/scenarios/*.toml`), which the host reads too, and parameters checked against them.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use thiserror::Error;

/// Format that [`Definition`] reads.
const FORMAT: u32 = 1;

/// A scenario, as its file describes it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Definition {
    format: u32,
    /// Its name.
    pub(crate) name: String,
    /// One line.
    pub(crate) summary: String,
    /// What it provokes, and why.
    pub(crate) provokes: String,
    /// The least that the machine must have.
    pub(crate) needs: Needs,
    /// When a run counts as stuck; the host's to judge.
    #[expect(dead_code, reason = "read by the host; declared so that a misspelt key is an error here too")]
    limits: Limits,
    /// Verdict by kernel variant.
    pub(crate) expect: BTreeMap<String, String>,
    /// What must hold for the bug to show.
    #[serde(default)]
    pub(crate) conditions: Vec<Condition>,
    /// Invariants that are not judged after it.
    #[serde(default)]
    pub(crate) waived: Vec<Waiver>,
    /// Parameters.
    #[serde(default)]
    pub(crate) parameters: Vec<Parameter>,
    /// Runs with one condition removed.
    #[serde(default)]
    pub(crate) controls: Vec<Control>,
}

/// An invariant that a scenario cannot hold the kernel to.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Waiver {
    /// Its name.
    pub(crate) invariant: String,
    /// Why not.
    #[expect(dead_code, reason = "for who reads the definition, which has to give a reason")]
    why: String,
}

/// The least that the machine must have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Needs {
    /// GPUs.
    pub(crate) gpus: usize,
    /// CPUs online.
    pub(crate) cpus: usize,
    /// Preemption models under which `expect` holds.
    pub(crate) preempt: Vec<String>,
    /// What the kernel's command line needs; the host adds it.
    #[serde(default)]
    #[expect(dead_code, reason = "read by the host; declared so that a misspelt key is an error here too")]
    pub(crate) command_line: Vec<String>,
    /// VRAM that each GPU has unless the user says otherwise; the host sees to it.
    #[serde(default)]
    #[expect(dead_code, reason = "read by the host; declared so that a misspelt key is an error here too")]
    pub(crate) vram: Option<String>,
    /// The GPUs are on vfio-pci behind an IOMMU; the host sees to it.
    #[serde(default)]
    pub(crate) vfio: bool,
    /// Guest memory unless the user says otherwise; the host sees to it.
    #[serde(default)]
    #[expect(dead_code, reason = "read by the host; declared so that a misspelt key is an error here too")]
    pub(crate) memory: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "read by the host; declared so that a misspelt key is an error here too")]
struct Limits {
    no_progress_ms: u64,
    run_ms: Option<u64>,
    after_complaint_ms: Option<u64>,
    starvation_ms: Option<u64>,
}

/// One thing that must hold for the bug to show.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Condition {
    /// Short name.
    pub(crate) id: String,
    /// What holds.
    pub(crate) text: String,
    /// Where in the kernel one can read it.
    pub(crate) source: String,
}

/// A parameter.
#[derive(Debug, Deserialize)]
pub(crate) struct Parameter {
    /// Its name.
    pub(crate) name: String,
    /// What it does.
    pub(crate) doc: String,
    /// What it may be, and its default.
    #[serde(flatten)]
    pub(crate) kind: Kind,
}

/// Type, range and default of a parameter.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum Kind {
    /// An integer in a range, both ends included.
    Integer {
        /// Default.
        default: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// Yes or no: `1`/`0` or `true`/`false`.
    Flag {
        /// Default.
        default: bool,
    },
    /// One of some words.
    Choice {
        /// Default.
        default: String,
        /// The words.
        choices: Vec<String>,
    },
    /// Any text without blanks, which the kernel's command line could not carry.
    Text {
        /// Default.
        default: String,
    },
}

/// A run with one condition removed.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Control {
    /// Its name.
    pub(crate) name: String,
    /// The condition.
    pub(crate) removes: String,
    /// How.
    pub(crate) summary: String,
    /// Verdict, on every variant.
    pub(crate) expect: String,
    /// Parameters that it sets.
    #[serde(default)]
    pub(crate) parameters: BTreeMap<String, Value>,
    /// Preemption model that it boots with.
    pub(crate) preempt: Option<String>,
}

/// Value of a parameter.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(crate) enum Value {
    /// Of a flag.
    Flag(bool),
    /// Of an integer.
    Integer(u64),
    /// Of a choice, or a text.
    Choice(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{}", u8::from(*flag)),
            Self::Integer(integer) => integer.fmt(f),
            Self::Choice(word) => word.fmt(f),
        }
    }
}

/// A parameter or a definition that cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum DefinitionError {
    /// The file does not parse.
    #[error("scenario definition: {0}")]
    Parse(String),
    /// The file is of another format.
    #[error("scenario definition has format {0}, this storm reads format {FORMAT}")]
    Format(u32),
    /// No such scenario.
    #[error("there is no scenario `{name}`; there are: {known}")]
    UnknownScenario {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No such parameter.
    #[error("scenario {scenario} has no parameter `{name}`; it has: {known}")]
    UnknownParameter {
        /// The scenario.
        scenario: String,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// No such control.
    #[error("scenario {scenario} has no control `{name}`; it has: {known}")]
    UnknownControl {
        /// The scenario.
        scenario: String,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A value that the parameter cannot have.
    #[error("parameter {name} cannot be `{value}`: it is {allowed}")]
    BadValue {
        /// The parameter.
        name: String,
        /// What was asked for.
        value: String,
        /// What it may be.
        allowed: String,
    },
}

fn list<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let list = words.into_iter().collect::<Vec<_>>().join(", ");
    if list.is_empty() { "none".to_owned() } else { list }
}

impl Kind {
    /// The default.
    pub(crate) fn default_value(&self) -> Value {
        match self {
            Self::Integer { default, .. } => Value::Integer(*default),
            Self::Flag { default } => Value::Flag(*default),
            Self::Choice { default, .. } | Self::Text { default } => Value::Choice(default.clone()),
        }
    }

    /// What a value may be, in words.
    pub(crate) fn allowed(&self) -> String {
        match self {
            Self::Integer { min, max, .. } => format!("an integer from {min} to {max}"),
            Self::Flag { .. } => "a flag, 0 or 1".to_owned(),
            Self::Choice { choices, .. } => format!("one of {}", list(choices.iter().map(String::as_str))),
            Self::Text { .. } => "a text without blanks".to_owned(),
        }
    }

    fn allows(&self, value: &Value) -> bool {
        match (self, value) {
            (Self::Integer { min, max, .. }, Value::Integer(integer)) => (min..=max).contains(&integer),
            (Self::Flag { .. }, Value::Flag(_)) => true,
            (Self::Choice { choices, .. }, Value::Choice(word)) => choices.contains(word),
            (Self::Text { .. }, Value::Choice(text)) => !text.contains(char::is_whitespace),
            _ => false,
        }
    }

    fn parse(&self, text: &str) -> Option<Value> {
        let value = match self {
            Self::Integer { .. } => Value::Integer(text.parse().ok()?),
            Self::Flag { .. } => Value::Flag(match text {
                "1" | "true" => true,
                "0" | "false" => false,
                _ => return None,
            }),
            Self::Choice { .. } | Self::Text { .. } => Value::Choice(text.to_owned()),
        };
        self.allows(&value).then_some(value)
    }
}

impl Definition {
    /// Reads a definition.
    ///
    /// # Errors
    /// [`DefinitionError::Parse`], [`DefinitionError::Format`]; [`DefinitionError::BadValue`] for a default or a control
    /// that breaks the file's own rules, [`DefinitionError::UnknownParameter`] for a control of none.
    pub(crate) fn parse(text: &str) -> Result<Self, DefinitionError> {
        let definition: Self = toml::from_str(text).map_err(|e| DefinitionError::Parse(e.to_string()))?;
        if definition.format != FORMAT {
            return Err(DefinitionError::Format(definition.format));
        }
        for parameter in &definition.parameters {
            parameter.check(&parameter.kind.default_value())?;
        }
        for (name, value) in definition.controls.iter().flat_map(|control| &control.parameters) {
            definition.parameter(name)?.check(value)?;
        }
        Ok(definition)
    }

    fn parameter(&self, name: &str) -> Result<&Parameter, DefinitionError> {
        self.parameters.iter().find(|p| p.name == name).ok_or_else(|| DefinitionError::UnknownParameter {
            scenario: self.name.clone(),
            name: name.to_owned(),
            known: list(self.parameters.iter().map(|p| p.name.as_str())),
        })
    }

    /// The control `name`.
    ///
    /// # Errors
    /// [`DefinitionError::UnknownControl`].
    pub(crate) fn control(&self, name: &str) -> Result<&Control, DefinitionError> {
        self.controls.iter().find(|c| c.name == name).ok_or_else(|| DefinitionError::UnknownControl {
            scenario: self.name.clone(),
            name: name.to_owned(),
            known: list(self.controls.iter().map(|c| c.name.as_str())),
        })
    }

    /// The parameters in force: the defaults, then what `control` sets, then `overrides`, as text.
    ///
    /// # Errors
    /// [`DefinitionError::UnknownParameter`], [`DefinitionError::BadValue`].
    pub(crate) fn parameters<'a>(
        &self,
        control: Option<&Control>,
        overrides: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Parameters, DefinitionError> {
        let mut values: BTreeMap<_, _> =
            self.parameters.iter().map(|p| (p.name.clone(), p.kind.default_value())).collect();
        values.extend(control.iter().flat_map(|c| c.parameters.clone()));
        for (name, text) in overrides {
            let parameter = self.parameter(name)?;
            let value = parameter.kind.parse(text).ok_or_else(|| parameter.bad_value(text))?;
            values.insert(name.to_owned(), value);
        }
        Ok(Parameters(values))
    }
}

impl Parameter {
    fn bad_value(&self, value: &str) -> DefinitionError {
        DefinitionError::BadValue {
            name: self.name.clone(),
            value: value.to_owned(),
            allowed: self.kind.allowed(),
        }
    }

    fn check(&self, value: &Value) -> Result<(), DefinitionError> {
        if self.kind.allows(value) { Ok(()) } else { Err(self.bad_value(&value.to_string())) }
    }
}

/// Parameters in force: every one of the definition, each of its type and in its range.
#[derive(Clone, Debug)]
pub(crate) struct Parameters(BTreeMap<String, Value>);

impl Parameters {
    /// The integer `name`.
    ///
    /// # Panics
    /// If the definition has no such integer; a test builds every scenario from its definition.
    pub(crate) fn integer(&self, name: &str) -> u64 {
        match self.0.get(name) {
            Some(Value::Integer(integer)) => *integer,
            other => panic!("no integer parameter `{name}`: {other:?}"),
        }
    }

    /// The flag `name`.
    ///
    /// # Panics
    /// As [`Parameters::integer`].
    pub(crate) fn flag(&self, name: &str) -> bool {
        match self.0.get(name) {
            Some(Value::Flag(flag)) => *flag,
            other => panic!("no flag parameter `{name}`: {other:?}"),
        }
    }

    /// The choice `name`.
    ///
    /// # Panics
    /// As [`Parameters::integer`].
    pub(crate) fn choice(&self, name: &str) -> &str {
        match self.0.get(name) {
            Some(Value::Choice(word)) => word,
            other => panic!("no choice parameter `{name}`: {other:?}"),
        }
    }

    /// The text `name`.
    ///
    /// # Panics
    /// If the definition has none.
    pub(crate) fn text(&self, name: &str) -> &str {
        self.choice(name)
    }

    /// All of them as text, as they can be given on a command line.
    pub(crate) fn to_text(&self) -> BTreeMap<String, String> {
        self.0.iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        format = 1
        name = "n"
        summary = "s"
        provokes = "p"
        needs = { gpus = 1, cpus = 2, preempt = ["none"] }
        limits = { no_progress_ms = 1 }
        expect = { trylock = "pass" }
        conditions = [{ id = "c", text = "t", source = "s" }]
        controls = [{ name = "k", removes = "c", summary = "s", expect = "pass", parameters = { size = 9 } }]
        [[parameters]]
        name = "size"
        type = "integer"
        default = 4
        min = 1
        max = 9
        doc = "d"
        [[parameters]]
        name = "order"
        type = "choice"
        default = "up"
        choices = ["up", "down"]
        doc = "d"
        [[parameters]]
        name = "wet"
        type = "flag"
        default = true
        doc = "d"
    "#;

    fn definition() -> Definition {
        Definition::parse(TEXT).expect("a valid definition")
    }

    #[test]
    fn overrides_beat_the_control_which_beats_the_defaults() {
        let definition = definition();
        let control = definition.control("k").expect("it is there");
        let text = |control, overrides: &[(&'static str, &'static str)]| {
            let parameters = definition.parameters(control, overrides.iter().copied()).expect("valid");
            parameters.to_text().into_values().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(text(None, &[]), "up 4 1");
        assert_eq!(text(Some(control), &[("wet", "false")]), "up 9 0");
        assert_eq!(text(Some(control), &[("size", "2"), ("order", "down")]), "down 2 1");
    }

    #[test]
    fn bad_parameters_say_what_is_allowed() {
        let error =
            |name, value| definition().parameters(None, [(name, value)]).expect_err("invalid").to_string();
        assert_eq!(error("size", "10"), "parameter size cannot be `10`: it is an integer from 1 to 9");
        assert_eq!(error("size", "x"), "parameter size cannot be `x`: it is an integer from 1 to 9");
        assert_eq!(error("size", "-1"), "parameter size cannot be `-1`: it is an integer from 1 to 9");
        assert_eq!(error("order", "left"), "parameter order cannot be `left`: it is one of up, down");
        assert_eq!(error("wet", "2"), "parameter wet cannot be `2`: it is a flag, 0 or 1");
        assert_eq!(error("sise", "2"), "scenario n has no parameter `sise`; it has: size, order, wet");
        assert_eq!(
            definition().control("x").expect_err("unknown").to_string(),
            "scenario n has no control `x`; it has: k"
        );
    }

    #[test]
    fn broken_definitions_are_refused() {
        let parse = |from, to| Definition::parse(&TEXT.replace(from, to)).expect_err("broken").to_string();
        assert!(parse("default = 4", "default = 12").contains("size cannot be `12`"));
        assert!(parse("size = 9", "size = 10").contains("size cannot be `10`"));
        assert!(parse("size = 9", "seize = 9").contains("no parameter `seize`"));
        assert!(parse("size = 9", "size = true").contains("size cannot be `1`"));
        assert!(parse("format = 1", "format = 2").contains("format 2"));
        assert!(parse("summary = \"s\"\n", "sumary = \"s\"\n").contains("sumary"));
        assert!(parse("max = 9", "maxi = 9").contains("max"));
    }
}

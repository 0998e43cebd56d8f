//! The table of cases (`storm/selftest.toml`), and what a record must be like to be right.

use std::path::Path;

use serde::Deserialize;

use crate::judge::record::Record;
use crate::judge::stack::base_name;
use crate::judge::verdict::Verdict;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    case: Vec<Case>,
}

/// A guest in a known state.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    /// Its name.
    pub(super) name: String,
    /// One line.
    pub(super) summary: String,
    /// Arguments of `hmmstorm storm`.
    pub(super) run: Vec<String>,
    /// The right verdict.
    pub(super) expect: Verdict,
    /// Function that must be among the finding's frames.
    #[serde(default)]
    names: Option<String>,
    /// Whether progress must have come back after more than *T*; none if either will do.
    #[serde(default)]
    recovered: Option<bool>,
    /// Busy loops on each CPU of the host meanwhile.
    #[serde(default)]
    pub(super) host_load: Option<u32>,
}

/// Reads the table.
pub(super) fn load(path: &Path) -> Result<Vec<Case>, String> {
    let failed = |why: &dyn std::fmt::Display| format!("cannot read {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    let file: File = toml::from_str(&text).map_err(|error| failed(&error))?;
    Ok(file.case)
}

/// The cases of these names, in the table's order; all of them without names.
pub(super) fn choose<'a>(all: &'a [Case], names: &[String]) -> Result<Vec<&'a Case>, String> {
    if let Some(name) = names.iter().find(|name| !all.iter().any(|case| case.name == **name)) {
        let known: Vec<&str> = all.iter().map(|case| case.name.as_str()).collect();
        return Err(format!("there is no case '{name}'; there are: {}", known.join(", ")));
    }
    Ok(all.iter().filter(|case| names.is_empty() || names.contains(&case.name)).collect())
}

impl Case {
    /// What of the record is not as it should be.
    pub(super) fn compare(&self, record: &Record) -> Vec<String> {
        let judgement = &record.judgement;
        let mut wrong = Vec::new();
        if judgement.verdict != self.expect {
            let Verdict::HarnessError = judgement.verdict else {
                return vec![format!(
                    "{} in place of {}: {}",
                    judgement.verdict, self.expect, judgement.reason
                )];
            };
            return vec![format!("no verdict in place of {}: {}", self.expect, judgement.reason)];
        }
        let named = |name: &str| judgement.frames.iter().any(|frame| base_name(frame) == name);
        if let Some(name) = self.names.as_ref().filter(|name| !named(name)) {
            wrong.push(format!("the finding does not name {name}: {:?}", judgement.frames));
        }
        match (self.recovered, &judgement.recovered) {
            (Some(true), None) => wrong.push("no word of the progress that came back".to_owned()),
            (Some(false), Some(found)) => {
                wrong.push(format!("progress is said to have come back after {} ms", found.longest_ms));
            }
            _ => {}
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped() -> Vec<Case> {
        load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/selftest.toml")).expect("the table")
    }

    #[test]
    fn every_verdict_that_a_kernel_can_earn_has_a_case() {
        let cases = shipped();
        for verdict in [
            Verdict::Pass,
            Verdict::Livelock,
            Verdict::Deadlock,
            Verdict::DeviceStall,
            Verdict::Corruption,
            Verdict::Crash,
        ] {
            assert!(cases.iter().any(|case| case.expect == verdict), "{verdict}");
        }
        let mut names: Vec<_> = cases.iter().map(|case| &case.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), cases.len(), "a name is given twice");
    }

    #[test]
    fn every_known_bug_has_a_control_that_passes() {
        let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/known-bugs.toml");
        let cases = load(&table).expect("the table");
        let (controls, bugs): (Vec<_>, Vec<_>) =
            cases.iter().partition(|case| case.run.iter().any(|argument| argument == "no-trigger"));
        assert!(!bugs.is_empty());
        for bug in bugs {
            let control = controls.iter().find(|control| control.name == format!("{}-control", bug.name));
            assert!(control.is_some_and(|control| control.expect == Verdict::Pass), "{}", bug.name);
        }
    }

    #[test]
    fn cases_are_chosen_by_name() {
        let cases = shipped();
        let chosen = choose(&cases, &["oops".to_owned(), "healthy".to_owned()]).expect("both exist");
        assert_eq!(chosen.iter().map(|case| case.name.as_str()).collect::<Vec<_>>(), ["healthy", "oops"]);
        assert_eq!(choose(&cases, &[]).expect("all").len(), cases.len());
        assert!(choose(&cases, &["no".to_owned()]).expect_err("unknown").contains("healthy"));
    }
}

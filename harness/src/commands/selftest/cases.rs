//! The table of cases (`storm/selftest.toml`), and what a record must be like to be right.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::judge::record::Record;
use crate::judge::stack::base_name;
use crate::judge::verdict::Verdict;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    column: Vec<Column>,
    case: Vec<Case>,
}

/// Other options under which the cases of a table are run as well.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Column {
    name: String,
    /// Options of `hmmstorm storm` for every case.
    options: Vec<String>,
}

/// What is right for a case in a column.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct There {
    expect: Verdict,
    #[serde(default)]
    or: Vec<Verdict>,
    #[serde(default)]
    names: Option<String>,
}

/// A table, or one column of it.
#[derive(Debug)]
pub(super) struct Table {
    /// Its cases, with what is right there.
    pub(super) cases: Vec<Case>,
    /// Options for every case.
    pub(super) options: Vec<String>,
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
    /// Others that will do: where memory is not what the kernel takes it for, what follows is a matter of luck.
    #[serde(default)]
    or: Vec<Verdict>,
    /// Function that must be among the finding's frames.
    #[serde(default)]
    names: Option<String>,
    /// Whether progress must have come back after more than *T*; none if either will do.
    #[serde(default)]
    recovered: Option<bool>,
    /// Busy loops on each CPU of the host meanwhile.
    #[serde(default)]
    pub(super) host_load: Option<u32>,
    /// What is right in other columns, by their names; elsewhere it is what is right here.
    #[serde(default, rename = "in")]
    there: BTreeMap<String, There>,
}

/// Reads the table, or a column of it.
pub(super) fn load(path: &Path, column: Option<&str>) -> Result<Table, String> {
    let failed = |why: &dyn std::fmt::Display| format!("cannot read {}: {why}", path.display());
    let text = std::fs::read_to_string(path).map_err(|error| failed(&error))?;
    let File { column: columns, case: mut cases } = toml::from_str(&text).map_err(|error| failed(&error))?;
    let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
    let known = || format!("its columns are: {}", names.join(", "));
    for case in &cases {
        if let Some(name) = case.there.keys().find(|name| !names.contains(&name.as_str())) {
            return Err(failed(&format!("case {} is about a column '{name}'; {}", case.name, known())));
        }
    }
    let Some(name) = column else { return Ok(Table { cases, options: Vec::new() }) };
    let Some(column) = columns.iter().find(|column| column.name == name) else {
        return Err(failed(&format!("there is no column '{name}'; {}", known())));
    };
    for case in &mut cases {
        if let Some(there) = case.there.remove(name) {
            (case.expect, case.or, case.names) = (there.expect, there.or, there.names);
        }
    }
    Ok(Table { cases, options: column.options.clone() })
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
        if judgement.verdict != self.expect && !self.or.contains(&judgement.verdict) {
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
        let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/selftest.toml");
        load(&table, None).expect("the table").cases
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
        let cases = load(&table, None).expect("the table").cases;
        let (controls, bugs): (Vec<_>, Vec<_>) =
            cases.iter().partition(|case| case.run.iter().any(|argument| argument == "no-trigger"));
        assert!(!bugs.is_empty());
        for bug in bugs {
            let control = controls.iter().find(|control| control.name == format!("{}-control", bug.name));
            assert!(control.is_some_and(|control| control.expect == Verdict::Pass), "{}", bug.name);
        }
    }

    #[test]
    fn a_column_has_its_options_and_its_verdicts() {
        let table = Path::new(env!("CARGO_MANIFEST_DIR")).join("../storm/known-bugs.toml");
        let expect = |column, name: &str| {
            let table = load(&table, column).expect("the table");
            table.cases.iter().find(|case| case.name == name).map(|case| case.expect)
        };
        assert_eq!(expect(None, "spurious-dirty"), Some(Verdict::Corruption));
        assert_eq!(expect(Some("cured"), "spurious-dirty"), Some(Verdict::Pass));
        assert_eq!(expect(Some("cured"), "close-use-after-free"), Some(Verdict::Crash));
        assert_eq!(load(&table, Some("cured")).expect("it").options, ["--variant", "known-bugs"]);
        let torn = load(&table, Some("7.1.13")).expect("it").cases;
        let torn = torn.into_iter().find(|case| case.name == "zap-migration-entry").expect("it");
        let mut record = crate::records::union::tests::record(1);
        let right = [Verdict::Crash, Verdict::Livelock, Verdict::Pass].map(|verdict| {
            record.judgement.verdict = verdict;
            torn.compare(&record).is_empty()
        });
        assert_eq!(right, [true, true, false]);
        let error = load(&table, Some("nonsense")).expect_err("no such column");
        assert!(error.contains("its columns are: cured, 7.1.13"), "{error}");
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

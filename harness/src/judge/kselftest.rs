//! Results of a program of the kernel's selftests, from what it prints (`tools/testing/selftests/kselftest_harness.h`).
//!
//! ```text
//! #  RUN           hmm.hmm_device_private.migrate ...
//! # hmm-tests.c:1022:migrate:Expected ret (-22) == 0 (0)
//! # migrate: Test failed
//! #          FAIL  hmm.hmm_device_private.migrate
//! not ok 12 hmm.hmm_device_private.migrate
//! ```

use hmmstorm_abi::wire::event::{Event, Record};
use serde::{Deserialize, Serialize};

/// Most lines of a test that are kept: the first ones, where the reason is.
const KEPT_LINES: usize = 200;

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It passed.
    Pass,
    /// It failed.
    Fail,
    /// It could not be run here, and said so.
    Skip,
    /// Its own time limit ended it.
    Timeout,
    /// It began and never ended.
    Hung,
    /// Its turn never came.
    NotRun,
}

impl Status {
    /// As it is written in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Skip => "skip",
            Self::Timeout => "timeout",
            Self::Hung => "hung",
            Self::NotRun => "not-run",
        }
    }
}

/// One test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// Fixture, variant and test, joined by dots.
    pub name: String,
    /// How it ended.
    pub status: Status,
    /// Guest time that it took, milliseconds, if it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub milliseconds: Option<u64>,
    /// What it said of a skip.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What it printed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub output: Vec<String>,
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Tests of the plan.
    pub tests: usize,
    /// Passed.
    pub pass: usize,
    /// Failed, timeouts included.
    pub fail: usize,
    /// Skipped.
    pub skip: usize,
    /// Hung, or not run because of that.
    pub lost: usize,
}

#[derive(Debug)]
struct Running {
    name: String,
    since: u64,
    output: Vec<String>,
}

/// Reads a run as it goes on.
#[derive(Debug, Default)]
pub struct Reader {
    plan: Option<Vec<String>>,
    running: Option<Running>,
    results: Vec<TestResult>,
}

impl Reader {
    /// Takes in a record; gives the result of a test that ended with it.
    pub fn record(&mut self, record: &Record) -> Option<&TestResult> {
        match &record.event {
            Event::Tests { names } => {
                self.plan = Some(names.clone());
                None
            }
            Event::Output { line } => self.line(record.t, line),
            _ => None,
        }
    }

    /// The tests that run, once they are known.
    #[must_use]
    pub fn plan(&self) -> Option<&[String]> {
        self.plan.as_deref()
    }

    /// The test that runs now.
    #[must_use]
    pub fn running(&self) -> Option<&str> {
        self.running.as_ref().map(|running| running.name.as_str())
    }

    /// Results so far.
    #[must_use]
    pub fn results(&self) -> &[TestResult] {
        &self.results
    }

    fn line(&mut self, now: u64, line: &str) -> Option<&TestResult> {
        if let Some(name) = started(line) {
            self.running = Some(Running { name: name.to_owned(), since: now, output: Vec::new() });
            return None;
        }
        let Some(running) = &mut self.running else { return None };
        let Some((passed, reason)) = ended(line, &running.name) else {
            if running.output.len() < KEPT_LINES && !line.is_empty() {
                running.output.push(line.to_owned());
            }
            return None;
        };
        let running = self.running.take()?;
        // The harness's own last line on the test, in its columns.
        let verdict = |line: &String| line.trim_start_matches(['#', ' ']).ends_with(&running.name);
        let mut output = running.output;
        output.retain(|line| !(line.starts_with("#  ") && verdict(line)));
        let skipped = reason.as_deref().and_then(|reason| reason.strip_prefix("SKIP"));
        let status = match (passed, skipped) {
            (_, Some(_)) => Status::Skip,
            (true, None) => Status::Pass,
            (false, None) if output.iter().any(|line| line.ends_with("Test terminated by timeout")) => {
                Status::Timeout
            }
            (false, None) => Status::Fail,
        };
        let reason = skipped.map(|why| why.trim().to_owned()).or(reason).filter(|why| !why.is_empty());
        self.results.push(TestResult {
            name: running.name,
            status,
            milliseconds: Some(now.saturating_sub(running.since) / 1_000_000),
            reason,
            output,
        });
        self.results.last()
    }

    /// The results of all tests of the plan, those that did not end included.
    #[must_use]
    pub fn finish(mut self) -> Vec<TestResult> {
        let unfinished = |name: String, status, output| TestResult {
            name,
            status,
            milliseconds: None,
            reason: None,
            output,
        };
        if let Some(running) = self.running {
            self.results.push(unfinished(running.name, Status::Hung, running.output));
        }
        for name in self.plan.unwrap_or_default() {
            if !self.results.iter().any(|result| result.name == name) {
                self.results.push(unfinished(name, Status::NotRun, Vec::new()));
            }
        }
        self.results
    }
}

/// Counts results.
#[must_use]
pub fn totals(results: &[TestResult]) -> Totals {
    let mut totals = Totals { tests: results.len(), ..Totals::default() };
    for result in results {
        let count = match result.status {
            Status::Pass => &mut totals.pass,
            Status::Fail | Status::Timeout => &mut totals.fail,
            Status::Skip => &mut totals.skip,
            Status::Hung | Status::NotRun => &mut totals.lost,
        };
        *count += 1;
    }
    totals
}

/// The test that this line says begins.
fn started(line: &str) -> Option<&str> {
    line.strip_prefix("#  RUN ")?.trim().strip_suffix(" ...")
}

/// Whether the test passed, and the directive behind it, if this line is its result. What the test printed last may
/// stand before it on the same line.
fn ended(line: &str, name: &str) -> Option<(bool, Option<String>)> {
    let (before, after) = line.split_once(name)?;
    let before = before.trim_end().trim_end_matches(|c: char| c.is_ascii_digit());
    let before = before.strip_suffix("ok ")?;
    let directive = match after.split_once('#') {
        Some((_, directive)) => Some(directive.trim().to_owned()),
        None if after.trim().is_empty() => None,
        None => return None, // a longer name
    };
    Some((!before.ends_with("not "), directive))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Reader {
        let mut reader = Reader::default();
        let plan = ["f.v.one", "f.v.two", "f.v.three", "f.v.four", "f.v.five"].map(str::to_owned).to_vec();
        reader.record(&Record { t: 0, event: Event::Tests { names: plan } });
        for (index, line) in (1_u64..).zip(lines) {
            reader
                .record(&Record { t: index * 1_000_000, event: Event::Output { line: (*line).to_owned() } });
        }
        reader
    }

    #[test]
    fn every_end_is_told_apart() {
        let reader = read(&[
            "TAP version 13",
            "1..5",
            "# Starting 5 tests from 1 test cases.",
            "#  RUN           f.v.one ...",
            "#            OK  f.v.one",
            "ok 1 f.v.one",
            "#  RUN           f.v.two ...",
            "#      SKIP      DEVICE_COHERENT not available",
            "#            OK  f.v.two",
            "ok 2 f.v.two # SKIP DEVICE_COHERENT not available",
            "#  RUN           f.v.three ...",
            "# t.c:3:three:Expected ret (-22) == 0 (0)",
            "# three: Test failed",
            "#          FAIL  f.v.three",
            "not ok 3 f.v.three",
            "#  RUN           f.v.four ...",
            "# four: Test terminated by timeout",
            "half a linenot ok 4 f.v.four",
            "#  RUN           f.v.five ...",
        ]);
        assert_eq!(reader.running(), Some("f.v.five"));
        let results = reader.finish();
        let statuses: Vec<_> = results.iter().map(|result| (result.name.as_str(), result.status)).collect();
        assert_eq!(
            statuses,
            [
                ("f.v.one", Status::Pass),
                ("f.v.two", Status::Skip),
                ("f.v.three", Status::Fail),
                ("f.v.four", Status::Timeout),
                ("f.v.five", Status::Hung),
            ]
        );
        assert_eq!(results[0].milliseconds, Some(2));
        assert_eq!(results[1].reason.as_deref(), Some("DEVICE_COHERENT not available"));
        assert_eq!(results[2].output, ["# t.c:3:three:Expected ret (-22) == 0 (0)", "# three: Test failed"]);
        assert_eq!(totals(&results), Totals { tests: 5, pass: 1, fail: 2, skip: 1, lost: 1 });
    }

    #[test]
    fn tests_whose_turn_never_came_are_lost() {
        let results = read(&["#  RUN           f.v.one ...", "ok 1 f.v.one"]).finish();
        assert_eq!(totals(&results), Totals { tests: 5, pass: 1, lost: 4, ..Totals::default() });
        assert!(results[1..].iter().all(|result| result.status == Status::NotRun));
    }

    #[test]
    fn a_name_that_begins_like_another_is_another() {
        assert_eq!(ended("ok 1 f.v.migrate_fault", "f.v.migrate"), None);
        assert_eq!(ended("ok 1 f.v.migrate", "f.v.migrate"), Some((true, None)));
        assert_eq!(ended("# f.v.migrate is ok 1 day", "f.v.migrate"), None);
    }
}

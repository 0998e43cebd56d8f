//! JUnit XML: a suite for each cell, a case for each run. A verdict that was not expected is a failure, a failure of the
//! bench an error.

use std::time::Duration;

use quick_junit::{NonSuccessKind, Property, TestCase, TestCaseStatus, TestSuite};

use super::findings::{evidence, replay, reproducer, stacks};
use super::run::Run;
use super::text::one_line;
use super::{Error, Report};
use crate::judge::verdict::Verdict;

/// The report as JUnit XML.
pub(super) fn junit(report: &Report) -> Result<String, Error> {
    let mut whole = quick_junit::Report::new("hmmstorm");
    for cell in &report.layout.cells {
        let label = report.layout.label(cell);
        let mut suite = TestSuite::new(label.as_str());
        let own = report.layout.axes.iter().zip(&cell.key);
        let shared = report.layout.common.iter().map(|(axis, value)| (axis, value));
        for (axis, value) in own.chain(shared) {
            suite.add_property(Property::new(axis.name(), value.as_str()));
        }
        suite.add_test_cases(cell.runs.iter().map(|&index| case(&report.runs[index], &label)));
        whole.add_test_suite(suite);
    }
    if !report.troubles.is_empty() || !report.conflicts.is_empty() {
        // What is missing has to show in a dashboard that reads nothing but this.
        let mut suite = TestSuite::new("records");
        for trouble in &report.troubles {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Error);
            status.set_message(trouble.what.as_str());
            suite.add_test_case(TestCase::new(trouble.place.as_str(), status));
        }
        for conflict in &report.conflicts {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(conflict.to_string());
            suite.add_test_case(TestCase::new(format!("run {}: {}", conflict.id, conflict.what), status));
        }
        whole.add_test_suite(suite);
    }
    Ok(whole.to_string()?)
}

fn case(run: &Run, cell: &str) -> TestCase {
    let record = &run.record;
    let verdict = record.judgement.verdict;
    let status = if record.as_expected {
        TestCaseStatus::success()
    } else {
        let kind = match verdict {
            Verdict::HarnessError => NonSuccessKind::Error,
            _ => NonSuccessKind::Failure,
        };
        let mut status = TestCaseStatus::non_success(kind);
        status.set_type(verdict.name());
        status.set_message(format!(
            "{verdict}, expected {}: {}",
            record.expected,
            one_line(&record.judgement.reason)
        ));
        status.set_description(details(run));
        status
    };
    let mut case = TestCase::new(format!("seed {}", record.run.seed), status);
    case.set_classname(cell);
    case.set_time(Duration::from_millis(record.timings.total_ms));
    case.add_property(Property::new("verdict", verdict.name()));
    case.add_property(Property::new("id", run.record.id.as_str()));
    if let Some(identity) = &record.identity {
        case.add_property(Property::new("finding", identity.as_str()));
    }
    if verdict != Verdict::Pass && record.as_expected {
        case.set_system_out(details(run));
    }
    case
}

/// What a reader wants to know of a defect.
fn details(run: &Run) -> String {
    let mut lines = vec![run.record.judgement.reason.clone()];
    match &run.record.cycle {
        Some(cycle) => lines.push(cycle.to_string()),
        None => lines.extend(evidence(run)),
    }
    for stack in stacks(run) {
        lines.push(format!("\n{}", stack.title));
        lines.extend(stack.frames.iter().map(|frame| format!("  {frame}")));
    }
    lines.push(format!("\nreproduce: {}", reproducer(run)));
    lines.extend(replay(run).map(|replay| format!("or: {replay}")));
    lines.join("\n")
}

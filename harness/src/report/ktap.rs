//! KTAP version 1 (`Documentation/dev-tools/ktap.rst` of the kernel): a test for each cell, a subtest for each run.
//!
//! `ok` is a verdict as expected; an expected defect is `ok` with its name, since that is what the cell is for. A run in
//! which the bench failed says nothing of the kernel and is skipped, and a cell with no other runs too.

use std::fmt::Write;

use super::Report;
use super::text::{cut, one_line};
use crate::judge::verdict::Verdict;

/// The report as KTAP.
#[must_use]
pub(super) fn ktap(report: &Report) -> String {
    let mut text = String::from("KTAP version 1\n");
    for (axis, value) in &report.layout.common {
        line(&mut text, 0, &format!("{}: {value}", axis.name()));
    }
    for trouble in &report.troubles {
        line(&mut text, 0, &format!("not read: {}: {}", trouble.place, trouble.what));
    }
    for cell in &report.missing {
        line(
            &mut text,
            0,
            &format!("missing: {}: {} of {} runs are there", cell.cell, cell.done, cell.asked),
        );
    }
    for conflict in &report.conflicts {
        line(&mut text, 0, &conflict.to_string());
    }
    let _ = writeln!(text, "1..{}", report.layout.cells.len());
    for (number, cell) in report.layout.cells.iter().enumerate() {
        let _ = writeln!(text, "  KTAP version 1\n  1..{}", cell.runs.len());
        for (number, &index) in cell.runs.iter().enumerate() {
            let record = &report.runs[index].record;
            let verdict = record.judgement.verdict;
            let skipped = verdict == Verdict::HarnessError && !record.as_expected;
            if verdict != Verdict::Pass {
                line(&mut text, 1, &record.judgement.reason);
            }
            let result = if record.as_expected || skipped { "ok" } else { "not ok" };
            let directive = if skipped { "SKIP " } else { "" };
            let expected =
                if record.as_expected { String::new() } else { format!(", expected {}", record.expected) };
            let _ = writeln!(
                text,
                "  {result} {} seed-{} # {directive}{verdict}{expected}",
                number + 1,
                record.run.seed
            );
        }
        let (result, directive) = match cell.judged {
            0 => ("ok", "SKIP no run of it says anything of the kernel".to_owned()),
            _ => {
                let counts: Vec<_> =
                    cell.verdicts.iter().map(|(verdict, count)| format!("{count} {verdict}")).collect();
                (if cell.unexpected == 0 { "ok" } else { "not ok" }, counts.join(" "))
            }
        };
        let label = description(&report.layout.label(cell));
        let _ = writeln!(text, "{result} {} {label} # {directive}", number + 1);
    }
    text
}

/// A diagnostic line.
fn line(text: &mut String, depth: usize, says: &str) {
    let _ = writeln!(text, "{:width$}# {}", "", cut(says, 400), width = 2 * depth);
}

/// `#` begins a directive, so a description has none.
fn description(text: &str) -> String {
    one_line(text).replace(['#', '\\'], "_")
}

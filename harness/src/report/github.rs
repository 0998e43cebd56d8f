//! The report as a GitHub job summary: tables first, findings folded, below the size that GitHub takes.
//!
//! GitHub renders HTML inside Markdown, so what the guest wrote is put in numeric character references, which are
//! text wherever they stand.

use std::fmt::Write;

use super::cells::Cell;
use super::findings::{Found, reproducer, stacks};
use super::markdown::{is_defect, percent, places};
use super::text::cut;
use super::{Counted, Report};
use crate::judge::verdict::Verdict;

/// A step's summary of more than 1 MiB is dropped whole; other steps of the job share nothing of it.
const LARGEST: usize = 900 * 1024;

/// Findings with their evidence; the others in a line each.
const FULL: usize = 10;

/// The summary.
#[must_use]
pub(super) fn summary(report: &Report) -> String {
    let mut text = format!("### {}\n\n", escape(&report.headline()));
    let common = report.layout.common();
    if !common.is_empty() {
        let _ = writeln!(text, "{}\n", escape(&common));
    }
    if !report.troubles.is_empty() {
        let _ = writeln!(
            text,
            "> [!WARNING]\n> {} could not be read:\n>",
            Counted(report.troubles.len(), "record")
        );
        for trouble in report.troubles.iter().take(10) {
            let _ = writeln!(
                text,
                "> - {}: {}",
                escape(&cut(&trouble.place, 200)),
                escape(&cut(&trouble.what, 200))
            );
        }
        text.push('\n');
    }
    if !report.missing.is_empty() {
        let _ = writeln!(text, "> [!WARNING]\n> The plan is not done:\n>");
        for cell in report.missing.iter().take(10) {
            let _ =
                writeln!(text, "> - {}: {} of {} runs", escape(&cut(&cell.cell, 200)), cell.done, cell.asked);
        }
        if report.missing.len() > 10 {
            let _ = writeln!(text, "> - and {}", Counted(report.missing.len() - 10, "more cell"));
        }
        text.push('\n');
    }
    for conflict in report.conflicts.iter().take(10) {
        let _ = writeln!(text, "> [!WARNING]\n> {}\n", escape(&cut(&conflict.to_string(), 300)));
    }
    for table in &report.layout.tables {
        if !table.about.is_empty() {
            let _ = writeln!(text, "**{}**\n", escape(&table.title()));
        }
        let heads: Vec<String> = table
            .columns
            .iter()
            .map(|column| {
                let parts: Vec<_> =
                    table.column_axes.iter().zip(column).map(|(axis, value)| axis.says(value)).collect();
                escape(&if parts.is_empty() { "verdicts".to_owned() } else { parts.join(", ") })
            })
            .collect();
        let _ = writeln!(text, "| | {} |\n|---|{}", heads.join(" | "), "---|".repeat(heads.len()));
        for (row, cells) in table.cells.iter().enumerate() {
            let cells: Vec<_> = cells
                .iter()
                .map(|cell| cell.map_or(String::new(), |at| brief(&report.layout.cells[at])))
                .collect();
            let _ = writeln!(text, "| {} | {} |", escape(&table.row(row)), cells.join(" | "));
        }
        text.push('\n');
    }
    for (number, found) in report.findings.iter().enumerate() {
        let section = if number < FULL { finding(report, found) } else { format!("- {}\n", title(found)) };
        if text.len() + section.len() > LARGEST {
            let _ = writeln!(text, "\nand {} more", Counted(report.findings.len() - number, "finding"));
            break;
        }
        text.push_str(&section);
    }
    text
}

fn title(found: &Found) -> String {
    format!("{} ({})", escape(&cut(&found.title, 160)), found.often())
}

fn finding(report: &Report, found: &Found) -> String {
    let run = &report.runs[found.shown_by];
    let mut text = format!("<details><summary>{}</summary>\n\n", title(found));
    let _ = writeln!(text, "{}\n", escape(&cut(&run.record.judgement.reason, 600)));
    let _ = writeln!(text, "In {}.\n", escape(&places(report, found)));
    if let Some(cycle) = &run.record.cycle {
        for statement in &cycle.statements {
            let _ = writeln!(text, "1. {}", escape(&cut(&statement.to_string(), 400)));
        }
        text.push('\n');
    }
    for stack in stacks(run).iter().take(2) {
        let _ = writeln!(text, "{}\n\n<pre>", escape(&cut(&stack.title, 200)));
        for frame in &stack.frames {
            let _ = writeln!(text, "{}", escape(&cut(frame, 200)));
        }
        text.push_str("</pre>\n\n");
    }
    let _ = writeln!(text, "<pre>{}</pre>\n\n</details>\n", escape(&reproducer(run)));
    text
}

fn brief(cell: &Cell) -> String {
    let mark = |verdict: Verdict| match (cell.unexpected > 0, is_defect(verdict)) {
        (true, _) => "❌ ",
        (false, true) => "🔶 ",
        (false, false) => "✅ ",
    };
    let mut text = match cell.headline() {
        None => String::new(),
        Some((verdict, share)) => {
            format!("{}{verdict} {}/{} ({})", mark(verdict), share.hits, share.runs, percent(&share))
        }
    };
    if cell.harness_errors > 0 {
        let _ = write!(
            text,
            " ⚠️ {}",
            Counted(usize::try_from(cell.harness_errors).unwrap_or(0), "harness error")
        );
    }
    text
}

/// What is neither Markdown nor HTML whatever stands around it.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' => escaped.push(' '),
            c if c.is_ascii_alphanumeric() || " ,-=".contains(c) || !c.is_ascii() => escaped.push(c),
            c => {
                let _ = write!(escaped, "&#{};", u32::from(c));
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_string_is_markup() {
        assert_eq!(escape("a|b"), "a&#124;b");
        assert_eq!(escape("<img src=x>\n# h"), "&#60;img src=x&#62; &#35; h");
        assert!(!escape("[a](javascript:b) *c* `d` @e \\").contains(['[', '(', '*', '`', '@', '\\', ':']));
    }
}

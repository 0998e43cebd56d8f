//! The report as a mail to a list: Markdown that reads as plain text, ASCII, at most [`WIDTH`] columns, no HTML.

use std::fmt::Write;

use super::cells::{Cell, Table};
use super::compare::probability;
use super::findings::{Found, evidence, replay, reproducer, stacks};
use super::provenance::{provenance, under_test};
use super::run::Axis;
use super::text::{ascii, one_line};
use super::{Counted, Report};
use crate::judge::verdict::Verdict;
use crate::statistics::{Call, Share};

/// Columns that a line takes at most, so that it can be quoted a few times.
pub(super) const WIDTH: usize = 76;

/// Findings told in full; the others in a line each.
const FULL: usize = 6;

/// Differences of a kind told one by one.
const DIFFERENCES: usize = 6;

/// The mail.
#[must_use]
pub(super) fn mail(report: &Report) -> String {
    let mut mail = Mail(String::new());
    mail.heading(&report.headline(), '=');
    mail.what_was_run(report);
    mail.what_came_out(report);
    mail.comparison(report);
    mail.findings(report);
    mail.missing(report);
    mail.provenance(report);
    mail.0
}

struct Mail(String);

impl Mail {
    fn heading(&mut self, text: &str, underline: char) {
        let text = wrap(text, "", "");
        let width = text.lines().map(str::len).max().unwrap_or(0);
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        let _ = writeln!(self.0, "{text}\n{}\n", underline.to_string().repeat(width));
    }

    fn paragraph(&mut self, text: &str, first: &str, rest: &str) {
        self.0.push_str(&wrap(text, first, rest));
        self.0.push('\n');
    }

    /// A line that is not to be wrapped: code, in Markdown, by its indentation.
    fn code(&mut self, indent: usize, text: &str) {
        let text = ascii(text);
        let room = WIDTH - indent;
        let _ = writeln!(self.0, "{:indent$}{}", "", ascii(&cut_hard(&text, room)));
    }

    fn blank(&mut self) {
        self.0.push('\n');
    }

    fn what_was_run(&mut self, report: &Report) {
        self.heading("What was run", '-');
        let axes = report.layout.axes.iter().map(|axis| {
            let at = report.layout.axes.iter().position(|a| a == axis).unwrap_or(0);
            let mut values: Vec<&str> = Vec::new();
            for cell in &report.layout.cells {
                if !values.contains(&cell.key[at].as_str()) {
                    values.push(&cell.key[at]);
                }
            }
            (axis, values.join(", "))
        });
        let common = report.layout.common.iter().map(|(axis, value)| (axis, value.clone()));
        let lines: Vec<_> =
            common.chain(axes).filter(|(axis, value)| value != "none" || **axis == Axis::Preempt).collect();
        let width = lines.iter().map(|(axis, _)| axis.name().len()).max().unwrap_or(0);
        for (axis, values) in lines {
            let first = format!("    {:width$}  ", axis.name());
            self.paragraph(&values, &first, &" ".repeat(first.len()));
        }
        let under_test = under_test(report);
        if !under_test.is_empty() {
            self.blank();
            self.paragraph("Under test:", "", "");
            self.blank();
            for (name, about, patches) in under_test {
                let about = about.map_or(String::new(), |about| format!(": {about}"));
                self.paragraph(&format!("{name}{about}"), "- ", "  ");
                for patch in patches {
                    let sha256: String = patch.sha256.chars().take(16).collect();
                    self.paragraph(&format!("{} (SHA-256 {sha256}...)", patch.name), "  ", "    ");
                }
            }
        }
    }

    fn what_came_out(&mut self, report: &Report) {
        self.heading("What came out", '-');
        for table in &report.layout.tables {
            if !table.about.is_empty() {
                self.paragraph(&format!("{}:", table.title()), "", "");
                self.blank();
            }
            self.table(report, table);
        }
        let mut shares: Vec<Share> = Vec::new();
        for (_, share) in report.layout.cells.iter().filter_map(Cell::headline) {
            if !shares.contains(&share) {
                shares.push(share);
            }
        }
        shares.sort_by_key(|share| (share.runs, share.hits));
        let intervals: Vec<_> =
            shares.iter().map(|share| format!("{}/{} {}", share.hits, share.runs, percent(share))).collect();
        if !intervals.is_empty() {
            let text = format!("95 % intervals (Wilson): {}.", intervals.join(", "));
            self.paragraph(&text, "", "");
        }
        let mut marks = Vec::new();
        if report.layout.cells.iter().any(|cell| cell.unexpected > 0) {
            marks.push("`!` has verdicts that were not expected.");
        }
        if report.layout.cells.iter().any(|cell| cell.harness_errors > 0) {
            marks.push("`+n` is n runs in which the bench failed; they count neither way.");
        }
        if !marks.is_empty() {
            self.paragraph(&marks.join(" "), "", "");
        }
    }

    fn table(&mut self, report: &Report, table: &Table) {
        let head = |column: &[String]| -> String {
            table
                .column_axes
                .iter()
                .zip(column)
                .map(|(axis, value)| axis.says(value))
                .collect::<Vec<_>>()
                .join(", ")
        };
        let mut rows: Vec<Vec<String>> = Vec::new();
        let mut first = vec![String::new()];
        first.extend(table.columns.iter().map(|column| head(column)));
        rows.push(first);
        for (row, cells) in table.cells.iter().enumerate() {
            let mut line = vec![table.row(row)];
            line.extend(
                cells.iter().map(|cell| cell.map_or("-".into(), |at| brief(&report.layout.cells[at]))),
            );
            rows.push(line);
        }
        for panel in panels(&rows) {
            let says =
                |row: &Vec<String>| panel[1..].iter().any(|&(at, _)| !row[at].is_empty() && row[at] != "-");
            for row in rows.iter().filter(|row| says(row)) {
                let cells: Vec<_> =
                    panel.iter().map(|&(at, width)| format!("{:width$}", ascii(&row[at]))).collect();
                self.code(4, cells.join("  ").trim_end());
            }
            self.blank();
        }
    }

    fn comparison(&mut self, report: &Report) {
        let Some(comparisons) = &report.comparisons else { return };
        self.heading(&format!("Compared with {}", comparisons.base), '-');
        let text = format!(
            "{} of cells that both have; probabilities are corrected for that number (Holm), a difference is \
             said to be shown at p < 0.05. \"No difference shown\" is not \"there is none\".",
            Counted(comparisons.made, "comparison")
        );
        self.paragraph(&text, "", "");
        self.blank();
        for (variant, tallies) in &comparisons.variants {
            self.paragraph(&format!("{variant}:"), "- ", "  ");
            for (quantity, tally) in comparisons.quantities.iter().zip(tallies).filter(|(_, t)| t.cells() > 0)
            {
                let counts: Vec<String> = [("better", tally.better), ("worse", tally.worse)]
                    .into_iter()
                    .filter(|(_, count)| *count > 0)
                    .map(|(call, count)| format!("{call} in {count} of {} cells", tally.cells()))
                    .collect();
                let says = if counts.is_empty() {
                    format!("no difference shown in {}", Counted(tally.cells(), "cell"))
                } else {
                    counts.join(", ")
                };
                self.paragraph(&format!("{}: {says} ({})", quantity.name(), quantity.test()), "  - ", "    ");
            }
        }
        for (call, head) in
            [(Call::Worse, "Worse, the surest first:"), (Call::Better, "Better, the surest first:")]
        {
            let mut shown = comparisons.shown.iter().filter(|one| one.call == call).peekable();
            if shown.peek().is_some() {
                self.blank();
                self.paragraph(head, "", "");
                self.blank();
            }
            for one in shown.take(DIFFERENCES) {
                let place = if one.place.is_empty() { String::new() } else { format!(", {}", one.place) };
                let text = format!(
                    "{}{place}: {}: {} against {} ({})",
                    one.variant,
                    one.quantity.name(),
                    one.is,
                    one.was,
                    probability(one.p)
                );
                self.paragraph(&text, "- ", "  ");
            }
        }
    }

    fn findings(&mut self, report: &Report) {
        self.heading(&format!("What was found: {}", Counted(report.findings.len(), "finding")), '-');
        for (number, found) in report.findings.iter().enumerate() {
            if number < FULL {
                self.finding(report, number, found);
            } else {
                self.paragraph(&summary(found), &format!("{}. ", number + 1), "   ");
            }
        }
        if report.findings.is_empty() {
            self.paragraph("No run found anything.", "", "");
        }
    }

    fn finding(&mut self, report: &Report, number: usize, found: &Found) {
        let run = &report.runs[found.shown_by];
        let record = &run.record;
        if number > 0 {
            self.blank();
        }
        self.paragraph(&summary(found), &format!("{}. ", number + 1), "   ");
        self.blank();
        self.paragraph(&record.judgement.reason, "   ", "   ");
        match &record.cycle {
            Some(cycle) => {
                self.blank();
                self.paragraph("Who waits for whom:", "   ", "   ");
                self.blank();
                for (number, statement) in cycle.statements.iter().enumerate() {
                    self.paragraph(&statement.to_string(), &format!("   {}. ", number + 1), "      ");
                }
                for gap in &cycle.gaps {
                    self.paragraph(&format!("not observed: {gap}"), "   - ", "     ");
                }
            }
            None => {
                self.blank();
                for says in evidence(run).iter().take(12) {
                    self.paragraph(says, "   - ", "     ");
                }
            }
        }
        if let Some(structures) = record.structures.as_ref().filter(|s| !s.statements.is_empty()) {
            self.blank();
            self.paragraph("The same, read from the guest's memory:", "   ", "   ");
            self.blank();
            for says in &structures.statements {
                self.paragraph(says, "   - ", "     ");
            }
        }
        for stack in stacks(run).iter().take(2) {
            self.blank();
            self.paragraph(&stack.title, "   ", "   ");
            self.blank();
            for frame in &stack.frames {
                self.code(7, frame);
            }
        }
        self.blank();
        self.paragraph(&format!("Found in {}. Again:", places(report, found)), "   ", "   ");
        self.blank();
        for line in command(&reproducer(run)) {
            self.code(7, &line);
        }
        if let Some(replay) = replay(run) {
            self.blank();
            self.paragraph("Or from its capsule, one file that holds all it takes:", "   ", "   ");
            self.blank();
            self.code(7, &replay);
        }
    }

    fn missing(&mut self, report: &Report) {
        if report.troubles.is_empty() && report.conflicts.is_empty() && report.missing.is_empty() {
            return;
        }
        self.heading("What is missing or does not fit", '-');
        for cell in report.missing.iter().take(20) {
            let text = format!("{}: {} of {} runs are there", cell.cell, cell.done, cell.asked);
            self.paragraph(&text, "- ", "  ");
        }
        if let Some(more) = report.missing.len().checked_sub(20).filter(|&more| more > 0) {
            self.paragraph(&format!("and {}", Counted(more, "more cell")), "- ", "  ");
        }
        for conflict in report.conflicts.iter().take(20) {
            self.paragraph(&conflict.to_string(), "- ", "  ");
        }
        for trouble in report.troubles.iter().take(20) {
            self.paragraph(&format!("{}: {}", trouble.place, trouble.what), "- ", "  ");
        }
        if let Some(more) = report.troubles.len().checked_sub(20).filter(|&more| more > 0) {
            self.paragraph(&format!("and {more} more"), "- ", "  ");
        }
    }

    fn provenance(&mut self, report: &Report) {
        self.heading("With what", '-');
        for (name, values) in provenance(report) {
            self.paragraph(&format!("{name}: {}", values.join("; ")), "- ", "  ");
        }
    }
}

/// Columns with their widths, as many at a time as a line has room for; the first one, with the names, is in each panel.
fn panels(rows: &[Vec<String>]) -> Vec<Vec<(usize, usize)>> {
    let width = |at: usize| rows.iter().map(|row| ascii(&row[at]).len()).max().unwrap_or(0);
    let names = (0, width(0));
    let mut panels = vec![vec![names]];
    let mut used = 4 + names.1;
    for at in 1..rows[0].len() {
        let needs = 2 + width(at);
        if used + needs > WIDTH && panels.last().is_some_and(|panel| panel.len() > 1) {
            panels.push(vec![names]);
            used = 4 + names.1;
        }
        used += needs;
        if let Some(panel) = panels.last_mut() {
            panel.push((at, width(at)));
        }
    }
    panels
}

/// A finding in a line.
fn summary(found: &Found) -> String {
    format!("{} ({}; {})", found.title, found.identity, found.often())
}

/// Where a finding was made, shortly.
pub(super) fn places(report: &Report, found: &Found) -> String {
    let place = |&(at, count): &(usize, usize)| {
        let cell = &report.layout.cells[at];
        format!("{} ({count} of {})", report.layout.label(cell), cell.judged.max(count as u64))
    };
    let mut places: Vec<String> = found.cells.iter().take(4).map(place).collect();
    if let Some(more) = found.cells.len().checked_sub(4).filter(|&more| more > 0) {
        places.push(format!("{more} more"));
    }
    places.join("; ")
}

/// What a cell's runs were called.
fn brief(cell: &Cell) -> String {
    let mut text = match cell.headline() {
        None => "-".to_owned(),
        Some((verdict, share)) => format!("{}/{} {verdict}", share.hits, share.runs),
    };
    if cell.harness_errors > 0 {
        let _ = write!(text, " +{}", cell.harness_errors);
    }
    if cell.unexpected > 0 {
        text.push('!');
    }
    text
}

/// An interval in whole per cent.
pub(super) fn percent(share: &Share) -> String {
    format!("{:.0}-{:.0} %", share.low * 100.0, share.high * 100.0)
}

/// A command in lines that a shell takes as one.
pub(super) fn command(command: &str) -> Vec<String> {
    let room = WIDTH - 7;
    // A quoted word may have spaces; such a command stays on one line, and is cut by nobody but a mailer.
    if command.len() <= room || command.contains('\'') {
        return vec![command.to_owned()];
    }
    let mut lines = vec![String::new()];
    let words: Vec<&str> = command.split(' ').collect();
    let mut at = 0;
    while at < words.len() {
        // An option stays with its value.
        let value = words.get(at + 1).filter(|next| words[at].starts_with("--") && !next.starts_with("--"));
        let word = value.map_or(words[at].to_owned(), |value| format!("{} {value}", words[at]));
        at += 1 + usize::from(value.is_some());
        let last = lines.len() - 1;
        if lines[last].is_empty() {
            lines[last] = word;
        } else if lines[last].len() + 1 + word.len() + 2 <= room {
            let _ = write!(lines[last], " {word}");
        } else {
            lines[last].push_str(" \\");
            lines.push(format!("    {word}"));
        }
    }
    lines
}

fn wrap(text: &str, first: &str, rest: &str) -> String {
    let options = textwrap::Options::new(WIDTH).initial_indent(first).subsequent_indent(rest);
    let text = no_tags(&one_line(&ascii(text)));
    if text.is_empty() { first.trim_end().to_owned() } else { textwrap::fill(&text, options) }
}

/// Markdown takes over HTML as it is, so a `<` that could begin a tag is escaped; `<-` is none.
fn no_tags(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '<' && chars.peek().is_some_and(|next| next.is_ascii_alphabetic() || "/!?".contains(*next)) {
            safe.push('\\');
        }
        safe.push(c);
    }
    safe
}

/// Cuts a line of code that is too long: a broken line would be another line of code.
fn cut_hard(text: &str, room: usize) -> String {
    let text = text.replace(['\n', '\t'], " ");
    if text.len() <= room { text } else { format!("{}...", text.chars().take(room - 3).collect::<String>()) }
}

/// Whether a verdict is a defect of the kernel under test.
pub(super) fn is_defect(verdict: Verdict) -> bool {
    !matches!(verdict, Verdict::Pass | Verdict::HarnessError)
}

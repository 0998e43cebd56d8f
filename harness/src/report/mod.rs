//! Reports: what run records say, for people (HTML, Markdown, GitHub) and for machines (KTAP, JUnit, JSON).
//!
//! [`input`] reads records, [`cells`] counts them, [`findings`] says what went wrong, each thing once; [`Report`] is the
//! three together, and each format is a function of it. No format decides anything.

pub mod cells;
pub mod compare;
pub mod fill;
pub mod findings;
pub mod input;
pub mod planned;
pub mod run;
pub mod text;
pub mod trace;

mod github;
mod html;
mod json;
mod junit;
mod ktap;
mod markdown;
mod provenance;

use std::fmt;

use cells::Layout;
use compare::Comparisons;
use findings::Found;
use input::{Input, Trouble};
use planned::Missing;
use run::Run;

use crate::judge::verdict::Verdict;
use crate::matrix::CellSpec;
use crate::records::Conflict;

/// How a report is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// One page that needs nothing else: matrix, plots, findings, provenance
    Html,
    /// Plain text in Markdown, for a mail to a list
    Markdown,
    /// Kernel Test Anything Protocol: a test a cell, a subtest a run
    Ktap,
    /// JUnit XML: a suite a cell, a case a run
    Junit,
    /// Markdown for $GITHUB_STEP_SUMMARY
    Github,
    /// What the others are made from
    Json,
}

/// What a report says, whatever it looks like.
#[derive(Debug)]
pub struct Report {
    /// The runs.
    pub runs: Vec<Run>,
    /// Their cells, and the tables of these.
    pub layout: Layout,
    /// What went wrong.
    pub findings: Vec<Found>,
    /// Each variant beside the one that it is compared with.
    pub comparisons: Option<Comparisons>,
    /// What a plan asks for and is not there.
    pub missing: Vec<Missing>,
    /// What could not be read.
    pub troubles: Vec<Trouble>,
    /// Runs that should have been equal and were not.
    pub conflicts: Vec<Conflict>,
    /// The fix candidates that are known, with a line on each.
    pub variants: Vec<(String, String)>,
}

impl Report {
    /// Draws it up. `variants` are the fix candidates that are known, in their order, with a line on each; the others are
    /// compared with `base`, or with the first of them. `plan` is what was to be run, if that is known.
    #[must_use]
    pub fn new(input: Input, plan: &[CellSpec], variants: Vec<(String, String)>, base: Option<&str>) -> Self {
        let missing = planned::missing(plan, &input);
        let Input { runs, troubles, conflicts, .. } = input;
        let names: Vec<String> = variants.iter().map(|(name, _)| name.clone()).collect();
        let layout = Layout::new(&runs, &names);
        let findings = Found::all(&runs, &layout);
        let base = base.or(names.first().map(String::as_str));
        let comparisons = base.and_then(|base| Comparisons::new(&runs, &layout, base, &names));
        Self { runs, layout, findings, comparisons, missing, troubles, conflicts, variants }
    }

    /// In this format.
    pub fn render(&self, format: Format) -> Result<String, Error> {
        Ok(match format {
            Format::Html => html::page(self)?,
            Format::Markdown => markdown::mail(self),
            Format::Ktap => ktap::ktap(self),
            Format::Junit => junit::junit(self)?,
            Format::Github => github::summary(self),
            Format::Json => json::json(self)?,
        })
    }

    /// Runs of this kind.
    fn count(&self, counts: impl Fn(&Run) -> bool) -> usize {
        self.runs.iter().filter(|run| counts(run)).count()
    }

    /// How it all went, in one sentence.
    #[must_use]
    pub fn headline(&self) -> String {
        let unexpected = self.count(|run| !run.record.as_expected && run.verdict() != Verdict::HarnessError);
        let harness = self.count(|run| run.verdict() == Verdict::HarnessError);
        let mut text = format!(
            "{} in {}: {}",
            Counted(self.runs.len(), "run"),
            Counted(self.layout.cells.len(), "cell"),
            match unexpected {
                0 => "every verdict as expected".to_owned(),
                n => format!("{} not as expected", Counted(n, "verdict")),
            }
        );
        if !self.missing.is_empty() {
            let runs: u64 = self.missing.iter().map(|cell| cell.asked - cell.done).sum();
            text.push_str(&format!("; up to {runs} runs of the plan are missing"));
        }
        if harness > 0 {
            text.push_str(&format!("; {} of the bench itself", Counted(harness, "failure")));
        }
        text
    }
}

/// A number of things: `1 run`, `2 runs`.
pub(crate) struct Counted(pub(crate) usize, pub(crate) &'static str);

impl fmt::Display for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.0, self.1, if self.0 == 1 { "" } else { "s" })
    }
}

/// Why a report could not be drawn up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A plot failed.
    #[error("cannot draw {what}: {why}")]
    Plot {
        /// Which plot.
        what: String,
        /// Why.
        why: String,
    },
    /// It could not be written as XML.
    #[error("cannot write JUnit XML: {0}")]
    Junit(#[from] quick_junit::SerializeError),
    /// It could not be written as JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[from] serde_json::Error),
}

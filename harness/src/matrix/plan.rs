//! Plan files: which cells, how often each, what is expected of them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::candidate::{Candidate, Own};
use super::select::Selector;
use crate::cli::Preempt;
use crate::judge::verdict::Verdict;
use crate::statistics::Sprt;
use crate::vm::Size;

/// Format read here.
const FORMAT: u32 = 1;

/// A plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the plan {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no plan.
    #[error("{}: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        why: String,
    },
    /// A group asks for what does not exist or does not go together.
    #[error("group '{group}': {why}")]
    Group {
        /// Its name.
        group: String,
        /// What is wrong.
        why: String,
    },
}

/// A plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    format: u32,
    /// Its name.
    pub name: String,
    /// What it is for.
    pub summary: String,
    /// How often a run that ended in a harness error is tried again.
    #[serde(default = "retries")]
    pub retries: u32,
    /// Groups of cells.
    #[serde(rename = "group")]
    pub groups: Vec<Group>,
    /// Where its relative paths begin.
    #[serde(skip)]
    folder: PathBuf,
}

const fn retries() -> u32 {
    2
}

/// One value or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// As a list.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// The value of a scenario's parameter, in any of the ways in which it may be written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Parameter {
    /// A flag.
    Flag(bool),
    /// A number.
    Integer(u64),
    /// A word.
    Word(String),
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "{}", u8::from(*flag)),
            Self::Integer(integer) => write!(f, "{integer}"),
            Self::Word(word) => f.write_str(word),
        }
    }
}

/// Whose clock a guest follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Its own count of instructions.
    Deterministic,
    /// The host's.
    RealTime,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deterministic => "deterministic",
            Self::RealTime => "real-time",
        })
    }
}

/// Which combinations of a group's values become cells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cover {
    /// All.
    #[default]
    All,
    /// As many as it takes for every two values of different factors to meet.
    Pairs,
}

/// Cells that are made by combining values, and are run alike.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its name; records carry it.
    pub name: String,
    /// What it is to show.
    pub about: String,
    /// Scenarios.
    pub scenario: OneOrMany<String>,
    /// Controls of the scenario; `none` is the scenario itself.
    #[serde(default = "no_control")]
    pub control: OneOrMany<String>,
    /// Kernels of the list; without any, the reference kernel.
    pub kernel: Option<OneOrMany<String>>,
    /// Kind of build.
    pub flavour: Option<String>,
    /// Fix candidates, stacks of them, or the user's own.
    pub variant: OneOrMany<Candidate>,
    /// Preemption models.
    pub preempt: OneOrMany<Preempt>,
    /// Numbers of CPUs.
    pub cpus: OneOrMany<u32>,
    /// Modes.
    pub mode: OneOrMany<Mode>,
    /// Parameters of the scenario, with the values that each takes.
    #[serde(default)]
    pub parameters: BTreeMap<String, OneOrMany<Parameter>>,
    /// GPUs, unless the profile's number will do.
    pub gpus: Option<u32>,
    /// Guest memory, likewise.
    pub memory: Option<Size>,
    /// Memory of each GPU, likewise.
    pub vram: Option<Size>,
    /// Fault plan of the device.
    pub chaos: Option<String>,
    /// Further words of the kernel's command line.
    #[serde(default)]
    pub append: Vec<String>,
    /// Which combinations become cells.
    #[serde(default)]
    pub cover: Cover,
    /// Combinations that do not exist.
    #[serde(default)]
    pub skip: Vec<Selector>,
    /// Seed of a cell's first run.
    #[serde(default = "first_seed")]
    pub first_seed: u64,
    /// Runs of each cell, each with the next seed; with `stop`, at most.
    pub seeds: u64,
    /// When a cell has been run often enough before that.
    pub stop: Option<Sprt>,
    /// What is expected; the first rule that fits a cell counts. Without any, a control's own expectation, or `pass`.
    #[serde(default)]
    pub expect: Vec<Rule>,
}

fn no_control() -> OneOrMany<String> {
    OneOrMany::One(NO_CONTROL.to_owned())
}

const fn first_seed() -> u64 {
    1
}

/// How a plan writes that a cell is no control.
pub const NO_CONTROL: &str = "none";

/// What is expected of some cells.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Of which; of all without it.
    #[serde(default)]
    pub when: Selector,
    /// The verdict, or several of which each is as expected.
    pub verdict: OneOrMany<Verdict>,
    /// Why.
    pub because: Option<String>,
}

impl Plan {
    /// Reads a plan and checks it as far as it goes without the source tree.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let plan = Self::parse(&text).map_err(|why| Error::Format { path: path.into(), why })?;
        Ok(Self { folder: path.parent().unwrap_or(Path::new("")).into(), ..plan })
    }

    /// Where its relative paths begin.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Puts a candidate of the user's beside those that the plan names, in every group that is about `kernel` or, if it is
    /// a tree, in every group. Its paths must be absolute.
    ///
    /// # Errors
    /// A plan without such a group.
    pub fn add(&mut self, own: &Own, kernel: &str) -> Result<(), String> {
        let mut added = false;
        for group in &mut self.groups {
            let of_group = group.kernel.as_ref().map_or(&[] as &[String], OneOrMany::as_slice);
            let is_about = of_group.is_empty() || of_group.iter().any(|name| name == kernel);
            if own.tree.is_none() && !is_about {
                continue;
            }
            let own =
                Own { kernel: own.tree.is_none().then(|| OneOrMany::One(kernel.to_owned())), ..own.clone() };
            let mut all = group.variant.as_slice().to_vec();
            all.push(Candidate::Own(own));
            group.variant = OneOrMany::Many(all);
            added = true;
        }
        if added {
            Ok(())
        } else {
            Err(format!(
                "no group of plan {} is about kernel {kernel}, to which {own} would apply",
                self.name
            ))
        }
    }

    /// The part of it that has only these groups; all of it if there are none.
    ///
    /// # Errors
    /// A name that no group has.
    pub fn only(&self, groups: &[String]) -> Result<Self, String> {
        let has = |name: &String| self.groups.iter().any(|group| group.name == *name);
        if let Some(name) = groups.iter().find(|name| !has(name)) {
            let known: Vec<_> = self.groups.iter().map(|group| group.name.as_str()).collect();
            return Err(format!("plan {} has no group '{name}'; it has: {}", self.name, known.join(", ")));
        }
        let mut part = self.clone();
        part.groups.retain(|group| groups.is_empty() || groups.contains(&group.name));
        Ok(part)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let plan: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if plan.format != FORMAT {
            return Err(format!("it has format {}, this hmmstorm reads {FORMAT}", plan.format));
        }
        let mut names = std::collections::BTreeSet::new();
        for group in &plan.groups {
            if !names.insert(&group.name) {
                return Err(format!("two groups are called '{}'", group.name));
            }
            for variant in group.variant.as_slice() {
                if let Candidate::Own(own) = variant {
                    own.check().map_err(|why| format!("group '{}': {why}", group.name))?;
                }
            }
            if group.seeds == 0 {
                return Err(format!("group '{}' runs no seed", group.name));
            }
            if group.stop.is_some_and(|rule| !rule.is_sound()) {
                return Err(format!(
                    "group '{}': of its stopping rule, low must be below high, and all between 0 and 1",
                    group.name
                ));
            }
            if group.expect.iter().any(|rule| rule.verdict.as_slice().is_empty()) {
                return Err(format!("group '{}' has a rule that expects no verdict", group.name));
            }
        }
        Ok(plan)
    }

    /// Hash of what the plan says: comments and spelling do not matter.
    #[must_use]
    pub fn hash(&self) -> String {
        // A plan consists of what serde_json can write.
        let text = serde_json::to_string(self).unwrap_or_default();
        Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A plan with one group of these lines.
    pub(in crate::matrix) fn plan(group: &str) -> Result<Plan, String> {
        Plan::parse(&format!(
            "format = 1\nname = 'n'\nsummary = 's'\n[[group]]\nname = 'g'\nabout = 'a'\n\
             scenario = 'drain-livelock'\nmode = 'deterministic'\n{group}"
        ))
    }

    const LEAST: &str = "variant = 'trylock'\npreempt = 'none'\ncpus = 2\nseeds = 3\n";

    #[test]
    fn comments_do_not_change_the_hash_and_values_do() {
        let hash = |text: &str| plan(text).expect("a plan").hash();
        assert_eq!(hash(LEAST), hash(&format!("# why\n{LEAST}")));
        assert_ne!(hash(LEAST), hash(&LEAST.replace("seeds = 3", "seeds = 4")));
    }

    #[test]
    fn what_is_no_plan_is_said() {
        for (change, says) in [
            ("seeds = 0", "runs no seed"),
            ("seeds = 3\nsedes = 4", "sedes"),
            ("seeds = 3\nstop = { low = 0.5, high = 0.1 }", "stopping rule"),
            ("seeds = 3\nexpect = [{ verdict = [] }]", "expects no verdict"),
            ("seeds = 3\nexpect = [{ verdict = 'fine' }]", "fine"),
            ("seeds = 3\nskip = [{ preemt = 'none' }]", "preemt"),
        ] {
            let error = plan(&LEAST.replace("seeds = 3", change)).expect_err(change);
            assert!(error.contains(says), "{error}");
        }
        assert!(plan(&LEAST.replace("'none'", "['none', 'full']")).is_ok());
        let own = |variant: &str| plan(&LEAST.replace("'trylock'", variant));
        assert!(own("{ name = 'mine' }").expect_err("no patch").contains("needs a patch"));
        assert!(own("['trylock', 'wait-on-locked', { patch = ['a', 'b'], on = 'entry-wait' }]").is_ok());
        assert!(own("{ pach = 'a' }").is_err());
    }

    #[test]
    fn a_part_has_the_groups_that_it_names() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let whole = Plan::load(&repo.join("ci/plans/small.toml")).expect("a plan");
        let names = |plan: &Plan| plan.groups.iter().map(|group| group.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&whole.only(&[]).expect("all")), names(&whole));
        let part = whole.only(&["hog".to_owned(), "bug".to_owned()]).expect("a part");
        assert_eq!(names(&part), ["bug", "hog"]);
        let error = whole.only(&["hogs".to_owned()]).expect_err("no such group");
        assert!(error.contains("no group 'hogs'") && error.contains("cure"), "{error}");
    }

    #[test]
    fn shipped_plans_are_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/plans");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).expect("ci/plans") {
            let path = entry.expect("an entry").path();
            let plan = Plan::load(&path).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(path.file_stem().and_then(|stem| stem.to_str()), Some(plan.name.as_str()));
            seen += 1;
        }
        assert!(seen >= 2);
    }
}

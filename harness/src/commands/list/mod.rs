//! `hmmstorm list`: what there is to choose from, read from the data files.

mod markdown;

use std::fs;
use std::path::Path;

use clap::ValueEnum;
use serde::Deserialize;

use crate::build::Pins;
use crate::cli::{Context, Error, Outcome};
use crate::vm::profile::{self, Profile};

/// Options of `hmmstorm list`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to list
    #[arg(value_enum)]
    what: What,
    /// Print JSON: an array of objects with `name` and `about`
    #[arg(long)]
    json: bool,
    /// Print all about the scenarios as Markdown: docs/scenarios.md
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Kernels that can be fetched and built
    Kernels,
    /// Fix candidates
    Variants,
    /// Workloads
    Scenarios,
    /// Kinds of build
    Flavours,
    /// Machines
    Profiles,
}

/// One thing to choose.
#[derive(Debug, PartialEq, Eq, serde::Serialize)]
pub struct Entry {
    /// What to write on the command line.
    pub name: String,
    /// One line.
    pub about: String,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    if args.markdown {
        if !matches!(args.what, What::Scenarios) {
            return Err(Error::usage("--markdown is for `hmmstorm list scenarios`"));
        }
        print!("{}", markdown::page(&ctx.repo.join("storm/scenarios"))?);
        return Ok(Outcome::Pass);
    }
    let entries = match args.what {
        What::Profiles => profiles(&ctx.repo.join("qemu-config"))?,
        What::Scenarios => scenarios(&ctx.repo.join("storm/scenarios"))?,
        What::Kernels => choices(&ctx.repo.join("images/kernels.toml"), "kernel")?,
        What::Variants => candidates(&ctx.repo)?,
        What::Flavours => choices(&ctx.repo.join("images/flavours.toml"), "flavour")?,
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&entries)?);
    } else {
        print!("{}", table(&entries));
    }
    Ok(Outcome::Pass)
}

/// The fix candidates with a line on each, in the order of their file.
pub fn variants(repo: &Path) -> Result<Vec<(String, String)>, Error> {
    let file: toml::Table = read(&repo.join("images/variants/variants.toml"))?;
    let list = file.get("variant").cloned().unwrap_or(toml::Value::Array(Vec::new()));
    let list: Vec<Summary> = list.try_into().map_err(|e| unreadable(repo, e))?;
    Ok(list.into_iter().map(|variant| (variant.name, variant.summary)).collect())
}

fn table(entries: &[Entry]) -> String {
    let width = entries.iter().map(|e| e.name.len()).max().unwrap_or(0);
    entries.iter().map(|e| format!("{:width$}  {}\n", e.name, e.about)).collect()
}

fn profiles(dir: &Path) -> Result<Vec<Entry>, Error> {
    let entry = |name: String| -> Result<Entry, Error> {
        let about = Profile::load(dir, &name)?.about;
        Ok(Entry { name, about })
    };
    profile::names(dir)?.into_iter().map(entry).collect()
}

/// What every data file says of each thing; the rest is for those who use it.
#[derive(Deserialize)]
struct Summary {
    name: String,
    summary: String,
}

impl From<Summary> for Entry {
    fn from(from: Summary) -> Self {
        Self { name: from.name, about: from.summary }
    }
}

/// The tables `[[kind]]` of one file, in its order; the default one says so.
fn choices(path: &Path, kind: &str) -> Result<Vec<Entry>, Error> {
    let mut file: toml::Table = read(path)?;
    let default = file.remove("default");
    let list = file.remove(kind).unwrap_or(toml::Value::Array(Vec::new()));
    let list: Vec<Summary> = list.try_into().map_err(|e| unreadable(path, e))?;
    let mark = |mut entry: Entry| {
        if default.as_ref().and_then(toml::Value::as_str) == Some(&entry.name) {
            entry.about.push_str(" (default)");
        }
        entry
    };
    Ok(list.into_iter().map(Entry::from).map(mark).collect())
}

/// The fix candidates, with the kernels that each exists for.
fn candidates(repo: &Path) -> Result<Vec<Entry>, Error> {
    let pins = Pins::load(repo)?;
    let mut entries = choices(&repo.join("images/variants/variants.toml"), "variant")?;
    for (entry, variant) in entries.iter_mut().zip(&pins.variants.variant) {
        let kernels = pins.kernels.kernel.iter().filter(|kernel| variant.patches(&kernel.name).is_some());
        let kernels: Vec<String> = kernels
            .map(|kernel| match kernel.variant == variant.name {
                true => format!("{}: as it is", kernel.name),
                false => kernel.name.clone(),
            })
            .collect();
        entry.about.push_str(&format!(" [{}]", kernels.join(", ")));
    }
    Ok(entries)
}

/// One scenario a file.
fn scenarios(dir: &Path) -> Result<Vec<Entry>, Error> {
    let mut entries: Vec<Entry> = Vec::new();
    for file in fs::read_dir(dir).map_err(|e| unreadable(dir, e))? {
        let path = file?.path();
        if path.extension().is_some_and(|e| e == "toml") {
            entries.push(read::<Summary>(&path)?.into());
        }
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = fs::read_to_string(path).map_err(|e| unreadable(path, e))?;
    toml::from_str(&text).map_err(|e| unreadable(path, e))
}

fn unreadable(path: &Path, why: impl std::fmt::Display) -> Error {
    Error::harness(format!("cannot read {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_files_of_this_tree_can_be_listed() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let scenarios = scenarios(&root.join("storm/scenarios")).expect("scenarios");
        assert!(scenarios.iter().any(|e| e.name == "drain-livelock" && !e.about.is_empty()));
        for (file, kind, name) in [
            ("kernels.toml", "kernel", "6.19.6"),
            ("variants/variants.toml", "variant", "wait-on-locked"),
            ("flavours.toml", "flavour", "default"),
        ] {
            let entries = choices(&root.join("images").join(file), kind).expect(file);
            assert!(entries.iter().any(|e| e.name == name), "{entries:?}");
            assert_eq!(entries.iter().filter(|e| e.about.ends_with(" (default)")).count(), 1, "{entries:?}");
        }
        let variants = candidates(&root).expect("variants");
        let about = |name| &variants.iter().find(|e| e.name == name).expect("a variant").about;
        assert!(about("wait-on-locked").ends_with(" [6.19.6, 7.1.13: as it is]"), "{variants:?}");
        assert!(about("sleeping-lock").ends_with(" [6.19.6]"), "{variants:?}");
        let profiles = profiles(&root.join("qemu-config")).expect("profiles");
        assert!(profiles.iter().any(|e| e.name == "smoke"));
    }

    #[test]
    fn tables_align() {
        let entry = |name: &str| Entry { name: name.into(), about: "x".into() };
        assert_eq!(table(&[entry("a"), entry("long")]), "a     x\nlong  x\n");
    }
}

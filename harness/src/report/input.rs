//! What a report is made of: run records, wherever they are, and what is wrong with them.
//!
//! A matrix may have been killed at any moment, so nothing here is an error but a place that cannot be read at all: a
//! line that breaks off, a run without a verdict and a record of another schema are [`Trouble`], and the report tells them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::run::Run;
use super::text::clean_all;
use crate::judge::record::{Record, SCHEMA};
use crate::records::{CellKey, Conflict, Union};

/// Folders below the one that was named, at most: a run is three deep in a matrix.
const DEEPEST: usize = 6;

/// Files with JSON lines that are evidence of one run, and no records.
const EVIDENCE: [&str; 2] = ["events.jsonl", "samples.jsonl"];

/// Everything that was found.
#[derive(Debug, Default)]
pub struct Input {
    /// The runs, each once, by cell and seed.
    pub runs: Vec<Run>,
    /// What could not be taken for a run.
    pub troubles: Vec<Trouble>,
    /// Deterministic runs that were there more than once, and not alike.
    pub conflicts: Vec<Conflict>,
    /// Records that were there more than once.
    pub repeated: usize,
}

/// Something that is not as it should be. The report goes on without it and says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// Where.
    pub place: String,
    /// What is wrong there.
    pub what: String,
}

/// A place that cannot be read at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It could not be opened.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is there, and nothing in it is a record.
    #[error("{} holds no run record: neither verdict.json nor JSON lines with a verdict", path.display())]
    Empty {
        /// Which.
        path: PathBuf,
    },
}

impl Input {
    /// Reads folders (every record below them) and files: `verdict.json`, the file of `storm --json`, JSON lines.
    pub fn read(places: &[PathBuf]) -> Result<Self, Error> {
        let mut reader = Reader::default();
        for place in places {
            let before = (reader.records.len(), reader.troubles.len());
            if place.is_dir() {
                reader.folder(place, 0)?;
            } else {
                reader.file(place)?;
            }
            if (reader.records.len(), reader.troubles.len()) == before {
                return Err(Error::Empty { path: place.clone() });
            }
        }
        let Reader { records, troubles } = reader;
        let read = records.len();
        // The same run is in its folder, in the records of its shard and in the merged ones.
        let union = Union::of(records);
        let conflicts = union.conflicts();
        let mut runs: Vec<Run> = union.into_records().into_iter().map(Run::new).collect();
        runs.sort_by_cached_key(|run| (CellKey::of(&run.record), run.record.run.seed));
        Ok(Self { repeated: read - runs.len(), runs, troubles, conflicts })
    }
}

#[derive(Debug, Default)]
struct Reader {
    records: Vec<Record>,
    troubles: Vec<Trouble>,
}

impl Reader {
    fn folder(&mut self, folder: &Path, depth: usize) -> Result<(), Error> {
        let failed = |source| Error::Io { path: folder.to_owned(), source };
        let mut entries = fs::read_dir(folder)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>())
            .map_err(failed)?;
        entries.sort();
        let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
        let records: Vec<&PathBuf> = entries
            .iter()
            .filter(|path| path.extension().is_some_and(|e| e == "jsonl"))
            .filter(|path| !name(path).is_some_and(|name| EVIDENCE.contains(&name.as_str())))
            .collect();
        for file in &records {
            self.file(file)?;
        }
        let verdict = folder.join("verdict.json");
        if verdict.is_file() {
            self.file(&verdict)?;
        } else if folder.join("qemu.cmdline").is_file() || folder.join("console.log").is_file() {
            self.trouble(
                folder,
                "a run without a verdict: it was still going on, or was ended with its matrix",
            );
        } else if depth < DEEPEST {
            for entry in entries.iter().filter(|entry| entry.is_dir() && !entry.is_symlink()) {
                self.folder(entry, depth + 1)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> Result<(), Error> {
        let bytes = fs::read(path).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        let text = String::from_utf8_lossy(&bytes);
        // One JSON value, however many lines it takes, or one a line.
        match serde_json::from_str::<Value>(&text) {
            Ok(Value::Object(mut whole)) => match whole.remove("runs") {
                Some(Value::Array(runs)) => {
                    for (index, run) in runs.into_iter().enumerate() {
                        self.record(run, path, &format!("run {}", index + 1));
                    }
                }
                _ => self.record(Value::Object(whole), path, ""),
            },
            Ok(_) => self.trouble(path, "holds no record"),
            Err(_) => {
                let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
                for (index, line) in lines {
                    let place = format!("line {}", index + 1);
                    match serde_json::from_str(line) {
                        Ok(value) => self.record(value, path, &place),
                        Err(error) if error.is_eof() => {
                            self.trouble_at(
                                path,
                                &place,
                                "breaks off: its writer was ended in the middle of it",
                            );
                        }
                        Err(error) => self.trouble_at(path, &place, &format!("is no JSON: {error}")),
                    }
                }
            }
        }
        Ok(())
    }

    fn record(&mut self, mut value: Value, path: &Path, place: &str) {
        clean_all(&mut value);
        match value.get("schema").and_then(Value::as_u64) {
            Some(schema) if schema == u64::from(SCHEMA) => {}
            Some(schema) => {
                let what = format!("has schema {schema}; this hmmstorm reads schema {SCHEMA}");
                return self.trouble_at(path, place, &what);
            }
            None => return self.trouble_at(path, place, "is no run record"),
        }
        let mut record: Record = match serde_json::from_value(value) {
            Ok(record) => record,
            Err(error) => return self.trouble_at(path, place, &format!("is no run record: {error}")),
        };
        let beside = path.parent().unwrap_or(Path::new(""));
        record.folder = match record.folder.take() {
            Some(folder) => Some(beside.join(folder)),
            None => path.file_name().is_some_and(|name| name == "verdict.json").then(|| beside.to_owned()),
        };
        self.records.push(record);
    }

    fn trouble(&mut self, path: &Path, what: &str) {
        self.trouble_at(path, "", what);
    }

    fn trouble_at(&mut self, path: &Path, place: &str, what: &str) {
        let separator = if place.is_empty() { "" } else { ", " };
        self.troubles
            .push(Trouble { place: format!("{}{separator}{place}", path.display()), what: what.to_owned() });
    }
}

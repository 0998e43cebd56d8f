//! The folder of a matrix: its records are its state, and say what is done.
//!
//! | file | what |
//! |---|---|
//! | `runs.jsonl` | the records, one a line |
//! | `matrix.json` | the plan they were made by, whole |
//! | `findings.json` | what was found, without doubles |
//! | `runs/CELL/seed-N/` | the logs of each run |

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cli::Error;
use crate::judge::record::{self, Record};
use crate::matrix::{Plan, Shard};
use crate::records::{self, Union, Writer};

/// Name of the records file.
pub(super) const RECORDS: &str = "runs.jsonl";
/// Name of the index of findings.
pub(super) const FINDINGS: &str = "findings.json";
const MATRIX: &str = "matrix.json";

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Matrix {
    plan: String,
    hash: String,
    shard: String,
}

/// What the file holds: the plan itself as well, with the columns of the command line, for reports.
#[derive(Debug, Serialize)]
struct Kept<'a> {
    #[serde(flatten)]
    matrix: &'a Matrix,
    definition: &'a Plan,
}

/// An open folder.
#[derive(Debug)]
pub(super) struct State {
    /// The folder.
    pub(super) dir: PathBuf,
    writer: Writer,
    /// What is done.
    pub(super) union: Union,
    /// Bytes of a torn line that was cut off.
    pub(super) torn: usize,
}

impl State {
    /// Opens the folder of a plan, new or to go on with.
    pub(super) fn open(
        dir: &Path,
        plan: &Plan,
        shard: Shard,
        fresh: bool,
        resume: bool,
    ) -> Result<Self, Error> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::harness(format!("cannot {what} {}: {error}", dir.display()))
        };
        let matrix = Matrix { plan: plan.name.clone(), hash: plan.hash(), shard: shard.to_string() };
        if dir.exists() && !dir.is_dir() {
            return Err(Error::usage(format!(
                "--out {}: there is a file of that name, and the records go to a folder",
                dir.display()
            )));
        }
        let file = dir.join(MATRIX);
        if fresh {
            // Only what a matrix makes: the folder may be anybody's.
            for path in [dir.join(RECORDS), file.clone()] {
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("clear", &e)),
                    _ => {}
                }
            }
            match std::fs::remove_dir_all(dir.join("runs")) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed("clear", &e)),
                _ => {}
            }
        }
        std::fs::create_dir_all(dir).map_err(|e| failed("make", &e))?;
        let (writer, loaded) = Writer::open(&dir.join(RECORDS))?;
        if !loaded.records.is_empty() && !resume {
            let before: Option<Matrix> =
                std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
            if before.as_ref() != Some(&matrix) {
                return Err(Error::usage(format!(
                    "{} holds runs of another plan, another version of it or another shard: give another --out, \
                     or --resume to count those of its runs that this plan asks for, or --fresh to start anew",
                    dir.display()
                )));
            }
        }
        record::write_json(&file, &Kept { matrix: &matrix, definition: plan })?;
        Ok(Self { dir: dir.into(), writer, union: Union::of(loaded.records), torn: loaded.torn })
    }

    /// Keeps the record of a run whose logs are in `folder`.
    pub(super) fn keep(&mut self, mut record: Record, folder: &Path) -> Result<(), Error> {
        record.folder = Some(records::file::relative(folder, &self.dir.join(RECORDS)));
        self.writer.append(&record)?;
        self.union.insert(record);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_one_version_of_a_plan() {
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let [one, other] = ["small", "verdict"]
            .map(|name| Plan::load(&repo.join(format!("ci/plans/{name}.toml"))).expect("a plan"));
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("m");
        let open = |plan: &Plan, fresh, resume| State::open(&dir, plan, Shard::WHOLE, fresh, resume);
        let mut state = open(&one, false, false).expect("opened");
        state.keep(records::union::tests::record(1), &dir.join("runs/a")).expect("kept");
        assert!(matches!(open(&one, false, false), Err(Error::Harness(_))), "two at once");
        drop(state);
        let again = open(&one, false, false).expect("opened");
        let kept: Vec<_> = again.union.records().collect();
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].folder.as_deref(), Some(Path::new("runs/a")));
        drop(again);
        assert!(matches!(open(&other, false, false), Err(Error::Usage(_))));
        assert_eq!(open(&other, false, true).expect("opened").union.records().count(), 1);
        assert_eq!(open(&one, true, false).expect("opened").union.records().count(), 0);
        let file = folder.path().join("file");
        std::fs::write(&file, "somebody's").expect("written");
        assert!(matches!(State::open(&file, &one, Shard::WHOLE, true, false), Err(Error::Usage(_))));
        assert_eq!(std::fs::read(&file).expect("still there"), b"somebody's");
    }
}

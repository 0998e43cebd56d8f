//! Files of records: tolerant of a writer that was killed, strict about everything else.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::judge::record::{Record, SCHEMA};

/// A file of records cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A whole line is no record.
    #[error("{}:{line}: not a run record: {why}; remove the line if you know how it came there", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
    /// Written by a version that this one does not understand.
    #[error("{}:{line}: schema {found}, and this hmmstorm reads {SCHEMA}; use the version that wrote it", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Its number, from 1.
        line: usize,
        /// The version.
        found: u64,
    },
    /// Another process appends to it.
    #[error("{} is being written by another hmmstorm: wait for it, or choose another file", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
}

/// What a file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// Its records, in the order of the file.
    pub records: Vec<Record>,
    /// Bytes of a last line without an end: what a writer that was killed leaves. They are not lost runs: a run's folder
    /// is there in any case.
    pub torn: usize,
}

/// Reads a file of records. Missing fields of older versions have their defaults, unknown ones of newer versions are
/// skipped; a torn last line is reported, not an error.
///
/// # Errors
/// [`Error`].
pub fn load(path: &Path) -> Result<Loaded, Error> {
    let bytes =
        std::fs::read(path).map_err(|source| Error::Io { what: "read", path: path.into(), source })?;
    parse(path, &bytes)
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Loaded, Error> {
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let mut records = Vec::new();
    for (index, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        records.push(record(path, index + 1, line)?);
    }
    Ok(Loaded { records, torn: bytes.len() - whole })
}

fn record(path: &Path, line: usize, text: &[u8]) -> Result<Record, Error> {
    let bad = |why: serde_json::Error| Error::Line { path: path.into(), line, why: why.to_string() };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(bad)?;
    match value.get("schema").and_then(serde_json::Value::as_u64) {
        Some(found) if found == u64::from(SCHEMA) => {}
        Some(found) => return Err(Error::Schema { path: path.into(), line, found }),
        None => {
            let why = "it has no schema number".to_owned();
            return Err(Error::Line { path: path.into(), line, why });
        }
    }
    serde_json::from_value(value).map_err(bad)
}

/// The folder of a run as a records file names it: from the file's own folder, so that both can be moved together.
#[must_use]
pub fn relative(folder: &Path, records: &Path) -> PathBuf {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
    let (folder, records) = (absolute(folder), absolute(records));
    let base = records.parent().unwrap_or(Path::new("/"));
    folder.strip_prefix(base).map_or_else(|_| folder.clone(), Path::to_path_buf)
}

/// The line of a record.
fn line(record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    let mut line = serde_json::to_vec(record)?;
    line.push(b'\n');
    Ok(line)
}

/// Writes records as a whole file, there whole or not at all.
///
/// # Errors
/// [`Error::Io`].
pub fn write<'a>(path: &Path, records: impl IntoIterator<Item = &'a Record>) -> Result<(), Error> {
    let failed = |source| Error::Io { what: "write", path: path.into(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(failed)?;
    let mut file = tempfile::Builder::new().prefix(".hmmstorm-").tempfile_in(folder).map_err(failed)?;
    for record in records {
        file.write_all(&line(record).map_err(|e| failed(e.into()))?).map_err(failed)?;
    }
    file.as_file().sync_all().map_err(failed)?;
    let file = file.persist(path).map_err(|error| failed(error.error))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.set_permissions(mode).map_err(failed)
}

/// Appends to a file, alone: others that want to are refused.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
}

impl Writer {
    /// Opens `path`, or creates it, and gives what is in it. A torn last line is cut off.
    ///
    /// # Errors
    /// [`Error`]; [`Error::Busy`] if another process has it open for writing.
    pub fn open(path: &Path) -> Result<(Self, Loaded), Error> {
        let failed = |what| move |source| Error::Io { what, path: path.into(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed("create the folder of"))?;
        }
        let open = OpenOptions::new().read(true).append(true).create(true).open(path);
        let mut file = open.map_err(failed("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(Error::Busy { path: path.into() }),
            Err(std::fs::TryLockError::Error(source)) => return Err(failed("lock")(source)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed("read"))?;
        let loaded = parse(path, &bytes)?;
        if loaded.torn > 0 {
            file.set_len((bytes.len() - loaded.torn) as u64).map_err(failed("truncate"))?;
            file.seek(SeekFrom::End(0)).map_err(failed("seek in"))?;
        }
        Ok((Self { path: path.into(), file }, loaded))
    }

    /// Appends a record, with one write: it is on disk when this returns.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&mut self, record: &Record) -> Result<(), Error> {
        let path = &self.path;
        let failed = |source| Error::Io { what: "append to", path: path.clone(), source };
        let line = line(record).map_err(|e| failed(e.into()))?;
        self.file.write_all(&line).map_err(failed)?;
        self.file.sync_data().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::union::tests::record;

    fn folder() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("deep/runs.jsonl");
        (folder, path)
    }

    #[test]
    fn what_was_appended_is_loaded() {
        let (_folder, path) = folder();
        let (mut writer, loaded) = Writer::open(&path).expect("opened");
        assert_eq!(loaded, Loaded::default());
        let records = [record(1), record(2)];
        for record in &records {
            writer.append(record).expect("appended");
        }
        assert!(matches!(Writer::open(&path), Err(Error::Busy { .. })));
        drop(writer);
        assert_eq!(load(&path).expect("loaded").records, records);
        let whole = path.with_file_name("whole.jsonl");
        write(&whole, &records).expect("written");
        assert_eq!(std::fs::read(&whole).expect("read"), std::fs::read(&path).expect("read"));
    }

    #[test]
    fn a_line_torn_anywhere_costs_that_line_alone() {
        let (_folder, path) = folder();
        let last = line(&record(2)).expect("a line");
        for cut in [0, 1, last.len() / 2, last.len() - 1] {
            let mut bytes = line(&record(1)).expect("a line");
            bytes.extend(&last[..cut]);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(&path, &bytes).expect("written");
            let loaded = load(&path).expect("loaded");
            assert_eq!((loaded.records.len(), loaded.torn), (1, cut));
            let (mut writer, _) = Writer::open(&path).expect("opened");
            writer.append(&record(3)).expect("appended");
            drop(writer);
            let loaded = load(&path).expect("loaded");
            assert_eq!(loaded.records, [record(1), record(3)]);
            assert_eq!(loaded.torn, 0);
        }
    }

    #[test]
    fn a_bad_line_within_is_an_error_with_its_number() {
        let (_folder, path) = folder();
        let good = String::from_utf8(line(&record(1)).expect("a line")).expect("text");
        let newer = good.replacen("\"schema\":1", "\"schema\":2", 1);
        for (bad, says) in [("{\n", ":2:"), ("{}\n", "no schema"), (newer.as_str(), "schema 2")] {
            let error = parse(&path, format!("{good}{bad}{good}").as_bytes()).expect_err("refused");
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn older_and_newer_lines_of_the_schema_are_read() {
        let (_folder, path) = folder();
        let mut value = serde_json::to_value(record(1)).expect("a value");
        let object = value.as_object_mut().expect("an object");
        for added_later in ["id", "began", "measures"] {
            object.remove(added_later);
        }
        object.insert("of_the_future".into(), 1.into());
        let loaded = parse(&path, format!("{value}\n").as_bytes()).expect("parsed");
        assert_eq!(loaded.records[0].judgement, record(1).judgement);
    }
}

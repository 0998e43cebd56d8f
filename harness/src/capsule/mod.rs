//! Capsules: one file that holds all a finding needs to happen again elsewhere.
//!
//! A capsule is JSON: the run's whole record, with everything that defines it and the hashes of what ran and what came out;
//! the texts of all patches; the logs, as evidence. [`differences`] says what is not the same here, [`shrink`] makes it
//! smaller. `docs/capsules.md` describes the file.

pub mod differences;
pub mod shrink;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::GzDecoder;
use flate2::{Compression, GzBuilder};
use hmmstorm_abi::wire::event::cmdline;
use serde::{Deserialize, Serialize};

use crate::build::image::AppliedPatch;
use crate::build::patches::Origin;
use crate::build::{BuildError, Image};
use crate::judge::record::{self, Record};

/// Format written and read here.
const FORMAT: u32 = 1;
/// Most bytes of a text that a capsule is believed to hold: a guard against a file that was made to fill the memory.
const LARGEST: u64 = 256 << 20;

/// Name of the capsule in the folder of a run that found something.
pub const FILE: &str = "capsule.json";

/// A capsule.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capsule {
    format: u32,
    /// The finding in a line.
    pub title: String,
    /// The command that makes the run, for people: with a kernel that has the patches below.
    pub command: String,
    /// The run.
    pub record: Record,
    /// All patches of its kernel, in order of application.
    pub patches: Vec<PatchText>,
    /// Its logs, by name.
    pub logs: BTreeMap<String, Packed>,
}

/// A patch with its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchText {
    /// What the image says of it.
    #[serde(flatten)]
    pub patch: AppliedPatch,
    /// What it says.
    pub text: Packed,
}

/// Bytes, compressed with gzip and written as Base64.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Packed(String);

impl Packed {
    fn new(bytes: &[u8]) -> io::Result<Self> {
        // No name and no time in the header: the same bytes always give the same text.
        let mut gzip = GzBuilder::new().write(Vec::new(), Compression::best());
        gzip.write_all(bytes)?;
        Ok(Self(STANDARD.encode(gzip.finish()?)))
    }

    /// The bytes.
    ///
    /// # Errors
    /// Text that is no such thing.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let packed = STANDARD.decode(&self.0).map_err(io::Error::other)?;
        let mut bytes = Vec::new();
        GzDecoder::new(&packed[..]).take(LARGEST).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

/// A capsule cannot be made, read or used.
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
    /// The file is no capsule.
    #[error("{} is no capsule: {why}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The image's patches are gone.
    #[error(transparent)]
    Image(Box<BuildError>),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] record::Error),
}

impl Capsule {
    /// The capsule of a run whose logs are in `folder`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn of(record: &Record, image: &Image, folder: &Path) -> Result<Self, Error> {
        let pack = |path: &Path, bytes: &[u8]| {
            Packed::new(bytes).map_err(|source| Error::Io { what: "compress", path: path.into(), source })
        };
        let mut logs = BTreeMap::new();
        for name in record.files.keys() {
            let path = folder.join(name);
            let bytes = std::fs::read(&path).map_err(|source| Error::Io {
                what: "read",
                path: path.clone(),
                source,
            })?;
            logs.insert(name.clone(), pack(&path, &bytes)?);
        }
        let mut patches = Vec::new();
        for (patch, text) in image.patches().map_err(|error| Error::Image(Box::new(error)))? {
            let text = pack(Path::new(&patch.name), &text)?;
            patches.push(PatchText { patch, text });
        }
        Ok(Self {
            format: FORMAT,
            title: record.title.clone().unwrap_or_default(),
            command: command(record),
            record: Record { folder: None, ..record.clone() },
            patches,
            logs,
        })
    }

    /// Reads a capsule and checks that its patches are what it says they are.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(path: &Path) -> Result<Self, Error> {
        let failed = |why: String| Error::Format { path: path.into(), why };
        let text =
            std::fs::read(path).map_err(|source| Error::Io { what: "read", path: path.into(), source })?;
        let value: serde_json::Value =
            serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        match value["format"].as_u64() {
            Some(format) if format == u64::from(FORMAT) => {}
            Some(format) => {
                return Err(failed(format!("it has format {format}, this hmmstorm reads {FORMAT}")));
            }
            None => return Err(failed("it has no format number".to_owned())),
        }
        let capsule: Self = serde_json::from_value(value).map_err(|error| failed(error.to_string()))?;
        for PatchText { patch, text } in &capsule.patches {
            let text = text.bytes().map_err(|error| failed(format!("{}: {error}", patch.name)))?;
            if record::sha256(&text) != patch.sha256 {
                return Err(failed(format!("the text of {} does not have its checksum", patch.name)));
            }
        }
        Ok(capsule)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        Ok(record::write_json(path, self)?)
    }

    /// Parameters of the scenario that the run's command line set; the others had their defaults.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, String)> {
        set_parameters(&self.record)
    }
}

fn set_parameters(record: &Record) -> Vec<(String, String)> {
    let words = record.provenance.kernel_command_line.split_ascii_whitespace();
    let pair = |word: &str| {
        let (name, value) = word.strip_prefix(cmdline::PARAMETER_PREFIX)?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    };
    words.filter_map(pair).collect()
}

/// The options that ask for a run's kernel, as name and value: its variant, or the user's tree and files by their names.
#[must_use]
pub fn kernel_options(record: &Record) -> Vec<(&'static str, String)> {
    let image = &record.provenance.image;
    let patches: Vec<AppliedPatch> = serde_json::from_value(image["patches"].clone()).unwrap_or_default();
    let own: Vec<_> = patches.iter().filter(|patch| patch.origin == Some(Origin::User)).collect();
    let tree = image["tree"].as_str();
    if own.is_empty() && tree.is_none() {
        return vec![("--variant", record.run.variant.clone())];
    }
    let mut below: Vec<&str> = Vec::new();
    for patch in &patches {
        if let Some(Origin::Variant(name)) = &patch.origin
            && below.last() != Some(&name.as_str())
        {
            below.push(name);
        }
    }
    let mut options: Vec<_> = tree.map(|commit| ("--tree", format!("DIR-AT-{commit}"))).into_iter().collect();
    if !below.is_empty() {
        options.push(("--variant", below.join("+")));
    }
    for patch in own {
        // Of a series the mailbox is what can be given.
        let file = match patch.name.split_once(", mail ") {
            Some((mailbox, _)) => ("--mbox", mailbox.to_owned()),
            None => ("--patch", patch.name.clone()),
        };
        if !options.contains(&file) {
            options.push(file);
        }
    }
    options
}

/// The command that makes a run. Words that the scenario itself adds to the kernel's command line are not told apart from
/// the user's, and are left out.
#[must_use]
pub fn command(record: &Record) -> String {
    let run = &record.run;
    let mut words = vec![format!("hmmstorm storm {}", run.scenario)];
    words.extend(kernel_options(record).iter().map(|(option, value)| format!("{option} {value}")));
    words.extend(run.control.iter().map(|control| format!("--control {control}")));
    if run.control.is_none() {
        words.extend(set_parameters(record).iter().map(|(name, value)| format!("--param {name}={value}")));
    }
    words.push(format!("--preempt {} --cpus {} --gpus {}", run.preempt, run.cpus, run.gpus));
    words.push(format!("--profile {} --memory {} --vram {}", run.profile, run.memory, run.vram));
    words.extend(run.chaos.iter().map(|plan| format!("--chaos {plan}")));
    words.push(format!("--seed {} --expect {}", run.seed, record.judgement.verdict));
    if run.mode == "deterministic" {
        words.push("--deterministic".to_owned());
    }
    words.join(" ")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::records::union::tests::record;

    /// The capsule of some run.
    pub(crate) fn capsule() -> Capsule {
        let mut record = record(7);
        record.provenance.kernel_command_line =
            "console=ttyS0 storm.seed=7 storm.p.rounds=2 storm.p.order=a=b quiet".into();
        let text = b"--- a/x\n+++ b/x\n";
        let patch = AppliedPatch { name: "x.patch".into(), origin: None, sha256: record::sha256(text) };
        Capsule {
            format: FORMAT,
            title: "livelock in x".into(),
            command: command(&record),
            record,
            patches: vec![PatchText { patch, text: Packed::new(text).expect("packed") }],
            logs: BTreeMap::from([("console.log".into(), Packed::new(b"[ 0.0] hello\n").expect("packed"))]),
        }
    }

    #[test]
    fn a_capsule_survives_its_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE);
        capsule().save(&path).expect("saved");
        let back = Capsule::load(&path).expect("loaded");
        assert_eq!(back, capsule());
        assert_eq!(back.logs["console.log"].bytes().expect("bytes"), b"[ 0.0] hello\n");
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(back.parameters(), [pair("rounds", "2"), pair("order", "a=b")]);
        assert!(back.command.contains("--param rounds=2") && back.command.ends_with("--deterministic"));
    }

    #[test]
    fn a_kernel_of_the_user_is_asked_for_by_its_parts() {
        let mut record = record(1);
        assert!(command(&record).contains(&format!("--variant {}", record.run.variant)));
        let patch = |name: &str, origin| AppliedPatch {
            name: name.into(),
            origin: Some(origin),
            sha256: "5f".into(),
        };
        let patches = [
            patch("0001-x.patch", Origin::Abstraction),
            patch("wait.patch", Origin::Variant("wait-on-locked".into())),
            patch("s.mbox, mail 1 (a)", Origin::User),
            patch("s.mbox, mail 2 (b)", Origin::User),
            patch("my.patch", Origin::User),
        ];
        record.provenance.image["patches"] = serde_json::to_value(patches).expect("a value");
        let says = command(&record);
        assert!(
            says.contains(" --variant wait-on-locked --mbox s.mbox --patch my.patch --preempt"),
            "{says}"
        );
        record.provenance.image["tree"] = "v6.19-3-gabc".into();
        assert!(command(&record).contains(" --tree DIR-AT-v6.19-3-gabc --variant"), "{}", command(&record));
    }

    #[test]
    fn what_is_no_capsule_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(FILE);
        let good = serde_json::to_value(capsule()).expect("a value");
        let mut changed = good.clone();
        changed["patches"][0]["text"] =
            serde_json::to_value(Packed::new(b"other").expect("packed")).expect("v");
        let mut newer = good.clone();
        newer["format"] = 2.into();
        for (text, says) in [
            (changed.to_string(), "checksum"),
            (newer.to_string(), "format 2"),
            ("{}".to_owned(), "no format"),
            (good.to_string()[..100].to_owned(), "is no capsule"),
        ] {
            std::fs::write(&path, text).expect("written");
            let error = Capsule::load(&path).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}

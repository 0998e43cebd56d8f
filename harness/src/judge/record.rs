//! `verdict.json`: what a run was, what was seen, and what it was called. `docs/verdicts.md` explains the fields.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use hmmstorm_abi::wire::control::GpuStats;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::console::Finding;
use super::cycle::Cycle;
use super::measures::Measures;
use super::sampler::{CpuSummary, Mode, Sampler};
use super::stack::chain;
use super::structures::Structures;
use super::verdict::{Judgement, Verdict};

/// Version of the schema; grows when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

/// The record of one run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Hash of everything that defines the run ([`crate::records::id`]): in deterministic mode, equal ids have equal logs.
    #[serde(default)]
    pub id: String,
    /// When it began, seconds since 1970.
    #[serde(default)]
    pub began: u64,
    /// Where its files are, seen from the folder of the records file; none in `verdict.json` itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folder: Option<PathBuf>,
    /// Group of the plan that asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What was asked for.
    pub run: Run,
    /// What `--expect`, or the control, expects; `pass` otherwise.
    pub expected: Verdict,
    /// The verdict is the expected one.
    pub as_expected: bool,
    /// The verdict, why, and the evidence.
    #[serde(flatten)]
    pub judgement: Judgement,
    /// The finding in a line; none for `pass`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The finding's identity: equal for runs that found the same, whatever the kernel build, CPU or seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// Who waits for whom, for `livelock`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle: Option<Cycle>,
    /// The same read from the guest's memory, of a real-time run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub structures: Option<Structures>,
    /// Where the workload stood at the end.
    pub progress: Totals,
    /// What was measured on the way.
    #[serde(default)]
    pub measures: Measures,
    /// The device's counters at the end, by GPU.
    pub device: Vec<GpuStats>,
    /// The driver's counters by GPU: at the end, or the last that were told before a hang.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub driver: Vec<BTreeMap<String, u64>>,
    /// What each CPU did since the last completion, if nothing completed for a while.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<CpuSummary>,
    /// The kernel's complaints, by guest time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub complaints: Vec<Finding>,
    /// How long things took.
    pub timings: Timings,
    /// What ran.
    pub provenance: Provenance,
    /// Files of the run's folder, by name.
    pub files: BTreeMap<String, FileHash>,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Scenario.
    pub scenario: String,
    /// Control of it.
    pub control: Option<String>,
    /// Every parameter in force, defaults included; those asked for alone if the scenario did not begin.
    pub parameters: BTreeMap<String, String>,
    /// Fix candidate.
    pub variant: String,
    /// Preemption model.
    pub preempt: String,
    /// CPUs.
    pub cpus: u32,
    /// GPUs.
    pub gpus: u32,
    /// `real-time` or `deterministic`.
    pub mode: String,
    /// `kvm` or `tcg`.
    pub engine: String,
    /// Machine profile.
    pub profile: String,
    /// Seed of workload and schedule.
    pub seed: u64,
    /// Fault plan of the device.
    pub chaos: Option<String>,
    /// Memory of the guest, as on the command line.
    #[serde(default)]
    pub memory: String,
    /// Memory of each GPU.
    #[serde(default)]
    pub vram: String,
    /// Further words of the kernel's command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub append: Vec<String>,
}

/// Where the workload stood.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Round under way.
    pub round: u64,
    /// Operations completed.
    pub operations: u64,
    /// Device page faults resolved.
    pub faults: u64,
    /// Operations by worker name.
    pub workers: BTreeMap<String, u64>,
}

/// Milliseconds of host time since QEMU was started, but for `guest_elapsed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// PID 1 ran.
    pub hello_ms: Option<u64>,
    /// The GPUs were bound.
    pub bound_ms: Option<u64>,
    /// The scenario began.
    pub start_ms: Option<u64>,
    /// The scenario ended.
    pub done_ms: Option<u64>,
    /// The verdict was certain.
    pub verdict_ms: u64,
    /// Everything had ended.
    pub total_ms: u64,
    /// Guest time of the scenario.
    pub guest_elapsed_ms: Option<u64>,
}

/// What ran, to the byte.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Kernel, patches, config, driver, storm and tools, as the build recorded them.
    pub image: serde_json::Value,
    /// SHA-256 of the files that were booted and run, by role.
    pub binaries: BTreeMap<String, String>,
    /// QEMU's version.
    pub qemu_version: Option<String>,
    /// Version of this harness.
    pub harness_version: String,
    /// Commit of its source tree, with `-dirty` if it had changes.
    pub harness_commit: Option<String>,
    /// This command's own arguments.
    pub command_line: Vec<String>,
    /// QEMU's command line.
    pub qemu_command_line: String,
    /// The device's command line.
    pub device_command_line: Option<String>,
    /// The guest kernel's command line.
    pub kernel_command_line: String,
    /// `uname -srvm` of the host.
    pub host: String,
}

/// A file of the run's folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256, hexadecimal.
    pub sha256: String,
}

/// A record could not be written, or a file not hashed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct Error {
    /// What was tried.
    what: &'static str,
    /// On which file.
    path: PathBuf,
    /// Why it failed.
    source: io::Error,
}

/// The finding's title: verdict and the functions that name it.
#[must_use]
pub fn title(judgement: &Judgement) -> Option<String> {
    match judgement.verdict {
        Verdict::Pass => None,
        verdict if judgement.frames.is_empty() => Some(format!("{verdict}: {}", judgement.reason)),
        verdict => Some(format!("{verdict} in {}", chain(&judgement.frames, 3))),
    }
}

/// The finding's identity: verdict and stable frames, hashed. A harness error is no finding.
#[must_use]
pub fn identity(judgement: &Judgement, cycle: Option<&Cycle>) -> Option<String> {
    if matches!(judgement.verdict, Verdict::Pass | Verdict::HarnessError) {
        return None;
    }
    let mut text = judgement.verdict.name().to_owned();
    for frame in &judgement.frames {
        text.push('\n');
        text.push_str(frame);
    }
    // The same loop can be fed by different holders, and those are different bugs.
    if let Some(wait) = cycle.and_then(|cycle| cycle.waits_for.as_ref()) {
        text.push_str("\nwaits for ");
        text.push_str(&wait.function);
    }
    let digest = Sha256::digest(text.as_bytes());
    Some(format!("{}-{}", judgement.verdict, hex(&digest[..6])))
}

/// SHA-256 of some bytes, hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes what the CPUs were seen doing, one look at one CPU a line, stacks leaf first. The file is evidence for people:
/// its times are the host's, so it differs even where equal runs have equal logs, and is not hashed.
pub fn write_samples(path: &Path, sampler: &Sampler) -> Result<(), Error> {
    #[derive(Serialize)]
    struct Line<'a> {
        at_ms: u128,
        cpu: u32,
        mode: Mode,
        complete: bool,
        stack: Vec<&'a str>,
    }
    let failed = |source| Error { what: "write", path: path.into(), source };
    let mut file = io::BufWriter::new(File::create(path).map_err(failed)?);
    for cpu in 0..sampler.cpus() {
        for sample in sampler.samples(cpu) {
            let stack = sample.stack.iter().map(|frame| frame.function.as_str()).collect();
            let line = Line {
                at_ms: sample.at.as_millis(),
                cpu,
                mode: sample.mode,
                complete: sample.complete,
                stack,
            };
            serde_json::to_writer(&mut file, &line).map_err(|error| failed(error.into()))?;
            file.write_all(b"\n").map_err(failed)?;
        }
    }
    file.flush().map_err(failed)
}

/// Hashes a file.
pub fn hash(path: &Path) -> Result<FileHash, Error> {
    let failed = |source| Error { what: "hash", path: path.into(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(FileHash { bytes, sha256: hex(&hasher.finalize()) }),
            n => {
                bytes += n as u64;
                hasher.update(&buffer[..n]);
            }
        }
    }
}

/// Writes JSON so that the file is there whole or not at all.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let failed = |source| Error { what: "write", path: path.into(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".hmmstorm-").tempfile_in(folder).map_err(failed)?;
    serde_json::to_writer_pretty(&mut file, value).map_err(|error| failed(error.into()))?;
    file.write_all(b"\n").and_then(|()| file.as_file().sync_all()).map_err(failed)?;
    let file = file.persist(path).map_err(|error| failed(error.error))?;
    // A temporary file is its owner's alone; a result is for everybody who may look into the folder.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.set_permissions(mode).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judgement(verdict: Verdict, frames: &[&str]) -> Judgement {
        Judgement {
            verdict,
            reason: "because".into(),
            frames: frames.iter().map(|&frame| frame.to_owned()).collect(),
            spinners: Vec::new(),
            evidence: Vec::new(),
            recovered: None,
            also: Vec::new(),
        }
    }

    #[test]
    fn identities() {
        let livelock = judgement(Verdict::Livelock, &["hmm_range_fault", "hsgpu_access"]);
        let id = identity(&livelock, None).expect("an identity");
        assert!(id.starts_with("livelock-") && id.len() == "livelock-".len() + 12, "{id}");
        assert_eq!(
            identity(
                &Judgement { reason: "other words".into(), spinners: vec![3], ..livelock.clone() },
                None
            ),
            Some(id.clone())
        );
        assert_ne!(identity(&judgement(Verdict::Livelock, &["other"]), None), Some(id.clone()));
        assert_ne!(
            identity(&judgement(Verdict::Deadlock, &["hmm_range_fault", "hsgpu_access"]), None),
            Some(id)
        );
        assert_eq!(identity(&judgement(Verdict::Pass, &[]), None), None);
        assert_eq!(identity(&judgement(Verdict::HarnessError, &[]), None), None);
        assert_eq!(title(&livelock).as_deref(), Some("livelock in hmm_range_fault ← hsgpu_access"));
    }

    #[test]
    fn known_hash() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "abc").expect("written");
        let hash = hash(file.path()).expect("a hash");
        assert_eq!((hash.bytes, &hash.sha256[..16]), (3, "ba7816bf8f01cfea"));
    }

    #[test]
    fn a_full_disk_leaves_no_half_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("verdict.json");
        write_json(&path, &vec![1, 2]).expect("written");
        assert_eq!(
            std::fs::read_to_string(&path).expect("read").split_whitespace().collect::<String>(),
            "[1,2]"
        );
        let error = write_json(&folder.path().join("none/verdict.json"), &1).expect_err("no such folder");
        assert!(error.to_string().contains("none/verdict.json"), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).expect("folder").count(), 1);
    }
}

//! KVM or TCG: what this host can do, proved once and remembered.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::Engine;
use super::children::Child;
use crate::cli::Accel;

/// Time for the proof, which takes milliseconds where KVM works.
const PROOF: Duration = Duration::from_secs(5);
/// The hidden command that runs the proof in a process of its own.
pub const PROBE_COMMAND: &str = "kvm-probe";

/// What is known about KVM on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The host that this holds for: kernel and CPU.
    host: String,
    /// Whether guests run.
    pub works: bool,
    /// How we know.
    pub reason: String,
}

/// Where answers are kept.
#[derive(Debug)]
pub struct Memory {
    file: PathBuf,
}

/// An answer could not be written down.
#[derive(Debug, thiserror::Error)]
#[error("cannot remember in {} what KVM can do: {source}", file.display())]
pub struct MemoryError {
    file: PathBuf,
    source: io::Error,
}

impl Memory {
    /// In the cache folder.
    pub fn new(cache: &Path) -> Self {
        Self { file: cache.join("host").join("kvm.json") }
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// What was found earlier, on this very host.
    pub fn recall(&self) -> Option<Answer> {
        let answer: Answer = serde_json::from_slice(&fs::read(&self.file).ok()?).ok()?;
        (answer.host == host()).then_some(answer)
    }

    /// Keeps an answer for this host.
    pub fn remember(&self, works: bool, reason: &str) -> Result<Answer, MemoryError> {
        let answer = Answer { host: host(), works, reason: reason.into() };
        let write = || -> io::Result<()> {
            let dir = self.file.parent().unwrap_or(Path::new("."));
            fs::create_dir_all(dir)?;
            // Whole or not at all, whoever else writes.
            let mut file = tempfile::NamedTempFile::new_in(dir)?;
            serde_json::to_writer_pretty(&mut file, &answer)?;
            file.persist(&self.file)?;
            Ok(())
        };
        write().map_err(|source| MemoryError { file: self.file.clone(), source })?;
        Ok(answer)
    }

    /// What is known, proving it now if nothing is.
    pub fn answer(&self) -> Result<Answer, MemoryError> {
        match self.recall() {
            Some(answer) => Ok(answer),
            None => {
                let (works, reason) = prove();
                self.remember(works, &reason)
            }
        }
    }
}

/// Which engine `accel` means on this host, and why.
pub fn choose(accel: Accel, deterministic: bool, memory: &Memory) -> Result<(Engine, String), MemoryError> {
    Ok(match accel {
        Accel::Tcg => (Engine::Tcg, "--accel tcg".into()),
        Accel::Kvm => (Engine::Kvm, "--accel kvm".into()),
        Accel::Auto if deterministic => (Engine::Tcg, "--deterministic counts instructions".into()),
        Accel::Auto => {
            let answer = memory.answer()?;
            (if answer.works { Engine::Kvm } else { Engine::Tcg }, answer.reason)
        }
    })
}

/// Runs the proof of [`super::kvm`] in a child with a time limit.
pub fn prove() -> (bool, String) {
    match run_probe() {
        Ok(verdict) => verdict,
        Err(error) => (false, format!("the proof could not be run: {error}")),
    }
}

fn run_probe() -> io::Result<(bool, String)> {
    if !Path::new("/dev/kvm").exists() {
        return Ok((false, "there is no /dev/kvm".into()));
    }
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(PROBE_COMMAND).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = Child::spawn("the KVM proof", command, Path::new("none")).map_err(io::Error::other)?;
    let stdout = child.take_stdout();
    match child.wait_until(Instant::now() + PROOF)? {
        None => {
            child.kill();
            Ok((false, format!("64-bit guest code did not end within {} s", PROOF.as_secs())))
        }
        Some(status) => {
            let said = stdout.map(io::read_to_string).transpose()?.unwrap_or_default();
            let said = said.trim();
            let reason = if said.is_empty() { format!("the proof ended with {status}") } else { said.into() };
            Ok((status.success(), reason))
        }
    }
}

/// Kernel and CPU: what an answer depends on.
fn host() -> String {
    let uname = rustix::system::uname();
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|l| l.split(':').next().is_some_and(|k| k.trim() == name));
        line.and_then(|l| l.split_once(':')).map_or("?", |(_, v)| v.trim()).to_owned()
    };
    let cpu = ["vendor_id", "cpu family", "model", "stepping", "model name"].map(field).join("/");
    format!("{} {} on {cpu}", uname.release().to_string_lossy(), uname.version().to_string_lossy())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_kept_for_this_host_only() {
        let cache = tempfile::tempdir().expect("folder");
        let memory = Memory::new(cache.path());
        assert_eq!(memory.recall(), None);
        memory.remember(false, "no hello").expect("write");
        let answer = memory.recall().expect("remembered");
        assert_eq!((answer.works, answer.reason.as_str()), (false, "no hello"));
        let text = fs::read_to_string(memory.file()).expect("file").replace(&host(), "another host");
        fs::write(memory.file(), text).expect("write");
        assert_eq!(memory.recall(), None);
    }

    #[test]
    fn a_forced_choice_asks_nobody() {
        let memory = Memory::new(Path::new("/nonexistent/cache"));
        assert_eq!(choose(Accel::Tcg, false, &memory).expect("tcg").0, Engine::Tcg);
        assert_eq!(choose(Accel::Kvm, false, &memory).expect("kvm").0, Engine::Kvm);
        assert_eq!(choose(Accel::Auto, true, &memory).expect("deterministic").0, Engine::Tcg);
    }
}

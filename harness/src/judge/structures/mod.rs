//! The cycle as the guest's own data structures have it: which page table entry each spinner is at, which folio that
//! is, in whose migration it is locked, which work item that migration waits for, and what runs on the CPU that is to
//! run it. Nothing of it comes from the console or from the names of functions in a sampled stack.
//!
//! `reader.py` does the reading, with drgn over the kernel's debug information, straight from the memory that QEMU
//! shares with the device. The machine has to stand still meanwhile.

mod cycle;
mod draw;

#[cfg(test)]
pub(crate) use cycle::tests;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use object::{Object, ObjectSymbol};
use serde::Serialize;

pub use cycle::{By, Closing, Link, Structures, Task};
pub use draw::svg;

use crate::vm::children::{Child, SpawnError};
use crate::vm::ram::Segment;

/// The reader.
const SCRIPT: &str = include_str!("reader.py");

/// Time for it. It takes seconds, most of them for the debug information.
const LIMIT: Duration = Duration::from_secs(120);

/// What runs the reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reader {
    /// A Python 3.
    pub python: PathBuf,
    /// The folder with the drgn that goes with it.
    pub drgn: PathBuf,
}

/// A guest that stands still.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// A file that holds its memory.
    pub memory: &'a Path,
    /// Where in the file what is.
    pub segments: &'a [Segment],
    /// What `info registers -a` says.
    pub registers: &'a str,
    /// Its kernel, unstripped.
    pub vmlinux: &'a Path,
    /// `uname -r`.
    pub release: &'a str,
    /// Its modules, unstripped.
    pub modules: &'a [&'a Path],
}

/// Why the structures were not read. It changes no verdict.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has no such symbol.
    #[error("cannot find the symbols that drgn begins with in {}: {why}", vmlinux.display())]
    Symbols {
        /// The kernel.
        vmlinux: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The reader cannot be run.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It did not come to an end.
    #[error("reading the guest's memory took more than {} s; its log is {}", LIMIT.as_secs(), log.display())]
    Slow {
        /// What it said.
        log: PathBuf,
    },
    /// It failed.
    #[error("reading the guest's memory failed ({status}): {last}; its log is {}", log.display())]
    Failed {
        /// How it ended.
        status: String,
        /// The last line that it said.
        last: String,
        /// All that it said.
        log: PathBuf,
    },
    /// What it wrote makes no sense.
    #[error("the reading of the guest's memory makes no sense: {0}")]
    Garbled(#[from] serde_json::Error),
    /// A file of the run folder failed.
    #[error("cannot use {}: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[derive(Serialize)]
struct Request<'a> {
    drgn: &'a Path,
    memory: &'a Path,
    segments: &'a [Segment],
    registers: &'a str,
    vmcoreinfo: String,
    vmlinux: &'a Path,
    modules: &'a [&'a Path],
}

impl Reader {
    /// Reads the cycle. Leaves `structures.json` (what was read) and `structures.log` (what the reader said) in `folder`.
    pub fn read(&self, guest: &Guest<'_>, folder: &Path) -> Result<Structures, Error> {
        let at = |name: &str| folder.join(name);
        let (request, answer, log) = (at("structures.request"), at("structures.json"), at("structures.log"));
        let question = Request {
            drgn: &self.drgn,
            memory: guest.memory,
            segments: guest.segments,
            registers: guest.registers,
            vmcoreinfo: vmcoreinfo(guest.vmlinux, guest.release)?,
            vmlinux: guest.vmlinux,
            modules: guest.modules,
        };
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        fs::write(&request, serde_json::to_vec(&question)?).map_err(io(&request))?;
        let mut command = Command::new(&self.python);
        command
            // Nothing of the user's Python gets in the way.
            .args(["-I", "-B", "-c", SCRIPT])
            .stdin(File::open(&request).map_err(io(&request))?)
            .stdout(Stdio::from(File::create(&answer).map_err(io(&answer))?))
            .stderr(Stdio::from(File::create(&log).map_err(io(&log))?));
        let mut child = Child::spawn("the reader of the guest's memory", command, &log)?;
        let status = child.wait_until(Instant::now() + LIMIT).map_err(io(&log))?;
        // Its bulk is the registers, which are of no use without the memory.
        let _ = fs::remove_file(&request);
        let Some(status) = status else { return Err(Error::Slow { log }) };
        if !status.success() {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let last = said.lines().last().unwrap_or("it said nothing").to_owned();
            return Err(Error::Failed { status: status.to_string(), last, log });
        }
        let text = fs::read(&answer).map_err(io(&answer))?;
        Ok(Structures::of(serde_json::from_slice(&text)?))
    }
}

/// What drgn has to know before it can translate an address, in the format in which a kernel tells it to a crash dump
/// (`kernel/vmcore_info.c`). The guest runs where it was linked (`nokaslr`) and has four levels of page tables.
fn vmcoreinfo(vmlinux: &Path, release: &str) -> Result<String, Error> {
    let failed = |why: String| Error::Symbols { vmlinux: vmlinux.to_owned(), why };
    let data = fs::read(vmlinux).map_err(|error| failed(error.to_string()))?;
    let file = object::File::parse(&*data).map_err(|error| failed(error.to_string()))?;
    let mut text = format!(
        "OSRELEASE={release}\nPAGESIZE=4096\nNUMBER(phys_base)=0\nNUMBER(pgtable_l5_enabled)=0\nKERNELOFFSET=0\n"
    );
    // `swapper_pg_dir` is a macro on x86-64 (arch/x86/include/asm/pgtable_64.h).
    for (name, symbol) in
        [("init_uts_ns", "init_uts_ns"), ("swapper_pg_dir", "init_top_pgt"), ("_stext", "_stext")]
    {
        let found = file.symbol_by_name(symbol).ok_or_else(|| failed(format!("there is no {symbol}")))?;
        text.push_str(&format!("SYMBOL({name})={:x}\n", found.address()));
    }
    Ok(text)
}

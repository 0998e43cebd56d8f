//! Runs `make` on a live kernel tree: same environment whoever calls, progress by objects built.

use std::path::Path;
use std::process::Command;
use std::thread;

use super::process::{Job, guarded};
use super::progress::Unit;
use super::toolchain::KernelTools;
use super::{BuildError, Progress};

/// What would make two builds of the same source differ, fixed.
const REPRODUCIBLE: [(&str, &str); 4] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 2026"),
    ("KBUILD_BUILD_USER", "hmmstorm"),
    ("KBUILD_BUILD_HOST", "hmmstorm"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// Variables of the caller that change what a kernel build does: those of an outer make, and the kernel's own.
const FOREIGN: [&str; 24] = [
    "MAKEFLAGS",
    "MFLAGS",
    "GNUMAKEFLAGS",
    "MAKELEVEL",
    "MAKEOVERRIDES",
    "ARCH",
    "SUBARCH",
    "CROSS_COMPILE",
    "LLVM",
    "LLVM_IAS",
    "CC",
    "LD",
    "HOSTCC",
    "KCFLAGS",
    "KCPPFLAGS",
    "KAFLAGS",
    "KRUSTFLAGS",
    "KBUILD_OUTPUT",
    "KBUILD_VERBOSE",
    "KCONFIG_CONFIG",
    "LOCALVERSION",
    "INSTALL_MOD_PATH",
    "RUSTFLAGS",
    "CDPATH",
];

/// A live tree as `make` sees it.
#[derive(Debug)]
pub(super) struct Kbuild<'a> {
    /// The tools.
    pub(super) tools: &'a KernelTools,
    /// Source folder.
    pub(super) src: &'a Path,
    /// Object folder.
    pub(super) out: &'a Path,
    /// Everything that is printed goes here.
    pub(super) log: &'a Path,
    /// Where to show how far it is.
    pub(super) progress: &'a Progress,
}

impl Kbuild<'_> {
    /// Runs `make` with these targets and variables, and says how many steps it took. `expected` is about how many
    /// there will be; `None` if nobody knows. `adjust` may change the command.
    pub(super) fn make(
        &self,
        what: &str,
        targets: &[&str],
        expected: Option<u64>,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<u64, BuildError> {
        let mut command = guarded("make");
        for variable in FOREIGN {
            command.env_remove(variable);
        }
        command.envs(REPRODUCIBLE).env("LC_ALL", "C").env("PATH", self.path());
        command.env("RUST_LIB_SRC", &self.tools.rust_lib_src).env("LIBCLANG_PATH", &self.tools.libclang_dir);
        command.arg("-C").arg(self.src).arg(assignment("O", self.out));
        command
            .arg(assignment("BINDGEN", &self.tools.bindgen_program))
            .arg(format!("-j{}", jobs()))
            .args(targets);
        if let Some(llvm) = &self.tools.llvm {
            // With the slash at its end it is a folder; else it would be part of the programs' names.
            command.arg(assignment("LLVM", &llvm.bin.join("")));
        }
        adjust(&mut command);
        let step = self.progress.step(what, Unit::Steps);
        let mut steps = 0;
        Job { what, log: self.log, progress: self.progress }.run(
            command,
            |line| {
                if is_step(line) {
                    steps += 1;
                    step.at(steps, expected);
                }
            },
            || step.tick(),
        )?;
        step.done();
        Ok(steps)
    }

    /// The caller's `PATH` with the Rust tools in front: the kernel also calls them by their bare names.
    fn path(&self) -> std::ffi::OsString {
        let old = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::iter::once(self.tools.rust_bin.clone()).chain(std::env::split_paths(&old));
        std::env::join_paths(dirs).unwrap_or(old)
    }
}

/// `NAME=path` as one argument.
pub(super) fn assignment(name: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(format!("{name}="));
    argument.push(path);
    argument
}

fn jobs() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// A line by which kbuild says that it makes something: `  CC      mm/memory.o`.
fn is_step(line: &str) -> bool {
    line.strip_prefix("  ").and_then(|rest| rest.split_whitespace().next()).is_some_and(|word| {
        word.len() >= 2 && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_told_from_chatter() {
        for line in ["  CC      mm/memory.o", "  RUSTC L rust/kernel.o", "  LD [M]  lib/test_hmm.ko"] {
            assert!(is_step(line), "{line}");
        }
        for line in ["make[1]: Entering directory '/x'", "mm/x.c:1: warning: unused", "   |  ^~~", "  x"] {
            assert!(!is_step(line), "{line}");
        }
    }
}

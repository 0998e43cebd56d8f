//! The device and the guest's binary, built by cargo in target folders of their own, so that nobody else's flags or
//! features make cargo build anything twice.

use std::fs;
use std::path::{Path, PathBuf};

use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

use super::cache::Lock;
use super::error::IoContext;
use super::hash::Key;
use super::process::{Job, guarded};
use super::progress::Unit;
use super::{BuildError, Cache, Progress, hash};

/// The one target whose C library can be linked statically without further installation.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Flags of the caller, which are for the caller's own builds.
const FOREIGN: [&str; 8] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "RUSTC_WRAPPER",
    "MAKEFLAGS",
    "MFLAGS",
];

/// The device's program, up to date with its source.
pub fn device(repo: &Path, cache: &Cache, progress: &Progress) -> Result<PathBuf, BuildError> {
    let target_dir = cache.path("cargo/device").join(checkout(repo));
    let _lock = cargo(repo, "hmmstorm-device", &target_dir, None, cache, progress)?;
    keep(&target_dir.join("release/hmmstorm-device"), cache)
}

/// The guest's PID 1, up to date with its source: a static binary.
pub fn storm(repo: &Path, cache: &Cache, progress: &Progress) -> Result<PathBuf, BuildError> {
    let target_dir = cache.path("cargo/guest").join(checkout(repo));
    let _lock = cargo(repo, "storm", &target_dir, Some(GUEST_TARGET), cache, progress)?;
    let program = target_dir.join(GUEST_TARGET).join("release/storm");
    require_static(&program)?;
    keep(&program, cache)
}

/// One folder per checkout: cargo tells the workspace's own crates apart by their place in it, and goes by the times of
/// files, so it would take another checkout's newer `abi` for this one's.
fn checkout(repo: &Path) -> String {
    Key::new("cargo-1").with("path", repo.as_os_str().as_encoded_bytes()).short()
}

/// Copies a program to a place named after its content: the next checkout to build would put its own where cargo left
/// this one. The caller holds cargo's lock.
fn keep(program: &Path, cache: &Cache) -> Result<PathBuf, BuildError> {
    let name = program.file_name().unwrap_or(program.as_os_str());
    let dir = cache.path("programs").join(format!("{}-{:.16}", name.display(), hash::file(program)?));
    cache.publish(&dir, |dir| fs::copy(program, dir.join(name)).map(|_| ()).on("copy", program))?;
    Ok(dir.join(name))
}

/// Builds a package. What it left stays as it is while the lock is held.
fn cargo(
    repo: &Path,
    package: &str,
    target_dir: &Path,
    static_target: Option<&str>,
    cache: &Cache,
    progress: &Progress,
) -> Result<Lock, BuildError> {
    let what = format!("building {package}");
    let lock = cache.lock(&format!("cargo-{package}"), progress)?;
    let log = cache.fresh_log(&format!("cargo-{package}"))?;
    let mut command = guarded("cargo");
    command.current_dir(repo).args(["build", "--release", "--locked", "--package", package, "--target-dir"]);
    command.arg(target_dir);
    for variable in FOREIGN {
        command.env_remove(variable);
    }
    if let Some(target) = static_target {
        let variable = format!("CARGO_TARGET_{}_RUSTFLAGS", target.to_uppercase().replace('-', "_"));
        command.args(["--target", target]).env(variable, "-C target-feature=+crt-static");
    }
    let mut crates = 0;
    let mut step = None;
    Job { what: &what, log: &log, progress }.run(
        command,
        |line| {
            if line.trim_start().starts_with("Compiling ") {
                crates += 1;
                step.get_or_insert_with(|| progress.step(&what, Unit::Steps)).at(crates, None);
            }
        },
        || (),
    )?;
    if let Some(step) = step {
        step.done();
    }
    Ok(lock)
}

/// Fails if a program needs a loader: there is none in the guest.
pub(super) fn require_static(program: &Path) -> Result<(), BuildError> {
    let bytes = fs::read(program).on("read", program)?;
    if is_static(&bytes) == Some(true) {
        return Ok(());
    }
    let reason = "is no static 64-bit program, and the guest has no shared libraries; is libc's static half \
                  (libc.a, in Debian's libc6-dev) installed?";
    Err(BuildError::Tool { tool: program.display().to_string(), reason: reason.into() })
}

fn is_static(bytes: &[u8]) -> Option<bool> {
    let header = elf::FileHeader64::<Endianness>::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let segments = header.program_headers(endian, bytes).ok()?;
    Some(segments.iter().all(|segment| segment.p_type(endian) != elf::PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_outlives_the_next_build() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(&dir.path().join("cache")).expect("cache");
        let program = dir.path().join("storm");
        let built = ["one", "two", "one"].map(|text| {
            fs::write(&program, text).expect("write");
            keep(&program, &cache).expect("kept")
        });
        assert_eq!(built.each_ref().map(|p| fs::read_to_string(p).expect("read")), ["one", "two", "one"]);
        assert_eq!(built[0], built[2]);
    }

    #[test]
    fn programs_with_a_loader_are_refused() {
        // Tests are linked dynamically.
        let this = std::env::current_exe().expect("this program");
        assert!(matches!(require_static(&this), Err(BuildError::Tool { .. })));
        assert_eq!(is_static(b"#!/bin/sh"), None);
    }
}

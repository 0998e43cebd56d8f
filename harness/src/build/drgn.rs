//! drgn, which reads a guest's data structures: a wheel of the Python package index in the cache, by checksum.

use std::process::Command;

use super::error::IoContext;
use super::process::{Job, capture, guarded, which};
use super::progress::Unit;
use super::{BuildError, Cache, Pins, Progress};
use crate::judge::structures::Reader;

/// drgn with the Python that it is for; installed into the cache if need be.
pub(super) fn drgn(pins: &Pins, cache: &Cache, progress: &Progress) -> Result<Reader, BuildError> {
    let pin = &pins.toolchain.drgn;
    let missing = |tool: &str, reason: String| BuildError::Tool { tool: tool.into(), reason };
    let python = which("python3").ok_or_else(|| {
        missing("python3", "is not on PATH; install your distribution's python3 and python3-pip".into())
    })?;
    let tag = capture(Command::new(&python).args([
        "-I",
        "-c",
        "import sys; print('cp%d%d' % sys.version_info[:2])",
    ]))?;
    let dest = cache.path("tools").join(format!("drgn-{}-{}", pin.version, tag.trim()));
    if !dest.is_dir() {
        let _lock = cache.lock("drgn", progress)?;
        let log = cache.fresh_log("drgn")?;
        cache.publish(&dest, |dir| {
            let what = format!("fetching drgn {}", pin.version);
            let step = progress.step(&what, Unit::Steps);
            let wanted = dir.join("requirements.txt");
            let hashes: String = pin.sha256.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
            std::fs::write(&wanted, format!("drgn=={}{hashes}\n", pin.version)).on("write", &wanted)?;
            let mut command = guarded(&python);
            command
                .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"])
                .args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=20"])
                .arg("--target")
                .arg(dir)
                .arg("--requirement")
                .arg(&wanted);
            Job { what: &what, log: &log, progress }.run(command, |_| (), || step.tick())?;
            step.done();
            Ok(())
        })?;
    }
    Ok(Reader { python, drgn: dest })
}

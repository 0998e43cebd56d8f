//! Debian packages unpacked in the cache, for use without installation.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde::Serialize;

use super::archive::{Archive, Remote};
use super::cache::write_whole;
use super::error::IoContext;
use super::hash::Key;
use super::pins::Pins;
use super::process::capture;
use super::progress::Unit;
use super::{BuildError, Cache, Progress};

/// A package of a bundle, for its list.
#[derive(Debug, Serialize)]
struct Package<'a> {
    file: &'a str,
    sha256: &'a str,
}

/// Where the bundle of this name and request is, once it is there.
pub(super) fn place(pins: &Pins, cache: &Cache, name: &str, request: &str) -> PathBuf {
    let suites = pins.toolchain.archive.suites.join(" ");
    let key = Key::new("bundle-1").with("request", request).with("suites", suites).short();
    cache.path("unpacked").join(format!("{name}-{key}"))
}

/// A folder with packages unpacked into it: there already, or fetched and unpacked now.
///
/// `request` is all that decides what should be in it; what the archive gives for that at the time of the fetch is
/// kept until the request changes. `choose` names the packages.
pub(super) fn unpacked(
    pins: &Pins,
    cache: &Cache,
    progress: &Progress,
    name: &str,
    request: &str,
    choose: impl FnOnce(&Archive<'_>) -> Result<Vec<Remote>, BuildError>,
) -> Result<PathBuf, BuildError> {
    let dest = place(pins, cache, name, request);
    if dest.exists() {
        return Ok(dest);
    }
    let _lock = cache.lock(&format!("unpack-{name}"), progress)?;
    if dest.exists() {
        return Ok(dest);
    }
    let archive = Archive::open(cache, &pins.toolchain.archive, progress)?;
    let remotes = choose(&archive)?;
    let files = archive.download(name, &remotes)?;
    let step = progress.step(format!("unpacking {name}"), Unit::Steps);
    cache.publish(&dest, |dir| {
        for (number, file) in (0_u64..).zip(&files) {
            progress.check()?;
            step.at(number, Some(files.len() as u64));
            capture(Command::new("dpkg-deb").arg("-x").arg(file).arg(dir))?;
        }
        let list: Vec<_> = remotes.iter().map(|r| Package { file: &r.file, sha256: &r.sha256 }).collect();
        let list_file = dir.join("packages.json");
        let text = serde_json::to_vec_pretty(&list)
            .map_err(|e| BuildError::Data { file: list_file.clone(), reason: e.to_string() })?;
        write_whole(&list_file, text)
    })?;
    step.done();
    for file in files {
        // Unpacked is enough; a second copy helps nobody.
        fs::remove_file(&file).on("remove", &file)?;
    }
    Ok(dest)
}

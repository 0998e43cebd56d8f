//! The guest's driver, built out of tree against a live kernel tree.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::IoContext;
use super::hash::Key;
use super::kernel::LiveTree;
use super::source::walk;
use super::{BuildError, Cache, hash};

/// The driver's module, without `.ko`.
pub(super) const DRIVER: &str = "hsgpu";
/// Its source, relative to the repository.
const SOURCE: &str = "guest-driver/driver";
/// What its debug information has instead of the repository's path: the same module comes out of every checkout, and
/// gdb finds the source with `set substitute-path`.
pub const SOURCE_PREFIX: &str = "/hmmstorm";
/// What it compiles in by `#[path]`, relative to the repository.
const INTERFACE: &str = "abi/src";

/// The driver's module with its debug information: published already, or built now.
pub(super) fn driver(tree: &LiveTree<'_>, repo: &Path, cache: &Cache) -> Result<PathBuf, BuildError> {
    let source = repo.join(SOURCE);
    let sha256 = source_sha256(repo)?;
    let key = tree.modules_key().with("driver", &sha256).with("prefix", SOURCE_PREFIX).short();
    let dest = cache.path("modules").join(format!("{DRIVER}-{key}"));
    let file = dest.join(format!("{DRIVER}.ko"));
    if file.is_file() {
        return Ok(file);
    }
    // The kernel may have been published already, so that nobody has taken the lock yet.
    tree.lock()?;
    if file.is_file() {
        return Ok(file); // built by the one that we waited for
    }
    // One folder per checkout: make compares its files' times with those of the objects.
    let checkout = Key::new("objects-1").with("path", repo.as_os_str().as_encoded_bytes()).short();
    let objects = tree.objects_dir(&format!("{DRIVER}-{checkout}"));
    let remap = format!("KRUSTFLAGS=--remap-path-prefix={}={SOURCE_PREFIX}", repo.display());
    tree.build_modules(&format!("building {DRIVER}.ko"), &source, &objects, &remap)?;
    let built = objects.join(format!("{DRIVER}.ko"));
    cache.publish(&dest, |dir| {
        fs::copy(&built, dir.join(format!("{DRIVER}.ko"))).map(|_| ()).on("copy", &built)
    })?;
    Ok(file)
}

/// Checksum of everything that the driver is made of.
pub(super) fn source_sha256(repo: &Path) -> Result<String, BuildError> {
    let mut key = Key::new("driver-1");
    for root in [SOURCE, INTERFACE] {
        let dir = repo.join(root);
        let mut files = walk(&dir)?;
        files.retain(|file| is_source(file));
        files.sort();
        for file in files {
            let name = Path::new(root).join(&file);
            key = key.with(&name.to_string_lossy(), hash::file(&dir.join(&file))?);
        }
    }
    Ok(key.hex())
}

/// Not what an editor or a build in place leaves.
fn is_source(file: &Path) -> bool {
    let name = file.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let is_known = file.extension().is_some_and(|e| ["rs", "c", "h", "S"].iter().any(|known| e == *known));
    (is_known && !name.starts_with('.') && !name.ends_with(".mod.c"))
        || ["Kbuild", "Makefile", "Kconfig"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_no_source() {
        for name in ["hsgpu_main.rs", "Kbuild", "helper.h"] {
            assert!(is_source(Path::new(name)), "{name}");
        }
        for name in ["hsgpu.o", ".hsgpu.ko.cmd", "hsgpu.mod.c", "x.rs~", ".x.rs"] {
            assert!(!is_source(Path::new(name)), "{name}");
        }
    }

    #[test]
    fn checksum_follows_the_interface() {
        let repo = tempfile::tempdir().expect("temporary folder");
        for (file, text) in [("guest-driver/driver/a.rs", "a"), ("abi/src/lib.rs", "b")] {
            let file = repo.path().join(file);
            fs::create_dir_all(file.parent().expect("parent")).expect("folder");
            fs::write(file, text).expect("write");
        }
        let before = source_sha256(repo.path()).expect("checksum");
        fs::write(repo.path().join("guest-driver/driver/a.o"), "object").expect("write");
        assert_eq!(source_sha256(repo.path()).expect("checksum"), before);
        fs::write(repo.path().join("abi/src/lib.rs"), "c").expect("write");
        assert_ne!(source_sha256(repo.path()).expect("checksum"), before);
    }
}

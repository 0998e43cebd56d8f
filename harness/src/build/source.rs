//! Kernel sources: a pinned tarball that is unpacked once, or a user's own tree that is mirrored file by file.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::archive::Archive;
use super::cache::write_whole;
use super::error::{IoContext, require_space};
use super::hash::Key;
use super::overlay::Overlay;
use super::pins::{Kernel, Pins};
use super::process::{Job, guarded};
use super::progress::Unit;
use super::{BuildError, Cache, Progress, hash};

/// Where a kernel's source comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// A tarball that `images/kernels.toml` pins.
    Pinned(Box<Kernel>),
    /// A folder of the user's; never written to.
    Tree(PathBuf),
}

impl Source {
    /// Of a folder that the user named.
    pub(super) fn tree(dir: &Path) -> Result<Self, BuildError> {
        let dir = fs::canonicalize(dir)
            .map_err(|e| BuildError::Usage(format!("cannot use the kernel tree {}: {e}", dir.display())))?;
        if !dir.join("Kbuild").is_file() || !dir.join("mm/memory.c").is_file() {
            return Err(BuildError::Usage(format!("{} is no kernel source tree", dir.display())));
        }
        Ok(Self::Tree(dir))
    }

    /// What a live tree is made of, as part of its key: not the content of a user's tree, which changes.
    pub(super) fn identity(&self) -> String {
        match self {
            Self::Pinned(kernel) => kernel.sha256.clone(),
            Self::Tree(dir) => dir.display().to_string(),
        }
    }

    /// A short name for folders and people.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Pinned(kernel) => kernel.name.clone(),
            Self::Tree(dir) => tree_name(dir),
        }
    }

    /// Of a user's tree: what git calls the commit that is checked out, and whether it was changed; without git, no more
    /// than that it is one.
    pub(super) fn described(&self) -> Option<String> {
        let Self::Tree(dir) = self else { return None };
        let mut command = Command::new("git");
        command.arg("-C").arg(dir).args(["describe", "--always", "--long", "--dirty"]);
        let output =
            command.output().ok().filter(|output| output.status.success() && dir.join(".git").exists());
        let commit = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        Some(commit.filter(|commit| !commit.is_empty()).unwrap_or_else(|| "not in git".into()))
    }

    /// Sees that `dir/src` holds the source, or for a user's tree: holds it as it is now. Gives a checksum of it all.
    /// The caller holds the live tree's lock.
    pub(super) fn bring(
        &self,
        dir: &Path,
        overlay: &Overlay<'_>,
        pins: &Pins,
        cache: &Cache,
        progress: &Progress,
    ) -> Result<(), BuildError> {
        let src = dir.join("src");
        match self {
            Self::Pinned(_) if src.exists() => Ok(()),
            Self::Pinned(kernel) => {
                require_space(&format!("building kernel {}", kernel.name), dir, kernel.disk_mib)?;
                let tarball = tarball(kernel, pins, cache, progress)?;
                unpack(kernel, &tarball, &src, cache, progress)
            }
            Self::Tree(tree) => Mirror::load(dir)?.update(tree, dir, overlay, progress).map(|_| ()),
        }
    }

    /// Checksums of the pristine source: of all of it, and of all but C files, on which modules do not depend.
    pub(super) fn sha256(&self, dir: &Path) -> Result<(String, String), BuildError> {
        match self {
            Self::Pinned(kernel) => Ok((kernel.sha256.clone(), kernel.sha256.clone())),
            Self::Tree(_) => {
                let mirror = Mirror::load(dir)?;
                Ok((mirror.sha256(|_| true), mirror.sha256(|file| file.extension().is_none_or(|e| e != "c"))))
            }
        }
    }
}

/// A short name for a user's tree.
pub(super) fn tree_name(dir: &Path) -> String {
    format!("tree-{}", dir.file_name().unwrap_or_default().to_string_lossy())
}

/// The version that the Makefile of a source tree states, as `6.19.6`.
pub(super) fn version(tree: &Path) -> Result<String, BuildError> {
    let file = tree.join("Makefile");
    let text = fs::read_to_string(&file)
        .map_err(|e| BuildError::Usage(format!("cannot use the kernel tree {}: {e}", tree.display())))?;
    let number = |name: &str| {
        let value =
            |line: &str| Some(line.strip_prefix(name)?.trim_start().strip_prefix('=')?.trim().to_owned());
        text.lines().find_map(value).unwrap_or_default()
    };
    Ok([number("VERSION"), number("PATCHLEVEL"), number("SUBLEVEL")].join("."))
}

/// The verified tarball, fetched if need be.
pub(super) fn tarball(
    kernel: &Kernel,
    pins: &Pins,
    cache: &Cache,
    progress: &Progress,
) -> Result<PathBuf, BuildError> {
    let file = tarball_path(kernel, cache);
    if file.exists() {
        return check(file, kernel);
    }
    let archive = Archive::open(cache, &pins.toolchain.archive, progress)?;
    let remote = archive.source(&kernel.package, &kernel.version)?;
    if remote.sha256 != kernel.sha256 || remote.file != kernel.file {
        return Err(BuildError::Checksum {
            file: remote.file.into(),
            expected: kernel.sha256.clone(),
            found: remote.sha256,
            after: "the package archive's index differs from images/kernels.toml, so nothing was fetched",
        });
    }
    let what = format!("kernel {}", kernel.name);
    archive.download(&what, &[remote])?.into_iter().next().ok_or(BuildError::Interrupted)
}

/// Takes a tarball that the user has, if it is the pinned one.
pub(super) fn import_tarball(kernel: &Kernel, file: &Path, cache: &Cache) -> Result<PathBuf, BuildError> {
    let found = hash::file(file)?;
    if found != kernel.sha256 {
        return Err(BuildError::Usage(format!(
            "{} is not the tarball of kernel {}: its SHA-256 is {found}, and {} is pinned; for another kernel, unpack it \
             and give --tree DIR",
            file.display(),
            kernel.name,
            kernel.sha256
        )));
    }
    let dest = tarball_path(kernel, cache);
    super::overlay::replace(Some(file), &dest)?;
    Ok(dest)
}

fn tarball_path(kernel: &Kernel, cache: &Cache) -> PathBuf {
    cache.path("downloads").join(&kernel.file)
}

fn check(file: PathBuf, kernel: &Kernel) -> Result<PathBuf, BuildError> {
    let found = hash::file(&file)?;
    if found == kernel.sha256 {
        return Ok(file);
    }
    fs::remove_file(&file).on("remove", &file)?;
    let after = "it was removed; start again to fetch it anew";
    Err(BuildError::Checksum { file, expected: kernel.sha256.clone(), found, after })
}

fn unpack(
    kernel: &Kernel,
    tarball: &Path,
    dest: &Path,
    cache: &Cache,
    progress: &Progress,
) -> Result<(), BuildError> {
    let what = format!("unpacking kernel {}", kernel.name);
    let step = progress.step(&what, Unit::None);
    let log = cache.fresh_log("unpack")?;
    cache.publish(dest, |dir| {
        let mut command = guarded("tar");
        command.args(["--extract", "--no-same-owner", "--strip-components=1", "--file"]).arg(tarball);
        command.arg("--directory").arg(dir);
        Job { what: &what, log: &log, progress }.run(command, |_| (), || step.tick())
    })?;
    step.done();
    Ok(())
}

/// A file of a user's tree, as it was when it was copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    size: u64,
    mtime: (i64, i64),
    mode: u32,
    sha256: String,
}

/// What the live tree has of a user's tree: `mirror.json` beside it.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Mirror {
    files: BTreeMap<PathBuf, Seen>,
}

impl Mirror {
    fn load(dir: &Path) -> Result<Self, BuildError> {
        let file = dir.join("mirror.json");
        match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(e).on("read", &file),
        }
    }

    fn save(&self, dir: &Path) -> Result<(), BuildError> {
        let file = dir.join("mirror.json");
        let text = serde_json::to_vec(self)
            .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() })?;
        write_whole(&file, text)
    }

    /// Checksum over names, modes and contents of some of the files.
    fn sha256(&self, counts: impl Fn(&Path) -> bool) -> String {
        let mut key = Key::new("tree-1");
        for (path, seen) in self.files.iter().filter(|(path, _)| counts(path)) {
            let mode = seen.mode & 0o111 != 0;
            key = key.with(&path.to_string_lossy(), format!("{mode} {}", seen.sha256));
        }
        key.hex()
    }

    /// Copies what changed since the last time, and removes what is gone. Gives the number of files changed.
    fn update(
        mut self,
        tree: &Path,
        dir: &Path,
        overlay: &Overlay<'_>,
        progress: &Progress,
    ) -> Result<u64, BuildError> {
        let now = list(tree)?;
        let gone: Vec<_> = self.files.keys().filter(|f| now.binary_search(f).is_err()).cloned().collect();
        let mut changed = 0;
        let step = progress.step(format!("taking over {}", tree.display()), Unit::Steps);
        for file in gone {
            overlay.update_pristine(&file, None)?;
            self.files.remove(&file);
            changed += 1;
        }
        for (number, file) in (0_u64..).zip(&now) {
            if number % 512 == 0 {
                step.at(number, Some(now.len() as u64));
                if progress.check().is_err() {
                    self.save(dir)?;
                    return Err(BuildError::Interrupted);
                }
            }
            let path = tree.join(file);
            let Ok(meta) = path.symlink_metadata() else { continue };
            if meta.is_dir() {
                continue; // a submodule; kernels have none that is built
            }
            let mtime = (meta.mtime(), meta.mtime_nsec());
            let old = self.files.get(file);
            if old.is_some_and(|o| o.size == meta.size() && o.mtime == mtime && o.mode == meta.mode()) {
                continue;
            }
            overlay.update_pristine(file, Some(&path))?;
            let sha256 = if meta.is_symlink() {
                hash::bytes(fs::read_link(&path).on("read", &path)?.as_os_str().as_encoded_bytes())
            } else {
                hash::file(&path)?
            };
            self.files.insert(file.clone(), Seen { size: meta.size(), mtime, mode: meta.mode(), sha256 });
            changed += 1;
        }
        self.save(dir)?;
        step.done();
        Ok(changed)
    }
}

/// The files of a kernel tree, sorted: of a git work tree what git knows or would add, else everything.
fn list(tree: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let mut files = if tree.join(".git").exists() {
        let mut command = Command::new("git");
        command.arg("-C").arg(tree).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        let output = command.output().on("list with git", tree)?;
        if !output.status.success() {
            let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(BuildError::Usage(format!("git cannot list {}: {why}", tree.display())));
        }
        output
            .stdout
            .split(|b| *b == 0)
            .filter(|name| !name.is_empty())
            .map(|name| PathBuf::from(String::from_utf8_lossy(name).into_owned()))
            .filter(|file| tree.join(file).symlink_metadata().is_ok())
            .collect()
    } else {
        if tree.join(".config").exists() || tree.join("include/config").exists() {
            return Err(BuildError::Usage(format!(
                "{} was built in place; clean it with `make mrproper`, or give a git work tree",
                tree.display()
            )));
        }
        walk(tree)?
    };
    files.sort();
    files.dedup();
    Ok(files)
}

/// Every file and symbolic link below a folder, relative to it.
pub(super) fn walk(root: &Path) -> Result<Vec<PathBuf>, BuildError> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).on("list", &folder)? {
            let entry = entry.on("list", &folder)?;
            if entry.file_type().on("examine", &folder)?.is_dir() {
                folders.push(entry.path());
            } else if let Ok(relative) = entry.path().strip_prefix(root) {
                files.push(relative.to_owned());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirror_copies_only_changes() {
        let temp = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(&temp.path().join("cache")).expect("cache");
        let progress = Progress::silent().expect("progress");
        let (tree, dir) = (temp.path().join("tree"), temp.path().join("live"));
        fs::create_dir_all(tree.join("mm")).expect("folder");
        for name in ["Kbuild", "mm/memory.c", "mm/old.c"] {
            fs::write(tree.join(name), name).expect("write");
        }
        let overlay = Overlay::new(&cache, &dir, "the test tree");
        let update =
            || Mirror::load(&dir).and_then(|m| m.update(&tree, &dir, &overlay, &progress)).expect("update");
        assert_eq!(update(), 3);
        let first = Mirror::load(&dir).expect("mirror").sha256(|_| true);
        assert_eq!(update(), 0);
        fs::remove_file(tree.join("mm/old.c")).expect("remove");
        fs::write(tree.join("mm/memory.c"), "changed").expect("write");
        assert_eq!(update(), 2);
        assert_eq!(fs::read_to_string(dir.join("src/mm/memory.c")).expect("read"), "changed");
        assert!(!dir.join("src/mm/old.c").exists());
        assert_ne!(Mirror::load(&dir).expect("mirror").sha256(|_| true), first);
    }

    #[test]
    fn tree_must_be_a_kernel() {
        let temp = tempfile::tempdir().expect("temporary folder");
        assert!(matches!(Source::tree(temp.path()), Err(BuildError::Usage(_))));
        assert!(matches!(Source::tree(&temp.path().join("none")), Err(BuildError::Usage(_))));
    }

    #[test]
    fn wrong_tarball_is_refused() {
        let temp = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(temp.path()).expect("cache");
        let repo = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("repo");
        let mut kernel = Pins::load(repo).expect("pins").kernel(None).expect("kernel").clone();
        let file = temp.path().join("x.tar.xz");
        fs::write(&file, "abc").expect("write");
        assert!(matches!(import_tarball(&kernel, &file, &cache), Err(BuildError::Usage(_))));
        assert!(!tarball_path(&kernel, &cache).exists());
        kernel.sha256 = hash::bytes(b"abc");
        let taken = import_tarball(&kernel, &file, &cache).expect("it is the one");
        fs::write(&taken, "damaged later").expect("write");
        assert!(matches!(check(taken.clone(), &kernel), Err(BuildError::Checksum { .. })));
        assert!(!taken.exists(), "a damaged file is not kept");
    }
}

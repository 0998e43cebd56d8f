//! Patches: the driver's abstractions, the variant's, and the user's own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use super::error::IoContext;
use super::process::{capture, which};
use super::{BuildError, Cache, hash};

/// Lines of git's complaint that an error quotes.
const DETAIL_LINES: usize = 24;

/// One patch, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Its file's name, or the subject of its mail.
    pub name: String,
    /// Checksum of its text.
    pub sha256: String,
    text: Vec<u8>,
    files: BTreeSet<PathBuf>,
}

impl Patch {
    /// Reads a patch of this project, which is in UTF-8 and has one mail a file.
    pub fn read(path: &Path) -> Result<Self, BuildError> {
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        Self::new(name, fs::read(path).on("read", path)?)
    }

    fn new(name: String, text: Vec<u8>) -> Result<Self, BuildError> {
        let files = touched(&String::from_utf8_lossy(&text));
        let is_inside = |file: &PathBuf| file.components().all(|c| matches!(c, Component::Normal(_)));
        if let Some(file) = files.iter().find(|f| !is_inside(f)) {
            return Err(BuildError::Usage(format!(
                "{name} writes outside of the source tree: {}",
                file.display()
            )));
        }
        if files.is_empty() {
            return Err(BuildError::Usage(format!("{name} holds no patch")));
        }
        Ok(Self { name, sha256: hash::bytes(&text), text, files })
    }

    /// Files that it changes, makes or removes, relative to the source tree.
    pub fn files(&self) -> &BTreeSet<PathBuf> {
        &self.files
    }

    /// Whether modules built against the kernel may come out differently: it changes more than C code.
    pub fn concerns_modules(&self) -> bool {
        self.files.iter().any(|file| file.extension().is_none_or(|e| e != "c"))
    }

    /// Applies it to the files in `dir`, which holds at least those that it touches. On failure what is in `dir` is
    /// of no use any more.
    pub(super) fn apply(&self, dir: &Path, onto: &str) -> Result<(), BuildError> {
        let file = dir.with_extension("patch");
        fs::write(&file, &self.text).on("write", &file)?;
        let mut command = git(dir);
        command.args(["apply", "--verbose", "--reject", "--whitespace=nowarn", "-p1"]).arg(&file);
        let output = command.output().map_err(|e| BuildError::Tool {
            tool: "git".into(),
            reason: format!("cannot be started: {e}; `hmmstorm doctor` says what this host lacks"),
        })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(BuildError::Patch {
            name: self.name.clone(),
            onto: onto.to_owned(),
            detail: said.lines().take(DETAIL_LINES).collect::<Vec<_>>().join("\n"),
        })
    }
}

/// Every `*.patch` of a folder, in the order of their names.
pub(super) fn series(dir: &Path) -> Result<Vec<Patch>, BuildError> {
    let mut files = Vec::new();
    match fs::read_dir(dir) {
        Ok(entries) => {
            for entry in entries {
                files.push(entry.on("list", dir)?.path());
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(e).on("list", dir),
    }
    files.retain(|f| f.extension().is_some_and(|e| e == "patch"));
    files.sort();
    files.iter().map(|f| Patch::read(f)).collect()
}

/// The patches of a user's file: a plain diff, or a mailbox with one or more patches in whatever encoding.
pub(super) fn user(file: &Path, cache: &Cache) -> Result<Vec<Patch>, BuildError> {
    let text = fs::read(file)
        .map_err(|e| BuildError::Usage(format!("cannot read the patch {}: {e}", file.display())))?;
    let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
    if !text.starts_with(b"From ") {
        return Ok(vec![Patch::new(name, text)?]);
    }
    if which("git").is_none() {
        return Err(BuildError::Tool {
            tool: "git".into(),
            reason: "is needed to take a mailbox apart".into(),
        });
    }
    let scratch = cache.scratch()?;
    let dir = scratch.path();
    let mut split = git(dir);
    split
        .arg("mailsplit")
        .arg(format!("-o{}", dir.display()))
        .arg(std::path::absolute(file).on("find", file)?);
    let count: usize = capture(&mut split)?.parse().unwrap_or(0);
    let mut patches = Vec::new();
    for number in 1..=count {
        let mail = dir.join(format!("{number:04}"));
        let (message, diff) = (dir.join("message"), dir.join("diff"));
        let mut info = git(dir);
        info.arg("mailinfo").args([&message, &diff]);
        info.stdin(fs::File::open(&mail).on("open", &mail)?);
        let output = info.output().on("take apart", file)?;
        let headers = String::from_utf8_lossy(&output.stdout).into_owned();
        let subject = headers.lines().find_map(|l| l.strip_prefix("Subject: ")).unwrap_or("no subject");
        let text = fs::read(&diff).on("read", &diff)?;
        if text.is_empty() {
            continue; // a cover letter, or an answer
        }
        patches.push(Patch::new(format!("{name}, mail {number} ({subject})"), text)?);
    }
    if patches.is_empty() {
        return Err(BuildError::Usage(format!("{name} holds no patch")));
    }
    Ok(patches)
}

/// git in a folder that is no repository, whatever is above it.
fn git(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(dir).env("LC_ALL", "C").args(["-c", "core.autocrlf=false"]);
    command.env("GIT_CEILING_DIRECTORIES", dir.parent().unwrap_or(dir));
    for variable in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"] {
        command.env_remove(variable);
    }
    command
}

/// Files named by the headers of a diff. Lines within hunks are counted off, so that code which looks like a header is
/// none.
fn touched(diff: &str) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    let (mut old, mut new) = (0_u64, 0_u64);
    for line in diff.lines() {
        if old > 0 || new > 0 {
            match line.as_bytes().first() {
                Some(b'-') => old = old.saturating_sub(1),
                Some(b'+') => new = new.saturating_sub(1),
                Some(b'\\') => {}
                _ => (old, new) = (old.saturating_sub(1), new.saturating_sub(1)),
            }
            continue;
        }
        if let Some(counts) = hunk(line) {
            (old, new) = counts;
            continue;
        }
        let path = line
            .strip_prefix("--- a/")
            .or_else(|| line.strip_prefix("+++ b/"))
            .or_else(|| line.strip_prefix("rename from "))
            .or_else(|| line.strip_prefix("rename to "))
            .or_else(|| line.strip_prefix("copy from "))
            .or_else(|| line.strip_prefix("copy to "));
        if let Some(path) = path {
            files.insert(PathBuf::from(path.split('\t').next().unwrap_or(path)));
        }
    }
    files
}

/// `@@ -a,b +c,d @@`: b and d.
fn hunk(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix("@@ -")?.split(' ');
    let count = |range: &str| range.split_once(',').map_or(Some(1), |(_, n)| n.parse().ok());
    Some((count(words.next()?)?, count(words.next()?.strip_prefix('+')?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAIL: &str = "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\nFrom: A <a@b.c>\n\
        Date: Sun, 22 Nov 2026 00:00:00 +0000\nSubject: [PATCH] one\n\nWhy.\n---\n mm/x.c | 2 +-\n\n\
        diff --git a/mm/x.c b/mm/x.c\n--- a/mm/x.c\n+++ b/mm/x.c\n@@ -1,3 +1,3 @@\n first\n--- a/not/a/file\n\
        +++ b/nor/this\n last\n-- \n2.47\n";

    #[test]
    fn headers_are_told_from_code() {
        let patch = Patch::new("p".into(), MAIL.into()).expect("a patch");
        assert_eq!(patch.files().iter().collect::<Vec<_>>(), [Path::new("mm/x.c")]);
        assert!(!patch.concerns_modules());
        let header =
            Patch::new("p".into(), MAIL.replace("mm/x.c", "include/linux/x.h").into()).expect("a patch");
        assert!(header.concerns_modules());
    }

    #[test]
    fn reject_names_patch_file_and_hunk() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("mm")).expect("folder");
        fs::write(tree.join("mm/x.c"), "first\nother\nlast\n").expect("write");
        let patch = Patch::new("a.patch".into(), MAIL.into()).expect("a patch");
        let text = patch.apply(&tree, "kernel 1").expect_err("it does not fit").to_string();
        for part in ["a.patch", "kernel 1", "mm/x.c:1", "hunk #1"] {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
    }

    #[test]
    fn patches_stay_in_the_tree() {
        let outside = Patch::new("p".into(), MAIL.replace("mm/x.c", "../x.c").into());
        assert!(matches!(outside, Err(BuildError::Usage(_))));
        assert!(Patch::new("p".into(), b"hello\n".to_vec()).is_err());
    }

    #[test]
    fn mailbox_of_two() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(&dir.path().join("cache")).expect("cache");
        let file = dir.path().join("x.mbox");
        fs::write(&file, format!("{MAIL}\n{}", MAIL.replace("mm/x.c", "mm/y.c").replace("one", "two")))
            .expect("write");
        let patches = user(&file, &cache).expect("two patches");
        assert_eq!(patches.len(), 2);
        assert!(patches.iter().any(|p| p.name.contains("mail 2 (two)")), "{patches:?}");
    }
}

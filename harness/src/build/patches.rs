//! Patches: the driver's abstractions, the variant's, and the user's own.

mod mailbox;
mod reject;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::error::IoContext;
use super::{BuildError, Cache, hash, selftests};

/// A file of the user's with patches.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum UserPatch {
    /// `--patch`: a diff, or a mail with one.
    Patch(PathBuf),
    /// `--mbox`: a mailbox with a series.
    Mailbox(PathBuf),
}

impl UserPatch {
    /// The file.
    pub fn file(&self) -> &Path {
        let (Self::Patch(file) | Self::Mailbox(file)) = self;
        file
    }

    /// The file's name, by which the patch is known from then on.
    pub fn name(&self) -> String {
        file_name(self.file())
    }
}

/// Where a patch comes from, and so who can do something about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `guest-driver/patches`: what the driver stands on.
    Abstraction,
    /// The fix candidate of this name.
    Variant(String),
    /// `--patch` or `--mbox`.
    User,
}

/// One patch, in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Its file's name, or that of its mailbox with number and subject of the mail.
    pub name: String,
    /// Who asked for it.
    pub origin: Origin,
    /// Checksum of its text.
    pub sha256: String,
    text: Vec<u8>,
    files: BTreeSet<PathBuf>,
}

impl Patch {
    /// Reads a patch of this project, which is in UTF-8 and has one mail a file.
    pub fn read(path: &Path, origin: Origin) -> Result<Self, BuildError> {
        Self::new(file_name(path), origin, fs::read(path).on("read", path)?)
    }

    fn new(name: String, origin: Origin, text: Vec<u8>) -> Result<Self, BuildError> {
        let files = touched(&String::from_utf8_lossy(&text));
        let is_inside = |file: &PathBuf| file.components().all(|c| matches!(c, Component::Normal(_)));
        if let Some(file) = files.iter().find(|f| !is_inside(f)) {
            return Err(BuildError::Usage(format!(
                "{name} writes outside of the source tree: {}",
                file.display()
            )));
        }
        if files.is_empty() {
            return Err(BuildError::Usage(format!(
                "{name} holds no patch: none with a/ and b/ in front of its paths, as `git diff` makes them"
            )));
        }
        Ok(Self { name, origin, sha256: hash::bytes(&text), text, files })
    }

    /// What it says.
    pub(super) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Files that it changes, makes or removes, relative to the source tree.
    pub fn files(&self) -> &BTreeSet<PathBuf> {
        &self.files
    }

    /// Whether modules built against the kernel may come out differently: it changes more than C code.
    pub fn concerns_modules(&self) -> bool {
        self.files.iter().any(|file| file.extension().is_none_or(|e| e != "c"))
    }

    /// Whether programs that are built from the kernel's source for user space may come out differently.
    pub fn concerns_selftests(&self) -> bool {
        self.files.iter().any(|file| selftests::concerns(file))
    }

    /// Applies it to the files in `dir`, which holds at least those that it touches. `onto` names the kernel, `before`
    /// is what has been applied. On failure what is in `dir` is of no use any more.
    pub(super) fn apply(&self, dir: &Path, onto: &str, before: &[Self]) -> Result<(), BuildError> {
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
        // The abstractions come first and are always there: they are part of what it is applied to.
        let rivals: Vec<_> = before
            .iter()
            .filter(|p| p.origin != Origin::Abstraction && !p.files.is_disjoint(&self.files))
            .map(|p| p.name.as_str())
            .collect();
        Err(BuildError::Patch {
            name: self.name.clone(),
            onto: match rivals.is_empty() {
                true => onto.to_owned(),
                false => format!("{onto} with {}", rivals.join(", ")),
            },
            detail: reject::report(dir, &self.files, &said),
            advice: self.advice(onto, !rivals.is_empty()),
            origin: self.origin.clone(),
        })
    }

    /// What to do when it does not apply.
    fn advice(&self, onto: &str, has_rivals: bool) -> String {
        match (&self.origin, has_rivals) {
            (Origin::Abstraction, _) => format!(
                "the driver needs this patch, and it was made for another kernel than {onto}: take a kernel of \
                 `hmmstorm list kernels`, or one closer to it"
            ),
            (Origin::Variant(name), true) => format!(
                "{name} and what comes before it change the same code: leave one of them out, or give a patch that \
                 does both with --patch"
            ),
            (Origin::Variant(name), false) => {
                format!("{name} was made for another kernel than {onto}: rebase it, and give it with --patch")
            }
            (Origin::User, true) => format!(
                "rebase it onto {onto} with these patches, or try it without them (without --variant it meets the \
                 stock kernel)"
            ),
            (Origin::User, false) => {
                format!("rebase it onto {onto}, or give the tree that it fits with --tree")
            }
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Fails if a patch is asked for twice, which would only show as one that does not apply.
pub(super) fn no_doubles(patches: &[Patch]) -> Result<(), BuildError> {
    for (index, patch) in patches.iter().enumerate() {
        let Some(first) = patches.iter().take(index).find(|p| p.sha256 == patch.sha256) else { continue };
        let of = match &first.origin {
            Origin::Variant(name) => format!(", which is part of variant {name}"),
            Origin::Abstraction => ", which the driver needs anyway".to_owned(),
            Origin::User => String::new(),
        };
        return Err(BuildError::Usage(format!(
            "{} is the same patch as {}{of}: leave one of them out",
            patch.name, first.name
        )));
    }
    Ok(())
}

/// The driver's abstractions: every `*.patch` of the folders, in the order of their names, but for those of the names
/// `without`. A file of a later folder takes the place of one with its name.
pub(super) fn series(dirs: &[PathBuf], without: &[String]) -> Result<Vec<Patch>, BuildError> {
    let mut files = BTreeMap::new();
    for dir in dirs {
        match fs::read_dir(dir) {
            Ok(entries) => {
                for entry in entries {
                    let file = entry.on("list", dir)?.path();
                    files.insert(file_name(&file), file);
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).on("list", dir),
        }
    }
    files.retain(|name, _| name.ends_with(".patch") && !without.contains(name));
    files.values().map(|f| Patch::read(f, Origin::Abstraction)).collect()
}

/// The patches of a file that the user gave: of `--patch`, a diff or a mail; of `--mbox`, a mailbox.
pub(super) fn user(given: &UserPatch, cache: &Cache) -> Result<Vec<Patch>, BuildError> {
    let file = given.file();
    let text = fs::read(file)
        .map_err(|e| BuildError::Usage(format!("cannot read the patch {}: {e}", file.display())))?;
    let name = given.name();
    match (given, mailbox::is_mailbox(&text)) {
        // Also a single mail may be encoded.
        (_, true) => mailbox::patches(file, &name, &Origin::User, cache),
        (UserPatch::Patch(_), false) => Ok(vec![Patch::new(name, Origin::User, text)?]),
        (UserPatch::Mailbox(_), false) => Err(BuildError::Usage(format!(
            "{name} is no mailbox: no line `From ...` begins it; give a plain diff with --patch"
        ))),
    }
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

    fn patch(text: String) -> Result<Patch, BuildError> {
        Patch::new("a.patch".into(), Origin::User, text.into())
    }

    #[test]
    fn headers_are_told_from_code() {
        let code = patch(MAIL.into()).expect("a patch");
        assert_eq!(code.files().iter().collect::<Vec<_>>(), [Path::new("mm/x.c")]);
        assert!(!code.concerns_modules());
        let header = patch(MAIL.replace("mm/x.c", "include/linux/x.h")).expect("a patch");
        assert!(header.concerns_modules());
    }

    #[test]
    fn reject_names_patch_file_hunk_rival_and_what_to_do() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("mm")).expect("folder");
        fs::write(tree.join("mm/x.c"), "first\nother\nlast\n").expect("write");
        let mine = patch(MAIL.into()).expect("a patch");
        let rival =
            Patch { name: "rival.patch".into(), origin: Origin::Variant("rival".into()), ..mine.clone() };
        let elsewhere = Patch { name: "elsewhere.patch".into(), files: BTreeSet::new(), ..rival.clone() };
        let error = mine.apply(&tree, "kernel 1", &[rival, elsewhere]).expect_err("it does not fit");
        let text = error.to_string();
        for part in
            ["a.patch", "kernel 1 with rival.patch:", "mm/x.c:1: this hunk", "+++ b/nor/this", "rebase it"]
        {
            assert!(text.contains(part), "{part} is not in: {text}");
        }
        assert!(matches!(error.into_cli(), crate::cli::Error::Usage(_)), "the user can mend it");
    }

    #[test]
    fn patches_stay_in_the_tree() {
        assert!(matches!(patch(MAIL.replace("mm/x.c", "../x.c")), Err(BuildError::Usage(_))));
        assert!(patch("hello\n".into()).is_err());
    }

    #[test]
    fn doubles_are_refused_by_content() {
        let mine = patch(MAIL.into()).expect("a patch");
        let variant = Patch { name: "v.patch".into(), origin: Origin::Variant("v".into()), ..mine.clone() };
        let other = patch(MAIL.replace("mm/x.c", "mm/y.c")).expect("a patch");
        assert!(no_doubles(&[mine.clone(), other]).is_ok());
        let text = no_doubles(&[variant, mine]).expect_err("twice").to_string();
        assert!(text.contains("a.patch") && text.contains("part of variant v"), "{text}");
    }

    #[test]
    fn a_patch_may_be_a_mail_and_a_mailbox_must_be() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(&dir.path().join("cache")).expect("cache");
        let [mail, diff] = ["mail.patch", "diff.patch"].map(|name| dir.path().join(name));
        fs::write(&mail, MAIL).expect("write");
        fs::write(&diff, MAIL.split_once("\n\ndiff").map(|(_, d)| format!("diff{d}")).expect("diff"))
            .expect("write");
        for file in [&mail, &diff] {
            let patches = user(&UserPatch::Patch(file.clone()), &cache).expect("a patch");
            assert_eq!(patches.len(), 1);
            assert_eq!(patches[0].name, file_name(file));
            assert_eq!(patches[0].origin, Origin::User);
        }
        assert_eq!(user(&UserPatch::Mailbox(mail), &cache).expect("a mail").len(), 1);
        let error = user(&UserPatch::Mailbox(diff), &cache).expect_err("no mailbox").to_string();
        assert!(error.contains("--patch"), "{error}");
        let none = UserPatch::Patch(dir.path().join("none"));
        assert!(matches!(user(&none, &cache), Err(BuildError::Usage(_))));
    }
}

//! Patches on a live source tree, changed by touching only the files whose content changes, so that `make` rebuilds
//! nothing else.
//!
//! Nothing is ever unapplied. A pristine copy of each file that some patch has touched is kept; the wanted content of
//! those files is made from the copies aside, and written where it differs. Whoever is killed on the way leaves a tree
//! that says of itself that it is unfinished, and the next switch mends it.
//!
//! ```text
//! src/           the live tree
//! base/          pristine copies
//! overlay.json   State
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cache::write_whole;
use super::error::IoContext;
use super::patches::Patch;
use super::{BuildError, Cache};

/// What is known about the live tree.
#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    /// Checksums of the patches applied; `None` while a switch is under way.
    patches: Option<Vec<String>>,
    /// Each file that some patch has touched, and whether it is there in the pristine source.
    base: BTreeMap<PathBuf, bool>,
}

/// The patches on one live tree. The caller holds the tree's lock.
#[derive(Debug)]
pub(super) struct Overlay<'a> {
    cache: &'a Cache,
    dir: &'a Path,
    onto: &'a str,
}

impl<'a> Overlay<'a> {
    /// Of the live tree in `dir`; `onto` names it in errors.
    pub(super) fn new(cache: &'a Cache, dir: &'a Path, onto: &'a str) -> Self {
        Self { cache, dir, onto }
    }

    /// Makes the live tree the pristine source with these patches. Says which files were changed on the way. A patch
    /// that does not apply leaves the tree as it was.
    pub(super) fn switch(&self, patches: &[Patch]) -> Result<Vec<PathBuf>, BuildError> {
        let wanted: Vec<String> = patches.iter().map(|p| p.sha256.clone()).collect();
        let mut state = self.load()?;
        if state.patches.as_ref() == Some(&wanted) {
            return Ok(Vec::new());
        }
        let files: BTreeSet<&PathBuf> = patches.iter().flat_map(Patch::files).collect();
        self.keep_pristine(&mut state, &files)?;
        let scratch = self.cache.scratch()?;
        let made = scratch.path().join("files");
        for file in &files {
            if let Some(true) = state.base.get(*file) {
                copy(&self.base(file), &made.join(file))?;
            }
        }
        fs::create_dir_all(&made).on("create", &made)?;
        for (index, patch) in patches.iter().enumerate() {
            patch.apply(&made, self.onto, patches.get(..index).unwrap_or_default())?;
        }
        state.patches = None;
        self.save(&state)?;
        let mut changed = Vec::new();
        for (file, is_in_base) in &state.base {
            let source = match (files.contains(file), is_in_base) {
                (true, _) => Some(made.join(file)),
                (false, true) => Some(self.base(file)),
                (false, false) => None,
            };
            if replace(source.filter(|s| s.exists()).as_deref(), &self.live(file))? {
                changed.push(file.clone());
            }
        }
        state.patches = Some(wanted);
        self.save(&state)?;
        Ok(changed)
    }

    /// Says that the pristine source has a new `file`, or (`None`) none of that name any more. The live tree follows at
    /// once where no patch touches the file, else with the next switch.
    pub(super) fn update_pristine(&self, file: &Path, source: Option<&Path>) -> Result<(), BuildError> {
        let mut state = self.load()?;
        if !state.base.contains_key(file) {
            replace(source, &self.live(file))?;
            return Ok(());
        }
        state.patches = None;
        self.save(&state)?;
        replace(source, &self.base(file))?;
        state.base.insert(file.to_owned(), source.is_some());
        self.save(&state)
    }

    /// Copies each file that has not been touched yet aside, before it is.
    fn keep_pristine(&self, state: &mut State, files: &BTreeSet<&PathBuf>) -> Result<(), BuildError> {
        let fresh: Vec<_> = files.iter().filter(|f| !state.base.contains_key(**f)).collect();
        for file in &fresh {
            let live = self.live(file);
            if live.exists() {
                replace(Some(&live), &self.base(file))?;
            }
            state.base.insert(file.to_path_buf(), live.exists());
        }
        if fresh.is_empty() { Ok(()) } else { self.save(state) }
    }

    fn live(&self, file: &Path) -> PathBuf {
        self.dir.join("src").join(file)
    }

    fn base(&self, file: &Path) -> PathBuf {
        self.dir.join("base").join(file)
    }

    fn load(&self) -> Result<State, BuildError> {
        let file = self.dir.join("overlay.json");
        match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(State::default()),
            Err(e) => Err(e).on("read", &file),
        }
    }

    fn save(&self, state: &State) -> Result<(), BuildError> {
        let file = self.dir.join("overlay.json");
        let text = serde_json::to_vec_pretty(state)
            .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() })?;
        write_whole(&file, text)
    }
}

/// Makes `dest` what `source` is, content and permissions, or removes it. Says whether that changed anything; if not,
/// `dest` keeps its time of change.
pub(super) fn replace(source: Option<&Path>, dest: &Path) -> Result<bool, BuildError> {
    let Some(source) = source else {
        return match fs::remove_file(dest) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e).on("remove", dest),
        };
    };
    if is_same(source, dest).on("compare", source)? {
        return Ok(false);
    }
    copy(source, dest)?;
    Ok(true)
}

fn is_same(a: &Path, b: &Path) -> io::Result<bool> {
    let (Ok(meta_a), Ok(meta_b)) = (a.symlink_metadata(), b.symlink_metadata()) else { return Ok(false) };
    if meta_a.is_symlink() || meta_b.is_symlink() {
        return Ok(meta_a.is_symlink() && meta_b.is_symlink() && fs::read_link(a)? == fs::read_link(b)?);
    }
    let modes = (meta_a.permissions(), meta_b.permissions());
    Ok(meta_a.len() == meta_b.len() && modes.0 == modes.1 && fs::read(a)? == fs::read(b)?)
}

/// Copies a file or symbolic link so that `dest` is there as a whole or not at all, with the time of now.
fn copy(source: &Path, dest: &Path) -> Result<(), BuildError> {
    let dir = dest.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).on("create", dir)?;
    let scratch =
        tempfile::Builder::new().prefix(".hmmstorm").tempdir_in(dir).on("create a folder in", dir)?;
    let made = scratch.path().join("file");
    if source.is_symlink() {
        let target = fs::read_link(source).on("read", source)?;
        std::os::unix::fs::symlink(target, &made).on("create", &made)?;
    } else {
        fs::copy(source, &made).on("copy", source)?;
    }
    fs::rename(&made, dest).on("write", dest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::patches::Origin;
    use std::slice::from_ref;
    use std::time::SystemTime;

    struct Tree {
        _dir: tempfile::TempDir,
        cache: Cache,
        root: PathBuf,
    }

    impl Tree {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("temporary folder");
            let cache = Cache::open(dir.path()).expect("cache");
            let root = dir.path().join("trees/t");
            for (name, text) in [("mm/a.c", "one\ntwo\nthree\n"), ("mm/b.c", "b\n"), ("include/a.h", "h\n")] {
                let file = root.join("src").join(name);
                fs::create_dir_all(file.parent().expect("parent")).expect("folder");
                fs::write(&file, text).expect("write");
                let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
                fs::File::options().write(true).open(&file).and_then(|f| f.set_modified(old)).expect("time");
            }
            Self { _dir: dir, cache, root }
        }

        fn switch(&self, patches: &[Patch]) -> Result<Vec<PathBuf>, BuildError> {
            Overlay::new(&self.cache, &self.root, "the test tree").switch(patches)
        }

        fn text(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.root.join("src").join(name)).ok()
        }

        /// Files changed since the tree was made.
        fn fresh(&self) -> Vec<String> {
            ["mm/a.c", "mm/b.c", "include/a.h"]
                .into_iter()
                .filter(|name| {
                    let modified =
                        self.root.join("src").join(name).metadata().and_then(|m| m.modified()).expect("time");
                    modified > SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1)
                })
                .map(str::to_owned)
                .collect()
        }
    }

    fn patch(dir: &Path, name: &str, diff: &str) -> Patch {
        let file = dir.join(name);
        fs::write(&file, diff).expect("write");
        Patch::read(&file, Origin::User).expect("a patch")
    }

    const A: &str = "--- a/mm/a.c\n+++ b/mm/a.c\n@@ -1,3 +1,3 @@\n one\n-two\n+zwei\n three\n";
    const A_AGAIN: &str = "--- a/mm/a.c\n+++ b/mm/a.c\n@@ -1,3 +1,4 @@\n one\n zwei\n three\n+four\n";
    const NEW: &str = "diff --git a/mm/new.c b/mm/new.c\nnew file mode 100644\n--- /dev/null\n+++ b/mm/new.c\n\
                       @@ -0,0 +1 @@\n+new\n";

    #[test]
    fn only_changed_files_are_touched() {
        let tree = Tree::new();
        let dir = tempfile::tempdir().expect("temporary folder");
        let [a, again, new] =
            [("a", A), ("again", A_AGAIN), ("new", NEW)].map(|(n, d)| patch(dir.path(), n, d));
        assert_eq!(tree.switch(from_ref(&a)).expect("switch"), [Path::new("mm/a.c")]);
        assert_eq!(tree.fresh(), ["mm/a.c"]);
        // The same once more: nothing.
        assert!(tree.switch(from_ref(&a)).expect("switch").is_empty());
        // Another that adds to the first: a.c once, and the new file.
        let changed = tree.switch(&[a.clone(), again, new]).expect("switch");
        assert_eq!(changed, [Path::new("mm/a.c"), Path::new("mm/new.c")]);
        assert_eq!(tree.text("mm/a.c").as_deref(), Some("one\nzwei\nthree\nfour\n"));
        assert_eq!(tree.text("mm/new.c").as_deref(), Some("new\n"));
        // And back to pristine.
        tree.switch(&[]).expect("switch");
        assert_eq!(tree.text("mm/a.c").as_deref(), Some("one\ntwo\nthree\n"));
        assert_eq!(tree.text("mm/new.c"), None);
        assert_eq!(tree.fresh(), ["mm/a.c"], "files that no patch touches keep their times");
    }

    #[test]
    fn patch_that_does_not_apply_changes_nothing() {
        let tree = Tree::new();
        let dir = tempfile::tempdir().expect("temporary folder");
        let (a, again) = (patch(dir.path(), "a", A), patch(dir.path(), "again", A_AGAIN));
        assert!(matches!(tree.switch(&[again]), Err(BuildError::Patch { .. })));
        assert!(tree.fresh().is_empty());
        tree.switch(&[a]).expect("the tree is still good");
    }

    #[test]
    fn killed_switch_is_mended_by_the_next() {
        let tree = Tree::new();
        let dir = tempfile::tempdir().expect("temporary folder");
        let a = patch(dir.path(), "a", A);
        tree.switch(from_ref(&a)).expect("switch");
        // As if killed in the middle of a switch to pristine: the state says so, and one file is wrong.
        let file = tree.root.join("overlay.json");
        let mut state: State = serde_json::from_slice(&fs::read(&file).expect("read")).expect("state");
        state.patches = None;
        fs::write(&file, serde_json::to_vec(&state).expect("state")).expect("write");
        fs::write(tree.root.join("src/mm/a.c"), "garbage").expect("write");
        tree.switch(&[a]).expect("switch");
        assert_eq!(tree.text("mm/a.c").as_deref(), Some("one\nzwei\nthree\n"));
    }

    #[test]
    fn new_pristine_source_under_a_patch() {
        let tree = Tree::new();
        let dir = tempfile::tempdir().expect("temporary folder");
        let a = patch(dir.path(), "a", A);
        tree.switch(from_ref(&a)).expect("switch");
        let source = dir.path().join("source");
        fs::write(&source, "one\ntwo\nthree\nmore\n").expect("write");
        let overlay = Overlay::new(&tree.cache, &tree.root, "the test tree");
        overlay.update_pristine(Path::new("mm/a.c"), Some(&source)).expect("update");
        overlay.update_pristine(Path::new("mm/b.c"), None).expect("update");
        assert_eq!(tree.switch(&[a]).expect("switch"), [Path::new("mm/a.c")]);
        assert_eq!(tree.text("mm/a.c").as_deref(), Some("one\nzwei\nthree\nmore\n"));
        assert_eq!(tree.text("mm/b.c"), None);
    }
}

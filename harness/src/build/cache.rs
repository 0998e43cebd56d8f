//! The folder for all that is fetched and built.
//!
//! ```text
//! downloads/   verified files, and partial/ those under way
//! unpacked/    unpacked Debian packages: QEMU, busybox, rust-src
//! tools/       bindgen
//! trees/       one live source and object tree per kernel, flavour and toolchain
//! kernels/     what was built in a live tree, one folder per variant
//! modules/     hsgpu.ko
//! images/      initramfs and image.json
//! cargo/       target folders of the device and of the guest's binary
//! apt/         a private apt state
//! locks/ logs/ tmp/
//! ```
//!
//! A result has a key of all that it depends on as its name. It is made in `tmp/` and renamed to its place, so what is
//! there is whole; who is killed leaves a folder in `tmp/` whose lock is free, which the next process takes away.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock, syncfs};
use rustix::io::{FdFlags, fcntl_setfd};

use super::error::IoContext;
use super::{BuildError, Progress};

/// Time between two tries for a lock that somebody else holds.
const LOCK_POLL: Duration = Duration::from_millis(200);
/// Results with more files are synchronised as a file system, not file by file.
const MANY_FILES: usize = 256;

/// The cache folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache at `root`, makes it if it is not there, and takes away what killed processes left.
    pub fn open(root: &Path) -> Result<Self, BuildError> {
        let cache = Self { root: root.to_owned() };
        for dir in ["tmp", "locks", "logs"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).on("create", &dir)?;
        }
        cache.remove_leftovers()?;
        Ok(cache)
    }

    /// A path in the cache.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    /// Where a piece of work logs.
    pub fn log(&self, name: &str) -> PathBuf {
        self.path("logs").join(format!("{name}.log"))
    }

    /// A fresh log for a piece of work; the one of the last time is kept beside it as `.old`.
    pub(super) fn fresh_log(&self, name: &str) -> Result<PathBuf, BuildError> {
        let log = self.log(name);
        match fs::rename(&log, log.with_extension("log.old")) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("rename", &log)?,
            _ => {}
        }
        Ok(log)
    }

    /// Waits until no other process, and no other thread of this one, holds the lock of this name.
    pub(super) fn lock(&self, name: &str, progress: &Progress) -> Result<Lock, BuildError> {
        let path = self.path("locks").join(format!("{name}.lock"));
        let file = File::options().create(true).append(true).open(&path).on("open", &path)?;
        let mut said = false;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(e) => return Err(e.into()).on("lock", &path),
            }
            if !said {
                progress.note(format_args!("waiting for another hmmstorm, which holds {}", path.display()));
                said = true;
            }
            progress.check()?;
            thread::sleep(LOCK_POLL);
        }
        // Programs that work under the lock inherit it: should this process be killed, the next one waits for them.
        fcntl_setfd(&file, FdFlags::empty()).map_err(io::Error::from).on("keep open", &path)?;
        Ok(Lock { file })
    }

    /// A folder in the cache for something unfinished; gone when dropped.
    pub(super) fn scratch(&self) -> Result<Scratch, BuildError> {
        let tmp = self.path("tmp");
        loop {
            let lock =
                tempfile::Builder::new().suffix(".lock").tempfile_in(&tmp).on("create a file in", &tmp)?;
            // Between creation and this lock, another process may have taken the file for a leftover.
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            if lock.as_file().metadata().on("examine", lock.path())?.nlink() == 0 {
                continue;
            }
            let path = lock.path().with_extension("d");
            fs::create_dir(&path).on("create", &path)?;
            return Ok(Scratch { path, _lock: lock });
        }
    }

    /// Makes a folder at `dest` with what `fill` puts there: all of it, or nothing. When `dest` is there already,
    /// nothing is done. To be called with a lock that covers `dest`, if `fill` takes long.
    pub(super) fn publish(
        &self,
        dest: &Path,
        fill: impl FnOnce(&Path) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        if dest.exists() {
            return Ok(());
        }
        let scratch = self.scratch()?;
        let made = scratch.path().join("made");
        fs::create_dir(&made).on("create", &made)?;
        fill(&made)?;
        synchronise(&made)?;
        if let Some(parent) = dest.parent() {
            fs::create_dir_all(parent).on("create", parent)?;
        }
        match fs::rename(&made, dest) {
            Err(_) if dest.exists() => Ok(()), // another process was quicker; the key says that it is the same
            result => result.on("publish", dest),
        }
    }

    fn remove_leftovers(&self) -> Result<(), BuildError> {
        let tmp = self.path("tmp");
        for entry in fs::read_dir(&tmp).on("list", &tmp)? {
            let path = entry.on("list", &tmp)?.path();
            if path.extension().is_none_or(|e| e != "lock") {
                continue;
            }
            let Ok(file) = File::open(&path) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue; // somebody is at work
            }
            let folder = path.with_extension("d");
            match fs::remove_dir_all(&folder) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).on("remove", &folder)?,
                _ => {}
            }
            let _ = fs::remove_file(&path);
        }
        Ok(())
    }
}

/// Puts a result on disk before it gets its name, so that not even a power cut leaves half of it.
fn synchronise(dir: &Path) -> Result<(), BuildError> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).on("list", &folder)? {
            let entry = entry.on("list", &folder)?;
            let kind = entry.file_type().on("examine", &folder)?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
        if files.len() > MANY_FILES {
            let root = File::open(dir).on("open", dir)?;
            return syncfs(root.as_fd()).map_err(io::Error::from).on("synchronise", dir);
        }
    }
    for path in files {
        File::open(&path).and_then(|f| f.sync_all()).on("synchronise", &path)?;
    }
    Ok(())
}

/// Writes a small file so that it is there as a whole or not at all.
pub(super) fn write_whole(path: &Path, content: impl AsRef<[u8]>) -> Result<(), BuildError> {
    use std::io::Write;
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir).on("create", dir)?;
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(dir)
        .on("create a file in", dir)?;
    file.write_all(content.as_ref()).on("write", path)?;
    file.as_file().sync_all().on("write", path)?;
    file.persist(path).map_err(|e| e.error).on("write", path)?;
    Ok(())
}

/// A lock between processes; free again when dropped.
#[derive(Debug)]
pub(super) struct Lock {
    file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Explicitly: a child of another thread may have inherited the descriptor, and closing ours would not do.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// See [`Cache::scratch`].
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    _lock: tempfile::NamedTempFile,
}

impl Scratch {
    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().expect("temporary folder");
        let cache = Cache::open(dir.path()).expect("cache");
        (dir, cache)
    }

    fn leftovers(cache: &Cache) -> usize {
        fs::read_dir(cache.path("tmp")).expect("tmp").count()
    }

    #[test]
    fn failed_result_is_not_published() {
        let (_dir, cache) = cache();
        let dest = cache.path("kernels/x");
        let result = cache.publish(&dest, |dir| {
            fs::write(dir.join("half"), "of it").on("write", dir)?;
            Err(BuildError::Interrupted)
        });
        assert!(result.is_err() && !dest.exists());
        assert_eq!(leftovers(&cache), 0);
        cache.publish(&dest, |dir| fs::write(dir.join("whole"), "").on("write", dir)).expect("publish");
        assert!(dest.join("whole").exists());
        // There already: not made again.
        cache.publish(&dest, |_| Err(BuildError::Interrupted)).expect("nothing to do");
    }

    #[test]
    fn killed_process_leaves_only_what_the_next_removes() {
        let (dir, cache) = cache();
        // A child that holds a scratch folder's lock as this process would, and is then killed.
        let lock = cache.path("tmp/abc.lock");
        fs::create_dir(cache.path("tmp/abc.d")).expect("folder");
        fs::write(cache.path("tmp/abc.d/half"), "").expect("file");
        fs::write(&lock, "").expect("lock");
        let script = format!("exec 9<{}; flock -x 9; echo locked; exec sleep 1000", lock.display());
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("sh");
        let mut line = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().expect("stdout")), &mut line)
            .expect("line");
        assert_eq!(line, "locked\n");
        Cache::open(dir.path()).expect("cache");
        assert!(cache.path("tmp/abc.d/half").exists(), "taken from somebody who is at work");
        child.kill().expect("kill");
        child.wait().expect("wait");
        Cache::open(dir.path()).expect("cache");
        assert_eq!(leftovers(&cache), 0);
    }

    #[test]
    fn scratch_in_use_survives_another_process() {
        let (dir, cache) = cache();
        let scratch = cache.scratch().expect("scratch");
        Cache::open(dir.path()).expect("cache");
        assert!(scratch.path().exists());
        drop(scratch);
        assert_eq!(leftovers(&cache), 0);
    }

    #[test]
    fn lock_excludes_and_outlives_its_holder_in_children() {
        let (_dir, cache) = cache();
        let interrupt = crate::cli::Interrupt::detached().expect("interrupt");
        let progress = Progress::interruptible(interrupt.clone());
        let lock = cache.lock("x", &progress).expect("lock");
        // A child that inherits the lock, as `make` does.
        let mut child = Command::new("sleep").arg("1000").spawn().expect("sleep");
        interrupt.raise(); // so that a second lock fails instead of waiting
        assert!(matches!(cache.lock("x", &progress), Err(BuildError::Interrupted)));
        // The holder dies without unlocking: the child still holds it.
        let Lock { file } = &lock;
        let file = file.try_clone().expect("clone");
        std::mem::forget(lock);
        assert!(cache.lock("x", &progress).is_err());
        drop(Lock { file });
        assert!(cache.lock("x", &progress).is_ok(), "an orderly end frees it in spite of the child");
        child.kill().expect("kill");
        child.wait().expect("wait");
    }

    #[test]
    fn whole_files() {
        let (_dir, cache) = cache();
        let path = cache.path("a/b.json");
        write_whole(&path, "{}").expect("write");
        write_whole(&path, "{1}").expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), "{1}");
        assert_eq!(fs::read_dir(cache.path("a")).expect("list").count(), 1);
    }
}

//! What every command gets: how much to say, where things are, and whether the user has asked to stop.

use std::env;
use std::path::{Path, PathBuf};

use super::{Error, Interrupt};

/// How much a command says on stderr. Results go to stdout in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// Errors alone.
    Quiet,
    /// Steps and progress of long work.
    Normal,
    /// Also what is normally of no interest: command lines, cache hits.
    Verbose,
}

/// What every command gets.
#[derive(Debug)]
pub struct Context {
    /// How much to say.
    pub verbosity: Verbosity,
    /// Folder for all that is fetched and built; exists.
    pub cache: PathBuf,
    /// Root of the hmmstorm source tree: `images/`, `qemu-config/`, `storm/scenarios/` and the crates.
    pub repo: PathBuf,
    /// Set on Ctrl-C, SIGTERM and SIGHUP.
    pub interrupt: Interrupt,
}

impl Context {
    /// Finds cache and source tree, and takes over the signals that end a process.
    pub fn new(verbosity: Verbosity, cache: Option<PathBuf>) -> Result<Self, Error> {
        let cache = match cache {
            Some(dir) => std::path::absolute(&dir)?,
            None => default_cache(|name| env::var_os(name).map(PathBuf::from))?,
        };
        std::fs::create_dir_all(&cache).map_err(|e| {
            Error::harness(format!("cannot create the cache folder {}: {e}", cache.display()))
        })?;
        Ok(Self { verbosity, cache, repo: find_repo()?, interrupt: Interrupt::install()? })
    }

    /// The same for work that somebody else reports on: it says nothing but errors.
    pub fn quietly(&self) -> Self {
        Self {
            verbosity: Verbosity::Quiet,
            cache: self.cache.clone(),
            repo: self.repo.clone(),
            interrupt: self.interrupt.clone(),
        }
    }

    /// Says something about the work under way, on stderr, unless `--quiet`.
    pub fn note(&self, text: impl std::fmt::Display) {
        if self.verbosity >= Verbosity::Normal {
            eprintln!("{text}");
        }
    }

    /// Says something of interest to those who asked for more with `--verbose`.
    pub fn detail(&self, text: impl std::fmt::Display) {
        if self.verbosity >= Verbosity::Verbose {
            eprintln!("{text}");
        }
    }
}

fn default_cache(var: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, Error> {
    // The XDG specification: a relative path there is to be ignored.
    var("XDG_CACHE_HOME")
        .filter(|dir| dir.is_absolute())
        .or_else(|| var("HOME").map(|home| home.join(".cache")))
        .map(|dir| dir.join("hmmstorm"))
        .ok_or_else(|| {
            Error::usage("no place for the cache: set HMMSTORM_CACHE, or HOME, or give --cache DIR")
        })
}

/// The source tree: `$HMMSTORM_ROOT`, else the one around the current folder, else the one around this program, else
/// the one that this program was built from.
fn find_repo() -> Result<PathBuf, Error> {
    if let Some(root) = env::var_os("HMMSTORM_ROOT").map(PathBuf::from) {
        return if is_repo(&root) {
            Ok(std::path::absolute(root)?)
        } else {
            Err(Error::usage(format!("HMMSTORM_ROOT={} is no hmmstorm source tree", root.display())))
        };
    }
    let around = |dir: PathBuf| dir.ancestors().find(|d| is_repo(d)).map(Path::to_path_buf);
    env::current_dir()
        .ok()
        .and_then(around)
        .or_else(|| env::current_exe().ok().and_then(around))
        .or_else(|| around(PathBuf::from(env!("CARGO_MANIFEST_DIR"))))
        .ok_or_else(|| {
            Error::usage("no hmmstorm source tree here: run this inside one, or set HMMSTORM_ROOT")
        })
}

fn is_repo(dir: &Path) -> bool {
    ["qemu-config", "guest-driver", "abi/src"].iter().all(|part| dir.join(part).is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cache_follows_xdg() {
        let xdg = default_cache(|name| (name == "XDG_CACHE_HOME").then(|| "/x".into()));
        assert_eq!(xdg.ok(), Some(PathBuf::from("/x/hmmstorm")));
        let relative = default_cache(|name| match name {
            "XDG_CACHE_HOME" => Some("x".into()),
            "HOME" => Some("/home/u".into()),
            _ => None,
        });
        assert_eq!(relative.ok(), Some(PathBuf::from("/home/u/.cache/hmmstorm")));
        assert!(default_cache(|_| None).is_err());
    }
}

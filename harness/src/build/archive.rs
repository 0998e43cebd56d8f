//! The Debian archive through a private apt state: signed indexes, and files that are what those say.
//!
//! Nothing here touches the host's package database, and nothing needs root. apt's own methods do the transfer, so a
//! proxy that the host's apt is set up for works here too, and a transfer that broke off goes on where it stopped if
//! the mirror can do that.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::error::{IoContext, require_space};
use super::pins::ArchivePin;
use super::process::{Job, capture, guarded, which};
use super::progress::Unit;
use super::sources::{self, Entry};
use super::{BuildError, Cache, Progress, hash};

/// apt's program for single files; not on `PATH`.
const APT_HELPER: &str = "/usr/lib/apt/apt-helper";
/// Indexes that are older are read anew before something is fetched.
const INDEX_AGE: Duration = Duration::from_secs(24 * 3600);

/// A file of the archive, as its signed index describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Remote {
    uri: String,
    /// Its name.
    pub(super) file: String,
    size: u64,
    /// Its checksum.
    pub(super) sha256: String,
}

/// The archive.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    cache: &'a Cache,
    progress: &'a Progress,
    pin: &'a ArchivePin,
    dir: PathBuf,
    options: Vec<OsString>,
    log: PathBuf,
}

impl<'a> Archive<'a> {
    /// Finds the archive and sees that its indexes are there and not too old.
    pub(super) fn open(
        cache: &'a Cache,
        pin: &'a ArchivePin,
        progress: &'a Progress,
    ) -> Result<Self, BuildError> {
        for tool in ["apt-get", "dpkg-deb"] {
            if which(tool).is_none() || !Path::new(APT_HELPER).exists() {
                return Err(BuildError::NoArchive(format!(
                    "{tool} is not on this host, so nothing can be fetched from a Debian archive. Bring your own: \
                     QEMU (10.1 or newer) as a host package, `rustup component add rust-src`, and a kernel with --tree \
                     or --tarball"
                )));
            }
        }
        let dir = cache.path("apt");
        for part in ["lists/partial", "archives/partial", "none/partial"] {
            let part = dir.join(part);
            fs::create_dir_all(&part).on("create", &part)?;
        }
        let status = dir.join("status");
        if !status.exists() {
            super::cache::write_whole(&status, "")?;
        }
        let archive =
            Self { cache, progress, pin, options: options(&dir, pin), log: cache.fresh_log("fetch")?, dir };
        let entry = sources::debian_archive()?;
        archive.prepare(&source_list(&entry, pin)?)?;
        Ok(archive)
    }

    /// The upstream tarball of a source package.
    pub(super) fn source(&self, package: &str, version: &str) -> Result<Remote, BuildError> {
        let wanted = format!("{package}={version}");
        let uris = ["source", "--print-uris", "--tar-only", "-qq", &wanted];
        let list = self.listed(&uris, &wanted)?;
        list.into_iter().next().ok_or_else(|| self.not_there(&wanted))
    }

    /// Packages with all that they depend on.
    pub(super) fn closure(&self, packages: &[String]) -> Result<Vec<Remote>, BuildError> {
        let release = self.pin.suites.last().map_or("", String::as_str);
        let mut arguments =
            vec!["install", "--print-uris", "--no-install-recommends", "--yes", "-qq", "-t", release];
        arguments.extend(packages.iter().map(String::as_str));
        self.listed(&arguments, &packages.join(" "))
    }

    /// The one package whose upstream version is this one, whatever its revision.
    pub(super) fn exact(&self, package: &str, upstream: &str) -> Result<Remote, BuildError> {
        let mut command = self.apt("apt-cache");
        let madison = capture(command.args(["madison", package]))?;
        let version = pick_version(&madison, upstream)
            .ok_or_else(|| self.not_there(&format!("{package} of version {upstream}")))?;
        let wanted = format!("{package}={version}");
        let list = self.listed(&["download", "--print-uris", "-qq", &wanted], &wanted)?;
        list.into_iter().next().ok_or_else(|| self.not_there(&wanted))
    }

    /// Fetches what is not there yet into the cache's downloads, verified. `what` is for people.
    pub(super) fn download(&self, what: &str, remotes: &[Remote]) -> Result<Vec<PathBuf>, BuildError> {
        let downloads = self.cache.path("downloads");
        let partial = downloads.join("partial");
        fs::create_dir_all(&partial).on("create", &partial)?;
        let _lock = self.cache.lock("downloads", self.progress)?;
        let places = || remotes.iter().map(|r| (r, partial.join(&r.file), downloads.join(&r.file)));
        let missing: Vec<_> =
            places().filter(|(r, _, file)| !hash::file(file).is_ok_and(|found| found == r.sha256)).collect();
        if !missing.is_empty() {
            let total = missing.iter().map(|(r, ..)| r.size).sum();
            require_space(what, &partial, total >> 20)?;
            let step = self.progress.step(format!("fetching {what}"), Unit::Bytes);
            let mut command = guarded(APT_HELPER);
            command.args(&self.options).arg("download-file");
            for (remote, part, _) in &missing {
                command.arg(&remote.uri).arg(part).arg(format!("SHA256:{}", remote.sha256));
            }
            let so_far =
                || missing.iter().filter_map(|(_, p, _)| fs::metadata(p).ok()).map(|m| m.len()).sum();
            let job = Job { what: &format!("fetching {what}"), log: &self.log, progress: self.progress };
            job.run(command, |_| (), || step.at(so_far(), Some(total))).map_err(|e| self.explain(e))?;
            for (remote, part, file) in &missing {
                admit(part, file, &remote.sha256)?;
            }
            step.done();
        }
        Ok(places().map(|(.., file)| file).collect())
    }

    /// Reads the indexes anew, if these sources are new or the indexes old.
    fn prepare(&self, list: &str) -> Result<(), BuildError> {
        let _lock = self.cache.lock("apt", self.progress)?;
        let file = self.dir.join("sources.list");
        let stamp = self.dir.join("updated");
        let is_same = fs::read_to_string(&file).is_ok_and(|old| old == list);
        if is_same && age(&stamp).is_some_and(|age| age < INDEX_AGE) {
            return Ok(());
        }
        if let Err(e) = fs::remove_file(&stamp)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            Err(e).on("remove", &stamp)?;
        }
        super::cache::write_whole(&file, list)?;
        let step = self.progress.step("reading the package archive's indexes", Unit::None);
        let mut command = guarded("apt-get");
        command.args(&self.options).args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let job =
            Job { what: "reading the package archive's indexes", log: &self.log, progress: self.progress };
        job.run(command, |_| (), || step.tick()).map_err(|e| self.explain(e))?;
        super::cache::write_whole(&stamp, "")?;
        step.done();
        Ok(())
    }

    fn apt(&self, program: &str) -> std::process::Command {
        let mut command = std::process::Command::new(program);
        command.env("LC_ALL", "C").args(&self.options);
        command
    }

    fn listed(&self, arguments: &[&str], wanted: &str) -> Result<Vec<Remote>, BuildError> {
        let said = capture(self.apt("apt-get").args(arguments)).map_err(|e| match e {
            BuildError::Tool { reason, .. } => {
                BuildError::NoArchive(format!("the package archive does not give {wanted}: {reason}"))
            }
            other => other,
        })?;
        said.lines()
            .filter(|line| line.starts_with('\''))
            .map(|line| {
                parse_uri(line)
                    .ok_or_else(|| BuildError::NoArchive(format!("apt-get printed no SHA-256 for: {line}")))
            })
            .collect()
    }

    fn not_there(&self, wanted: &str) -> BuildError {
        BuildError::NoArchive(format!(
            "the package archive has no {wanted}; its releases read: {}; log: {}",
            self.pin.suites.join(", "),
            self.log.display()
        ))
    }

    /// Adds what to do to apt's own words.
    fn explain(&self, error: BuildError) -> BuildError {
        let BuildError::Command { what, program, status, log, tail } = error else { return error };
        let advice = if tail.contains("NO_PUBKEY") || tail.contains("not signed") {
            "the archive's keys are not on this host: install or upgrade the package debian-archive-keyring"
        } else if tail.contains("Hash Sum mismatch") || tail.contains("Hashes of") {
            "what came is not what the signed index describes, and was not kept: try again later, or take another \
             mirror with HMMSTORM_DEBIAN_MIRROR"
        } else if tail.contains("404") {
            // Perhaps the indexes are out of date: the next try reads them anew.
            let _ = fs::remove_file(self.dir.join("updated"));
            "the mirror has not got that file (any more): take another mirror with HMMSTORM_DEBIAN_MIRROR; for a \
             kernel, --tarball FILE takes a file that you have"
        } else {
            "check the network and the host's apt configuration, and try again: what has come so far is kept"
        };
        BuildError::Command { what, program, status, log, tail: format!("{tail}\n{advice}") }
    }
}

/// Takes a fetched file in, if it is what it should be; else it is removed.
pub(super) fn admit(partial: &Path, dest: &Path, sha256: &str) -> Result<(), BuildError> {
    let found = hash::file(partial)?;
    if found != sha256 {
        fs::remove_file(partial).on("remove", partial)?;
        return Err(BuildError::Checksum {
            file: partial.to_owned(),
            expected: sha256.to_owned(),
            found,
            after: "it was removed; try again, or take another mirror with HMMSTORM_DEBIAN_MIRROR",
        });
    }
    fs::File::open(partial).and_then(|f| f.sync_all()).on("synchronise", partial)?;
    fs::rename(partial, dest).on("rename", partial)
}

fn age(stamp: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(fs::metadata(stamp).ok()?.modified().ok()?).ok()
}

/// Options that keep apt to a state of its own below `dir`.
fn options(dir: &Path, pin: &ArchivePin) -> Vec<OsString> {
    let mut options = Vec::new();
    let mut set = |name: &str, value: OsString| {
        let mut option = OsString::from(format!("{name}="));
        option.push(value);
        options.extend(["-o".into(), option]);
    };
    let paths = [
        ("Dir::Etc::sourcelist", dir.join("sources.list")),
        ("Dir::Etc::sourceparts", "/dev/null".into()),
        ("Dir::Etc::preferences", "/dev/null".into()),
        ("Dir::Etc::preferencesparts", "/dev/null".into()),
        ("Dir::State", dir.to_owned()),
        ("Dir::State::lists", dir.join("lists")),
        ("Dir::State::status", dir.join("status")),
        ("Dir::Cache", dir.to_owned()),
        // Always empty, so that `--print-uris` lists every file.
        ("Dir::Cache::archives", dir.join("none")),
    ];
    for (name, path) in paths {
        set(name, path.into());
    }
    let values = [
        ("APT::Architecture", pin.architecture.as_str()),
        ("APT::Architectures", pin.architecture.as_str()),
        ("Acquire::Languages", "none"),
        ("Acquire::ForceHash", "SHA256"),
        ("Acquire::Retries", "3"),
    ];
    for (name, value) in values {
        set(name, value.into());
    }
    if rustix::process::geteuid().is_root() {
        // apt's own user may not be allowed into the cache folder.
        set("APT::Sandbox::User", "root".into());
    }
    options
}

/// The private sources.list.
fn source_list(entry: &Entry, pin: &ArchivePin) -> Result<String, BuildError> {
    let keyring = entry
        .signed_by
        .iter()
        .filter(|file| file.extension().is_some_and(|e| e == "gpg" || e == "pgp"))
        .chain(&pin.keyrings)
        .find(|file| file.is_file())
        .ok_or_else(|| {
            BuildError::NoArchive(
                "the keys that sign the Debian archive are not on this host; install them with\n\n    \
                 sudo apt-get install debian-archive-keyring\n\nand start again"
                    .into(),
            )
        })?;
    let components = pin.components.join(" ");
    let line = |kind: &str, suite: &String| {
        format!("{kind} [signed-by={}] {} {suite} {components}\n", keyring.display(), entry.uri)
    };
    let packages = pin.suites.iter().map(|suite| line("deb", suite));
    Ok(packages.chain(pin.source_suites.iter().map(|suite| line("deb-src", suite))).collect())
}

/// A line of `--print-uris`: `'URI' name size SHA256:hex`.
fn parse_uri(line: &str) -> Option<Remote> {
    let (uri, rest) = line.strip_prefix('\'')?.split_once("' ")?;
    let mut words = rest.split_whitespace();
    let file = words.next()?.to_owned();
    let size = words.next()?.parse().ok()?;
    let sha256 = words.next()?.strip_prefix("SHA256:")?.to_owned();
    let is_plain = !file.contains('/') && !file.starts_with('.');
    (is_plain && sha256.len() == 64).then(|| Remote { uri: uri.to_owned(), file, size, sha256 })
}

/// From `apt-cache madison`: the newest version whose upstream part is `upstream`, e.g. `1.95.0+dfsg1-2~bpo13+1`.
fn pick_version(madison: &str, upstream: &str) -> Option<String> {
    madison
        .lines()
        .filter(|line| line.trim_end().ends_with("Packages"))
        .filter_map(|line| line.split('|').nth(1).map(str::trim))
        .find(|version| {
            version
                .strip_prefix(upstream)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '-', '~']))
        })
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_file_is_refused_and_removed() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let (partial, dest) = (dir.path().join("partial"), dir.path().join("dest"));
        fs::write(&partial, "abd").expect("write");
        let error = admit(&partial, &dest, &hash::bytes(b"abc")).expect_err("it is damaged");
        assert!(matches!(error, BuildError::Checksum { .. }), "{error}");
        assert!(!partial.exists() && !dest.exists());
        fs::write(&partial, "abc").expect("write");
        admit(&partial, &dest, &hash::bytes(b"abc")).expect("it is whole");
        assert!(!partial.exists() && dest.exists());
    }

    #[test]
    fn uri_lines() {
        let sha = "60f1a9b5c90dfac448cf9ac4e95a17bff0bdac06995e927a5f9b934cb5687fb3";
        let line = format!(
            "'http://m.example/pool/l/linux_6.19.6.orig.tar.xz' linux_6.19.6.orig.tar.xz 159 SHA256:{sha}"
        );
        let remote = parse_uri(&line).expect("a good line");
        assert_eq!((remote.file.as_str(), remote.size), ("linux_6.19.6.orig.tar.xz", 159));
        assert_eq!(parse_uri(&line.replace("SHA256:", "MD5Sum:")), None);
        assert_eq!(parse_uri(&format!("'http://m.example/x' ../../x 1 SHA256:{sha}")), None);
    }

    #[test]
    fn version_is_matched_exactly() {
        let madison = " rust-src | 1.96.1+dfsg1-2~bpo13+1 | http://m.example trixie-backports/main amd64 Packages\n \
                       rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://m.example trixie-backports/main amd64 Packages\n \
                       rustc | 1.95.01-1 | http://m.example trixie/main Sources\n";
        assert_eq!(pick_version(madison, "1.95.0").as_deref(), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(pick_version(madison, "1.9"), None);
        assert_eq!(pick_version(madison, "1.95.01"), None);
    }
}

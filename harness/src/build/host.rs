//! The host: which distribution, which of its packages are missing, and how to get them.

use std::fs;
use std::path::{Path, PathBuf};

use super::pins::{HostPackages, Need};
pub use super::process::which;
use super::process::{Job, guarded};
use super::progress::Unit;
use super::{BuildError, Cache, Progress};

/// Which distribution this is: `ID`, `VERSION_ID` and `ID_LIKE` of os-release.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// `debian`, `ubuntu`, …
    pub id: String,
    /// `12`, `24.04`, …
    pub version: String,
    /// Whether Debian's package names and tools are those of this host.
    pub is_debian_like: bool,
}

impl Distribution {
    /// Of this host.
    pub fn of_host() -> Self {
        ["/etc/os-release", "/usr/lib/os-release"]
            .iter()
            .find_map(|file| fs::read_to_string(file).ok())
            .map(|text| Self::parse(&text))
            .unwrap_or_default()
    }

    fn parse(os_release: &str) -> Self {
        let value = |name: &str| {
            os_release
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(|v| v.trim_matches(['"', '\'']).to_owned())
                .unwrap_or_default()
        };
        let (id, like) = (value("ID"), value("ID_LIKE"));
        let is_debian_like = std::iter::once(id.as_str())
            .chain(like.split_whitespace())
            .any(|name| name == "debian" || name == "ubuntu");
        Self { id, version: value("VERSION_ID"), is_debian_like }
    }
}

/// The packages that this host lacks, by the names of its distribution; with those for LLVM if `llvm`.
pub fn missing(needs: &HostPackages, distribution: &Distribution, llvm: bool) -> Vec<String> {
    let release = format!("{}-{}", distribution.id, distribution.version);
    needs
        .need
        .iter()
        .filter(|need| (llvm || !need.llvm) && !is_met(need))
        .map(|need| need.releases.get(&release).unwrap_or(&need.package).clone())
        .collect()
}

fn is_met(need: &Need) -> bool {
    need.commands.iter().any(|c| which(c).is_some())
        || need.files.iter().any(|pattern| !matches(pattern).is_empty())
}

/// Files that fit a pattern in which `*` and `[...]` match within one path component.
pub(super) fn matches(pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/")];
    for part in pattern.split('/').filter(|p| !p.is_empty()) {
        let Some(regex) = component(part) else {
            found = found.into_iter().map(|dir| dir.join(part)).filter(|p| p.exists()).collect();
            continue;
        };
        found = found.iter().flat_map(|dir| children(dir)).filter(|p| fits(p, &regex)).collect();
    }
    found.sort();
    found
}

fn component(part: &str) -> Option<regex::Regex> {
    if !part.contains(['*', '[']) {
        return None;
    }
    let escaped: String = part
        .chars()
        .map(|c| match c {
            '*' => ".*".to_owned(),
            '[' | ']' | '-' => c.to_string(),
            other => regex::escape(&other.to_string()),
        })
        .collect();
    regex::Regex::new(&format!("^{escaped}$")).ok()
}

fn children(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

fn fits(path: &Path, regex: &regex::Regex) -> bool {
    path.file_name().and_then(|n| n.to_str()).is_some_and(|name| regex.is_match(name))
}

/// Installs what the host lacks when this process may, else says with which one command to do it.
pub(super) fn require(
    needs: &HostPackages,
    llvm: bool,
    cache: &Cache,
    progress: &Progress,
) -> Result<(), BuildError> {
    let distribution = Distribution::of_host();
    let packages = missing(needs, &distribution, llvm);
    if packages.is_empty() {
        return Ok(());
    }
    let what = packages.join(" ");
    if !distribution.is_debian_like || which("apt-get").is_none() {
        return Err(BuildError::HostPackages {
            what: what.clone(),
            command: format!("your distribution's packages for what Debian calls: {what}"),
        });
    }
    if !rustix::process::geteuid().is_root() {
        return Err(BuildError::HostPackages {
            what: what.clone(),
            command: format!("sudo apt-get install --no-install-recommends {what}"),
        });
    }
    let _lock = cache.lock("host-packages", progress)?;
    let log = cache.fresh_log("host-packages")?;
    let step = progress.step(format!("installing {what}"), Unit::None);
    let job = Job { what: "installing distribution packages", log: &log, progress };
    for arguments in [&["update"][..], &["install", "--yes", "--no-install-recommends"]] {
        let mut command = guarded("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(arguments);
        if arguments.len() > 1 {
            command.args(&packages);
        }
        job.run(command, |_| (), || step.tick())?;
    }
    step.done();
    let still = missing(needs, &distribution, llvm);
    if still.is_empty() {
        return Ok(());
    }
    Err(BuildError::Tool {
        tool: still.join(" "),
        reason: format!("installed, and yet not found; log: {}", log.display()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions() {
        let debian = Distribution::parse("NAME=\"Debian\"\nVERSION_ID=\"12\"\nID=debian\n");
        assert_eq!(debian, Distribution { id: "debian".into(), version: "12".into(), is_debian_like: true });
        assert!(Distribution::parse("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n").is_debian_like);
        assert!(!Distribution::parse("ID=fedora\nVERSION_ID=42\n").is_debian_like);
    }

    #[test]
    fn release_overrides_a_name() {
        let needs: HostPackages = toml::from_str(
            "[[need]]\nfiles = ['/no/such/[0-9]*']\npackage = 'libclang-dev'\ndebian-12 = 'libclang-19-dev'\n\
             [[need]]\ncommands = ['sh']\npackage = 'dash'\n",
        )
        .expect("toml");
        let on = |version: &str| {
            missing(
                &needs,
                &Distribution { id: "debian".into(), version: version.into(), is_debian_like: true },
                false,
            )
        };
        assert_eq!(on("12"), ["libclang-19-dev"]);
        assert_eq!(on("13"), ["libclang-dev"]);
    }

    #[test]
    fn what_only_llvm_needs_is_asked_for_with_it() {
        let needs: HostPackages =
            toml::from_str("[[need]]\ncommands = ['no-such-clang']\npackage = 'clang'\nllvm = true\n")
                .expect("toml");
        assert_eq!(missing(&needs, &Distribution::default(), true), ["clang"]);
        assert!(missing(&needs, &Distribution::default(), false).is_empty());
    }

    #[test]
    fn patterns_match_within_a_component() {
        let dir = tempfile::tempdir().expect("temporary folder");
        for name in ["llvm-14", "llvm-19", "llvm-20"] {
            fs::create_dir_all(dir.path().join(name).join("lib")).expect("folder");
            fs::write(dir.path().join(name).join("lib/libclang.so.1"), "").expect("file");
        }
        let root = dir.path().display();
        let found = matches(&format!("{root}/llvm-1[5-9]/lib/libclang*.so*"));
        assert_eq!(found, [dir.path().join("llvm-19/lib/libclang.so.1")]);
        assert_eq!(matches(&format!("{root}/llvm-*/lib/libclang.so")).len(), 0);
    }
}

//! `hmmstorm doctor`: what this host has and lacks, and the command that mends it. Fetches and installs nothing.

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::Serialize;

use crate::build::host::{self, Distribution};
use crate::build::{BuildError, Cache, Pins, toolchain};
use crate::cli::{Context, Error, Outcome};
use crate::vm::accel;

/// MiB of memory below which a guest and a compiler get in each other's way.
const MEMORY_MIB: u64 = 4096;
/// MiB on disk for all that is fetched and built for one kernel.
const DISK_MIB: u64 = 8192;

/// Options of `hmmstorm doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Prove KVM again, whatever was found earlier
    #[arg(long)]
    fresh: bool,
    /// Print JSON: an array of findings
    #[arg(long)]
    json: bool,
}

/// How serious a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// As it should be.
    Good,
    /// Works, and could be better; or comes by itself when it is needed.
    Note,
    /// Something will not work.
    Bad,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    found: String,
    /// A command, or what to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, state: State::Good, found: found.into(), remedy: None }
    }

    fn note(what: &'static str, found: impl Into<String>, remedy: Option<String>) -> Self {
        Self { what, state: State::Note, found: found.into(), remedy }
    }

    fn bad(what: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, state: State::Bad, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let pins = Pins::load(&ctx.repo).map_err(BuildError::into_cli)?;
    let cache = Cache::open(&ctx.cache).map_err(BuildError::into_cli)?;
    let distribution = Distribution::of_host();
    let findings = [
        cores(),
        memory(),
        disk(&ctx.cache)?,
        packages(&pins, &distribution),
        rust(&ctx.repo),
        qemu(&pins, &cache),
        kvm(&ctx.cache, args.fresh)?,
        gdb(&distribution),
        browser(&distribution),
    ];
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print!("{}", table(&findings));
    }
    let bad = findings.iter().filter(|f| f.state == State::Bad).count();
    Ok(if bad == 0 { Outcome::Pass } else { Outcome::Problem })
}

fn table(findings: &[Finding]) -> String {
    let width = findings.iter().map(|f| f.what.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let mark = match finding.state {
            State::Good => "ok  ",
            State::Note => "note",
            State::Bad => "BAD ",
        };
        text += &format!("{mark}  {:width$}  {}\n", finding.what, finding.found);
        for line in finding.remedy.iter().flat_map(|r| r.lines()) {
            text += &format!("      {:width$}  -> {line}\n", "");
        }
    }
    text
}

fn cores() -> Finding {
    let n = std::thread::available_parallelism().map_or(1, usize::from);
    let found = format!("{n} for this process");
    if n >= 2 {
        Finding::good("CPUs", found)
    } else {
        Finding::note("CPUs", found, Some("guests work, and real-time runs are slow: --deterministic".into()))
    }
}

fn memory() -> Finding {
    let sysinfo = rustix::system::sysinfo();
    let mib = (u128::from(sysinfo.totalram) * u128::from(sysinfo.mem_unit)) >> 20;
    let found = format!("{:.1} GiB", mib as f64 / 1024.0);
    if mib >= u128::from(MEMORY_MIB) {
        Finding::good("memory", found)
    } else {
        Finding::note(
            "memory",
            found,
            Some(format!("below {MEMORY_MIB} MiB, give guests less: --memory 512M")),
        )
    }
}

fn disk(cache: &Path) -> Result<Finding, Error> {
    let stat = rustix::fs::statvfs(cache).map_err(io::Error::from)?;
    let mib = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    let found = format!("{} ({:.1} GiB free)", cache.display(), mib as f64 / 1024.0);
    Ok(if mib >= DISK_MIB {
        Finding::good("cache", found)
    } else {
        let remedy =
            format!("a kernel takes up to {} GiB: free some, or set HMMSTORM_CACHE", DISK_MIB / 1024);
        Finding::note("cache", found, Some(remedy))
    })
}

fn packages(pins: &Pins, distribution: &Distribution) -> Finding {
    let missing = host::missing(&pins.host, distribution, false).join(" ");
    let what = "packages";
    if missing.is_empty() {
        return Finding::good(what, "all that a kernel build takes");
    }
    Finding::bad(what, format!("missing: {missing}"), install(distribution, &missing))
}

/// The command that installs packages here.
fn install(distribution: &Distribution, packages: &str) -> String {
    if distribution.is_debian_like {
        let sudo = if rustix::process::geteuid().is_root() { "" } else { "sudo " };
        format!("{sudo}apt-get install --no-install-recommends {packages}")
    } else {
        format!("install your distribution's packages for what Debian calls: {packages}")
    }
}

fn rust(repo: &Path) -> Finding {
    let what = "Rust";
    match Command::new("rustc").arg("--version").current_dir(repo).output() {
        Ok(output) if output.status.success() => {
            Finding::good(what, String::from_utf8_lossy(&output.stdout).trim())
        }
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Finding::bad(what, format!("rustc does not work: {said}"), "rustup toolchain install stable")
        }
        Err(_) => Finding::bad(what, "no rustc on PATH", "install Rust with rustup: https://rustup.rs"),
    }
}

fn qemu(pins: &Pins, cache: &Cache) -> Finding {
    match toolchain::qemu_at_hand(pins, cache) {
        Some(qemu) => Finding::good("QEMU", format!("{}, {}", qemu.version, qemu.program.display())),
        None => {
            let found = format!("none with {} here; it is fetched when needed", pins.toolchain.qemu.device);
            Finding::note("QEMU", found, Some("hmmstorm setup".into()))
        }
    }
}

fn kvm(cache: &Path, fresh: bool) -> Result<Finding, Error> {
    let what = "KVM";
    let memory = accel::Memory::new(cache);
    let answer = if fresh {
        let (works, reason) = accel::prove();
        memory.remember(works, &reason)?
    } else {
        memory.answer()?
    };
    if answer.works {
        return Ok(Finding::good(what, answer.reason));
    }
    let found = format!("{}; TCG is used", answer.reason);
    let device = Path::new("/dev/kvm");
    let denied =
        rustix::fs::access(device, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_err();
    let remedy = match (device.exists(), denied) {
        (false, _) => "for speed: enable virtualisation in the firmware, or nesting in the hypervisor",
        (true, true) => "sudo usermod -aG kvm \"$USER\", log in anew, and: hmmstorm doctor --fresh",
        (true, false) => "nothing to mend from here: this host's KVM cannot run a 64-bit kernel",
    };
    Ok(Finding::note(what, found, Some(remedy.into())))
}

fn gdb(distribution: &Distribution) -> Finding {
    let what = "gdb";
    let script = "python import sys; print('python ' + sys.version.split()[0])";
    let output = Command::new("gdb").args(["-batch", "-nx", "-ex", script]).stdin(Stdio::null()).output();
    match output {
        Ok(output) if String::from_utf8_lossy(&output.stdout).contains("python 3") => {
            let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            Finding::good(what, format!("with {said}"))
        }
        Ok(_) => Finding::note(
            what,
            "without Python, which `hmmstorm gdb` needs",
            Some(install(distribution, "gdb")),
        ),
        Err(_) => Finding::note(what, "none, which `hmmstorm gdb` needs", Some(install(distribution, "gdb"))),
    }
}

/// Names that Chromium goes by; the first is Debian's.
const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

fn browser(distribution: &Distribution) -> Finding {
    let what = "browser";
    match BROWSERS.into_iter().find(|name| host::which(name).is_some()) {
        Some(name) => Finding::good(what, format!("{name}, for the test of the report's page")),
        None => Finding::note(
            what,
            "no Chromium: the report's page is not tested in a browser",
            Some(install(distribution, "chromium")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_stand_below_what_they_mend() {
        let findings = [Finding::good("a", "x"), Finding::bad("long", "y", "do\nthis")];
        assert_eq!(
            table(&findings),
            "ok    a     x\nBAD   long  y\n            -> do\n            -> this\n"
        );
    }
}

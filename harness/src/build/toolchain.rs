//! The programs that run and build a guest: QEMU, rustc with its library's source, bindgen with libclang, the C
//! compiler. The host's own are used where they are fit.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::bundle::{place, unpacked};
use super::error::IoContext;
use super::pins::{BindgenPin, Pins};
use super::process::{Job, capture, guarded, which};
use super::progress::Unit;
use super::{BuildError, Cache, Progress, host};

/// Use this QEMU and no other: path of a `qemu-system-x86_64`.
pub const QEMU_VARIABLE: &str = "HMMSTORM_QEMU";
/// The emulator's name on `PATH`.
const QEMU: &str = "qemu-system-x86_64";
/// Where Debian keeps libraries of the host's architecture.
const LIB: &str = "usr/lib/x86_64-linux-gnu";

/// How to start QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qemu {
    /// The program to execute.
    pub program: PathBuf,
    /// Arguments that must come before all others.
    pub leading_args: Vec<OsString>,
    /// As it says itself: `11.1.3`.
    pub version: String,
}

impl Qemu {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.leading_args);
        command
    }

    /// A QEMU that can be started like this, with its version asked for; must have `device`.
    fn examined(program: PathBuf, leading_args: Vec<OsString>, device: &str) -> Result<Self, BuildError> {
        let mut qemu = Self { program, leading_args, version: String::new() };
        let said = capture(qemu.command().arg("--version"))?;
        qemu.version = version_in(&said).unwrap_or_default();
        let devices = capture(qemu.command().args(["-device", "help"]))?;
        if devices.contains(&format!("\"{device}\"")) {
            return Ok(qemu);
        }
        let reason = format!("version {} has no device {device}", qemu.version);
        Err(BuildError::Tool { tool: qemu.program.display().to_string(), reason })
    }
}

/// A QEMU that is on this host already, if there is one that will do; fetches nothing.
pub fn qemu_at_hand(pins: &Pins, cache: &Cache) -> Option<Qemu> {
    host_qemu(pins).or_else(|| {
        let dir = place(pins, cache, "qemu", &qemu_request(pins));
        bundled_qemu(&dir, pins).ok()
    })
}

/// A QEMU with the device that the GPU needs: `$HMMSTORM_QEMU`, the host's, or one from the cache, fetched if need be.
pub fn qemu(pins: &Pins, cache: &Cache, progress: &Progress) -> Result<Qemu, BuildError> {
    let pin = &pins.toolchain.qemu;
    if let Some(program) = std::env::var_os(QEMU_VARIABLE) {
        return Qemu::examined(program.into(), Vec::new(), &pin.device);
    }
    if let Some(qemu) = host_qemu(pins) {
        return Ok(qemu);
    }
    let dir = unpacked(pins, cache, progress, "qemu", &qemu_request(pins), |archive| {
        archive.closure(&pin.packages)
    })?;
    let qemu = bundled_qemu(&dir, pins)?;
    if at_least(&qemu.version, &pin.minimum) {
        return Ok(qemu);
    }
    Err(BuildError::Tool {
        tool: QEMU.into(),
        reason: format!("the package archive gave {}, but {} or newer is needed", qemu.version, pin.minimum),
    })
}

fn host_qemu(pins: &Pins) -> Option<Qemu> {
    let pin = &pins.toolchain.qemu;
    let qemu = Qemu::examined(which(QEMU)?, Vec::new(), &pin.device).ok()?;
    at_least(&qemu.version, &pin.minimum).then_some(qemu)
}

fn qemu_request(pins: &Pins) -> String {
    let pin = &pins.toolchain.qemu;
    format!("{} {}", pin.packages.join(" "), pin.minimum)
}

/// QEMU with every library it needs, the C library's loader among them: independent of the host's.
fn bundled_qemu(dir: &Path, pins: &Pins) -> Result<Qemu, BuildError> {
    let lib = dir.join(LIB);
    let leading_args = vec![
        "--library-path".into(),
        lib.clone().into_os_string(),
        dir.join("usr/bin").join(QEMU).into_os_string(),
        "-L".into(),
        dir.join("usr/share/qemu").into_os_string(),
        "-L".into(),
        dir.join("usr/share/seabios").into_os_string(),
    ];
    Qemu::examined(lib.join("ld-linux-x86-64.so.2"), leading_args, &pins.toolchain.qemu.device)
}

/// The guest's shell: a static busybox.
pub fn busybox(pins: &Pins, cache: &Cache, progress: &Progress) -> Result<PathBuf, BuildError> {
    let pin = &pins.toolchain.busybox;
    let request = pin.packages.join(" ");
    let dir = unpacked(pins, cache, progress, "busybox", &request, |archive| archive.closure(&pin.packages))?;
    Ok(dir.join(&pin.path))
}

/// What builds a kernel with Rust in it.
#[derive(Clone, Debug)]
pub struct KernelTools {
    /// Folder with `rustc` and its companions; to be first on `PATH`.
    pub rust_bin: PathBuf,
    /// `rustc --version`.
    pub rustc: String,
    /// Source of the Rust library, of the same version.
    pub rust_lib_src: PathBuf,
    /// The bindings generator.
    pub bindgen_program: PathBuf,
    /// `bindgen --version`.
    pub bindgen: String,
    /// Folder with libclang.
    pub libclang_dir: PathBuf,
    /// Its version, as it says itself.
    pub libclang: String,
    /// First line of `gcc --version`.
    pub cc: String,
    /// First line of `ld --version`.
    pub ld: String,
    /// What builds in their place, if the flavour wants it.
    pub llvm: Option<Llvm>,
}

/// A clang with all that belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Llvm {
    /// Folder with `clang`, `ld.lld`, `llvm-ar`, … without a version in their names.
    pub bin: PathBuf,
    /// First line of `clang --version`.
    pub clang: String,
}

impl KernelTools {
    /// Finds the tools, those of LLVM too if `llvm`; installs or fetches what is missing.
    pub fn find(pins: &Pins, llvm: bool, cache: &Cache, progress: &Progress) -> Result<Self, BuildError> {
        host::require(&pins.host, llvm, cache, progress)?;
        let sysroot = PathBuf::from(rustc(&pins.repo, &["--print", "sysroot"])?);
        let verbose = rustc(&pins.repo, &["-vV"])?;
        let release =
            verbose.lines().find_map(|l| l.strip_prefix("release: ")).unwrap_or_default().to_owned();
        let rust_lib_src = rust_src(pins, cache, progress, &sysroot, &release)?;
        let bindgen_program = bindgen(pins, cache, progress)?;
        let (libclang_dir, libclang) = libclang(cache, &bindgen_program)?;
        Ok(Self {
            rust_bin: sysroot.join("bin"),
            rustc: verbose.lines().next().unwrap_or_default().to_owned(),
            rust_lib_src,
            bindgen: capture(Command::new(&bindgen_program).arg("--version"))?,
            bindgen_program,
            libclang_dir,
            libclang,
            cc: first_line("gcc")?,
            ld: first_line("ld")?,
            llvm: llvm.then(newest_llvm).transpose()?,
        })
    }

    /// The compiler that builds the kernel's C code, as it says itself.
    pub fn kernel_cc(&self) -> &str {
        self.llvm.as_ref().map_or(&self.cc, |llvm| &llvm.clang)
    }

    /// All versions, as part of a key.
    pub(super) fn id(&self) -> String {
        let gnu = [&self.rustc, &self.bindgen, &self.libclang, &self.cc, &self.ld].map(String::as_str);
        let llvm = self.llvm.iter().map(|llvm| llvm.clang.as_str());
        gnu.into_iter().chain(llvm).collect::<Vec<_>>().join("\n")
    }
}

/// Asks the `rustc` that this source tree is built with.
fn rustc(repo: &Path, arguments: &[&str]) -> Result<String, BuildError> {
    if which("rustc").is_none() {
        let reason = "is not on PATH; install Rust with rustup (the README says how), then open a new shell";
        return Err(BuildError::Tool { tool: "rustc".into(), reason: reason.into() });
    }
    capture(Command::new("rustc").current_dir(repo).args(arguments))
}

/// Source of the Rust library: rustup's component if it is there, else Debian's package of exactly this version.
fn rust_src(
    pins: &Pins,
    cache: &Cache,
    progress: &Progress,
    sysroot: &Path,
    release: &str,
) -> Result<PathBuf, BuildError> {
    let component = sysroot.join("lib/rustlib/src/rust/library");
    if component.join("core/src/lib.rs").is_file() {
        return Ok(component);
    }
    let pin = &pins.toolchain.rust_src;
    let request = format!("{} {release}", pin.package);
    let dir = unpacked(pins, cache, progress, "rust-src", &request, |archive| {
        Ok(vec![archive.exact(&pin.package, release)?])
    })
    .map_err(|e| match e {
        BuildError::NoArchive(why) => BuildError::NoArchive(format!(
            "{why}\n(the source of Rust's library {release} is needed; `rustup component add rust-src` gives it too)"
        )),
        other => other,
    })?;
    let library = dir.join(pin.path.replace("{version}", release));
    if library.join("core/src/lib.rs").is_file() {
        return Ok(library);
    }
    let reason = format!("the package is there, but {} is not in it", library.display());
    Err(BuildError::Tool { tool: pin.package.clone(), reason })
}

/// The bindings generator: the host's if its version will do, else one in the cache.
fn bindgen(pins: &Pins, cache: &Cache, progress: &Progress) -> Result<PathBuf, BuildError> {
    let pin = &pins.toolchain.bindgen;
    if let Some(program) = which("bindgen").filter(|p| is_fit(p, pin)) {
        return Ok(program);
    }
    let dest = cache.path("tools").join(format!("bindgen-{}", pin.version));
    let program = dest.join("bin/bindgen");
    if program.is_file() {
        return Ok(program);
    }
    let _lock = cache.lock("bindgen", progress)?;
    let log = cache.fresh_log("bindgen")?;
    cache.publish(&dest, |dir| {
        let scratch = cache.scratch()?;
        let what = format!("building bindgen {}", pin.version);
        let step = progress.step(&what, Unit::Steps);
        let mut command = guarded("cargo");
        command
            .current_dir(&pins.repo)
            .args(["install", "--locked", &pin.crate_name, "--version", &pin.version])
            // It runs for seconds in a build of minutes: not worth optimising for minutes.
            .args([
                "--no-default-features",
                "--features",
                "runtime",
                "--config",
                "profile.release.opt-level=1",
            ])
            .args([
                "--config",
                "profile.release.lto=false",
                "--config",
                "profile.release.codegen-units=16",
                "--root",
            ])
            .arg(dir)
            .arg("--target-dir")
            .arg(scratch.path());
        for variable in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET", "MAKEFLAGS", "MFLAGS"]
        {
            command.env_remove(variable);
        }
        let mut crates = 0;
        Job { what: &what, log: &log, progress }.run(
            command,
            |line| {
                if line.trim_start().starts_with("Compiling ") {
                    crates += 1;
                    step.at(crates, None);
                }
            },
            || step.tick(),
        )?;
        step.done();
        Ok(())
    })?;
    Ok(program)
}

fn is_fit(program: &Path, pin: &BindgenPin) -> bool {
    capture(Command::new(program).arg("--version"))
        .ok()
        .and_then(|said| version_in(&said))
        .is_some_and(|version| at_least(&version, &pin.minimum) && !at_least(&version, &pin.below))
}

/// Folder and version of the libclang that bindgen shall load: `$LIBCLANG_PATH`, else the newest one.
fn libclang(cache: &Cache, bindgen: &Path) -> Result<(PathBuf, String), BuildError> {
    let dir = match std::env::var_os("LIBCLANG_PATH") {
        Some(dir) => PathBuf::from(dir),
        None => newest_libclang().ok_or_else(|| BuildError::Tool {
            tool: "libclang".into(),
            reason: "not found below /usr/lib/llvm-*; set LIBCLANG_PATH to the folder it is in".into(),
        })?,
    };
    // Only libclang itself can tell, so bindgen is given a header that prints it, as the kernel's own check does.
    let scratch = cache.scratch()?;
    let header = scratch.path().join("version.h");
    fs::write(&header, "#pragma message(\"clang version \" __clang_version__)\n").on("write", &header)?;
    let output = Command::new(bindgen)
        .arg(&header)
        .env("LIBCLANG_PATH", &dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .on("start", bindgen)?;
    let said = String::from_utf8_lossy(&output.stderr);
    let version = said.split("clang version ").nth(1).and_then(|rest| rest.split(" [").next());
    match version {
        Some(version) => Ok((dir, version.trim().to_owned())),
        None => Err(BuildError::Tool {
            tool: "bindgen".into(),
            reason: format!("cannot load libclang from {}: {}", dir.display(), said.trim()),
        }),
    }
}

fn newest_libclang() -> Option<PathBuf> {
    newest(&["/usr/lib/llvm-*/lib/libclang.so*", "/usr/lib/llvm-*/lib/libclang-[0-9]*.so*"])
}

/// The newest clang of the distribution that has its linker beside it.
fn newest_llvm() -> Result<Llvm, BuildError> {
    let bin = newest(&["/usr/lib/llvm-*/bin/ld.lld"]).filter(|bin| bin.join("clang").is_file());
    let bin = bin.ok_or_else(|| BuildError::Tool {
        tool: "clang".into(),
        reason: "no folder /usr/lib/llvm-*/bin has both clang and ld.lld".into(),
    })?;
    let clang = first_line(bin.join("clang"))?;
    Ok(Llvm { bin, clang })
}

/// The folder of the newest LLVM with a file that fits one of the patterns.
fn newest(patterns: &[&str]) -> Option<PathBuf> {
    let number = |dir: &Path| -> Option<u32> {
        dir.parent()?.file_name()?.to_str()?.strip_prefix("llvm-")?.parse().ok()
    };
    patterns
        .iter()
        .flat_map(|pattern| host::matches(pattern))
        .filter_map(|file| file.parent().map(Path::to_path_buf))
        .max_by_key(|dir| number(dir))
}

fn first_line(tool: impl AsRef<OsStr>) -> Result<String, BuildError> {
    let said = capture(Command::new(tool).arg("--version").env("LC_ALL", "C"))?;
    Ok(said.lines().next().unwrap_or_default().to_owned())
}

/// The first thing in a text that looks like a version: digits and dots.
fn version_in(text: &str) -> Option<String> {
    text.split_whitespace()
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .map(|word| word.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect())
}

/// Whether `version` is `minimum` or newer, number by number.
fn at_least(version: &str, minimum: &str) -> bool {
    let numbers = |v: &str| v.split('.').map(|n| n.parse().unwrap_or(0)).collect::<Vec<u32>>();
    numbers(version) >= numbers(minimum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(
            version_in("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds)").as_deref(),
            Some("11.1.3")
        );
        assert_eq!(version_in("bindgen 0.72.1").as_deref(), Some("0.72.1"));
        assert!(at_least("10.1", "10.1") && at_least("11.0.2", "10.1") && at_least("10.1.0", "10.1"));
        assert!(!at_least("10.0.13", "10.1") && !at_least("0.9", "0.71.1"));
    }

    #[test]
    fn host_qemu_without_the_device_is_not_taken() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let script = dir.path().join("qemu");
        let text = "[ \"$1\" = --version ] && echo 'QEMU emulator version 10.2.0' || echo 'name \"x\"'\n";
        fs::write(&script, text).expect("write");
        let qemu = |device: &str| Qemu::examined("sh".into(), vec![script.clone().into()], device);
        assert!(qemu("vfio-user-pci").is_err());
        assert_eq!(qemu("x").expect("it has x").version, "10.2.0");
    }
}

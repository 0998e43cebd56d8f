//! What `images/` says: kernels, flavours, variants, toolchain, host packages, the initramfs.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::BuildError;
use super::error::IoContext;
use crate::cli::Preempt;

/// All data files of `images/`.
#[derive(Clone, Debug)]
pub struct Pins {
    /// The source tree that they were read from.
    pub repo: PathBuf,
    /// `kernels.toml`.
    pub kernels: Kernels,
    /// `flavours.toml`.
    pub flavours: Flavours,
    /// `variants/variants.toml`.
    pub variants: Variants,
    /// `toolchain.toml`.
    pub toolchain: Toolchain,
    /// `host-packages.toml`.
    pub host: HostPackages,
    /// `initramfs.toml`.
    pub initramfs: Initramfs,
    /// `selftests.toml`.
    pub selftests: Selftests,
}

impl Pins {
    /// Reads the data files of the source tree at `repo`.
    pub fn load(repo: &Path) -> Result<Self, BuildError> {
        let images = repo.join("images");
        Ok(Self {
            repo: repo.to_owned(),
            kernels: read(&images.join("kernels.toml"))?,
            flavours: read(&images.join("flavours.toml"))?,
            variants: read(&images.join("variants/variants.toml"))?,
            toolchain: read(&images.join("toolchain.toml"))?,
            host: read(&images.join("host-packages.toml"))?,
            initramfs: read(&images.join("initramfs.toml"))?,
            selftests: read(&images.join("selftests.toml"))?,
        })
    }

    /// The kernel of this name, or the default one.
    pub fn kernel(&self, name: Option<&str>) -> Result<&Kernel, BuildError> {
        find("kernel", name.unwrap_or(&self.kernels.default), &self.kernels.kernel, |k| &k.name)
    }

    /// The kernel of the list whose patches a source of this version takes: of the same series, else the newest one that
    /// is older, else the oldest.
    pub fn kernel_for(&self, version: &str) -> Result<&Kernel, BuildError> {
        let wanted = series(version);
        let mut kernels: Vec<&Kernel> = self.kernels.kernel.iter().collect();
        kernels.sort_by_key(|kernel| kernel.series());
        let fitting = kernels.iter().rfind(|kernel| kernel.series() <= wanted && wanted.is_some());
        fitting.or(kernels.first()).copied().map_or_else(|| self.kernel(None), Ok)
    }

    /// The flavour of this name, or the default one.
    pub fn flavour(&self, name: Option<&str>) -> Result<&Flavour, BuildError> {
        find("flavour", name.unwrap_or(&self.flavours.default), &self.flavours.flavour, |f| &f.name)
    }

    /// The variant of this name, or the default one.
    pub fn variant(&self, name: Option<&str>) -> Result<&Variant, BuildError> {
        find("variant", name.unwrap_or(&self.variants.default), &self.variants.variant, |v| &v.name)
    }
}

fn read<T: DeserializeOwned>(file: &Path) -> Result<T, BuildError> {
    let text = fs::read_to_string(file).on("read", file)?;
    toml::from_str(&text).map_err(|e| BuildError::Data { file: file.to_owned(), reason: e.to_string() })
}

fn find<'a, T>(
    kind: &'static str,
    name: &str,
    list: &'a [T],
    name_of: impl Fn(&T) -> &String,
) -> Result<&'a T, BuildError> {
    list.iter().find(|item| name_of(item) == name).ok_or_else(|| BuildError::Unknown {
        kind,
        name: name.to_owned(),
        known: list.iter().map(|i| name_of(i).as_str()).collect::<Vec<_>>().join(", "),
    })
}

/// Kernels that can be fetched.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernels {
    /// The one to take when none is named.
    pub default: String,
    /// All of them.
    pub kernel: Vec<Kernel>,
}

/// A kernel that can be fetched.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// What `--kernel` takes.
    pub name: String,
    /// One line about it.
    pub summary: String,
    /// Debian source package.
    pub package: String,
    /// Its version.
    pub version: String,
    /// File name of its upstream tarball.
    pub file: String,
    /// The tarball's checksum, hex.
    pub sha256: String,
    /// Folders with the driver's abstractions for this kernel, relative to the source tree; later ones win.
    pub patches: Vec<PathBuf>,
    /// Files of those folders that this kernel does not need.
    #[serde(default)]
    pub without: Vec<String>,
    /// Preemption models that it can be booted with; the first one is its own default.
    pub preempt: Vec<Preempt>,
    /// The variant that its source is without any patch.
    pub variant: String,
    /// Lines that a full build prints, about.
    pub steps: u64,
    /// Room that source and objects take, MiB, about.
    pub disk_mib: u64,
}

/// Kinds of build.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flavours {
    /// The one to take when none is named.
    pub default: String,
    /// All of them.
    pub flavour: Vec<Flavour>,
}

/// A kind of build.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flavour {
    /// What `--flavour` takes.
    pub name: String,
    /// One line about it.
    pub summary: String,
    /// Configuration fragments, relative to `images/`, later ones on top.
    pub config: Vec<PathBuf>,
    /// Built with clang and LLVM's linker in place of gcc and binutils (kbuild's `LLVM=`).
    #[serde(default)]
    pub llvm: bool,
}

/// Fix candidates.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variants {
    /// The one to take when none is named.
    pub default: String,
    /// All of them.
    pub variant: Vec<Variant>,
}

/// A fix candidate.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Variant {
    /// What `--variant` takes.
    pub name: String,
    /// One line about it.
    pub summary: String,
    /// Patches, relative to `images/variants/`, in the order of application.
    pub patches: Vec<PathBuf>,
    /// The same for kernels that need others, by name.
    #[serde(default)]
    pub patches_for: BTreeMap<String, Vec<PathBuf>>,
    /// Kernels that it makes sense for; all of them if none is named.
    #[serde(default)]
    pub kernels: Vec<String>,
}

impl Variant {
    /// Its patches for a kernel; none if it makes no sense there.
    pub fn patches(&self, kernel: &str) -> Option<&[PathBuf]> {
        let fits = self.kernels.is_empty() || self.kernels.iter().any(|name| name == kernel);
        fits.then(|| self.patches_for.get(kernel).unwrap_or(&self.patches).as_slice())
    }
}

impl Kernel {
    /// Version of the series, as (6, 19); it is what decides whether patches apply.
    pub fn series(&self) -> Option<(u32, u32)> {
        series(&self.name)
    }
}

/// The series of a kernel version: (6, 19) of `6.19.6-rc1`.
pub fn series(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// What building and running takes beside the distribution's own packages.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Toolchain {
    /// Which package archive, and whose keys.
    pub archive: ArchivePin,
    /// The machine emulator.
    pub qemu: QemuPin,
    /// The guest's shell.
    pub busybox: BusyboxPin,
    /// The Rust library's source.
    pub rust_src: RustSrcPin,
    /// The bindings generator.
    pub bindgen: BindgenPin,
    /// The reader of a guest's data structures.
    pub drgn: DrgnPin,
}

/// Which package archive, and whose keys.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ArchivePin {
    /// Releases to read; packages are taken from the last one that has them.
    pub suites: Vec<String>,
    /// Releases to take source packages from.
    pub source_suites: Vec<String>,
    /// Components of them.
    pub components: Vec<String>,
    /// Architecture of the packages.
    pub architecture: String,
    /// Where the signing keys may be.
    pub keyrings: Vec<PathBuf>,
}

/// The machine emulator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QemuPin {
    /// Least version of a host QEMU.
    pub minimum: String,
    /// Device that it must have.
    pub device: String,
    /// Packages of the bundle; their dependencies come along.
    pub packages: Vec<String>,
}

/// The guest's shell.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusyboxPin {
    /// Packages to unpack.
    pub packages: Vec<String>,
    /// The static binary in them.
    pub path: PathBuf,
}

/// The Rust library's source.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RustSrcPin {
    /// Package whose upstream version must be rustc's.
    pub package: String,
    /// The library in it; `{version}` stands for rustc's version.
    pub path: String,
}

/// The bindings generator.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindgenPin {
    /// Least version of a host bindgen.
    pub minimum: String,
    /// Least version that is too new.
    pub below: String,
    /// Crate to install otherwise.
    #[serde(rename = "crate")]
    pub crate_name: String,
    /// Its version.
    pub version: String,
}

/// Which drgn to fetch.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrgnPin {
    /// Its version.
    pub version: String,
    /// Checksums of its wheels, hex; one for each Python that it may meet.
    pub sha256: Vec<String>,
}

/// What a build needs of the host.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostPackages {
    /// Each need.
    pub need: Vec<Need>,
}

/// One thing that a build needs of the host: met by any of the commands or files.
#[derive(Clone, Debug, Deserialize)]
pub struct Need {
    /// Commands, looked for on `PATH`.
    #[serde(default)]
    pub commands: Vec<String>,
    /// File patterns with `*` and `[...]`.
    #[serde(default)]
    pub files: Vec<String>,
    /// Debian's and Ubuntu's name of the package that gives it.
    pub package: String,
    /// Needed by flavours that are built with LLVM alone.
    #[serde(default)]
    pub llvm: bool,
    /// The package's name in one release, by `ID-VERSION_ID` of os-release.
    #[serde(flatten)]
    pub releases: BTreeMap<String, String>,
}

/// Test programs of the kernel's own tree.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Selftests {
    /// All of them.
    pub program: Vec<Selftest>,
}

/// A test program of the kernel's own tree.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Selftest {
    /// Its name.
    pub name: String,
    /// Where the guest finds it, without a leading slash.
    pub path: String,
    /// C files, relative to the source tree.
    pub sources: Vec<PathBuf>,
    /// Folders of headers, relative to the source tree.
    pub include: Vec<PathBuf>,
    /// The same, after those that the kernel exports.
    pub system_include: Vec<PathBuf>,
    /// Libraries to link.
    pub libraries: Vec<String>,
}

/// What the guest's initramfs holds.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Initramfs {
    /// Folders.
    pub directories: Vec<String>,
    /// Device nodes.
    pub node: Vec<Node>,
    /// Symbolic links.
    pub link: Vec<Link>,
    /// Files.
    pub file: Vec<Member>,
}

/// A symbolic link.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Path without a leading slash.
    pub path: String,
    /// What it points to, as the guest sees it.
    pub target: String,
}

/// A character device.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Path without a leading slash.
    pub path: String,
    /// Permissions.
    pub mode: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// A file of the initramfs, or a folder of them.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Path without a leading slash.
    pub path: String,
    /// Which part of the build it is.
    pub from: Part,
    /// Permissions.
    pub mode: u32,
}

/// A part of the build that goes into the initramfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// PID 1 and the workloads.
    Storm,
    /// The shell.
    Busybox,
    /// Every kernel module, into a folder.
    Modules,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo() -> &'static Path {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the harness is in the source tree")
    }

    #[test]
    fn data_files_are_sound() {
        let pins = Pins::load(repo()).expect("data files");
        for kernel in &pins.kernels.kernel {
            assert_eq!(kernel.sha256.len(), 64, "{}", kernel.name);
            assert!(!kernel.preempt.is_empty() && kernel.series().is_some(), "{}", kernel.name);
            let stock = pins.variant(Some(&kernel.variant)).expect("its own variant");
            assert_eq!(stock.patches(&kernel.name).map(<[_]>::len), Some(0), "{}", kernel.name);
            let folders = kernel.patches.iter().map(|folder| repo().join(folder)).collect::<Vec<_>>();
            for name in &kernel.without {
                assert!(folders.iter().any(|folder| folder.join(name).is_file()), "{name}");
            }
        }
        for flavour in &pins.flavours.flavour {
            for fragment in &flavour.config {
                assert!(repo().join("images").join(fragment).is_file(), "{}", fragment.display());
            }
        }
        for variant in &pins.variants.variant {
            for patch in variant.patches.iter().chain(variant.patches_for.values().flatten()) {
                assert!(repo().join("images/variants").join(patch).is_file(), "{}", patch.display());
            }
        }
        assert!(pins.kernel(None).is_ok() && pins.flavour(None).is_ok() && pins.variant(None).is_ok());
    }

    #[test]
    fn a_tree_takes_the_patches_of_the_nearest_kernel() {
        let pins = Pins::load(repo()).expect("data files");
        let name = |version| pins.kernel_for(version).expect("a kernel").name.clone();
        for (version, expected) in [
            ("6.19.0", "6.19.6"),
            ("6.19.14-rc1", "6.19.6"),
            ("6.12.1", "6.19.6"),
            ("7.0.3", "6.19.6"),
            ("7.1.0", "7.1.13"),
            ("7.3.4", "7.1.13"),
        ] {
            assert_eq!(name(version), expected, "{version}");
        }
    }

    #[test]
    fn unknown_name_lists_what_there_is() {
        let pins = Pins::load(repo()).expect("data files");
        let error = pins.variant(Some("wait-on-lock")).expect_err("unknown");
        assert!(error.to_string().contains("trylock, ref-no-lock"), "{error}");
    }
}

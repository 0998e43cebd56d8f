//! Kernels: one live source and object tree per kernel, flavour and toolchain; what is built in it for a set of
//! patches is published under a key of everything that went into it.
//!
//! ```text
//! trees/NAME-FLAVOUR-KEY/   src/ base/ overlay.json out/ built.json    one at a time, under a lock
//! kernels/NAME-VARIANT-KEY/ vmlinux boot config modules/ scripts/gdb/ kernel.json
//! ```

use std::cell::OnceCell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::cache::{Lock, write_whole};
use super::error::IoContext;
use super::hash::Key;
use super::kbuild::{Kbuild, assignment};
use super::overlay::Overlay;
use super::patches::Patch;
use super::pins::{Flavour, Kernel, Pins};
use super::process::capture;
use super::source::{Source, walk};
use super::toolchain::KernelTools;
use super::{BuildError, Cache, Progress, hash, kconfig};

/// Most characters of a variant in a folder's name.
const SLUG: usize = 80;

/// Everything that decides what a kernel is.
#[derive(Clone, Debug)]
pub(super) struct Recipe {
    /// The pristine source.
    pub(super) source: Source,
    /// Its entry of `kernels.toml`, or the one whose abstractions a user's tree takes.
    pub(super) kernel: Kernel,
    /// Kind of build.
    pub(super) flavour: Flavour,
    /// Name of what is tried, for people.
    pub(super) variant: String,
    /// The driver's abstractions, then the variant's patches, then the user's own.
    pub(super) patches: Vec<Patch>,
    /// Configuration fragments, in order.
    pub(super) fragments: Vec<String>,
}

impl Recipe {
    /// The variant as part of a folder's name, which users' file names may not be fit for.
    pub(super) fn slug(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '_' };
        self.variant.chars().take(SLUG).map(plain).collect()
    }
}

/// A kernel that is built and published.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Built {
    /// Folder of the result.
    #[serde(skip)]
    pub(super) dir: PathBuf,
    /// `uname -r`.
    pub(super) release: String,
    /// Checksum of the pristine source.
    pub(super) source_sha256: String,
    /// Checksum of the final configuration.
    pub(super) config_sha256: String,
    /// Names of the modules, without `.ko`.
    pub(super) modules: Vec<String>,
}

impl Built {
    /// A module with its debug information.
    pub(super) fn module(&self, name: &str) -> PathBuf {
        self.dir.join("modules").join(format!("{name}.ko"))
    }

    fn load(dir: &Path) -> Result<Option<Self>, BuildError> {
        let file = dir.join("kernel.json");
        let text = match fs::read(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.on("read", &file)?,
        };
        let mut built: Self = serde_json::from_slice(&text)
            .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() })?;
        built.dir = dir.to_owned();
        Ok(Some(built))
    }
}

/// What the objects of a live tree were made from: `built.json`, there only while they are whole.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Objects {
    kernel: String,
    modules: String,
}

/// A live tree. Its lock is taken when something is to be built, and held from then on.
#[derive(Debug)]
pub(super) struct LiveTree<'a> {
    recipe: &'a Recipe,
    tools: &'a KernelTools,
    pins: &'a Pins,
    cache: &'a Cache,
    progress: &'a Progress,
    /// Name of folder and lock.
    name: String,
    dir: PathBuf,
    log: PathBuf,
    source_sha256: String,
    /// Checksum of the source without C files: of what modules are built against.
    interface_sha256: String,
    lock: OnceCell<Lock>,
}

impl<'a> LiveTree<'a> {
    /// The live tree of a recipe. What changed in a user's own source is taken over at once.
    pub(super) fn open(
        recipe: &'a Recipe,
        tools: &'a KernelTools,
        pins: &'a Pins,
        cache: &'a Cache,
        progress: &'a Progress,
    ) -> Result<Self, BuildError> {
        let name = format!("{}-{}", recipe.source.name(), recipe.flavour.name);
        let key = Key::new("tree-1")
            .with("source", recipe.source.identity())
            .with("flavour", &recipe.flavour.name)
            .with("tools", tools.id())
            .short();
        let mut tree = Self {
            recipe,
            tools,
            pins,
            cache,
            progress,
            dir: cache.path("trees").join(format!("{name}-{key}")),
            log: cache.log(&format!("kernel-{name}")),
            name: format!("{name}-{key}"),
            source_sha256: String::new(),
            interface_sha256: String::new(),
            lock: OnceCell::new(),
        };
        if let Source::Tree(_) = recipe.source {
            tree.lock()?;
            tree.bring_source()?; // its checksum is known only then
        }
        (tree.source_sha256, tree.interface_sha256) = recipe.source.sha256(&tree.dir)?;
        Ok(tree)
    }

    /// The recipe's kernel: published already, or built now.
    pub(super) fn kernel(&self) -> Result<Built, BuildError> {
        let dest = self.published();
        if let Some(built) = Built::load(&dest)? {
            return Ok(built);
        }
        self.lock()?;
        if let Some(built) = Built::load(&dest)? {
            return Ok(built); // built by the one that we waited for
        }
        self.cache.fresh_log(self.log.file_stem().and_then(|s| s.to_str()).unwrap_or("kernel"))?;
        self.make_objects()?;
        self.cache.publish(&dest, |dir| self.collect(dir))?;
        Built::load(&dest)?.ok_or_else(|| BuildError::Data {
            file: dest.join("kernel.json"),
            reason: "it was written just now and is gone".into(),
        })
    }

    /// Keeps others from the live tree until this is dropped.
    pub(super) fn lock(&self) -> Result<(), BuildError> {
        if self.lock.get().is_none() {
            fs::create_dir_all(&self.dir).on("create", &self.dir)?;
            let lock = self.cache.lock(&format!("tree-{}", self.name), self.progress)?;
            let _ = self.lock.set(lock);
        }
        Ok(())
    }

    /// Key of what modules are built against: the kernel without patches to its C code.
    pub(super) fn modules_key(&self) -> Key {
        let mut key = self.key("modules-1", &self.interface_sha256);
        for patch in self.recipe.patches.iter().filter(|p| p.concerns_modules()) {
            key = key.with("patch", &patch.sha256);
        }
        key
    }

    /// Key of what programs for user space are built from.
    pub(super) fn selftests_key(&self) -> Key {
        let mut key = Key::new("selftests-2").with("source", &self.source_sha256).with("cc", &self.tools.cc);
        for patch in self.recipe.patches.iter().filter(|p| p.concerns_selftests()) {
            key = key.with("patch", &patch.sha256);
        }
        key
    }

    /// The source with the recipe's patches, as it stays while this lives. The objects are made anew if they were those of
    /// other patches: source and objects of a live tree belong together.
    pub(super) fn source(&self) -> Result<PathBuf, BuildError> {
        self.lock()?;
        self.make_objects()?;
        Ok(self.src())
    }

    /// The folder with the headers that the kernel exports to user space; they are there while the lock is held, which the
    /// caller has taken. (`headers_install` would need rsync for no more than a copy.)
    pub(super) fn exported_headers(&self) -> Result<PathBuf, BuildError> {
        self.kbuild().make("exporting the kernel's headers", &["headers"], None, |_| ())?;
        Ok(self.out().join("usr/include"))
    }

    /// Builds the modules of `source` out of tree, with all their objects in `objects` and `setting` for make.
    pub(super) fn build_modules(
        &self,
        what: &str,
        source: &Path,
        objects: &Path,
        setting: &str,
    ) -> Result<(), BuildError> {
        self.lock()?;
        if self.objects()?.modules != self.modules_key().hex() {
            self.make_objects()?;
        }
        fs::create_dir_all(objects).on("create", objects)?;
        self.kbuild().make(what, &["modules"], None, |command| {
            command.arg(assignment("M", source)).arg(assignment("MO", objects)).arg(setting);
        })?;
        Ok(())
    }

    /// Folder for objects that belong to this tree.
    pub(super) fn objects_dir(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn published(&self) -> PathBuf {
        let key = self.kernel_key();
        let name = format!("{}-{}-{}", self.recipe.source.name(), self.recipe.slug(), key.short());
        self.cache.path("kernels").join(name)
    }

    fn kernel_key(&self) -> Key {
        let mut key = self.key("kernel-1", &self.source_sha256);
        for patch in &self.recipe.patches {
            key = key.with("patch", &patch.sha256);
        }
        key
    }

    fn key(&self, recipe: &str, source: &str) -> Key {
        let mut key = Key::new(recipe).with("source", source).with("tools", self.tools.id());
        for fragment in &self.recipe.fragments {
            key = key.with("config", fragment);
        }
        key
    }

    fn src(&self) -> PathBuf {
        self.dir.join("src")
    }

    fn out(&self) -> PathBuf {
        self.dir.join("out")
    }

    fn onto(&self) -> String {
        format!("kernel {}", self.recipe.source.name())
    }

    fn bring_source(&self) -> Result<(), BuildError> {
        let onto = self.onto();
        let overlay = Overlay::new(self.cache, &self.dir, &onto);
        self.recipe.source.bring(&self.dir, &overlay, self.pins, self.cache, self.progress)
    }

    fn objects(&self) -> Result<Objects, BuildError> {
        let file = self.dir.join("built.json");
        match fs::read(&file) {
            Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Objects::default()),
            Err(e) => Err(e).on("read", &file),
        }
    }

    fn kbuild(&self) -> Make<'_> {
        Make { tree: self, src: self.src(), out: self.out() }
    }

    /// Makes the live tree's objects those of the recipe.
    fn make_objects(&self) -> Result<(), BuildError> {
        let wanted = Objects { kernel: self.kernel_key().hex(), modules: self.modules_key().hex() };
        if self.objects()? == wanted {
            return Ok(());
        }
        if let Source::Pinned(_) = self.recipe.source {
            self.bring_source()?;
        }
        let stamp = self.dir.join("built.json");
        super::overlay::replace(None, &stamp)?;
        self.survive_power_cut()?;
        let is_first = !self.out().join("vmlinux").exists();
        let onto = self.onto();
        let changed = Overlay::new(self.cache, &self.dir, &onto).switch(&self.recipe.patches)?;
        for file in &changed {
            self.progress.detail(format_args!("changed: {}", file.display()));
        }
        self.configure()?;
        let expected = is_first.then_some(self.recipe.kernel.steps);
        let what = format!("building kernel {} ({})", self.recipe.source.name(), self.recipe.variant);
        self.kbuild().make(&what, &["vmlinux", "modules", "scripts_gdb"], expected, |_| ())?;
        // kbuild itself makes the configuration anew when Kconfig files have changed.
        self.check_configuration()?;
        let text = serde_json::to_vec(&wanted)
            .map_err(|e| BuildError::Data { file: stamp.clone(), reason: e.to_string() })?;
        write_whole(&stamp, text)?;
        super::overlay::replace(None, &self.dir.join("building")).map(|_| ())
    }

    /// Throws the objects away if a build was under way when the machine went down: `make` trusts whatever is newer
    /// than its source, and some of that may be cut short. A process that is killed leaves no such thing.
    fn survive_power_cut(&self) -> Result<(), BuildError> {
        let marker = self.dir.join("building");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        if fs::read_to_string(&marker).is_ok_and(|old| old != boot) && self.out().exists() {
            let out = self.out();
            fs::remove_dir_all(&out).on("remove", &out)?;
        }
        write_whole(&marker, boot)
    }

    /// Makes `.config` from the fragments, if they are not those of the last time, and checks it.
    fn configure(&self) -> Result<(), BuildError> {
        let out = self.out();
        fs::create_dir_all(&out).on("create", &out)?;
        let all = self.dir.join("fragments.config");
        let wanted = self.recipe.fragments.concat();
        if fs::read_to_string(&all).is_ok_and(|old| old == wanted) && out.join(".config").exists() {
            return Ok(());
        }
        super::overlay::replace(None, &all)?;
        let fragments = self.dir.join("fragments.config.new");
        write_whole(&fragments, &wanted)?;
        self.kbuild().make("configuring the kernel", &["allnoconfig"], None, |command| {
            command.env("KCONFIG_ALLCONFIG", &fragments);
        })?;
        self.kbuild().make("completing the configuration", &["olddefconfig"], None, |_| ())?;
        self.check_configuration()?;
        write_whole(&all, wanted)
    }

    /// Fails unless each line of the fragments is in force.
    fn check_configuration(&self) -> Result<(), BuildError> {
        let file = self.out().join(".config");
        let config = fs::read_to_string(&file).on("read", &file)?;
        let lost = kconfig::lost(&self.recipe.fragments, &config);
        if lost.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = self.recipe.flavour.config.iter().map(|f| f.display().to_string()).collect();
        let kernel = self.recipe.source.name();
        Err(BuildError::Config { kernel, fragment: names.join(" + "), lost, log: self.log.clone() })
    }

    /// Copies what a run, gdb and a report need out of the object folder.
    fn collect(&self, dir: &Path) -> Result<(), BuildError> {
        let out = self.out();
        let vmlinux = dir.join("vmlinux");
        copy(&out.join("vmlinux"), &vmlinux)?;
        strip("--strip-all", &vmlinux, &dir.join("boot"))?;
        copy(&out.join(".config"), &dir.join("config"))?;
        copy(&out.join("System.map"), &dir.join("System.map"))?;
        let order = out.join("modules.order");
        let modules = fs::read_to_string(&order).on("read", &order)?;
        let mut names = Vec::new();
        for module in modules.lines() {
            let file = out.join(module).with_extension("ko");
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            copy(&file, &dir.join("modules").join(format!("{name}.ko")))?;
            names.push(name);
        }
        names.sort();
        // gdb loads the script beside vmlinux, which looks for the others below its own folder.
        copy(&self.src().join("scripts/gdb/vmlinux-gdb.py"), &dir.join("vmlinux-gdb.py"))?;
        for root in [self.src(), out.clone()] {
            let linux = root.join("scripts/gdb/linux");
            for file in walk(&linux)?.iter().filter(|f| f.extension().is_some_and(|e| e == "py")) {
                copy(&linux.join(file), &dir.join("scripts/gdb/linux").join(file))?;
            }
        }
        let release_file = out.join("include/config/kernel.release");
        let built = Built {
            dir: PathBuf::new(),
            release: fs::read_to_string(&release_file).on("read", &release_file)?.trim().to_owned(),
            source_sha256: self.source_sha256.clone(),
            config_sha256: hash::file(&dir.join("config"))?,
            modules: names,
        };
        let file = dir.join("kernel.json");
        let text = serde_json::to_vec_pretty(&built)
            .map_err(|e| BuildError::Data { file: file.clone(), reason: e.to_string() })?;
        write_whole(&file, text)
    }
}

/// Owns the paths that a [`Kbuild`] borrows.
struct Make<'a> {
    tree: &'a LiveTree<'a>,
    src: PathBuf,
    out: PathBuf,
}

impl Make<'_> {
    fn make(
        &self,
        what: &str,
        targets: &[&str],
        expected: Option<u64>,
        adjust: impl FnOnce(&mut Command),
    ) -> Result<u64, BuildError> {
        let LiveTree { tools, log, progress, .. } = self.tree;
        Kbuild { tools, src: &self.src, out: &self.out, log, progress }.make(what, targets, expected, adjust)
    }
}

fn copy(source: &Path, dest: &Path) -> Result<(), BuildError> {
    if let Some(dir) = dest.parent() {
        fs::create_dir_all(dir).on("create", dir)?;
    }
    fs::copy(source, dest).map(|_| ()).on("copy", source)
}

/// Copies an ELF file without its symbols or debug information.
pub(super) fn strip(how: &str, source: &Path, dest: &Path) -> Result<(), BuildError> {
    if let Some(dir) = dest.parent() {
        fs::create_dir_all(dir).on("create", dir)?;
    }
    capture(Command::new("objcopy").arg(how).arg(source).arg(dest)).map(|_| ())
}

#[cfg(test)]
mod tests;

//! From a request to an image: the order in which things are fetched, built and put together.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::binaries;
use super::error::IoContext;
use super::hash::{self, Key};
use super::image::{self, AppliedPatch, Image, Provenance};
use super::initramfs::{self, Content};
use super::kernel::{Built, LiveTree, Recipe, strip};
use super::module::{self, DRIVER};
use super::patches::{self, Patch, UserPatch};
use super::pins::{self, Kernel, Part, Selftest};
use super::process::{Job, guarded};
use super::progress::Unit;
use super::source::{self, Source};
use super::toolchain::{self, KernelTools, Qemu};
use super::{BuildError, Cache, Pins, Progress, Stack, drgn, selftests};
use crate::cli::{Context, ImageArgs, Preempt};
use crate::judge::structures::Reader;

/// What to build. The default is the reference kernel, stock.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// Kernel of the list.
    pub kernel: Option<String>,
    /// Kernel source tree of the user's, instead; the abstractions are then those of the kernel of the list that is nearest.
    pub tree: Option<PathBuf>,
    /// Fix candidate, or several joined by `+`.
    pub variant: Option<String>,
    /// The user's own patches and mailboxes, on top, in order of application.
    pub patches: Vec<UserPatch>,
    /// Kind of build.
    pub flavour: Option<String>,
    /// What to call it in place of the names of its parts.
    pub name: Option<String>,
}

impl Request {
    /// What the result is called: the names of its parts, bottom first. `stock` is what the kernel is by itself, and is
    /// said where nothing else is.
    #[must_use]
    pub fn variant_name(&self, stock: &str) -> String {
        if let Some(name) = &self.name {
            return name.clone();
        }
        let tree = self.tree.as_deref().map(source::tree_name);
        let files = self.patches.iter().map(UserPatch::name);
        let parts: Vec<String> = tree.into_iter().chain(self.variant.clone()).chain(files).collect();
        if parts.is_empty() { stock.to_owned() } else { parts.join("+") }
    }
}

impl From<&ImageArgs> for Request {
    fn from(args: &ImageArgs) -> Self {
        Self {
            kernel: args.kernel.clone(),
            tree: args.tree.clone(),
            variant: args.variant.clone(),
            patches: args
                .patch
                .iter()
                .cloned()
                .map(UserPatch::Patch)
                .chain(args.mbox.iter().cloned().map(UserPatch::Mailbox))
                .collect(),
            flavour: args.flavour.clone(),
            name: None,
        }
    }
}

/// Fetches and builds into one cache, from one source tree of hmmstorm.
#[derive(Debug)]
pub struct Builder {
    pins: Pins,
    cache: Cache,
    progress: Progress,
}

impl Builder {
    /// With the cache and source tree of the command line.
    pub fn new(ctx: &Context) -> Result<Self, BuildError> {
        Ok(Self {
            pins: Pins::load(&ctx.repo)?,
            cache: Cache::open(&ctx.cache)?,
            progress: Progress::new(ctx),
        })
    }

    /// What `images/` says.
    pub fn pins(&self) -> &Pins {
        &self.pins
    }

    /// A QEMU with the device that the GPU needs; fetched if need be.
    pub fn qemu(&self) -> Result<Qemu, BuildError> {
        toolchain::qemu(&self.pins, &self.cache, &self.progress)
    }

    /// The device's program; built if need be.
    pub fn device(&self) -> Result<PathBuf, BuildError> {
        binaries::device(&self.pins.repo, &self.cache, &self.progress)
    }

    /// What reads a guest's data structures; fetched if need be.
    pub fn drgn(&self) -> Result<Reader, BuildError> {
        drgn::drgn(&self.pins, &self.cache, &self.progress)
    }

    /// Checksums of a variant's patches for a kernel of this version, in order of application; none if this tree does not have
    /// it.
    pub fn variant_patches(&self, name: &str, version: &str) -> Option<Vec<String>> {
        let kernel = self.pins.kernel_for(version).ok()?;
        let patches = Stack::parse(Some(name), kernel, &self.pins).ok()?;
        let patches = patches.patches(&self.pins.repo.join("images/variants")).ok()?;
        Some(patches.into_iter().map(|patch| patch.sha256).collect())
    }

    /// The image that a command line asks for: the one named by `--image`, or what the other options describe.
    pub fn image(&self, args: &ImageArgs) -> Result<Image, BuildError> {
        match &args.image {
            Some(file) => Image::load(file),
            None => Image::load(&self.prepare(&args.into())?),
        }
    }

    /// The same with the test programs of the kernel's own tree in the guest.
    pub fn image_with_selftests(&self, args: &ImageArgs) -> Result<Image, BuildError> {
        if args.image.is_some() {
            return Err(BuildError::Usage(
                "--image names what is built already, and the kernel's tests are built from its source: name the \
                 kernel with --kernel or --tree"
                    .into(),
            ));
        }
        let request = args.into();
        let base = self.prepare(&request)?;
        let mut image = Image::load(&base)?;
        let programs = self.selftests(&request)?;
        let mut key = Key::new("image-selftests-2").with("base", base.as_os_str().as_encoded_bytes());
        for (path, program) in &programs {
            key = key.with(path, program.as_os_str().as_encoded_bytes());
        }
        let name = base.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let dest = self.cache.path("images").join(format!("{name}-selftests-{}", key.short()));
        let texts = image.patches()?;
        self.cache.publish(&dest, |dir| {
            image::write_patches(dir, texts.iter().map(|(_, text)| text.as_slice()))?;
            initramfs::extend(&image.initramfs, &programs, &dir.join("initramfs.cpio.gz"))
        })?;
        image.initramfs = dest.join("initramfs.cpio.gz");
        Ok(image)
    }

    /// The test programs of a kernel's own tree, by their paths in the guest.
    fn selftests(&self, request: &Request) -> Result<Vec<(&str, PathBuf)>, BuildError> {
        let Self { pins, cache, progress } = self;
        let recipe = self.recipe(request)?;
        let tools = KernelTools::find(pins, recipe.flavour.llvm, cache, progress)?;
        let tree = LiveTree::open(&recipe, &tools, pins, cache, progress)?;
        let program = |pin: &'_ Selftest| selftests::program(&tree, pin, cache, progress);
        pins.selftests.program.iter().map(|pin| Ok((pin.path.as_str(), program(pin)?))).collect()
    }

    /// Builds what is requested, as far as it is not in the cache, and gives the path of its `image.json`.
    pub fn prepare(&self, request: &Request) -> Result<PathBuf, BuildError> {
        let recipe = self.recipe(request)?;
        let tools = KernelTools::find(&self.pins, recipe.flavour.llvm, &self.cache, &self.progress)?;
        let (kernel, driver) = {
            let tree = LiveTree::open(&recipe, &tools, &self.pins, &self.cache, &self.progress)?;
            (tree.kernel()?, module::driver(&tree, &self.pins.repo, &self.cache)?)
        };
        let storm = binaries::storm(&self.pins.repo, &self.cache, &self.progress)?;
        let busybox = toolchain::busybox(&self.pins, &self.cache, &self.progress)?;
        self.assemble(&recipe, &tools, &kernel, &driver, &storm, &busybox)
    }

    /// Fetches and verifies everything that any later command may need, and builds what does not depend on a kernel.
    pub fn setup(&self, kernel: Option<&str>, tarball: Option<&Path>) -> Result<(), BuildError> {
        let kernel = self.pins.kernel(kernel)?;
        if let Some(file) = tarball {
            source::import_tarball(kernel, file, &self.cache)?;
        }
        let Self { pins, cache, progress } = self;
        let tools = KernelTools::find(pins, false, cache, progress)?;
        progress.note(format_args!(
            "{}\n{} with libclang {}\n{}",
            tools.rustc, tools.bindgen, tools.libclang, tools.cc
        ));
        let qemu = self.qemu()?;
        progress.note(format_args!("QEMU {}: {}", qemu.version, qemu.program.display()));
        toolchain::busybox(pins, cache, progress)?;
        // Nothing but evidence depends on it.
        if let Err(error) = self.drgn() {
            progress.note(format_args!("without drgn, a cycle is named but not read from memory: {error}"));
        }
        let file = source::tarball(kernel, pins, cache, progress)?;
        progress.note(format_args!("kernel {}: {}", kernel.name, file.display()));
        self.fetch_crates()?;
        self.device()?;
        binaries::storm(&pins.repo, cache, progress)?;
        Ok(())
    }

    /// Takes over a tarball that the user has, if it is that of this kernel.
    pub fn import_tarball(&self, kernel: Option<&str>, file: &Path) -> Result<(), BuildError> {
        source::import_tarball(self.pins.kernel(kernel)?, file, &self.cache).map(|_| ())
    }

    fn fetch_crates(&self) -> Result<(), BuildError> {
        let log = self.cache.fresh_log("cargo-fetch")?;
        let step = self.progress.step("fetching crates", Unit::None);
        let mut command = guarded("cargo");
        command.current_dir(&self.pins.repo).args(["fetch", "--locked"]);
        Job { what: "fetching crates", log: &log, progress: &self.progress }.run(
            command,
            |_| (),
            || step.tick(),
        )?;
        step.done();
        Ok(())
    }

    /// The kernel of the list that is asked for, or whose patches a user's own tree takes.
    pub fn kernel(&self, request: &Request) -> Result<&Kernel, BuildError> {
        match &request.tree {
            Some(dir) => self.pins.kernel_for(&source::version(dir)?),
            None => self.pins.kernel(request.kernel.as_deref()),
        }
    }

    /// What an image's kernel can be booted with as `preempt=`; `None` where nobody knows.
    pub fn preempt_models(&self, image: &Image) -> Option<&[Preempt]> {
        let series = pins::series(&image.provenance.kernel_version);
        let kernel = self.pins.kernels.kernel.iter().find(|kernel| kernel.series() == series)?;
        Some(&kernel.preempt)
    }

    fn recipe(&self, request: &Request) -> Result<Recipe, BuildError> {
        let pins = &self.pins;
        let kernel = self.kernel(request)?.clone();
        let flavour = pins.flavour(request.flavour.as_deref())?.clone();
        let stack = Stack::parse(request.variant.as_deref(), &kernel, pins)?;
        let mut patches = {
            let folders: Vec<_> = kernel.patches.iter().map(|folder| pins.repo.join(folder)).collect();
            patches::series(&folders, &kernel.without)?
        };
        patches.extend(stack.patches(&pins.repo.join("images/variants"))?);
        let named = Request { variant: request.variant.as_ref().map(|_| stack.name()), ..request.clone() };
        let variant = named.variant_name(&stack.name());
        for given in &request.patches {
            let own = patches::user(given, &self.cache)?;
            for patch in &own {
                let patched = patch.files().iter().map(|f| f.display().to_string()).collect::<Vec<_>>();
                self.progress.note(format_args!(
                    "with {} (SHA-256 {:.12}...): {}",
                    patch.name,
                    patch.sha256,
                    patched.join(", ")
                ));
            }
            patches.extend(own);
        }
        patches::no_doubles(&patches)?;
        let images = pins.repo.join("images");
        let mut fragments = Vec::new();
        for fragment in &flavour.config {
            let file = images.join(fragment);
            fragments.push(fs::read_to_string(&file).on("read", &file)?);
        }
        let source = match &request.tree {
            Some(dir) => Source::tree(dir)?,
            None => Source::Pinned(Box::new(kernel.clone())),
        };
        Ok(Recipe { source, kernel, flavour, variant, patches, fragments })
    }

    fn assemble(
        &self,
        recipe: &Recipe,
        tools: &KernelTools,
        kernel: &Built,
        driver: &Path,
        storm: &Path,
        busybox: &Path,
    ) -> Result<PathBuf, BuildError> {
        let mut modules: BTreeMap<String, PathBuf> =
            kernel.modules.iter().map(|name| (name.clone(), kernel.module(name))).collect();
        modules.insert(DRIVER.to_owned(), driver.to_owned());
        let provenance = Provenance {
            kernel_version: kernel.release.clone(),
            kernel_source_sha256: kernel.source_sha256.clone(),
            tree: recipe.source.described(),
            patches: recipe
                .patches
                .iter()
                .map(|p| AppliedPatch {
                    name: p.name.clone(),
                    origin: Some(p.origin.clone()),
                    sha256: p.sha256.clone(),
                })
                .collect(),
            variant: recipe.variant.clone(),
            flavour: recipe.flavour.name.clone(),
            config_sha256: kernel.config_sha256.clone(),
            driver_sha256: module::source_sha256(&self.pins.repo)?,
            storm_sha256: hash::file(storm)?,
            rustc: tools.rustc.clone(),
            bindgen: tools.bindgen.clone(),
            cc: tools.kernel_cc().to_owned(),
            libclang: tools.libclang.clone(),
        };
        // The folders of kernel and modules have keys as their names, so their paths stand for their content.
        let mut key = Key::new("image-4")
            .with("kernel", kernel.dir.as_os_str().as_encoded_bytes())
            .with("manifest", format!("{:?}", self.pins.initramfs))
            .with("storm", &provenance.storm_sha256)
            .with("busybox", hash::file(busybox)?)
            .with("provenance", format!("{provenance:?}"));
        for (name, file) in &modules {
            key = key.with(name, file.as_os_str().as_encoded_bytes());
        }
        let name = format!("{}-{}-{}", recipe.source.name(), recipe.slug(), key.short());
        let dest = self.cache.path("images").join(name);
        self.cache.publish(&dest, |dir| {
            let scratch = self.cache.scratch()?;
            // With its debug information, PID 1 would take longer to unpack than the kernel to boot.
            let program = scratch.path().join("storm");
            strip("--strip-debug", storm, &program)?;
            let mut contents = vec![
                Content { part: Part::Storm, name: "storm".into(), file: program },
                Content { part: Part::Busybox, name: "busybox".into(), file: busybox.to_owned() },
            ];
            image::write_patches(dir, recipe.patches.iter().map(Patch::text))?;
            let folder = dir.join("modules");
            fs::create_dir(&folder).on("create", &folder)?;
            for (name, file) in &modules {
                let ko = format!("{name}.ko");
                let stripped = scratch.path().join(&ko);
                strip("--strip-debug", file, &stripped)?;
                contents.push(Content { part: Part::Modules, name: ko.clone(), file: stripped });
                // All in one folder, where gdb looks for them.
                fs::hard_link(file, folder.join(ko)).on("link", file)?;
            }
            initramfs::write(&self.pins.initramfs, &contents, &dir.join("initramfs.cpio.gz"))?;
            let image = Image {
                boot_kernel: kernel.dir.join("boot"),
                vmlinux: kernel.dir.join("vmlinux"),
                initramfs: dest.join("initramfs.cpio.gz"),
                modules: modules.keys().map(|n| (n.clone(), dest.join(format!("modules/{n}.ko")))).collect(),
                provenance,
            };
            image.save(&dir.join("image.json"))
        })?;
        Ok(dest.join("image.json"))
    }
}

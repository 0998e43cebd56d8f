//! The live tree on a fake kernel: two C files, a header and a Makefile with kbuild's targets.

use super::*;
use crate::build::module;
use crate::build::patches::{Origin, Patch};

const MAKEFILE: &str = r#"
all:
ifneq ($(M),)
modules:
	@echo "  CC      driver"; mkdir -p $(MO) && cat $(O)/include/x.h $(M)/driver.c > $(MO)/hsgpu.ko
else
allnoconfig:
	@grep -v DROPPED $$KCONFIG_ALLCONFIG > $(O)/.config
olddefconfig: ; @true
modules: $(O)/lib/test_hmm.ko
	@echo lib/test_hmm.o > $(O)/modules.order
scripts_gdb:
	@mkdir -p $(O)/scripts/gdb/linux $(O)/include/config
	@echo constants > $(O)/scripts/gdb/linux/constants.py
	@echo 1.2.3 > $(O)/include/config/kernel.release; echo map > $(O)/System.map
vmlinux: $(O)/vmlinux
$(O)/vmlinux: $(O)/mm/memory.o $(O)/mm/other.o
	@echo "  LD      vmlinux"; gcc -o $@ $^; mkdir -p $(O)/include; cp include/x.h $(O)/include
$(O)/lib/test_hmm.ko: lib/test_hmm.c
	@mkdir -p $(@D); gcc -c -o $@ $<
$(O)/mm/%.o: mm/%.c include/x.h
	@echo "  CC      mm/$*.o"; mkdir -p $(@D); gcc -Iinclude -c -o $@ $<
endif
"#;

struct Bench {
    _temp: tempfile::TempDir,
    cache: Cache,
    pins: Pins,
    progress: Progress,
    tools: KernelTools,
    repo: PathBuf,
    tree: PathBuf,
    patches: PathBuf,
}

fn put(root: &Path, files: &[(&str, &str)]) {
    for (name, text) in files {
        let file = root.join(name);
        fs::create_dir_all(file.parent().expect("parent")).expect("folder");
        fs::write(file, text).expect("write");
    }
}

impl Bench {
    fn new() -> Self {
        let temp = tempfile::tempdir().expect("temporary folder");
        let tree = temp.path().join("linux");
        let main = "#include \"x.h\"\nint main(void)\n{\n\treturn 0;\n}\n";
        put(
            &tree,
            &[
                ("Makefile", MAKEFILE),
                ("Kbuild", ""),
                ("mm/memory.c", main),
                ("mm/other.c", "#include \"x.h\"\nint other;\n"),
                ("include/x.h", "/* the interface */\n"),
                ("lib/test_hmm.c", "int test_hmm;\n"),
                ("scripts/gdb/vmlinux-gdb.py", "gdb"),
                ("scripts/gdb/linux/tasks.py", "tasks"),
            ],
        );
        let repo = temp.path().join("repo");
        put(&repo, &[("guest-driver/driver/driver.c", "driver\n"), ("abi/src/lib.rs", "abi\n")]);
        let tools = KernelTools {
            rust_bin: "/nowhere".into(),
            rustc: "rustc 1".into(),
            rust_lib_src: "/nowhere".into(),
            bindgen_program: "bindgen".into(),
            bindgen: "bindgen 1".into(),
            libclang_dir: "/nowhere".into(),
            libclang: "1".into(),
            cc: "gcc 1".into(),
            ld: "ld 1".into(),
            llvm: None,
        };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("repository");
        let cache = Cache::open(&temp.path().join("cache")).expect("cache");
        let patches = temp.path().join("patches");
        fs::create_dir(&patches).expect("folder");
        Self {
            pins: Pins::load(source).expect("pins"),
            progress: Progress::silent().expect("progress"),
            cache,
            tools,
            repo,
            tree,
            patches,
            _temp: temp,
        }
    }

    fn recipe(&self, variant: &str, diffs: &[&str]) -> Recipe {
        let patch = |(number, diff): (usize, &&str)| {
            let file = self.patches.join(format!("{variant}-{number}.patch"));
            fs::write(&file, diff).expect("write");
            Patch::read(&file, Origin::User).expect("a patch")
        };
        Recipe {
            source: Source::tree(&self.tree).expect("tree"),
            kernel: self.pins.kernel(None).expect("kernel").clone(),
            flavour: self.pins.flavour(None).expect("flavour").clone(),
            variant: variant.into(),
            patches: diffs.iter().enumerate().map(patch).collect(),
            fragments: vec!["CONFIG_A=y\n".into()],
        }
    }

    fn open<'a>(&'a self, recipe: &'a Recipe) -> LiveTree<'a> {
        LiveTree::open(recipe, &self.tools, &self.pins, &self.cache, &self.progress).expect("live tree")
    }

    fn kernel(&self, recipe: &Recipe) -> Result<Built, BuildError> {
        self.open(recipe).kernel()
    }

    /// What the last build compiled. Jobs run side by side, so their order says nothing.
    fn compiled(&self) -> Vec<String> {
        let log = fs::read_to_string(self.cache.log("kernel-tree-linux-default")).unwrap_or_default();
        let mut files: Vec<_> =
            log.lines().filter_map(|l| l.strip_prefix("  CC      ")).map(str::to_owned).collect();
        files.sort();
        files
    }
}

const CURE: &str = "--- a/mm/memory.c\n+++ b/mm/memory.c\n@@ -1,5 +1,5 @@\n #include \"x.h\"\n int main(void)\n {\n\
                    -\treturn 0;\n+\treturn 1;\n }\n";
const BREAK: &str = "--- a/mm/memory.c\n+++ b/mm/memory.c\n@@ -1,5 +1,5 @@\n #include \"x.h\"\n int main(void)\n {\n\
                     -\treturn 0;\n+\treturn nothing;\n }\n";
const HEADER: &str =
    "--- a/include/x.h\n+++ b/include/x.h\n@@ -1 +1 @@\n-/* the interface */\n+/* another */\n";

#[test]
fn variant_costs_what_it_changes() {
    let bench = Bench::new();
    let (stock, cure) = (bench.recipe("trylock", &[]), bench.recipe("cure", &[CURE]));
    let first = bench.kernel(&stock).expect("build");
    assert_eq!(bench.compiled(), ["mm/memory.o", "mm/other.o"]);
    assert_eq!((first.release.as_str(), first.modules.as_slice()), ("1.2.3", &["test_hmm".to_owned()][..]));
    for file in [
        "vmlinux",
        "boot",
        "config",
        "modules/test_hmm.ko",
        "vmlinux-gdb.py",
        "scripts/gdb/linux/constants.py",
    ] {
        assert!(first.dir.join(file).is_file(), "{file}");
    }

    let second = bench.kernel(&cure).expect("build");
    assert_eq!(bench.compiled(), ["mm/memory.o"]);
    assert_ne!(second.dir, first.dir);
    let status = |built: &Built| Command::new(built.dir.join("boot")).status().expect("run").code();
    assert_eq!((status(&first), status(&second)), (Some(0), Some(1)));

    // Both are there now: no request touches anything, whichever the live tree holds.
    let live = bench.open(&cure).src().join("mm/memory.c");
    let before = fs::metadata(&live).and_then(|m| m.modified()).expect("time");
    bench.kernel(&stock).expect("nothing to do");
    bench.kernel(&cure).expect("nothing to do");
    assert_eq!(fs::metadata(&live).and_then(|m| m.modified()).expect("time"), before);
}

#[test]
fn driver_is_shared_by_variants_that_change_only_c() {
    let bench = Bench::new();
    let recipes =
        [bench.recipe("trylock", &[]), bench.recipe("cure", &[CURE]), bench.recipe("header", &[HEADER])];
    let drivers = recipes.each_ref().map(|recipe| {
        let tree = bench.open(recipe);
        tree.kernel().expect("kernel");
        module::driver(&tree, &bench.repo, &bench.cache).expect("driver")
    });
    assert_eq!(drivers[0], drivers[1]);
    assert_ne!(drivers[0], drivers[2]);
    assert_eq!(fs::read_to_string(&drivers[2]).expect("read"), "/* another */\ndriver\n");

    // A change of the driver alone, asked for with a kernel that the live tree does not hold now.
    put(&bench.repo, &[("guest-driver/driver/driver.c", "new driver\n")]);
    let tree = bench.open(&recipes[1]);
    let driver = module::driver(&tree, &bench.repo, &bench.cache).expect("driver");
    assert_eq!(fs::read_to_string(driver).expect("read"), "/* the interface */\nnew driver\n");
}

#[test]
fn own_tree_is_followed() {
    let bench = Bench::new();
    let recipe = bench.recipe("trylock", &[HEADER]);
    let first = bench.kernel(&recipe).expect("build");
    put(&bench.tree, &[("mm/other.c", "int other = 2;\n")]);
    let second = bench.kernel(&recipe).expect("build");
    assert_eq!(bench.compiled(), ["mm/other.o"]);
    assert_ne!(first.source_sha256, second.source_sha256);
    assert!(fs::read_to_string(bench.tree.join("include/x.h")).expect("read").contains("the interface"));
}

#[test]
fn failed_build_publishes_nothing_and_is_got_over() {
    let bench = Bench::new();
    let broken = bench.recipe("broken", &[BREAK]);
    let error = bench.kernel(&broken).expect_err("it cannot be compiled");
    let text = error.to_string();
    assert!(text.contains("nothing") && text.contains("kernel-tree-linux-default.log"), "{text}");
    assert!(!bench.open(&broken).published().exists());
    bench.kernel(&bench.recipe("trylock", &[])).expect("the tree is still good");
}

#[test]
fn lost_option_stops_the_build() {
    let bench = Bench::new();
    let mut recipe = bench.recipe("trylock", &[]);
    recipe.fragments.push("CONFIG_DROPPED=y\n".into());
    let text = bench.kernel(&recipe).expect_err("an option is gone").to_string();
    assert!(text.contains("CONFIG_DROPPED=y (there is no such option now)"), "{text}");
    // And it does so again: a configuration that failed its check is not taken for a good one.
    assert!(matches!(bench.kernel(&recipe), Err(BuildError::Config { .. })));
    bench.kernel(&bench.recipe("trylock", &[])).expect("the good configuration");
}

#[test]
fn power_cut_costs_a_full_build() {
    let bench = Bench::new();
    let recipe = bench.recipe("trylock", &[]);
    bench.kernel(&recipe).expect("build");
    let tree = bench.open(&recipe);
    fs::remove_dir_all(tree.published()).expect("remove");
    fs::remove_file(tree.dir.join("built.json")).expect("remove");
    fs::write(tree.dir.join("building"), "another boot").expect("write");
    drop(tree);
    bench.kernel(&recipe).expect("build");
    assert_eq!(bench.compiled(), ["mm/memory.o", "mm/other.o"]);
}

//! Test programs of the kernel's own tree, built without a change: static, against the headers that this kernel
//! exports to user space.

use std::ffi::OsString;
use std::path::PathBuf;

use super::binaries::require_static;
use super::error::IoContext;
use super::kernel::LiveTree;
use super::pins::Selftest;
use super::process::{Job, guarded};
use super::progress::Unit;
use super::{BuildError, Cache, Progress};

/// The program: published already, or built now.
pub(super) fn program(
    tree: &LiveTree<'_>,
    pin: &Selftest,
    cache: &Cache,
    progress: &Progress,
) -> Result<PathBuf, BuildError> {
    let key = tree.selftests_key().with("program", format!("{pin:?}")).short();
    let dest = cache.path("selftests").join(format!("{}-{key}", pin.name));
    let program = dest.join(&pin.name);
    if program.is_file() {
        return Ok(program);
    }
    // The tree's own files are compiled, so it must hold this recipe's patches while that goes on.
    tree.lock()?;
    let source = tree.source()?;
    let what = format!("building {}", pin.name);
    cache.publish(&dest, |dir| {
        let headers = tree.exported_headers()?;
        let built = dir.join(&pin.name);
        let mut command = guarded("gcc");
        command.args(["-O2", "-static", "-no-pie", "-D_GNU_SOURCE=", "-U_FORTIFY_SOURCE"]);
        // What its assertions print is a path of the kernel's, the same wherever it was built.
        let mut prefix = OsString::from("-ffile-prefix-map=");
        prefix.push(&source);
        prefix.push("/=");
        command.arg(prefix);
        for folder in &pin.include {
            command.arg("-I").arg(source.join(folder));
        }
        command.arg("-isystem").arg(&headers);
        for folder in &pin.system_include {
            command.arg("-isystem").arg(source.join(folder));
        }
        command.args(pin.sources.iter().map(|file| source.join(file))).arg("-o").arg(&built);
        command.args(pin.libraries.iter().map(|library| format!("-l{library}")));
        let log = cache.fresh_log(&pin.name)?;
        let step = progress.step(&what, Unit::None);
        Job { what: &what, log: &log, progress }.run(command, |_| (), || step.tick())?;
        step.done();
        require_static(&built)
    })?;
    program.metadata().on("examine", &program)?;
    Ok(program)
}

/// Whether a file of the kernel's source can make a difference to these programs.
pub(super) fn concerns(file: &std::path::Path) -> bool {
    let headers = ["lib/test_hmm_uapi.h", "mm/gup_test.h"];
    file.starts_with("tools")
        || file.starts_with("include/uapi")
        || (file.starts_with("arch") && file.components().any(|part| part.as_os_str() == "uapi"))
        || headers.iter().any(|header| file == std::path::Path::new(header))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn only_what_user_space_sees_matters() {
        for file in [
            "tools/testing/selftests/mm/hmm-tests.c",
            "include/uapi/linux/mman.h",
            "arch/x86/include/uapi/asm/mman.h",
            "lib/test_hmm_uapi.h",
        ] {
            assert!(concerns(Path::new(file)), "{file}");
        }
        for file in ["mm/memory.c", "lib/test_hmm.c", "include/linux/hmm.h", "rust/kernel/mm.rs"] {
            assert!(!concerns(Path::new(file)), "{file}");
        }
    }
}

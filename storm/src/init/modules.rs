//! Kernel modules.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;

use rustix::io::Errno;
use rustix::system::finit_module;
use thiserror::Error;

/// Text sections of a module, with their addresses.
pub(crate) type Sections = BTreeMap<String, u64>;

/// A module that cannot be loaded.
#[derive(Debug, Error)]
pub(crate) enum ModuleError {
    /// No such file.
    #[error("cannot open {path}: {source}. Is the module in the initramfs?")]
    Open {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel refused it.
    #[error(
        "cannot load {path}: {source}. The console says why (another kernel's module, a missing symbol, its init failed)"
    )]
    Load {
        /// The file.
        path: String,
        /// Why.
        source: Errno,
    },
}

/// Loads `/lib/modules/<name>.ko` if it is not loaded, with the parameters that the kernel's command line has for it; where
/// its code is.
///
/// # Errors
/// [`ModuleError`].
pub(crate) fn load(name: &str) -> Result<Sections, ModuleError> {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let parameters = CString::new(parameters(&cmdline, name)).unwrap_or_default();
    let path = format!("/lib/modules/{name}.ko");
    let file = File::open(&path).map_err(|source| ModuleError::Open { path: path.clone(), source })?;
    match finit_module(&file, &parameters, 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(text_sections(name)),
        Err(source) => Err(ModuleError::Load { path, source }),
    }
}

/// What a kernel command line has for a module: the words `name.parameter=value`, as `modprobe` reads them.
fn parameters(cmdline: &str, name: &str) -> String {
    let own = |word: &str| {
        let (module, parameter) = word.split_once('.')?;
        (module.replace('-', "_") == name.replace('-', "_")).then(|| parameter.to_owned())
    };
    cmdline.split_ascii_whitespace().filter_map(own).collect::<Vec<_>>().join(" ")
}

/// The text sections in `/sys/module/<name>/sections`; none if the kernel does not tell.
fn text_sections(name: &str) -> Sections {
    // The kernel names a module with underscores, whatever its file is called.
    let folder = format!("/sys/module/{}/sections", name.replace('-', "_"));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let section = entry.file_name().into_string().ok().filter(|s| s.starts_with(".text"))?;
            Some((section, address(&fs::read_to_string(entry.path()).ok()?)?))
        })
        .collect()
}

fn address(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_addresses() {
        assert_eq!(address("0xffffffffa0002000\n"), Some(0xffff_ffff_a000_2000));
        assert_eq!(address("12"), None);
    }

    #[test]
    fn parameters_come_from_the_command_line() {
        let cmdline = "quiet test_hmm.a=1 storm.seed=2 hsgpu.a=3 test-hmm.b=0x10,2 test_hmm\n";
        assert_eq!(parameters(cmdline, "test_hmm"), "a=1 b=0x10,2");
        assert_eq!(parameters(cmdline, "vfio"), "");
    }

    #[test]
    fn a_missing_module_says_where_it_should_be() {
        let error = load("no-such-module").expect_err("missing").to_string();
        assert!(error.contains("/lib/modules/no-such-module.ko") && error.contains("initramfs"), "{error}");
    }
}

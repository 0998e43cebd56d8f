//! Kernel modules.

use std::collections::BTreeMap;
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

/// Loads `/lib/modules/<name>.ko` if it is not loaded; where its code is.
///
/// # Errors
/// [`ModuleError`].
pub(crate) fn load(name: &str) -> Result<Sections, ModuleError> {
    let path = format!("/lib/modules/{name}.ko");
    let file = File::open(&path).map_err(|source| ModuleError::Open { path: path.clone(), source })?;
    match finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(text_sections(name)),
        Err(source) => Err(ModuleError::Load { path, source }),
    }
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
    fn a_missing_module_says_where_it_should_be() {
        let error = load("no-such-module").expect_err("missing").to_string();
        assert!(error.contains("/lib/modules/no-such-module.ko") && error.contains("initramfs"), "{error}");
    }
}

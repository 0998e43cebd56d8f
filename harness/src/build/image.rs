//! What a machine boots, and what it was made of: `image.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::BuildError;
use super::cache::write_whole;
use super::error::IoContext;
use super::patches::Origin;

/// A bootable image: kernel and initramfs, with the symbols of both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Kernel to boot: vmlinux without symbols, entered by PVH.
    pub boot_kernel: PathBuf,
    /// The same with symbols and DWARF; gdb's scripts are beside it.
    pub vmlinux: PathBuf,
    /// Initramfs.
    pub initramfs: PathBuf,
    /// Modules of the initramfs with their debug information, by name without `.ko`.
    pub modules: BTreeMap<String, PathBuf>,
    /// What it was made of.
    pub provenance: Provenance,
}

/// What an image was made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance {
    /// `uname -r`.
    pub kernel_version: String,
    /// Checksum of the pristine source: of its tarball, or of all files of a user's tree.
    pub kernel_source_sha256: String,
    /// Of a user's tree: what git calls the commit that was checked out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tree: Option<String>,
    /// Patches on it, in order of application.
    pub patches: Vec<AppliedPatch>,
    /// Names of the user's tree, of the fix candidates and of the user's files, joined by `+` in order of application, or
    /// what the user calls it.
    pub variant: String,
    /// Kind of build.
    pub flavour: String,
    /// Checksum of the final configuration.
    pub config_sha256: String,
    /// Checksum of the driver's source.
    pub driver_sha256: String,
    /// Checksum of the guest's PID 1.
    pub storm_sha256: String,
    /// `rustc --version`.
    pub rustc: String,
    /// `bindgen --version`.
    pub bindgen: String,
    /// First line of `gcc --version`.
    pub cc: String,
    /// Version of libclang.
    pub libclang: String,
}

/// A patch that an image's kernel has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppliedPatch {
    /// File name; of a series, that of the mailbox with number and subject of the mail.
    pub name: String,
    /// Who asked for it; none in images of older versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Checksum.
    pub sha256: String,
}

/// Folder beside the initramfs with the texts of its kernel's patches, `NNNN.patch` in order of application.
const PATCHES: &str = "patches";

/// Writes the texts of an image's patches to its folder, for [`Image::patches`].
pub(super) fn write_patches<'a>(dir: &Path, texts: impl Iterator<Item = &'a [u8]>) -> Result<(), BuildError> {
    let folder = dir.join(PATCHES);
    fs::create_dir(&folder).on("create", &folder)?;
    for (number, text) in texts.enumerate() {
        let file = folder.join(format!("{number:04}.patch"));
        fs::write(&file, text).on("write", &file)?;
    }
    Ok(())
}

impl Image {
    /// Its patches with their texts, in order of application.
    pub fn patches(&self) -> Result<Vec<(AppliedPatch, Vec<u8>)>, BuildError> {
        let folder = self.initramfs.parent().unwrap_or(Path::new(".")).join(PATCHES);
        let read = |(number, patch): (usize, &AppliedPatch)| {
            let file = folder.join(format!("{number:04}.patch"));
            let text = fs::read(&file).on("read", &file)?;
            Ok((patch.clone(), text))
        };
        self.provenance.patches.iter().enumerate().map(read).collect()
    }

    /// Reads an `image.json` and checks that all it names is there.
    pub fn load(file: &Path) -> Result<Self, BuildError> {
        let text = fs::read(file).on("read", file)?;
        let image: Self = serde_json::from_slice(&text)
            .map_err(|e| BuildError::Data { file: file.to_owned(), reason: e.to_string() })?;
        if let Some(gone) = image.files().find(|f| !f.is_file()) {
            let reason = format!("it names {}, which is not there; build the image again", gone.display());
            return Err(BuildError::Data { file: file.to_owned(), reason });
        }
        Ok(image)
    }

    /// Writes it.
    pub(super) fn save(&self, file: &Path) -> Result<(), BuildError> {
        let text = serde_json::to_vec_pretty(self)
            .map_err(|e| BuildError::Data { file: file.to_owned(), reason: e.to_string() })?;
        write_whole(file, text)
    }

    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.boot_kernel, &self.vmlinux, &self.initramfs].into_iter().chain(self.modules.values())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_with_a_missing_file_is_refused() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let file = dir.path().join("image.json");
        let part = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, name).expect("write");
            path
        };
        let image = Image {
            boot_kernel: part("boot"),
            vmlinux: part("vmlinux"),
            initramfs: part("initramfs"),
            modules: BTreeMap::from([("hsgpu".to_owned(), part("hsgpu.ko"))]),
            provenance: Provenance::default(),
        };
        image.save(&file).expect("save");
        assert_eq!(Image::load(&file).expect("load"), image);
        fs::remove_file(dir.path().join("hsgpu.ko")).expect("remove");
        let error = Image::load(&file).expect_err("a module is gone").to_string();
        assert!(error.contains("hsgpu.ko"), "{error}");
    }
}

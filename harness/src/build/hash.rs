//! SHA-256 of files, and keys made of everything that a result depends on.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::BuildError;
use super::error::IoContext;

/// SHA-256 of a file, in hex.
pub(super) fn file(path: &Path) -> Result<String, BuildError> {
    let mut hasher = Sha256::new();
    let mut file = File::open(path).on("open", path)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(n) => hasher.update(buffer.get(..n).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).on("read", path),
        }
    }
}

/// SHA-256 of some bytes, in hex.
pub(super) fn bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// A name for a result: the hash of all that goes into it, each part with its name and length so that no two lists
/// of parts look alike.
#[derive(Clone)]
pub(super) struct Key(Sha256);

impl Key {
    /// `recipe` names what is made and by which version of the code that makes it.
    pub(super) fn new(recipe: &str) -> Self {
        Self(Sha256::new()).with("recipe", recipe)
    }

    /// Adds one part.
    pub(super) fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.0.update(format!("{name}:{}:", value.len()));
        self.0.update(value);
        self
    }

    /// The key in full, as hex.
    pub(super) fn hex(self) -> String {
        hex(&self.0.finalize())
    }

    /// The key's first 16 hex digits: enough for a folder's name.
    pub(super) fn short(self) -> String {
        let mut hex = self.hex();
        hex.truncate(16);
        hex
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_together() {
        let a = Key::new("r").with("x", "ab").with("y", "c").hex();
        let b = Key::new("r").with("x", "a").with("y", "bc").hex();
        assert_ne!(a, b);
        assert_eq!(a, Key::new("r").with("x", "ab").with("y", "c").hex());
    }

    #[test]
    fn file_hash_is_sha256() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("x");
        std::fs::write(&path, "abc").expect("write");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(file(&path).expect("hash"), abc);
        assert_eq!(bytes(b"abc"), abc);
    }
}

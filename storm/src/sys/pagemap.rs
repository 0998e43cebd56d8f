//! Bits of page-table entries as user space sees them: `/proc/self/pagemap`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use hmmstorm_abi::uapi::PAGE_SIZE;

use super::vma::Vma;

/// Written since [`clear_soft_dirty`] (Documentation/admin-guide/mm/pagemap.rst).
pub(crate) const SOFT_DIRTY: u64 = 1 << 55;
/// Write-protected by userfaultfd.
pub(crate) const UFFD_WP: u64 = 1 << 57;

/// The entry of every page of `vma`.
///
/// # Errors
/// Of `open` and `pread`.
pub(crate) fn entries(vma: &Vma) -> io::Result<Vec<u64>> {
    let file = File::open("/proc/self/pagemap")?;
    let mut bytes = vec![0; vma.pages() * size_of::<u64>()];
    let offset = vma.address(0) / PAGE_SIZE as u64 * size_of::<u64>() as u64;
    file.read_exact_at(&mut bytes, offset)?;
    let entry = |chunk: &[u8]| {
        let mut eight = [0; size_of::<u64>()];
        eight.copy_from_slice(chunk);
        u64::from_ne_bytes(eight)
    };
    Ok(bytes.chunks_exact(size_of::<u64>()).map(entry).collect())
}

/// Forgets of this whole address space which pages were written since the last time (`clear_refs`, 4).
///
/// # Errors
/// Of `write`.
pub(crate) fn clear_soft_dirty() -> io::Result<()> {
    fs::write("/proc/self/clear_refs", "4")
}

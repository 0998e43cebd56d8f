//! The `HMM_DMIRROR_*` ioctls by address: both hsgpu and the kernel's own test_hmm answer them.

#![expect(
    unsafe_code,
    reason = "ioctl(2) is as unsafe as its command; each wrapper names the structure it passes"
)]

use std::os::fd::AsFd;

use hmmstorm_abi::uapi::{self, DmirrorCmd, PAGE_SIZE};
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl};

use super::memory::Mapping;
use super::vma::Vma;

/// Passes a command about pages `first..first + buffer.pages()` of `vma` that puts its answer into `buffer`.
fn command<const OPCODE: Opcode>(
    fd: impl AsFd,
    vma: &Vma,
    first: usize,
    buffer: &Mapping,
) -> io::Result<DmirrorCmd> {
    let mut command = DmirrorCmd {
        addr: vma.address(first),
        ptr: buffer.address(0),
        npages: buffer.pages() as u64,
        ..Default::default()
    };
    // SAFETY: all commands of this file take a `DmirrorCmd`.
    let call = unsafe { Updater::<OPCODE, DmirrorCmd>::new(&mut command) };
    // SAFETY: they store at most a page for each page of the range into `buffer`, which has as many; migration keeps the
    // contents of the range.
    unsafe { ioctl(fd, call) }?;
    Ok(command)
}

/// [`uapi::HMM_DMIRROR_MIGRATE_TO_DEV`]: pages to the device, which are read back into `buffer`.
///
/// # Errors
/// What the driver answers; `ENOENT` when some pages did not go.
pub(crate) fn to_device(fd: impl AsFd, vma: &Vma, first: usize, buffer: &Mapping) -> io::Result<DmirrorCmd> {
    command::<{ uapi::HMM_DMIRROR_MIGRATE_TO_DEV }>(fd, vma, first, buffer)
}

/// [`uapi::HMM_DMIRROR_MIGRATE_TO_SYS`].
///
/// # Errors
/// What the driver answers.
pub(crate) fn to_system(fd: impl AsFd, vma: &Vma, first: usize, buffer: &Mapping) -> io::Result<DmirrorCmd> {
    command::<{ uapi::HMM_DMIRROR_MIGRATE_TO_SYS }>(fd, vma, first, buffer)
}

/// [`uapi::HMM_DMIRROR_SNAPSHOT`]: one protection byte a page.
///
/// # Errors
/// What the driver answers.
pub(crate) fn snapshot(fd: impl AsFd, vma: &Vma, pages: usize) -> io::Result<Vec<u8>> {
    // The buffer must have as many pages as are asked about for `command`; the bytes fill the first of them.
    let buffer: Mapping = Mapping::private(pages)?;
    command::<{ uapi::HMM_DMIRROR_SNAPSHOT }>(fd, vma, 0, &buffer)?;
    let words = buffer.cells().iter().take(pages.div_ceil(size_of::<u64>()));
    let bytes = words.flat_map(|cell| cell.load(std::sync::atomic::Ordering::Relaxed).to_ne_bytes());
    debug_assert!(pages <= buffer.pages() * PAGE_SIZE);
    Ok(bytes.take(pages).collect())
}

//! Write protection by userfaultfd(2).

#![expect(
    unsafe_code,
    reason = "ioctl(2) is as unsafe as its command; each wrapper names the structure it passes"
)]

use std::os::fd::OwnedFd;

use hmmstorm_abi::uapi::PAGE_SIZE;
use rustix::io;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

use super::vma::Vma;

/// `struct uffdio_api` (include/uapi/linux/userfaultfd.h).
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    length: u64,
    mode: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const UFFDIO_WRITEPROTECT: Opcode = opcode::read_write::<WriteProtect>(0xaa, 0x06);
const MODE_WP: u64 = 1 << 1;
const PROTECT: u64 = 1 << 0;

/// Passes `value` with command `OPCODE`.
///
/// # Safety
/// `OPCODE` must take a `T`.
unsafe fn pass<const OPCODE: Opcode, T>(fd: &OwnedFd, value: &mut T) -> io::Result<()> {
    // SAFETY: the caller vouches for the pairing of opcode and type.
    let call = unsafe { Updater::<OPCODE, T>::new(value) };
    // SAFETY: as above; `value` lives across the call.
    unsafe { ioctl(fd, call) }
}

/// Write-protects every page of `vma` until the descriptor is closed. Nobody answers its messages: who writes, waits.
///
/// # Errors
/// Of `userfaultfd` and its ioctls; `EINVAL` for a kernel without write protection.
pub(crate) fn write_protect(vma: &Vma) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is used for write protection only, which changes no contents.
    let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }?;
    let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: UFFDIO_API takes a `uffdio_api`.
    unsafe { pass::<UFFDIO_API, _>(&fd, &mut api) }?;
    let (start, length) = (vma.address(0), (vma.pages() * PAGE_SIZE) as u64);
    let mut register = Register { start, length, mode: MODE_WP, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes a `uffdio_register`.
    unsafe { pass::<UFFDIO_REGISTER, _>(&fd, &mut register) }?;
    let mut protect = WriteProtect { start, length, mode: PROTECT };
    // SAFETY: UFFDIO_WRITEPROTECT takes a `uffdio_writeprotect`.
    unsafe { pass::<UFFDIO_WRITEPROTECT, _>(&fd, &mut protect) }?;
    Ok(fd)
}

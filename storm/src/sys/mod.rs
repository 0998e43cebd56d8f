//! The system calls that `rustix` does not offer in safe form. All of the storm's unsafe code is in this folder, behind
//! safe functions.

pub(crate) mod dmirror;
pub(crate) mod ioctl;
pub(crate) mod memory;
pub(crate) mod pagemap;
pub(crate) mod pin;
pub(crate) mod process;
pub(crate) mod uffd;
pub(crate) mod usage;
pub(crate) mod vfio;
pub(crate) mod vma;

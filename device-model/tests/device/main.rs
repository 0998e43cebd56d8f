//! Drives the device through the entry points that the transport uses, without QEMU.

mod bench;
mod bring_up;
mod chaos;
mod copies;
mod faults;
mod hostile;
mod jobs;
mod manual;
mod mmu;
mod paging;
mod process;
mod protocol;
mod races;
mod resets;
mod transport;
mod unmap;

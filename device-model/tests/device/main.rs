//! Drives the device through the entry points that the transport uses, without QEMU.

mod bench;
mod bring_up;
mod chaos;
mod copies;
mod hostile;
mod manual;
mod process;
mod protocol;
mod resets;
mod transport;
mod unmap;

// SPDX-License-Identifier: GPL-2.0

//! hsgpu: driver of the emulated hmmstorm GPU, whose memory is device-private memory of the kernel.

#[path = "../../abi/src/spec/mod.rs"]
#[expect(
    dead_code,
    reason = "the device and the storm use parts that the driver does not"
)]
#[expect(unreachable_pub, reason = "it is a crate of its own elsewhere")]
#[expect(
    clippy::incompatible_msrv,
    reason = "hmmstorm needs a newer compiler than the kernel"
)]
mod abi;

mod channel;
mod driver;
mod engine;
mod evict;
mod fence;
mod file;
mod gate;
mod gpu;
mod irq;
mod lru;
mod migrate;
mod mirror;
mod pagemap;
mod regs;
mod selftest;
mod stats;
mod uapi;
mod vram;

kernel::module_pci_driver! {
    type: driver::HsGpu,
    name: "hsgpu",
    authors: ["The hmmstorm developers"],
    description: "GPU of the hmmstorm test bench with device-private memory",
    license: "GPL v2",
}

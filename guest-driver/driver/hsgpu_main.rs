// SPDX-License-Identifier: GPL-2.0

//! hsgpu: driver of the emulated hmmstorm GPU, whose memory is device-private memory of the kernel.

use kernel::{
    c_str,
    driver::Registration,
    pci,
    prelude::*,
    InPlaceModule, //
};

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

mod access;
mod atomic;
mod channel;
mod compat;
mod driver;
mod engine;
mod evict;
mod exclusive;
mod fault;
mod fence;
mod file;
mod gate;
mod gpu;
mod hold;
mod irq;
mod job;
mod lose;
mod lru;
mod migrate;
mod mirror;
mod moving;
mod page_table;
mod pagemap;
mod peer;
mod peers;
mod policy;
mod refuse;
mod registry;
mod regs;
mod selftest;
mod serve;
mod snapshot;
mod space;
mod stats;
mod tables;
mod to_ram;
mod uapi;
mod view;
mod vram;

/// The module: the driver, and what its GPUs share.
#[pin_data]
struct HsGpuModule {
    #[pin]
    driver: Registration<pci::Adapter<driver::HsGpu>>,
}

impl InPlaceModule for HsGpuModule {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        // SAFETY: The module is initialised once, and there is no GPU yet.
        unsafe { peer::init() };

        try_pin_init!(Self {
            driver <- Registration::new(c_str!("hsgpu"), module),
        })
    }
}

module! {
    type: HsGpuModule,
    name: "hsgpu",
    authors: ["The hmmstorm developers"],
    description: "GPU of the hmmstorm test bench with device-private memory",
    license: "GPL v2",
    params: {
        coherent_mib: u32 {
            default: 0,
            description: "VRAM of each GPU, in MiB, that becomes coherent memory (needs BAR 2); the rest stays private",
        },
        fault_pages: u32 {
            default: 16,
            description: "Pages that a CPU fault on private memory brings back, naturally aligned: a power of two up to 512",
        },
    },
}

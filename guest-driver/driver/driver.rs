// SPDX-License-Identifier: GPL-2.0

//! The PCI driver: identification, BAR, and the order in which the parts come and go.

use kernel::{
    c_str,
    debugfs,
    device::Core,
    devres::Devres,
    dma::{
        Device as _,
        DmaMask, //
    },
    fmt,
    miscdevice::MiscDeviceRegistration,
    pci,
    prelude::*,
    str::CString,
    sync::Arc, //
};

use crate::{
    abi::pci::{
        BAR_REGS,
        DEVICE_ID,
        VENDOR_ID, //
    },
    file::{
        Node,
        OpenFile, //
    },
    gpu::Gpu,
    pagemap::VramPagemap,
    peer, //
};

/// A bound GPU.
#[pin_data]
pub(crate) struct HsGpu {
    /// `hsgpu<n>/stats` in debugfs.
    #[pin]
    stats: debugfs::File<Arc<Gpu>>,
    /// The device node; gone as soon as `unbind` has returned, before anything that it uses.
    _registration: Devres<MiscDeviceRegistration<OpenFile>>,
    node: Arc<Node>,
}

const VENDOR: pci::Vendor = pci::Vendor::REDHAT_QUMRANET;
const _: () = assert!(VENDOR.as_raw() == VENDOR_ID);

kernel::pci_device_table!(
    PCI_TABLE,
    MODULE_PCI_TABLE,
    <HsGpu as pci::Driver>::IdInfo,
    // CAST: widening, where `u32::from` is not `const`.
    [(pci::DeviceId::from_id(VENDOR, DEVICE_ID as u32), ())]
);

impl pci::Driver for HsGpu {
    type IdInfo = ();
    const ID_TABLE: pci::IdTable<Self::IdInfo> = &PCI_TABLE;

    fn probe(pdev: &pci::Device<Core>, _info: &Self::IdInfo) -> impl PinInit<Self, Error> {
        pin_init::pin_init_scope(move || {
            pdev.enable_device_mem()?;
            pdev.set_master();

            // SAFETY: The device is being probed: nobody else makes DMA allocations or mappings.
            unsafe { pdev.dma_set_mask_and_coherent(DmaMask::new::<64>())? };

            let bar = Arc::pin_init(
                pdev.iomap_region_sized(BAR_REGS, c_str!("hsgpu")),
                GFP_KERNEL,
            )
            .inspect_err(|_| dev_err!(pdev.as_ref(), "BAR 0 cannot be mapped\n"))?;
            let gpu = Gpu::new(pdev, bar)?;
            let pagemap = Devres::new(pdev.as_ref(), VramPagemap::new(pdev.as_ref(), gpu.clone()))
                .inspect_err(|_| dev_err!(pdev.as_ref(), "VRAM cannot be registered\n"))?;
            let node = Node::new(gpu.clone(), pagemap)?;
            let dir = debugfs::Dir::new(&CString::try_from_fmt(fmt!("hsgpu{}", gpu.index))?);
            let registration = Devres::new(pdev.as_ref(), node.clone().register()?)
                .inspect_err(|_| dev_err!(pdev.as_ref(), "no device node\n"))?;
            peer::add(&node);

            dev_info!(pdev.as_ref(), "{}, bound\n", &*gpu);

            Ok(try_pin_init!(Self {
                stats <- dir.read_callback_file(
                    c_str!("stats"),
                    Ok::<_, Error>(gpu),
                    &|gpu: &Arc<Gpu>, f: &mut fmt::Formatter<'_>| {
                        f.write_fmt(fmt!("{}", &*gpu.stats))
                    },
                ),
                _registration: registration,
                node,
            }))
        })
    }

    fn unbind(_pdev: &pci::Device<Core>, this: Pin<&Self>) {
        this.node.shut_down();
    }
}

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
    sizes::SZ_1M,
    str::CString,
    sync::Arc,
    uaccess::UserSliceReader, //
};

use crate::{
    abi::pci::{
        BAR_REGS,
        BAR_VRAM,
        DEVICE_ID,
        VENDOR_ID, //
    },
    file::{
        Node,
        OpenFile, //
    },
    gpu::Gpu,
    module_parameters,
    pagemap::VramPagemap,
    peer,
    to_ram::Around, //
};

/// A bound GPU.
#[pin_data]
pub(crate) struct HsGpu {
    /// `hsgpu<n>/fault_pages` in debugfs.
    #[pin]
    fault_pages: debugfs::File<Arc<Gpu>>,
    /// `hsgpu<n>/stats` in debugfs.
    #[pin]
    stats: debugfs::File<Arc<Gpu>>,
    /// The device nodes; gone as soon as `unbind` has returned, before anything that they use.
    _registrations: KVec<Devres<MiscDeviceRegistration<OpenFile>>>,
    nodes: KVec<Arc<Node>>,
}

/// The number that somebody wrote to a file.
///
/// # Errors
///
/// `EINVAL` if it is none; those of reading it.
fn number(reader: &mut UserSliceReader) -> Result<u32> {
    // Enough for 32 bits and a line's end.
    let mut text = [0; 12];
    let text = text.get_mut(..reader.len()).ok_or(EINVAL)?;

    reader.read_slice(text)?;
    let text = core::str::from_utf8(text).map_err(|_| EINVAL)?;
    text.trim().parse().map_err(|_| EINVAL)
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
            let coherent = u64::from(*module_parameters::coherent_mib.value());
            let around =
                Around::new(*module_parameters::fault_pages.value()).inspect_err(|_| {
                    dev_err!(
                        pdev.as_ref(),
                        "fault_pages must be a power of two up to 512\n"
                    )
                })?;
            // CAST: widening.
            let gpu = Gpu::new(pdev, bar, coherent * SZ_1M as u64, around)?;
            let nodes = nodes(pdev, &gpu)?;
            let dir = debugfs::Dir::new(&CString::try_from_fmt(fmt!("hsgpu{}", gpu.index))?);
            let mut registrations = KVec::with_capacity(nodes.len(), GFP_KERNEL)?;
            for node in &nodes {
                let registration = Devres::new(pdev.as_ref(), node.clone().register()?)
                    .inspect_err(|_| {
                        dev_err!(pdev.as_ref(), "no device node {}\n", node.number())
                    })?;

                registrations.push(registration, GFP_KERNEL)?;
            }
            if let Some(private) = nodes.first() {
                peer::add(private);
            }

            dev_info!(pdev.as_ref(), "{}, bound\n", &*gpu);

            Ok(try_pin_init!(Self {
                fault_pages <- dir.read_write_callback_file(
                    c_str!("fault_pages"),
                    Ok::<_, Error>(gpu.clone()),
                    &|gpu: &Arc<Gpu>, f: &mut fmt::Formatter<'_>| {
                        f.write_fmt(fmt!("{}\n", gpu.around.pages()))
                    },
                    &|gpu: &Arc<Gpu>, reader: &mut UserSliceReader| {
                        gpu.around.set(number(reader)?)
                    },
                ),
                stats <- dir.read_callback_file(
                    c_str!("stats"),
                    Ok::<_, Error>(gpu),
                    &|gpu: &Arc<Gpu>, f: &mut fmt::Formatter<'_>| {
                        f.write_fmt(fmt!("{}", &*gpu.stats))
                    },
                ),
                _registrations: registrations,
                nodes,
            }))
        })
    }

    fn unbind(_pdev: &pci::Device<Core>, this: Pin<&Self>) {
        for node in &this.nodes {
            node.shut_down();
        }
    }
}

/// Registers the memory of `gpu`: a node of its private memory, and one of its coherent memory if it has any.
fn nodes(pdev: &pci::Device<Core>, gpu: &Arc<Gpu>) -> Result<KVec<Arc<Node>>> {
    let dev = pdev.as_ref();
    let mut nodes = KVec::with_capacity(2, GFP_KERNEL)?;

    let private = Devres::new(dev, VramPagemap::private(dev, gpu.clone()))
        .inspect_err(|_| dev_err!(dev, "VRAM cannot be registered\n"))?;
    nodes.push(
        Node::new(gpu.clone(), private, gpu.private_node())?,
        GFP_KERNEL,
    )?;

    if gpu.coherent.pages() != 0 {
        let aperture = pdev.resource_start(BAR_VRAM)?;
        // SAFETY: `enable_device_mem()` has made the device decode the BAR, which goes on until it is unbound, when devres
        // has dropped the pagemap. The driver maps nothing of the BAR, and hands out the coherent part of the VRAM by this
        // pagemap alone.
        let coherent = unsafe { VramPagemap::coherent(dev, gpu.clone(), aperture) };
        let coherent = Devres::new(dev, coherent)
            .inspect_err(|_| dev_err!(dev, "coherent VRAM cannot be registered\n"))?;

        nodes.push(
            Node::new(gpu.clone(), coherent, gpu.coherent_node())?,
            GFP_KERNEL,
        )?;
    }
    Ok(nodes)
}

// SPDX-License-Identifier: GPL-2.0

//! The VRAM as memory of the kernel, in one or two parts.
//!
//! *Private* memory is the rule: only the GPU reaches it (`MEMORY_DEVICE_PRIVATE`). If the module is loaded with
//! `coherent_mib`, so much of the VRAM from offset 0 on becomes *coherent* memory: the CPU reaches it through BAR 2
//! (`MEMORY_DEVICE_COHERENT`).
//!
//! Page `i` of a part is the VRAM from the offset of the part plus `i * PAGE_SIZE` on. Who uses a page is known to three
//! parties, which this file keeps in step: the allocator ([`VramPart::vram`]) knows which pages may be handed out, the
//! pagemap abstraction which of them are in use by the kernel, and the kernel's reference counts when that ends.

use kernel::{
    c_str,
    device::{
        Bound,
        Device, //
    },
    io::PhysAddr,
    mm::pagemap::{
        CpuFault,
        DeviceMemory,
        DevicePage,
        DevicePageRef,
        FaultError,
        Kind,
        Owner,
        PagemapOps, //
    },
    prelude::*,
    sync::Arc, //
};

use crate::{
    abi::ring::Location,
    evict,
    gpu::{
        Gpu,
        Session, //
    },
    lose,
    peers,
    to_ram,
    vram::Vram, //
};

/// The pages of one part of a GPU's VRAM.
pub(crate) type VramPages = DeviceMemory<VramPart>;

/// What the pages need to know: whose memory they are, and which part of it.
pub(crate) struct VramPart {
    gpu: Arc<Gpu>,
    kind: Kind,
}

impl VramPart {
    /// The GPU whose memory this is.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The allocator of the part.
    pub(crate) fn vram(&self) -> &Vram {
        match self.kind {
            Kind::Private => &self.gpu.vram,
            Kind::Coherent => &self.gpu.coherent,
        }
    }
}

#[vtable]
impl PagemapOps for VramPart {
    fn folio_free(pages: &VramPages, index: usize, order: u32) {
        pages.data().vram().free(index, order);
    }

    fn migrate_to_ram(pages: &VramPages, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        to_ram::to_ram(pages, fault)
    }

    fn folio_split(pages: &VramPages, index: usize, order: u32) {
        // Its parts come back one by one, which the allocator is ready for at any time.
        if pages.data().vram().begins_chunk(index) && order == 0 {
            pages.data().gpu.stats.splits.inc();
        }
    }
}

/// One part of the VRAM of one GPU, registered with the kernel.
///
/// Dropping it waits for all pages, so it must have been emptied before, by [`VramPagemap::evict_all`].
#[pin_data]
pub(crate) struct VramPagemap {
    #[pin]
    pages: VramPages,
    /// Dropped after the pages: until then they may be in use.
    _peer: Option<peers::Registration>,
}

impl VramPagemap {
    /// Registers the private part of the VRAM of `gpu`.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for the page structures (64 bytes a page) or no free physical address space;
    /// `EINVAL` if the VRAM is no multiple of 2 MiB.
    pub(crate) fn private<'a>(
        dev: &'a Device<Bound>,
        gpu: Arc<Gpu>,
    ) -> impl PinInit<Self, Error> + 'a {
        pin_init::pin_init_scope(move || {
            let nr_pages = gpu.vram.pages();
            let part = VramPart {
                gpu,
                kind: Kind::Private,
            };

            dev_dbg!(dev, "registering {} private pages\n", nr_pages);
            Ok(try_pin_init!(Self {
                pages <- DeviceMemory::new(
                    c_str!("hsgpu VRAM"),
                    nr_pages,
                    Ok::<_, Error>(part),
                ),
                _peer: None,
            }))
        })
    }

    /// Registers the coherent part of the VRAM of `gpu`, whose BAR 2 begins at the physical address `aperture`.
    ///
    /// # Errors
    ///
    /// As [`VramPagemap::private`]; `EBUSY` if somebody else has the region; those of the kernel if its linear mapping
    /// does not reach so far.
    ///
    /// # Safety
    ///
    /// As long as the result exists, the device must decode the BAR at this address, and nobody may use the coherent part
    /// of the VRAM but by the pages of the result.
    pub(crate) unsafe fn coherent<'a>(
        dev: &'a Device<Bound>,
        gpu: Arc<Gpu>,
        aperture: PhysAddr,
    ) -> impl PinInit<Self, Error> + 'a {
        pin_init::pin_init_scope(move || {
            let nr_pages = gpu.coherent.pages();
            let index = gpu.index;
            let part = VramPart {
                gpu,
                kind: Kind::Coherent,
            };

            dev_dbg!(dev, "registering {} coherent pages\n", nr_pages);
            // SAFETY: The caller promises that the memory is there and not used otherwise. VRAM behind the BAR is mapped
            // into the guest as the RAM is, and the engines of the device see what the CPU writes and the other way round.
            let pages = unsafe {
                DeviceMemory::new_coherent(
                    c_str!("hsgpu coherent VRAM"),
                    aperture,
                    nr_pages,
                    Ok::<_, Error>(part),
                )
            };
            Ok(try_pin_init!(Self {
                pages <- pages,
                _peer: Some(peers::Registration::new(index, pages.first_pfn(), nr_pages)),
            }))
        })
    }

    /// The pages.
    pub(crate) fn pages(&self) -> &VramPages {
        &self.pages
    }

    /// Their allocator.
    pub(crate) fn vram(&self) -> &Vram {
        self.pages.data().vram()
    }

    /// The owner of the pages, as migrations and `hmm_range_fault()` know it.
    pub(crate) fn owner(&self) -> Owner {
        self.pages.owner()
    }

    /// 2^`order` free pages, as one folio, locked; [`None`] if there are none. Coherent memory has no huge folios.
    pub(crate) fn alloc(&self, order: u32) -> Option<DevicePage<'_, VramPart>> {
        if order != 0 && self.pages.kind() == Kind::Coherent {
            return None;
        }

        let index = self.vram().alloc_order(order)?;
        let page = self.pages.take_folio(index, order);

        if page.is_none() {
            // The allocator and the pagemap disagree. The page is in use, so it must not be handed out again.
            pr_err!(
                "gpu{}: page {} of VRAM, order {}, is free and in use at once; it is lost\n",
                self.pages.data().gpu.index,
                index,
                order
            );
        }
        page
    }

    /// Where a page is in the VRAM.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is not a page of this part.
    pub(crate) fn locate(&self, page: &DevicePageRef<'_>) -> Result<Location> {
        locate(&self.pages, page)
    }

    /// Where this GPU reaches a page of this part, or one of coherent memory of whatever GPU.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is none of these.
    pub(crate) fn reach(&self, page: &DevicePageRef<'_>) -> Result<Location> {
        self.locate(page)
            .or_else(|_| peers::locate(self.pages.data().gpu.index, page).ok_or(EINVAL))
    }

    /// Moves every page that is in use back to system memory.
    ///
    /// # Errors
    ///
    /// Those of [`evict::all`].
    pub(crate) fn evict_all(&self, session: &Session<'_>) -> Result {
        evict::all(session, self)
    }

    /// Moves every page that is in use off the device, for good: what cannot come back to system memory is lost.
    ///
    /// # Errors
    ///
    /// Those of [`lose::all`].
    pub(crate) fn give_up(&self, session: &Session<'_>) -> Result {
        lose::all(session, self)
    }

    /// The device uses the page now.
    pub(crate) fn touch(&self, page: &DevicePageRef<'_>) {
        if let Some(index) = self.pages.index_of(page) {
            self.vram().touch(index);
        }
    }
}

/// Where a page of `pages` is in the VRAM.
///
/// # Errors
///
/// `EINVAL` if it is not one of `pages`.
pub(crate) fn locate(pages: &VramPages, page: &DevicePageRef<'_>) -> Result<Location> {
    let index = pages.index_of(page).ok_or(EINVAL)?;

    Ok(Location::vram(pages.data().vram().offset(index)))
}

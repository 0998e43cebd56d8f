// SPDX-License-Identifier: GPL-2.0

//! The VRAM as device-private memory of the kernel.
//!
//! Page `i` of the pagemap is the VRAM from `i * PAGE_SIZE` on. Who uses a page is known to three parties, which this
//! file keeps in step: the allocator ([`Gpu::vram`]) knows which pages may be handed out, the pagemap abstraction which
//! of them are in use by the kernel, and the kernel's reference counts when that ends.

use kernel::{
    c_str,
    device::{
        Bound,
        Device, //
    },
    mm::pagemap::{
        CpuFault,
        DevicePage,
        DevicePageRef,
        DevicePrivate,
        FaultError,
        Owner,
        PagemapOps, //
    },
    prelude::*,
    sync::Arc, //
};

use crate::{
    abi::{
        ring::Location,
        uapi::PAGE_SIZE, //
    },
    evict,
    gpu::{
        Gpu,
        Session, //
    },
    migrate, //
};

/// The pages of a GPU's VRAM.
pub(crate) type VramPages = DevicePrivate<PrivateVram>;

/// What the pages need to know: whose memory they are.
pub(crate) struct PrivateVram {
    gpu: Arc<Gpu>,
}

impl PrivateVram {
    /// The GPU whose memory this is.
    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

#[vtable]
impl PagemapOps for PrivateVram {
    fn folio_free(pages: &VramPages, index: usize, order: u32) {
        pages.data().gpu.vram.free(index, order);
    }

    fn migrate_to_ram(pages: &VramPages, fault: &CpuFault<'_>) -> Result<(), FaultError> {
        migrate::to_ram(pages, fault)
    }
}

/// The VRAM of one GPU, registered with the kernel.
///
/// Dropping it waits for all pages, so it must have been emptied before, by [`VramPagemap::evict_all`].
#[pin_data]
pub(crate) struct VramPagemap {
    #[pin]
    pages: VramPages,
}

impl VramPagemap {
    /// Registers the whole VRAM of `gpu`.
    ///
    /// # Errors
    ///
    /// `ENOMEM` if there is no memory for the page structures (64 bytes a page) or no free physical address space;
    /// `EINVAL` if the VRAM is no multiple of 2 MiB. Both with a message.
    pub(crate) fn new<'a>(dev: &'a Device<Bound>, gpu: Arc<Gpu>) -> impl PinInit<Self, Error> + 'a {
        pin_init::pin_init_scope(move || {
            let nr_pages = gpu.vram.pages();

            dev_dbg!(dev, "registering {} pages of VRAM\n", nr_pages);
            Ok(try_pin_init!(Self {
                pages <- DevicePrivate::new(
                    c_str!("hsgpu VRAM"),
                    nr_pages,
                    Ok::<_, Error>(PrivateVram { gpu }),
                ),
            }))
        })
    }

    /// The pages.
    pub(crate) fn pages(&self) -> &VramPages {
        &self.pages
    }

    /// The owner of the pages, as migrations and `hmm_range_fault()` know it.
    pub(crate) fn owner(&self) -> Owner {
        self.pages.owner()
    }

    /// A free page of VRAM, locked; [`None`] if all are in use.
    pub(crate) fn alloc(&self) -> Option<DevicePage<'_, PrivateVram>> {
        let gpu = self.pages.data().gpu();
        let index = gpu.vram.alloc()?;
        let page = self.pages.take(index);

        if page.is_none() {
            // The allocator and the pagemap disagree. The page is in use, so it must not be handed out again.
            pr_err!(
                "gpu{}: page {} of VRAM is free and in use at once; it is lost\n",
                gpu.index,
                index
            );
        }
        page
    }

    /// Where a page is in the VRAM.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is not a page of this GPU.
    pub(crate) fn locate(&self, page: &DevicePageRef<'_>) -> Result<Location> {
        locate(&self.pages, page)
    }

    /// Moves every page that is in use back to system memory.
    ///
    /// # Errors
    ///
    /// Those of [`evict::all`].
    pub(crate) fn evict_all(&self, session: &Session<'_>) -> Result {
        evict::all(session, self)
    }

    /// The device uses the page now.
    pub(crate) fn touch(&self, page: &DevicePageRef<'_>) {
        if let Some(index) = self.pages.index_of(page) {
            self.pages.data().gpu().vram.touch(index);
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

    // CAST: `usize` has 64 bits.
    Ok(Location::vram((index * PAGE_SIZE) as u64))
}

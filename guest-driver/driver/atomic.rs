// SPDX-License-Identifier: GPL-2.0

//! Atomic operations of the GPU on memory that is not its own.
//!
//! Beyond its own VRAM an atomic operation of the GPU is a read and a write over PCIe, and nothing keeps others from the
//! word in between. So a page that stays in system memory, and on which a job wants to be atomic, is taken away from
//! everyone else first (`make_device_exclusive()`): the process finds a special entry in its page table, and whoever
//! touches the page brings about a notification, which takes it from the GPU before the access goes on.
//!
//! # What must not come between
//!
//! The page is exclusive and locked when it is entered in the GPU's page table. Its lock keeps away those who want to
//! give it back (a CPU that touches it, a migration, reclaim); but not who unmaps it. So the notifications of others are
//! counted, from a moment on at which none is under way, and if there was one the attempt is void. Those that this task
//! causes itself are no changes: they bring the page in (be it from a device, or from exclusive access before), and end
//! before the page is locked.

use kernel::{
    current,
    dma::DataDirection,
    mm::{
        exclusive::{
            make_exclusive,
            ExclusivePage, //
        },
        hmm::Memory,
        MmWithUser, //
    },
    prelude::*, //
};

use crate::{
    abi::{
        mmu::{
            Fault,
            Pte, //
        },
        ring::Location, //
    },
    page_table::SMALL,
    serve::{
        Server,
        PAGE, //
    },
    tables, //
};

/// Rights of the GPU in a page that nobody else accesses.
const RIGHTS: u64 = Pte::WRITE | Pte::ATOMIC;

impl Server<'_> {
    /// Gives the GPU the page of `fault` for itself, and enters it in the page table. Returns whether that went well; if
    /// not, something came between, and all begins again.
    ///
    /// # Errors
    ///
    /// `EFAULT` if there is nothing that can be written, `EOPNOTSUPP` if this is no anonymous memory, `EINTR`, `ENOMEM`,
    /// those of the DMA mapping.
    pub(crate) fn make_exclusive(&mut self, mm: &MmWithUser, fault: &Fault) -> Result<bool> {
        let space = self.space;
        let _making = space.making.lock();

        // This waits for changes that are under way. Later ones are counted.
        let before = match space.notifier.read_begin().lock() {
            Some(mut tables) => tables.watch(current!().pid()),
            None => return Ok(false),
        };
        let mmap = mm.mmap_read_lock();
        let owner = Some(self.pagemap.owner());
        let page = make_exclusive(&mmap, usize::try_from(fault.va)?, owner)?;
        let mut tables = space.notifier.lock();

        if tables.changes() != before || space.is_dead() {
            return Ok(false);
        }
        let pte = Pte::leaf(self.map_exclusive(&page)?, RIGHTS);

        tables.take(fault.va..fault.va + PAGE);
        match tables.enter(fault.va, SMALL, pte, &mut self.stash) {
            Ok(()) => {
                self.session.stats.exclusive.inc();
                Ok(true)
            }
            Err(error) => {
                tables::unmap(self.session, pte, SMALL);
                // A table is gone since somebody looked.
                if error == EAGAIN {
                    Ok(false)
                } else {
                    Err(error)
                }
            }
        }
    }

    /// Where the GPU reaches the page, mapped for DMA if need be.
    fn map_exclusive(&self, page: &ExclusivePage<'_>) -> Result<Location> {
        match page.memory() {
            Memory::Device(device) => self.pagemap.reach(&device),
            // SAFETY: `make_exclusive()` enters the mapping in the page table, or undoes it, with the notifier's state locked.
            // Leaves are taken in the notifier of their pages before it returns, and all of them when the space is killed,
            // which is before the notifier is dropped and before the driver unbinds.
            Memory::System(_) => unsafe {
                page.dma_map(self.session.device(), DataDirection::Bidirectional)
                    .map(Location::system)
            },
        }
    }
}

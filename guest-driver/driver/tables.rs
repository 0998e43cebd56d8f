// SPDX-License-Identifier: GPL-2.0

//! What the GPU can reach of a process: the page table of an address space, as the state of an MMU notifier.
//!
//! Whoever changes the CPU's page tables calls the notifier before. It takes the same range from the GPU's page table,
//! waits until the GPU has forgotten it, ends the DMA mappings, and only then returns: from that moment on the pages may
//! be freed or used for something else.
//!
//! That wait is for a fence, and has an end. The core may ask not to be made to wait (the OOM reaper does); then a range in
//! which something is mapped is refused, and it comes back later.
//!
//! Everything here runs under the notifier's mutex, and nothing here allocates.

use core::ops::Range;

use kernel::{
    current,
    device::{
        Bound,
        Device, //
    },
    dma::DataDirection,
    mm::{
        hmm,
        interval_notifier::{
            Event,
            Invalidate, //
        }, //
    },
    prelude::*,
    sync::Arc,
    task::Pid, //
};

use crate::{
    abi::{
        mmu::{
            Pte,
            Want,
            HUGE_SHIFT,
            PAGE_SHIFT,
            TABLE_ENTRIES, //
        },
        ring::{
            Aperture,
            Location, //
        }, //
    },
    compat::CoherentArray,
    gpu::{
        Gpu,
        Session, //
    },
    page_table::{
        Memory,
        PageTable,
        Stash,
        HUGE, //
    }, //
};

/// Memory of a table that the device reads by DMA.
pub(crate) struct Dma {
    entries: CoherentArray<u64>,
}

impl Dma {
    /// Allocates one, zeroed.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(dev: &Device<Bound>) -> Result<Self> {
        Ok(Self {
            entries: CoherentArray::new(dev, TABLE_ENTRIES)?,
        })
    }
}

impl Memory for Dma {
    fn read(&self, index: usize) -> Pte {
        // Nobody asks for an entry outside of the table.
        Pte(u64::from_le(self.entries.get(index).unwrap_or(0)))
    }

    fn write(&self, index: usize, pte: Pte) {
        let _ = self.entries.set(index, pte.0.to_le());
    }

    fn location(&self) -> Location {
        Location::system(self.entries.dma_handle())
    }
}

/// Order of the pages that a leaf of `level` maps.
pub(crate) const fn order_of(level: u32) -> u32 {
    if level == HUGE {
        HUGE_SHIFT - PAGE_SHIFT
    } else {
        0
    }
}

/// The direction in which memory behind a leaf is mapped for DMA.
pub(crate) fn direction_of(pte: Pte) -> DataDirection {
    if pte.0 & Pte::WRITE != 0 {
        DataDirection::Bidirectional
    } else {
        DataDirection::ToDevice
    }
}

/// Whether a leaf lets an access through.
pub(crate) fn allows(pte: Pte, want: Want) -> bool {
    pte.is_valid()
        && match want {
            Want::Read => true,
            Want::Write => pte.0 & Pte::WRITE != 0,
            Want::Atomic => pte.0 & Pte::ATOMIC != 0,
        }
}

/// The GPU's translations of one address space.
pub(crate) struct Tables {
    gpu: Arc<Gpu>,
    asid: u32,
    /// [`None`] once the space is closed: nothing can be mapped any more.
    table: Option<PageTable<Dma>>,
    /// Notifications so far, but for those that `watcher` caused.
    changes: u64,
    /// The last task that made a page exclusive here.
    watcher: Pid,
}

impl Tables {
    /// An empty page table for the address space `asid`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(session: &Session<'_>, gpu: Arc<Gpu>, asid: u32) -> Result<Self> {
        let table = PageTable::new(Dma::new(session.device())?)?;

        Ok(Self {
            gpu,
            asid,
            table: Some(table),
            changes: 0,
            watcher: 0,
        })
    }

    /// Where the root is.
    pub(crate) fn root(&self) -> Option<Location> {
        self.table.as_ref().map(PageTable::root)
    }

    /// Whether the page at `va` can be accessed as wanted.
    pub(crate) fn allows(&self, va: u64, want: Want) -> bool {
        self.get(va).is_some_and(|(pte, _)| allows(pte, want))
    }

    /// The leaf that translates `va`, and its level.
    pub(crate) fn get(&self, va: u64) -> Option<(Pte, u32)> {
        self.table.as_ref()?.get(va)
    }

    /// Whether a page at `va` can be mapped without another table.
    pub(crate) fn has_tables(&self, va: u64) -> bool {
        self.table
            .as_ref()
            .is_some_and(|table| table.has_tables(va))
    }

    /// Enters a leaf. Its place must have been taken away before if there was something.
    ///
    /// # Errors
    ///
    /// `ESRCH` if the space is closed, and those of [`PageTable::set`].
    pub(crate) fn enter(
        &mut self,
        va: u64,
        level: u32,
        pte: Pte,
        stash: &mut Stash<Dma>,
    ) -> Result {
        let table = self.table.as_mut().ok_or(ESRCH)?;

        table.set(va, level, pte, stash)?;
        self.gpu.stats.gpu_mapped.add(1 << order_of(level));
        if level == HUGE {
            self.gpu.stats.gpu_mapped_huge.inc();
        }
        Ok(())
    }

    /// Takes `range` from the GPU. When this returns, it does not touch a page of it any more.
    pub(crate) fn take(&mut self, range: Range<u64>) {
        let Some(table) = &mut self.table else {
            return;
        };
        let Some(hull) = table.clear(range) else {
            return;
        };
        let Ok(session) = self.gpu.enter_fault() else {
            // The gate closes after every space has been closed, so that there is no table any more.
            pr_err!("gpu{}: pages were mapped after the end\n", self.gpu.index);
            return;
        };

        session.invalidate(self.asid, &hull);
        table.reap(hull, |pte, level| {
            session.stats.gpu_unmapped.add(1 << order_of(level));
            unmap(&session, pte, level);
        });
    }

    /// From now on changes that the task `watcher` makes itself do not count. Returns [`Self::changes`].
    pub(crate) fn watch(&mut self, watcher: Pid) -> u64 {
        self.watcher = watcher;
        self.changes
    }

    /// How often others have changed the process's page tables.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Takes everything from the GPU, and frees the tables. The space must not be bound to them any more.
    pub(crate) fn close(&mut self) {
        self.table = None;
    }
}

/// Ends the DMA mapping behind a leaf that is not used any more.
pub(crate) fn unmap(session: &Session<'_>, pte: Pte, level: u32) {
    if let Some(Location {
        aperture: Aperture::System,
        address,
    }) = pte.location()
    {
        // SAFETY: The mapping was made by `Server` for this leaf, with the order of its level and the direction of
        // its rights. The TLB has been invalidated since the leaf was cleared, so the device does not use it any more;
        // and a leaf is reaped once.
        unsafe {
            hmm::dma_unmap(
                session.device(),
                address,
                order_of(level),
                direction_of(pte),
            )
        };
    }
}

impl Invalidate for Tables {
    fn invalidate(mut self: Pin<&mut Self>, range: Range<usize>, _event: Event) {
        if current!().pid() != self.watcher {
            self.changes += 1;
        }
        // CAST: `usize` has 64 bits.
        self.take(range.start as u64..range.end as u64);
    }

    fn would_wait(&self, range: Range<usize>) -> bool {
        // CAST: `usize` has 64 bits.
        self.table
            .as_ref()
            .is_some_and(|table| table.any(range.start as u64..range.end as u64))
    }
}

// SPDX-License-Identifier: GPL-2.0

//! The replayable fault buffer: from the interrupt to the address space that has to act.
//!
//! The device writes an entry for each page that a job misses, and interrupts. A work item drains the buffer in batches
//! and hands each fault to its [`Space`](crate::space::Space), which serves them on a work queue of its own, several
//! spaces at once. A synchronous device sends no interrupt: whoever wrote the doorbell or asked for the replay looks for
//! himself. So does everyone who waits for a job, in case an interrupt was lost.
//!
//! When the buffer is full, the device counts what it could not report, and interrupts. Those jobs stall like the others, and
//! report again after the next replay, of which there is one after each batch, and one if there was an overflow and nothing
//! to serve. A job whose report was lost without a word is found by who waits for it ([`crate::job`]).
//!
//! # Locks
//!
//! `ring` (mutex): the reader's side of the buffer. Under it nothing is allocated and nothing is waited for.

use core::cmp::Reverse;

use kernel::{
    device::{
        Bound,
        Device, //
    },
    impl_has_work,
    new_mutex,
    new_work,
    prelude::*,
    sync::{
        barrier::{
            dma_rmb,
            mb, //
        },
        Arc,
        Mutex, //
    },
    workqueue::{
        self,
        Work,
        WorkItem, //
    }, //
};

use crate::{
    abi::mmu::{
        Fault,
        FAULT_ORDER_MAX,
        FAULT_ORDER_MIN,
        FAULT_SHADOW_EVENT,
        FAULT_SHADOW_GET,
        FAULT_SHADOW_OVERFLOW,
        FAULT_SHADOW_PUT, //
    },
    compat::CoherentArray,
    gpu::{
        Gpu,
        Session, //
    },
    regs::Regs,
    stats::Stats,
};

/// Log2 of the entries of the buffer.
const ORDER: u32 = 8;
/// Entries of the buffer.
pub(crate) const ENTRIES: usize = 1 << ORDER;
/// Words of the shadow page.
const SHADOW_WORDS: usize = 4096 / size_of::<u32>();
/// Faults that are taken from the buffer at once.
const BATCH: usize = 64;

const _: () = assert!(ORDER >= FAULT_ORDER_MIN && ORDER <= FAULT_ORDER_MAX);

/// The reader's side.
struct Reader {
    /// Free-running index of the next entry to read.
    get: u32,
    /// Overflows that have been counted.
    overflowed: u32,
}

/// The fault buffer of one GPU.
#[pin_data]
pub(crate) struct FaultBuffer {
    entries: CoherentArray<[u64; 4]>,
    shadow: CoherentArray<u32>,
    stats: Arc<Stats>,
    #[pin]
    reader: Mutex<Reader>,
    /// The GPU, from [`FaultBuffer::start`] to [`FaultBuffer::stop`]: a cycle that the latter breaks.
    #[pin]
    gpu: Mutex<Option<Arc<Gpu>>>,
    #[pin]
    work: Work<FaultBuffer>,
}

impl_has_work! {
    impl HasWork<Self> for FaultBuffer { self.work }
}

impl WorkItem for FaultBuffer {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let Some(gpu) = this.gpu.lock().clone() else {
            return;
        };
        let session = gpu.enter_fault();

        // Once the gate is closed, no job is left that could have faulted.
        if let Ok(session) = &session {
            this.dispatch(session);
        }
    }
}

impl FaultBuffer {
    /// Allocates the buffer. The device does not use it before [`FaultBuffer::enable`].
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(dev: &Device<Bound>, stats: Arc<Stats>) -> Result<Arc<Self>> {
        let entries = CoherentArray::new(dev, ENTRIES)?;
        let shadow = CoherentArray::new(dev, SHADOW_WORDS)?;

        Arc::pin_init(
            pin_init!(Self {
                entries,
                shadow,
                stats,
                reader <- new_mutex!(
                    Reader {
                        get: 0,
                        overflowed: 0,
                    },
                    "hsgpu::fault::reader"
                ),
                gpu <- new_mutex!(None, "hsgpu::fault::gpu"),
                work <- new_work!("hsgpu::fault"),
            }),
            GFP_KERNEL,
        )
    }

    /// Tells the device to use the buffer.
    ///
    /// # Errors
    ///
    /// `EIO` if it does not.
    pub(crate) fn enable(&self, regs: Regs<'_>) -> Result {
        regs.enable_faults(self.entries.dma_handle(), ORDER, self.shadow.dma_handle())
    }

    /// From now on faults of `gpu` are served.
    pub(crate) fn start(&self, gpu: Arc<Gpu>) {
        *self.gpu.lock() = Some(gpu);
    }

    /// From now on none are.
    pub(crate) fn stop(&self) {
        let gpu = self.gpu.lock().take();

        drop(gpu);
    }

    /// The interrupt of the buffer. Takes no lock.
    pub(crate) fn interrupt(self: &Arc<Self>) {
        self.stats.interrupts.inc();
        // If it is queued already, it has not begun to look.
        let _ = workqueue::system_unbound().enqueue(self.clone());
    }

    fn shadow(&self, offset: usize) -> u32 {
        // The offsets are in the page.
        u32::from_le(self.shadow.get(offset / size_of::<u32>()).unwrap_or(0))
    }

    fn set_shadow(&self, offset: usize, value: u32) {
        let _ = self.shadow.set(offset / size_of::<u32>(), value.to_le());
    }

    /// Takes up to `batch.capacity()` entries that are there, and gives their places back to the device. Returns whether
    /// faults have found the buffer full since the last time.
    fn drain(&self, batch: &mut KVec<Fault>) -> bool {
        batch.clear();

        let mut reader = self.reader.lock();
        let overflowed = self.shadow(FAULT_SHADOW_OVERFLOW);
        let overflows = overflowed.wrapping_sub(reader.overflowed);
        self.stats.fault_overflows.add(u64::from(overflows));
        reader.overflowed = overflowed;

        let put = self.shadow(FAULT_SHADOW_PUT);
        // The entries must be read after the index that covers them.
        dma_rmb();
        while reader.get != put && batch.len() < batch.capacity() {
            // CAST: less than the number of entries.
            let index = reader.get as usize % ENTRIES;
            let words = self.entries.get(index).unwrap_or([0; 4]);

            reader.get = reader.get.wrapping_add(1);
            match Fault::from_words(words.map(u64::from_le)) {
                // There is room.
                Some(fault) => drop(batch.push_within_capacity(fault)),
                None => pr_warn!("a fault buffer entry is not understood: {:x?}\n", words),
            }
        }
        // And the places may only be used again once they have been read.
        mb();
        self.set_shadow(FAULT_SHADOW_GET, reader.get);
        // The next one interrupts. Whether there was one meanwhile, `dispatch` sees by looking again.
        self.set_shadow(FAULT_SHADOW_EVENT, reader.get);
        mb();
        overflows != 0
    }

    /// Whether there are entries that nobody has taken, or overflows that nobody has seen.
    pub(crate) fn is_pending(&self) -> bool {
        self.shadow(FAULT_SHADOW_PUT) != self.shadow(FAULT_SHADOW_GET)
            || self.shadow(FAULT_SHADOW_OVERFLOW) != self.reader.lock().overflowed
    }

    /// Hands every fault that is there to its address space.
    pub(crate) fn dispatch(&self, session: &Session<'_>) {
        let Ok(mut batch) = KVec::with_capacity(BATCH, GFP_KERNEL) else {
            // Whoever waits for a job will look again.
            return;
        };

        loop {
            let overflowed = self.drain(&mut batch);
            if batch.is_empty() {
                if overflowed {
                    // There is room now, and no batch after which a replay would come anyway.
                    session.ask_replay();
                }
                return;
            }
            // CAST: at most `BATCH`.
            self.stats.gpu_faults.add(batch.len() as u64);
            arrange(&mut batch);
            for faults in batch.chunk_by(|a, b| a.asid == b.asid) {
                let asid = faults.first().map_or(0, |fault| usize::from(fault.asid));

                match session.space(asid) {
                    Some(space) => space.push(session, faults),
                    // A space is there until its last job has ended.
                    None => faults
                        .iter()
                        .for_each(|fault| session.regs().cancel_fault(fault.sequence)),
                }
            }
        }
    }
}

/// Sorts by address space and address; of the faults on one page, the one that wants most comes first.
///
/// Neighbours share a walk of the page tables and a migration, and what wants less is satisfied with what wants more. Two
/// of the same kind stay two, since each has a number by which it may have to be cancelled.
fn arrange(faults: &mut [Fault]) {
    faults
        .sort_unstable_by_key(|fault| (fault.asid, fault.va, Reverse(fault.want), fault.sequence));
}

#[kunit_tests(hsgpu_fault)]
mod tests {
    use super::*;
    use crate::abi::mmu::{
        Reason,
        Want, //
    };

    fn fault(asid: u16, va: u64, want: Want, sequence: u32) -> Fault {
        Fault {
            va,
            sequence,
            asid,
            want,
            reason: Reason::NotPresent,
            channel: 4,
        }
    }

    #[test]
    fn faults_are_arranged_by_space_address_and_want() {
        let expected = [
            fault(0, 0x1000, Want::Read, 9),
            fault(1, 0x1000, Want::Atomic, 3),
            fault(1, 0x1000, Want::Write, 1),
            fault(1, 0x1000, Want::Read, 2),
            fault(1, 0x1000, Want::Read, 7),
            fault(1, 0x3000, Want::Write, 4),
        ];
        let mut faults = expected;

        faults.reverse();
        arrange(&mut faults);
        assert_eq!(faults, expected);
        faults.swap(0, 4);
        faults.swap(1, 3);
        arrange(&mut faults);
        assert_eq!(faults, expected);
    }

    #[test]
    fn spaces_are_served_one_after_the_other() {
        let mut faults = [
            fault(2, 0, Want::Read, 1),
            fault(1, 0, Want::Read, 2),
            fault(2, 0x1000, Want::Read, 3),
            fault(1, 0x1000, Want::Read, 4),
        ];

        arrange(&mut faults);
        let mut spaces = faults
            .chunk_by(|a, b| a.asid == b.asid)
            .map(|faults| (faults[0].asid, faults.len()));
        assert_eq!(spaces.next(), Some((1, 2)));
        assert_eq!(spaces.next(), Some((2, 2)));
        assert_eq!(spaces.next(), None);
    }
}

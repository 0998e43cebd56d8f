// SPDX-License-Identifier: GPL-2.0

//! What access jobs share of a GPU: the numbers of address spaces, and the channels that run jobs.

use core::ops::Range;

use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        CondVar,
        Mutex, //
    }, //
};

use crate::{
    abi::{
        job::{
            Job,
            Outcome, //
        },
        mmu::ADDRESS_SPACES, //
    },
    channel::{
        Failure,
        Patience, //
    },
    gpu::Session,
    space::Space, //
};

/// Which numbers are taken, and by whom.
struct Table {
    /// A set bit is a number that is taken.
    taken: u64,
    spaces: KVec<Option<Arc<Space>>>,
}

const _: () = assert!(ADDRESS_SPACES <= u64::BITS as usize);

/// The address spaces of a GPU by their numbers.
///
/// The lock is innermost: nothing is taken, allocated or waited for under it.
#[pin_data]
pub(crate) struct Spaces {
    #[pin]
    table: Mutex<Table>,
}

impl Spaces {
    /// `count` numbers, all free.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(count: usize) -> Result<impl PinInit<Self>> {
        let mut spaces = KVec::with_capacity(count, GFP_KERNEL)?;

        for _ in 0..count {
            spaces.push(None, GFP_KERNEL)?;
        }
        Ok(pin_init!(Self {
            table <- new_mutex!(Table { taken: 0, spaces }, "hsgpu::registry::spaces"),
        }))
    }

    /// Takes a free number.
    ///
    /// # Errors
    ///
    /// `ENOSPC` if there is none.
    pub(crate) fn reserve(&self) -> Result<Reserved<'_>> {
        let mut table = self.table.lock();
        // CAST: at most 64.
        let asid = table.taken.trailing_ones() as usize;

        if asid >= table.spaces.len() {
            return Err(ENOSPC);
        }
        table.taken |= 1 << asid;
        Ok(Reserved {
            spaces: self,
            asid,
            filled: false,
        })
    }

    /// The space with the number `asid`.
    pub(crate) fn get(&self, asid: usize) -> Option<Arc<Space>> {
        self.table.lock().spaces.get(asid)?.clone()
    }

    /// Frees a number.
    pub(crate) fn release(&self, asid: u32) {
        // CAST: `usize` has 64 bits.
        let space = {
            let mut table = self.table.lock();

            table.taken &= !(1 << asid);
            table.spaces.get_mut(asid as usize).and_then(Option::take)
        };

        // Not with the lock held: it may be the last reference.
        drop(space);
    }
}

/// A number that is taken, and free again if nothing comes of it.
pub(crate) struct Reserved<'a> {
    spaces: &'a Spaces,
    asid: usize,
    filled: bool,
}

impl Reserved<'_> {
    /// The number.
    pub(crate) fn asid(&self) -> u32 {
        // CAST: less than `ADDRESS_SPACES`.
        self.asid as u32
    }

    /// From now on it is that of `space`, until it is released.
    pub(crate) fn fill(&mut self, space: Arc<Space>) {
        let mut table = self.spaces.table.lock();

        if let Some(slot) = table.spaces.get_mut(self.asid) {
            *slot = Some(space);
            self.filled = true;
        }
    }
}

impl Drop for Reserved<'_> {
    fn drop(&mut self) {
        if !self.filled {
            self.spaces.release(self.asid());
        }
    }
}

/// The channels that run access jobs. Each runs one at a time, so that no job waits for the page faults of another.
///
/// The lock is innermost.
#[pin_data]
pub(crate) struct JobChannels {
    /// A set bit is a free channel.
    #[pin]
    free: Mutex<u32>,
    #[pin]
    freed: CondVar,
}

impl JobChannels {
    /// The channels with these numbers.
    pub(crate) fn new(channels: Range<usize>) -> impl PinInit<Self> {
        let free = channels.fold(0u32, |free, index| {
            free | 1u32
                .checked_shl(u32::try_from(index).unwrap_or(u32::MAX))
                .unwrap_or(0)
        });

        pin_init!(Self {
            free <- new_mutex!(free, "hsgpu::registry::channels"),
            freed <- new_condvar!("hsgpu::registry::freed"),
        })
    }

    /// Wakes everyone who waits for a channel, to look whether he still wants one.
    pub(crate) fn wake(&self) {
        // With the lock, so that nobody is between looking and sleeping.
        let _free = self.free.lock();

        self.freed.notify_all();
    }
}

/// A channel for one job.
pub(crate) struct JobChannel<'a> {
    channels: &'a JobChannels,
    index: usize,
}

impl JobChannel<'_> {
    /// Its number.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// Whether its job waits for a page fault to be served. Reads a register.
    pub(crate) fn is_stalled(&self, session: &Session<'_>) -> bool {
        session
            .regs()
            .channel(self.index)
            .is_ok_and(|regs| regs.status().is_stalled())
    }

    /// Runs `job` in address space `asid` to its end.
    pub(crate) fn run(
        &self,
        session: &Session<'_>,
        asid: u32,
        job: &Job,
        patience: &mut Patience<'_>,
    ) -> (Result<(), Failure>, Outcome) {
        let (Some(channel), Ok(regs)) = (
            session.channels().get(self.index),
            session.regs().channel(self.index),
        ) else {
            return (Err(Failure::Dead), Outcome::default());
        };

        channel.job().run_access(regs, asid, job, patience)
    }
}

impl Drop for JobChannel<'_> {
    fn drop(&mut self) {
        *self.channels.free.lock() |= 1 << self.index;
        self.channels.freed.notify_one();
    }
}

impl Session<'_> {
    /// A channel for a job; sleeps until one is free, or `stop` is true.
    ///
    /// # Errors
    ///
    /// `ESRCH` if `stop` is.
    pub(crate) fn job_channel(&self, stop: impl Fn() -> bool) -> Result<JobChannel<'_>> {
        let channels = &self.job_channels;
        let mut free = channels.free.lock();

        loop {
            if stop() {
                return Err(ESRCH);
            }
            if *free != 0 {
                break;
            }
            channels.freed.wait(&mut free);
        }
        // CAST: at most 31.
        let index = free.trailing_zeros() as usize;
        *free &= *free - 1;
        drop(free);
        Ok(JobChannel { channels, index })
    }
}

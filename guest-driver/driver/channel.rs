// SPDX-License-Identifier: GPL-2.0

//! One channel: its descriptor ring, and the jobs in flight on it.
//!
//! A job is one descriptor with a fence. It owns a *slot* of the channel from [`Channel::job`] on: a fence slot, a
//! scatter list, and what its waiter sleeps on. There are fewer slots than ring entries, so that the ring never
//! overflows, and whoever wants a slot waits for a job to end, which is bounded by [`LIMIT`].
//!
//! # Waiting
//!
//! A slot is *armed* with the fence value it waits for before the descriptor is published. Whoever takes that value
//! back (a compare-and-exchange, so exactly one does) ends the wait: the interrupt handler that saw the fence, a
//! reset that aborts the job, or the waiter itself, which looks at the fence for [`SPIN`] before it sleeps, and then
//! every [`STEP_MS`] in case the interrupt was lost. Only the first two complete the completion, and the waiter does not
//! leave before they have, so that it can be used again. The device raises an interrupt only for a waiter that sleeps:
//! one that has looked long enough asks for it in its fence slot, and looks once more.
//!
//! # Locks
//!
//! `ring` (mutex): the tail and all register writes of the channel; held while a channel is reset. `free` (spinlock):
//! which slots are free. They are not nested in each other. The interrupt handler takes none.

use kernel::{
    device::{
        Bound,
        Device, //
    },
    new_condvar,
    new_mutex,
    new_spinlock,
    prelude::*,
    processor::cpu_relax,
    sync::{
        aref::ARef,
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        barrier::{
            dma_wmb,
            mb, //
        },
        Arc,
        Completion,
        CondVar,
        Mutex,
        SpinLock, //
    },
    time::{
        msecs_to_jiffies,
        Delta,
        Instant,
        Jiffies,
        Monotonic, //
    }, //
};

use crate::{
    abi::job::{
        self,
        Outcome,
        JOB_SIZE,
        OUTCOME_SIZE, //
    },
    abi::ring::{
        needs_doorbell,
        Descriptor,
        Location,
        Opcode,
        SgEntry,
        Status,
        FLAG_IRQ,
        RING_ORDER_MAX,
        RING_ORDER_MIN,
        SG_ENTRIES_MAX,
        SG_ENTRY_SIZE,
        SHADOW_EVENT,
        SHADOW_TAIL, //
    },
    compat::CoherentArray,
    fence::Fences,
    regs::ChannelRegs,
    stats::{
        Counter,
        Stats, //
    }, //
};

/// Jobs that can be in flight on a channel.
const SLOTS: usize = 16;
/// Entries of the scatter list of a slot: a 2 MiB migration of 4 KiB pages.
pub(crate) const LIST_ENTRIES: usize = 512;

/// All slots, as a set.
const ALL_FREE: u32 = u32::MAX >> (32 - SLOTS);

const RING_ORDER: u32 = 6;
const RING_ENTRIES: u32 = 1 << RING_ORDER;
/// The entry of a scatter list in whose place an access job's outcome is.
const OUTCOME_ENTRY: usize = JOB_SIZE / SG_ENTRY_SIZE;
/// Words of the shadow page.
const SHADOW_WORDS: usize = 4096 / size_of::<u32>();

const _: () = {
    assert!(RING_ORDER >= RING_ORDER_MIN && RING_ORDER <= RING_ORDER_MAX);
    assert!(SLOTS < RING_ENTRIES as usize);
    assert!(SLOTS <= u32::BITS as usize);
    assert!(LIST_ENTRIES <= SG_ENTRIES_MAX as usize);
    assert!(OUTCOME_ENTRY * SG_ENTRY_SIZE + OUTCOME_SIZE <= LIST_ENTRIES * SG_ENTRY_SIZE);
};

/// How often a waiter looks at its fence without an interrupt, in milliseconds.
const STEP_MS: u32 = 100;
/// For how long a waiter looks at its fence before it sleeps.
const SPIN: Delta = Delta::from_micros(50);
/// After how long a job has failed, in milliseconds; less than the kernel's hung-task limit.
pub(crate) const LIMIT_MS: u32 = 10_000;
/// Log lines about failed jobs of one GPU.
const MESSAGES: u64 = 32;

/// How a waiter waits.
pub(crate) struct Patience<'a> {
    /// How often it looks at its fence without an interrupt, in milliseconds.
    pub(crate) step_ms: u32,
    /// After how long without progress the job has failed, in milliseconds.
    pub(crate) limit_ms: u32,
    /// Called when it has looked in vain. Returns whether there was progress, or somebody works on it: then the time begins
    /// anew.
    pub(crate) watch: &'a mut dyn FnMut() -> bool,
}

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The device says so; with a code that this driver does not know, `None`.
    Device(Option<Status>),
    /// No fence within the limit. The channel was reset.
    Timeout,
    /// The channel was reset because of another job, or the device aborted it; it may be tried again.
    Aborted,
    /// The device does not answer any more.
    Dead,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Device(_) | Failure::Aborted => EIO,
            Failure::Timeout => ETIMEDOUT,
            Failure::Dead => ENODEV,
        }
    }
}

/// What a waiter sleeps on.
#[pin_data]
struct Slot {
    /// The fence value waited for; 0 if the slot is not armed.
    armed: Atomic<u64>,
    /// 1 if a reset took the job's fence value, else 0. Written before `done` is completed, read after.
    aborted: Atomic<u32>,
    #[pin]
    done: Completion,
}

/// The ring and its shadow page. Written only by who holds the lock of the [`Ring`].
struct RingMemory {
    entries: CoherentArray<[u64; 8]>,
    shadow: CoherentArray<u32>,
}

/// The producer's side of the ring.
struct Ring {
    /// Free-running index of the next entry.
    tail: u32,
    /// Fence value of the last job.
    sequence: u64,
    /// The device does not answer, or would not stop.
    dead: bool,
}

/// A channel.
#[pin_data]
pub(crate) struct Channel {
    dev: ARef<Device>,
    index: usize,
    synchronous: bool,
    stats: Arc<Stats>,
    /// Interrupts of this channel.
    interrupts: Counter,
    fences: Fences,
    lists: KVec<CoherentArray<[u64; 4]>>,
    slots: KVec<Pin<KBox<Slot>>>,
    memory: RingMemory,
    #[pin]
    ring: Mutex<Ring>,
    /// A set bit is a free slot.
    #[pin]
    free: SpinLock<u32>,
    #[pin]
    freed: CondVar,
}

impl Channel {
    /// Allocates channel `index`. It does not run before [`Channel::start`].
    pub(crate) fn new(
        dev: &Device<Bound>,
        index: usize,
        synchronous: bool,
        stats: Arc<Stats>,
    ) -> Result<Arc<Self>> {
        let mut lists = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;

        for _ in 0..SLOTS {
            lists.push(CoherentArray::new(dev, LIST_ENTRIES)?, GFP_KERNEL)?;
            slots.push(
                KBox::pin_init(
                    pin_init!(Slot {
                        armed: Atomic::new(0),
                        aborted: Atomic::new(0),
                        done <- Completion::new(),
                    }),
                    GFP_KERNEL,
                )?,
                GFP_KERNEL,
            )?;
        }

        let memory = RingMemory {
            entries: CoherentArray::new(dev, usize::try_from(RING_ENTRIES)?)?,
            shadow: CoherentArray::new(dev, SHADOW_WORDS)?,
        };
        let ring = Ring {
            tail: 0,
            sequence: 0,
            dead: true,
        };
        let fences = Fences::new(dev, SLOTS)?;

        Arc::pin_init(
            pin_init!(Self {
                dev: dev.into(),
                index,
                synchronous,
                stats,
                interrupts: Counter::new(),
                fences,
                lists,
                slots,
                memory,
                ring <- new_mutex!(ring, "hsgpu::channel::ring"),
                free <- new_spinlock!(ALL_FREE, "hsgpu::channel::free"),
                freed <- new_condvar!("hsgpu::channel::freed"),
            }),
            GFP_KERNEL,
        )
    }

    /// Resets and starts the channel.
    ///
    /// # Errors
    ///
    /// `EIO` if the device does not do as it is told.
    pub(crate) fn start(&self, regs: ChannelRegs<'_>) -> Result {
        self.ring.lock().restart(&self.memory, regs)
    }

    /// Interrupts taken so far.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupts.get()
    }

    /// Whether nobody has a job on it at the moment.
    pub(crate) fn is_idle(&self) -> bool {
        *self.free.lock() == ALL_FREE
    }

    /// Takes a slot for a job; sleeps until one is free.
    pub(crate) fn job(&self) -> Job<'_> {
        let mut free = self.free.lock();

        while *free == 0 {
            self.freed.wait(&mut free);
        }
        // CAST: at most 31.
        let slot = free.trailing_zeros() as usize;
        *free &= *free - 1;
        Job {
            channel: self,
            slot,
            entries: 0,
        }
    }

    /// The interrupt of the channel: ends the wait of every job whose fence is there. Takes no lock.
    pub(crate) fn interrupt(&self) {
        self.stats.interrupts.inc();
        self.interrupts.inc();
        for (index, slot) in self.slots.iter().enumerate() {
            let value = slot.armed.load(Acquire);

            if value != 0
                && self.fences.poll(index, value).is_some()
                && slot.armed.cmpxchg(value, 0, Full).is_ok()
            {
                slot.done.complete_all();
            }
        }
    }

    /// Puts `descriptor` with a fence in the ring. Returns the fence value.
    fn publish(
        &self,
        regs: ChannelRegs<'_>,
        index: usize,
        slot: &Slot,
        descriptor: Descriptor,
    ) -> Result<u64, Failure> {
        let fence = self
            .fences
            .dma_address(index)
            .map_err(|_| Failure::Device(None))?;
        let mut ring = self.ring.lock();

        if ring.dead {
            return Err(Failure::Dead);
        }
        ring.sequence += 1;
        let value = ring.sequence;
        slot.aborted.store(0, Relaxed);
        slot.done.reinit();
        self.fences.disarm(index);
        // Armed under the lock: a reset finds every job that is in the ring.
        slot.armed.store(value, Release);

        let descriptor = if self.synchronous {
            descriptor.with_fence(fence, value, false)
        } else if descriptor.flags & FLAG_IRQ != 0 {
            // Whoever wants the interrupt whether somebody sleeps or not.
            descriptor.with_fence(fence, value, true)
        } else {
            descriptor.with_armed_fence(fence, value)
        };
        let bell = ring.push(&self.memory, descriptor);
        self.stats.submitted.inc();
        if let Some(tail) = bell {
            self.stats.doorbells.inc();
            // A synchronous device works while this write lasts. Keeping the lock, everyone's fence is in memory
            // when they have it; a threaded device only wakes up, and others may publish meanwhile.
            if !self.synchronous {
                drop(ring);
            }
            regs.doorbell(tail);
        }
        Ok(value)
    }

    /// Waits for the job that asked for `value` in the slot `index`.
    fn wait(
        &self,
        regs: ChannelRegs<'_>,
        index: usize,
        slot: &Slot,
        value: u64,
        patience: &mut Patience<'_>,
    ) -> Result<(), Failure> {
        let step: Jiffies = msecs_to_jiffies(patience.step_ms);
        let mut waited_ms = 0;

        // A short job is over before a sleep would have begun.
        let start = Instant::<Monotonic>::now();
        while self.fences.poll(index, value).is_none() && start.elapsed() < SPIN {
            cpu_relax();
        }
        if self.fences.poll(index, value).is_none() {
            self.fences.arm(index);
        }
        loop {
            if let Some(status) = self.fences.poll(index, value) {
                self.disarm(slot, value);
                return match status {
                    Ok(Status::Ok) => Ok(()),
                    Ok(Status::Aborted) => Err(Failure::Aborted),
                    Ok(status) => Err(Failure::Device(Some(status))),
                    Err(_) => Err(Failure::Device(None)),
                };
            }
            if slot.armed.load(Acquire) == 0 {
                // Taken without a fence, so by a reset, which writes `aborted` before it completes.
                slot.done.wait_for_completion();
                if slot.aborted.load(Relaxed) != 0 {
                    return Err(Failure::Aborted);
                }
                continue;
            }
            if (patience.watch)() {
                waited_ms = 0;
                if self.fences.poll(index, value).is_some() {
                    continue;
                }
            }
            if waited_ms >= patience.limit_ms {
                return self.give_up(regs, index, slot, value);
            }
            // The fence is looked at in either case.
            if slot.done.wait_for_completion_timeout(step).is_err() {
                waited_ms += patience.step_ms;
                // A device that was pulled out will not become any better.
                if regs.status().is_dead() {
                    return self.give_up(regs, index, slot, value);
                }
            }
        }
    }

    /// Ends the wait for `value`, so that nobody touches the slot any more.
    fn disarm(&self, slot: &Slot, value: u64) {
        if slot.armed.cmpxchg(value, 0, Full).is_err() {
            slot.done.wait_for_completion();
        }
    }

    /// Resets the channel, whose job did not end; aborts all other jobs.
    fn give_up(
        &self,
        regs: ChannelRegs<'_>,
        index: usize,
        slot: &Slot,
        value: u64,
    ) -> Result<(), Failure> {
        let mut ring = self.ring.lock();

        // Another job may have reset the channel while we waited for the lock.
        if slot.armed.cmpxchg(value, 0, Full).is_err() {
            slot.done.wait_for_completion();
            drop(ring);
            return match self.fences.poll(index, value) {
                Some(Ok(Status::Ok)) => Ok(()),
                _ => Err(Failure::Aborted),
            };
        }

        let status = regs.status();
        dev_err!(
            &self.dev,
            "channel {}: no fence {} (status {}); resetting the channel\n",
            self.index,
            value,
            status
        );
        let restarted = ring.restart(&self.memory, regs);
        self.abort_all();
        match restarted {
            Ok(()) => Err(Failure::Timeout),
            Err(error) => {
                dev_err!(
                    &self.dev,
                    "channel {}: does not come back ({:?}); it is not used any more\n",
                    self.index,
                    error
                );
                Err(Failure::Dead)
            }
        }
    }
}

impl Channel {
    /// Ends the wait of every job in flight. The channel must have been reset, with its ring locked.
    fn abort_all(&self) {
        for slot in self.slots.iter() {
            let value = slot.armed.load(Acquire);

            if value != 0 {
                slot.aborted.store(1, Relaxed);
                if slot.armed.cmpxchg(value, 0, Full).is_ok() {
                    slot.done.complete_all();
                }
            }
        }
    }

    /// Stops the channel for good: jobs in flight are aborted, later ones fail with [`Failure::Dead`].
    pub(crate) fn abandon(&self, regs: ChannelRegs<'_>) {
        let mut ring = self.ring.lock();

        ring.dead = true;
        if regs.reset().is_err() {
            dev_err!(&self.dev, "channel {}: does not stop\n", self.index);
        }
        self.abort_all();
    }
}

impl Ring {
    /// Resets and starts the channel, with an empty ring.
    fn restart(&mut self, memory: &RingMemory, regs: ChannelRegs<'_>) -> Result {
        self.dead = true;
        regs.reset()?;
        for word in 0..SHADOW_WORDS {
            memory.shadow.set(word, 0)?;
        }
        self.tail = 0;
        regs.enable(
            memory.entries.dma_handle(),
            RING_ORDER,
            memory.shadow.dma_handle(),
        )?;
        self.dead = false;
        Ok(())
    }

    /// Writes a descriptor and publishes it. Returns the new tail if the device sleeps and must be woken with it.
    fn push(&mut self, memory: &RingMemory, descriptor: Descriptor) -> Option<u32> {
        let words = descriptor.to_words().map(u64::to_le);
        let old = self.tail;
        let new = old.wrapping_add(1);
        let entry = entry_of(old);

        // The entry is in the ring, and the two words in the shadow page: none of the accesses can fail.
        let _ = memory.entries.set(entry, words);
        dma_wmb();
        let _ = memory
            .shadow
            .set(SHADOW_TAIL / size_of::<u32>(), new.to_le());
        self.tail = new;
        // The tail must be visible before the event index is read: the device does the same the other way round.
        mb();
        let event = memory
            .shadow
            .get(SHADOW_EVENT / size_of::<u32>())
            .unwrap_or(old.to_le());

        needs_doorbell(u32::from_le(event), new, old).then_some(new)
    }
}

/// The ring entry of a free-running index.
const fn entry_of(index: u32) -> usize {
    // CAST: less than the number of entries.
    (index % RING_ENTRIES) as usize
}

/// A job that is being put together: exclusive use of a slot.
pub(crate) struct Job<'a> {
    channel: &'a Channel,
    slot: usize,
    entries: u32,
}

impl Job<'_> {
    /// Entries in the scatter list so far.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// Whether the scatter list has no room left.
    pub(crate) fn is_full(&self) -> bool {
        // CAST: a small constant.
        self.entries >= LIST_ENTRIES as u32
    }

    /// Appends to the scatter list.
    ///
    /// # Errors
    ///
    /// `EINVAL` if it is full.
    pub(crate) fn push(&mut self, entry: SgEntry) -> Result {
        let list = self.channel.lists.get(self.slot).ok_or(EINVAL)?;
        let at = usize::try_from(self.entries)?;

        list.set(at, entry.to_words().map(u64::to_le))?;
        self.entries += 1;
        Ok(())
    }

    /// Runs the scatter list, and empties it.
    pub(crate) fn run_list(&mut self, regs: ChannelRegs<'_>) -> Result<(), Failure> {
        let list = self
            .channel
            .lists
            .get(self.slot)
            .ok_or(Failure::Device(None))?;
        let descriptor = Descriptor::copy_list(list.dma_handle(), self.entries);

        let result = self.run(regs, descriptor);
        // A list that was aborted can be run again.
        if result != Err(Failure::Aborted) {
            self.entries = 0;
        }
        result
    }

    /// Runs one descriptor and waits for its end. When this returns, the device touches nothing of the job any more.
    pub(crate) fn run(
        &mut self,
        regs: ChannelRegs<'_>,
        descriptor: Descriptor,
    ) -> Result<(), Failure> {
        let mut patience = Patience {
            step_ms: STEP_MS,
            limit_ms: LIMIT_MS,
            watch: &mut || false,
        };

        self.run_with(regs, descriptor, &mut patience)
    }

    /// Runs an access job in address space `asid`, and waits for its end. Its outcome is what it had got to, also if it
    /// failed.
    pub(crate) fn run_access(
        &mut self,
        regs: ChannelRegs<'_>,
        asid: u32,
        job: &job::Job,
        patience: &mut Patience<'_>,
    ) -> (Result<(), Failure>, Outcome) {
        let Some(list) = self.channel.lists.get(self.slot) else {
            return (Err(Failure::Device(None)), Outcome::default());
        };
        // The slot's scatter list is not in use: the job and its outcome take the first entries.
        let [a, b, c, d, e, f, g, h] = job.to_words().map(u64::to_le);
        for (index, words) in [[a, b, c, d], [e, f, g, h], [0; 4], [0; 4]]
            .into_iter()
            .enumerate()
        {
            let _ = list.set(index, words);
        }

        let descriptor = Descriptor {
            opcode: Opcode::Access,
            count: asid,
            src: Location::system(list.dma_handle()),
            ..Descriptor::NOP
        };
        let result = self.run_with(regs, descriptor, patience);

        let mut words = [0; 8];
        for (index, half) in words.chunks_mut(4).enumerate() {
            let found = list.get(OUTCOME_ENTRY + index).unwrap_or_default();

            half.copy_from_slice(&found.map(u64::from_le));
        }
        (result, Outcome::from_words(words))
    }

    fn run_with(
        &mut self,
        regs: ChannelRegs<'_>,
        descriptor: Descriptor,
        patience: &mut Patience<'_>,
    ) -> Result<(), Failure> {
        let channel = self.channel;
        let slot = channel.slots.get(self.slot).ok_or(Failure::Device(None))?;

        let result = channel
            .publish(regs, self.slot, slot, descriptor)
            .and_then(|value| channel.wait(regs, self.slot, slot, value, patience));
        channel.stats.fences.inc();
        if let Err(failure) = result {
            channel.stats.fences_failed.inc();
            if channel.stats.fences_failed.get() <= MESSAGES {
                dev_warn!(
                    &channel.dev,
                    "channel {}: {:?} failed: {:?}\n",
                    channel.index,
                    descriptor.opcode,
                    failure
                );
            }
        }
        result
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        *self.channel.free.lock() |= 1 << self.slot;
        self.channel.freed.notify_one();
    }
}

#[kunit_tests(hsgpu_channel)]
mod tests {
    use super::*;

    #[test]
    fn entries_follow_the_index_through_its_wrap() {
        let mut index = u32::MAX - 2 * RING_ENTRIES;

        for _ in 0..4 * RING_ENTRIES {
            let next = index.wrapping_add(1);

            assert_eq!(
                entry_of(next),
                (entry_of(index) + 1) % RING_ENTRIES as usize
            );
            index = next;
        }
    }

    #[test]
    fn doorbell_rings_once_when_the_tail_passes_the_event() {
        // Asleep at 5: the publication of entry 5 wakes, later ones need not.
        assert!(needs_doorbell(5, 6, 5));
        assert!(!needs_doorbell(5, 7, 6));
        // Awake, and the event index lies behind.
        assert!(!needs_doorbell(u32::MAX, 6, 5));
        // Through the wrap.
        assert!(needs_doorbell(u32::MAX, 0, u32::MAX));
    }
}

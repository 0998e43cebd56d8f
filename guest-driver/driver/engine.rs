// SPDX-License-Identifier: GPL-2.0

//! The copy engine: moves memory between system RAM, this GPU's VRAM and the VRAM of its peers.
//!
//! Callers hold folio locks, `mmap_lock` for reading and the notifier mutex, and may come from reclaim. So nothing here
//! allocates, touches user memory or waits without an end.

use core::ops::Range;

use kernel::{
    prelude::*,
    sync::Arc,
    workqueue::OwnedQueue, //
};

use crate::{
    abi::{
        ring::{
            Descriptor,
            Location,
            Opcode,
            SgEntry, //
        },
        uapi::PAGE_SIZE, //
    },
    channel::{
        Channel,
        Failure,
        Job, //
    },
    fault::FaultBuffer,
    gpu::Session,
    irq,
    regs::ChannelRegs, //
};

/// What a copy is for. Each has channels of its own, so that a CPU fault never queues behind a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A CPU waits for the page.
    Fault,
    /// Moving ranges to and from the device.
    Migrate,
    /// Loads and stores on behalf of the device.
    Access,
}

/// A piece of memory to move.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    /// Where from.
    pub(crate) src: Location,
    /// Where to.
    pub(crate) dst: Location,
    /// Length in bytes.
    pub(crate) length: u32,
}

/// How often work is tried again that was aborted because of another's.
const ATTEMPTS: usize = 3;

/// Channels, from the first on, that serve copies and fills and the driver's own commands. The others run access jobs.
pub(crate) const COPY_CHANNELS: usize = 4;

/// How often a command of the driver's own is tried that the device reports as failed.
const COMMAND_ATTEMPTS: usize = 8;

/// What must not outlive the binding of the driver. Dropped in this order.
pub(crate) struct Hardware {
    /// Freed before the channels and the buffer that the handlers use.
    #[expect(dead_code, reason = "held for its drop")]
    pub(crate) irqs: irq::Registrations,
    /// Where access jobs wait for their end.
    pub(crate) jobs: OwnedQueue,
    /// Where page faults of the GPU are served. High priority, as jobs stand still meanwhile.
    pub(crate) service: OwnedQueue,
    pub(crate) channels: KVec<Arc<Channel>>,
    pub(crate) faults: Arc<FaultBuffer>,
}

impl Session<'_> {
    /// Moves all segments, in order, and returns when they are in place.
    ///
    /// Neighbours in memory are merged, and all of them are one descriptor as long as 512 scatter-list entries suffice.
    /// Sleeps without being interruptible, at most for some time limits of the channel; does not allocate.
    ///
    /// # Errors
    ///
    /// `EIO` if the device reports that a copy failed, `ETIMEDOUT` if it did not end and the channel was reset, `ENODEV`
    /// if the device is dead. The contents of all destinations are undefined then, but nothing touches them any more.
    pub(crate) fn copy(&self, work: Work, segments: &[Segment]) -> Result {
        let (channel, regs) = self.channel_for(work)?;
        let mut batch = Batch::new(channel.job(), regs);
        let mut bytes = 0;

        for segment in segments {
            bytes += u64::from(segment.length);
            batch.push(SgEntry {
                src: segment.src,
                dst: segment.dst,
                length: segment.length,
            })?;
        }
        batch.finish()?;
        self.stats.copied.add(bytes);
        Ok(())
    }

    /// Fills `length` bytes (a multiple of 8) at `dst` with the 64-bit `pattern`.
    ///
    /// # Errors
    ///
    /// As [`Session::copy`].
    pub(crate) fn fill(&self, work: Work, dst: Location, length: u64, pattern: u64) -> Result {
        let (channel, regs) = self.channel_for(work)?;
        let mut job = channel.job();

        again(|| job.run(regs, Descriptor::fill(dst, length, pattern)))?;
        self.stats.copied.add(length);
        Ok(())
    }

    /// Makes the GPU forget its translations of `range` in address space `asid`. When this returns, no access made with
    /// one of them is under way: the pages may change hands.
    ///
    /// Called from MMU notifiers, so there is no way to fail. If the device does not do it, the channels of access jobs
    /// are stopped for good: then nothing uses a translation any more.
    pub(crate) fn invalidate(&self, asid: u32, range: &Range<u64>) {
        let descriptor = Descriptor {
            opcode: Opcode::Invalidate,
            count: asid,
            dst: Location::system(range.start),
            length: range.end - range.start,
            ..Descriptor::NOP
        };

        self.stats.tlb_invalidations.inc();
        if self.command(descriptor).is_err() {
            self.wedge("the TLB cannot be invalidated");
        }
    }

    /// Binds address space `asid` to the page table at `root`, or to none.
    ///
    /// # Errors
    ///
    /// As [`Session::copy`].
    pub(crate) fn bind(&self, asid: u32, root: Option<Location>) -> Result {
        self.command(Descriptor {
            opcode: Opcode::Bind,
            count: asid,
            src: root.unwrap_or(Location::system(0)),
            // CAST: a small constant.
            length: if root.is_some() { PAGE_SIZE as u64 } else { 0 },
            ..Descriptor::NOP
        })
    }

    /// Runs a command that may be repeated, until it succeeds or has failed too often. Like a CPU fault, it never queues
    /// behind a migration.
    fn command(&self, descriptor: Descriptor) -> Result {
        let (channel, regs) = self.channel_for(Work::Fault)?;
        let mut job = channel.job();
        let mut result = Err(Failure::Dead);

        for _ in 0..COMMAND_ATTEMPTS {
            result = job.run(regs, descriptor);
            match result {
                Ok(()) | Err(Failure::Dead) => break,
                Err(_) => (),
            }
        }
        Ok(result?)
    }

    /// Stops every channel that runs access jobs, for good.
    fn wedge(&self, why: &str) {
        if !self.set_wedged() {
            return;
        }
        dev_err!(self.device(), "{}; no access jobs any more\n", why);
        for (index, channel) in self.channels().iter().enumerate().skip(COPY_CHANNELS) {
            if let Ok(regs) = self.regs().channel(index) {
                channel.abandon(regs);
            }
        }
    }

    /// The channel for `work`. Of four channels, CPU faults have two and the others one each; with fewer, they share.
    fn channel_for(&self, work: Work) -> Result<(&Channel, ChannelRegs<'_>)> {
        let channels = self.channels();
        let count = channels.len().min(COPY_CHANNELS);
        // Faults that come one after the other go to the same channel, which is awake then, and needs no doorbell.
        let turn = match channels
            .iter()
            .take(2)
            .position(|channel| channel.is_idle())
        {
            Some(idle) => idle,
            None => usize::try_from(self.turn())?,
        };
        let index = channel_for(work, count, turn);

        Ok((
            channels.get(index).ok_or(ENODEV)?,
            self.regs().channel(index)?,
        ))
    }
}

/// The index of the channel, of `count`, that serves `work`.
fn channel_for(work: Work, count: usize, turn: usize) -> usize {
    match (work, count) {
        (_, 0 | 1) => 0,
        (Work::Fault, 2 | 3) => 0,
        (Work::Fault, _) => turn % (count - 2),
        (Work::Migrate, 2) => 1,
        (Work::Migrate, _) => count - 2,
        (Work::Access, _) => count - 1,
    }
}

/// Collects segments in a job's scatter list, and runs it when it is full.
struct Batch<'a> {
    job: Job<'a>,
    regs: ChannelRegs<'a>,
    /// The last segment, which may still grow.
    last: Option<SgEntry>,
}

impl<'a> Batch<'a> {
    fn new(job: Job<'a>, regs: ChannelRegs<'a>) -> Self {
        Self {
            job,
            regs,
            last: None,
        }
    }

    fn push(&mut self, entry: SgEntry) -> Result {
        if let Some(last) = &mut self.last {
            if merge(last, &entry) {
                return Ok(());
            }
        }
        match self.last.replace(entry) {
            Some(done) => self.list(done),
            None => Ok(()),
        }
    }

    /// Adds an entry that does not grow any more to the list.
    fn list(&mut self, entry: SgEntry) -> Result {
        if self.job.is_full() {
            self.run_list()?;
        }
        self.job.push(entry)
    }

    /// Runs what was collected.
    fn flush(&mut self) -> Result {
        match self.last.take() {
            // One entry needs no list, and one fetch less by the device.
            Some(only) if self.job.entries() == 0 => {
                self.run(Descriptor::copy(only.src, only.dst, u64::from(only.length)))
            }
            Some(last) => {
                self.list(last)?;
                self.run_list()
            }
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result {
        self.flush()
    }

    fn run_list(&mut self) -> Result {
        let regs = self.regs;

        again(|| self.job.run_list(regs))
    }

    fn run(&mut self, descriptor: Descriptor) -> Result {
        let regs = self.regs;

        again(|| self.job.run(regs, descriptor))
    }
}

/// Tries work again that was aborted because of another's: copies may be repeated.
fn again(mut run: impl FnMut() -> Result<(), Failure>) -> Result {
    for _ in 1..ATTEMPTS {
        match run() {
            Err(Failure::Aborted) => (),
            result => return Ok(result?),
        }
    }
    Ok(run()?)
}

/// Lets `last` grow by `next`, if that follows it in source and destination.
fn merge(last: &mut SgEntry, next: &SgEntry) -> bool {
    let follows = |before: Location, after: Location| {
        before.aperture == after.aperture
            && before.address.checked_add(u64::from(last.length)) == Some(after.address)
    };

    if !follows(last.src, next.src) || !follows(last.dst, next.dst) {
        return false;
    }
    // The device reads both sides of a merged entry as one range each; ranges of different kinds never meet.
    match last.length.checked_add(next.length) {
        Some(length) => {
            last.length = length;
            true
        }
        None => false,
    }
}

#[kunit_tests(hsgpu_engine)]
mod tests {
    use super::*;
    use crate::abi::ring::Aperture;

    fn entry(src: u64, dst: u64, length: u32) -> SgEntry {
        SgEntry {
            src: Location::system(src),
            dst: Location::vram(dst),
            length,
        }
    }

    #[test]
    fn neighbours_merge_if_both_sides_continue() {
        let mut last = entry(0x1000, 0x8000, 0x1000);

        assert!(merge(&mut last, &entry(0x2000, 0x9000, 0x1000)));
        assert_eq!(last, entry(0x1000, 0x8000, 0x2000));
        assert!(!merge(&mut last, &entry(0x3000, 0xb000, 0x1000)));
        assert!(!merge(&mut last, &entry(0x4000, 0xa000, 0x1000)));
        let mut other = entry(0x3000, 0xa000, 0x1000);
        other.src.aperture = Aperture::Peer(0);
        assert!(!merge(&mut last, &other));
        assert_eq!(last, entry(0x1000, 0x8000, 0x2000));
    }

    #[test]
    fn merging_does_not_overflow_the_length() {
        let mut last = entry(0, 0, 0xffff_f000);

        assert!(!merge(&mut last, &entry(0xffff_f000, 0xffff_f000, 0x1000)));
        let mut last = entry(u64::MAX - 0xfff, 0, 0x1000);
        assert!(!merge(&mut last, &entry(0, 0x1000, 0x1000)));
    }

    #[test]
    fn every_kind_of_work_has_a_channel_and_faults_their_own() {
        for count in 1..8 {
            for turn in 0..8 {
                let fault = channel_for(Work::Fault, count, turn);
                let migrate = channel_for(Work::Migrate, count, turn);
                let access = channel_for(Work::Access, count, turn);

                assert!(fault < count && migrate < count && access < count);
                assert!(count < 2 || (fault != migrate && fault != access));
                assert!(count < 3 || migrate != access);
            }
        }
    }

    #[test]
    fn aborted_work_is_tried_again_and_failed_work_is_not() {
        let mut runs = 0;
        assert!(again(|| {
            runs += 1;
            if runs < ATTEMPTS {
                Err(Failure::Aborted)
            } else {
                Ok(())
            }
        })
        .is_ok());
        assert_eq!(runs, ATTEMPTS);

        let mut runs = 0;
        assert!(again(|| {
            runs += 1;
            Err(Failure::Timeout)
        })
        .is_err());
        assert_eq!(runs, 1);
    }
}

// SPDX-License-Identifier: GPL-2.0

//! An address space of the GPU: the process of an open file, as access jobs see it.
//!
//! A space has a number (ASID), a page table ([`crate::tables`]), a policy ([`crate::policy`]), jobs ([`crate::job`]) and
//! page faults that wait to be served ([`crate::serve`]). It is made when a file is used for the first job and lives
//! until the file is closed or the driver unbinds, whatever is first.
//!
//! # The end of a space
//!
//! [`Space::kill`] takes everything from the GPU and lets no fault be served any more: whatever a job touches, it
//! faults, and the fault is cancelled. So every job ends, and those that do not are ended by their time limit, which
//! resets the channel. Then the GPU forgets the page table, and it is freed.
//!
//! # Locks
//!
//! The order is that of [`crate::gpu`]. `making` (mutex) is outside of `mmap_lock`. `jobs` and `steering` (mutexes) and `pending` (spinlock) are innermost: nothing
//! is taken, allocated or waited for under them but `changed`.

use kernel::{
    fs::File,
    impl_has_work,
    mm::{
        interval_notifier::IntervalNotifier,
        MmWithUser, //
    },
    new_mutex,
    new_poll_condvar,
    new_spinlock,
    new_work,
    page::PAGE_MASK,
    prelude::*,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Full,
            Relaxed,
            Release, //
        },
        poll::{
            PollCondVar,
            PollTable, //
        },
        Arc,
        Mutex,
        SpinLock, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

use crate::{
    abi::{
        mmu::Fault,
        uapi, //
    },
    engine::COPY_CHANNELS,
    fault::ENTRIES,
    file::Node,
    gpu::Session,
    job::Jobs,
    page_table::VA_END,
    policy::{
        History,
        Policy, //
    },
    serve::Server,
    tables::Tables, //
};

/// `EPOLLIN | EPOLLRDNORM` of `include/uapi/linux/eventpoll.h`.
const POLL_READABLE: u32 = 0x1 | 0x40;

/// Where faults lead.
pub(crate) struct Steering {
    pub(crate) policy: Policy,
    pub(crate) history: History,
}

/// An address space of a GPU.
#[pin_data]
pub(crate) struct Space {
    pub(crate) node: Arc<Node>,
    pub(crate) asid: u32,
    #[pin]
    pub(crate) notifier: IntervalNotifier<Tables>,
    /// Held while a page is made exclusive: one does so at a time.
    #[pin]
    pub(crate) making: Mutex<()>,
    #[pin]
    pub(crate) steering: Mutex<Steering>,
    #[pin]
    pub(crate) jobs: Mutex<Jobs>,
    /// Notified when a job has ended.
    #[pin]
    pub(crate) changed: PollCondVar,
    /// Faults that nobody serves yet. As many as the buffer has are enough: what does not fit is reported again.
    #[pin]
    pending: SpinLock<KVec<Fault>>,
    #[pin]
    work: Work<Space>,
    /// Batches of faults that were served, for those who wait for a job.
    pub(crate) progress: Atomic<u64>,
    /// How many serve faults of this space now: its jobs wait for them, and not for the device.
    pub(crate) serving: Atomic<u32>,
    /// How many callers serve the faults of this space themselves.
    pub(crate) direct: Atomic<u32>,
    /// A set bit is a channel whose job is to end at its next fault.
    pub(crate) ending: Atomic<u32>,
    dead: Atomic<u32>,
}

impl_has_work! {
    impl HasWork<Self> for Space { self.work }
}

impl WorkItem for Space {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // Once the gate is closed, the space is dead, and its jobs have ended.
        if let Ok(session) = this.node.gpu.enter_fault() {
            this.service(&session);
        }
    }
}

impl Space {
    /// Makes an address space of the GPU for `mm`, and binds it.
    ///
    /// # Errors
    ///
    /// `ENXIO` if the GPU has no channel for jobs, `ENOSPC` if all of its address spaces are in use, `ENOMEM`, those
    /// of the channel.
    pub(crate) fn open(
        node: &Arc<Node>,
        session: &Session<'_>,
        mm: &MmWithUser,
    ) -> Result<Arc<Self>> {
        if session.channels().len() <= COPY_CHANNELS {
            return Err(ENXIO);
        }

        let mut reserved = session.spaces().reserve()?;
        let asid = reserved.asid();
        let tables = Tables::new(session, node.gpu.clone(), asid)?;
        let root = tables.root();
        let steering = Steering {
            policy: Policy::DEFAULT,
            history: History::new()?,
        };
        let jobs = Jobs::new()?;
        let pending = KVec::with_capacity(ENTRIES, GFP_KERNEL)?;

        let space = Arc::pin_init(
            try_pin_init!(Self {
                node: node.clone(),
                asid,
                making <- new_mutex!((), "hsgpu::space::making"),
                steering <- new_mutex!(steering, "hsgpu::space::steering"),
                jobs <- new_mutex!(jobs, "hsgpu::space::jobs"),
                changed <- new_poll_condvar!("hsgpu::space::changed"),
                pending <- new_spinlock!(pending, "hsgpu::space::pending"),
                work <- new_work!("hsgpu::space::work"),
                progress: Atomic::new(0),
                serving: Atomic::new(0),
                direct: Atomic::new(0),
                ending: Atomic::new(0),
                dead: Atomic::new(0),
                notifier <- IntervalNotifier::register(
                    mm,
                    0..usize::MAX & PAGE_MASK,
                    new_mutex!(tables, "hsgpu::space::tables"),
                ),
            }),
            GFP_KERNEL,
        )?;

        session.bind(asid, root)?;
        reserved.fill(space.clone());
        Ok(space)
    }

    /// Whether the space has come to its end.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Acquire) != 0
    }

    /// Sets the policy.
    ///
    /// # Errors
    ///
    /// `EINVAL` if there is no such policy.
    pub(crate) fn set_policy(&self, asked: &uapi::Policy) -> Result {
        let policy = Policy::new(asked)?;

        self.steering.lock().policy = policy;
        Ok(())
    }

    /// Takes charge of `faults`. If nobody in particular waits for them, a worker serves them.
    pub(crate) fn push(self: &Arc<Self>, session: &Session<'_>, faults: &[Fault]) {
        {
            let mut pending = self.pending.lock();

            for fault in faults {
                // What there is no room for is reported again.
                if pending.push_within_capacity(*fault).is_err() {
                    break;
                }
            }
        }
        self.hand_over(session);
    }

    /// Has a worker serve what is pending, if nobody in particular does.
    pub(crate) fn hand_over(self: &Arc<Self>, session: &Session<'_>) {
        // A full barrier between the change of one and the look at the other.
        let direct = self.direct.fetch_add(0, Full);

        if direct == 0 && !self.pending.lock().is_empty() {
            // If it is queued already, it has not begun to look.
            let _ = session.service_queue().enqueue(self.clone());
        }
    }

    /// Serves faults until none is left. Returns whether there were any.
    pub(crate) fn service(&self, session: &Session<'_>) -> bool {
        let mut served = false;
        let Ok(mut server) = Server::new(self, session) else {
            // Without memory nothing can be served, but jobs must not be left alone with their faults either.
            return self.cancel_all(session);
        };

        loop {
            server.batch.clear();
            {
                let mut pending = self.pending.lock();

                while let Some(fault) = pending.pop() {
                    if server.batch.push_within_capacity(fault).is_err() {
                        break;
                    }
                }
            }
            if server.batch.is_empty() {
                return served;
            }
            // They were popped from the end.
            server.batch.reverse();
            self.serving.fetch_add(1, Full);
            server.serve_batch();
            self.serving.fetch_add(u32::MAX, Full);
            self.replay(session);
            served = true;
        }
    }

    /// Gives up every fault that is pending. Returns whether there were any.
    fn cancel_all(&self, session: &Session<'_>) -> bool {
        let mut any = false;

        loop {
            let fault = self.pending.lock().pop();
            let Some(fault) = fault else {
                break;
            };
            session.stats.gpu_faults_failed.inc();
            session.regs().cancel_fault(fault.sequence);
            any = true;
        }
        if any {
            self.replay(session);
        }
        any
    }

    fn replay(&self, session: &Session<'_>) {
        session.ask_replay();
        self.progress.fetch_add(1, Relaxed);
    }

    /// Serves `poll()`: readable when a job has ended that was not waited for.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.changed);
        if self.jobs.lock().any_ended() {
            POLL_READABLE
        } else {
            0
        }
    }

    /// Ends every job, and takes everything from the GPU. No job can be submitted any more. May be called more than once.
    pub(crate) fn kill(&self, session: &Session<'_>) {
        self.dead.store(1, Release);
        self.notifier.lock().take(0..VA_END);
        // Those that came before `dead` was set.
        self.service(session);
        // Those that wait for a channel need none any more.
        session.job_channels.wake();
        {
            let mut jobs = self.jobs.lock();

            while jobs.running() != 0 {
                self.changed.wait(&mut jobs);
            }
        }
        if session.bind(self.asid, None).is_err() {
            // No job uses the space any more, and its number is not given away again.
            dev_warn!(
                session.device(),
                "address space {} cannot be unbound\n",
                self.asid
            );
        }
        let mut tables = self.notifier.lock();
        // A service that was under way when the space died may have mapped something.
        tables.take(0..VA_END);
        tables.close();
    }

    /// The file is closed: [`Space::kill`], and its number is free.
    pub(crate) fn close(&self) {
        // An unbind has killed every space before it closes this gate.
        if let Ok(session) = self.node.gpu.enter_fault() {
            self.kill(&session);
        }
        self.jobs.lock().clear();
        self.node.gpu.spaces.release(self.asid);
    }
}

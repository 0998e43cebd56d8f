// SPDX-License-Identifier: GPL-2.0

//! Access jobs of user space: submitted, run, waited for.
//!
//! A job that was submitted belongs to a worker, which takes a channel of its own, publishes the job there, and waits for
//! its end; meanwhile others serve its page faults. With [`uapi::SUBMIT_DIRECT`], and always on a synchronous device, the
//! one who waits serves them himself.
//!
//! What came out of a job is kept until user space asks for it.

use kernel::{
    current,
    impl_has_work,
    new_spinlock,
    new_work,
    prelude::*,
    sync::{
        atomic::{
            Full,
            Relaxed, //
        },
        Arc,
        CondVarTimeoutResult,
        SpinLock, //
    },
    time::{
        msecs_to_jiffies,
        Jiffies, //
    },
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

use crate::{
    abi::{
        job::{
            Job,
            Outcome, //
        },
        ring::Status,
        uapi::{
            self,
            JOBS_MAX, //
        }, //
    },
    channel::{
        Failure,
        Patience,
        LIMIT_MS, //
    },
    gpu::Session,
    page_table::VA_END,
    space::Space, //
};

/// How often the waiter for a job looks at its fence without an interrupt, in milliseconds.
const STEP_MS: u32 = 100;
/// The same, if it serves the faults itself.
const DIRECT_STEP_MS: u32 = 10;

/// How a job ended: a [`Status`] or one of `uapi::JOB_*`, and its outcome.
type Ending = (u32, Outcome);

/// After how many looks that found nothing new a job that stalls is made to fault again.
const IDLE_LOOKS: u32 = 2;

/// A job that was submitted.
#[pin_data]
pub(crate) struct Record {
    handle: u64,
    space: Arc<Space>,
    job: Job,
    limit_ms: u32,
    #[pin]
    ending: SpinLock<Option<Ending>>,
    #[pin]
    work: Work<Record>,
}

impl_has_work! {
    impl HasWork<Self> for Record { self.work }
}

impl WorkItem for Record {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let ending = match this.space.node.gpu.enter_fault() {
            Ok(session) => this.run_on(&session, false),
            Err(_) => (uapi::JOB_CANCELLED, Outcome::default()),
        };

        this.end(ending);
    }
}

/// The jobs of an address space that were not waited for yet.
pub(crate) struct Jobs {
    next: u64,
    list: KVec<Arc<Record>>,
    running: usize,
}

impl Jobs {
    /// None yet.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            next: 1,
            list: KVec::with_capacity(JOBS_MAX, GFP_KERNEL)?,
            running: 0,
        })
    }

    /// How many have not ended.
    pub(crate) fn running(&self) -> usize {
        self.running
    }

    /// Forgets those that have ended.
    pub(crate) fn clear(&mut self) {
        self.list.clear();
    }

    /// Whether one has ended that was not waited for.
    pub(crate) fn any_ended(&self) -> bool {
        self.list
            .iter()
            .any(|record| record.ending.lock().is_some())
    }
}

impl Space {
    /// Serves `HSGPU_SUBMIT`.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a bad job or flag, `EAGAIN` if too many have not been waited for, `ENODEV` if the space is dead,
    /// `ENOMEM`.
    pub(crate) fn submit(
        self: &Arc<Self>,
        session: &Session<'_>,
        request: &mut uapi::Submit,
    ) -> Result {
        let job = Job::from_words(request.job).ok_or(EINVAL)?;
        let direct = match request.flags {
            0 => false,
            uapi::SUBMIT_DIRECT => true,
            _ => return Err(EINVAL),
        };
        let record = self.admit(job, request.limit_ms)?;

        request.handle = record.handle;
        if direct {
            let ending = record.run_on(session, true);

            record.end(ending);
        } else {
            // A record is queued once.
            let _ = session.job_queue().enqueue(record);
        }
        Ok(())
    }

    fn admit(self: &Arc<Self>, job: Job, limit_ms: u32) -> Result<Arc<Record>> {
        let limit_ms = if limit_ms == 0 { LIMIT_MS } else { limit_ms };
        let handle = {
            let mut jobs = self.jobs.lock();
            let handle = jobs.next;

            jobs.next += 1;
            handle
        };
        let record = Arc::pin_init(
            pin_init!(Record {
                handle,
                space: self.clone(),
                job,
                limit_ms,
                ending <- new_spinlock!(None, "hsgpu::job::ending"),
                work <- new_work!("hsgpu::job"),
            }),
            GFP_KERNEL,
        )?;
        let mut jobs = self.jobs.lock();

        // `kill()` sets it before it looks at `running`, with the lock.
        if self.is_dead() {
            return Err(ENODEV);
        }
        jobs.list
            .push_within_capacity(record.clone())
            .map_err(|_| EAGAIN)?;
        jobs.running += 1;
        Ok(record)
    }

    /// Serves `HSGPU_WAIT`.
    ///
    /// # Errors
    ///
    /// `ENOENT` if there is no such job, `ETIMEDOUT`, `EINTR`.
    pub(crate) fn wait(&self, request: &mut uapi::Wait) -> Result {
        let mut left: Jiffies = msecs_to_jiffies(request.timeout_ms);
        let mut jobs = self.jobs.lock();

        loop {
            let at = jobs
                .list
                .iter()
                .position(|record| record.handle == request.handle)
                .ok_or(ENOENT)?;
            let ending = jobs.list.get(at).and_then(|record| *record.ending.lock());

            if let Some((status, outcome)) = ending {
                let record = jobs.list.remove(at);

                drop(jobs);
                drop(record);
                request.status = status;
                request.outcome = outcome.to_words();
                return Ok(());
            }
            if left == 0 {
                return Err(ETIMEDOUT);
            }
            left = match self.changed.wait_interruptible_timeout(&mut jobs, left) {
                CondVarTimeoutResult::Woken { jiffies } => jiffies,
                CondVarTimeoutResult::Timeout => 0,
                CondVarTimeoutResult::Signal { .. } => return Err(EINTR),
            };
        }
    }
}

impl Record {
    /// Runs the job to its end. If `direct`, a signal ends it.
    fn run_on(&self, session: &Session<'_>, direct: bool) -> Ending {
        let space = &self.space;
        let serve = direct || session.is_synchronous();
        let Ok(channel) = session.job_channel(|| space.is_dead()) else {
            return (uapi::JOB_CANCELLED, Outcome::default());
        };
        let _direct = serve.then(|| Direct::new(space, session));
        let mut seen = space.progress.load(Relaxed);
        let mut interrupted = false;
        let mut idle = 0;
        let mut watch = || {
            if serve {
                let mut served = false;

                if direct && !interrupted && current!().signal_pending() {
                    interrupted = true;
                    space.end_on(channel.index());
                }
                // What a replay leads to on a synchronous device is in the buffer at once.
                loop {
                    session.faults().dispatch(session);
                    if !space.service(session) {
                        break;
                    }
                    served = true;
                    if direct && !interrupted && current!().signal_pending() {
                        break;
                    }
                }
                if served {
                    return true;
                }
            } else if session.faults().is_pending() {
                // An interrupt was lost, or somebody else is about to look.
                session.faults().dispatch(session);
            }
            let now = space.progress.load(Relaxed);
            // What it takes to serve a fault (evictions, lost interrupts) does not count against the job.
            if core::mem::replace(&mut seen, now) != now || space.serving.load(Relaxed) != 0 {
                idle = 0;
                return true;
            }
            idle += 1;
            if idle > IDLE_LOOKS && channel.is_stalled(session) {
                // Nobody knows of its fault: the report was lost. After a replay it faults again.
                session.ask_replay();
            }
            false
        };
        let mut patience = Patience {
            step_ms: if serve { DIRECT_STEP_MS } else { STEP_MS },
            limit_ms: self.limit_ms,
            watch: &mut watch,
        };
        let (result, outcome) = channel.run(session, space.asid, &self.job, &mut patience);

        if interrupted {
            space
                .ending
                .fetch_add((1u32 << channel.index()).wrapping_neg(), Full);
        }
        let status = match result {
            Ok(()) => Status::Ok as u32,
            Err(Failure::Device(Some(status))) => status as u32,
            Err(Failure::Device(None)) => Status::BadJob as u32,
            Err(Failure::Aborted) => Status::Aborted as u32,
            Err(Failure::Timeout) => uapi::JOB_TIMEOUT,
            Err(Failure::Dead) => uapi::JOB_DEAD,
        };
        if interrupted {
            return (uapi::JOB_CANCELLED, outcome);
        }
        (status, outcome)
    }

    fn end(&self, ending: Ending) {
        let space = &self.space;
        let stats = &space.node.gpu.stats;

        stats.jobs.inc();
        if ending.0 != Status::Ok as u32 {
            stats.jobs_failed.inc();
        }
        let mut jobs = space.jobs.lock();
        *self.ending.lock() = Some(ending);
        jobs.running -= 1;
        space.changed.notify_all();
    }
}

impl Space {
    /// Has the job on channel `index` end: it faults, and its faults are not served any more.
    fn end_on(&self, index: usize) {
        self.ending.fetch_add(1u32 << index, Full);
        self.notifier.lock().take(0..VA_END);
    }
}

/// Faults of a space are served by who waits for its jobs, as long as this exists.
struct Direct<'a> {
    space: &'a Arc<Space>,
    session: &'a Session<'a>,
}

impl<'a> Direct<'a> {
    fn new(space: &'a Arc<Space>, session: &'a Session<'a>) -> Self {
        space.direct.fetch_add(1, Full);
        Self { space, session }
    }
}

impl Drop for Direct<'_> {
    fn drop(&mut self) {
        self.space.direct.fetch_add(u32::MAX, Full);
        // What came after the last look is for the workers. `push()` does the same two steps the other way round.
        self.space.hand_over(self.session);
    }
}

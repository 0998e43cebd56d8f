//! What the kernel complained about, as data.

use serde::{Deserialize, Serialize};

use crate::judge::stack::Frame;

/// A task as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Task {
    /// `comm`, at most 15 bytes.
    pub comm: String,
    /// Thread id; 0 is an idle task.
    pub pid: u32,
}

impl Task {
    /// An idle task. A lockup "of" an idle task is a statement about the emulator's fairness, not about the kernel.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.pid == 0 || self.comm.starts_with("swapper/")
    }
}

impl std::fmt::Display for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {})", self.comm, self.pid)
    }
}

/// Where a work item stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkState {
    /// A worker runs it.
    InFlight,
    /// It waits for a worker of its pool.
    Pending,
    /// It waits for its workqueue's `max_active`.
    Inactive,
}

/// A work item of the kernel's "Showing busy workqueues" dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkItem {
    /// Workqueue, e.g. `mm_percpu_wq`.
    pub workqueue: String,
    /// CPUs of the pool it is queued on.
    pub cpus: Vec<u32>,
    /// Where it stands.
    pub state: WorkState,
    /// Its function, e.g. `lru_add_drain_per_cpu`.
    pub function: String,
    /// How many of them in a row.
    pub count: u32,
    /// The worker that runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<u32>,
    /// The task that waits for it in `flush_work()`: the kernel prints its pid as `BAR(pid)` behind the item.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub flusher: Option<u32>,
    /// Console line.
    pub line: u64,
}

/// A worker pool that the workqueue watchdog called stuck.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StuckPool {
    /// Its CPUs.
    pub cpus: Vec<u32>,
    /// For how long, guest seconds.
    pub seconds: u64,
    /// Console line.
    pub line: u64,
}

/// Who holds the lock that a hung task waits for (`CONFIG_DETECT_HUNG_TASK_BLOCKER`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// `mutex`, `semaphore`, `rw-semaphore`.
    pub lock: String,
    /// The likely owner.
    pub owner: Task,
}

/// The kind of a complaint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// A fault in kernel mode.
    Oops,
    /// `BUG()`, or one of the kernel's other `BUG:` reports.
    KernelBug,
    /// `WARN()`.
    Warning,
    /// `BUG: Bad page state`, `Bad page map`, `Bad page cache`.
    BadPage,
    /// `Bad rss-counter`, `non-zero pgtables_bytes`.
    BadAccounting,
    /// KASAN, KCSAN, KFENCE, KMSAN, UBSAN, or the slab allocator's own checks.
    Sanitizer,
    /// Rust code panicked in the kernel.
    RustPanic,
    /// `panic()`.
    Panic {
        /// A watchdog was told to panic, so the panic is the end of a lockup and no crash of its own.
        of_a_watchdog: bool,
    },
    /// The guest booted a second time.
    UnexpectedReboot,
    /// A CPU ran kernel code and nothing else.
    SoftLockup {
        /// For how long, guest seconds.
        seconds: u64,
    },
    /// A CPU took no timer interrupts.
    HardLockup,
    /// A task slept uninterruptibly.
    HungTask {
        /// For how long, guest seconds.
        seconds: u64,
        /// The lock's likely owner, if the kernel knows.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        blocker: Option<Blocker>,
    },
    /// The workqueue watchdog, with its dump.
    WorkqueueLockup {
        /// Pools called stuck.
        pools: Vec<StuckPool>,
        /// The dump; empty at a `loglevel` below 7.
        items: Vec<WorkItem>,
    },
    /// A workqueue dump that was asked for (sysrq).
    WorkqueueDump {
        /// The dump.
        items: Vec<WorkItem>,
    },
    /// RCU's own detector: weak evidence, a spinner outside read-side sections never trips it.
    RcuStall,
    /// A task's state and stack, shown on request (sysrq) or beside another report.
    TaskDump {
        /// `D`, `R`, `S`, ...
        state: char,
    },
    /// What a CPU did, shown on request (NMI backtrace), as after a soft lockup.
    CpuDump,
    /// The kernel killed a process for memory.
    OutOfMemory,
}

/// What weight a complaint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// By itself a finding.
    Crash,
    /// One of several observations that a lockup verdict needs.
    Detector,
    /// Evidence for the reader.
    Notice,
}

/// One complaint of the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What kind.
    #[serde(flatten)]
    pub kind: Kind,
    /// The line that says it, without its time stamp.
    pub title: String,
    /// That line's number in `console.log`, from 1.
    pub line: u64,
    /// Guest time, nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<u64>,
    /// The task concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Task>,
    /// The CPU concerned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
    /// Its stack, leaf first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stack: Vec<Frame>,
    /// The report ended as such reports end; otherwise the console stopped or was interrupted within.
    pub complete: bool,
}

impl Finding {
    /// The weight of this complaint.
    #[must_use]
    pub fn class(&self) -> Class {
        match self.kind {
            Kind::Oops
            | Kind::KernelBug
            | Kind::Warning
            | Kind::BadPage
            | Kind::BadAccounting
            | Kind::Sanitizer
            | Kind::RustPanic
            | Kind::UnexpectedReboot
            | Kind::Panic { of_a_watchdog: false } => Class::Crash,
            Kind::SoftLockup { .. } | Kind::HardLockup => match &self.task {
                Some(task) if task.is_idle() => Class::Notice,
                _ => Class::Detector,
            },
            Kind::HungTask { .. } | Kind::WorkqueueLockup { .. } => Class::Detector,
            Kind::Panic { of_a_watchdog: true }
            | Kind::RcuStall
            | Kind::WorkqueueDump { .. }
            | Kind::TaskDump { .. }
            | Kind::CpuDump
            | Kind::OutOfMemory => Class::Notice,
        }
    }

    /// Work items of a workqueue report; empty for other kinds.
    #[must_use]
    pub fn work_items(&self) -> &[WorkItem] {
        match &self.kind {
            Kind::WorkqueueLockup { items, .. } | Kind::WorkqueueDump { items } => items,
            _ => &[],
        }
    }
}

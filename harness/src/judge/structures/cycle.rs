//! What was read, as data and as sentences.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A task of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Process id.
    pub pid: u32,
    /// `task_struct.comm`.
    pub comm: String,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.comm, self.pid)
    }
}

/// A CPU in kernel mode whose stack is about the access to an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spinner {
    /// The CPU.
    pub cpu: u32,
    /// `cpu_rq(cpu)->curr`.
    pub task: Task,
    /// The outermost function that makes the access.
    pub function: Option<String>,
    /// The address, from `vm_fault.real_address` or `hmm_vma_walk.last`.
    pub address: u64,
    /// Its `mm_struct`.
    pub mm: u64,
    /// The page table entry there.
    pub entry: u64,
    /// Bytes that the entry stands for.
    pub size: u64,
    /// The page that the entry points to, if it is not present.
    #[serde(default)]
    pub pfn: Option<u64>,
    /// That page's folio.
    #[serde(default)]
    pub folio: Option<u64>,
    /// `PG_locked` of the folio.
    #[serde(default)]
    pub locked: bool,
    /// `page->pgmap->type`, of a ZONE_DEVICE page.
    #[serde(default)]
    pub memory: Option<String>,
}

/// A page in a migration's array of sources, with the flag that says that the migration holds its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Index into `migrate_vma.src`.
    pub index: u64,
    /// The page.
    pub pfn: u64,
}

/// A work item that a task waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// The `work_struct`.
    pub work: u64,
    /// Its function.
    pub function: String,
    /// Its workqueue, if it is on one.
    pub workqueue: Option<String>,
    /// `worker_pool.cpu` of the pool that it is for.
    pub cpu: u32,
    /// It is on that pool's `worklist`.
    pub queued: bool,
    /// A worker of that pool that is ready to run.
    pub worker: Option<Task>,
    /// What runs on that CPU.
    pub current: Task,
}

/// A sleeping task that is in the middle of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Who.
    pub task: Task,
    /// In which state.
    pub state: String,
    /// The function that it sleeps in.
    pub function: String,
    /// Its `struct migrate_vma`.
    pub migrate: u64,
    /// First address of the migration.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Pages of it that a spinner is at.
    pub held: Vec<Held>,
    /// What it waits for.
    pub waits_for: Option<Wait>,
}

/// What the reader read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// CPUs that are at an address.
    pub spinners: Vec<Spinner>,
    /// Tasks that migrate.
    pub holders: Vec<Holder>,
    /// What could not be read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// What the guest's memory says of the cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Structures {
    /// What was read.
    #[serde(flatten)]
    pub reading: Reading,
    /// A spinner is at a folio that a migration holds, and the migration waits for work that is queued on the CPU that
    /// the spinner runs on.
    pub closed: bool,
    /// The same in sentences.
    pub statements: Vec<String>,
}

impl Structures {
    /// Draws the conclusion.
    #[must_use]
    pub fn of(reading: Reading) -> Self {
        let closed = closing(&reading).is_some();
        let statements = statements(&reading);
        Self { reading, closed, statements }
    }

    /// The holder, what it waits for and the spinner on that CPU, if the cycle closes.
    #[must_use]
    pub fn closing(&self) -> Option<(&Holder, &Wait, &Spinner)> {
        closing(&self.reading)
    }
}

fn holds(holder: &Holder, spinner: &Spinner) -> Option<Held> {
    holder.held.iter().copied().find(|held| spinner.locked && Some(held.pfn) == spinner.pfn)
}

fn closing(reading: &Reading) -> Option<(&Holder, &Wait, &Spinner)> {
    reading.holders.iter().find_map(|holder| {
        let wait = holder.waits_for.as_ref().filter(|wait| wait.queued)?;
        let spinner = reading.spinners.iter().find(|spinner| {
            spinner.cpu == wait.cpu && spinner.task == wait.current && holds(holder, spinner).is_some()
        })?;
        Some((holder, wait, spinner))
    })
}

fn statements(reading: &Reading) -> Vec<String> {
    let mut says = Vec::new();
    for spinner in &reading.spinners {
        let Spinner { cpu, task, address, size, .. } = spinner;
        let what = match (spinner.pfn, &spinner.memory) {
            (Some(pfn), memory) => format!(
                "a swap entry for pfn {pfn:#x}, a folio of {}{}",
                memory.as_deref().unwrap_or("ordinary memory"),
                if spinner.locked { " with PG_locked set" } else { ", not locked" }
            ),
            (None, _) => format!("{:#x}", spinner.entry),
        };
        says.push(format!(
            "CPU {cpu} runs {task}, in {} at {address:#x}, where its page table has {what}{}",
            spinner.function.as_deref().unwrap_or("the kernel"),
            if *size > 4096 { format!(" ({} KiB)", size >> 10) } else { String::new() },
        ));
    }
    for holder in &reading.holders {
        for held in &holder.held {
            says.push(format!(
                "pfn {:#x} is src[{}] of the migration of {:#x}-{:#x} by {}, with MIGRATE_PFN_MIGRATE: it holds the lock",
                held.pfn, held.index, holder.start, holder.end, holder.task
            ));
        }
        let Some(wait) = &holder.waits_for else {
            says.push(format!("{} sleeps in {}", holder.task, holder.function));
            continue;
        };
        says.push(format!(
            "{} sleeps in {} for the work item {} of CPU {}, which is {}",
            holder.task,
            holder.function,
            wait.function,
            wait.cpu,
            match (&wait.workqueue, wait.queued) {
                (Some(queue), true) => format!("on the worklist of that CPU's pool ({queue})"),
                (None, true) => "on the worklist of that CPU's pool".to_owned(),
                (_, false) => "not queued".to_owned(),
            }
        ));
        let worker = wait
            .worker
            .as_ref()
            .map_or(String::new(), |worker| format!("; {worker} is ready and does not run"));
        says.push(format!("CPU {} runs {}{worker}", wait.cpu, wait.current));
    }
    if let Some((holder, _, spinner)) = closing(reading) {
        says.push(format!(
            "so {} waits for {}, and {} for {}: the cycle is closed",
            spinner.task.comm, holder.task.comm, holder.task.comm, spinner.task.comm
        ));
    }
    says
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn task(pid: u32, comm: &str) -> Task {
        Task { pid, comm: comm.into() }
    }

    pub(in super::super) fn reading() -> Reading {
        let spinner = |cpu: u32| Spinner {
            cpu,
            task: task(58 + cpu, "faulter"),
            function: Some("hmm_range_fault".into()),
            address: 0x7f65_3ee9_0000,
            mm: 0xffff_8880_0204_0000,
            entry: 0xf000,
            size: 4096,
            pfn: Some(0xfcf_0003),
            folio: Some(0xffff_ea00_0000_0000),
            locked: true,
            memory: Some("MEMORY_DEVICE_PRIVATE".into()),
        };
        let wait = Wait {
            work: 1,
            function: "lru_add_drain_per_cpu".into(),
            workqueue: Some("mm_percpu_wq".into()),
            cpu: 2,
            queued: true,
            worker: Some(task(54, "kworker/2:2")),
            current: task(60, "faulter"),
        };
        let holder = Holder {
            task: task(57, "migrator"),
            state: "D (disk sleep)".into(),
            function: "__lru_add_drain_all".into(),
            migrate: 2,
            start: 0x7f65_3ee8_d000,
            end: 0x7f65_3eea_d000,
            held: vec![Held { index: 3, pfn: 0xfcf_0003 }],
            waits_for: Some(wait),
        };
        Reading { spinners: vec![spinner(1), spinner(2)], holders: vec![holder], notes: Vec::new() }
    }

    #[test]
    fn the_cycle_closes_on_the_cpu_that_the_work_is_queued_on() {
        let structures = Structures::of(reading());
        assert!(structures.closed);
        assert_eq!(structures.closing().map(|(_, _, spinner)| spinner.cpu), Some(2));
        assert!(structures.statements.last().expect("statements").ends_with("the cycle is closed"));
    }

    #[test]
    fn each_link_is_needed() {
        type Break = fn(&mut Reading);
        let breaks: [(&str, Break); 5] = [
            ("the folio is not locked", |r| r.spinners.iter_mut().for_each(|s| s.locked = false)),
            ("the spinners are at another folio", |r| r.spinners.iter_mut().for_each(|s| s.pfn = Some(7))),
            ("the migration has another page", |r| r.holders[0].held.clear()),
            ("the work is not queued", |r| r.holders[0].waits_for.iter_mut().for_each(|w| w.queued = false)),
            ("something else runs there", |r| {
                r.holders[0].waits_for.iter_mut().for_each(|w| w.current.pid = 1);
            }),
        ];
        for (what, break_it) in breaks {
            let mut reading = reading();
            break_it(&mut reading);
            let structures = Structures::of(reading);
            assert!(!structures.closed, "{what}");
            assert!(!structures.statements.iter().any(|says| says.contains("closed")), "{what}");
        }
    }
}

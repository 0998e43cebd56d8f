//! What was read, as data and as sentences.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::judge::stack::{demangle, short};

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

/// A page that a task holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The page.
    pub pfn: u64,
    /// How that is known.
    #[serde(flatten)]
    pub by: By,
}

/// How it is known that a task holds a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// It is at this index of `migrate_vma.src`, with the flag that says that the migration holds its lock.
    Index(u64),
    /// This function's frame on its stack has a pointer to the folio, and the stack has none of the functions that only
    /// want it.
    Frame(String),
}

/// A run queue that a task is on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Its CPU.
    pub cpu: u32,
    /// `rq->curr`: what runs there.
    pub current: Task,
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
    /// The worker has begun it, gave its CPU away before it was done, and is ready to run again: `process_one_work()`
    /// reschedules before it forgets an item (`kernel/workqueue.c`).
    #[serde(default)]
    pub begun: bool,
    /// A worker of that pool that is ready to run.
    pub worker: Option<Task>,
    /// What runs on that CPU.
    pub current: Task,
}

/// A task that does not run and is in the middle of a migration, or holds what a spinner is at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Who.
    pub task: Task,
    /// In which state.
    pub state: String,
    /// The function that it sleeps in.
    pub function: String,
    /// Where it waits for a CPU, if it is on a run queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<Ready>,
    /// Its `struct migrate_vma`, if it migrates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrate: Option<u64>,
    /// First address of the migration.
    #[serde(default)]
    pub start: u64,
    /// First address behind it.
    #[serde(default)]
    pub end: u64,
    /// Pages of it that a spinner is at.
    pub held: Vec<Held>,
    /// What it waits for.
    #[serde(default)]
    pub waits_for: Option<Wait>,
}

/// What a holder waits for and a spinner keeps from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link<'a> {
    /// A work item of the spinner's CPU.
    Work(&'a Wait),
    /// That CPU itself.
    Cpu(&'a Ready),
}

/// A cycle that closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closing<'a> {
    /// Who holds the folio.
    pub holder: &'a Holder,
    /// The folio.
    pub held: &'a Held,
    /// What the holder waits for.
    pub link: Link<'a>,
    /// Who wants the folio, and keeps that.
    pub spinner: &'a Spinner,
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
    /// A spinner is at a folio that a task holds, and that task waits for work that is queued or begun on the CPU that the
    /// spinner runs on, or for that CPU itself.
    pub closed: bool,
    /// The same in sentences.
    pub statements: Vec<String>,
}

impl Structures {
    /// Draws the conclusion.
    #[must_use]
    pub fn of(mut reading: Reading) -> Self {
        for holder in &mut reading.holders {
            holder.function = short(&demangle(&holder.function));
            for held in &mut holder.held {
                if let By::Frame(function) = &mut held.by {
                    *function = short(&demangle(function));
                }
            }
        }
        let closed = closing(&reading).is_some();
        let statements = statements(&reading);
        Self { reading, closed, statements }
    }

    /// The cycle, if it closes.
    #[must_use]
    pub fn closing(&self) -> Option<Closing<'_>> {
        closing(&self.reading)
    }
}

fn holds<'a>(holder: &'a Holder, spinner: &Spinner) -> Option<&'a Held> {
    holder.held.iter().find(|held| spinner.locked && Some(held.pfn) == spinner.pfn)
}

fn closing(reading: &Reading) -> Option<Closing<'_>> {
    reading.holders.iter().find_map(|holder| {
        let work = holder.waits_for.as_ref().filter(|wait| wait.queued || wait.begun);
        let work = work.map(|wait| (wait.cpu, &wait.current, Link::Work(wait)));
        let cpu = holder.ready.as_ref().map(|ready| (ready.cpu, &ready.current, Link::Cpu(ready)));
        work.into_iter().chain(cpu).find_map(|(cpu, current, link)| {
            let there = |spinner: &&Spinner| spinner.cpu == cpu && spinner.task == *current;
            let closes = |spinner| Some(Closing { holder, held: holds(holder, spinner)?, link, spinner });
            reading.spinners.iter().filter(there).find_map(closes)
        })
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
            says.push(match &held.by {
                By::Index(index) => format!(
                    "pfn {:#x} is src[{index}] of the migration of {:#x}-{:#x} by {}, with MIGRATE_PFN_MIGRATE: it holds the lock",
                    held.pfn, holder.start, holder.end, holder.task
                ),
                By::Frame(function) => format!(
                    "the stack of {} has the folio of pfn {:#x} in its frame of {function}(), and makes no access: it holds the lock",
                    holder.task, held.pfn
                ),
            });
        }
        if let Some(ready) = &holder.ready {
            says.push(format!(
                "{} left its CPU in {}() and is ready to run again: it is on the run queue of CPU {}, which runs {}",
                holder.task, holder.function, ready.cpu, ready.current
            ));
            continue;
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
            match (&wait.workqueue, &wait.worker) {
                (_, Some(worker)) if wait.begun => format!("begun by {worker}, and not done"),
                (Some(queue), _) if wait.queued => format!("on the worklist of that CPU's pool ({queue})"),
                (None, _) if wait.queued => "on the worklist of that CPU's pool".to_owned(),
                _ => "not queued".to_owned(),
            }
        ));
        let worker = wait
            .worker
            .as_ref()
            .map_or(String::new(), |worker| format!("; {worker} is ready and does not run"));
        says.push(format!("CPU {} runs {}{worker}", wait.cpu, wait.current));
    }
    if let Some(Closing { holder, spinner, .. }) = closing(reading) {
        says.push(format!(
            "so {} waits for {}, and {} for {}: the cycle is closed",
            spinner.task.comm, holder.task.comm, holder.task.comm, spinner.task.comm
        ));
    }
    says
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn task(pid: u32, comm: &str) -> Task {
        Task { pid, comm: comm.into() }
    }

    pub(crate) fn reading() -> Reading {
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
            begun: false,
            worker: Some(task(54, "kworker/2:2")),
            current: task(60, "faulter"),
        };
        let holder = Holder {
            task: task(57, "migrator"),
            state: "D (disk sleep)".into(),
            function: "__lru_add_drain_all".into(),
            ready: None,
            migrate: Some(2),
            start: 0x7f65_3ee8_d000,
            end: 0x7f65_3eea_d000,
            held: vec![Held { pfn: 0xfcf_0003, by: By::Index(3) }],
            waits_for: Some(wait),
        };
        Reading { spinners: vec![spinner(1), spinner(2)], holders: vec![holder], notes: Vec::new() }
    }

    /// The holder drains nothing: it has only to run, on the CPU of a spinner.
    pub(crate) fn starved() -> Reading {
        let mut reading = reading();
        let holder = &mut reading.holders[0];
        holder.state = "R (running)".into();
        holder.function = "hold".into();
        (holder.migrate, holder.waits_for) = (None, None);
        holder.held = vec![Held { pfn: 0xfcf_0003, by: By::Frame("hold".into()) }];
        holder.ready = Some(Ready { cpu: 2, current: task(60, "faulter") });
        reading
    }

    /// Between the function of a work item and the end of it, its worker may give way to the spinner.
    #[test]
    fn work_that_was_begun_closes_it_as_well() {
        let mut reading = reading();
        for wait in reading.holders.iter_mut().filter_map(|holder| holder.waits_for.as_mut()) {
            (wait.queued, wait.begun, wait.workqueue) = (false, true, None);
        }
        let structures = Structures::of(reading);
        assert!(structures.closed);
        let says = "lru_add_drain_per_cpu of CPU 2, which is begun by kworker/2:2 (pid 54), and not done";
        assert!(
            structures.statements.iter().any(|line| line.ends_with(says)),
            "{:#?}",
            structures.statements
        );
    }

    #[test]
    fn the_cycle_closes_on_the_cpu_that_the_work_is_queued_on() {
        let structures = Structures::of(reading());
        assert!(structures.closed);
        let closing = structures.closing().expect("closed");
        assert_eq!(closing.spinner.cpu, 2);
        assert!(matches!(closing.link, Link::Work(_)));
        assert!(structures.statements.last().expect("statements").ends_with("the cycle is closed"));
    }

    #[test]
    fn a_holder_that_only_has_to_run_closes_it_too() {
        let structures = Structures::of(starved());
        let closing = structures.closing().expect("closed");
        assert!(matches!(closing.link, Link::Cpu(_)));
        assert_eq!((closing.spinner.cpu, closing.holder.task.pid), (2, 57));
        let says = structures.statements.join("\n");
        assert!(says.contains("on the run queue of CPU 2, which runs faulter (pid 60)"), "{says}");
        assert!(says.ends_with("the cycle is closed"), "{says}");
        type Break = fn(&mut Reading);
        let breaks: [(&str, Break); 4] = [
            ("it is on no run queue", |r| r.holders[0].ready = None),
            ("somebody else runs there", |r| {
                r.holders[0].ready.iter_mut().for_each(|ready| ready.current.pid = 1);
            }),
            ("it is on another CPU's", |r| r.holders[0].ready.iter_mut().for_each(|ready| ready.cpu = 0)),
            ("it has another folio", |r| r.holders[0].held[0].pfn = 7),
        ];
        for (what, break_it) in breaks {
            let mut reading = starved();
            break_it(&mut reading);
            assert!(!Structures::of(reading).closed, "{what}");
        }
    }

    #[test]
    fn what_older_records_say_is_read() {
        let text = r#"{"task":{"pid":57,"comm":"m"},"state":"D","function":"f","migrate":2,"start":1,"end":2,
            "held":[{"index":3,"pfn":7}],"waits_for":null}"#;
        let holder: Holder = serde_json::from_str(text).expect("a holder");
        assert_eq!(holder.held, [Held { pfn: 7, by: By::Index(3) }]);
    }

    #[test]
    fn each_link_is_needed() {
        type Break = fn(&mut Reading);
        let breaks: [(&str, Break); 5] = [
            ("the folio is not locked", |r| r.spinners.iter_mut().for_each(|s| s.locked = false)),
            ("the spinners are at another folio", |r| r.spinners.iter_mut().for_each(|s| s.pfn = Some(7))),
            ("the migration has another page", |r| r.holders[0].held.clear()),
            ("the work is neither queued nor begun", |r| {
                r.holders[0].waits_for.iter_mut().for_each(|w| w.queued = false)
            }),
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

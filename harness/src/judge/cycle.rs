//! The named cycle: who spins, on what, who holds that, what the holder waits for, and on which CPU that is queued.
//!
//! Every statement says where it was read. What was not observed is a gap, not a guess.

use std::fmt;

use hmmstorm_abi::wire::event::Progress;
use serde::{Deserialize, Serialize};

use super::console::{Finding, Kind, Task, WorkItem, WorkState};
use super::sampler::CpuSummary;
use super::stack::{chain, contains, from_loop, stable};
use super::structures::{By, Closing, Link, Structures};
use super::verdict::Source;

/// A task with what it does in the scenario.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Actor {
    /// As the kernel names it.
    #[serde(flatten)]
    pub task: Task,
    /// As the storm names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.worker {
            Some(worker) if *worker != self.task.comm => {
                write!(f, "{worker} ({}, pid {})", self.task.comm, self.task.pid)
            }
            _ => self.task.fmt(f),
        }
    }
}

/// A CPU that spins, and who spins there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spinner {
    /// The CPU.
    pub cpu: u32,
    /// Who; unknown until the kernel's soft-lockup report names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<Actor>,
    /// Where, leaf first.
    pub frames: Vec<String>,
    /// The report's line in console.log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
}

/// The task that holds what the spinners want.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Who.
    pub task: Actor,
    /// Where it sleeps, leaf first; empty if only its pid is known.
    pub frames: Vec<String>,
    /// The report's line in console.log.
    pub line: u64,
}

/// What the holder waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// The work item's function.
    pub function: String,
    /// Its workqueue.
    pub workqueue: String,
    /// Where it stands.
    pub state: WorkState,
    /// The CPUs that may run it.
    pub cpus: Vec<u32>,
    /// The report's line in console.log.
    pub line: u64,
}

/// One sentence of the cycle and where it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// The sentence.
    pub says: String,
    /// Where it comes from.
    pub source: Source,
    /// Line of console.log, from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
}

impl fmt::Display for Statement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.line, self.source) {
            (Some(line), _) => write!(f, "{} [console.log:{line}]", self.says),
            (None, Source::Samples) => write!(f, "{} [CPU samples]", self.says),
            (None, Source::Memory) => write!(f, "{} [guest memory]", self.says),
            (None, _) => f.write_str(&self.says),
        }
    }
}

/// Who waits for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cycle {
    /// CPUs that spin.
    pub spinners: Vec<Spinner>,
    /// Who holds what they want.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<Holder>,
    /// What the holder waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_for: Option<Wait>,
    /// The holder waits for work that only a spinner's CPU may run, or for that CPU itself: nobody ever moves.
    pub closed: bool,
    /// The cycle in sentences.
    pub statements: Vec<Statement>,
    /// What was not observed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps: Vec<String>,
}

/// The kernel's knowledge that no report prints: what a function of a spinner's stack says about the lock it wants.
const WANTS: [(&str, &str); 2] = [
    (
        "do_swap_page",
        "they want a device-private folio that is locked: do_swap_page() only tries to lock it and returns 0, and the fault is made again",
    ),
    (
        "do_huge_pmd_device_private",
        "they want a huge device-private folio that is locked: do_huge_pmd_device_private() only tries to lock it and returns 0, and the fault is made again",
    ),
];

/// What is not observed as long as nothing tells of the holder, and of what it waits for.
const NO_HOLDER: &str = "who holds what they want: the kernel reported no task in uninterruptible sleep";
const NO_WAIT: &str = "what the holder waits for: no workqueue report names it";

/// Functions of a sleeper's stack in which it holds the locks of the folios that it migrates.
const HOLDS: [&str; 3] = ["migrate_device_unmap", "migrate_vma_setup", "migrate_device_range"];

impl Cycle {
    /// Names the cycle from what was observed since the last completion. `spinners` are the CPUs of the verdict.
    #[must_use]
    pub fn name(
        spinners: &[u32],
        cpus: &[CpuSummary],
        findings: &[Finding],
        workers: &[String],
        progress: Option<&Progress>,
    ) -> Self {
        let actor = |task: &Task| {
            let index = progress
                .and_then(|progress| progress.pids.iter().position(|&pid| pid == task.pid && pid != 0));
            Actor { task: task.clone(), worker: index.and_then(|index| workers.get(index).cloned()) }
        };
        let mut cycle = Self::default();
        for cpu in cpus.iter().filter(|cpu| spinners.contains(&cpu.cpu)) {
            cycle.spinner(cpu, findings, &actor);
        }
        cycle.wanted(spinners, cpus, findings);
        let item = flushed(findings, spinners);
        cycle.holder(findings, item.as_ref(), &actor);
        cycle.wait(item);
        cycle.close();
        cycle
    }

    fn spinner(&mut self, cpu: &CpuSummary, findings: &[Finding], actor: &impl Fn(&Task) -> Actor) {
        let of_cpu = |finding: &&Finding| {
            finding.cpu == Some(cpu.cpu) && finding.task.as_ref().is_some_and(|task| !task.is_idle())
        };
        let lockup = |finding: &&Finding| matches!(finding.kind, Kind::SoftLockup { .. } | Kind::HardLockup);
        let report = findings.iter().filter(of_cpu).find(lockup);
        let report =
            report.or_else(|| findings.iter().filter(of_cpu).find(|finding| finding.kind == Kind::CpuDump));
        let mut frames = from_loop(&cpu.trunk);
        frames.truncate(6);
        let task = report.and_then(|report| report.task.as_ref()).map(actor);
        let share = format!("{} of {} samples", cpu.in_tree, cpu.judged - cpu.torn);
        let who = match &task {
            Some(task) => task.to_string(),
            None => {
                self.gaps
                    .push(format!("which task spins on CPU {}: the kernel has not reported it", cpu.cpu));
                "a task".to_owned()
            }
        };
        self.statements.push(Statement {
            says: format!("{who} spins on CPU {} in {} ({share})", cpu.cpu, chain(&frames, 4)),
            source: if report.is_some() { Source::Console } else { Source::Samples },
            line: report.map(|report| report.line),
        });
        self.spinners.push(Spinner { cpu: cpu.cpu, task, frames, line: report.map(|report| report.line) });
    }

    /// What the spinners want, by what is on their stacks.
    fn wanted(&mut self, spinners: &[u32], cpus: &[CpuSummary], findings: &[Finding]) {
        for (function, says) in WANTS {
            let report = findings.iter().find(|finding| {
                finding.cpu.is_some_and(|cpu| spinners.contains(&cpu)) && contains(&finding.stack, function)
            });
            let seen: usize = cpus
                .iter()
                .filter(|cpu| spinners.contains(&cpu.cpu))
                .flat_map(|cpu| &cpu.above)
                .filter(|(above, _)| above == function)
                .map(|(_, count)| count)
                .sum();
            if report.is_some() || seen > 0 {
                let says = if seen > 0 { format!("{says} ({seen} samples there)") } else { says.to_owned() };
                let source = if report.is_some() { Source::Console } else { Source::Samples };
                self.statements.push(Statement { says, source, line: report.map(|report| report.line) });
                return;
            }
        }
    }

    fn holder(&mut self, findings: &[Finding], item: Option<&WorkItem>, actor: &impl Fn(&Task) -> Actor) {
        let asleep = |finding: &&Finding| {
            matches!(finding.kind, Kind::HungTask { .. } | Kind::TaskDump { state: 'D' })
        };
        let flusher = item.and_then(|item| item.flusher);
        let of_flusher =
            |finding: &&Finding| flusher.is_some() && finding.task.as_ref().map(|task| task.pid) == flusher;
        let report = findings.iter().filter(asleep).find(of_flusher).or_else(|| {
            findings
                .iter()
                .filter(asleep)
                .find(|finding| HOLDS.iter().any(|function| contains(&finding.stack, function)))
        });
        if let Some((report, task)) = report.and_then(|report| Some((report, report.task.as_ref()?))) {
            let frames = stable(&report.stack, 5);
            let task = actor(task);
            let holds = HOLDS.iter().find(|function| contains(&report.stack, function));
            let says = match holds {
                Some(function) => format!(
                    "{task} sleeps in {}: in {function}() it holds the locks of the folios it migrates",
                    chain(&frames, 4)
                ),
                None => format!("{task} sleeps in {}", chain(&frames, 4)),
            };
            if holds.is_none() {
                self.gaps.push("what the sleeping task holds: its stack has none of the functions known to hold folio locks".to_owned());
            }
            self.statements.push(Statement { says, source: Source::Console, line: Some(report.line) });
            self.holder = Some(Holder { task, frames, line: report.line });
            return;
        }
        if let Some((item, pid)) = item.zip(flusher) {
            let task = actor(&Task { comm: "?".to_owned(), pid });
            let says = format!("pid {pid} sleeps in flush_work()");
            self.statements.push(Statement { says, source: Source::Console, line: Some(item.line) });
            self.gaps.push(format!("the stack of pid {pid}: no report of the kernel shows it"));
            self.holder = Some(Holder { task, frames: Vec::new(), line: item.line });
            return;
        }
        self.gaps.push(NO_HOLDER.to_owned());
    }

    fn wait(&mut self, item: Option<WorkItem>) {
        let Some(item) = item else {
            self.gaps.push(NO_WAIT.to_owned());
            return;
        };
        let state = match item.state {
            WorkState::Pending => "pending",
            WorkState::InFlight => "in flight",
            WorkState::Inactive => "inactive",
        };
        let cpus: Vec<String> = item.cpus.iter().map(u32::to_string).collect();
        let says = format!(
            "pid {} waits for {} of workqueue {}, which is {state} on CPU {}",
            item.flusher.unwrap_or(0),
            item.function,
            item.workqueue,
            cpus.join(", ")
        );
        self.statements.push(Statement { says, source: Source::Console, line: Some(item.line) });
        self.waits_for = Some(Wait {
            function: item.function,
            workqueue: item.workqueue,
            state: item.state,
            cpus: item.cpus,
            line: item.line,
        });
    }

    /// Adds what no report of the kernel says, and its memory does: the holder may not sleep at all, but be ready to run, on
    /// the run queue of a spinner's CPU. Nothing is added to a cycle that is closed.
    pub fn complete(&mut self, structures: &Structures) {
        let Some(Closing { holder, held, link: Link::Cpu(ready), spinner }) = structures.closing() else {
            return;
        };
        if self.closed || self.holder.is_some() {
            return;
        }
        let whose = |pid: u32| {
            let of = |spinner: &&Spinner| spinner.task.as_ref().is_some_and(|actor| actor.task.pid == pid);
            self.spinners.iter().find(of).and_then(|spinner| spinner.task.as_ref()).map(ToString::to_string)
        };
        let who = whose(spinner.task.pid).unwrap_or_else(|| spinner.task.to_string());
        let how = match &held.by {
            By::Index(_) => "it is among the pages of its migration".to_owned(),
            By::Frame(function) => format!("its stack has the folio in the frame of {function}()"),
        };
        let says = [
            format!("{} holds the folio of pfn {:#x}: {how}", holder.task, held.pfn),
            format!(
                "{} does not sleep: it left its CPU in {}() and is on the run queue of CPU {}",
                holder.task, holder.function, ready.cpu
            ),
            format!(
                "CPU {} runs {who} (rq->curr), which spins until the holder lets go: the cycle is closed",
                ready.cpu
            ),
        ];
        self.statements.extend(says.map(|says| Statement { says, source: Source::Memory, line: None }));
        self.gaps.retain(|gap| gap != NO_HOLDER && gap != NO_WAIT);
        self.closed = true;
    }

    fn close(&mut self) {
        let (Some(_), Some(wait)) = (&self.holder, &self.waits_for) else { return };
        // Only a work item that no other CPU may run closes the cycle.
        let only = |spinner: &&Spinner| wait.cpus == [spinner.cpu];
        if let Some(spinner) = self.spinners.iter().find(only) {
            let who = spinner.task.as_ref().map_or_else(|| "the spinner".to_owned(), ToString::to_string);
            self.closed = true;
            let says = format!(
                "CPU {} runs {who}, which spins until the holder lets go: the cycle is closed",
                spinner.cpu
            );
            self.statements.push(Statement { says, source: Source::Samples, line: None });
        }
    }
}

/// The flushed work item that matters: one on a spinner's CPU if there is one.
fn flushed(findings: &[Finding], spinners: &[u32]) -> Option<WorkItem> {
    let items = || findings.iter().flat_map(Finding::work_items).filter(|item| item.flusher.is_some());
    items()
        .find(|item| item.cpus.iter().any(|cpu| spinners.contains(cpu)))
        .or_else(|| items().next())
        .cloned()
}

impl fmt::Display for Cycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, statement) in self.statements.iter().enumerate() {
            writeln!(f, "  {}. {statement}", number + 1)?;
        }
        for gap in &self.gaps {
            writeln!(f, "  not observed: {gap}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::console::Scanner;

    const LIVELOCK: &str = include_str!("../../tests/data/drain-livelock.console");
    const STOP_MACHINE: &str = include_str!("../../tests/data/livelock-during-stop-machine.console");

    fn findings(console: &str) -> Vec<Finding> {
        let mut scanner = Scanner::new();
        scanner.feed(console.as_bytes());
        scanner.finish();
        scanner.findings()
    }

    fn spinning(cpu: u32) -> CpuSummary {
        let trunk = ["hmm_range_fault", "dmirror_fault", "__x64_sys_ioctl"].map(str::to_owned).to_vec();
        CpuSummary {
            cpu,
            samples: 40,
            judged: 40,
            in_tree: 40,
            trunk,
            above: vec![("do_swap_page".into(), 31)],
            spins: true,
            ..CpuSummary::default()
        }
    }

    fn name(console: &str, spinners: &[u32]) -> Cycle {
        let cpus: Vec<CpuSummary> = spinners.iter().copied().map(spinning).collect();
        let workers = ["migrator", "faulter-0", "faulter-1", "faulter-2"].map(str::to_owned);
        let progress = Progress { pids: vec![1, 53, 54, 55], ..Progress::default() };
        Cycle::name(spinners, &cpus, &findings(console), &workers, Some(&progress))
    }

    #[test]
    fn the_recorded_livelock_closes() {
        let cycle = name(LIVELOCK, &[1, 2, 3]);
        assert!(cycle.closed && cycle.gaps.is_empty(), "{cycle:#?}");
        let holder = cycle.holder.as_ref().expect("a holder");
        assert_eq!((holder.task.task.pid, holder.task.worker.as_deref()), (1, Some("migrator")));
        assert_eq!(holder.frames[..3], ["__lru_add_drain_all", "lru_add_drain_all", "migrate_device_unmap"]);
        let wait = cycle.waits_for.as_ref().expect("a wait");
        assert_eq!(
            (wait.function.as_str(), wait.workqueue.as_str(), wait.cpus.as_slice()),
            ("lru_add_drain_per_cpu", "mm_percpu_wq", [1].as_slice())
        );
        assert_eq!(cycle.spinners[1].task.as_ref().map(|task| task.task.pid), Some(54));
        // Every cited line says what it is cited for.
        let line = |number: u64| {
            LIVELOCK.lines().nth(usize::try_from(number - 1).expect("a line number")).expect("the line")
        };
        assert!(line(wait.line).contains("lru_add_drain_per_cpu BAR(1)"));
        assert!(line(holder.line).contains("task init:1 blocked"));
        for spinner in &cycle.spinners {
            assert!(
                line(spinner.line.expect("a line")).contains(&format!("soft lockup - CPU#{}", spinner.cpu))
            );
        }
        let text = cycle.to_string();
        assert!(text.contains("migrator (init, pid 1) sleeps in __lru_add_drain_all"), "{text}");
    }

    #[test]
    fn a_cycle_does_not_close_over_a_cpu_that_does_not_spin() {
        let cycle = name(LIVELOCK, &[3]);
        assert!(!cycle.closed);
        assert!(cycle.holder.is_some());
    }

    #[test]
    fn a_holder_that_is_ready_to_run_is_found_in_memory() {
        let starved = Structures::of(crate::judge::structures::tests::starved());
        let mut cycle = name(STOP_MACHINE, &[1, 2, 3]);
        assert!(!cycle.closed);
        cycle.complete(&starved);
        assert!(cycle.closed, "{cycle}");
        let text = cycle.to_string();
        assert!(text.contains("migrator (pid 57) does not sleep"), "{text}");
        assert!(text.contains("on the run queue of CPU 2"), "{text}");
        assert!(
            !text.contains("who holds what they want") && !text.contains("what the holder waits for"),
            "{text}"
        );
        let mut closed = name(LIVELOCK, &[1, 2, 3]);
        let before = closed.clone();
        closed.complete(&starved);
        assert_eq!(closed, before, "what the kernel says is enough");
    }

    #[test]
    fn what_the_kernel_did_not_say_is_a_gap() {
        // CPU 0 was stopped by stop_machine() in the middle of the migration: nobody sleeps, no drain is queued.
        let cycle = name(STOP_MACHINE, &[1, 2, 3]);
        assert!(!cycle.closed && cycle.holder.is_none() && cycle.waits_for.is_none());
        assert_eq!(cycle.gaps.len(), 3, "{cycle:#?}");
        assert!(name("", &[1]).gaps.len() == 3);
    }
}

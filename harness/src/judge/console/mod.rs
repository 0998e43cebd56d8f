//! Reads the guest's console as it grows and turns the kernel's complaints into [`Finding`]s.
//!
//! The bytes may be cut anywhere: nothing is judged before its line is whole. Reports of several lines (a header, the
//! CPU and task, registers, a stack) are collected into one finding, per printing task or CPU where the kernel says so
//! (`CONFIG_PRINTK_CALLER`).

mod finding;
mod header;
mod line;
mod workqueue;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use regex::Regex;

pub use finding::{Blocker, Class, Finding, Kind, StuckPool, Task, WorkItem, WorkState};
use header::Header;
use line::{Line, Lines};
use workqueue::Dump;

use crate::judge::stack::Frame;

/// Lines of other kinds after which a report without an end counts as ended.
const PATIENCE: u32 = 80;

/// A report that is still being printed.
#[derive(Clone, Debug)]
struct Open {
    /// Index of its finding.
    index: usize,
    /// `Call Trace:` was seen.
    in_stack: bool,
    /// Within `<IRQ>`.
    in_interrupt: bool,
    /// Lines since the last one that belonged to it.
    idle: u32,
}

/// The streaming scanner.
#[derive(Clone, Debug, Default)]
pub struct Scanner {
    lines: Lines,
    state: State,
}

#[derive(Clone, Debug, Default)]
struct State {
    findings: Vec<Finding>,
    /// Open reports by caller; the empty caller where the kernel does not print one.
    open: BTreeMap<String, Open>,
    /// The workqueue dump under way and the finding it belongs to.
    dump: Option<(usize, Dump)>,
    latest: Option<u64>,
    boots: u32,
}

impl Scanner {
    /// A scanner at the start of a console.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next bytes of the console.
    pub fn feed(&mut self, bytes: &[u8]) {
        let state = &mut self.state;
        self.lines.feed(bytes, |number, text| state.line(&Line::parse(number, text)));
    }

    /// Ends the stream: a last line without a line end counts, open reports end as they are.
    pub fn finish(&mut self) {
        let state = &mut self.state;
        self.lines.finish(|number, text| state.line(&Line::parse(number, text)));
        state.open.clear();
        state.dump = None;
    }

    /// All complaints so far by guest time, open ones included.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let mut findings = self.state.findings.clone();
        // Stable: what has the same time keeps the console's order. Lines without a time belong where they stand.
        let mut latest = 0;
        let keys: BTreeMap<u64, u64> = findings
            .iter()
            .map(|finding| {
                latest = finding.time.unwrap_or(latest);
                (finding.line, latest)
            })
            .collect();
        findings.sort_by_key(|finding| (keys.get(&finding.line).copied(), finding.line));
        findings
    }

    /// How many complaints there are so far: cheaper than [`Scanner::findings`].
    #[must_use]
    pub fn count(&self) -> usize {
        self.state.findings.len()
    }

    /// The latest guest time printed, nanoseconds.
    #[must_use]
    pub fn latest_time(&self) -> Option<u64> {
        self.state.latest
    }
}

impl State {
    fn line(&mut self, line: &Line<'_>) {
        self.latest = self.latest.max(line.time);
        if line.message.starts_with("Linux version ") {
            self.boots += 1;
            if self.boots > 1 {
                self.begin(line, Header { kind: Kind::UnexpectedReboot, task: None, cpu: None });
            }
            return;
        }
        if self.dump_line(line) {
            return;
        }
        if let Some(header) = header::classify(line.message) {
            if !self.continues(line, &header) {
                self.begin(line, header);
            }
            return;
        }
        if self.task_dump(line) || self.blocker(line) {
            return;
        }
        self.body(line);
    }

    fn caller(line: &Line<'_>) -> String {
        line.caller.unwrap_or_default().to_owned()
    }

    /// Lines of the workqueue dump; it may interleave with the reports of other CPUs.
    fn dump_line(&mut self, line: &Line<'_>) -> bool {
        let Some((index, dump)) = &mut self.dump else { return false };
        let items = match &mut self.findings[*index].kind {
            Kind::WorkqueueLockup { items, .. } | Kind::WorkqueueDump { items } => items,
            _ => return false,
        };
        if dump.line(line.number, line.message, items) {
            self.findings[*index].complete = true;
            return true;
        }
        if line.message.starts_with("Showing backtraces of running workers") {
            self.dump = None;
            return true;
        }
        false
    }

    /// Whether a header line belongs to the report that its caller is printing.
    fn continues(&mut self, line: &Line<'_>, header: &Header) -> bool {
        if let Kind::WorkqueueDump { .. } = header.kind {
            // The watchdog prints its pools first, then asks for the dump.
            let last = self
                .findings
                .iter()
                .rposition(|finding| matches!(finding.kind, Kind::WorkqueueLockup { .. }));
            let recent = last.filter(|&index| {
                let items = self.findings[index].work_items().is_empty();
                let near = line
                    .time
                    .zip(self.findings[index].time)
                    .is_none_or(|(now, then)| now.abs_diff(then) < 2_000_000_000);
                items && near
            });
            if let Some(index) = recent {
                self.dump = Some((index, Dump::default()));
            }
            return recent.is_some();
        }
        if let Kind::WorkqueueLockup { pools: more, .. } = &header.kind {
            // One watchdog run names all its pools within milliseconds, before the dump.
            let Some(finding) = self
                .findings
                .iter_mut()
                .rev()
                .find(|finding| matches!(finding.kind, Kind::WorkqueueLockup { .. }))
            else {
                return false;
            };
            let near =
                line.time.zip(finding.time).is_none_or(|(now, then)| now.abs_diff(then) < 2_000_000_000);
            if let Kind::WorkqueueLockup { pools, items } = &mut finding.kind
                && items.is_empty()
                && near
            {
                pools.extend(more.iter().cloned().map(|pool| StuckPool { line: line.number, ..pool }));
                return true;
            }
            return false;
        }
        let Some(open) = self.open.get(&Self::caller(line)) else { return false };
        let finding = &self.findings[open.index];
        // "BUG: unable to handle ..." and "kernel BUG at ..." are followed by "Oops: ..."; a Rust panic by the BUG() of
        // its panic handler. All of it before the stack.
        !open.in_stack
            && matches!(
                (&finding.kind, &header.kind),
                (Kind::Oops | Kind::KernelBug | Kind::RustPanic, Kind::Oops)
                    | (Kind::RustPanic, Kind::KernelBug)
            )
    }

    fn begin(&mut self, line: &Line<'_>, header: Header) {
        let caller = Self::caller(line);
        self.open.remove(&caller);
        let mut kind = header.kind;
        let index = self.findings.len();
        match &mut kind {
            Kind::WorkqueueLockup { pools, .. } => {
                for pool in pools {
                    pool.line = line.number;
                }
                self.dump = None;
            }
            Kind::WorkqueueDump { .. } => self.dump = Some((index, Dump::default())),
            _ => {
                self.open.insert(caller, Open { index, in_stack: false, in_interrupt: false, idle: 0 });
            }
        }
        self.findings.push(Finding {
            kind,
            title: line.message.trim().to_owned(),
            line: line.number,
            time: line.time,
            task: header.task,
            cpu: header.cpu,
            stack: Vec::new(),
            complete: false,
        });
    }

    /// `task:init            state:D stack:0     pid:1     tgid:1 ...`: part of a hung-task report, or of sysrq.
    fn task_dump(&mut self, line: &Line<'_>) -> bool {
        static TASK: LazyLock<Regex> = LazyLock::new(|| {
            #[expect(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
            Regex::new(r"^task:(.*?) +state:(\S).*? stack:\d+ +pid:(\d+)").unwrap()
        });
        let Some(found) = TASK.captures(line.message) else { return false };
        let state = found[2].chars().next().unwrap_or('?');
        let Ok(pid) = found[3].parse::<u32>() else { return false };
        if let Some(open) = self.open.get_mut(&Self::caller(line)) {
            let finding = &self.findings[open.index];
            let same = finding.task.as_ref().is_some_and(|task| task.pid == pid);
            if matches!(finding.kind, Kind::HungTask { .. }) && same && !open.in_stack {
                open.idle = 0;
                return true;
            }
        }
        let task = Task { comm: found[1].to_owned(), pid };
        self.begin(line, Header { kind: Kind::TaskDump { state }, task: Some(task), cpu: None });
        true
    }

    /// `INFO: task A:1 is blocked on a mutex likely owned by task B:2.`, printed behind the waiter's report.
    fn blocker(&mut self, line: &Line<'_>) -> bool {
        static BLOCKED: LazyLock<Regex> = LazyLock::new(|| {
            #[expect(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
            Regex::new(r"^INFO: task .*?:(\d+) (?:<\w+> )?(?:is )?blocked on an? (mutex|semaphore|rw-semaphore) likely (?:owned|last held) by task (.*?):(\d+)")
                .unwrap()
        });
        let Some(found) = BLOCKED.captures(line.message) else { return false };
        let (Ok(waiter), Ok(owner)) = (found[1].parse::<u32>(), found[4].parse::<u32>()) else {
            return false;
        };
        let owner = Task { comm: found[3].to_owned(), pid: owner };
        let report = self.findings.iter_mut().rev().find(|finding| {
            matches!(finding.kind, Kind::HungTask { .. })
                && finding.task.as_ref().is_some_and(|task| task.pid == waiter)
        });
        if let Some(Finding { kind: Kind::HungTask { blocker, .. }, .. }) = report {
            *blocker = Some(Blocker { lock: found[2].to_owned(), owner });
        }
        true
    }

    /// A line that may belong to the caller's open report.
    fn body(&mut self, line: &Line<'_>) {
        let caller = Self::caller(line);
        let Some(open) = self.open.get_mut(&caller) else { return };
        let finding = &mut self.findings[open.index];
        let message = line.message;
        open.idle += 1;
        let mut ended = open.idle > PATIENCE;
        if let Some((cpu, task)) = cpu_and_task(message) {
            finding.cpu = finding.cpu.or(Some(cpu));
            finding.task = finding.task.take().or(Some(task));
            open.idle = 0;
        } else if message == "Call Trace:" {
            open.in_stack = true;
            open.idle = 0;
        } else if let Some(place) = message.strip_prefix("RIP: 0010:") {
            // The instruction pointer is the leaf; the copy behind the stack is user space's or a repetition.
            if let (true, Some(frame)) = (finding.stack.is_empty(), Frame::parse(place)) {
                finding.stack.push(frame);
            }
            open.idle = 0;
        } else if open.in_stack {
            match message.trim() {
                "<IRQ>" | "<NMI>" | "<SOFTIRQ>" => open.in_interrupt = true,
                "</IRQ>" | "</NMI>" | "</SOFTIRQ>" => {
                    open.in_interrupt = false;
                    // What stood at the top was interrupted code only if the registers were the task's.
                    for frame in &mut finding.stack {
                        frame.interrupt = true;
                    }
                }
                "</TASK>" => {
                    finding.complete = true;
                    ended = true;
                }
                text => {
                    if let Some(frame) = Frame::parse(text).filter(|_| message.starts_with(' ')) {
                        finding.stack.push(Frame { interrupt: open.in_interrupt, ..frame });
                        open.idle = 0;
                    }
                }
            }
        }
        if ended {
            self.open.remove(&caller);
        }
    }
}

/// `CPU: 2 UID: 0 PID: 60 Comm: faulter-1 Tainted: G ...`
fn cpu_and_task(message: &str) -> Option<(u32, Task)> {
    static CPU: LazyLock<Regex> = LazyLock::new(|| {
        #[expect(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
        Regex::new(
            r"^CPU: (\d+) (?:UID: \d+ )?PID: (\d+) Comm: (.*?) (?:Kdump: loaded )?(?:Not tainted|Tainted: )",
        )
        .unwrap()
    });
    let found = CPU.captures(message)?;
    Some((found[1].parse().ok()?, Task { comm: found[3].to_owned(), pid: found[2].parse().ok()? }))
}

#[cfg(test)]
mod tests;

//! Which console line begins a complaint, and of what kind. Formats: `kernel/watchdog.c`, `kernel/hung_task.c`,
//! `kernel/workqueue.c`, `kernel/rcu/tree_stall.h`, `kernel/panic.c`, `mm/page_alloc.c`, `mm/memory.c`,
//! `arch/x86/mm/fault.c`, `mm/kasan/report.c` of 6.19.

use std::sync::LazyLock;

use regex::Regex;

use super::finding::{Kind, StuckPool, Task};
use super::workqueue::cpu_list;

/// What a header line says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) task: Option<Task>,
    pub(super) cpu: Option<u32>,
}

impl Header {
    fn of(kind: Kind) -> Self {
        Self { kind, task: None, cpu: None }
    }
}

struct Patterns {
    soft: Regex,
    hard: Regex,
    hung: Regex,
    stuck_pool: Regex,
    rcu: Regex,
    warn: Regex,
    bad_page: Regex,
    bad_accounting: Regex,
    sanitizer: Regex,
    slab: Regex,
    trap: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    #[expect(clippy::unwrap_used, reason = "constant patterns, compiled by the tests")]
    let pattern = |text: &str| Regex::new(text).unwrap();
    Patterns {
        soft: pattern(r"^BUG: soft lockup - CPU#(\d+) stuck for (\d+)s! \[(.*):(\d+)\]"),
        hard: pattern(r"^CPU(?:\d+): Watchdog detected hard LOCKUP on cpu (\d+)"),
        hung: pattern(
            r"^INFO: task (.*):(\d+) (?:blocked (?:in I/O wait )?|can't die )for more than (\d+) seconds",
        ),
        // Printed in pieces, between which another CPU's message may come: then the rest is on a line of its own.
        stuck_pool: pattern(r"^BUG: workqueue lockup - pool(?: cpus=(\S+))?(?:.* stuck for (\d+)s!)?"),
        rcu: pattern(r"^INFO: rcu_\w+ (?:self-)?detected (?:expedited )?stall"),
        warn: pattern(r"^WARNING: .*CPU[#:] ?(\d+)(?:: (.*)/(\d+)$| PID: (\d+))"),
        bad_page: pattern(r"^BUG: Bad page (?:state|map|cache)"),
        bad_accounting: pattern(r"^BUG: (?:Bad rss-counter|non-zero (?:pgtables_bytes|nr_ptes|nr_pmds))"),
        sanitizer: pattern(r"^(?:BUG: (?:KASAN|KCSAN|KFENCE|KMSAN): |UBSAN: )"),
        slab: pattern(r"^BUG [\w.:-]+ \(.*\): "),
        trap: pattern(
            r"^(?:Oops: |general protection fault|stack segment: |divide error: |invalid opcode: |int3: |PANIC: double fault)",
        ),
    }
});

/// Lines that look like a complaint and are none.
fn false_friend(message: &str) -> bool {
    const STARTS: [&str; 8] = [
        "INFO: lockdep is turned off",
        "INFO: Stall ended",
        "INFO: NMI handler",
        "BUG: MAX_LOCKDEP_",
        "BUG: MAX_STACK_TRACE_ENTRIES",
        "BUG: using smp_processor_id() suppressed",
        "WARNING: kunit",
        // `print_modules()` and friends end a report; they begin none.
        "WARNING! ",
    ];
    STARTS.iter().any(|start| message.starts_with(start))
        || message.ends_with("messages suppressed")
        || (message.starts_with("perf: ") || message.contains("took too long"))
}

/// Classifies a message; `None` for lines that begin no complaint.
pub(super) fn classify(message: &str) -> Option<Header> {
    let mut message = message;
    for prefix in ["watchdog: ", "rcu: ", "rust_kernel: ", "workqueue: "] {
        message = message.strip_prefix(prefix).unwrap_or(message);
    }
    // Complaints start in column one; a stack frame, a dump or an echo of the command line does not.
    if false_friend(message) || message.starts_with(' ') {
        return None;
    }
    liveness(message).or_else(|| crash(message))
}

fn liveness(message: &str) -> Option<Header> {
    let patterns = &*PATTERNS;
    let number =
        |text: Option<regex::Match<'_>>| text.and_then(|text| text.as_str().parse::<u64>().ok()).unwrap_or(0);
    let task = |comm: Option<regex::Match<'_>>, pid: Option<regex::Match<'_>>| {
        Some(Task { comm: comm?.as_str().to_owned(), pid: pid?.as_str().parse().ok()? })
    };
    if let Some(found) = patterns.soft.captures(message) {
        return Some(Header {
            kind: Kind::SoftLockup { seconds: number(found.get(2)) },
            task: task(found.get(3), found.get(4)),
            cpu: u32::try_from(number(found.get(1))).ok(),
        });
    }
    if let Some(found) = patterns.hard.captures(message) {
        return Some(Header {
            kind: Kind::HardLockup,
            task: None,
            cpu: u32::try_from(number(found.get(1))).ok(),
        });
    }
    if let Some(found) = patterns.hung.captures(message) {
        return Some(Header {
            kind: Kind::HungTask { seconds: number(found.get(3)), blocker: None },
            task: task(found.get(1), found.get(2)),
            cpu: None,
        });
    }
    if let Some(found) = patterns.stuck_pool.captures(message) {
        let cpus = found.get(1).map(|cpus| cpu_list(cpus.as_str())).unwrap_or_default();
        // The line number is the caller's to fill in.
        let pool = StuckPool { cpus, seconds: number(found.get(2)), line: 0 };
        return Some(Header::of(Kind::WorkqueueLockup { pools: vec![pool], items: Vec::new() }));
    }
    if patterns.rcu.is_match(message) {
        return Some(Header::of(Kind::RcuStall));
    }
    if message == "Showing busy workqueues and worker pools:" {
        return Some(Header::of(Kind::WorkqueueDump { items: Vec::new() }));
    }
    if let Some(cpu) =
        message.strip_prefix("NMI backtrace for cpu ").and_then(|cpu| cpu.trim_end().parse().ok())
    {
        return Some(Header { kind: Kind::CpuDump, task: None, cpu: Some(cpu) });
    }
    if message.starts_with("Out of memory: Killed process") {
        return Some(Header::of(Kind::OutOfMemory));
    }
    None
}

fn crash(message: &str) -> Option<Header> {
    let patterns = &*PATTERNS;
    if let Some(reason) = message.strip_prefix("Kernel panic - not syncing: ") {
        let of_a_watchdog = ["softlockup: hung tasks", "hung_task: blocked tasks", "Hard LOCKUP"]
            .iter()
            .any(|watchdog| reason.starts_with(watchdog));
        return Some(Header::of(Kind::Panic { of_a_watchdog }));
    }
    if message.starts_with("WARNING: ") {
        let found = patterns.warn.captures(message);
        let part = |index: usize| found.as_ref().and_then(|found| found.get(index)).map(|part| part.as_str());
        let task = part(2)
            .zip(part(3))
            .and_then(|(comm, pid)| Some(Task { comm: comm.to_owned(), pid: pid.parse().ok()? }));
        return Some(Header { kind: Kind::Warning, task, cpu: part(1).and_then(|cpu| cpu.parse().ok()) });
    }
    let kind = if message.starts_with("panicked at ") {
        Kind::RustPanic
    } else if patterns.bad_page.is_match(message) {
        Kind::BadPage
    } else if patterns.bad_accounting.is_match(message) {
        Kind::BadAccounting
    } else if patterns.sanitizer.is_match(message) || patterns.slab.is_match(message) {
        Kind::Sanitizer
    } else if message.starts_with("BUG: kernel NULL pointer") || message.starts_with("BUG: unable to handle")
    {
        Kind::Oops
    } else if message.starts_with("BUG: ") || message.starts_with("kernel BUG at ") {
        Kind::KernelBug
    } else if patterns.trap.is_match(message) {
        Kind::Oops
    } else {
        return None;
    };
    Some(Header::of(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(message: &str) -> Option<Kind> {
        classify(message).map(|header| header.kind)
    }

    #[test]
    fn liveness_reports() {
        let soft = classify("watchdog: BUG: soft lockup - CPU#139 stuck for 52s! [kworker/u900:1:9985]")
            .expect("soft lockup");
        assert_eq!(soft.kind, Kind::SoftLockup { seconds: 52 });
        assert_eq!(soft.task, Some(Task { comm: "kworker/u900:1".into(), pid: 9985 }));
        assert_eq!(soft.cpu, Some(139));
        let hung = classify("INFO: task init:1 blocked for more than 8 seconds.").expect("hung task");
        assert_eq!(hung.kind, Kind::HungTask { seconds: 8, blocker: None });
        assert_eq!(hung.task.map(|task| task.pid), Some(1));
        assert!(matches!(
            kind("watchdog: CPU1: Watchdog detected hard LOCKUP on cpu 2"),
            Some(Kind::HardLockup)
        ));
        let Some(Kind::WorkqueueLockup { pools, .. }) =
            kind("BUG: workqueue lockup - pool cpus=0,2-3 node=0 flags=0x0 nice=0 stuck for 8s!")
        else {
            panic!("no workqueue lockup");
        };
        assert_eq!((pools[0].cpus.as_slice(), pools[0].seconds), ([0, 2, 3].as_slice(), 8));
        let Some(Kind::WorkqueueLockup { pools, .. }) = kind("BUG: workqueue lockup - pool cpus=2") else {
            panic!("no workqueue lockup");
        };
        assert_eq!((pools[0].cpus.as_slice(), pools[0].seconds), ([2].as_slice(), 0));
        assert_eq!(
            classify("NMI backtrace for cpu 2").map(|header| (header.kind, header.cpu)),
            Some((Kind::CpuDump, Some(2)))
        );
        assert_eq!(kind("NMI backtrace for cpu 0 skipped: idling at default_idle+0x9/0x10"), None);
        for stall in [
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "rcu: INFO: rcu_sched detected expedited stalls on CPUs/tasks: { 2-... } 26 jiffies s: 205 root: 0x4/.",
        ] {
            assert_eq!(kind(stall), Some(Kind::RcuStall), "{stall}");
        }
    }

    #[test]
    fn crashes() {
        for (message, expected) in [
            ("BUG: kernel NULL pointer dereference, address: 0000000000000008", Kind::Oops),
            ("BUG: unable to handle page fault for address: ffffc90000000000", Kind::Oops),
            (
                "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
                Kind::Oops,
            ),
            ("kernel BUG at mm/huge_memory.c:3012!", Kind::KernelBug),
            ("BUG: sleeping function called from invalid context at mm/memory.c:1", Kind::KernelBug),
            ("BUG: Bad page state in process storm  pfn:0fcf1", Kind::BadPage),
            (
                "BUG: Bad rss-counter state mm:00000000f0 type:MM_ANONPAGES val:1 Comm:storm Pid:3",
                Kind::BadAccounting,
            ),
            ("BUG: KASAN: slab-use-after-free in hsgpu_probe+0x1/0x2", Kind::Sanitizer),
            ("UBSAN: shift-out-of-bounds in mm/hmm.c:3:4", Kind::Sanitizer),
            ("BUG kmalloc-64 (Tainted: G    B  ): Redzone overwritten", Kind::Sanitizer),
            ("rust_kernel: panicked at driver/vram.rs:10:5:", Kind::RustPanic),
            ("Kernel panic - not syncing: Fatal exception", Kind::Panic { of_a_watchdog: false }),
            ("Kernel panic - not syncing: softlockup: hung tasks", Kind::Panic { of_a_watchdog: true }),
        ] {
            assert_eq!(kind(message), Some(expected), "{message}");
        }
        let warn =
            classify("WARNING: mm/migrate_device.c:576 at migrate_device_unmap+0x12/0x345, CPU#3: storm/57")
                .expect("a warning");
        assert_eq!((warn.task, warn.cpu), (Some(Task { comm: "storm".into(), pid: 57 }), Some(3)));
        let old =
            classify("WARNING: CPU: 2 PID: 9 at mm/x.c:1 f+0x1/0x2").expect("a warning of older kernels");
        assert_eq!(old.cpu, Some(2));
    }

    #[test]
    fn false_friends_say_nothing() {
        for message in [
            "INFO: lockdep is turned off.",
            "INFO: Stall ended before state dump start",
            "INFO: NMI handler (perf_event_nmi_handler) took too long to run: 1.234 msecs",
            "perf: interrupt took too long (2510 > 2500), lowering kernel.perf_event_max_sample_rate to 79500",
            "Kernel command line: console=ttyS0 panic=-1 softlockup_panic=1 storm.scenario=BUG:",
            "  BUG: indented",
            "BUG: Bad page map: 3 messages suppressed",
            "workqueue: vmstat_update hogged CPU for >10000us 4 times, consider switching to WQ_UNBOUND",
            "rcu: Preemptible hierarchical RCU implementation.",
            "RCU CPU stall warnings timeout set to 60 (rcu_cpu_stall_timeout).",
            "Warning: unable to open an initial console.",
            "Modules linked in: hsgpu(O)",
            "Booting the kernel.",
        ] {
            assert_eq!(kind(message), None, "{message}");
        }
    }
}

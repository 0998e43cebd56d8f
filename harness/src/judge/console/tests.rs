use proptest::prelude::*;

use super::*;
use crate::judge::stack::{contains, stable};

/// The console of a real livelock: pristine 6.19.6, `preempt=none`, four CPUs.
const LIVELOCK: &str = include_str!("../../../tests/data/drain-livelock.console");

fn scan(console: &str) -> Vec<Finding> {
    let mut scanner = Scanner::new();
    scanner.feed(console.as_bytes());
    scanner.finish();
    scanner.findings()
}

#[test]
fn a_recorded_livelock() {
    let findings = scan(LIVELOCK);
    let detectors: Vec<&Finding> =
        findings.iter().filter(|finding| finding.class() == Class::Detector).collect();
    assert!(findings.iter().all(|finding| finding.class() != Class::Crash), "{findings:#?}");
    let Kind::WorkqueueLockup { pools, items } = &detectors[0].kind else { panic!("{:?}", detectors[0]) };
    assert_eq!(pools.iter().map(|pool| pool.cpus[0]).collect::<Vec<_>>(), [1, 2, 3]);
    let drain = items.iter().find(|item| item.flusher.is_some()).expect("a flushed item");
    assert_eq!(
        (drain.function.as_str(), drain.workqueue.as_str()),
        ("lru_add_drain_per_cpu", "mm_percpu_wq")
    );
    assert_eq!((drain.flusher, drain.cpus.as_slice()), (Some(1), [1].as_slice()));

    let soft: Vec<&&Finding> =
        detectors.iter().filter(|finding| matches!(finding.kind, Kind::SoftLockup { .. })).collect();
    assert_eq!(soft[0].cpu, Some(2));
    assert_eq!(soft[0].task, Some(Task { comm: "faulter-1".into(), pid: 54 }));
    for lockup in &soft[..3] {
        assert!(lockup.complete && contains(&lockup.stack, "hmm_range_fault"), "{lockup:#?}");
        assert!(contains(&lockup.stack, "dmirror_fault"));
    }
    let hung =
        detectors.iter().find(|finding| matches!(finding.kind, Kind::HungTask { .. })).expect("a hung task");
    assert_eq!(hung.task, Some(Task { comm: "init".into(), pid: 1 }));
    assert_eq!(
        stable(&hung.stack, 4),
        ["__lru_add_drain_all", "lru_add_drain_all", "migrate_device_unmap", "migrate_vma_setup"]
    );
    assert_eq!(hung.title, "INFO: task init:1 blocked for more than 8 seconds.");
    let line =
        LIVELOCK.lines().nth(usize::try_from(hung.line - 1).expect("a line number")).expect("the line");
    assert!(line.ends_with(&hung.title), "{line}");
}

#[test]
fn an_oops_is_one_finding() {
    let console = "\
[    4.000001] BUG: kernel NULL pointer dereference, address: 0000000000000008
[    4.000002] #PF: supervisor read access in kernel mode
[    4.000003] #PF: error_code(0x0000) - not-present page
[    4.000004] PGD 0 P4D 0 
[    4.000005] Oops: Oops: 0000 [#1] SMP NOPTI
[    4.000006] CPU: 1 UID: 0 PID: 57 Comm: storm Tainted: G           O        6.19.6 #1 PREEMPT(none) 
[    4.000007] Tainted: [O]=OOT_MODULE
[    4.000008] RIP: 0010:do_swap_page+0x128b/0x1aa0
[    4.000009] Code: 56 00
[    4.000010] Call Trace:
[    4.000011]  <TASK>
[    4.000012]  __handle_mm_fault+0x6bf/0x980
[    4.000013]  asm_exc_page_fault+0x26/0x30
[    4.000014] RIP: 0033:0x44061b
[    4.000015]  </TASK>
[    4.000016] Modules linked in: hsgpu(O)
[    4.000017] CR2: 0000000000000008
[    4.000018] ---[ end trace 0000000000000000 ]---
[    4.000019] RIP: 0010:do_swap_page+0x128b/0x1aa0
[    4.000020] Kernel panic - not syncing: Fatal exception
[    4.000021] ---[ end Kernel panic - not syncing: Fatal exception ]---
";
    let findings = scan(console);
    assert_eq!(findings.len(), 2, "{findings:#?}");
    assert_eq!(findings[0].kind, Kind::Oops);
    assert_eq!(findings[0].stack[0].function, "do_swap_page");
    assert_eq!((findings[0].cpu, findings[0].complete), (Some(1), true));
    assert_eq!(findings[0].task.as_ref().map(|task| task.comm.as_str()), Some("storm"));
    assert_eq!(findings[1].kind, Kind::Panic { of_a_watchdog: false });
}

#[test]
fn a_rust_panic_takes_its_bug_and_its_stack_with_it() {
    let console = "\
[    3.100000] rust_kernel: panicked at driver/vram.rs:10:5:
[    3.100001] index out of bounds: the len is 4 but the index is 4
[    3.100002] ------------[ cut here ]------------
[    3.100003] kernel BUG at rust/helpers/bug.c:8!
[    3.100004] Oops: invalid opcode: 0000 [#1] SMP NOPTI
[    3.100005] CPU: 0 UID: 0 PID: 1 Comm: init Tainted: G           O        6.19.6 #1 PREEMPT(none) 
[    3.100006] RIP: 0010:rust_helper_BUG+0x8/0x10
[    3.100007] Call Trace:
[    3.100008]  <TASK>
[    3.100009]  _RNvMs0_NtCs5Hc9Yb3x1Zk_5hsgpu7migrateNtB5_5Guard4wait+0x10/0x40 [hsgpu]
[    3.100010]  </TASK>
";
    let findings = scan(console);
    assert_eq!(findings.len(), 1, "{findings:#?}");
    assert_eq!(findings[0].kind, Kind::RustPanic);
    assert_eq!(findings[0].stack.len(), 2);
    assert_eq!(findings[0].stack[1].module.as_deref(), Some("hsgpu"));
}

#[test]
fn idle_tasks_are_no_victims() {
    let findings = scan("[   20.000000] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [swapper/1:0]\n");
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].class(), Class::Notice);
}

#[test]
fn reports_of_two_cpus_interleave_when_the_kernel_names_the_printer() {
    let console = "\
[   17.000000][   T31] INFO: task init:1 blocked for more than 8 seconds.
[   17.000001][   T31] task:init            state:D stack:0     pid:1     tgid:1     ppid:0      task_flags:0x400100 flags:0x00080000
[   17.000002][    C2] watchdog: BUG: soft lockup - CPU#2 stuck for 13s! [faulter-1:54]
[   17.000003][   T31] Call Trace:
[   17.000004][    C2] CPU: 2 UID: 0 PID: 54 Comm: faulter-1 Tainted: G           O        6.19.6 #1 PREEMPT(none) 
[   17.000005][   T31]  <TASK>
[   17.000006][    C2] RIP: 0010:do_swap_page+0x1/0x2
[   17.000007][   T31]  migrate_device_unmap+0x30b/0x320
[   17.000008][    C2] Call Trace:
[   17.000009][   T31]  </TASK>
[   17.000010][    C2]  hmm_range_fault+0x4b/0x70
[   17.000011][    C2]  </TASK>
";
    let findings = scan(console);
    assert_eq!(findings.len(), 2);
    assert_eq!(stable(&findings[0].stack, 9), ["migrate_device_unmap"]);
    assert_eq!(stable(&findings[1].stack, 9), ["do_swap_page", "hmm_range_fault"]);
    assert!(findings.iter().all(|finding| finding.complete));
}

#[test]
fn a_task_asked_for_by_sysrq_and_a_blocker() {
    let console = "\
[    9.000000] sysrq: Show Blocked State
[    9.000001] task:storm           state:D stack:0     pid:61    tgid:61    ppid:1      task_flags:0x400040 flags:0x00080000
[    9.000002] Call Trace:
[    9.000003]  <TASK>
[    9.000004]  __schedule+0x2aa/0x620
[    9.000005]  migrate_device_unmap+0x30b/0x320
[    9.000006]  </TASK>
[   12.000000] INFO: task a:b:9 blocked for more than 8 seconds.
[   12.000001] INFO: task a:b:9 is blocked on a mutex likely owned by task storm:61.
";
    let findings = scan(console);
    assert_eq!(findings[0].kind, Kind::TaskDump { state: 'D' });
    assert_eq!(findings[0].task, Some(Task { comm: "storm".into(), pid: 61 }));
    assert_eq!(stable(&findings[0].stack, 9), ["migrate_device_unmap"]);
    let Kind::HungTask { blocker: Some(blocker), .. } = &findings[1].kind else { panic!("{findings:#?}") };
    assert_eq!((blocker.lock.as_str(), blocker.owner.pid), ("mutex", 61));
}

#[test]
fn deferred_lines_are_put_in_the_order_of_the_guest() {
    let console = "\
[   10.000000] BUG: Bad rss-counter state mm:1 type:MM_ANONPAGES val:1 Comm:a Pid:1
[    9.500000] BUG: workqueue lockup - pool cpus=1 node=0 flags=0x0 nice=0 stuck for 8s!
";
    let findings = scan(console);
    assert!(matches!(findings[0].kind, Kind::WorkqueueLockup { .. }));
}

#[test]
fn a_second_boot_is_noticed() {
    let console =
        "[    0.000000] Linux version 6.19.6\n[    1.000000] x\n[    0.000000] Linux version 6.19.6\n";
    assert_eq!(scan(console)[0].kind, Kind::UnexpectedReboot);
}

proptest! {
    /// What the scanner finds does not depend on how the console arrived.
    #[test]
    fn any_split_gives_the_same_findings(cuts in prop::collection::vec(0..LIVELOCK.len(), 0..40)) {
        let mut cuts = cuts;
        cuts.sort_unstable();
        let mut scanner = Scanner::new();
        let mut from = 0;
        for cut in cuts {
            scanner.feed(&LIVELOCK.as_bytes()[from..cut]);
            from = cut;
        }
        scanner.feed(&LIVELOCK.as_bytes()[from..]);
        scanner.finish();
        prop_assert_eq!(scanner.findings(), scan(LIVELOCK));
    }

    /// Noise does not make it panic, whatever it is.
    #[test]
    fn garbage_is_survived(noise in prop::collection::vec(any::<u8>(), 0..4096), at in 0..LIVELOCK.len()) {
        let mut scanner = Scanner::new();
        scanner.feed(&LIVELOCK.as_bytes()[..at]);
        scanner.feed(&noise);
        scanner.feed(&LIVELOCK.as_bytes()[at..]);
        scanner.finish();
        let _ = scanner.findings();
    }
}

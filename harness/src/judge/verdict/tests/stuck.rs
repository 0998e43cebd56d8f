//! Runs in which nothing completes any more: livelock, deadlock, a device that holds work, and what looks like them.

use super::*;

#[test]
fn livelock_needs_all_of_it() {
    let mut run = Run::new(limits());
    run.stall().samples(&livelocked_cpus());
    assert_eq!(run.decide(), None, "no detector yet");
    run.workqueue_lockup(1);
    assert_eq!(run.decide(), None, "certain, but the kernel has not told who holds what");
    run.hung_task();
    for cpu in 1..=3 {
        run.at(14.0).beat().soft_lockup(cpu, 52 + cpu, "faulter", "hmm_range_fault");
    }
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Livelock, "{judgement:#?}");
    assert_eq!(judgement.spinners, [1, 2, 3]);
    assert_eq!(judgement.frames, ["hmm_range_fault", "hsgpu_access"]);
    assert!(
        judgement
            .evidence
            .iter()
            .all(|evidence| !matches!(evidence.weight, Weight::Missing | Weight::Against))
    );
    let sources: std::collections::BTreeSet<Source> = judgement
        .evidence
        .iter()
        .filter(|evidence| evidence.weight == Weight::For)
        .map(|evidence| evidence.source)
        .collect();
    assert!(
        [Source::Device, Source::Storm, Source::Samples, Source::Console]
            .iter()
            .all(|source| sources.contains(source))
    );
}

fn in_tree(cpu: u32, trunk: &[&str]) -> CpuSummary {
    CpuSummary { trunk: trunk.iter().map(|&function| function.to_owned()).collect(), ..spinning(cpu) }
}

/// A CPU with its interrupts off answers no IPI, and whoever sent one spins as well.
#[test]
fn a_cpu_that_waits_for_the_spinner_is_not_to_blame() {
    let victim = in_tree(0, &["smp_call_function_many_cond", "on_each_cpu_cond_mask", "__x64_sys_munmap"]);
    let culprit =
        in_tree(1, &["delay_tsc", "0xffffffffa0028124", "do_one_initcall", "__x64_sys_init_module"]);
    for other in [idle(2), in_tree(2, &["native_queued_spin_lock_slowpath", "_raw_spin_lock", "do_exit"])] {
        let mut run = Run::new(limits());
        run.stall().samples(&[victim.clone(), culprit.clone(), other]).workqueue_lockup(1);
        run.at(17.5).beat();
        let judgement = run.decide().expect("a judgement");
        assert_eq!(judgement.verdict, Verdict::Livelock, "{judgement:#?}");
        assert_eq!(judgement.spinners, [1]);
        assert_eq!(judgement.frames, ["delay_tsc", "do_one_initcall"]);
    }
}

#[test]
fn loops_with_nothing_in_common_still_have_a_name() {
    let mut run = Run::new(limits());
    let [one, two] = [1, 2].map(|cpu| in_tree(cpu, &["walk_page_range", "hmm_range_fault", "hsgpu_access"]));
    let other = in_tree(0, &["delay_tsc", "do_one_initcall", "__x64_sys_init_module"]);
    run.stall().samples(&[other, one, two]).workqueue_lockup(1);
    run.at(17.5).beat();
    let judgement = run.decide().expect("a judgement");
    assert_eq!((judgement.verdict, judgement.spinners.len()), (Verdict::Livelock, 3), "{judgement:#?}");
    assert_eq!(judgement.frames, ["hmm_range_fault", "hsgpu_access"], "what most of them have");
}

/// Everybody waits for a lock that nobody gives back: the waiting is the loop.
#[test]
fn waiting_alone_is_a_loop() {
    let mut run = Run::new(limits());
    let [one, two] = [1, 2]
        .map(|cpu| in_tree(cpu, &["native_queued_spin_lock_slowpath", "_raw_spin_lock", "hmm_vma_fault"]));
    run.stall().samples(&[idle(0), one, two]).workqueue_lockup(1);
    run.at(17.5).beat();
    let judgement = run.decide().expect("a judgement");
    assert_eq!(
        (judgement.verdict, &judgement.spinners[..]),
        (Verdict::Livelock, &[1, 2][..]),
        "{judgement:#?}"
    );
    assert_eq!(judgement.frames.last().map(String::as_str), Some("hmm_vma_fault"));
}

#[test]
fn a_silent_detector_is_waited_for_only_so_long() {
    let mut run = Run::new(limits());
    run.stall().samples(&livelocked_cpus()).workqueue_lockup(2);
    run.at(17.5).beat();
    assert_eq!(run.verdict(), Some(Verdict::Livelock));
}

#[test]
fn each_missing_part_denies_a_livelock() {
    type Step = fn(&mut Run);
    let cases: [(&str, Step); 6] = [
        ("no detector", |run| {
            run.samples(&livelocked_cpus());
        }),
        ("detector of an idle task alone", |run| {
            run.samples(&livelocked_cpus()).soft_lockup(1, 0, "swapper/1", "default_idle");
        }),
        ("detector of another CPU", |run| {
            run.samples(&[idle(0), spinning(1), idle(2), idle(3)]).workqueue_lockup(2);
        }),
        ("detector of another place", |run| {
            run.samples(&[idle(0), spinning(1), idle(2), idle(3)]).soft_lockup(1, 9, "x", "vmstat_update");
        }),
        ("CPUs in many places", |run| {
            run.samples(&[busy(0), busy(1), busy(2), busy(3)]).soft_lockup(
                1,
                54,
                "faulter",
                "hmm_range_fault",
            );
        }),
        ("no samples", |run| {
            run.samples(&[]).soft_lockup(1, 54, "faulter", "hmm_range_fault");
        }),
    ];
    for (name, step) in cases {
        let mut run = Run::new(limits());
        run.stall();
        step(&mut run);
        run.at(20.0).beat();
        assert_eq!(run.decide(), None, "{name}");
        run.at(53.5).beat();
        let judgement = run.decide().expect("the hard stop");
        assert_eq!(judgement.verdict, Verdict::HarnessError, "{name}: {judgement:#?}");
        assert!(judgement.reason.starts_with("inconclusive"), "{name}: {}", judgement.reason);
        assert!(judgement.frames.is_empty() && judgement.spinners.is_empty());
    }
}

#[test]
fn a_frozen_emulator_is_no_livelock() {
    let mut run = Run::new(limits());
    let frozen = |cpu| CpuSummary { distinct_ips: 1, ..spinning(cpu) };
    run.stall().samples(&[idle(0), frozen(1), frozen(2), frozen(3)]).soft_lockup(
        1,
        54,
        "faulter",
        "hmm_range_fault",
    );
    run.at(53.5).beat();
    let judgement = run.decide().expect("the hard stop");
    assert_eq!(judgement.verdict, Verdict::HarnessError);
    assert!(judgement.reason.contains("emulator"), "{}", judgement.reason);
}

#[test]
fn a_slow_guest_on_a_loaded_host_is_no_livelock() {
    // Four seconds between two completions, lockup reports, CPUs in one tree whenever looked at: still progress.
    let mut run = Run::new(limits());
    for n in 1..=15 {
        run.at(2.0 + 4.0 * f64::from(n)).work(1).device(1, 0).samples(&livelocked_cpus());
        run.soft_lockup(1, 54, "faulter", "hmm_range_fault");
        assert_eq!(run.decide(), None);
    }
    run.at(63.0).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Pass));
}

#[test]
fn completions_of_the_device_alone_are_progress() {
    let mut run = Run::new(limits());
    run.at(3.0).work(1);
    for n in 4..30 {
        run.at(f64::from(n)).beat().device(1, 0).samples(&livelocked_cpus()).soft_lockup(
            1,
            54,
            "faulter",
            "hmm_range_fault",
        );
        assert_eq!(run.decide(), None);
    }
}

#[test]
fn a_guest_whose_clock_stands_is_not_judged_by_the_hosts() {
    // The host ran 20 s, the guest half a second: it was simply not running.
    let mut run = Run::new(limits());
    run.at(3.0).work(1).device(1, 0);
    run.now = 23.0;
    run.observe(Observation::Storm(Record {
        t: 3 * S + S / 2,
        event: Event::Progress(run.progress.clone()),
    }));
    run.samples(&livelocked_cpus()).device(0, 0);
    assert_eq!(run.decide(), None);
}

#[test]
fn resting_workers_are_not_stuck() {
    let mut run = Run::new(limits());
    run.progress.outstanding = 0;
    run.stall().samples(&livelocked_cpus()).workqueue_lockup(1);
    run.at(20.0).beat();
    assert_eq!(run.decide(), None);
}

#[test]
fn a_heartbeat_that_never_came_is_no_excuse() {
    let mut run = Run::new(limits());
    run.at(16.0).device(0, 0).samples(&livelocked_cpus()).soft_lockup(1, 54, "faulter", "hmm_range_fault");
    run.at(17.0).observe(Observation::GuestTime(17 * S));
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Livelock, "{judgement:#?}");
}

#[test]
fn deadlock() {
    let mut run = Run::new(limits());
    run.stall().samples(&[idle(0), idle(1), idle(2), idle(3)]);
    assert_eq!(run.decide(), None, "idle CPUs alone are no deadlock");
    run.hung_task();
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Deadlock, "{judgement:#?}");
    assert_eq!(judgement.frames, ["__lru_add_drain_all", "migrate_device_unmap"]);
}

#[test]
fn a_device_that_holds_work_is_named_before_anything_the_guest_does() {
    for cpus in [vec![idle(0), idle(1), idle(2), idle(3)], livelocked_cpus()] {
        let mut run = Run::new(limits());
        run.at(3.0).work(10).device(20, 1);
        for n in 4..18 {
            run.at(f64::from(n)).beat().device(0, 1).samples(&cpus);
        }
        run.hung_task().soft_lockup(1, 54, "faulter", "hmm_range_fault");
        assert_eq!(run.verdict(), Some(Verdict::DeviceStall));
    }
}

/// A job that waits for the guest to serve its page fault is the guest's work: whoever keeps the driver from it is
/// the one to name.
#[test]
fn a_stalled_job_is_no_device_stall() {
    let mut run = Run::new(limits());
    run.stats.stalled = 1;
    run.stall().samples(&[idle(0), idle(1), idle(2), idle(3)]).hung_task();
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Deadlock, "{judgement:#?}");
    let says = |evidence: &Evidence| evidence.says.contains("1 jobs stalled on page faults");
    assert!(judgement.evidence.iter().any(says), "{judgement:#?}");
}

#[test]
fn a_queue_that_moves_is_no_stall() {
    let mut run = Run::new(limits());
    for n in 3..40 {
        run.at(f64::from(n)).beat().device(1, 3).samples(&[idle(0), idle(1), idle(2), idle(3)]);
        assert_eq!(run.decide(), None);
    }
}

#[test]
fn the_panic_of_a_watchdog_is_the_livelock_it_reports() {
    let mut run = Run::new(Limits { guest_time_only: true, ..limits() });
    run.stall().samples(&livelocked_cpus());
    run.at(14.0)
        .soft_lockup(2, 54, "faulter", "hmm_range_fault")
        .console(&["Kernel panic - not syncing: softlockup: hung tasks"]);
    assert_eq!(run.decide(), None, "a deterministic guest ends itself");
    run.ended(Ended::Reset);
    assert_eq!(run.verdict(), Some(Verdict::Livelock));
}

#[test]
fn a_deterministic_guest_is_not_cut_short_unless_it_sleeps_for_ever() {
    let mut run = Run::new(Limits { guest_time_only: true, ..limits() });
    run.stall().samples(&[idle(0), idle(1), idle(2), idle(3)]).hung_task();
    run.at(20.0).beat();
    assert_eq!(run.decide(), None);
    run.at(46.0).beat();
    assert_eq!(run.verdict(), Some(Verdict::Deadlock));

    // No watchdog barks at a SCHED_FIFO task that is preempted now and then, and loops on.
    let patient = Limits { guest_time_only: true, hard_stop: Duration::from_secs(1000), ..limits() };
    let mut run = Run::new(patient);
    run.stall().samples(&livelocked_cpus()).workqueue_lockup(1);
    run.at(100.0).beat();
    assert_eq!(run.decide(), None);
    run.at(151.0).beat();
    assert_eq!(run.decide().map(|judgement| judgement.verdict), Some(Verdict::Livelock));

    let mut run = Run::new(Limits { guest_time_only: true, ..limits() });
    run.at(3.0).console(&["BUG: Bad page state in process storm  pfn:0fcf1"]);
    run.at(7.0).work(5);
    assert_eq!(run.decide(), None, "the guest goes on, and so does its log");
    run.at(8.0).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Crash));
}

#[test]
fn idle_victims_are_known_by_name_and_pid() {
    assert!(Task { comm: "swapper/3".into(), pid: 0 }.is_idle());
    assert!(!Task { comm: "swapper-test".into(), pid: 4 }.is_idle());
}

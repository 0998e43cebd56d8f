//! Runs that end: well, with a defect of the kernel, or by the bench's own fault.

use super::*;

#[test]
fn pass() {
    let mut run = Run::new(limits());
    run.at(3.0).work(5000).device(9000, 0);
    run.at(7.0).work(5000).device(9000, 0).done();
    assert_eq!(run.decide(), None, "the machine still runs");
    run.at(9.0).ended(Ended::PoweredOff);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Pass, "{judgement:#?}");
    assert_eq!(judgement.recovered, None);
}

#[test]
fn nothing_done_is_no_pass() {
    let mut run = Run::new(limits());
    run.at(3.0).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::HarnessError));
}

#[test]
fn a_scenario_without_workers_passes_by_ending() {
    let mut run = Run::new(limits());
    let start =
        Event::Start { scenario: "boot".into(), seed: 1, parameters: BTreeMap::new(), workers: Vec::new() };
    run.at(2.0).storm(start).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Pass));
}

#[test]
fn crash_before_and_during_a_livelock() {
    let mut run = Run::new(limits());
    run.stall().samples(&livelocked_cpus()).workqueue_lockup(1).hung_task();
    run.at(12.0).console(&[
        "Oops: general protection fault: 0000 [#1] SMP",
        "RIP: 0010:do_swap_page+0x1/0x2",
        "Call Trace:",
        " <TASK>",
        " </TASK>",
    ]);
    assert_eq!(run.decide(), None, "the report may still be coming");
    run.at(14.5);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Crash, "{judgement:#?}");
    assert_eq!(judgement.frames, ["do_swap_page"]);
}

#[test]
fn other_panics_are_crashes() {
    let mut run = Run::new(limits());
    run.at(3.0)
        .console(&["Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"])
        .ended(Ended::Reset);
    assert_eq!(run.verdict(), Some(Verdict::Crash));
}

#[test]
fn corruption_is_named_before_what_it_leads_to() {
    let event = || Event::Corruption {
        worker: "faulter-1".into(),
        page: 3,
        expected: "stamp 3.1".into(),
        found: "zeroes".into(),
    };
    let mut run = Run::new(limits());
    run.at(3.0).storm(event());
    run.at(4.0).console(&["BUG: Bad page state in process storm  pfn:0fcf1"]).ended(Ended::PoweredOff);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Corruption);
    assert_eq!(judgement.also.len(), 1);

    let mut run = Run::new(limits());
    run.at(3.0).console(&["BUG: Bad page state in process storm  pfn:0fcf1"]);
    run.at(4.0).storm(event()).ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Crash));
}

#[test]
fn a_failed_invariant_is_corruption_though_the_scenario_was_done() {
    let mut run = Run::new(limits());
    run.at(3.0).work(5).done();
    run.storm(Event::Invariant { name: "vram-free".into(), detail: "expected 10, found 9".into() })
        .ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Corruption));
}

#[test]
fn the_bench_takes_its_own_blame() {
    for ended in [
        Ended::QemuFailed("signal 9".into()),
        Ended::DeviceFailed("signal 9".into()),
        Ended::BenchFailed("disk full".into()),
        Ended::PoweredOff,
        Ended::Reset,
    ] {
        let mut run = Run::new(limits());
        run.at(3.0).work(10).ended(ended.clone());
        assert_eq!(run.verdict(), Some(Verdict::HarnessError), "{ended:?}");
    }
}

#[test]
fn what_the_guest_says_after_its_device_was_taken_away_is_not_held_against_it() {
    let warn = ["WARNING: driver.rs:1 at hsgpu_wait+0x1/0x2, CPU#1: storm/54"];
    let mut run = Run::new(limits());
    run.at(3.0).work(10).ended(Ended::DeviceFailed("signal 9".into()));
    run.console(&warn);
    assert_eq!(run.verdict(), Some(Verdict::HarnessError));

    let mut run = Run::new(limits());
    run.at(3.0).work(10).console(&warn);
    run.at(4.0).ended(Ended::DeviceFailed("signal 9".into()));
    assert_eq!(run.verdict(), Some(Verdict::Crash), "it had complained before");
}

#[test]
fn no_hello_no_gpus_no_start() {
    let mut run = Run::new(limits());
    run.judge = Judge::new(limits());
    run.at(61.0);
    let judgement = run.decide().expect("out of time");
    assert_eq!(judgement.verdict, Verdict::HarnessError);
    assert!(judgement.reason.contains("hello"), "{}", judgement.reason);

    run.judge = Judge::new(limits());
    run.at(1.0).storm(Event::Hello { version: "1".into(), kernel: "6.19.6".into(), cpus: 4 });
    run.at(2.0).storm(Event::Error { message: "no node /dev/hmm_dmirror1".into() });
    assert_eq!(run.decide(), None);
    run.at(4.5);
    let judgement = run.decide().expect("an error of the storm");
    assert_eq!(judgement.verdict, Verdict::HarnessError);
    assert!(judgement.reason.contains("hmm_dmirror1"));
}

#[test]
fn too_long_is_slow_and_not_stuck() {
    let mut run = Run::new(limits());
    for n in 3..620 {
        run.at(f64::from(n)).work(1).device(1, 0);
    }
    let judgement = run.decide().expect("out of time");
    assert_eq!(judgement.verdict, Verdict::Slow);
}

#[test]
fn below_the_least_rate_is_slow() {
    let mut run = Run::new(Limits { least_rate: Some(1000.0), ..limits() });
    run.at(3.0).work(100).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Slow));
}

#[test]
fn progress_that_came_back_is_recorded() {
    let mut run = Run::new(limits());
    run.stall();
    run.progress.round = 7;
    run.at(11.0).work(10).device(10, 0);
    run.at(12.0).done().ended(Ended::PoweredOff);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Pass);
    let recovered = judgement.recovered.expect("recovered");
    assert_eq!(recovered.times, 1);
    assert!((7_900..=8_100).contains(&recovered.longest_ms), "{recovered:?}");
}

#[test]
fn a_lost_power_off_is_the_benchs() {
    let mut run = Run::new(limits());
    run.at(3.0).work(10).done();
    run.at(60.0);
    assert_eq!(run.verdict(), Some(Verdict::HarnessError));
}

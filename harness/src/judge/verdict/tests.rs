//! Every verdict, and the near misses that must not get it.

use std::collections::BTreeMap;

use hmmstorm_abi::wire::control::GpuStats;
use hmmstorm_abi::wire::event::{Event, Record, Unserved};

use super::*;
use crate::judge::console::{Scanner, Task};
use crate::judge::sampler::CpuSummary;

const S: u64 = 1_000_000_000;

fn limits() -> Limits {
    Limits { detectors: Duration::from_secs(14), ..Limits::new(Duration::from_secs(5), 1.0) }
}

/// A run whose guest and host clocks go alike.
struct Run {
    judge: Judge,
    now: f64,
    stats: GpuStats,
    progress: Progress,
    console: Scanner,
}

impl Run {
    fn new(limits: Limits) -> Self {
        let mut run = Self {
            judge: Judge::new(limits),
            now: 0.0,
            stats: GpuStats::default(),
            progress: Progress {
                outstanding: 4,
                workers: vec![0; 4],
                pids: vec![1, 53, 54, 55],
                ..Progress::default()
            },
            console: Scanner::new(),
        };
        run.at(1.0).storm(Event::Hello { version: "1".into(), kernel: "6.19.6".into(), cpus: 4 });
        run.at(1.5).storm(Event::Bound { gpus: 2, modules: BTreeMap::new() });
        let workers = ["migrator", "faulter-0", "faulter-1", "faulter-2"].map(str::to_owned).to_vec();
        run.at(2.0).storm(Event::Start {
            scenario: "drain-livelock".into(),
            seed: 1,
            parameters: BTreeMap::new(),
            workers,
        });
        run
    }

    fn at(&mut self, seconds: f64) -> &mut Self {
        self.now = seconds;
        self
    }

    fn host(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    fn observe(&mut self, observation: Observation) -> &mut Self {
        self.judge.observe(self.host(), observation);
        self
    }

    fn storm(&mut self, event: Event) -> &mut Self {
        let t = self.host().as_nanos() as u64;
        self.observe(Observation::Storm(Record { t, event }))
    }

    fn beat(&mut self) -> &mut Self {
        let progress = self.progress.clone();
        self.storm(Event::Progress(progress))
    }

    fn work(&mut self, operations: u64) -> &mut Self {
        self.progress.operations += operations;
        self.progress.faults += operations / 2;
        self.progress.workers[1] += operations;
        self.beat()
    }

    fn device(&mut self, completions: u64, queued: u64) -> &mut Self {
        self.stats.completions += completions;
        self.stats.queued = queued;
        let stats = self.stats;
        self.observe(Observation::Device(vec![stats, GpuStats::default()]))
    }

    fn console(&mut self, lines: &[&str]) -> &mut Self {
        for line in lines {
            self.console.feed(format!("[{:12.6}] {line}\n", self.now).as_bytes());
        }
        let findings = self.console.findings();
        self.observe(Observation::Console(findings))
    }

    fn soft_lockup(&mut self, cpu: u32, pid: u32, comm: &str, function: &str) -> &mut Self {
        let lines = [
            format!("watchdog: BUG: soft lockup - CPU#{cpu} stuck for 13s! [{comm}:{pid}]"),
            format!(
                "CPU: {cpu} UID: 0 PID: {pid} Comm: {comm} Tainted: G           O        6.19.6 #1 PREEMPT(none) "
            ),
            "RIP: 0010:do_swap_page+0x1/0x2".to_owned(),
            "Call Trace:".to_owned(),
            " <TASK>".to_owned(),
            format!(" {function}+0x1/0x2"),
            " </TASK>".to_owned(),
        ];
        self.console(&lines.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn hung_task(&mut self) -> &mut Self {
        self.console(&[
            "INFO: task migrator:1 blocked for more than 6 seconds.",
            "task:migrator        state:D stack:0     pid:1     tgid:1     ppid:0      task_flags:0x400100 flags:0x00080000",
            "Call Trace:",
            " <TASK>",
            " __flush_work+0x1/0x2",
            " __lru_add_drain_all+0x1/0x2",
            " migrate_device_unmap+0x1/0x2",
            " </TASK>",
        ])
    }

    fn workqueue_lockup(&mut self, cpu: u32) -> &mut Self {
        self.console(&[&format!(
            "BUG: workqueue lockup - pool cpus={cpu} node=0 flags=0x0 nice=0 stuck for 7s!"
        )])
    }

    fn samples(&mut self, cpus: &[CpuSummary]) -> &mut Self {
        self.observe(Observation::Samples(cpus.to_vec()))
    }

    fn ended(&mut self, ended: Ended) -> &mut Self {
        self.observe(Observation::Ended(ended))
    }

    fn done(&mut self) -> &mut Self {
        let progress = self.progress.clone();
        self.storm(Event::Done { progress, elapsed_ns: 8 * S, stats: Vec::new() }).storm(Event::Bye)
    }

    fn decide(&self) -> Option<Judgement> {
        self.judge.decide(self.host())
    }

    fn verdict(&self) -> Option<Verdict> {
        self.decide().map(|judgement| judgement.verdict)
    }

    /// The livelock's first seven seconds: progress until 3 s, then heartbeats alone.
    fn stall(&mut self) -> &mut Self {
        self.at(2.5).work(10).device(20, 0);
        self.at(3.0).work(10).device(20, 0);
        for half in 7..=20 {
            self.at(f64::from(half) / 2.0).beat().device(0, 0);
        }
        self
    }
}

fn spinning(cpu: u32) -> CpuSummary {
    let trunk = ["walk_page_range", "hmm_range_fault", "hsgpu_access", "__x64_sys_ioctl", "do_syscall_64"];
    CpuSummary {
        cpu,
        samples: 50,
        judged: 50,
        kernel: 50,
        trunk: trunk.map(str::to_owned).to_vec(),
        in_tree: 50,
        windows: 10,
        distinct_ips: 40,
        spins: true,
        ..CpuSummary::default()
    }
}

fn idle(cpu: u32) -> CpuSummary {
    CpuSummary {
        cpu,
        samples: 50,
        halted: 50,
        distinct_ips: 1,
        windows: 0,
        idle: true,
        ..CpuSummary::default()
    }
}

fn busy(cpu: u32) -> CpuSummary {
    CpuSummary { cpu, samples: 50, kernel: 25, user: 25, distinct_ips: 50, ..CpuSummary::default() }
}

fn livelocked_cpus() -> Vec<CpuSummary> {
    vec![idle(0), spinning(1), spinning(2), spinning(3)]
}

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

    let mut run = Run::new(Limits { guest_time_only: true, ..limits() });
    run.at(3.0).console(&["BUG: Bad page state in process storm  pfn:0fcf1"]);
    run.at(7.0).work(5);
    assert_eq!(run.decide(), None, "the guest goes on, and so does its log");
    run.at(8.0).done().ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Crash));
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
fn starvation() {
    let mut run = Run::new(Limits { starvation: Some(Duration::from_secs(5)), ..limits() });
    for n in 3..30 {
        run.at(f64::from(n)).work(10).device(10, 0);
        if run.decide().is_some() {
            break;
        }
    }
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Starvation, "{judgement:#?}");
    assert!(judgement.reason.contains("migrator"), "{}", judgement.reason);
}

/// An access that was begun at 4 s and given up at 14 s, for `idle` seconds of which nobody completed anything.
fn given_up(tries: u64, mm_faults: u64, idle: u64) -> Run {
    let mut run = Run::new(limits());
    run.at(3.0).work(10).device(10, 0);
    run.at(14.0).beat();
    run.storm(Event::Unserved(Unserved {
        worker: "faulter-0".into(),
        call: "HSGPU_ACCESS (read) on GPU 1".into(),
        page: 2,
        waited_ns: 10 * S,
        tries,
        mm_faults,
        idle_ns: idle * S,
    }));
    run
}

#[test]
fn tries_in_vain_are_a_livelock_if_nobody_gets_anywhere() {
    let mut run = given_up(5000, 5000, 9);
    // It is not to be mistaken for what it looks like from outside.
    assert_eq!(run.decide().map(|judgement| judgement.verdict), None);
    run.at(17.0).beat();
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Livelock, "{judgement:#?}");
    assert!(judgement.reason.contains("5000 calls") && judgement.spinners.is_empty(), "{}", judgement.reason);
    assert_eq!(judgement.frames, ["hmm_range_fault", "HSGPU_ACCESS"]);
    // However the run then ends, and what it did afterwards.
    run.work(10).ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Livelock));
}

#[test]
fn who_gives_up_first_need_not_be_who_loops() {
    // Seen with `ref-no-lock`: two faulters a CPU, and one of them never let the other have it.
    let mut run = given_up(3, 6, 9);
    run.at(14.2);
    run.storm(Event::Unserved(Unserved {
        worker: "faulter-1".into(),
        call: "HSGPU_ACCESS (read) on GPU 1".into(),
        page: 2,
        waited_ns: 10 * S,
        tries: 2906,
        mm_faults: 2909,
        idle_ns: 10 * S,
    }));
    run.ended(Ended::PoweredOff);
    let judgement = run.judge.conclude(Duration::from_secs(20));
    assert_eq!(judgement.verdict, Verdict::Livelock, "{judgement:#?}");
    assert!(judgement.reason.starts_with("faulter-1 got no page"), "{}", judgement.reason);
    assert!(judgement.evidence.iter().any(|evidence| evidence.says.starts_with("faulter-0 gave up first")));
}

#[test]
fn an_access_of_later_says_nothing_about_the_first() {
    let mut run = given_up(3, 6, 9);
    run.at(40.0);
    run.storm(Event::Unserved(Unserved {
        worker: "faulter-1".into(),
        call: "HSGPU_ACCESS (read) on GPU 1".into(),
        page: 2,
        waited_ns: 10 * S,
        tries: 2906,
        mm_faults: 2909,
        idle_ns: 10 * S,
    }));
    run.ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::HarnessError));
}

#[test]
fn one_call_that_faults_all_the_time_is_a_loop() {
    let mut run = given_up(1, 100_000, 9);
    run.ended(Ended::PoweredOff);
    assert_eq!(run.verdict(), Some(Verdict::Livelock));
}

#[test]
fn tries_in_vain_are_starvation_if_others_get_on() {
    let mut run = given_up(5000, 5000, 4);
    run.ended(Ended::PoweredOff);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::Starvation, "{judgement:#?}");
    assert!(judgement.reason.contains("others got on"), "{}", judgement.reason);
}

#[test]
fn who_speaks_first_need_not_be_who_tries() {
    let counters = |faults| Event::Counters {
        stats: vec![[("cpu_faults".to_owned(), faults), ("to_system".to_owned(), 7)].into_iter().collect()],
    };
    for (faults, verdict) in [(90_000, Verdict::Livelock), (3, Verdict::HarnessError)] {
        let mut run = given_up(1, 3, 9);
        run.at(6.0).storm(counters(100));
        run.at(14.0).storm(counters(100 + faults)).ended(Ended::PoweredOff);
        assert_eq!(run.verdict(), Some(verdict), "{faults}");
    }
}

#[test]
fn a_wait_without_tries_says_nothing() {
    let mut run = given_up(1, 3, 9);
    run.ended(Ended::PoweredOff);
    let judgement = run.decide().expect("a judgement");
    assert_eq!(judgement.verdict, Verdict::HarnessError, "{judgement:#?}");
}

#[test]
fn a_worker_at_rest_does_not_starve() {
    let mut run = Run::new(Limits { starvation: Some(Duration::from_secs(5)), ..limits() });
    // One goes on, the others are done.
    run.progress.busy = vec![false, true, false, false];
    for n in 3..30 {
        run.at(f64::from(n)).work(10).device(10, 0);
        assert!(run.decide().is_none(), "at {n} s: {:?}", run.decide());
    }
    run.progress.busy[0] = true;
    for n in 30..40 {
        run.at(f64::from(n)).work(10).device(10, 0);
    }
    assert_eq!(run.verdict(), Some(Verdict::Starvation));
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

#[test]
fn idle_victims_are_known_by_name_and_pid() {
    assert!(Task { comm: "swapper/3".into(), pid: 0 }.is_idle());
    assert!(!Task { comm: "swapper-test".into(), pid: 4 }.is_idle());
}

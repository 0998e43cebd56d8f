//! Runs in which somebody gets nothing, whether or not the others do.

use hmmstorm_abi::wire::event::Unserved;

use super::*;

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

/// An access that `worker` gave up after 10 s, for `idle` seconds of which nobody completed anything.
fn access(worker: &str, tries: u64, mm_faults: u64, idle: u64) -> Event {
    Event::Unserved(Unserved {
        worker: worker.into(),
        call: "HSGPU_ACCESS (read) on GPU 1".into(),
        page: 2,
        waited_ns: 10 * S,
        tries,
        mm_faults,
        idle_ns: idle * S,
    })
}

/// A run in which an access was begun at 4 s and given up at 14 s.
fn given_up(tries: u64, mm_faults: u64, idle: u64) -> Run {
    given_up_by(limits(), tries, mm_faults, idle)
}

fn given_up_by(limits: Limits, tries: u64, mm_faults: u64, idle: u64) -> Run {
    let mut run = Run::new(limits);
    run.at(3.0).work(10).device(10, 0);
    run.at(14.0).beat();
    run.storm(access("faulter-0", tries, mm_faults, idle));
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
fn a_deterministic_guest_need_not_wait_for_the_others_to_give_up() {
    let patient = Limits { guest_time_only: true, hard_stop: Duration::from_secs(1000), ..limits() };
    let mut run = given_up_by(patient, 5000, 5000, 9);
    run.at(70.0).beat();
    assert_eq!(run.decide(), None, "its workers may end yet");
    run.at(90.0).beat();
    assert_eq!(run.decide().map(|judgement| judgement.verdict), Some(Verdict::Livelock));
}

#[test]
fn who_gives_up_first_need_not_be_who_loops() {
    // Seen with `ref-no-lock`: two faulters a CPU, and one of them never let the other have it.
    let mut run = given_up(3, 6, 9);
    run.at(14.2);
    run.storm(access("faulter-1", 2906, 2909, 10));
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
    run.storm(access("faulter-1", 2906, 2909, 10));
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

use super::*;

const COPY: Option<Opcode> = Some(Opcode::Copy);

#[test]
fn the_default_plan_does_nothing() {
    let plan = Plan::default();
    for _ in 0..100 {
        assert!(!plan.fails_descriptor(0, COPY) && !plan.dead() && plan.holds(0).is_none());
        assert_eq!((plan.interrupt(), plan.report()), (InterruptFate::Raised, ReportFate::default()));
        assert_eq!((plan.corrupts_segment(4096), plan.holds_back()), (None, None));
        assert!(!plan.delays() && plan.latency(COPY).is_zero());
        assert_eq!(plan.order(), std::array::from_fn(|channel| channel));
    }
}

#[test]
fn every_third_means_every_third() {
    let plan = Plan::new(Chaos { fail_every: 3, ..Chaos::default() });
    let struck: Vec<bool> = (0..7).map(|_| plan.fails_descriptor(0, None)).collect();
    assert_eq!(struck, [false, false, true, false, false, true, false]);
    let plan = Plan::new(Chaos { fail_copy_every: 2, ..Chaos::default() });
    let opcodes = [COPY, None, Some(Opcode::Access), Some(Opcode::Fill), COPY, Some(Opcode::CopyList)];
    assert_eq!(
        opcodes.map(|opcode| plan.fails_descriptor(0, opcode)),
        [false, false, false, true, false, true]
    );
}

#[test]
fn a_plan_repeats_itself_and_another_seed_does_not() {
    let run = |seed| {
        let plan = Plan::new(Chaos { seed, corrupt_every: 2, ..Chaos::default() });
        (0..64).filter_map(|_| plan.corrupts_segment(4096)).collect::<Vec<_>>()
    };
    assert_eq!(run(7).len(), 32);
    assert!(run(7).iter().all(|flip| flip.offset < 4096 && flip.mask.count_ones() == 1));
    assert_eq!(run(7), run(7));
    assert_ne!(run(7), run(8));
}

#[test]
fn an_empty_segment_cannot_be_corrupted() {
    let plan = Plan::new(Chaos { corrupt_every: 1, ..Chaos::default() });
    assert_eq!(plan.corrupts_segment(0), None);
}

#[test]
fn latencies_are_by_engine_and_exponential_ones_have_the_mean_they_should() {
    let each = Chaos { latency_us: 1, copy_latency_us: 20, access_latency_us: 300, ..Chaos::default() };
    let plan = Plan::new(each.clone());
    assert!(plan.delays());
    let micros = |opcode| plan.latency(opcode).as_micros();
    assert_eq!((micros(None), micros(COPY), micros(Some(Opcode::Access))), (1, 21, 301));
    let plan = Plan::new(Chaos { exponential: true, latency_us: 0, ..each });
    let samples: Vec<f64> = (0..10_000).map(|_| plan.latency(COPY).as_secs_f64() * 1e6).collect();
    let mean = samples.iter().sum::<f64>() / samples.len() as f64;
    let beyond = samples.iter().filter(|sample| **sample > 40.0).count() as f64 / samples.len() as f64;
    assert!((mean - 20.0).abs() < 1.0, "{mean}");
    // exp(-2).
    assert!((beyond - 0.135).abs() < 0.02, "{beyond}");
}

#[test]
fn a_hung_channel_hangs_after_its_descriptors_until_a_reset() {
    let plan = Plan::new(Chaos { hang_channel: Some(2), hang_after: 1, ..Chaos::default() });
    assert_eq!(plan.holds(2), None);
    plan.fails_descriptor(1, None);
    assert_eq!(plan.holds(2), None);
    plan.fails_descriptor(2, None);
    assert_eq!((plan.holds(2), plan.holds(2), plan.holds(1)), (Some(true), Some(false), None));
    plan.unhang(1);
    assert!(plan.holds(2).is_some());
    plan.unhang(2);
    assert_eq!(plan.holds(2), None);
    assert!(check(&Chaos { hang_channel: Some(7), ..Chaos::default() }).is_ok());
    assert!(check(&Chaos { hang_channel: Some(8), ..Chaos::default() }).is_err());
}

#[test]
fn interrupts_meet_their_fates() {
    let plan = Plan::new(Chaos {
        drop_interrupt_every: 6,
        duplicate_interrupt_every: 2,
        delay_interrupt_every: 3,
        interrupt_delay_us: 5,
        ..Chaos::default()
    });
    use InterruptFate::{Doubled, Dropped, Late, Raised};
    let late = Late(Duration::from_micros(5));
    let fates: Vec<InterruptFate> = (0..6).map(|_| plan.interrupt()).collect();
    assert_eq!(fates, [Raised, Doubled, late, Doubled, Raised, Dropped]);
}

#[test]
fn orders_are_permutations_and_differ() {
    let plan = Plan::new(Chaos { reorder_every: 1, seed: 3, ..Chaos::default() });
    let orders: Vec<[usize; CHANNELS]> = (0..8).map(|_| plan.order()).collect();
    for order in &orders {
        let mut sorted = *order;
        sorted.sort_unstable();
        assert_eq!(sorted, std::array::from_fn(|channel| channel));
    }
    assert!(orders.windows(2).any(|pair| pair[0] != pair[1]));
}

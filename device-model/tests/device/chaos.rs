//! Chaos plans, seen from the driver.

use std::time::{Duration, Instant};

use hmmstorm_abi::job::{Job, Op};
use hmmstorm_abi::pci::{CHANNELS, VECTOR_CHANNEL0};
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location, Status};
use hmmstorm_abi::wire::control::Chaos;
use hmmstorm_device::gpu::Region;

use crate::bench::{Bench, Driver, RAM, RESERVED, eventfd_pair, read_reg, signals, wait_for, write_reg};
use crate::paging::{ALL, DATA, FaultBuffer, Tables, access, bind, job, outcome, run};

#[test]
fn every_third_descriptor_fails_and_does_nothing() {
    let bench = Bench::new(&["--mode", "synchronous", "--chaos", "fail-every=3"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    for value in 1..=9 {
        let status = driver.run(Descriptor::fill(Location::system(RAM + RESERVED), 8, value));
        let (expected, found) =
            if value % 3 == 0 { (Status::Injected, value - 1) } else { (Status::Ok, value) };
        assert_eq!((status, bench.load_u64(RESERVED)), (expected, found));
    }
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.errors, stats.chaos), (3, 3));
    // The other GPU keeps its own count.
    let mut other = Driver::start(&bench, 1, 1, 4);
    assert_eq!(other.run(Descriptor::NOP), Status::Ok);
}

#[test]
fn a_corrupted_segment_differs_in_one_bit_and_nothing_says_so() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let copy = Descriptor::copy(Location::vram(0), Location::system(RAM + RESERVED), 4096);
    assert_eq!(driver.run(copy), Status::Ok);
    assert_eq!(flipped(&bench), 0);
    bench.gpu(0).set_chaos(Chaos { seed: 3, corrupt_every: 2, ..Chaos::default() });
    let flips: Vec<u32> = (0..6)
        .map(|_| {
            assert_eq!(driver.run(copy), Status::Ok);
            flipped(&bench)
        })
        .collect();
    assert_eq!(flips, [0, 1, 0, 1, 0, 1]);
    assert_eq!((bench.gpu(0).stats().chaos, bench.gpu(0).stats().errors), (3, 0));
}

/// Bits that are set in the page that should be zero.
fn flipped(bench: &Bench) -> u32 {
    bench.read(RESERVED, 4096).iter().map(|byte| byte.count_ones()).sum()
}

#[test]
fn lost_interrupts_are_lost_and_fences_are_not() {
    let bench = Bench::new(&["--chaos", "drop-interrupt-every=2"], 1 << 20);
    let (ours, theirs) = eventfd_pair();
    bench.gpu(0).connect_vectors(u32::from(VECTOR_CHANNEL0), 1, vec![theirs]).expect("a vector");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    for _ in 0..10 {
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    }
    let stats = wait_for("the last interrupt", || {
        let stats = bench.gpu(0).stats();
        (stats.interrupts + stats.chaos == 10).then_some(stats)
    });
    assert_eq!((stats.interrupts, stats.chaos), (5, 5));
    wait_for("the signals", || Some(signals(&ours)).filter(|count| *count > 0));
}

#[test]
fn a_dead_device_reads_all_ones_and_does_nothing_until_it_is_revived() {
    let bench = Bench::new(&["--poll-us", "0"], 1 << 20);
    let gpu = bench.gpu(0);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    gpu.set_chaos(Chaos { dead: true, ..Chaos::default() });
    let mut bytes = [0; 4];
    for region in [Region::Config, Region::Vram] {
        gpu.region_read(region, 0, &mut bytes);
        assert_eq!(bytes, [0xff; 4], "{region:?}");
    }
    for register in [regs::ID, regs::STATUS, 0x1c, regs::channel_reg(0, regs::CH_STATUS), 0xfffc] {
        assert_eq!(read_reg(gpu, register), u32::MAX);
    }
    driver.submit(Descriptor::NOP.with_fence(driver.fence_address(1), 9, true).to_words());
    driver.ring_doorbell();
    write_reg(gpu, regs::CONTROL, regs::CONTROL_RESET);
    // Nothing may happen, so there is nothing to wait for; the referee sees what is held.
    assert_eq!((gpu.stats().queued, driver.fence(1, 9)), (1, None));
    gpu.set_chaos(Chaos::default());
    assert_eq!(driver.wait(1, 9), Status::Ok);
    assert_eq!(read_reg(gpu, regs::ID), regs::ID_MAGIC);
}

#[test]
fn latency_delays_every_descriptor() {
    let bench = Bench::new(&["--chaos", "latency-us=2000"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let start = Instant::now();
    for _ in 0..5 {
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    }
    assert!(start.elapsed() >= Duration::from_millis(10));
}

#[test]
fn copies_fail_and_other_descriptors_do_not() {
    let bench = Bench::new(&["--mode", "synchronous", "--chaos", "fail-copy-every=1"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let copy = Descriptor::copy(Location::vram(0), Location::system(RAM + RESERVED), 8);
    assert_eq!((driver.run(Descriptor::NOP), driver.run(copy)), (Status::Ok, Status::Injected));
}

#[test]
fn poisoned_pages_can_be_written_and_not_read_by_any_gpu() {
    let bench = crate::paging::bench(&["--mode", "synchronous"]);
    let tables = Tables::new(&bench, 1, Location::vram(0));
    bench.gpu(0).set_chaos(Chaos { poison_first: 100, poison_pages: 2, ..Chaos::default() });
    let ram = Location::system(RAM + DATA);
    let mut own = Driver::start(&bench, 0, 0, 4);
    let mut other = Driver::start(&bench, 1, 1, 4);
    let page = |index: u64| Location::vram(index << 12);
    assert_eq!(own.run(Descriptor::fill(page(100), 8192, 1)), Status::Ok);
    assert_eq!(own.run(Descriptor::copy(page(99), ram, 4096)), Status::Ok);
    assert_eq!(own.run(Descriptor::copy(page(99), ram, 4097)), Status::Poisoned);
    assert_eq!(other.run(Descriptor::copy(Location::peer(0, 101 << 12), ram, 8)), Status::Poisoned);
    assert_eq!(other.run(Descriptor::copy(page(100), ram, 8)), Status::Ok);
    // A job gets as far as it can, and may write.
    assert_eq!(other.run(bind(1, Some(tables.root))), Status::Ok);
    (0..3).for_each(|index| tables.map(index << 12, Location::peer(0, (99 + index) << 12), ALL));
    let load = job(Op::Load, 0, 1536);
    let (status, outcome) = run(&mut other, load);
    assert_eq!((status, outcome.done), (Status::Poisoned, 512));
    assert_eq!(run(&mut other, Job { op: Op::Store, ..load }).0, Status::Ok);
    assert_eq!(run(&mut other, Job { op: Op::AtomicAdd, va: 4096, ..load }).0, Status::Poisoned);
    // A page table in such a page cannot be read: its space has no translations.
    bench.gpu(1).set_chaos(Chaos { poison_first: 0, poison_pages: 1, ..Chaos::default() });
    assert_eq!(other.run(bind(1, Some(tables.root))), Status::Ok);
    assert_eq!(run(&mut other, load).0, Status::PageFault);
}

/// A job stops where it is, not only between descriptors; the others go on.
#[test]
fn a_hung_channel_holds_its_job_until_a_reset_or_the_end_of_the_plan() {
    // Long enough to be under way when the plan comes.
    const LONG: u64 = 1 << 21;
    let bench = crate::paging::bench(&[]);
    let tables = Tables::new(&bench, 0, Location::vram(0));
    tables.map(0, Location::system(RAM + DATA), ALL);
    let hang = || Chaos { hang_channel: Some(1), ..Chaos::default() };
    let mut other = Driver::start(&bench, 0, 0, 4);
    let mut driver = Driver::start(&bench, 0, 1, 4);
    assert_eq!(other.run(bind(1, Some(tables.root))), Status::Ok);
    let long = Job { count: LONG, operand: 1, ..job(Op::AtomicAdd, 0, 1) };
    let fence = driver.fence_address(1);
    driver.submit(access(&bench, 0, 1, long).with_fence(fence, 9, false).to_words());
    wait_for("the job to begin", || (bench.load_u64(DATA) > 0).then_some(()));
    bench.gpu(0).set_chaos(hang());
    wait_for("the plan to strike", || (bench.gpu(0).stats().chaos == 1).then_some(()));
    let held = bench.load_u64(DATA);
    assert_eq!(other.run(Descriptor::NOP), Status::Ok);
    assert_eq!((bench.load_u64(DATA), bench.gpu(0).stats().queued), (held, 1));
    bench.gpu(0).set_chaos(Chaos::default());
    assert_eq!(driver.wait(1, 9), Status::Ok);
    assert_eq!((outcome(&bench, 0).done, bench.load_u64(DATA)), (LONG, LONG));
    bench.gpu(0).set_chaos(hang());
    driver.submit(Descriptor::NOP.with_fence(fence, 10, false).to_words());
    driver.ring_doorbell();
    driver.reset();
    assert_eq!(driver.fence(1, 10), Some(Status::Aborted));
    let mut again = Driver::start(&bench, 0, 1, 4);
    assert_eq!(again.run(Descriptor::NOP), Status::Ok, "a reset ends it");
}

#[test]
fn interrupts_come_twice_and_late() {
    let plan = "duplicate-interrupt-every=2,delay-interrupt-every=3,interrupt-delay-us=20000";
    let bench = Bench::new(&["--chaos", plan], 1 << 20);
    let (ours, theirs) = eventfd_pair();
    bench.gpu(0).connect_vectors(u32::from(VECTOR_CHANNEL0), 1, vec![theirs]).expect("a vector");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let mut count = 0;
    let mut signalled = |expected| {
        wait_for("the interrupts", || {
            count += signals(&ours);
            (count == expected).then_some(())
        });
    };
    for expected in [1, 3] {
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
        signalled(expected);
    }
    let start = Instant::now();
    assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    signalled(4);
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert_eq!(bench.gpu(0).stats().interrupts, 4);
}

#[test]
fn a_descriptor_that_is_held_back_lets_another_channel_go_first() {
    let hour = "reorder-every=2,reorder-us=3600000000";
    let bench = Bench::new(&["--chaos", hour], 1 << 20);
    let mut a = Driver::start(&bench, 0, 0, 4);
    let mut b = Driver::start(&bench, 0, 1, 4);
    assert_eq!(a.run(Descriptor::NOP), Status::Ok);
    let later = Descriptor::NOP.with_fence(a.fence_address(1), 5, false);
    a.submit(later.to_words());
    wait_for("the plan to strike", || (bench.gpu(0).stats().chaos == 1).then_some(()));
    assert_eq!(a.fence(1, 5), None);
    assert_eq!(b.run(Descriptor::NOP), Status::Ok);
    assert_eq!(a.wait(1, 5), Status::Ok);
    // One that would wait for an hour is no obstacle to a reset.
    a.submit(later.to_words());
    a.reset();
}

#[test]
fn a_synchronous_device_serves_channels_in_a_seeded_order() {
    // Each adds one to the same word, and what it found there is its place in the order.
    let order = |seed: &str| {
        let plan = format!("reorder-every=1,seed={seed}");
        let bench = crate::paging::bench(&["--mode", "synchronous", "--chaos", &plan]);
        let tables = Tables::new(&bench, 0, Location::vram(0));
        let faults = FaultBuffer::start(&bench, 0, 4);
        let mut drivers: Vec<Driver<'_>> =
            (0..CHANNELS).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
        assert_eq!(drivers[0].run(bind(1, Some(tables.root))), Status::Ok);
        for (slot, driver) in (0..).zip(&mut drivers) {
            let add = Job { operand: 1, ..job(Op::AtomicAdd, 0, 1) };
            driver.submit(access(&bench, slot, 1, add).to_words());
        }
        tables.map(0, Location::system(RAM + DATA), ALL);
        faults.replay();
        (0..CHANNELS as u64).map(|slot| outcome(&bench, slot).sum).collect::<Vec<_>>()
    };
    let mut places = order("1");
    assert_eq!(places, order("1"));
    assert_ne!(places, order("2"));
    places.sort_unstable();
    assert_eq!(places, (0..CHANNELS as u64).collect::<Vec<_>>());
}

#[test]
fn reports_of_page_faults_are_lost_doubled_and_made_up() {
    let bench = crate::paging::bench(&["--mode", "synchronous"]);
    let tables = Tables::new(&bench, 0, Location::vram(0));
    let mut faults = FaultBuffer::start(&bench, 0, 4);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
    let fence = driver.fence_address(1);
    let submit = |driver: &mut Driver<'_>, va, value| {
        driver.submit(access(&bench, 0, 1, job(Op::Store, va, 1)).with_fence(fence, value, false).to_words());
    };
    bench.gpu(0).set_chaos(Chaos { drop_fault_every: 1, ..Chaos::default() });
    submit(&mut driver, 0x10_0000, 1);
    assert_eq!((faults.next(), bench.gpu(0).stats().stalled, faults.overflow()), (None, 1, 0));
    // A driver that replays after a while gets the next report.
    bench.gpu(0).set_chaos(Chaos { duplicate_fault_every: 1, ..Chaos::default() });
    faults.replay();
    let (first, second) = (faults.next(), faults.next());
    assert!(first.is_some() && first == second && !faults.waits());
    bench.gpu(0).set_chaos(Chaos { spurious_fault_every: 1, ..Chaos::default() });
    faults.replay();
    let (real, spurious) = (faults.next().expect("real"), faults.next().expect("spurious"));
    assert_eq!(real.va, 0x10_0000);
    assert!(spurious.va != real.va && spurious.va.abs_diff(real.va) <= 256 << 12, "{spurious:?}");
    // To cancel it ends nothing.
    faults.cancel(spurious);
    assert_eq!(driver.fence(1, 1), None);
    tables.map(0x10_0000, Location::system(RAM + DATA), ALL);
    faults.replay();
    assert_eq!(driver.fence(1, 1), Some(Status::Ok));
}

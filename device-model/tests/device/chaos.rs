//! Chaos plans, seen from the driver.

use hmmstorm_abi::pci::VECTOR_CHANNEL0;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location, Status};
use hmmstorm_abi::wire::control::Chaos;

use crate::bench::{Bench, Driver, RAM, RESERVED, eventfd_pair, read_reg, signals, wait_for, write_reg};

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
    let start = std::time::Instant::now();
    for _ in 0..5 {
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    }
    assert!(start.elapsed() >= std::time::Duration::from_millis(10));
}

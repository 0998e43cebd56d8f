//! Rings, shadow pages, doorbells.

use hmmstorm_abi::ring::{Descriptor, Location, RING_ORDER_MIN, Status};
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, RESERVED, wait_for};

#[test]
fn a_synchronous_device_asks_for_every_doorbell_and_is_done_when_it_returns() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, RING_ORDER_MIN);
    for value in 1..=100 {
        assert!(driver.submit(Descriptor::NOP.with_fence(driver.fence_address(0), value, true).to_words()));
        assert_eq!(driver.fence(0, value), Some(Status::Ok));
        assert_eq!((driver.head(), driver.event()), (driver.tail, driver.tail));
    }
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.doorbells, stats.interrupts), (100, 0));
}

#[test]
fn a_synchronous_device_does_nothing_before_the_doorbell() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, RING_ORDER_MIN);
    for value in 1..=3 {
        driver.put(Descriptor::NOP.with_fence(driver.fence_address(value), value, true).to_words());
    }
    assert!(driver.publish(0));
    assert_eq!(bench.gpu(0).stats().queued, 3);
    assert_eq!(driver.head(), 0);
    driver.ring_doorbell();
    assert_eq!((driver.head(), bench.gpu(0).stats().queued), (3, 0));
}

/// With no poll window the worker sleeps after each descriptor, so that every publication races with its falling
/// asleep. One that is lost leaves a fence unwritten for good.
#[test]
fn no_publication_is_lost_between_polling_and_sleeping() {
    let bench = Bench::new(&["--poll-us", "0"], 1 << 20);
    let mut drivers: Vec<Driver<'_>> = (0..2).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
    for value in 1..=5_000 {
        for driver in &mut drivers {
            let fence = driver.fence_address(0);
            driver.submit(Descriptor::NOP.with_fence(fence, value, false).to_words());
        }
        for driver in &drivers {
            assert_eq!(driver.wait(0, value), Status::Ok);
        }
    }
}

/// A waiter that looks for a while, arms the fence slot, looks once more and then sleeps is woken; one that never sleeps is
/// left alone.
#[test]
fn an_armed_interrupt_comes_to_those_who_sleep() {
    let bench = Bench::new(&["--poll-us", "5"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let raised = || bench.gpu(0).stats().interrupts;
    let armed = |driver: &Driver<'_>, value| {
        Descriptor::NOP.with_armed_fence(driver.fence_address(0), value).to_words()
    };
    for value in 1..=2_000 {
        let words = armed(&driver, value);
        driver.submit(words);
        assert_eq!(driver.wait(0, value), Status::Ok);
    }
    // The interrupt of a descriptor is before the fence of the next.
    driver.run(Descriptor::NOP);
    let before = wait_for("the interrupt of the last one", || Some(raised()).filter(|&count| count == 1));
    for value in 3_000..=5_000 {
        driver.arm(0, 0);
        let words = armed(&driver, value);
        driver.submit(words);
        let seen = raised();
        driver.arm(0, 1);
        if driver.fence(0, value).is_none() {
            wait_for("an interrupt for who sleeps", || (raised() > seen).then_some(()));
        }
        assert_eq!(driver.wait(0, value), Status::Ok);
    }
    driver.run(Descriptor::NOP);
    assert!(raised() > before, "nobody ever slept");
}

fn await_room(driver: &Driver<'_>) {
    wait_for("a free entry", || (driver.tail.wrapping_sub(driver.head()) < 16).then_some(()));
}

/// A publisher that does not wait for each: a ring kept full, entries reused as soon as the head passes them.
#[test]
fn a_full_ring_is_worked_through_in_order() {
    let bench = Bench::new(&["--poll-us", "5"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, RING_ORDER_MIN);
    let counter = RESERVED;
    for value in 1..=20_000_u64 {
        await_room(&driver);
        // Each overwrites what the one before it wrote.
        driver.submit(Descriptor::fill(Location::system(RAM + counter), 8, value).to_words());
        assert!(bench.load_u64(counter) <= value);
    }
    await_room(&driver);
    assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    assert_eq!(bench.load_u64(counter), 20_000);
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.errors, stats.queued), (20_001, 0, 0));
}

#[test]
fn an_idle_channel_asks_for_a_doorbell() {
    let bench = Bench::new(&["--poll-us", "0"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    for _ in 0..3 {
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
        // It has armed itself when the event index has reached the tail.
        wait_for("sleep", || (driver.event() == driver.tail).then_some(()));
        assert!(driver.submit(Descriptor::NOP.to_words()));
        wait_for("the descriptor", || (driver.head() == driver.tail).then_some(()));
    }
}

#[test]
fn a_tail_beyond_the_ring_halts_the_channel() {
    for tail in [17, 1000, u32::MAX] {
        let bench = Bench::new(&[], 1 << 20);
        let driver = Driver::start(&bench, 0, 0, 4);
        driver.publish_tail(tail);
        driver.ring_doorbell();
        assert_eq!(wait_for("the halt", || driver.halted()), Status::BadDescriptor);
        assert_eq!(driver.head(), 0);
        driver.reset();
        let mut again = Driver::start(&bench, 0, 0, 4);
        assert_eq!(again.run(Descriptor::NOP), Status::Ok);
    }
}

#[test]
fn a_ring_that_is_unmapped_halts_the_channel() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    bench.gpu(0).dma_unmap(RAM, 1 << 20).expect("mapped");
    driver.submit(Descriptor::NOP.to_words());
    driver.ring_doorbell();
    assert_eq!(driver.halted(), Some(Status::DmaFault));
    assert!(bench.gpu(0).stats().dma_faults >= 1);
}

#[test]
fn descriptors_published_before_the_channel_is_enabled_need_no_doorbell() {
    use hmmstorm_abi::regs;
    let bench = Bench::new(&[], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    driver.reset();
    driver.put(Descriptor::NOP.with_fence(driver.fence_address(0), 9, false).to_words());
    driver.publish(0);
    for (register, value) in [
        (regs::CH_RING_LO, RAM as u32),
        (regs::CH_RING_ORDER, 4),
        (regs::CH_SHADOW_LO, RAM as u32 + 12 * 4096),
        (regs::CH_CONTROL, regs::CH_CONTROL_ENABLE),
    ] {
        driver.write(register, value);
    }
    assert_eq!(driver.wait(0, 9), Status::Ok);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Batches of any size, in rings of any size, against a plain count.
    #[test]
    fn batches_wrap_and_complete(
        threaded: bool,
        order in 4_u32..=9,
        batches in prop::collection::vec(1_u32..=600, 1..20),
    ) {
        let mode = if threaded { "threaded" } else { "synchronous" };
        let bench = Bench::new(&["--mode", mode, "--poll-us", "1"], 1 << 20);
        let mut driver = Driver::start(&bench, 1, 3, order);
        let mut value = 0;
        for batch in batches {
            let old = driver.tail;
            for _ in 0..batch.min(1 << order) {
                value += 1;
                driver.put(Descriptor::NOP.with_fence(driver.fence_address(value % 700), value, false).to_words());
            }
            if driver.publish(old) {
                driver.ring_doorbell();
            }
            prop_assert_eq!(driver.wait(value % 700, value), Status::Ok);
            wait_for("the head", || (driver.head() == driver.tail).then_some(()));
        }
        prop_assert_eq!(bench.gpu(1).stats().completions, value);
    }
}

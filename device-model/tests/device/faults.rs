//! Page faults: stall, replay, cancel, coalescing, overflow, resets.

use hmmstorm_abi::job::{Job, Op, word_at};
use hmmstorm_abi::mmu::{Fault, Pte, Reason, Want};
use hmmstorm_abi::pci::VECTOR_FAULT;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location, Status};

use crate::bench::{Bench, Driver, RAM, eventfd_pair, read_reg, signals, wait_for, write_reg};
use crate::paging::{
    ALL, DATA, FaultBuffer, Tables, access, bench, bind, invalidate, job, outcome, peek, run,
};

const VA: u64 = 0x1000_0000;

fn page(index: u64) -> Location {
    Location::system(RAM + DATA + index * 4096)
}

fn start<'a>(bench: &'a Bench, order: u32) -> (Tables<'a>, FaultBuffer<'a>, Driver<'a>) {
    let tables = Tables::new(bench, 0, Location::vram(0));
    let faults = FaultBuffer::start(bench, 0, order);
    let mut driver = Driver::start(bench, 0, 0, 6);
    assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
    (tables, faults, driver)
}

/// Submits a job with a fence of value 9 in slot 1, and does not wait.
fn submit(driver: &mut Driver<'_>, slot: u64, job: Job) {
    let descriptor = access(driver.bench, slot, 1, job).with_fence(driver.fence_address(1), 9, true);
    driver.submit(descriptor.to_words());
}

#[test]
fn a_job_stalls_at_each_page_keeps_its_place_and_ends_well() {
    for mode in ["synchronous", "threaded"] {
        let bench = bench(&["--mode", mode]);
        let (tables, mut faults, mut driver) = start(&bench, 4);
        submit(&mut driver, 0, Job { tag: 3, ..job(Op::Store, VA + 8, 1200) });
        for index in 0..3 {
            let fault = faults.wait();
            let (va, sequence) = (VA + index * 4096, index as u32 + 1);
            let (want, reason) = (Want::Write, Reason::NotPresent);
            assert_eq!(fault, Fault { va, sequence, asid: 1, want, reason, channel: 0 });
            let stalled = regs::CH_STATUS_ENABLED | regs::CH_STATUS_STALLED;
            assert_eq!(driver.status(), stalled);
            let stats = bench.gpu(0).stats();
            assert_eq!((stats.stalled, stats.queued), (1, 0), "work that waits for the guest");
            assert_eq!(driver.fence(1, 9), None);
            tables.map(va, page(index), Pte::WRITE);
            faults.replay();
        }
        assert_eq!(driver.wait(1, 9), Status::Ok);
        assert_eq!((outcome(&bench, 0).done, outcome(&bench, 0).faults), (1200, 3));
        assert_eq!(peek(&bench, 0, Location::system(RAM + DATA + 8)), word_at(VA + 8, 3));
        let stats = bench.gpu(0).stats();
        assert_eq!((stats.faults, stats.replays, stats.cancels, stats.stalled), (3, 3, 0, 0));
    }
}

/// In synchronous mode the write of the doorbell, and of the replay, is answered when all is done that can be.
#[test]
fn a_synchronous_device_is_done_or_stalled_when_a_write_returns() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut driver) = start(&bench, 4);
    let old = driver.tail;
    let first = access(&bench, 0, 1, job(Op::Load, VA, 1)).with_fence(driver.fence_address(1), 9, true);
    driver.put(first.to_words());
    driver.put(Descriptor::NOP.with_fence(driver.fence_address(2), 10, true).to_words());
    driver.publish(old);
    driver.ring_doorbell();
    let fault = faults.next().expect("reported by now");
    assert_eq!((driver.fence(1, 9), driver.fence(2, 10)), (None, None));
    // Another doorbell changes nothing.
    driver.ring_doorbell();
    assert!(!faults.waits());
    tables.map(fault.va, page(0), 0);
    faults.replay();
    assert_eq!((driver.fence(1, 9), driver.fence(2, 10)), (Some(Status::Ok), Some(Status::Ok)));
    assert_eq!(bench.gpu(0).stats().interrupts, 0);
}

#[test]
fn a_replay_without_a_translation_faults_again_and_a_cancel_ends_it() {
    for mode in ["synchronous", "threaded"] {
        let bench = bench(&["--mode", mode]);
        let (_, mut faults, mut driver) = start(&bench, 4);
        submit(&mut driver, 0, job(Op::AtomicAdd, VA, 1));
        let first = faults.wait();
        faults.replay();
        let second = faults.wait();
        assert_eq!(second, Fault { sequence: 2, ..first });
        // The first entry stands for nothing any more.
        faults.cancel(first);
        assert_eq!(driver.fence(1, 9), None);
        faults.cancel(second);
        assert_eq!(driver.wait(1, 9), Status::PageFault);
        assert_eq!((outcome(&bench, 0).done, outcome(&bench, 0).faults), (0, 2));
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
        let stats = bench.gpu(0).stats();
        assert_eq!((stats.faults, stats.cancels, stats.stalled), (2, 1, 0));
    }
}

#[test]
fn faults_on_the_same_page_are_one_entry_if_it_wants_enough() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut writer) = start(&bench, 4);
    let mut others: Vec<Driver<'_>> = (1..4).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
    submit(&mut writer, 0, job(Op::Store, VA, 1));
    // A load and a store are covered by the store's entry, an atomic is not, and another page is not.
    submit(&mut others[0], 1, job(Op::Load, VA + 64, 1));
    submit(&mut others[1], 2, job(Op::AtomicAdd, VA, 1));
    submit(&mut others[2], 3, job(Op::Load, VA + 4096, 1));
    let entries: Vec<(u64, Want, u16)> =
        std::iter::from_fn(|| faults.next()).map(|fault| (fault.va, fault.want, fault.channel)).collect();
    assert_eq!(entries, [(VA, Want::Write, 0), (VA, Want::Atomic, 2), (VA + 4096, Want::Read, 3)]);
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.faults, stats.faults_coalesced, stats.stalled), (3, 1, 4));
    tables.map(VA, page(0), ALL);
    tables.map(VA + 4096, page(1), 0);
    faults.replay();
    assert_eq!(writer.fence(1, 9), Some(Status::Ok));
    others.iter().for_each(|driver| assert_eq!(driver.fence(1, 9), Some(Status::Ok)));
}

#[test]
fn a_cancel_ends_every_job_that_its_entry_stands_for() {
    let bench = bench(&[]);
    let (_, mut faults, mut a) = start(&bench, 4);
    let (mut b, mut c) = (Driver::start(&bench, 0, 1, 4), Driver::start(&bench, 0, 2, 4));
    submit(&mut a, 0, job(Op::Load, VA, 1));
    let fault = faults.wait();
    submit(&mut b, 1, job(Op::Load, VA + 8, 1));
    submit(&mut c, 2, job(Op::Load, VA + 8192, 1));
    let other = faults.wait();
    wait_for("both to stall", || (bench.gpu(0).stats().stalled == 3).then_some(()));
    faults.cancel(fault);
    assert_eq!((a.wait(1, 9), b.wait(1, 9)), (Status::PageFault, Status::PageFault));
    assert_eq!((other.channel, c.fence(1, 9)), (2, None));
    faults.cancel(other);
    assert_eq!(c.wait(1, 9), Status::PageFault);
    assert_eq!(bench.gpu(0).stats().cancels, 3);
}

/// A buffer of 16 that is never emptied is full after 16 faults; what comes then is counted, and reported once there
/// is room.
#[test]
fn an_overflow_is_counted_and_recovered_by_a_replay() {
    let bench = bench(&[]);
    let (ours, theirs) = eventfd_pair();
    bench.gpu(0).connect_vectors(u32::from(VECTOR_FAULT), 1, vec![theirs]).expect("a vector");
    let (tables, mut faults, mut driver) = start(&bench, 4);
    // No interrupt for any of these.
    bench.store_u32(crate::paging::FAULTS + 0x80, 1000);
    submit(&mut driver, 0, job(Op::Load, VA, 1));
    for faulted in 1..=16 {
        wait_for("the fault", || (bench.gpu(0).stats().faults == faulted).then_some(()));
        assert_eq!(faults.overflow(), 0);
        faults.replay();
    }
    wait_for("the overflow", || (faults.overflow() == 1).then_some(()));
    wait_for("its interrupt", || (signals(&ours) > 0).then_some(()));
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.faults, stats.faults_overflowed, stats.stalled), (16, 1, 1));
    let entries = std::iter::from_fn(|| faults.next()).count();
    assert_eq!(entries, 16);
    tables.map(VA, page(0), 0);
    faults.replay();
    assert_eq!(driver.wait(1, 9), Status::Ok);
    assert_eq!(outcome(&bench, 0).faults, 17);
}

#[test]
fn the_interrupt_comes_when_the_event_index_is_passed() {
    let bench = bench(&[]);
    let (ours, theirs) = eventfd_pair();
    bench.gpu(0).connect_vectors(u32::from(VECTOR_FAULT), 1, vec![theirs]).expect("a vector");
    let (_, mut faults, mut driver) = start(&bench, 4);
    faults.arm();
    submit(&mut driver, 0, job(Op::Load, VA, 1));
    wait_for("the interrupt", || (signals(&ours) == 1).then_some(()));
    // Not armed again: the next one makes no noise.
    let fault = faults.wait();
    faults.replay();
    let again = faults.wait();
    assert_eq!(again.va, fault.va);
    faults.arm();
    assert!(!faults.waits());
    faults.replay();
    wait_for("the next interrupt", || (signals(&ours) == 1).then_some(()));
    assert_eq!(bench.gpu(0).stats().faults, 3);
}

#[test]
fn without_a_buffer_a_fault_ends_its_job() {
    let bench = bench(&["--mode", "synchronous"]);
    let (_, faults, mut driver) = start(&bench, 4);
    submit(&mut driver, 0, job(Op::Load, VA, 1));
    assert_eq!(bench.gpu(0).stats().stalled, 1);
    // Turned off, it cancels what waits.
    faults.write(regs::FAULT_CONTROL, 0);
    assert_eq!(driver.fence(1, 9), Some(Status::PageFault));
    assert_eq!(run(&mut driver, job(Op::Load, VA, 1)).0, Status::PageFault);
    assert_eq!(bench.gpu(0).stats().stalled, 0);
}

#[test]
fn a_buffer_that_is_unmapped_is_turned_off_and_jobs_end() {
    let bench = Bench::unmapped(&["--vram", "8M", "--mode", "synchronous"], crate::paging::SIZE);
    let gpu = bench.gpu(0);
    let faults_at = crate::paging::FAULTS;
    bench.map(gpu, RAM, 0, faults_at, true);
    bench.map(gpu, RAM + faults_at, faults_at, 64 * 4096, true);
    let (_, faults, mut driver) = start(&bench, 4);
    let mut other = Driver::start(&bench, 0, 1, 4);
    submit(&mut other, 1, job(Op::Load, VA + 4096, 1));
    gpu.dma_unmap(RAM + faults_at, 64 * 4096).expect("mapped");
    assert_eq!(run(&mut driver, job(Op::Load, VA, 1)).0, Status::PageFault);
    assert_eq!(read_reg(gpu, regs::FAULT_CONTROL), 0);
    // The one that waited for it looks again and finds none.
    assert_eq!(gpu.stats().stalled, 1);
    faults.replay();
    assert_eq!(other.fence(1, 9), Some(Status::PageFault));
    assert_eq!(gpu.stats().stalled, 0);
}

#[test]
fn bad_settings_of_the_buffer_are_refused() {
    let bench = bench(&["--mode", "synchronous"]);
    let gpu = bench.gpu(0);
    let cases = [
        (RAM + 1, 4, RAM),
        (RAM, 4, RAM + 8),
        (RAM, 3, RAM + 4096),
        (RAM, 13, RAM + 4096),
        (RAM, 4, 0),
        (u64::MAX - 4095, 12, RAM),
    ];
    for (ring, order, shadow) in cases {
        let bad = gpu.stats().bad_accesses;
        write_reg(gpu, regs::FAULT_RING_LO, ring as u32);
        write_reg(gpu, regs::FAULT_RING_HI, (ring >> 32) as u32);
        write_reg(gpu, regs::FAULT_ORDER, order);
        write_reg(gpu, regs::FAULT_SHADOW_LO, shadow as u32);
        write_reg(gpu, regs::FAULT_SHADOW_HI, (shadow >> 32) as u32);
        write_reg(gpu, regs::FAULT_CONTROL, regs::FAULT_CONTROL_ENABLE);
        assert_eq!(read_reg(gpu, regs::FAULT_CONTROL), 0, "{ring:#x} {order} {shadow:#x}");
        assert_eq!(gpu.stats().bad_accesses, bad + 1);
    }
    let faults = FaultBuffer::start(&bench, 0, 4);
    let bad = gpu.stats().bad_accesses;
    faults.write(regs::FAULT_ORDER, 5);
    faults.write(regs::FAULT_CONTROL, 3);
    faults.write(regs::FAULT_REPLAY, 2);
    assert_eq!((gpu.stats().bad_accesses, read_reg(gpu, regs::FAULT_ORDER)), (bad + 3, 4));
    // Unknown numbers mean nothing, and are no mistake: the job may just have gone.
    faults.write(regs::FAULT_CANCEL, 77);
    faults.write(regs::FAULT_CANCEL, 0);
    assert_eq!(gpu.stats().bad_accesses, bad + 3);
}

#[test]
fn a_reset_of_its_channel_aborts_a_stalled_job_and_frees_its_entry() {
    for mode in ["synchronous", "threaded"] {
        let bench = bench(&["--mode", mode]);
        let (tables, mut faults, mut driver) = start(&bench, 4);
        let mut other = Driver::start(&bench, 0, 1, 4);
        submit(&mut driver, 0, job(Op::Load, VA, 1));
        faults.wait();
        driver.reset();
        assert_eq!(driver.fence(1, 9), Some(Status::Aborted));
        assert_eq!((outcome(&bench, 0).done, outcome(&bench, 0).faults), (0, 1));
        assert_eq!(bench.gpu(0).stats().stalled, 0);
        // The driver may be done with the first entry, so this must be another.
        submit(&mut other, 1, job(Op::Load, VA, 1));
        assert_eq!(faults.wait().channel, 1);
        tables.map(VA, page(0), 0);
        faults.replay();
        assert_eq!(other.wait(1, 9), Status::Ok);
    }
}

#[test]
fn a_device_reset_forgets_spaces_and_buffer() {
    let bench = bench(&[]);
    let (_, mut faults, mut driver) = start(&bench, 4);
    submit(&mut driver, 0, job(Op::Load, VA, 1));
    faults.wait();
    write_reg(bench.gpu(0), regs::CONTROL, regs::CONTROL_RESET);
    assert_eq!(driver.fence(1, 9), Some(Status::Aborted));
    assert_eq!(bench.gpu(0).stats().stalled, 0);
    assert_eq!(read_reg(bench.gpu(0), regs::FAULT_CONTROL), 0);
    assert_eq!(read_reg(bench.gpu(0), regs::FAULT_ORDER), 0);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(run(&mut driver, job(Op::Load, VA, 1)).0, Status::BadJob, "no space is bound");
}

/// Several channels fault on few pages, while one thread serves and another invalidates: every job ends with the
/// right words, whatever the order.
#[test]
fn many_channels_one_server() {
    const PAGES: u64 = 32;
    let bench = bench(&["--poll-us", "5"]);
    let (tables, mut faults, first) = start(&bench, 4);
    let mut drivers = vec![first];
    drivers.extend((1..3).map(|channel| Driver::start(&bench, 0, channel, 4)));
    let mut invalidator = Driver::start(&bench, 0, 3, 4);
    for round in 0..6 {
        for (slot, driver) in (0..).zip(&mut drivers) {
            let op = if round == 0 { Op::Store } else { Op::Check };
            let count = PAGES * 512;
            submit(driver, slot, Job { tag: 5, stride: 8 * (2 * slot + 1), ..job(op, VA, count) });
        }
        let mut served = 0;
        wait_for("the jobs", || {
            while let Some(fault) = faults.next() {
                tables.map(fault.va, page((fault.va - VA) / 4096), ALL);
                served += 1;
            }
            faults.replay();
            drivers.iter().all(|driver| driver.fence(1, 9).is_some()).then_some(())
        });
        assert!(served >= PAGES, "{served}");
        for (slot, driver) in (0..).zip(&drivers) {
            assert_eq!(driver.fence(1, 9), Some(Status::Ok));
            assert_eq!(outcome(&bench, slot).mismatches, 0);
            bench.write(driver.fence_address(1) - RAM, &[0; 16]);
        }
        (0..PAGES).for_each(|page| tables.unmap(VA + page * 4096));
        assert_eq!(invalidator.run(invalidate(1, VA, PAGES * 4096)), Status::Ok);
    }
    assert_eq!((bench.gpu(0).stats().mismatches, bench.gpu(0).stats().errors), (0, 0));
}

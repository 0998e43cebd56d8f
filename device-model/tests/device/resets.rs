//! What each reset clears; see `hmmstorm_device::reset`.

use hmmstorm_abi::pci::VECTOR_CHANNEL0;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location, SgEntry, Status};
use hmmstorm_abi::wire::control::Chaos;
use hmmstorm_device::gpu::Region;
use hmmstorm_device::reset::Reset;

use crate::bench::{
    Bench, Driver, RAM, RESERVED, eventfd_pair, read_reg, set_master, signals, wait_for, write_reg,
};

/// Latency that keeps every descriptor waiting until something else happens.
fn stuck() -> Chaos {
    Chaos { latency_us: 3_600_000_000, ..Chaos::default() }
}

#[test]
fn a_channel_reset_aborts_what_the_channel_holds() {
    let bench = Bench::new(&[], 1 << 20);
    bench.gpu(0).set_chaos(stuck());
    let (ours, theirs) = eventfd_pair();
    bench.gpu(0).connect_vectors(u32::from(VECTOR_CHANNEL0), 1, vec![theirs]).expect("a vector");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    for value in 1..=16 {
        let fill = Descriptor::fill(Location::system(RAM + RESERVED), 8, u64::MAX);
        driver.put(fill.with_fence(driver.fence_address(value), value, true).to_words());
    }
    driver.publish(0);
    driver.ring_doorbell();
    driver.reset();
    for value in 1..=16 {
        assert_eq!(driver.fence(value, value), Some(Status::Aborted));
    }
    assert_eq!(signals(&ours), 16);
    assert_eq!((driver.head(), bench.load_u64(RESERVED)), (16, 0));
    assert_eq!(driver.status(), 0);
    assert_eq!(read_reg(bench.gpu(0), regs::channel_reg(0, regs::CH_RING_LO)), 0);
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.errors, stats.queued, stats.resets), (16, 16, 0, 1));
    bench.gpu(0).set_chaos(Chaos::default());
    let mut again = Driver::start(&bench, 0, 0, 4);
    assert_eq!(again.run(Descriptor::NOP), Status::Ok);
}

/// A list of 8 GiB would take seconds; the reset is answered after the piece under way, and nothing moves after it.
#[test]
fn a_reset_cuts_a_long_copy_short() {
    let bench = Bench::new(&["--vram", "4M"], 8 << 20);
    let target = 4 << 20;
    let entry = SgEntry { src: Location::vram(0), dst: Location::system(RAM + target), length: 4 << 20 };
    let bytes: Vec<u8> = entry.to_words().iter().flat_map(|word| word.to_le_bytes()).collect();
    (0..2048).for_each(|at| bench.write(RESERVED + at * 32, &bytes));
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(driver.run(Descriptor::fill(Location::vram(0), 4 << 20, u64::MAX)), Status::Ok);
    driver.submit(
        Descriptor::copy_list(RAM + RESERVED, 2048).with_fence(driver.fence_address(1), 5, false).to_words(),
    );
    wait_for("the copy to begin", || (bench.load_u64(target) == u64::MAX).then_some(()));
    driver.reset();
    assert_eq!(driver.fence(1, 5), Some(Status::Aborted));
    let scribble = vec![0x5a; 4 << 20];
    bench.write(target, &scribble);
    let mut other = Driver::start(&bench, 0, 1, 4);
    assert_eq!(other.run(Descriptor::NOP), Status::Ok);
    assert!(bench.read(target, 4 << 20) == scribble);
    assert!(bench.gpu(0).stats().bytes < 8 << 30);
}

#[test]
fn a_device_reset_stops_every_channel_and_keeps_the_rest() {
    let bench = Bench::new(&[], 1 << 20);
    bench.gpu(0).region_write(Region::Vram, 0, &[7; 16]);
    let drivers: Vec<Driver<'_>> = (0..4).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
    write_reg(bench.gpu(0), regs::CONTROL, regs::CONTROL_RESET);
    assert!(drivers.iter().all(|driver| driver.status() == 0));
    assert_eq!(read_reg(bench.gpu(0), regs::CONTROL), 0);
    let mut window = [0; 16];
    bench.gpu(0).region_read(Region::Vram, 0, &mut window);
    assert_eq!(window, [7; 16]);
    // Bus mastering and the DMA map are as before.
    assert_eq!(Driver::start(&bench, 0, 0, 4).run(Descriptor::NOP), Status::Ok);
}

#[test]
fn a_function_reset_drops_work_without_touching_memory() {
    let bench = Bench::new(&[], 1 << 20);
    let gpu = bench.gpu(0);
    gpu.set_chaos(stuck());
    let mut driver = Driver::start(&bench, 0, 0, 4);
    driver.submit(Descriptor::NOP.with_fence(driver.fence_address(1), 1, true).to_words());
    // FLR: bit 15 of the device control register of the PCI Express capability at 0x40.
    gpu.region_write(Region::Config, 0x48, &0x8000_u16.to_le_bytes());
    assert_eq!((driver.fence(1, 1), driver.head(), driver.status()), (None, 0, 0));
    assert_eq!(gpu.stats().interrupts, 0);
    gpu.set_chaos(Chaos::default());
    assert_eq!(Driver::start(&bench, 0, 0, 4).halted(), Some(Status::DmaFault), "bus mastering is off");
    driver.reset();
    set_master(gpu, true);
    assert_eq!(Driver::start(&bench, 0, 0, 4).run(Descriptor::NOP), Status::Ok);
}

#[test]
fn a_vmm_that_is_gone_leaves_nothing_behind() {
    let bench = Bench::new(&[], 1 << 20);
    let gpu = bench.gpu(0);
    gpu.region_write(Region::Vram, 4096, &[7; 16]);
    gpu.region_write(Region::Config, 0x3c, &[11]);
    let (ours, theirs) = eventfd_pair();
    gpu.connect_vectors(0, 1, vec![theirs]).expect("a vector");
    let completions = {
        let mut driver = Driver::start(&bench, 0, 0, 4);
        assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
        gpu.stats().completions
    };
    gpu.reset(Reset::Power);
    let mut data = [0; 16];
    gpu.region_read(Region::Vram, 4096, &mut data);
    assert_eq!(data, [0; 16]);
    let mut line = [0];
    gpu.region_read(Region::Config, 0x3c, &mut line);
    assert_eq!(line, [0]);
    gpu.test_vectors(0, 1).expect("a vector");
    assert_eq!(signals(&ours), 0);
    // The DMA map is empty, and everything can be set up anew.
    set_master(gpu, true);
    assert_eq!(Driver::start(&bench, 0, 0, 4).halted(), Some(Status::DmaFault));
    bench.map(gpu, RAM, 0, 1 << 20, true);
    write_reg(gpu, regs::CONTROL, regs::CONTROL_RESET);
    assert_eq!(Driver::start(&bench, 0, 0, 4).run(Descriptor::NOP), Status::Ok);
    assert_eq!(gpu.stats().completions, completions + 1, "the referee counts on");
}

//! From power-on to the first finished descriptor.

use hmmstorm_abi::pci::{CHANNELS, VECTOR_CHANNEL0};
use hmmstorm_abi::regs::{self, Caps};
use hmmstorm_abi::ring::{Descriptor, Location, SgEntry, Status};
use hmmstorm_device::gpu::Region;

use crate::bench::{
    Bench, Driver, RAM, RESERVED, eventfd_pair, read_reg, set_master, signals, wait_for, write_reg,
};

#[test]
fn a_gpu_says_what_it_is() {
    let bench = Bench::new(&["--vram", "4M", "--aperture", "2M", "--mode", "synchronous"], 1 << 20);
    let gpu = bench.gpu(1);
    assert_eq!(read_reg(gpu, regs::ID), regs::ID_MAGIC);
    assert_eq!(read_reg(gpu, regs::VERSION), regs::INTERFACE_VERSION);
    assert_eq!(read_reg(gpu, regs::CAPS), Caps::new(CHANNELS as u8, 64, true).0);
    assert_eq!(read_reg(gpu, regs::STATUS), regs::STATUS_READY);
    assert_eq!((read_reg(gpu, regs::GPU_INDEX), read_reg(gpu, regs::GPU_COUNT)), (1, 2));
    assert_eq!((read_reg(gpu, regs::VRAM_SIZE_LO), read_reg(gpu, regs::VRAM_SIZE_HI)), (4 << 20, 0));
    assert_eq!(read_reg(gpu, regs::VRAM_APERTURE_LO), 2 << 20);
    assert_eq!(gpu.stats().bad_accesses, 0);
}

#[test]
fn a_page_goes_to_vram_and_comes_back_with_fence_and_interrupt() {
    let bench = Bench::new(&[], 1 << 20);
    let page: Vec<u8> = (0..4096_u32).map(|i| ((i * 7) >> 3) as u8).collect();
    bench.write(RESERVED, &page);
    let (ours, theirs) = eventfd_pair();
    let vector = u32::from(VECTOR_CHANNEL0) + 2;
    bench.gpu(0).connect_vectors(vector, 1, vec![theirs]).expect("a vector");
    let mut driver = Driver::start(&bench, 0, 2, 4);
    let (from, to) = (RAM + RESERVED, RAM + RESERVED + 8192);
    assert_eq!(driver.run(Descriptor::copy(Location::system(from), Location::vram(4096), 4096)), Status::Ok);
    assert_eq!(driver.run(Descriptor::copy(Location::vram(4096), Location::system(to), 4096)), Status::Ok);
    assert_eq!(bench.read(RESERVED + 8192, 4096), page);
    let mut window = vec![0; 4096];
    bench.gpu(0).region_read(Region::Vram, 4096, &mut window);
    assert_eq!(window, page);
    let mut interrupts = 0;
    wait_for("two interrupts", || {
        interrupts += signals(&ours);
        (interrupts == 2).then_some(())
    });
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.errors, stats.bytes, stats.segments), (2, 0, 8192, 2));
    assert_eq!((stats.interrupts, stats.queued, stats.dma_faults), (2, 0, 0));
}

#[test]
fn one_descriptor_moves_a_whole_list_to_a_peer() {
    let bench = Bench::new(&["--mode", "synchronous"], 2 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let list = RESERVED;
    let data = RESERVED + 64 * 4096;
    for page in 0..128_u64 {
        bench.write(data + page * 4096, &[page as u8 + 1; 4096]);
        let entry = SgEntry {
            src: Location::system(RAM + data + page * 4096),
            dst: Location::peer(1, (127 - page) * 4096),
            length: 4096,
        };
        let bytes: Vec<u8> = entry.to_words().iter().flat_map(|word| word.to_le_bytes()).collect();
        bench.write(list + page * 32, &bytes);
    }
    assert_eq!(driver.run(Descriptor::copy_list(RAM + list, 128)), Status::Ok);
    for page in 0..128 {
        let mut window = vec![0; 4096];
        bench.gpu(1).region_read(Region::Vram, (127 - page) * 4096, &mut window);
        assert_eq!(window, vec![page as u8 + 1; 4096]);
    }
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.segments, stats.bytes), (1, 128, 128 * 4096));
}

#[test]
fn a_bad_set_up_halts_the_channel_with_a_reason() {
    let bench = Bench::new(&[], 1 << 20);
    let gpu = bench.gpu(0);
    let cases = [
        (RAM + 1, 4, RAM + 4096, Status::BadAddress),
        (RAM, 4, RAM + 4097, Status::BadAddress),
        (u64::MAX - 4095, 12, RAM, Status::BadAddress),
        (RAM, 3, RAM + 4096, Status::BadDescriptor),
        (RAM, 13, RAM + 4096, Status::BadDescriptor),
        (RAM, u32::MAX, RAM + 4096, Status::BadDescriptor),
        (RAM, 4, 0, Status::DmaFault),
    ];
    for (ring, order, shadow, expected) in cases {
        let reg = |register| regs::channel_reg(1, register);
        write_reg(gpu, reg(regs::CH_RING_LO), ring as u32);
        write_reg(gpu, reg(regs::CH_RING_HI), (ring >> 32) as u32);
        write_reg(gpu, reg(regs::CH_RING_ORDER), order);
        write_reg(gpu, reg(regs::CH_SHADOW_LO), shadow as u32);
        write_reg(gpu, reg(regs::CH_SHADOW_HI), (shadow >> 32) as u32);
        write_reg(gpu, reg(regs::CH_CONTROL), regs::CH_CONTROL_ENABLE);
        let halted = regs::CH_STATUS_HALTED | (expected as u32) << regs::CH_STATUS_CODE_SHIFT;
        assert_eq!(read_reg(gpu, reg(regs::CH_STATUS)), halted, "{ring:#x} {order} {shadow:#x}");
        write_reg(gpu, reg(regs::CH_CONTROL), regs::CH_CONTROL_RESET);
        assert_eq!(read_reg(gpu, reg(regs::CH_STATUS)), 0);
    }
}

#[test]
fn without_bus_mastering_nothing_is_touched() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let driver = Driver::start(&bench, 0, 0, 4);
    set_master(bench.gpu(0), false);
    let mut driver = driver;
    driver.submit(Descriptor::NOP.with_fence(driver.fence_address(0), 1, false).to_words());
    assert_eq!(driver.halted(), Some(Status::DmaFault));
    assert_eq!(driver.fence(0, 1), None);
    assert_eq!(Driver::start(&bench, 0, 1, 4).halted(), Some(Status::DmaFault));
}

#[test]
fn accesses_that_break_a_rule_are_counted_and_change_nothing() {
    let bench = Bench::new(&[], 1 << 20);
    let gpu = bench.gpu(0);
    let driver = Driver::start(&bench, 0, 0, 4);
    let mut bad = 0;
    let mut expect_bad = |what: &str| {
        bad += 1;
        assert_eq!(gpu.stats().bad_accesses, bad, "{what}");
    };
    write_reg(gpu, regs::ID, 0);
    expect_bad("a write to a read-only register");
    assert_eq!(read_reg(gpu, 0x1c), 0);
    expect_bad("a hole");
    let mut wide = [0xaa; 8];
    gpu.region_read(Region::Registers, 0, &mut wide);
    expect_bad("a wide read");
    assert_eq!(wide, [0; 8]);
    gpu.region_write(Region::Registers, 2, &[0; 4]);
    expect_bad("a misaligned write");
    driver.write(regs::CH_RING_LO, 0);
    expect_bad("settings of an enabled channel");
    driver.write(regs::CH_CONTROL, 0);
    expect_bad("a channel turned off without a reset");
    driver.write(regs::CH_CONTROL, 0x80);
    expect_bad("an unknown bit");
    write_reg(gpu, regs::channel_reg(3, regs::CH_DOORBELL), 1);
    expect_bad("the doorbell of a disabled channel");
    write_reg(gpu, regs::CONTROL, 2);
    expect_bad("an unknown bit of CONTROL");
    assert_eq!(driver.status(), regs::CH_STATUS_ENABLED);
    assert_eq!(read_reg(gpu, regs::channel_reg(0, regs::CH_DOORBELL)), 0, "write-only, but no mistake");
    assert_eq!(gpu.stats().bad_accesses, bad);
}

#[test]
fn the_vram_window_ends_at_the_aperture() {
    let bench = Bench::new(&["--vram", "2M", "--aperture", "1M"], 1 << 20);
    let gpu = bench.gpu(0);
    gpu.region_write(Region::Vram, (1 << 20) - 4, &[1, 2, 3, 4]);
    let mut data = [0; 4];
    gpu.region_read(Region::Vram, (1 << 20) - 4, &mut data);
    assert_eq!(data, [1, 2, 3, 4]);
    for outside in [(1 << 20) - 3, 1 << 20, u64::MAX - 1] {
        gpu.region_write(Region::Vram, outside, &[9; 4]);
        gpu.region_read(Region::Vram, outside, &mut data);
        assert_eq!(data, [0; 4]);
    }
}

/// Small BAR: the guest's CPUs see a part of VRAM, engines and page tables all of it.
#[test]
fn engines_reach_vram_that_the_aperture_does_not_show() {
    let bench =
        Bench::new(&["--vram", "8M", "--aperture", "1M", "--mode", "synchronous"], crate::paging::SIZE);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let system = |offset| Location::system(RAM + crate::paging::DATA + offset);
    let (shown, hidden) = (Location::vram(0), Location::vram(7 << 20));
    let tables = crate::paging::Tables::new(&bench, 0, Location::system(RAM + crate::paging::TABLES));
    tables.map(0, hidden, crate::paging::ALL);
    assert_eq!(driver.run(crate::paging::bind(1, Some(tables.root))), Status::Ok);
    let store = crate::paging::job(hmmstorm_abi::job::Op::Store, 0, 512);
    assert_eq!(crate::paging::run(&mut driver, store).0, Status::Ok);
    assert_eq!(driver.run(Descriptor::copy(hidden, shown, 4096)), Status::Ok);
    assert_eq!(driver.run(Descriptor::copy(hidden, system(0), 4096)), Status::Ok);
    let mut window = [0; 8];
    bench.gpu(0).region_read(Region::Vram, 8, &mut window);
    let word = hmmstorm_abi::job::word_at(8, 0);
    assert_eq!((u64::from_le_bytes(window), bench.load_u64(crate::paging::DATA + 8)), (word, word));
}

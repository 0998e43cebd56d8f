//! A guest that writes whatever it likes: the device never panics, never touches what it was not given, and serves
//! the next well-behaved driver.

use hmmstorm_abi::pci::{BAR_REGS_SIZE, CHANNELS};
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Status};
use hmmstorm_device::gpu::Region;
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, RESERVED, memory_file};

/// RAM file: reserved pages, then a page that is not mapped, a page mapped read-only, and another not mapped.
const FORBIDDEN: u64 = RESERVED;
const READ_ONLY: u64 = FORBIDDEN + 4096;
const FORBIDDEN_TOO: u64 = READ_ONLY + 4096;
const SIZE: u64 = FORBIDDEN_TOO + 4096;

fn bench(mode: &str) -> Bench {
    let bench = Bench::unmapped(&["--mode", mode], SIZE);
    for gpu in bench.machine.gpus() {
        bench.map(gpu, RAM, 0, RESERVED, true);
        bench.map(gpu, RAM + READ_ONLY, READ_ONLY, 4096, false);
        gpu.dma_map(0xfffc_0000, 0x4_0000, false, None).expect("free");
    }
    bench.write(FORBIDDEN, &[0xa5; 3 * 4096]);
    bench
}

fn check_untouched(bench: &Bench) {
    assert!(bench.read(FORBIDDEN, 3 * 4096).iter().all(|byte| *byte == 0xa5));
}

/// After everything, an honest driver gets what it asks for.
fn check_usable(bench: &Bench) {
    for gpu in 0..2 {
        bench.gpu(gpu).region_write(Region::Config, 4, &[6, 0]);
        for channel in 0..CHANNELS {
            bench.gpu(gpu).region_write(
                Region::Registers,
                regs::channel_reg(channel, regs::CH_CONTROL) as u64,
                &regs::CH_CONTROL_RESET.to_le_bytes(),
            );
            let mut driver = Driver::start(bench, gpu, channel, 4);
            assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
            driver.reset();
        }
    }
}

/// Words that are more often nearly right than random ones would be.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0_u64..0x4000).prop_map(|offset| RAM + offset),
        (0_u64..SIZE).prop_map(|offset| RAM + offset),
        (0_u64..SIZE / 16).prop_map(|slot| RAM + slot * 16),
        0_u64..(1 << 20) + 4096,
        0_u64..64,
        Just(u64::MAX),
        (0_u64..64).prop_map(|bit| 1 << bit),
    ]
}

fn first_word() -> impl Strategy<Value = u64> {
    let aperture = prop_oneof![Just(0_u64), Just(1), 0x10_u64..0x13, 0_u64..256];
    let count = prop_oneof![3 => Just(0_u64), 1 => 0_u64..5000, 1 => 0_u64..1 << 32];
    (0_u64..8, 0_u64..5, aperture.clone(), aperture, count).prop_map(|(opcode, flags, src, dst, count)| {
        opcode | flags << 8 | src << 16 | dst << 24 | count << 32
    })
}

fn descriptor() -> impl Strategy<Value = [u64; 8]> {
    let last = prop_oneof![9 => Just(0_u64), 1 => any::<u64>()];
    (prop_oneof![4 => first_word(), 1 => any::<u64>()], prop::array::uniform6(word()), last)
        .prop_map(|(first, [a, b, c, d, e, f], last)| [first, a, b, c, d, e, f, last])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_descriptors(threaded: bool, descriptors in prop::collection::vec(descriptor(), 1..64)) {
        let bench = bench(if threaded { "threaded" } else { "synchronous" });
        let mut driver = Driver::start(&bench, 0, 0, 6);
        let old = driver.tail;
        descriptors.iter().for_each(|words| driver.put(*words));
        driver.publish(old);
        driver.ring_doorbell();
        // They may have overwritten ring and shadow page; a reset ends whatever it came to.
        driver.reset();
        check_untouched(&bench);
        check_usable(&bench);
    }

    #[test]
    fn any_ring_contents(seed: Vec<u8>, tail: u32, order in 4_u32..=9) {
        let bench = bench("synchronous");
        let driver = Driver::start(&bench, 0, 0, order);
        if !seed.is_empty() {
            let garbage: Vec<u8> = seed.iter().copied().cycle().take(12 * 4096).collect();
            bench.write(0, &garbage);
        }
        driver.publish_tail(tail % (2 << order));
        driver.ring_doorbell();
        driver.reset();
        check_untouched(&bench);
        check_usable(&bench);
    }

    #[test]
    fn any_register_accesses(
        threaded: bool,
        accesses in prop::collection::vec(access(), 1..200),
    ) {
        let bench = bench(if threaded { "threaded" } else { "synchronous" });
        for (region, offset, data, write) in accesses {
            if write {
                bench.gpu(0).region_write(region, offset, &data);
            } else {
                bench.gpu(0).region_read(region, offset, &mut data.clone());
            }
        }
        check_untouched(&bench);
        check_usable(&bench);
    }

    #[test]
    fn any_dma_requests(requests in prop::collection::vec((any::<bool>(), word(), word(), word()), 1..64)) {
        let bench = bench("synchronous");
        let file = memory_file(64 << 10);
        for (map, address, size, offset) in requests {
            let size = if size % 3 == 0 { 4096 } else { size };
            // Most fail, and some may take the honest driver's memory away.
            let _ = if map {
                let file = file.try_clone().expect("a descriptor");
                bench.gpu(0).dma_map(address & !0xfff, size & !0xfff, true, Some((file, offset & 0xf000)))
            } else {
                bench.gpu(0).dma_unmap(address & !0xfff, size & !0xfff)
            };
        }
        bench.gpu(0).dma_unmap_all();
        bench.map(bench.gpu(0), RAM, 0, RESERVED, true);
        check_untouched(&bench);
        check_usable(&bench);
    }
}

/// Accesses of any shape; most go to registers that exist.
fn access() -> impl Strategy<Value = (Region, u64, Vec<u8>, bool)> {
    let region = prop_oneof![
        8 => Just(Region::Registers),
        1 => Just(Region::Vram),
        1 => Just(Region::Msix),
        1 => Just(Region::Config),
    ];
    let channel_register =
        (0..CHANNELS, 0_usize..0x28).prop_map(|(channel, at)| regs::channel_reg(channel, at & !3) as u64);
    let offset = prop_oneof![
        6 => channel_register,
        2 => (0_u64..0x70).prop_map(|at| at & !3),
        1 => 0..BAR_REGS_SIZE as u64 + 8,
        1 => any::<u64>(),
    ];
    let value = prop_oneof![0_u32..16, Just(RAM as u32), any::<u32>()];
    let data = prop_oneof![
        6 => value.prop_map(|value| value.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..16),
    ];
    (region, offset, data, prop::bool::weighted(0.8))
}

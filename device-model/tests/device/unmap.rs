//! The VMM takes the answer to a removal as the promise that the device touches that memory no more.

use hmmstorm_abi::ring::{Descriptor, Location, SgEntry, Status};
use hmmstorm_device::guest_memory::MapError;

use crate::bench::{Bench, Driver, RAM, RESERVED, memory_file, wait_for};

const WINDOW: u64 = 0x1_0000_0000;
const WINDOW_SIZE: u64 = 4 << 20;
const LIST: u64 = RESERVED;
/// Entries of the list: 4 MiB each, several seconds of copying if nothing ends it.
const ENTRIES: u32 = 2048;

/// A bench with RAM for rings and a list, and `WINDOW` as a range of its own.
fn bench() -> Bench {
    let bench = Bench::new(&["--vram", "4M"], 1 << 20);
    let entry = SgEntry { src: Location::vram(0), dst: Location::system(WINDOW), length: WINDOW_SIZE as u32 };
    let bytes: Vec<u8> = entry.to_words().iter().flat_map(|word| word.to_le_bytes()).collect();
    (0..u64::from(ENTRIES)).for_each(|at| bench.write(LIST + at * 32, &bytes));
    bench
}

#[test]
fn a_removal_waits_for_the_copy_in_flight_and_stops_it() {
    use std::os::unix::fs::FileExt;
    let bench = bench();
    let window = memory_file(WINDOW_SIZE);
    let ours = window.try_clone().expect("a descriptor");
    bench.gpu(0).dma_map(WINDOW, WINDOW_SIZE, true, Some((window, 0))).expect("free");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(
        driver.run(Descriptor::fill(Location::vram(0), WINDOW_SIZE, 0x0101_0101_0101_0101)),
        Status::Ok
    );
    let copy = Descriptor::copy_list(RAM + LIST, ENTRIES).with_fence(driver.fence_address(1), 77, false);
    driver.submit(copy.to_words());
    let mut byte = [0];
    wait_for("the copy to begin", || {
        ours.read_exact_at(&mut byte, 0).expect("inside the file");
        (byte[0] == 1).then_some(())
    });
    bench.gpu(0).dma_unmap(WINDOW, WINDOW_SIZE).expect("mapped");
    // From here on the memory is ours.
    let scribble = vec![0xee; WINDOW_SIZE as usize];
    ours.write_all_at(&scribble, 0).expect("inside the file");
    assert_eq!(driver.wait(1, 77), Status::DmaFault, "the copy was still going on");
    let mut found = vec![0; WINDOW_SIZE as usize];
    ours.read_exact_at(&mut found, 0).expect("inside the file");
    assert!(found == scribble);
}

#[test]
fn removals_and_additions_race_with_copies() {
    let bench = bench();
    let window = memory_file(WINDOW_SIZE);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    std::thread::scope(|scope| {
        let gpu = bench.gpu(0);
        let churn = scope.spawn(|| {
            for _ in 0..200 {
                let file = window.try_clone().expect("a descriptor");
                gpu.dma_map(WINDOW, WINDOW_SIZE, true, Some((file, 0))).expect("free");
                gpu.dma_unmap(WINDOW, WINDOW_SIZE).expect("mapped");
            }
        });
        while !churn.is_finished() {
            let copy = Descriptor::copy(Location::vram(0), Location::system(WINDOW), 64 << 10);
            assert!(matches!(driver.run(copy), Status::Ok | Status::DmaFault));
        }
    });
    assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
}

#[test]
fn the_map_refuses_what_makes_no_sense() {
    let bench = Bench::unmapped(&[], 1 << 20);
    let gpu = bench.gpu(0);
    let map = |address, size, offset| {
        let file = bench.file.try_clone().expect("a descriptor");
        gpu.dma_map(address, size, true, Some((file, offset)))
    };
    assert!(matches!(map(RAM, 0, 0), Err(MapError::BadRange { .. })));
    assert!(matches!(map(RAM + 1, 4096, 0), Err(MapError::BadRange { .. })));
    assert!(matches!(map(RAM, 100, 0), Err(MapError::BadRange { .. })));
    assert!(matches!(map(u64::MAX - 4095, 8192, 0), Err(MapError::BadRange { .. })));
    assert!(matches!(map(RAM, 2 << 20, 0), Err(MapError::ShortFile { .. })));
    assert!(matches!(map(RAM, 4096, 1 << 20), Err(MapError::ShortFile { .. })));
    assert!(matches!(map(RAM, 4096, u64::MAX), Err(MapError::BadRange { .. })));
    assert!(matches!(map(RAM, 4096, 17), Err(MapError::Mmap { .. })));
    map(RAM, 8192, 0).expect("free");
    assert!(matches!(map(RAM + 4096, 8192, 0), Err(MapError::Overlap { .. })));
    gpu.dma_map(WINDOW, 100, true, None).expect("a range without a file has any shape");
    assert!(matches!(map(WINDOW, 4096, 0), Err(MapError::Overlap { .. })));
    // In part, or where nothing is.
    assert!(matches!(gpu.dma_unmap(RAM, 4096), Err(MapError::NotMapped { .. })));
    assert!(matches!(gpu.dma_unmap(RAM + 4096, 8192), Err(MapError::NotMapped { .. })));
    assert!(matches!(gpu.dma_unmap(0, 4096), Err(MapError::NotMapped { .. })));
    assert!(matches!(gpu.dma_unmap(RAM, 0), Err(MapError::NotMapped { .. })));
    // Several whole ones at once.
    map(RAM + 8192, 4096, 0).expect("free");
    gpu.dma_unmap(RAM, 1 << 20).expect("covers two ranges");
    map(RAM, 12288, 0).expect("free again");
    gpu.dma_unmap(WINDOW, 100).expect("the one without a file");
}

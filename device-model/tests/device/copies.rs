//! Copies, fills and lists against a model of plain byte vectors.

use hmmstorm_abi::ring::{Aperture, Descriptor, Location, SgEntry, Status};
use hmmstorm_device::gpu::Region;
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, RESERVED, memory_file};

/// Bytes of each memory that random ranges may touch.
const SIZE: u64 = 64 << 10;
/// Where the data lies in the RAM file.
const DATA: u64 = RESERVED;
/// Where it lies in DMA addresses: in pieces that are neither adjacent nor in order in the file.
const WINDOW: u64 = 0x1_0000_0000;
/// Where lists lie in the RAM file.
const LIST: u64 = DATA + SIZE;

/// Guest memory, VRAM of GPU 0 and VRAM of GPU 1.
#[derive(Clone, PartialEq)]
struct Model([Vec<u8>; 3]);

fn memory_of(aperture: Aperture) -> usize {
    match aperture {
        Aperture::System => 0,
        Aperture::Vram | Aperture::Peer(0) => 1,
        Aperture::Peer(_) => 2,
    }
}

impl Model {
    fn random(seed: u64) -> Self {
        let mut state = seed;
        Self(std::array::from_fn(|_| {
            (0..SIZE)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 33) as u8
                })
                .collect()
        }))
    }

    fn copy(&mut self, src: Location, dst: Location, length: u64) {
        let (from, to, length) = (offset(src), offset(dst), length as usize);
        let bytes = self.0[memory_of(src.aperture)][from..from + length].to_vec();
        self.0[memory_of(dst.aperture)][to..to + length].copy_from_slice(&bytes);
    }

    fn fill(&mut self, dst: Location, length: u64, pattern: u64) {
        let to = offset(dst);
        let range = &mut self.0[memory_of(dst.aperture)][to..to + length as usize];
        range.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&pattern.to_le_bytes()));
    }
}

fn offset(location: Location) -> usize {
    let base = if location.aperture == Aperture::System { WINDOW } else { 0 };
    (location.address - base) as usize
}

/// RAM at `RAM` for rings and lists, and the data window in pieces of 16 KiB whose file offsets run backwards.
fn bench(mode: &str) -> Bench {
    let bench = Bench::new(&["--mode", mode], 1 << 20);
    for gpu in bench.machine.gpus() {
        for piece in 0..4 {
            let file_offset = DATA + (3 - piece) * SIZE / 4;
            bench.map(gpu, WINDOW + piece * SIZE / 4, file_offset, SIZE / 4, true);
        }
    }
    bench
}

/// Offset in the RAM file of offset `at` in the window.
fn in_file(at: u64) -> u64 {
    let piece = at / (SIZE / 4);
    DATA + (3 - piece) * SIZE / 4 + at % (SIZE / 4)
}

fn load(bench: &Bench, model: &Model) {
    for piece in 0..4 {
        let start = piece * SIZE / 4;
        bench.write(in_file(start), &model.0[0][start as usize..(start + SIZE / 4) as usize]);
    }
    for gpu in 0..2 {
        bench.gpu(gpu).region_write(Region::Vram, 0, &model.0[gpu + 1]);
    }
}

fn store(bench: &Bench) -> Model {
    let system = (0..4).flat_map(|piece| bench.read(in_file(piece * SIZE / 4), SIZE as usize / 4)).collect();
    let vram = |gpu: usize| {
        let mut data = vec![0; SIZE as usize];
        bench.gpu(gpu).region_read(Region::Vram, 0, &mut data);
        data
    };
    Model([system, vram(0), vram(1)])
}

fn aperture() -> impl Strategy<Value = Aperture> {
    prop_oneof![
        Just(Aperture::System),
        Just(Aperture::Vram),
        Just(Aperture::Peer(0)),
        Just(Aperture::Peer(1)),
    ]
}

/// A range of `length` bytes inside the data, in any memory.
fn place(length: u64) -> impl Strategy<Value = Location> {
    (aperture(), 0..=SIZE - length).prop_map(|(aperture, offset)| {
        let base = if aperture == Aperture::System { WINDOW } else { 0 };
        Location { aperture, address: base + offset }
    })
}

fn segment() -> impl Strategy<Value = SgEntry> {
    (0..=SIZE).prop_flat_map(|length| {
        (place(length), place(length)).prop_map(move |(src, dst)| SgEntry { src, dst, length: length as u32 })
    })
}

#[derive(Clone, Debug)]
enum Operation {
    Copy(SgEntry),
    Fill { dst: Location, length: u64, pattern: u64 },
    List(Vec<SgEntry>),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => segment().prop_map(Operation::Copy),
        1 => (0..=SIZE / 8, any::<u64>()).prop_flat_map(|(words, pattern)| {
            place(words * 8).prop_map(move |mut dst| {
                dst.address &= !7;
                Operation::Fill { dst, length: words * 8, pattern }
            })
        }),
        2 => prop::collection::vec(segment(), 0..20).prop_map(Operation::List),
    ]
}

fn write_list(bench: &Bench, list: &[SgEntry]) {
    let bytes: Vec<u8> =
        list.iter().flat_map(|entry| entry.to_words()).flat_map(|word| word.to_le_bytes()).collect();
    bench.write(LIST, &bytes);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_sequence_of_operations_does_what_the_model_does(
        threaded: bool,
        seed: u64,
        operations in prop::collection::vec(operation(), 1..24),
    ) {
        let bench = bench(if threaded { "threaded" } else { "synchronous" });
        let mut model = Model::random(seed);
        load(&bench, &model);
        let mut driver = Driver::start(&bench, 0, 0, 4);
        for operation in operations {
            let descriptor = match &operation {
                Operation::Copy(segment) => {
                    model.copy(segment.src, segment.dst, u64::from(segment.length));
                    Descriptor::copy(segment.src, segment.dst, u64::from(segment.length))
                }
                Operation::Fill { dst, length, pattern } => {
                    model.fill(*dst, *length, *pattern);
                    Descriptor::fill(*dst, *length, *pattern)
                }
                Operation::List(list) => {
                    write_list(&bench, list);
                    list.iter().for_each(|entry| model.copy(entry.src, entry.dst, u64::from(entry.length)));
                    Descriptor::copy_list(RAM + LIST, list.len() as u32)
                }
            };
            prop_assert_eq!(driver.run(descriptor), Status::Ok);
            prop_assert!(store(&bench) == model, "after {:?}", operation);
        }
    }
}

/// Larger than what is moved before the DMA map is released, in both directions.
#[test]
fn long_overlapping_copies_behave_like_memmove() {
    const LENGTH: usize = 7 << 20;
    let bench = Bench::new(&["--vram", "8M", "--mode", "synchronous"], 16 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let bytes: Vec<u8> = (0..8_u32 << 20).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect();
    for (from, to) in [(0, 4097), (4097, 0), (0, 1 << 20), (1 << 20, 0), (5, 5)] {
        let mut expected = bytes.clone();
        expected.copy_within(from..from + LENGTH, to);
        bench.gpu(0).region_write(Region::Vram, 0, &bytes);
        let copy = Descriptor::copy(Location::vram(from as u64), Location::peer(0, to as u64), LENGTH as u64);
        assert_eq!(driver.run(copy), Status::Ok);
        let mut found = vec![0; 8 << 20];
        bench.gpu(0).region_read(Region::Vram, 0, &mut found);
        assert!(found == expected, "VRAM from {from} to {to}");

        bench.write(RESERVED, &bytes);
        let at = |offset: usize| Location::system(RAM + RESERVED + offset as u64);
        assert_eq!(driver.run(Descriptor::copy(at(from), at(to), LENGTH as u64)), Status::Ok);
        assert!(bench.read(RESERVED, 8 << 20) == expected, "RAM from {from} to {to}");
    }
}

#[test]
fn a_read_only_range_can_be_read_and_not_written() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let rom = memory_file(4096);
    bench.gpu(0).dma_map(WINDOW, 4096, false, Some((rom, 0))).expect("free");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let (rom, vram) = (Location::system(WINDOW), Location::vram(0));
    assert_eq!(driver.run(Descriptor::copy(rom, vram, 4096)), Status::Ok);
    assert_eq!(driver.run(Descriptor::copy(vram, rom, 4096)), Status::DmaFault);
    assert_eq!(driver.run(Descriptor::fill(rom, 8, 1)), Status::DmaFault);
}

#[test]
fn what_cannot_be_done_ends_in_an_error_fence_and_moves_nothing() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    // Known to the VMM, but without a file.
    bench.gpu(0).dma_map(WINDOW, 4096, true, None).expect("free");
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let vram = Location::vram;
    let system = |offset| Location::system(RAM + offset);
    let end = 1 << 20;
    let nop = Descriptor::NOP;
    let bad_entry =
        [[SgEntry { src: system(0), dst: vram(end), length: 1 }.to_words(), [0; 4]], [[0; 4], [0, 0, 0, 1]]];
    for (at, entries) in (0..).zip(bad_entry) {
        let bytes: Vec<u8> = entries.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        bench.write(LIST + at * 64, &bytes);
    }
    let cases = [
        (Descriptor::copy(vram(0), vram(end - 4095), 4096), Status::BadAddress),
        (Descriptor::copy(vram(u64::MAX), vram(0), 2), Status::BadAddress),
        (Descriptor::copy(Location::peer(2, 0), vram(0), 8), Status::BadAddress),
        (Descriptor::copy(system(end - 8), vram(0), 16), Status::DmaFault),
        (Descriptor::copy(vram(0), system(end - 8), 16), Status::DmaFault),
        (Descriptor::copy(Location::system(u64::MAX - 7), vram(0), 16), Status::DmaFault),
        (Descriptor::copy(vram(0), Location::system(WINDOW), 8), Status::DmaFault),
        (Descriptor::fill(vram(4), 8, 0), Status::BadDescriptor),
        (Descriptor::fill(vram(0), 12, 0), Status::BadDescriptor),
        (Descriptor::fill(system(end), 8, 0), Status::DmaFault),
        (Descriptor { count: 1, ..nop }, Status::BadDescriptor),
        (Descriptor { src: vram(0), ..Descriptor::copy_list(0, 1) }, Status::BadDescriptor),
        (Descriptor::copy_list(RAM, 4097), Status::BadList),
        (Descriptor::copy_list(RAM, u32::MAX), Status::BadList),
        (Descriptor::copy_list(0, 1), Status::BadList),
        (Descriptor::copy_list(RAM + end - 31, 1), Status::BadList),
        (Descriptor::copy_list(RAM + LIST, 2), Status::BadAddress),
        (Descriptor::copy_list(RAM + LIST + 64, 2), Status::BadList),
    ];
    let before = bench.read(DATA, SIZE as usize);
    let count = cases.len() as u64;
    for (descriptor, expected) in cases {
        assert_eq!(driver.run(descriptor), expected, "{descriptor:?}");
    }
    assert!(bench.read(DATA, SIZE as usize) == before);
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.errors, stats.bytes), (count, count, 0));
    assert_eq!(driver.run(Descriptor::copy(vram(0), system(DATA), 4096)), Status::Ok);
}

#[test]
fn a_fence_that_cannot_be_written_is_counted_and_the_channel_goes_on() {
    let bench = Bench::new(&["--mode", "synchronous"], 1 << 20);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    driver.submit(Descriptor::NOP.with_fence(0x1000, 1, true).to_words());
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.completions, stats.errors, stats.dma_faults), (1, 1, 1));
    assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
}

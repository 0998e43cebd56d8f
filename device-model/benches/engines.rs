//! How fast the engines are: `cargo bench -p hmmstorm-device`.
//!
//! Copies stand beside `memcpy()` over memory of the same kind, in the same process, so that the ratio means something
//! on any host. What a descriptor costs (submission, fence, waiting for it) is in their figures.

#[path = "../tests/device/bench.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod bench;
#[path = "../tests/device/paging.rs"]
#[allow(dead_code, reason = "the tests use more of it")]
mod paging;

use bench::{Bench, Driver, RAM, RESERVED};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use hmmstorm_abi::job::{Job, Op, Pattern};
use hmmstorm_abi::ring::{Descriptor, Location, SgEntry, Status};
use paging::{ALL, TABLES, Tables, bind, job, run};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::VolatileMemory;

const SIZES: [u64; 3] = [4 << 10, 2 << 20, 64 << 20];
/// Offset in RAM of what is copied.
const DATA: u64 = 4 << 20;
/// Words that a job visits.
const WORDS: u64 = 1 << 20;

fn main() {
    divan::main();
    // `cargo test` runs this file too, with no wish for figures.
    if std::env::args().any(|argument| argument == "--bench") {
        ratio();
    }
}

/// CPU time of this thread, in seconds.
fn cpu_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The copy engine against `memcpy()`, in turn and on the same bytes, by the CPU time of the thread that does it: what
/// other processes do to the host hardly shows. A synchronous device copies on the thread that rings its doorbell.
fn ratio() {
    const SIZE: u64 = 64 << 20;
    const ROUNDS: usize = 60;
    let bench = Bench::new(&["--vram", "64M", "--mode", "synchronous"], DATA + SIZE);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let ram = bench.ram.get_slice(DATA as usize, SIZE as usize).expect("in RAM");
    let vram = bench.gpu(0).vram().slice(0, SIZE).expect("in VRAM");
    let copy = Descriptor::copy(Location::system(RAM + DATA), Location::vram(0), SIZE);
    let mut times: [Vec<f64>; 2] = Default::default();
    // The first round touches every page for the first time.
    for round in 0..=ROUNDS {
        let mut time = |which: usize, work: &mut dyn FnMut()| {
            let start = cpu_time();
            work();
            if round > 0 {
                times[which].push(cpu_time() - start);
            }
        };
        time(0, &mut || ram.copy_to_volatile_slice(vram));
        time(1, &mut || assert_eq!(driver.run(copy), Status::Ok));
    }
    times.iter_mut().for_each(|times| times.sort_by(f64::total_cmp));
    let [memcpy, engine] = &times;
    println!(
        "copy engine / memcpy over 64 MiB, {ROUNDS} times each in turn: {:.2} by the best, {:.2} by the median",
        memcpy[0] / engine[0],
        memcpy[ROUNDS / 2] / engine[ROUNDS / 2],
    );
}

fn copy_bench() -> Bench {
    Bench::new(&["--vram", "64M"], DATA + (64 << 20))
}

/// RAM and VRAM are memory files that are mapped here, and so are these two.
#[divan::bench(args = SIZES)]
fn memcpy(bencher: Bencher<'_, '_>, size: u64) {
    let bench = copy_bench();
    let from = bench.ram.get_slice(DATA as usize, size as usize).expect("in RAM");
    let to = bench.gpu(0).vram().slice(0, size).expect("in VRAM");
    bencher.counter(BytesCount::new(size)).bench_local(|| from.copy_to_volatile_slice(to));
}

fn copies(bencher: Bencher<'_, '_>, size: u64, src: Location, dst: Location) {
    let bench = copy_bench();
    let mut driver = Driver::start(&bench, 0, 0, 4);
    bencher.counter(BytesCount::new(size)).bench_local(|| {
        assert_eq!(driver.run(Descriptor::copy(src, dst, size)), Status::Ok);
    });
}

#[divan::bench(args = SIZES)]
fn copy_to_vram(bencher: Bencher<'_, '_>, size: u64) {
    copies(bencher, size, Location::system(RAM + DATA), Location::vram(0));
}

#[divan::bench(args = SIZES)]
fn copy_from_vram(bencher: Bencher<'_, '_>, size: u64) {
    copies(bencher, size, Location::vram(0), Location::system(RAM + DATA));
}

#[divan::bench(args = SIZES)]
fn copy_to_peer(bencher: Bencher<'_, '_>, size: u64) {
    copies(bencher, size, Location::vram(0), Location::peer(1, 0));
}

/// A migration of 2 MiB whose pages are scattered.
#[divan::bench]
fn copy_list_of_512_pages(bencher: Bencher<'_, '_>) {
    let bench = copy_bench();
    let mut driver = Driver::start(&bench, 0, 0, 4);
    for page in 0..512_u64 {
        let entry = SgEntry {
            src: Location::system(RAM + DATA + page * 4096),
            dst: Location::vram((page * 173 % 512) * 4096),
            length: 4096,
        };
        let bytes: Vec<u8> = entry.to_words().iter().flat_map(|word| word.to_le_bytes()).collect();
        bench.write(RESERVED + page * 32, &bytes);
    }
    bencher.counter(BytesCount::new(2_usize << 20)).bench_local(|| {
        assert_eq!(driver.run(Descriptor::copy_list(RAM + RESERVED, 512)), Status::Ok);
    });
}

/// Jobs over 8 MiB of 4 KiB pages.
fn jobs(bencher: Bencher<'_, '_>, job: Job) {
    let bench = paging::bench(&[]);
    let tables = Tables::new(&bench, 0, Location::system(RAM + TABLES));
    (0..WORDS * 8 / 4096)
        .for_each(|page| tables.map(page * 4096, Location::system(RAM + DATA + page * 4096), ALL));
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
    bencher.counter(ItemsCount::new(job.count)).bench_local(|| {
        assert_eq!(run(&mut driver, job).0, Status::Ok);
    });
}

#[divan::bench(args = [Op::Load, Op::Check, Op::Store, Op::CheckStore, Op::AtomicAdd])]
fn sequential(bencher: Bencher<'_, '_>, op: Op) {
    jobs(bencher, job(op, 0, WORDS));
}

#[divan::bench(args = [Op::Load, Op::AtomicAdd])]
fn random(bencher: Bencher<'_, '_>, op: Op) {
    jobs(bencher, Job { pattern: Pattern::Random, ..job(op, 0, WORDS) });
}

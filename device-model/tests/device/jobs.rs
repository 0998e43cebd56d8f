//! Jobs of the access engine against a plain model.

use hmmstorm_abi::job::{COUNT_MAX, Job, Op, Outcome, Pattern, word_at};
use hmmstorm_abi::mmu::Pte;
use hmmstorm_abi::ring::{Aperture, Descriptor, Location, Status};
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, wait_for};
use crate::paging::{ALL, DATA, TABLES, Tables, access, bench, bind, job, offset, outcome, peek, poke, run};

const VA: u64 = 0x7f00_1234_5000;
/// Pages that the model's window spans.
const PAGES: u64 = 6;

/// Where page `page` of the window is: in turn in RAM, in the GPU's own VRAM, and in the peer's.
fn place(page: u64) -> Location {
    let at = page * 3 * 4096;
    match page % 3 {
        0 => Location::system(RAM + DATA + at),
        1 => Location::vram((1 << 20) + at),
        _ => Location::peer(1, (2 << 20) + at),
    }
}

fn at(va: u64) -> Location {
    offset(place((va - VA) / 4096), (va - VA) % 4096)
}

fn mapped<'a>(bench: &'a Bench, pool: Location) -> (Tables<'a>, Driver<'a>) {
    let tables = Tables::new(bench, 0, pool);
    (0..PAGES).for_each(|page| tables.map(VA + page * 4096, place(page), ALL));
    let mut driver = Driver::start(bench, 0, 0, 6);
    assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
    (tables, driver)
}

/// What a job does to these words, in plain steps.
fn model(words: &mut [u64], job: &Job) -> Outcome {
    let mut out = Outcome::default();
    let mut next = job.va;
    for index in 0..job.count {
        let va = if job.pattern == Pattern::Chase { next } else { job.address(index) };
        let word = &mut words[((va - VA) / 8) as usize];
        let (found, mut wanted) = (*word, None);
        match job.op {
            Op::Load => out.sum = out.sum.wrapping_add(found),
            Op::Check => wanted = Some(word_at(va, job.tag)),
            Op::Store => *word = word_at(va, job.tag),
            Op::CheckStore => {
                wanted = Some(word_at(va, job.tag));
                *word = word_at(va, job.operand);
            }
            Op::AtomicAdd => {
                out.sum = out.sum.wrapping_add(found);
                *word = found.wrapping_add(job.operand);
            }
            Op::AtomicCompareExchange => {
                wanted = Some(job.tag);
                if found == job.tag {
                    *word = job.operand;
                }
            }
        }
        out.done += 1;
        next = found;
        let inside = found % 8 == 0 && (job.va..job.va + job.window).contains(&found);
        let lost = job.pattern == Pattern::Chase && !inside && index + 1 < job.count;
        if lost {
            wanted = Some(job.va);
        }
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            out.mismatches += 1;
            if out.mismatches == 1 {
                (out.first_va, out.first_found, out.first_wanted) = (va, found, wanted);
            }
        }
        if lost {
            break;
        }
    }
    out
}

fn any_job() -> impl Strategy<Value = Job> {
    let op = prop_oneof![
        Just(Op::Load),
        Just(Op::Check),
        Just(Op::Store),
        Just(Op::CheckStore),
        Just(Op::AtomicAdd),
        Just(Op::AtomicCompareExchange)
    ];
    let pattern = prop_oneof![Just(Pattern::Strided), Just(Pattern::Random), Just(Pattern::Chase)];
    let words = PAGES * 512;
    let window = (0..words).prop_flat_map(move |first| (Just(first), 1..=words - first));
    let stride = prop_oneof![0_u64..600, any::<u64>().prop_map(|words| words & (u64::MAX >> 3))];
    (op, pattern, window, 0_u64..10_000, stride, 0_u64..3, 0_u64..3).prop_map(
        |(op, pattern, (first, words), count, stride, tag, operand)| {
            let op = if pattern == Pattern::Chase { Op::Load } else { op };
            let (va, window) = (VA + first * 8, words * 8);
            Job { op, pattern, va, window, count, stride: stride * 8, tag, operand }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_jobs_do_what_the_model_does(
        threaded: bool,
        tlb in prop_oneof![Just("1"), Just("3"), Just("1024")],
        ring in prop::collection::vec(any::<prop::sample::Index>(), (PAGES * 512) as usize),
        jobs in prop::collection::vec(any_job(), 1..6),
    ) {
        let mode = if threaded { "threaded" } else { "synchronous" };
        let bench = bench(&["--mode", mode, "--tlb-entries", tlb]);
        let (_, mut driver) = mapped(&bench, Location::vram(0));
        // Each word names another, so that a chase has a way to go.
        let mut words: Vec<u64> = ring.iter().map(|to| VA + 8 * to.index(ring.len()) as u64).collect();
        for (va, word) in (VA..).step_by(8).zip(&words) {
            poke(&bench, 0, at(va), *word);
        }
        for job in jobs {
            let expected = model(&mut words, &job);
            prop_assert_eq!(run(&mut driver, job), (Status::Ok, expected), "{:?}", job);
        }
        for (va, word) in (VA..).step_by(8).zip(&words) {
            prop_assert_eq!(peek(&bench, 0, at(va)), *word, "{:#x}", va);
        }
    }
}

#[test]
fn what_the_gpu_stored_it_finds_and_a_changed_word_it_names() {
    let bench = bench(&["--mode", "synchronous"]);
    let (_, mut driver) = mapped(&bench, Location::system(RAM + TABLES));
    let store = Job { tag: 7, ..job(Op::Store, VA, PAGES * 512) };
    let (status, stored) = run(&mut driver, store);
    assert_eq!((status, stored.done, stored.mismatches), (Status::Ok, PAGES * 512, 0));
    assert_eq!(run(&mut driver, Job { op: Op::Check, ..store }).1.mismatches, 0);
    let wrong = VA + 5 * 4096 + 8;
    poke(&bench, 0, at(wrong), 99);
    let checked = run(&mut driver, Job { op: Op::CheckStore, operand: 8, ..store }).1;
    assert_eq!((checked.mismatches, checked.first_va, checked.first_found), (1, wrong, 99));
    assert_eq!(checked.first_wanted, word_at(wrong, 7));
    assert_eq!(run(&mut driver, Job { op: Op::Check, tag: 8, ..store }).1.mismatches, 0);
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.accesses, stats.mismatches, stats.faults), (4 * PAGES * 512, 1, 0));
}

/// Channels of a GPU add to the same words at once, in its memory and over the bus: not one addition is lost.
#[test]
fn atomics_of_a_gpus_channels_compose() {
    const ADDS: u64 = 50_000;
    for shared in [Location::vram(0), Location::system(RAM + DATA)] {
        let bench = bench(&[]);
        let tables = Tables::new(&bench, 0, Location::system(RAM + TABLES));
        tables.map(VA, shared, ALL);
        let add = Job { count: ADDS, operand: 1, ..job(Op::AtomicAdd, VA, 2) };
        let mut drivers: Vec<Driver<'_>> =
            (0..4).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
        assert_eq!(drivers[0].run(bind(1, Some(tables.root))), Status::Ok);
        for (slot, driver) in (0..).zip(&mut drivers) {
            let fence = driver.fence_address(1);
            driver.submit(access(&bench, slot, 1, add).with_fence(fence, 9, false).to_words());
        }
        drivers.iter().for_each(|driver| assert_eq!(driver.wait(1, 9), Status::Ok));
        let second = Location { address: shared.address + 8, ..shared };
        assert_eq!((peek(&bench, 0, shared), peek(&bench, 0, second)), (2 * ADDS, 2 * ADDS), "in {shared:?}");
    }
}

/// And those of a GPU's channels and of a CPU, in the GPU's memory.
#[test]
fn atomics_of_a_gpu_in_its_own_memory_compose_with_a_cpus() {
    use std::sync::atomic::{AtomicU64, Ordering};
    use vm_memory::VolatileMemory;
    const ADDS: u64 = 50_000;
    let bench = bench(&[]);
    let tables = Tables::new(&bench, 0, Location::system(RAM + TABLES));
    tables.map(VA, Location::vram(0), ALL);
    let add = Job { count: ADDS, operand: 1, ..job(Op::AtomicAdd, VA, 1) };
    let mut driver = Driver::start(&bench, 0, 0, 4);
    assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
    let fence = driver.fence_address(1);
    driver.submit(access(&bench, 0, 1, add).with_fence(fence, 9, false).to_words());
    let vram = bench.gpu(0).vram();
    let page = vram.slice(0, 4096).expect("in VRAM");
    let word: &AtomicU64 = page.get_atomic_ref(0).expect("aligned");
    for _ in 0..ADDS {
        word.fetch_add(1, Ordering::SeqCst);
    }
    assert_eq!(driver.wait(1, 9), Status::Ok);
    assert_eq!(word.load(Ordering::SeqCst), 2 * ADDS);
}

#[test]
fn both_gpus_work_on_pages_of_each_other_through_huge_leaves() {
    let bench = bench(&[]);
    let mut drivers = Vec::new();
    for gpu in 0..2_u8 {
        let index = usize::from(gpu);
        let tables = Tables::new(&bench, index, Location::vram(0));
        tables.map_huge(0, Location::vram(2 << 20), ALL);
        tables.map_huge(2 << 20, Location::peer(1 - gpu, 4 << 20), ALL);
        let mut driver = Driver::start(&bench, index, index, 4);
        assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
        drivers.push(driver);
    }
    let words = (4 << 20) / 8;
    for (slot, driver) in (0..).zip(&mut drivers) {
        let store = Job { tag: 40 + slot, ..job(Op::Store, 0, words) };
        let fence = driver.fence_address(1);
        driver.submit(access(&bench, slot, 1, store).with_fence(fence, 9, false).to_words());
    }
    drivers.iter().for_each(|driver| assert_eq!(driver.wait(1, 9), Status::Ok));
    for gpu in 0..2 {
        // The other one's second half is in this one's VRAM, from 4 MiB on.
        assert_eq!(peek(&bench, gpu, Location::vram(2 << 20)), word_at(0, 40 + gpu as u64));
        let last = (4 << 20) - 8;
        assert_eq!(peek(&bench, gpu, Location::vram((6 << 20) - 8)), word_at(last, 41 - gpu as u64));
    }
}

#[test]
fn what_is_no_job_ends_as_bad_job() {
    let bench = bench(&["--mode", "synchronous"]);
    let (_, mut driver) = mapped(&bench, Location::vram(0));
    let good = job(Op::Load, VA, 8);
    let words = [
        Job { va: VA + 4, ..good }.to_words(),
        Job { window: 0, ..good }.to_words(),
        Job { window: 12, ..good }.to_words(),
        Job { stride: 4, ..good }.to_words(),
        Job { count: COUNT_MAX + 1, ..good }.to_words(),
        Job { va: u64::MAX - 7, window: 16, ..good }.to_words(),
        Job { op: Op::Store, pattern: Pattern::Chase, ..good }.to_words(),
        [6, VA, 8, 1, 8, 0, 0, 0],
        [0x300, VA, 8, 1, 8, 0, 0, 0],
        [0, VA, 8, 1, 8, 0, 0, 1],
    ];
    let descriptor = access(&bench, 0, 1, good);
    for words in words {
        (0..).zip(words).for_each(|(at, word)| poke(&bench, 0, offset(descriptor.src, at * 8), word));
        assert_eq!(driver.run(descriptor), Status::BadJob, "{words:x?}");
    }
    let descriptor = access(&bench, 0, 1, good);
    assert_eq!(driver.run(descriptor), Status::Ok);
    let elsewhere = |src| Descriptor { src, ..descriptor };
    let end = Location::vram((8 << 20) - 64);
    let nowhere = [Location::system(0), end, Location::peer(7, 0), Location::system(u64::MAX - 63)];
    for src in nowhere {
        assert_eq!(driver.run(elsewhere(src)), Status::BadJob, "{src:?}");
    }
    for asid in [2, 63, 64, u32::MAX] {
        assert_eq!(driver.run(Descriptor { count: asid, ..descriptor }), Status::BadJob, "{asid}");
    }
    assert_eq!(driver.run(bind(1, None)), Status::Ok);
    assert_eq!(driver.run(descriptor), Status::BadJob);
}

#[test]
fn a_job_may_be_in_vram() {
    let bench = bench(&["--mode", "synchronous"]);
    let (_, mut driver) = mapped(&bench, Location::vram(0));
    let here = Location::vram(7 << 20);
    (0..)
        .zip(job(Op::Load, VA, 5).to_words())
        .for_each(|(at, word)| poke(&bench, 0, offset(here, at * 8), word));
    let descriptor = Descriptor { src: here, ..access(&bench, 0, 1, job(Op::Load, VA, 5)) };
    assert_eq!(driver.run(descriptor), Status::Ok);
    assert_eq!(peek(&bench, 0, offset(here, 64)), 5);
}

#[test]
fn a_leaf_to_memory_that_is_not_there_ends_the_job() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut driver) = mapped(&bench, Location::vram(0));
    tables.map(VA + 4096, Location::system(0x1000), ALL);
    let (status, outcome) = run(&mut driver, job(Op::Load, VA, 1024));
    assert_eq!((status, outcome.done, outcome.faults), (Status::DmaFault, 512, 0));
    assert_eq!(bench.gpu(0).stats().dma_faults, 1);
}

/// A job of days is ended by a reset, with what it had got to.
#[test]
fn a_reset_ends_a_long_job() {
    let bench = bench(&[]);
    let (tables, mut driver) = mapped(&bench, Location::vram(0));
    tables.set(VA, 0, Pte::leaf(place(0), ALL));
    let long = Job { count: COUNT_MAX, stride: 0, ..job(Op::AtomicAdd, VA, 8) };
    let descriptor = access(&bench, 0, 1, Job { operand: 1, ..long });
    driver.submit(descriptor.with_fence(driver.fence_address(1), 5, false).to_words());
    wait_for("the job to begin", || (peek(&bench, 0, place(0)) > 0).then_some(()));
    driver.reset();
    assert_eq!(driver.fence(1, 5), Some(Status::Aborted));
    let done = outcome(&bench, 0).done;
    assert!(done > 0 && done < COUNT_MAX);
    assert_eq!(peek(&bench, 0, place(0)), done);
    assert_eq!(driver.bench.gpu(0).stats().stalled, 0);
    // `place()` puts page 0 in RAM.
    assert_eq!(place(0).aperture, Aperture::System);
}

//! Page tables and TLB, seen from the driver: what is translated, what is remembered, what is refused.

use std::collections::HashMap;

use hmmstorm_abi::job::{Job, Op};
use hmmstorm_abi::mmu::{Pte, Reason, VA_BITS, Want};
use hmmstorm_abi::ring::{Descriptor, Location, Status};
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, wait_for};
use crate::paging::{
    ALL, DATA, FaultBuffer, TABLES, Tables, access, bench, bind, invalidate, job, offset, peek, poke, run,
};

const VA: u64 = 0x4000_0000;
const ASID: u32 = 1;

fn page(index: u64) -> Location {
    Location::system(RAM + DATA + index * 4096)
}

fn start<'a>(bench: &'a Bench, pool: Location) -> (Tables<'a>, FaultBuffer<'a>, Driver<'a>) {
    let tables = Tables::new(bench, 0, pool);
    let faults = FaultBuffer::start(bench, 0, 4);
    let mut driver = Driver::start(bench, 0, 0, 6);
    assert_eq!(driver.run(bind(ASID, Some(tables.root))), Status::Ok);
    (tables, faults, driver)
}

/// The word at `va`, or why there is none.
fn load(driver: &mut Driver<'_>, faults: &mut FaultBuffer<'_>, va: u64, want: Want) -> Result<u64, Reason> {
    let op = [Op::Load, Op::Store, Op::AtomicAdd][want as usize];
    let descriptor = access(driver.bench, 0, ASID, job(op, va, 1));
    let value = u64::from(driver.tail) + 1;
    driver.submit(descriptor.with_fence(driver.fence_address(0), value, false).to_words());
    if let Some(fault) = faults.next() {
        assert_eq!((fault.va, fault.want), (va & !0xfff, want));
        faults.cancel(fault);
        assert_eq!(driver.fence(0, value), Some(Status::PageFault));
        return Err(fault.reason);
    }
    assert_eq!(driver.fence(0, value), Some(Status::Ok));
    Ok(crate::paging::outcome(driver.bench, 0).sum)
}

#[test]
fn tables_may_be_anywhere() {
    for pool in [Location::system(RAM + TABLES), Location::vram(4096), Location::peer(1, 4096)] {
        let bench = bench(&["--mode", "synchronous"]);
        let (tables, mut faults, mut driver) = start(&bench, pool);
        poke(&bench, 0, offset(page(3), 16), 77);
        tables.map(VA, page(3), 0);
        assert_eq!(load(&mut driver, &mut faults, VA + 16, Want::Read), Ok(77), "{pool:?}");
        assert_eq!(load(&mut driver, &mut faults, VA + 4096, Want::Read), Err(Reason::NotPresent));
    }
}

#[test]
fn rights_are_those_of_the_leaf_and_more_need_no_invalidation() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut driver) = start(&bench, Location::vram(0));
    let wants = [Want::Read, Want::Write, Want::Atomic];
    for (rights, allowed) in [(0, 1), (Pte::WRITE, 2), (Pte::WRITE | Pte::ATOMIC, 3)] {
        tables.map(VA, page(0), rights);
        for (index, want) in wants.into_iter().enumerate() {
            let found = load(&mut driver, &mut faults, VA, want);
            assert_eq!(found.err(), (index >= allowed).then_some(Reason::Permission), "{rights} {want:?}");
        }
    }
    // Fewer rights show once they are invalidated.
    tables.map(VA, page(0), 0);
    assert!(load(&mut driver, &mut faults, VA, Want::Atomic).is_ok());
    assert_eq!(driver.run(invalidate(ASID, VA, 4096)), Status::Ok);
    assert_eq!(load(&mut driver, &mut faults, VA, Want::Write), Err(Reason::Permission));
}

#[test]
fn a_stale_translation_stays_until_it_is_invalidated() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut driver) = start(&bench, Location::vram(0));
    for index in 0..4 {
        poke(&bench, 0, page(index), 100 + index);
        tables.map(VA + index * 4096, page(index), 0);
        assert_eq!(load(&mut driver, &mut faults, VA + index * 4096, Want::Read), Ok(100 + index));
    }
    tables.map(VA, page(1), 0);
    (1..4).for_each(|index| tables.unmap(VA + index * 4096));
    for index in 0..4 {
        assert_eq!(load(&mut driver, &mut faults, VA + index * 4096, Want::Read), Ok(100 + index));
    }
    // Another space, and a range that is not theirs.
    assert_eq!(driver.run(invalidate(ASID + 1, 0, 0)), Status::Ok);
    assert_eq!(driver.run(invalidate(ASID, VA + 4 * 4096, 4096)), Status::Ok);
    assert_eq!(load(&mut driver, &mut faults, VA, Want::Read), Ok(100));
    assert_eq!(driver.run(invalidate(ASID, VA, 2 * 4096)), Status::Ok);
    assert_eq!(load(&mut driver, &mut faults, VA, Want::Read), Ok(101));
    assert_eq!(load(&mut driver, &mut faults, VA + 4096, Want::Read), Err(Reason::NotPresent));
    assert_eq!(load(&mut driver, &mut faults, VA + 8192, Want::Read), Ok(102));
    // To bind the same table again forgets the rest.
    assert_eq!(driver.run(bind(ASID, Some(tables.root))), Status::Ok);
    assert_eq!(load(&mut driver, &mut faults, VA + 8192, Want::Read), Err(Reason::NotPresent));
    assert_eq!(bench.gpu(0).stats().tlb_invalidations, 5);
}

#[test]
fn a_huge_translation_goes_with_any_part_of_it() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut driver) = start(&bench, Location::vram(0));
    tables.map_huge(VA, Location::vram(2 << 20), ALL);
    poke(&bench, 0, Location::vram((2 << 20) + 0x1_2340), 5);
    assert_eq!(load(&mut driver, &mut faults, VA + 0x1_2340, Want::Read), Ok(5));
    tables.set(VA, 1, Pte::NONE);
    assert_eq!(load(&mut driver, &mut faults, VA + 0x1f_f000, Want::Read), Ok(0));
    assert_eq!(driver.run(invalidate(ASID, VA + 0x8_0000, 4096)), Status::Ok);
    assert_eq!(load(&mut driver, &mut faults, VA, Want::Read), Err(Reason::NotPresent));
    // Small pages take its place.
    tables.map(VA + 4096, page(0), 0);
    assert!(load(&mut driver, &mut faults, VA + 4096, Want::Read).is_ok());
}

#[test]
fn a_small_tlb_forgets_by_itself() {
    let bench = bench(&["--mode", "synchronous", "--tlb-entries", "1"]);
    let (tables, mut faults, mut driver) = start(&bench, Location::vram(0));
    (0..2).for_each(|index| tables.map(VA + index * 4096, page(index), 0));
    assert!(load(&mut driver, &mut faults, VA, Want::Read).is_ok());
    tables.unmap(VA);
    assert!(load(&mut driver, &mut faults, VA, Want::Read).is_ok());
    assert!(load(&mut driver, &mut faults, VA + 4096, Want::Read).is_ok());
    assert_eq!(load(&mut driver, &mut faults, VA, Want::Read), Err(Reason::NotPresent));
    let stats = bench.gpu(0).stats();
    assert_eq!((stats.tlb_hits, stats.tlb_misses), (1, 3));
}

#[test]
fn entries_that_make_no_sense_are_bad_tables() {
    let bench = bench(&["--mode", "synchronous"]);
    let (tables, mut faults, mut driver) = start(&bench, Location::system(RAM + TABLES));
    let at = |level| tables.entry(VA, level);
    // The tables below are made, and each level then gets an entry that is not to be.
    at(0);
    let valid = Pte::VALID;
    let leaf = |place| Pte::leaf(place, ALL).0;
    let table = |place| Pte::table(place).0;
    let end = 8 << 20;
    let cases = [
        (0, valid | RAM, "a table at the lowest level"),
        (0, leaf(page(0)) | 1 << 52, "a reserved bit"),
        (0, leaf(page(0)) | 1 << 63, "another reserved bit"),
        (0, leaf(page(0)) | 0x7 << 4, "no such aperture"),
        (0, leaf(Location::vram(end)), "VRAM that is not there"),
        (0, leaf(Location::peer(2, 0)), "a GPU that is not there"),
        (1, leaf(Location::vram(4096)), "a misaligned huge page"),
        (1, leaf(Location::vram(end)), "VRAM that is not there"),
        (1, table(Location::vram(end)), "a table behind VRAM"),
        (1, table(Location::system(0x1000)), "a table that is not mapped"),
        (2, leaf(Location::vram(0)), "a page of 1 GiB"),
        (3, leaf(Location::vram(0)), "a page of 512 GiB"),
        (3, table(Location::peer(15, 0)), "a table of no GPU"),
    ];
    for (level, entry, what) in cases {
        let before = peek(&bench, 0, at(level));
        poke(&bench, 0, at(level), entry);
        assert_eq!(load(&mut driver, &mut faults, VA, Want::Read), Err(Reason::BadTable), "{what}");
        poke(&bench, 0, at(level), before);
    }
    // A table of itself: the walk ends after four levels, here at an entry that is no leaf.
    poke(&bench, 0, tables.root, table(tables.root));
    assert_eq!(load(&mut driver, &mut faults, 0, Want::Read), Err(Reason::BadTable));
    for va in [1 << VA_BITS, 1 << 63, !0xfff] {
        assert_eq!(load(&mut driver, &mut faults, va, Want::Read), Err(Reason::BadAddress), "{va:#x}");
    }
    poke(&bench, 0, at(0), leaf(page(0)));
    assert!(load(&mut driver, &mut faults, VA, Want::Read).is_ok());
}

#[test]
fn bindings_and_invalidations_that_make_no_sense_are_refused() {
    let bench = bench(&["--mode", "synchronous"]);
    let mut driver = Driver::start(&bench, 0, 0, 4);
    let system = Location::system;
    let end = 8 << 20;
    let cases = [
        (bind(64, Some(Location::vram(0))), Status::BadJob),
        (bind(u32::MAX, None), Status::BadJob),
        (bind(0, Some(Location::vram(8))), Status::BadAddress),
        (bind(0, Some(Location::vram(end))), Status::BadAddress),
        (bind(0, Some(Location::peer(9, 0))), Status::BadAddress),
        (bind(0, Some(system(0x1000))), Status::DmaFault),
        (bind(0, Some(system(!0xfff))), Status::DmaFault),
        (Descriptor { length: 8192, ..bind(0, Some(Location::vram(0))) }, Status::BadDescriptor),
        (invalidate(64, 0, 0), Status::BadJob),
        (invalidate(0, 1, 4096), Status::BadDescriptor),
        (invalidate(0, 0, 5), Status::BadDescriptor),
        (Descriptor { dst: Location::vram(0), ..invalidate(0, 0, 0) }, Status::BadDescriptor),
        (bind(0, Some(Location::vram(0))), Status::Ok),
        (bind(63, Some(Location::vram(end - 4096))), Status::Ok),
        (invalidate(63, !0xfff, 1 << 63), Status::Ok),
        (bind(63, None), Status::Ok),
    ];
    for (descriptor, status) in cases {
        assert_eq!(driver.run(descriptor), status, "{descriptor:?}");
    }
}

/// The promise of an invalidation: once its fence is written, nothing made with the old translation touches the old
/// page. Whoever frees that page then writes to it, and finds its own words there ever after.
#[test]
fn nothing_touches_the_old_page_once_the_fence_of_an_invalidation_is_written() {
    let bench = bench(&[]);
    let (tables, _, mut worker) = start(&bench, Location::system(RAM + TABLES));
    let mut invalidator = Driver::start(&bench, 0, 1, 4);
    tables.map(VA, page(0), ALL);
    let endless = Job { count: 1 << 32, operand: 1, ..job(Op::AtomicAdd, VA, 512) };
    worker.submit(access(&bench, 0, ASID, endless).to_words());
    for round in 0..40 {
        let (old, new) = (page(round % 2), page((round + 1) % 2));
        let first = peek(&bench, 0, old);
        wait_for("the job", || (peek(&bench, 0, old) != first).then_some(()));
        tables.map(VA, new, ALL);
        assert_eq!(invalidator.run(invalidate(ASID, VA, 4096)), Status::Ok);
        (0..512).for_each(|word| poke(&bench, 0, offset(old, word * 8), u64::MAX / 2));
        let touched = || (0..512).any(|word| peek(&bench, 0, offset(old, word * 8)) != u64::MAX / 2);
        let began = peek(&bench, 0, new);
        wait_for("the job on the new page", || (peek(&bench, 0, new) != began).then_some(()));
        assert!(!touched(), "round {round}");
    }
    worker.reset();
}

/// What the driver does to a space, for the property below.
#[derive(Clone, Debug)]
enum Step {
    Map { page: u64, to: u64, rights: u64 },
    MapHuge { to: u64 },
    Unmap { page: u64 },
    Invalidate { page: u64, pages: u64 },
    Access { page: u64, want: Want },
}

fn step() -> impl Strategy<Value = Step> {
    let want = prop_oneof![Just(Want::Read), Just(Want::Write), Just(Want::Atomic)];
    prop_oneof![
        3 => (0_u64..8, 0_u64..8, 0_u64..4).prop_map(|(page, to, rights)| Step::Map { page, to, rights: rights << 1 }),
        1 => (0_u64..3).prop_map(|to| Step::MapHuge { to }),
        1 => (0_u64..8).prop_map(|page| Step::Unmap { page }),
        2 => (0_u64..8, 0_u64..9).prop_map(|(page, pages)| Step::Invalidate { page, pages }),
        8 => (0_u64..8, want).prop_map(|(page, want)| Step::Access { page, want }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// A TLB that never runs full is an exact thing: a map from page to the leaf as it was when it was last walked.
    #[test]
    fn the_tlb_remembers_exactly_what_was_not_invalidated(steps in prop::collection::vec(step(), 1..120)) {
        let bench = bench(&["--mode", "synchronous"]);
        let (tables, mut faults, mut driver) = start(&bench, Location::system(RAM + TABLES));
        let huge = |to: u64| Location::vram((1 + to) << 21);
        // Each page can be told from the others by its last word.
        (0..8).for_each(|index| poke(&bench, 0, offset(page(index), 4088), 1 + index));
        for (to, index) in (0..3).flat_map(|to| (0..8).map(move |index| (to, index))) {
            poke(&bench, 0, offset(huge(to), index * 4096 + 4088), 100 + to * 8 + index);
        }
        let mut small: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut large: Option<u64> = None;
        // What is remembered: of small pages, and of the huge one.
        let mut tlb: HashMap<u64, (u64, u64)> = HashMap::new();
        let mut tlb_huge: Option<u64> = None;
        for step in steps {
            match step {
                Step::Map { page: at, to, rights } => {
                    if large.take().is_some() {
                        tables.set(VA, 1, Pte::NONE);
                        small.clear();
                    }
                    tables.map(VA + at * 4096, page(to), rights);
                    small.insert(at, (1 + to, rights));
                }
                Step::MapHuge { to } => {
                    tables.map_huge(VA, huge(to), ALL);
                    large = Some(to);
                    small.clear();
                }
                Step::Unmap { page: at } => {
                    if large.is_none() {
                        tables.unmap(VA + at * 4096);
                        small.remove(&at);
                    }
                }
                Step::Invalidate { page: at, pages } => {
                    let status = driver.run(invalidate(ASID, VA + at * 4096, pages * 4096));
                    prop_assert_eq!(status, Status::Ok);
                    tlb.retain(|page, _| pages != 0 && !(at..at + pages).contains(page));
                    tlb_huge = None;
                }
                Step::Access { page: at, want } => {
                    let allows = |rights: u64| match want {
                        Want::Read => true,
                        Want::Write => rights & Pte::WRITE != 0,
                        Want::Atomic => rights & ALL == ALL,
                    };
                    // An older small translation wins over a huge one: both are found only by a driver that breaks
                    // the rules, and it gets one of them.
                    let known = tlb.get(&at).copied().filter(|(_, rights)| allows(*rights));
                    if known.is_none() {
                        tlb.remove(&at);
                    }
                    let known = known.or(tlb_huge.map(|to| (100 + to * 8 + at, ALL)));
                    let walked = match large {
                        Some(to) => Some((100 + to * 8 + at, ALL)),
                        None => small.get(&at).copied(),
                    };
                    let expected = match (known, walked) {
                        (Some((word, _)), _) => Ok(word),
                        (None, None) => Err(Reason::NotPresent),
                        (None, Some((_, rights))) if !allows(rights) => Err(Reason::Permission),
                        (None, Some((word, rights))) => {
                            match large {
                                Some(to) => tlb_huge = Some(to),
                                None => drop(tlb.insert(at, (word, rights))),
                            }
                            Ok(word)
                        }
                    };
                    let found = load(&mut driver, &mut faults, VA + at * 4096 + 4088, want);
                    prop_assert_eq!(found.is_ok(), expected.is_ok());
                    prop_assert_eq!(found.err(), expected.err());
                    if want == Want::Read {
                        prop_assert_eq!(found.ok(), expected.ok());
                    }
                    // A store or an atomic may have changed the word.
                    if let (Ok(word), true) = (expected, want == Want::Write) {
                        let at = match word {
                            0..100 => offset(page(word - 1), 4088),
                            _ => offset(huge((word - 100) / 8), (word - 100) % 8 * 4096 + 4088),
                        };
                        poke(&bench, 0, at, word);
                    }
                }
            }
        }
    }

    /// Tables full of anything, changing under the walker: every job ends, and nothing outside is touched.
    #[test]
    fn any_tables(
        entries in prop::collection::vec((0_u64..4, 0_u64..512, hostile()), 1..256),
        vas in prop::collection::vec(any::<u64>(), 1..16),
    ) {
        let bench = bench(&["--poll-us", "0"]);
        let root = Location::system(RAM + TABLES);
        (0..4 * 512).for_each(|word| poke(&bench, 0, offset(root, word * 8), 0));
        let mut driver = Driver::start(&bench, 0, 0, 6);
        prop_assert_eq!(driver.run(bind(ASID, Some(root))), Status::Ok);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for (table, index, word) in &entries {
                    poke(&bench, 0, offset(root, table * 4096 + index * 8), *word);
                }
            });
            for va in &vas {
                let va = va & 0x1ff_ffff_fff8;
                let job = Job { stride: 1 << 30, window: 1 << 42, ..job(Op::Load, va, 64) };
                assert!(matches!(run(&mut driver, job).0, Status::Ok | Status::PageFault | Status::DmaFault));
            }
        });
        prop_assert_eq!(driver.run(Descriptor::NOP), Status::Ok);
    }
}

/// Entries that lead somewhere more often than random ones would.
fn hostile() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![Just(Pte::VALID), Just(Pte::VALID | Pte::LEAF | Pte::WRITE), 0_u64..16];
    let aperture = prop_oneof![3 => Just(0_u64), 1 => Just(1), 1 => Just(0x11), 1 => 0_u64..256];
    let table = (0_u64..4).prop_map(|table| RAM + TABLES + table * 4096);
    let address = prop_oneof![4 => table, 1 => 0_u64..16 << 20, 1 => any::<u64>()];
    (flags, aperture, address).prop_map(|(flags, aperture, address)| flags | aperture << 4 | address & !0xfff)
}

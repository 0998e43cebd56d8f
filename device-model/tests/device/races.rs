//! Faults, replays, cancels, invalidations and resets at the same time, by a driver in disorder and by one that is
//! hostile: every job ends, whatever the order, and an honest driver is served afterwards.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use hmmstorm_abi::job::{Job, Op, mix};
use hmmstorm_abi::mmu::Pte;
use hmmstorm_abi::pci::CHANNELS;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Descriptor, Location, Status};
use hmmstorm_abi::wire::control::Chaos;
use hmmstorm_device::gpu::Region;
use proptest::prelude::*;

use crate::bench::{Bench, Driver, RAM, set_master, write_reg};
use crate::paging::{
    ALL, DATA, FaultBuffer, JOBS, TABLES, Tables, access, bench, bind, invalidate, job, outcome, poke, run,
};

const PAGES: u64 = 8;

fn page(index: u64) -> Location {
    Location::system(RAM + DATA + index * 4096)
}

/// Two servers replay and cancel without looking at each other, a third thread maps, unmaps and invalidates, and a
/// plan loses, doubles and makes up reports. No job is lost, and each says truly how far it got.
#[test]
fn servers_that_race_lose_no_job() {
    const ROUNDS: u64 = 30;
    let bench = bench(&["--poll-us", "5"]);
    let tables = Tables::new(&bench, 0, Location::system(RAM + TABLES));
    (0..PAGES).for_each(|at| tables.map(at * 4096, page(at), ALL));
    let leaves: Vec<Location> = (0..PAGES).map(|at| tables.entry(at * 4096, 0)).collect();
    let _faults = FaultBuffer::start(&bench, 0, 4);
    let mut binder = Driver::start(&bench, 0, 7, 4);
    assert_eq!(binder.run(bind(1, Some(tables.root))), Status::Ok);
    bench.gpu(0).set_chaos(Chaos {
        seed: 11,
        drop_fault_every: 7,
        duplicate_fault_every: 5,
        spurious_fault_every: 3,
        ..Chaos::default()
    });
    let (end, ended) = (AtomicBool::new(false), AtomicU64::new(0));
    let gpu = bench.gpu(0);
    thread::scope(|scope| {
        for seed in 0..2_u64 {
            let end = &end;
            scope.spawn(move || {
                for turn in 0.. {
                    if end.load(Ordering::Relaxed) {
                        break;
                    }
                    match mix(seed << 32 | turn) % 4 {
                        0 => write_reg(gpu, regs::FAULT_CANCEL, (turn % 200) as u32),
                        _ => write_reg(gpu, regs::FAULT_REPLAY, 1),
                    }
                    thread::yield_now();
                }
            });
        }
        scope.spawn(|| {
            for turn in 0_u64.. {
                if end.load(Ordering::Relaxed) {
                    break;
                }
                let at = mix(turn) % PAGES;
                let leaf = if turn % 3 == 0 { Pte::NONE } else { Pte::leaf(page(at), ALL) };
                poke(&bench, 0, leaves[at as usize], leaf.0);
                assert_eq!(binder.run(invalidate(1, at * 4096, 4096)), Status::Ok);
            }
        });
        let workers: Vec<_> = (0..4_usize)
            .map(|channel| {
                let (bench, ended) = (&bench, &ended);
                scope.spawn(move || {
                    let mut driver = Driver::start(bench, 0, channel, 4);
                    for round in 0..ROUNDS {
                        let slot = channel as u64;
                        let add = Job { operand: 1, stride: 4104, ..job(Op::AtomicAdd, 0, PAGES * 512) };
                        let fence = driver.fence_address(1);
                        let descriptor = access(bench, slot, 1, Job { count: 64, ..add });
                        driver.submit(descriptor.with_fence(fence, round + 1, true).to_words());
                        if mix(round ^ slot << 8).is_multiple_of(8) {
                            driver.reset();
                            assert!(driver.fence(1, round + 1).is_some(), "a reset ends it");
                            ended.fetch_add(outcome(bench, slot).done % (1 << 32), Ordering::Relaxed);
                            driver = Driver::start(bench, 0, channel, 4);
                            continue;
                        }
                        let status = driver.wait(1, round + 1);
                        assert!(matches!(status, Status::Ok | Status::PageFault), "{status:?}");
                        ended.fetch_add(outcome(bench, slot).done, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().expect("a worker"));
        end.store(true, Ordering::Relaxed);
    });
    let added: u64 = (0..PAGES * 512).map(|word| bench.load_u64(DATA + word * 8)).sum();
    let stats = gpu.stats();
    // A job that a reset met before it began has no outcome: the bytes 0xff that stood there count as 2^32 - 1.
    let told = ended.load(Ordering::Relaxed);
    assert_eq!(stats.accesses, added);
    assert!(told % ((1 << 32) - 1) == added % ((1 << 32) - 1), "{told} {added}");
    assert_eq!(stats.stalled, 0);
}

/// A word that is nearly right more often than a random one.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0_u64..64,
        (0_u64..1 << 24).prop_map(|at| RAM + at),
        (0_u64..4096).prop_map(|at| RAM + TABLES + at * 8),
        (0_u64..64).prop_map(|at| RAM + JOBS + at * 64),
        (0_u64..1 << 23).prop_map(|at| at & !7),
        (0_u64..64).prop_map(|bit| 1 << bit),
        (0_u64..4, 0_u64..16).prop_map(|(table, flags)| (RAM + TABLES + table * 4096) | flags),
    ]
}

#[derive(Clone, Debug)]
enum Act {
    /// These words into a ring, which is published.
    Submit { channel: usize, words: [u64; 8] },
    /// This job, in this space.
    Access { channel: usize, asid: u32, job: [u64; 7], count: u64 },
    /// This root.
    Bind { channel: usize, asid: u32, root: u64 },
    /// This word into tables, jobs, fault buffer or anything.
    Poke { at: u64, word: u64 },
    /// This register.
    Write { register: usize, value: u32 },
    /// A reset.
    Reset { channel: usize },
    /// A plan.
    Chaos(Chaos),
}

fn act() -> impl Strategy<Value = Act> {
    let channel = 0..CHANNELS;
    let first = (0_u64..8, 0_u64..4, 0_u64..2, 0_u64..2, prop_oneof![Just(0), 0_u64..66]).prop_map(
        |(opcode, flags, src, dst, count)| opcode | flags << 8 | src << 16 | dst << 24 | count << 32,
    );
    let submit =
        (channel.clone(), first, prop::array::uniform6(word())).prop_map(|(channel, first, rest)| {
            let [a, b, c, d, e, f] = rest;
            Act::Submit { channel, words: [first, a, b, c, d & !0xf, e, f, 0] }
        });
    let sound = (0_u64..6, 0_u64..3, word(), word(), word());
    let access = (channel.clone(), 0_u32..3, sound, word(), 0_u64..5000).prop_map(
        |(channel, asid, (op, pattern, va, window, stride), tag, count)| {
            let va = va & 0x7fff_ffff_fff8;
            let job = [op | pattern << 8, va, (window & 0xffff_fff8).max(8), stride & !7, tag, tag, 0];
            Act::Access { channel, asid, job, count }
        },
    );
    let bind = (channel.clone(), 0_u32..3, prop_oneof![Just(RAM + TABLES), word()])
        .prop_map(|(channel, asid, root)| Act::Bind { channel, asid, root });
    let poke = (prop_oneof![TABLES..TABLES + (4 << 12), JOBS + 4096..TABLES], word())
        .prop_map(|(at, word)| Act::Poke { at: at & !7, word });
    let value = prop_oneof![0_u32..16, (0_u64..1 << 24).prop_map(|at| (RAM + at) as u32), any::<u32>()];
    let register = prop_oneof![
        4 => prop_oneof![Just(regs::FAULT_REPLAY), Just(regs::FAULT_CANCEL), Just(regs::FAULT_CONTROL)],
        1 => (0_usize..0x1a).prop_map(|at| at * 4),
    ];
    let write = (register, value).prop_map(|(register, value)| Act::Write { register, value });
    let plan =
        (0_u64..9, 0_u64..4, 0_u64..4, 0_u64..4, 0_u64..4).prop_map(|(seed, fail, poison, lost, made)| {
            Act::Chaos(Chaos {
                seed,
                fail_every: fail,
                poison_every: poison,
                drop_fault_every: lost,
                spurious_fault_every: made,
                duplicate_fault_every: made,
                hang_channel: (seed > 7).then_some(1),
                dead: seed == 7,
                ..Chaos::default()
            })
        });
    prop_oneof![
        4 => submit,
        6 => access,
        2 => bind,
        6 => poke,
        4 => write,
        1 => channel.prop_map(|channel| Act::Reset { channel }),
        1 => plan,
    ]
}

fn perform<'a>(bench: &'a Bench, drivers: &mut [Driver<'a>], act: &Act) {
    let gpu = bench.gpu(0);
    match act {
        Act::Submit { channel, words } => drop(drivers[*channel].submit(*words)),
        Act::Access { channel, asid, job: [first, va, window, stride, tag, operand, _], count } => {
            let slot = *channel as u64;
            let at = JOBS + slot * 128;
            let words = [*first, *va, *window, *count, *stride, *tag, *operand, 0];
            (0..).zip(words).for_each(|(index, word)| bench.write(at + index * 8, &word.to_le_bytes()));
            let descriptor = access_at(*asid, RAM + at);
            drivers[*channel].submit(descriptor.to_words());
        }
        Act::Bind { channel, asid, root } => {
            drivers[*channel].submit(bind(*asid, Some(Location::system(root & !0xfff))).to_words());
        }
        Act::Poke { at, word } => bench.write(*at, &word.to_le_bytes()),
        Act::Write { register, value } => write_reg(gpu, *register, *value),
        Act::Reset { channel } => {
            drivers[*channel].reset();
            drivers[*channel] = Driver::start(bench, 0, *channel, 4);
        }
        Act::Chaos(plan) => gpu.set_chaos(plan.clone()),
    }
}

fn access_at(asid: u32, at: u64) -> Descriptor {
    let opcode = hmmstorm_abi::ring::Opcode::Access;
    Descriptor { opcode, count: asid, src: Location::system(at), ..Descriptor::NOP }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn anything_at_all(threaded: bool, tlb in 1_usize..20, acts in prop::collection::vec(act(), 1..120)) {
        let (mode, tlb) = (if threaded { "threaded" } else { "synchronous" }, tlb.to_string());
        let bench = bench(&["--mode", mode, "--tlb-entries", &tlb, "--poll-us", "0"]);
        let gpu = bench.gpu(0);
        {
            let _faults = FaultBuffer::start(&bench, 0, 4);
            let mut drivers: Vec<Driver<'_>> =
                (0..CHANNELS).map(|channel| Driver::start(&bench, 0, channel, 4)).collect();
            acts.iter().for_each(|act| perform(&bench, &mut drivers, act));
        }
        // An honest driver takes over.
        gpu.set_chaos(Chaos::default());
        write_reg(gpu, regs::CONTROL, regs::CONTROL_RESET);
        gpu.region_write(Region::Config, 4, &[6, 0]);
        set_master(gpu, true);
        prop_assert_eq!((gpu.stats().stalled, gpu.stats().queued), (0, 0));
        let tables = Tables::new(&bench, 0, Location::system(RAM + TABLES));
        let mut faults = FaultBuffer::start(&bench, 0, 4);
        let mut driver = Driver::start(&bench, 0, 3, 4);
        prop_assert_eq!(driver.run(bind(1, Some(tables.root))), Status::Ok);
        let descriptor = access(&bench, 0, 1, job(Op::Store, 0x5000, 4));
        driver.submit(descriptor.with_fence(driver.fence_address(1), 3, false).to_words());
        let fault = faults.wait();
        prop_assert_eq!((fault.va, fault.channel), (0x5000, 3));
        tables.map(0x5000, page(0), ALL);
        faults.replay();
        prop_assert_eq!(driver.wait(1, 3), Status::Ok);
        prop_assert_eq!(run(&mut driver, job(Op::Check, 0x5000, 4)).1.mismatches, 0);
    }
}

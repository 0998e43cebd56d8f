//! The driver's half of the MMU: page tables anywhere, the fault buffer, jobs.

use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

use hmmstorm_abi::job::{JOB_SIZE, Job, OUTCOME_SIZE, Op, Outcome, Pattern};
use hmmstorm_abi::mmu::{
    FAULT_SHADOW_EVENT, FAULT_SHADOW_GET, FAULT_SHADOW_OVERFLOW, FAULT_SHADOW_PUT, FAULT_SIZE, Fault, LEVELS,
    Pte, table_index,
};
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{Aperture, Descriptor, Location, Opcode, Status};
use hmmstorm_device::gpu::Region;

use crate::bench::{Bench, Driver, RAM, read_reg, wait_for, write_reg};

/// Both rights.
pub(crate) const ALL: u64 = Pte::WRITE | Pte::ATOMIC;
/// Offset in RAM of the first job; each takes 128 bytes. Jobs of one test take at most these 16 pages.
pub(crate) const JOBS: u64 = 1 << 20;
/// Offset in RAM of fault buffer and its shadow page.
pub(crate) const FAULTS: u64 = JOBS + 16 * 4096;
/// Offset in RAM from which tables are taken, and of the data behind them.
pub(crate) const TABLES: u64 = FAULTS + 64 * 4096;
pub(crate) const DATA: u64 = 4 << 20;
/// RAM of a bench with an MMU at work.
pub(crate) const SIZE: u64 = 16 << 20;

/// A bench with two GPUs of 8 MiB each and RAM enough.
pub(crate) fn bench(options: &[&str]) -> Bench {
    let mut all = vec!["--vram", "8M"];
    all.extend(options);
    Bench::new(&all, SIZE)
}

/// A word of memory, as GPU `gpu` names it.
pub(crate) fn poke(bench: &Bench, gpu: usize, at: Location, word: u64) {
    match at.aperture {
        Aperture::System => bench.write(at.address - RAM, &word.to_le_bytes()),
        Aperture::Vram => bench.gpu(gpu).region_write(Region::Vram, at.address, &word.to_le_bytes()),
        Aperture::Peer(peer) => poke(bench, usize::from(peer), Location::vram(at.address), word),
    }
}

pub(crate) fn peek(bench: &Bench, gpu: usize, at: Location) -> u64 {
    match at.aperture {
        Aperture::System => bench.load_u64(at.address - RAM),
        Aperture::Vram => {
            let mut bytes = [0; 8];
            bench.gpu(gpu).region_read(Region::Vram, at.address, &mut bytes);
            u64::from_le_bytes(bytes)
        }
        Aperture::Peer(peer) => peek(bench, usize::from(peer), Location::vram(at.address)),
    }
}

/// A page table whose tables are taken one after the other from `pool` on.
pub(crate) struct Tables<'a> {
    bench: &'a Bench,
    gpu: usize,
    pub(crate) root: Location,
    next: Cell<u64>,
}

impl<'a> Tables<'a> {
    pub(crate) fn new(bench: &'a Bench, gpu: usize, pool: Location) -> Self {
        let this = Self { bench, gpu, root: pool, next: Cell::new(pool.address) };
        this.table();
        this
    }

    fn table(&self) -> Location {
        let at = Location { aperture: self.root.aperture, address: self.next.get() };
        self.next.set(at.address + 4096);
        (0..512).for_each(|entry| poke(self.bench, self.gpu, offset(at, entry * 8), 0));
        at
    }

    /// Where the entry for `va` of level `level` is; tables on the way are made.
    pub(crate) fn entry(&self, va: u64, level: u32) -> Location {
        let mut table = self.root;
        for above in (level + 1..LEVELS).rev() {
            let at = offset(table, table_index(va, above) as u64 * 8);
            let entry = Pte(peek(self.bench, self.gpu, at));
            table = if entry.is_valid() && !entry.is_leaf() {
                entry.location().expect("an entry of ours")
            } else {
                let next = self.table();
                poke(self.bench, self.gpu, at, Pte::table(next).0);
                next
            };
        }
        offset(table, table_index(va, level) as u64 * 8)
    }

    pub(crate) fn set(&self, va: u64, level: u32, entry: Pte) {
        poke(self.bench, self.gpu, self.entry(va, level), entry.0);
    }

    pub(crate) fn map(&self, va: u64, page: Location, rights: u64) {
        self.set(va, 0, Pte::leaf(page, rights));
    }

    pub(crate) fn map_huge(&self, va: u64, page: Location, rights: u64) {
        self.set(va, 1, Pte::leaf(page, rights));
    }

    pub(crate) fn unmap(&self, va: u64) {
        self.set(va, 0, Pte::NONE);
    }
}

pub(crate) fn offset(at: Location, by: u64) -> Location {
    Location { address: at.address + by, ..at }
}

pub(crate) fn bind(asid: u32, root: Option<Location>) -> Descriptor {
    let length = if root.is_some() { 4096 } else { 0 };
    let src = root.unwrap_or(Location::system(0));
    Descriptor { opcode: Opcode::Bind, count: asid, src, length, ..Descriptor::NOP }
}

pub(crate) fn invalidate(asid: u32, va: u64, length: u64) -> Descriptor {
    let dst = Location::system(va);
    Descriptor { opcode: Opcode::Invalidate, count: asid, dst, length, ..Descriptor::NOP }
}

/// A job over `count` words from `va` on, one after the other.
pub(crate) fn job(op: Op, va: u64, count: u64) -> Job {
    let window = count.max(1) * 8;
    Job { op, pattern: Pattern::Strided, va, window, count, stride: 8, tag: 0, operand: 0 }
}

/// A job in RAM, at slot `slot`.
pub(crate) fn access(bench: &Bench, slot: u64, asid: u32, job: Job) -> Descriptor {
    let at = JOBS + slot * (JOB_SIZE + OUTCOME_SIZE) as u64;
    for (index, word) in (0..).zip(job.to_words()) {
        bench.write(at + index * 8, &word.to_le_bytes());
    }
    bench.write(at + JOB_SIZE as u64, &[0xff; OUTCOME_SIZE]);
    let src = Location::system(RAM + at);
    Descriptor { opcode: Opcode::Access, count: asid, src, ..Descriptor::NOP }
}

/// What came out of the job at slot `slot`.
pub(crate) fn outcome(bench: &Bench, slot: u64) -> Outcome {
    let at = JOBS + slot * (JOB_SIZE + OUTCOME_SIZE) as u64 + JOB_SIZE as u64;
    Outcome::from_words(std::array::from_fn(|index| bench.load_u64(at + index as u64 * 8)))
}

/// Runs a job of address space 1 to its end.
pub(crate) fn run(driver: &mut Driver<'_>, job: Job) -> (Status, Outcome) {
    let descriptor = access(driver.bench, 0, 1, job);
    let status = driver.run(descriptor);
    (status, outcome(driver.bench, 0))
}

/// The driver's half of the fault buffer.
pub(crate) struct FaultBuffer<'a> {
    bench: &'a Bench,
    gpu: usize,
    base: u64,
    order: u32,
    get: u32,
}

impl<'a> FaultBuffer<'a> {
    pub(crate) fn start(bench: &'a Bench, gpu: usize, order: u32) -> Self {
        let base = FAULTS + gpu as u64 * 32 * 4096;
        bench.write(base, &[0; 2 * 4096]);
        let this = Self { bench, gpu, base, order, get: 0 };
        let (ring, shadow) = (RAM + base + 4096, RAM + base);
        let registers = [
            (regs::FAULT_RING_LO, ring as u32),
            (regs::FAULT_RING_HI, (ring >> 32) as u32),
            (regs::FAULT_ORDER, order),
            (regs::FAULT_SHADOW_LO, shadow as u32),
            (regs::FAULT_SHADOW_HI, (shadow >> 32) as u32),
            (regs::FAULT_CONTROL, regs::FAULT_CONTROL_ENABLE),
        ];
        registers.into_iter().for_each(|(register, value)| this.write(register, value));
        assert_eq!(read_reg(bench.gpu(gpu), regs::FAULT_CONTROL), regs::FAULT_CONTROL_ENABLE);
        this
    }

    pub(crate) fn write(&self, register: usize, value: u32) {
        write_reg(self.bench.gpu(self.gpu), register, value);
    }

    /// Whether the device has put entries that were not taken.
    pub(crate) fn waits(&self) -> bool {
        self.bench.load_u32(self.base + FAULT_SHADOW_PUT as u64) != self.get
    }

    /// Takes the next entry, if there is one.
    pub(crate) fn next(&mut self) -> Option<Fault> {
        let fault = self.peek()?;
        self.get = self.get.wrapping_add(1);
        self.bench.store_u32(self.base + FAULT_SHADOW_GET as u64, self.get);
        Some(fault)
    }

    /// Looks at the next entry without taking it.
    pub(crate) fn peek(&self) -> Option<Fault> {
        let at = self.base + 4096 + u64::from(self.get % (1 << self.order)) * FAULT_SIZE as u64;
        let words = || std::array::from_fn(|index| self.bench.load_u64(at + index as u64 * 8));
        self.waits().then(|| Fault::from_words(words()).expect("an entry of the ABI"))
    }

    /// Waits for the next entry and takes it.
    pub(crate) fn wait(&mut self) -> Fault {
        wait_for("a page fault", || self.next())
    }

    pub(crate) fn overflow(&self) -> u32 {
        self.bench.load_u32(self.base + FAULT_SHADOW_OVERFLOW as u64)
    }

    /// Asks for an interrupt when the put index moves past the entries taken.
    pub(crate) fn arm(&self) {
        self.bench.store_u32(self.base + FAULT_SHADOW_EVENT as u64, self.get);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn replay(&self) {
        self.write(regs::FAULT_REPLAY, 1);
    }

    pub(crate) fn cancel(&self, fault: Fault) {
        self.write(regs::FAULT_CANCEL, fault.sequence);
    }
}

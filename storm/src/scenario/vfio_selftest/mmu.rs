//! Jobs in virtual memory: page tables in VRAM, and page faults that are mended and replayed, or cancelled.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use hmmstorm_abi::job::{JOB_SIZE, Job, Op, Outcome, Pattern, word_at};
use hmmstorm_abi::mmu::{
    FAULT_ORDER_MIN, FAULT_SHADOW_GET, FAULT_SHADOW_PUT, FAULT_SIZE, Fault, LEVELS, Pte, Reason, Want,
    table_index,
};
use hmmstorm_abi::pci::{BAR_VRAM, VECTOR_FAULT, VECTORS};
use hmmstorm_abi::regs::{
    FAULT_CANCEL, FAULT_CONTROL, FAULT_CONTROL_ENABLE, FAULT_ORDER, FAULT_REPLAY, FAULT_RING_HI,
    FAULT_RING_LO, FAULT_SHADOW_HI, FAULT_SHADOW_LO,
};
use hmmstorm_abi::ring::{Descriptor, Location, Opcode, Status};
use hmmstorm_abi::uapi::PAGE_SIZE;

use super::channel::{self, Channel};
use super::steps::{Bench, INTERRUPT, check, rang};
use crate::clock::poll;
use crate::scenario::WorkError;
use crate::sys::vfio::{Dma, Window};

/// Address space of the tests.
const ASID: u32 = 5;
/// A virtual address in the middle of nowhere.
const VA: u64 = 0x1234_5678_9000;
/// Pages that jobs visit, in RAM.
const DATA: usize = 4;
/// Page of VRAM that holds the root of the page tables; the other tables follow.
const TABLES: usize = 32;
const PAGE: u64 = PAGE_SIZE as u64;

/// Where things are in the memory that the GPU gets.
const JOB: usize = channel::PAGES;
const FAULTS: usize = JOB + 1;
const SHADOW: usize = FAULTS + 1;
const FIRST: usize = SHADOW + 1;
const PAGES: usize = FIRST + DATA;

/// An address space with a channel to run jobs in it.
struct Space<'a> {
    gpu: Channel<'a>,
    window: Window,
    dma: &'a Dma<'a>,
}

impl<'a> Space<'a> {
    /// Binds [`ASID`] to tables without a single page.
    fn new(bench: &Bench<'a>, dma: &'a Dma<'a>) -> Result<Self, WorkError> {
        let window =
            bench.function.window(BAR_VRAM).map_err(WorkError::system("mmap of the VRAM aperture"))?;
        let mut gpu = Channel::start(bench.bar(), 4, dma, 0)?;
        for level in 0..LEVELS as usize {
            for cell in window.page(TABLES + level) {
                cell.store(0, Relaxed);
            }
        }
        // The root is of the highest level; each table has one entry on the way to `VA`.
        for (step, level) in (1..LEVELS).rev().enumerate() {
            let next = Location::vram(((TABLES + step + 1) * PAGE_SIZE) as u64);
            window.page(TABLES + step)[table_index(VA, level)].store(Pte::table(next).0, Release);
        }
        let root = Location::vram((TABLES * PAGE_SIZE) as u64);
        let bind =
            Descriptor { opcode: Opcode::Bind, src: root, count: ASID, length: PAGE, ..Descriptor::NOP };
        gpu.run(bind, Status::Ok)?;
        Ok(Self { gpu, window, dma })
    }

    /// Maps page `page` of the window at [`VA`] to page `page` of the data, or to nothing.
    fn map(&self, page: usize, rights: Option<u64>) {
        let ram = Location::system(self.dma.page(FIRST + page));
        let entry = rights.map_or(Pte::NONE, |rights| Pte::leaf(ram, rights));
        let table = self.window.page(TABLES + LEVELS as usize - 1);
        table[table_index(VA + page as u64 * PAGE, 0)].store(entry.0, Release);
    }

    /// Forgets the old translations.
    fn invalidate(&mut self) -> Result<(), WorkError> {
        self.gpu.run(Descriptor { opcode: Opcode::Invalidate, count: ASID, ..Descriptor::NOP }, Status::Ok)
    }

    /// Submits a job over the words of all data pages.
    fn submit(&mut self, op: Op, tag: u64) -> Result<u64, WorkError> {
        let window = DATA as u64 * PAGE;
        let job = Job {
            op,
            pattern: Pattern::Strided,
            va: VA,
            window,
            count: window / 8,
            stride: 8,
            tag,
            operand: 0,
        };
        let cells = self.dma.memory().page(JOB);
        for cell in cells {
            cell.store(0, Relaxed);
        }
        for (cell, word) in cells.iter().zip(job.to_words()) {
            cell.store(word, Relaxed);
        }
        let src = Location::system(self.dma.page(JOB));
        self.gpu.submit(Descriptor { opcode: Opcode::Access, src, count: ASID, ..Descriptor::NOP }, false)
    }

    /// What the last job left.
    fn outcome(&self) -> Outcome {
        let mut words = [0; 8];
        let cells = &self.dma.memory().page(JOB)[JOB_SIZE / 8..];
        for (word, cell) in words.iter_mut().zip(cells) {
            *word = cell.load(Relaxed);
        }
        Outcome::from_words(words)
    }

    /// Waits for the job's fence and looks at its outcome.
    fn finish(&self, fence: u64, what: &str) -> Result<Outcome, WorkError> {
        self.gpu.ended(fence, Status::Ok, what)?;
        let outcome = self.outcome();
        let all = DATA as u64 * PAGE / 8;
        check(outcome.done == all && outcome.mismatches == 0, || {
            format!("{what}: {outcome:?}, and not all {all} accesses right")
        })?;
        Ok(outcome)
    }

    /// Every word of the data is what a job with `tag` stores.
    fn stored(&self, tag: u64) -> Result<(), WorkError> {
        for page in 0..DATA {
            for (i, cell) in self.dma.memory().page(FIRST + page).iter().enumerate() {
                let va = VA + page as u64 * PAGE + i as u64 * 8;
                let (found, wanted) = (cell.load(Relaxed), word_at(va, tag));
                check(found == wanted, || format!("word at {va:#x} holds {found:#x}, not {wanted:#x}"))?;
            }
        }
        Ok(())
    }
}

/// Jobs store and check through tables in VRAM; what has no translation, and no fault buffer, ends at once.
pub(super) fn page_tables(bench: &Bench<'_>) -> Result<(), WorkError> {
    let memory = bench.memory(PAGES)?;
    let dma = bench.map(&memory)?;
    let mut space = Space::new(bench, &dma)?;
    (0..DATA).for_each(|page| space.map(page, Some(Pte::WRITE)));
    let fence = space.submit(Op::Store, 1)?;
    space.finish(fence, "a job that stores")?;
    space.stored(1)?;
    let fence = space.submit(Op::Check, 1)?;
    space.finish(fence, "a job that checks")?;
    let fence = space.submit(Op::Check, 2)?;
    space.gpu.ended(fence, Status::Ok, "a job that checks for another generation")?;
    let wrong = space.outcome().mismatches;
    check(wrong == DATA as u64 * PAGE / 8, || format!("{wrong} words of another generation were seen"))?;
    space.map(DATA - 1, None);
    space.invalidate()?;
    let fence = space.submit(Op::Check, 1)?;
    space.gpu.ended(fence, Status::PageFault, "a job without translation and without fault buffer")?;
    space.gpu.reset()
}

/// A fault is reported, mended and replayed, and the job goes on where it stood; another one is cancelled.
pub(super) fn page_faults(bench: &Bench<'_>) -> Result<(), WorkError> {
    let synchronous = bench.caps()?.synchronous();
    let vectors =
        bench.function.enable_msix(VECTORS).map_err(WorkError::system("VFIO_DEVICE_SET_IRQS (MSI-X)"))?;
    let memory = bench.memory(PAGES)?;
    let dma = bench.map(&memory)?;
    let mut space = Space::new(bench, &dma)?;
    let bar = bench.bar();
    bar.write(FAULT_RING_LO, dma.page(FAULTS) as u32)?;
    bar.write(FAULT_RING_HI, (dma.page(FAULTS) >> 32) as u32)?;
    bar.write(FAULT_ORDER, FAULT_ORDER_MIN)?;
    bar.write(FAULT_SHADOW_LO, dma.page(SHADOW) as u32)?;
    bar.write(FAULT_SHADOW_HI, (dma.page(SHADOW) >> 32) as u32)?;
    bar.write(FAULT_CONTROL, FAULT_CONTROL_ENABLE)?;
    let on = bar.read(FAULT_CONTROL)?;
    check(on == FAULT_CONTROL_ENABLE, || format!("FAULT_CONTROL is {on:#x}: the buffer does not start"))?;
    // The event index is 0: the first fault interrupts.
    let mut buffer = FaultBuffer { dma: &dma, get: 0 };

    (0..DATA - 1).for_each(|page| space.map(page, Some(Pte::WRITE)));
    let last = VA + (DATA as u64 - 1) * PAGE;
    let fence = space.submit(Op::Store, 3)?;
    let fault = buffer.next()?;
    let expected = (last, ASID as u16, Want::Write, Reason::NotPresent);
    check((fault.va, fault.asid, fault.want, fault.reason) == expected, || {
        format!("{fault:?}, and not a store without translation at {last:#x}")
    })?;
    if !synchronous {
        let vector = usize::from(VECTOR_FAULT);
        check(poll(INTERRUPT, || rang(&vectors[vector])).is_some(), || {
            format!("no interrupt on vector {vector} for a page fault")
        })?;
    }
    space.map(DATA - 1, Some(Pte::WRITE));
    bar.write(FAULT_REPLAY, 1)?;
    let outcome = space.finish(fence, "a job that faulted and was replayed")?;
    check(outcome.faults == 1, || format!("{} faults are counted, and there was one", outcome.faults))?;
    space.stored(3)?;

    // A page that may not be written; nobody will mend that.
    space.map(0, Some(0));
    space.invalidate()?;
    let fence = space.submit(Op::Store, 4)?;
    let fault = buffer.next()?;
    check((fault.va, fault.want, fault.reason) == (VA, Want::Write, Reason::Permission), || {
        format!("{fault:?}, and not a forbidden store at {VA:#x}")
    })?;
    bar.write(FAULT_CANCEL, fault.sequence)?;
    space.gpu.ended(fence, Status::PageFault, "a job whose fault was cancelled")?;
    space.stored(3)?;
    space.gpu.run(Descriptor::NOP, Status::Ok)?;

    bar.write(FAULT_CONTROL, 0)?;
    space.gpu.reset()?;
    bench.function.disable_msix().map_err(WorkError::system("VFIO_DEVICE_SET_IRQS (off)"))
}

/// The driver's end of the fault buffer.
struct FaultBuffer<'a> {
    dma: &'a Dma<'a>,
    get: u32,
}

impl FaultBuffer<'_> {
    /// The next fault, once it is there.
    fn next(&mut self) -> Result<Fault, WorkError> {
        let shadow = self.dma.memory().page(SHADOW);
        let put = || shadow[FAULT_SHADOW_PUT / 8].load(Acquire) as u32;
        if poll(INTERRUPT, || (put() != self.get).then_some(())).is_none() {
            return Err(WorkError::Condition(format!("no page fault after {} s", INTERRUPT.as_secs())));
        }
        let entry = (self.get as usize % (1 << FAULT_ORDER_MIN)) * FAULT_SIZE / 8;
        let mut words = [0; 4];
        for (word, cell) in words.iter_mut().zip(&self.dma.memory().page(FAULTS)[entry..]) {
            *word = cell.load(Relaxed);
        }
        self.get = self.get.wrapping_add(1);
        shadow[FAULT_SHADOW_GET / 8].store(self.get.into(), Release);
        Fault::from_words(words)
            .ok_or_else(|| WorkError::Condition(format!("an entry of the fault buffer is {words:x?}")))
    }
}

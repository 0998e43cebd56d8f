//! A range of pages with an oracle that several threads, and after a fork several processes, may use at once.
//!
//! Beside the pages stands a ledger of their generations, in ordinary private memory. A fork copies pages and ledger
//! alike, so the ledger always tells of its own address space, whatever the others write. Within one address space each
//! page has one writer at a time, the others may read it meanwhile.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::fence;

use hmmstorm_abi::uapi::{SELECT_HUGE, SELECT_SYSTEM};

use super::WorkError;
use super::access::{check_sum, page_sum};
use crate::board::Slot;
use crate::gpu::{Gpu, Owner};
use crate::oracle::{Mismatch, Stamp};
use crate::sys::memory::{Mapping, PageSpan};

/// Times that pages are asked to move: one whose folio somebody holds for a moment stays.
const TRIES: usize = 1000;
/// Set in an entry while its page is being written.
const WRITING: u64 = 1;

/// The range.
#[derive(Debug)]
pub(crate) struct Range {
    mapping: Mapping,
    seed: u64,
    /// Number of the range among those of the run, for the stamps.
    number: u64,
    /// Twice the generation of each page, and [`WRITING`].
    ledger: Vec<AtomicU64>,
}

impl Range {
    /// Stamps all pages of `mapping` with generation 1.
    pub(crate) fn stamped(mapping: Mapping, seed: u64, number: u64) -> Self {
        let ledger = (0..mapping.pages()).map(|_| AtomicU64::new(0)).collect();
        let range = Self { mapping, seed, number, ledger };
        (0..range.pages()).for_each(|page| range.stamp_next(page));
        range
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.mapping.pages()
    }

    /// The memory.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Pages `pages` for a call to a GPU.
    ///
    /// # Errors
    /// [`WorkError::Condition`] if there are no such pages.
    pub(crate) fn span(&self, pages: std::ops::Range<usize>) -> Result<PageSpan<'_>, WorkError> {
        let span = self.mapping.span(pages.clone());
        span.ok_or_else(|| WorkError::Condition(format!("the range has no pages {pages:?}")))
    }

    fn stamp(&self, page: usize, entry: u64) -> Stamp {
        Stamp { seed: self.seed, page: self.number << 32 | page as u64, generation: entry >> 1 }
    }

    /// What `page` holds; to be asked by its writer.
    pub(crate) fn current(&self, page: usize) -> Stamp {
        self.stamp(page, self.ledger[page].load(Relaxed))
    }

    /// Has `write` give `page` its next contents.
    fn write<T>(&self, page: usize, write: impl FnOnce(Stamp) -> T) -> T {
        let entry = self.ledger[page].load(Relaxed);
        self.ledger[page].store(entry | WRITING, Relaxed);
        // The mark comes before the contents.
        fence(Release);
        let written = write(self.stamp(page, entry + 2));
        self.ledger[page].store(entry + 2, Release);
        written
    }

    /// The calling thread, which must be the page's writer, gives it new contents: an operation in `slot`.
    pub(crate) fn write_by_cpu(&self, page: usize, slot: Slot<'_>) {
        slot.begin();
        self.stamp_next(page);
        slot.complete(0);
    }

    /// Gives `pages` back to the kernel and writes them anew, as their one writer.
    ///
    /// # Errors
    /// [`WorkError::System`] of `madvise`.
    pub(crate) fn renew(&self, pages: std::ops::Range<usize>, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.begin();
        self.mapping.discard(pages.clone()).map_err(WorkError::system("madvise(MADV_DONTNEED)"))?;
        pages.for_each(|page| self.stamp_next(page));
        slot.complete(0);
        Ok(())
    }

    fn stamp_next(&self, page: usize) {
        self.write(page, |stamp| stamp.write(self.mapping.page(page)));
    }

    /// `gpu` gives `page` new contents, by way of `buffer`: an operation in `slot`. The caller is its writer.
    ///
    /// # Errors
    /// Of the GPU; the page then counts as written, and its contents are unknown.
    pub(crate) fn write_by_gpu(
        &self,
        page: usize,
        gpu: &Gpu,
        buffer: &Mapping,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        let span = self.span(page..page + 1)?;
        slot.begin();
        let access = self.write(page, |stamp| {
            stamp.write(buffer.page(0));
            gpu.write(span, buffer, Owner::Own)
        })?;
        slot.complete(u64::from(access.faults > 0));
        Ok(())
    }

    /// Reads `page` by the CPU and checks it, unless somebody writes it meanwhile: an operation in `slot`.
    ///
    /// # Errors
    /// [`WorkError::Data`].
    pub(crate) fn check_by_cpu(&self, page: usize, slot: Slot<'_>) -> Result<(), WorkError> {
        slot.begin();
        self.check(
            page,
            || {
                let cells = self.mapping.page(page);
                // The fault is here.
                std::hint::black_box(cells[0].load(Relaxed));
                slot.returned();
                Ok(cells)
            },
            || "read by the CPU".to_owned(),
        )?;
        slot.complete_touch();
        Ok(())
    }

    /// Has `gpu` read `page` as `owner` into `buffer` and checks it, unless somebody writes it meanwhile: an operation in
    /// `slot`.
    ///
    /// # Errors
    /// [`WorkError::Data`], and those of the GPU.
    pub(crate) fn check_by_gpu(
        &self,
        page: usize,
        gpu: &Gpu,
        buffer: &Mapping,
        owner: Owner,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        let mut faults = 0;
        slot.begin();
        self.check(
            page,
            || {
                faults = gpu.read(self.span(page..page + 1)?, buffer, owner)?.faults;
                slot.returned();
                Ok(buffer.page(0))
            },
            || format!("read by GPU {}", gpu.index()),
        )?;
        slot.complete(u64::from(faults > 0));
        Ok(())
    }

    /// Has `gpu` load all of `page` by a job of its own, whose faults this thread serves, and checks the sum of its words,
    /// unless somebody writes it meanwhile: an operation in `slot`.
    ///
    /// # Errors
    /// [`WorkError::Word`], and those of the GPU.
    pub(crate) fn check_by_job(&self, page: usize, gpu: &Gpu, slot: Slot<'_>) -> Result<(), WorkError> {
        let before = self.ledger[page].load(Acquire);
        let span = self.span(page..page + 1)?;
        slot.begin();
        let outcome = gpu.run_here(span, page_sum(span))?;
        slot.returned();
        let checked = check_sum(self.stamp(page, before), &outcome, gpu);
        if !self.is_written_since(page, before) {
            checked?;
        }
        slot.complete(u64::from(outcome.faults > 0));
        Ok(())
    }

    /// Whether somebody has written `page`, or does, since its entry was `before`, which is what decides about contents that
    /// were read in between.
    fn is_written_since(&self, page: usize, before: u64) -> bool {
        // The contents come before the second look.
        fence(Acquire);
        before & WRITING != 0 || self.ledger[page].load(Relaxed) != before
    }

    /// Has `gpu` take those of `pages` that are in system memory: an operation in `slot`. That some stay is no error.
    ///
    /// # Errors
    /// Of the GPU.
    pub(crate) fn migrate(
        &self,
        pages: std::ops::Range<usize>,
        gpu: &Gpu,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        self.migrate_selected(pages, gpu, SELECT_SYSTEM, slot)
    }

    /// The same; huge pages of which all is asked for go as they are, and are not split before.
    ///
    /// # Errors
    /// Of the GPU.
    pub(crate) fn migrate_huge(
        &self,
        pages: std::ops::Range<usize>,
        gpu: &Gpu,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        self.migrate_selected(pages, gpu, SELECT_SYSTEM | SELECT_HUGE, slot)
    }

    fn migrate_selected(
        &self,
        pages: std::ops::Range<usize>,
        gpu: &Gpu,
        select: u32,
        slot: Slot<'_>,
    ) -> Result<(), WorkError> {
        let span = self.span(pages)?;
        slot.begin();
        let answer = gpu.migrate_here(span, select)?;
        slot.migrated(span.pages(), &answer);
        slot.complete(0);
        Ok(())
    }

    /// Has `gpu` take all pages. Nobody else may use them meanwhile.
    ///
    /// # Errors
    /// Of the GPU; [`WorkError::Condition`] if pages stay where they are, however often they are asked.
    pub(crate) fn migrate_all(&self, gpu: &Gpu, slot: Slot<'_>) -> Result<(), WorkError> {
        for _ in 0..TRIES {
            self.migrate(0..self.pages(), gpu, slot)?;
            if gpu.holds(self.span(0..self.pages())?)? == self.pages() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(WorkError::Condition(format!(
            "not all of {} pages are on GPU {} after {TRIES} migrations while nobody used them",
            self.pages(),
            gpu.index()
        )))
    }

    /// Checks every page by the CPU.
    ///
    /// # Errors
    /// [`WorkError::Data`].
    pub(crate) fn check_all(&self, slot: Slot<'_>) -> Result<(), WorkError> {
        (0..self.pages()).try_for_each(|page| self.check_by_cpu(page, slot))
    }

    fn check<'b>(
        &self,
        page: usize,
        read: impl FnOnce() -> Result<&'b [AtomicU64], WorkError>,
        seen: impl FnOnce() -> String,
    ) -> Result<(), WorkError> {
        let before = self.ledger[page].load(Acquire);
        let result: Result<(), Mismatch> = self.stamp(page, before).check(read()?);
        match result {
            Err(mismatch) if !self.is_written_since(page, before) => {
                Err(WorkError::Data { mismatch, seen: seen() })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::Board;

    fn with_range(test: impl FnOnce(&Range, Slot<'_>)) {
        let board = Board::new(1).expect("mmap");
        test(&Range::stamped(Mapping::private(4).expect("mmap"), 7, 1), board.slot(0));
    }

    #[test]
    fn pages_hold_their_generation_and_a_flipped_bit_is_seen() {
        with_range(|range, slot| {
            for page in 0..4 {
                range.check_by_cpu(page, slot).expect("stamped");
                range.write_by_cpu(page, slot);
                assert_eq!(range.current(page).generation, 2);
            }
            range.check_all(slot).expect("written");
            range.mapping().page(2)[9].fetch_xor(1, Relaxed);
            let error = range.check_by_cpu(2, slot).expect_err("damaged").to_string();
            assert!(error.contains("read by the CPU") && error.contains("1 of 512 words"), "{error}");
        });
    }

    #[test]
    fn readers_bear_with_a_writer() {
        with_range(|range, slot| {
            let board = Board::new(1).expect("mmap");
            std::thread::scope(|scope| {
                scope.spawn(|| (0..2000).for_each(|_| range.write_by_cpu(0, board.slot(0))));
                for _ in 0..2000 {
                    range.check_by_cpu(0, slot).expect("whole, or not judged");
                }
            });
            assert_eq!(range.current(0).generation, 2001);
            range.check_by_cpu(0, slot).expect("the last");
        });
    }

    #[test]
    fn an_old_copy_is_told_as_such() {
        with_range(|range, slot| {
            range.write_by_cpu(3, slot);
            let stale = Stamp { generation: 1, ..range.current(3) };
            stale.write(range.mapping().page(3));
            let error = range.check_by_cpu(3, slot).expect_err("stale").to_string();
            assert!(error.contains("an old copy: generation 1"), "{error}");
        });
    }
}

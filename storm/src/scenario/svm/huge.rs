//! One huge page on its way to the GPU and back, counted: whole, each way in one migration and one copy.

use std::sync::atomic::Ordering::Relaxed;

use hmmstorm_abi::job::{Job, Op, Pattern, WORD, word_at};
use hmmstorm_abi::uapi::{self, PAGE_SIZE};

use crate::gpu::Gpu;
use crate::scenario::{Context, WorkError};
use crate::sys::memory::{BLOCK_PAGES, Mapping};

/// Words of a huge page.
const WORDS: u64 = (BLOCK_PAGES * PAGE_SIZE) as u64 / WORD;

/// Has the GPU fault on a huge page of its own with `policy`, then the CPU, and counts what the driver did. Nobody else
/// may use the GPU meanwhile.
///
/// # Errors
/// [`WorkError::Invariant`] if a huge page was taken apart or moved in more than one step, [`WorkError::Word`] if it is
/// not what it was.
pub(super) fn round_trip(context: &Context<'_>, policy: uapi::Policy) -> Result<(), WorkError> {
    let gpu = Gpu::open(0)?;
    gpu.set_policy(policy)?;
    let memory: Mapping = Mapping::blocks(1, true).map_err(WorkError::system("mmap of a huge page"))?;
    let small: Mapping = Mapping::private(1).map_err(WorkError::system("mmap of a page"))?;
    let tag = context.seed;
    let words = |page: usize| {
        let start = memory.address(page);
        memory.page(page).iter().zip(0..).map(move |(cell, i)| (cell, word_at(start + i * WORD, tag)))
    };
    (0..BLOCK_PAGES).flat_map(words).for_each(|(cell, word)| cell.store(word, Relaxed));
    let check = |memory: &Mapping, op, words| -> Result<(), WorkError> {
        let span = memory.span(0..memory.pages()).ok_or_else(|| WorkError::Condition("no pages".into()))?;
        let job = Job {
            op,
            pattern: Pattern::Strided,
            va: span.address(),
            window: words * WORD,
            count: words,
            stride: WORD,
            tag,
            operand: 0,
        };
        let outcome = gpu.submit(span, job)?.wait()?;
        (outcome.mismatches == 0).then_some(()).ok_or_else(|| WorkError::Word {
            page: (outcome.first_va - memory.address(0)) / PAGE_SIZE as u64,
            expected: format!("{:#018x} at {:#x}", outcome.first_wanted, outcome.first_va),
            found: format!("{:#018x} (read by GPU 0 in a huge page)", outcome.first_found),
        })
    };
    // The address space of the GPU is made, and its page table begun.
    check(&small, Op::Load, 1)?;

    let before = gpu.stats()?;
    check(&memory, Op::Check, WORDS)?;
    let there = gpu.stats()?;
    let moves = u64::from(policy.placement == uapi::PLACE_MIGRATE);
    let pages = BLOCK_PAGES as u64;
    let counted = |what, before: u64, after: u64, wanted: u64| {
        if after - before == wanted {
            return Ok(());
        }
        let detail = format!("{what}: {} and not {wanted} for one huge page", after - before);
        Err(WorkError::Invariant { name: "huge-whole", detail })
    };
    counted("faults of the GPU", before.gpu_faults, there.gpu_faults, 1)?;
    counted("pages migrated to the GPU", before.to_device, there.to_device, moves * pages)?;
    counted("huge folios migrated to the GPU", before.huge_to_device, there.huge_to_device, moves)?;
    counted("descriptors (the job's and the copy's)", before.submitted, there.submitted, 1 + moves)?;
    counted("huge entries of the page table", before.gpu_mapped_huge, there.gpu_mapped_huge, 1)?;
    counted("pages in the page table", before.gpu_mapped, there.gpu_mapped, pages)?;

    for (page, (cell, wanted)) in (0..BLOCK_PAGES).flat_map(|page| words(page).map(move |word| (page, word)))
    {
        let found = cell.load(Relaxed);
        if found != wanted {
            return Err(WorkError::Word {
                page: page as u64,
                expected: format!("{wanted:#018x}"),
                found: format!("{found:#018x} (read by the CPU in a huge page)"),
            });
        }
    }
    let back = gpu.stats()?;
    counted("faults of the CPU", there.cpu_faults, back.cpu_faults, moves)?;
    counted("pages that came back", there.to_system, back.to_system, moves * pages)?;
    counted("huge folios that came back", there.huge_to_system, back.huge_to_system, moves)?;
    // The copy, and the invalidation of the GPU's page table.
    counted("descriptors on the way back", there.submitted, back.submitted, 2 * moves)
}

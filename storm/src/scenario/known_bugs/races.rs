//! Bugs that need two things to happen at once: two threads, many tries.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use rustix::mm::Advice;
use rustix::process::{Pid, WaitOptions, waitpid};

use super::{Case, huge};
use crate::machine::pin;
use crate::rng::Rng;
use crate::scenario::{WorkError, idle};
use crate::sys::memory::Mapping;
use crate::sys::process::fork;
use crate::sys::vma::{HUGE, Vma};

/// Migrations of a round.
const TRIES: usize = 200;

/// `madvise(MADV_FREE)` looks at an entry without a lock, takes it for a mapped page, and finds a device entry when it has
/// the lock (mm/huge_memory.c, `madvise_free_huge_pmd()`); with `DEBUG_VM`.
pub(super) fn free(case: &Case<'_>) -> Result<(), WorkError> {
    against_migration(case, Advice::LinuxFree)
}

/// The same of `madvise(MADV_PAGEOUT)` (mm/madvise.c, `madvise_cold_or_pageout_pte_range()`); with `DEBUG_VM`.
pub(super) fn pageout(case: &Case<'_>) -> Result<(), WorkError> {
    against_migration(case, Advice::LinuxPageOut)
}

/// One thread gives advice about a huge page, another takes it to the device and touches it, again and again.
fn against_migration(case: &Case<'_>, advice: Advice) -> Result<(), WorkError> {
    let vma = Vma::huge(1).map_err(WorkError::system("mmap of a huge page"))?;
    let device = case.driver.open()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let adviser = scope.spawn(|| -> Result<(), WorkError> {
            pin(1).map_err(WorkError::system("sched_setaffinity"))?;
            while !done.load(Relaxed) && case.trigger {
                vma.advise(0..HUGE, advice).map_err(WorkError::system("madvise"))?;
            }
            Ok(())
        });
        let migrate = || -> Result<(), WorkError> {
            for _ in 0..TRIES {
                vma.page(0)[0].store(case.seed | 1, Relaxed);
                device.try_take(&vma, 0, HUGE)?;
                case.slot.complete(0);
                case.slot.begin();
            }
            Ok(())
        };
        let migrated = migrate();
        done.store(true, Relaxed);
        let advised =
            adviser.join().map_err(|_panic| WorkError::Condition("the adviser panicked".to_owned()))?;
        migrated.and(advised)
    })
}

/// A process ends while somebody migrates a huge device page that it maps: `zap_huge_pmd()` (mm/huge_memory.c) asks the folio
/// whether it is the device's, finds a migration entry, and gives back a mapping and a reference that whoever put the
/// entry there has given back already.
pub(super) fn zap_migration_entry(case: &Case<'_>) -> Result<(), WorkError> {
    /// Processes beside the one that migrates; each that hits takes a reference too many.
    const CHILDREN: usize = 3;
    /// Most turns of an empty loop between the beginning of the migration and a child's end.
    const LONGEST: u64 = 200_000;
    pin(0).map_err(WorkError::system("sched_setaffinity"))?;
    let device = case.driver.open()?;
    let begins = Mapping::<AtomicU64>::shared(1).map_err(WorkError::system("mmap of a shared page"))?;
    let mut rng = Rng::new(case.seed, 0);
    for _ in 0..TRIES {
        let vma = huge::huge(case)?;
        device.take_huge(&vma)?;
        begins.cells()[0].store(u64::from(!case.trigger), Relaxed);
        let mut children = Vec::new();
        for child in 0..CHILDREN {
            let turns = rng.up_to(LONGEST);
            let child = fork(|| {
                // A CPU each, if there are so many.
                if pin(1 + child).or_else(|_| pin(1)).is_err() {
                    return 1;
                }
                while begins.cells()[0].load(Relaxed) == 0 {
                    std::hint::spin_loop();
                }
                idle(turns);
                0
            });
            children.push(child.map_err(WorkError::system("fork"))?);
        }
        if !case.trigger {
            children.drain(..).try_for_each(reap)?;
        }
        begins.cells()[0].store(1, Relaxed);
        // The touch brings the page back.
        huge::check(case, &vma)?;
        children.into_iter().try_for_each(reap)?;
        case.slot.complete(0);
        case.slot.begin();
    }
    Ok(())
}

fn reap(child: Pid) -> Result<(), WorkError> {
    let ended = waitpid(Some(child), WaitOptions::empty()).map_err(WorkError::system("waitpid"))?;
    match ended.map(|(_, status)| status.exit_status()) {
        Some(Some(0)) => Ok(()),
        other => Err(WorkError::Condition(format!("the child ended with {other:?}"))),
    }
}

/// Two migrations split huge pages that they have in part, in opposite orders: `migrate_vma_split_folio()` takes a
/// folio lock and waits for it while it holds others (mm/migrate_device.c).
pub(super) fn split_order(case: &Case<'_>) -> Result<(), WorkError> {
    let vma = Vma::huge(2).map_err(WorkError::system("mmap of two huge pages"))?;
    let half = HUGE / 2;
    let migrator = |cpu: usize, first: usize| -> Result<(), WorkError> {
        pin(cpu).map_err(WorkError::system("sched_setaffinity"))?;
        let device = case.driver.open()?;
        for _ in 0..TRIES {
            // A range over the border of both pages: each has a part of each.
            device.try_take(&vma, first, HUGE)?;
            for page in [0, HUGE - 1, HUGE, 2 * HUGE - 1] {
                vma.page(page)[0].store(case.seed | 1, Relaxed);
            }
            if cpu == 0 {
                case.slot.complete(0);
                vma.advise(0..2 * HUGE, Advice::LinuxDontNeed).map_err(WorkError::system("madvise"))?;
                case.slot.begin();
            }
        }
        Ok(())
    };
    thread::scope(|scope| {
        let other = case.trigger.then(|| scope.spawn(|| migrator(1, half + 8)));
        let own = migrator(0, half);
        let others = match other.map(thread::ScopedJoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_panic)) => Err(WorkError::Condition("a migrator panicked".to_owned())),
            None => Ok(()),
        };
        own.and(others)
    })
}

// SPDX-License-Identifier: GPL-2.0

//! Locking device pages without migrating them (`HSGPU_HOLD`).
//!
//! A fault that finds the folio of a device page locked is told to come again, or waits for the lock, depending on the
//! kernel under test. What becomes of it when somebody has the lock again and again, and is no migration, is what this is
//! for.
//!
//! Lock order: see [`crate::gpu`]. The folio is locked with nothing else held, and nothing is taken under its lock.

use kernel::{
    current,
    mm::{
        hmm::{
            self,
            Entry,
            HmmPfn,
            Memory,
            Request, //
        },
        interval_notifier::IntervalNotifier,
        pagemap::lock::HeldPage,
        MmWithUser, //
    },
    new_mutex,
    prelude::*,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

use crate::{
    abi::uapi::{
        self,
        PAGE_SIZE, //
    },
    gpu::Session,
    mirror::{
        user_range,
        Mirror, //
    },
    pagemap::VramPagemap, //
};

/// Longest sleep without a look at signals: nobody waits longer for a killed task.
const NAP_US: i64 = 2_000;

/// Serves `HSGPU_HOLD`; fills in the results as far as it comes.
///
/// # Errors
///
/// `EINVAL` for a bad request, `ESRCH` if the process is gone, `EINTR` on a signal, `ENOMEM`, and those of
/// `hmm_range_fault()`. That a page is not on this GPU is no error.
pub(crate) fn hold(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mirror: &Mirror,
    req: &mut uapi::Hold,
) -> Result {
    (req.held, req.absent, req.waited_us) = (0, 0, 0);

    let range = user_range(req.addr, req.npages)?;
    let (keep, gap) = (micros(req.hold_us)?, micros(req.gap_us)?);
    let all = req
        .hold_us
        .saturating_add(req.gap_us)
        .saturating_mul(req.times);
    if req.times == 0 || all > uapi::HOLD_LIMIT_US {
        return Err(EINVAL);
    }
    let mm = mirror.mm().mmget_not_zero().ok_or(ESRCH)?;

    // However short the holds are, the number of looks is bounded by the time that they are allowed.
    let start = Instant::<Monotonic>::now();
    for addr in range
        .step_by(PAGE_SIZE)
        .cycle()
        .take(usize::try_from(req.times)?)
    {
        match find(session, pagemap, &mm, addr)? {
            None => req.absent += 1,
            Some(page) => {
                let asked = Instant::<Monotonic>::now();
                let lock = page.lock_killable()?;
                let waited = u64::try_from(asked.elapsed().as_micros_ceil()).unwrap_or(0);

                req.waited_us = req.waited_us.max(waited);
                req.held += 1;
                nap(keep)?;
                drop(lock);
            }
        }
        nap(gap)?;
        if start.elapsed() > micros(2 * uapi::HOLD_LIMIT_US)? {
            break;
        }
    }
    Ok(())
}

/// A request's time.
fn micros(us: u64) -> Result<Delta> {
    if us > 2 * uapi::HOLD_LIMIT_US {
        return Err(EINVAL);
    }
    Ok(Delta::from_micros(i64::try_from(us)?))
}

/// Sleeps for `time`, or until there is a signal.
///
/// # Errors
///
/// `EINTR`.
fn nap(time: Delta) -> Result {
    let start = Instant::<Monotonic>::now();

    loop {
        if current!().signal_pending() {
            return Err(EINTR);
        }
        let left = (time - start.elapsed()).as_micros_ceil();
        if left <= 0 {
            return Ok(());
        }
        fsleep(Delta::from_micros(left.min(NAP_US)));
    }
}

/// The page at `addr`, if it is on this GPU. Nothing is faulted in; page tables that change meanwhile count as "not".
fn find(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mm: &MmWithUser,
    addr: usize,
) -> Result<Option<HeldPage>> {
    let notifier = KBox::try_pin_init(
        IntervalNotifier::register(mm, addr..addr + PAGE_SIZE, new_mutex!((), "hsgpu::hold")),
        GFP_KERNEL,
    )?;
    let mut pfns = [HmmPfn::default(); 1];

    session.stats.device_faults.inc();
    let seq = notifier.read_begin();
    let mmap = mm.mmap_read_lock();
    let faulted = hmm::range_fault(
        seq,
        &mmap,
        addr,
        &mut pfns,
        Request::Snapshot,
        Some(pagemap.owner()),
    );
    drop(mmap);

    let faulted = match faulted {
        Ok(faulted) => faulted.lock(),
        Err(EBUSY) => None,
        Err(error) => return Err(error),
    };
    let page = faulted.and_then(|mapped| match mapped.entry(0) {
        Entry::Page(page) => match page.memory() {
            Memory::Device(page) if pagemap.locate(&page).is_ok() => Some(page.hold()),
            _ => None,
        },
        _ => None,
    });
    Ok(page)
}

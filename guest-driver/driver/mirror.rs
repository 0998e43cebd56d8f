// SPDX-License-Identifier: GPL-2.0

//! The device's view of the address space of a process, one for each open file.
//!
//! What the commands of `lib/test_hmm` do has no page tables of the GPU behind it. To access memory ([`crate::access`])
//! the driver asks the kernel for the pages behind a range of addresses (`hmm_range_fault()`), and then, with the mutex of
//! the notifier held, copies from or to them. Whoever wants to change the CPU's page tables meanwhile waits in the notifier
//! until the copy engine is done, which takes a bounded time; so no page can be freed or migrate under a DMA transfer. What
//! the device has accessed is remembered ([`crate::view`]) until the notifier says that it is stale.
//!
//! The notifier ignores nothing, not even migrations by this driver itself: a page found here must not migrate to the
//! device either before it has been copied.
//!
//! Under the mutex nothing touches user memory, and nothing allocates memory in a way that could start reclaim. So data
//! takes the way through a bounce buffer. Lock order: see [`crate::gpu`].

use core::ops::Range;

use kernel::{
    current,
    mm::{
        interval_notifier::{
            Event,
            IntervalNotifier,
            Invalidate, //
        },
        pagemap::Owner,
        Mm, //
    },
    new_mutex,
    page::PAGE_MASK,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    task::Pid,
    time::Delta, //
};

use crate::{
    abi::uapi::{
        self,
        PAGE_SIZE, //
    },
    gpu::{
        Gpu,
        Session, //
    },
    migrate::{
        self,
        Failures, //
    },
    pagemap::VramPagemap,
    view::View, //
};

/// How long an access or a snapshot is tried again because the page tables keep changing.
// CAST: An `i64` holds every `u32`.
pub(crate) const STALE_LIMIT: Delta = Delta::from_millis(uapi::STALE_LIMIT_MS as i64);

/// The state of the notifier.
pub(crate) struct Watch {
    gpu: Arc<Gpu>,
    /// What the device has of the address space.
    pub(crate) view: View,
    /// Notifications so far, but for those that `maker` caused.
    pub(crate) changes: u64,
    /// The last task that made pages exclusive here.
    pub(crate) maker: Pid,
}

impl Invalidate for Watch {
    fn invalidate(self: Pin<&mut Self>, range: Range<usize>, _event: Event) {
        let this = self.get_mut();

        this.gpu.stats.invalidations.inc();
        this.view.clear(range);
        if current!().pid() != this.maker {
            this.changes += 1;
        }
    }
}

/// A mirror of the address space of the process that opened a device node.
#[pin_data]
pub(crate) struct Mirror {
    #[pin]
    pub(crate) notifier: IntervalNotifier<Watch>,
    /// Held while pages are made exclusive, outside of all other locks: there is one maker at a time.
    #[pin]
    pub(crate) making: Mutex<()>,
    /// What user space makes fail.
    pub(crate) failures: Failures,
}

impl Mirror {
    /// Mirrors the address space of the current task.
    ///
    /// # Errors
    ///
    /// `ESRCH` if it has none; `ENOMEM`.
    pub(crate) fn open(gpu: &Arc<Gpu>) -> Result<Arc<Self>> {
        let task = current!();
        let mm = task.mm().ok_or(ESRCH)?;
        let watch = Watch {
            gpu: gpu.clone(),
            view: View::new(),
            changes: 0,
            maker: 0,
        };

        Arc::pin_init(
            try_pin_init!(Self {
                failures: Failures::new(),
                making <- new_mutex!((), "hsgpu::mirror::making"),
                notifier <- IntervalNotifier::register(
                    mm,
                    0..usize::MAX & PAGE_MASK,
                    new_mutex!(watch, "hsgpu::mirror"),
                ),
            }),
            GFP_KERNEL,
        )
    }

    /// The address space.
    pub(crate) fn mm(&self) -> &Mm {
        self.notifier.mm()
    }

    /// Serves `HSGPU_MIGRATE`.
    ///
    /// # Errors
    ///
    /// Those of [`migrate::migrate`].
    pub(crate) fn migrate(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        req: &mut uapi::Migrate,
    ) -> Result {
        migrate::migrate(session, pagemap, self.mm(), &self.failures, req)
    }
}

/// The addresses that a request is about.
///
/// # Errors
///
/// `EINVAL` if they are not aligned, none, or beyond the end.
pub(crate) fn user_range(addr: u64, npages: u64) -> Result<Range<usize>> {
    let start = usize::try_from(addr)?;
    let size = usize::try_from(npages)?
        .checked_mul(PAGE_SIZE)
        .ok_or(EINVAL)?;
    let end = start.checked_add(size).ok_or(EINVAL)?;

    if start % PAGE_SIZE != 0 || size == 0 || end > usize::MAX & PAGE_MASK {
        return Err(EINVAL);
    }
    Ok(start..end)
}

/// Decodes an owner policy.
///
/// # Errors
///
/// `EINVAL` for an unknown one.
pub(crate) fn owner(policy: u32, pagemap: &VramPagemap) -> Result<Option<Owner>> {
    match policy {
        uapi::OWNER_OWN => Ok(Some(pagemap.owner())),
        uapi::OWNER_NONE => Ok(None),
        _ => Err(EINVAL),
    }
}

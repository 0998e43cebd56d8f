// SPDX-License-Identifier: GPL-2.0

//! Giving up VRAM for good: what the device still gives comes back, and what it does not is lost.
//!
//! A driver that unbinds cannot leave pages behind: `memunmap_pages()` waits until they are out of use, which is until
//! their processes exit. If the device was pulled out, or some of its memory is poisoned, their contents cannot be had any
//! more, and a page of something else in their place would be worse than none. So they migrate, without a copy, to memory
//! that belongs to no device ([`LostPages`]): whoever touches one of them gets `SIGBUS`, also when driver and module are
//! long gone.

use core::ops::Range;

use kernel::{
    mm::{
        migrate::{
            Migration,
            Source, //
        },
        pagemap::lost::LostPages, //
    },
    prelude::*,
    time::{
        delay::fsleep,
        Instant,
        Monotonic, //
    }, //
};

use crate::{
    engine::Work,
    evict::{
        self,
        EvictionRoom,
        LIMIT,
        PAUSE, //
    },
    gpu::Session,
    moving::{
        self,
        PAGES, //
    },
    pagemap::VramPagemap, //
};

/// Moves every page that is in use off the device, whoever uses it.
///
/// Takes at most some time limits of the channels and of evictions; a dead device is noticed at once.
///
/// # Errors
///
/// `EBUSY` if pages are left that somebody has locked or holds for too long; `ENOMEM`. That contents were lost is no
/// error, but has a message.
pub(crate) fn all(session: &Session<'_>, pagemap: &VramPagemap) -> Result {
    let pages = pagemap.pages();
    let Err(why) = evict::all(session, pagemap) else {
        return Ok(());
    };
    let mut room = EvictionRoom::new(PAGES)?;
    let mut lost = LostPages::new(pages.in_use())?;
    let start = Instant::<Monotonic>::now();
    let mut count = 0;

    while pages.in_use() != 0 {
        for first in (0..pages.nr_pages()).step_by(PAGES) {
            // Without an address nothing is split in the course of a migration. What cannot be split now can be later.
            let _ = pages.split(first);
            if why != ENODEV && start.elapsed() <= LIMIT {
                salvage(session, pagemap, first, 0..PAGES, &mut room);
            }
            count += lose(pagemap, first, &mut lost, &mut room)?;
        }
        if start.elapsed() > LIMIT {
            break;
        }
        fsleep(PAUSE);
    }

    session.stats.lost.add(count as u64);
    if count != 0 {
        dev_err!(
            session.device(),
            "{} pages of VRAM are lost ({:?}); who touches one of them gets SIGBUS\n",
            count,
            why
        );
    }
    match pages.in_use() {
        0 => Ok(()),
        left => {
            dev_err!(
                session.device(),
                "{} pages are still in VRAM after {} ms: somebody holds them\n",
                left,
                start.elapsed().as_millis()
            );
            Err(EBUSY)
        }
    }
}

/// Brings back those of the pages `part` of the chunk that begins at `first` that the device can read: all at once, and if
/// that fails, each half on its own.
fn salvage(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    first: usize,
    part: Range<usize>,
    room: &mut EvictionRoom,
) {
    // Nine levels deep at most.
    if bring_back(session, pagemap, first, part.clone(), room) == Err(EIO) && part.len() > 1 {
        let middle = part.start + part.len() / 2;

        salvage(session, pagemap, first, part.start..middle, room);
        salvage(session, pagemap, first, middle..part.end, room);
    }
}

/// Moves the pages `part` of a chunk to system memory, or none of them.
fn bring_back(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    first: usize,
    part: Range<usize>,
    room: &mut EvictionRoom,
) -> Result {
    let pages = pagemap.pages();
    let range = first..first + PAGES;
    let mut migration = Migration::collect_device(pages, range, &mut room.entries)?;

    for index in part {
        // What is still whole could not be split.
        if migration.order(index) == 0 && matches!(migration.source(index), Source::Device(_)) {
            let page = migration.alloc_system(index)?;

            migration.set_system(index, page)?;
        }
    }
    let moved = moving::run(
        session,
        pages,
        Work::Migrate,
        migration,
        &mut room.segments,
    )?;
    session.stats.to_system.add(moved.pages as u64);
    Ok(())
}

/// Gives up the contents of what is left of the chunk that begins at `first`. Returns how many pages moved.
fn lose(
    pagemap: &VramPagemap,
    first: usize,
    lost: &mut LostPages,
    room: &mut EvictionRoom,
) -> Result<usize> {
    let range = first..first + PAGES;
    let mut migration = Migration::collect_device(pagemap.pages(), range, &mut room.entries)?;

    if migration.cpages() == 0 {
        return Ok(0);
    }
    for index in 0..migration.npages() {
        if migration.order(index) == 0 && matches!(migration.source(index), Source::Device(_)) {
            migration.set_device(index, lost.take().ok_or(ENOMEM)?)?;
        }
    }

    let migration = migration.pages();
    let moved = migration.nr_moved();

    migration.finalize();
    Ok(moved)
}

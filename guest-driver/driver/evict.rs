// SPDX-License-Identifier: GPL-2.0

//! Making room in VRAM: the pages that were used longest ago go back to system memory, whoever uses them.
//!
//! What is evicted is a chunk of 512 pages at a time, as many as one migration moves: with less, the drain of the LRU
//! batches that each migration costs would be most of the work. An eviction takes the locks of its folios as every
//! migration does, but by trial: pages that somebody else has locked, or holds, stay, and so does the data of a page
//! whose copy fails.
//!
//! Lock order: see [`crate::gpu`]. No folio may be locked by the caller.

use core::cmp;

use kernel::{
    mm::migrate::Migration,
    prelude::*,
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    }, //
};

use crate::{
    gpu::Session,
    migrate::{
        to_system,
        Failures, //
    },
    moving::{
        Room,
        PAGES, //
    },
    pagemap::VramPagemap, //
};

/// The kernel may look a huge folio too far (see [`Migration::collect_device`]).
pub(crate) type EvictionRoom = Room<{ 2 * PAGES }>;

/// How long [`all`] tries before it gives up.
pub(crate) const LIMIT: Delta = Delta::from_millis(10_000);
/// How long it waits for those who hold the pages that are left.
pub(crate) const PAUSE: Delta = Delta::from_millis(1);

/// Evicts chunks, the one used longest ago first, until `wanted` pages are free or every chunk has had its turn. Returns
/// how many pages it evicted.
///
/// # Errors
///
/// `ENODEV` if the device is dead; `ENOMEM`. A copy that fails is no error: the page stays, and the next chunk is tried.
pub(crate) fn make_room(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    wanted: usize,
) -> Result<usize> {
    let vram = pagemap.vram();
    let wanted = cmp::min(wanted, vram.pages());
    let mut room = EvictionRoom::new(PAGES)?;
    let mut evicted = 0;

    for _ in 0..vram.pages() / PAGES {
        if vram.free_pages() >= wanted {
            break;
        }
        let Some(first) = vram.take_oldest() else {
            break;
        };
        evicted += match evict(session, pagemap, first, &mut room) {
            Ok(pages) => pages,
            Err(ENODEV) => return Err(ENODEV),
            Err(ENOMEM) => return Err(ENOMEM),
            Err(_) => 0,
        };
    }
    session.stats.evicted.add(evicted as u64);
    Ok(evicted)
}

/// Evicts what it can of the chunk of pages that begins at `first`: as a huge folio if it is one, and if there is no system
/// memory in one piece, page by page.
fn evict(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    first: usize,
    room: &mut EvictionRoom,
) -> Result<usize> {
    let pages = pagemap.pages();
    let mut once = || -> Result<(usize, usize)> {
        let range = first..first + PAGES;
        let migration = Migration::collect_device(pages, range, &mut room.entries)?;
        let collected = migration.cpages();

        if collected == 0 {
            return Ok((0, 0));
        }
        let moved = to_system(
            session,
            pagemap,
            migration,
            &mut room.segments,
            &Failures::new(),
        )?;
        Ok((collected, moved))
    };

    let (collected, moved) = once()?;
    // Without an address the kernel does not split in the course of a migration.
    if moved < collected && pages.split(first).is_ok() {
        let (_, more) = once()?;

        return Ok(moved + more);
    }
    Ok(moved)
}

/// Moves every page that is in use back to system memory, whoever uses it.
///
/// Pages that are locked by somebody else at the moment, or to which there is an extra reference, are tried again until
/// a time limit is over. Pages that the device cannot read are not: once nothing else is left, that is an error.
///
/// # Errors
///
/// `EBUSY` if pages are left when the time is over; `ENODEV` if the device is dead; the error of the copy engine that kept
/// the rest there; `ENOMEM`.
pub(crate) fn all(session: &Session<'_>, pagemap: &VramPagemap) -> Result {
    let pages = pagemap.pages();
    let mut room = EvictionRoom::new(PAGES)?;
    let start = Instant::<Monotonic>::now();
    let mut left = pages.in_use();

    loop {
        let result = pass(session, pagemap, &mut room);
        let before = core::mem::replace(&mut left, pages.in_use());

        if left == 0 {
            return Ok(());
        }
        match result {
            Err(ENODEV) => return Err(ENODEV),
            Err(error) if left == before => return Err(error),
            _ if start.elapsed() > LIMIT => return Err(result.err().unwrap_or(EBUSY)),
            _ => fsleep(PAUSE),
        }
    }
}

/// Tries to evict every page once. Returns the last error, but does not stop at it, except for a dead device.
fn pass(session: &Session<'_>, pagemap: &VramPagemap, room: &mut EvictionRoom) -> Result {
    let mut result = Ok(());

    for first in (0..pagemap.pages().nr_pages()).step_by(PAGES) {
        match evict(session, pagemap, first, room) {
            Ok(_) => (),
            Err(ENODEV) => return Err(ENODEV),
            Err(error) => result = Err(error),
        }
    }
    result
}

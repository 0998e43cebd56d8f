// SPDX-License-Identifier: GPL-2.0

//! Moving pages from the memory of one GPU to that of another, by a copy from GPU to GPU.
//!
//! The pages of the other GPU are device-private pages of another pagemap, and mostly of another owner: they are
//! collected as that owner's. The copy is made by the GPU to which they move; while it lasts, a session of the other one
//! keeps its memory in place.
//!
//! # Lock order
//!
//! A migration locks the folios of both sides: the sources in the order of their addresses, by trial (`folio_trylock()` in
//! `mm/migrate_device.c`), then the destinations, which nobody else knows yet. So two GPUs may take the same range from
//! each other at once: one gets a page and the other leaves it where it is. Channel slots are those of the copying GPU
//! alone; no GPU waits for a channel of another one.

use core::cmp;

use kernel::{
    current,
    global_lock,
    mm::{
        migrate::{
            Collected,
            Destination,
            Migration,
            Select,
            Source, //
        },
        Mm, //
    },
    prelude::*,
    sync::Arc, //
};

use crate::{
    abi::{
        ring::Location,
        uapi::{
            self,
            PAGE_SIZE, //
        },
    },
    engine::{
        Segment,
        Work, //
    },
    evict,
    file::Node,
    gpu::Session,
    mirror::user_range,
    moving::{
        Room,
        PAGES, //
    },
    pagemap::VramPagemap, //
};

/// GPUs that can be each other's peers; the width of an index in descriptors.
const PEERS: usize = 16;
/// How often room is made for one piece.
const EVICTIONS: usize = 8;

global_lock! {
    // SAFETY: `init()` is called when the module is, before anything else.
    unsafe(uninit) static NODES: Mutex<[Option<Arc<Node>>; PEERS]> = [const { None }; PEERS];
}

/// Makes the list of GPUs usable.
///
/// # Safety
///
/// Must be called once, before anything else of this file.
pub(crate) unsafe fn init() {
    // SAFETY: By the contract of this function.
    unsafe { NODES.init() };
}

/// From now on `node` is a peer of the others.
pub(crate) fn add(node: &Arc<Node>) {
    let before = NODES
        .lock()
        .get_mut(usize::from(node.gpu.index))
        .and_then(|slot| slot.replace(node.clone()));

    drop(before);
}

/// From now on `node` is nobody's peer. Those who use it at the moment have a session of it.
pub(crate) fn remove(node: &Arc<Node>) {
    let before = {
        let mut nodes = NODES.lock();

        nodes
            .get_mut(usize::from(node.gpu.index))
            .filter(|slot| slot.as_ref().is_some_and(|other| Arc::ptr_eq(other, node)))
            .and_then(Option::take)
    };

    drop(before);
}

fn get(index: u32) -> Option<Arc<Node>> {
    NODES.lock().get(usize::try_from(index).ok()?)?.clone()
}

/// Serves `HSGPU_PEER_MIGRATE` for the address space `mm`; fills in the results as far as it comes.
///
/// # Errors
///
/// `EINVAL` for addresses that are not aligned or not mapped, and for a GPU that is this one; `ENODEV` for one that does
/// not exist; `EINTR`, `ENOMEM`, those of the copy engine. That there is not room for all of it, even after eviction, is
/// none.
pub(crate) fn migrate(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    mm: &Mm,
    req: &mut uapi::PeerMigrate,
) -> Result {
    req.migrated = 0;
    if req.reserved != 0 || req.from == u32::from(session.index) {
        return Err(EINVAL);
    }

    let range = user_range(req.addr, req.npages)?;
    let peer = get(req.from).ok_or(ENODEV)?;
    let peer_session = peer.gpu.enter_fault()?;
    let peer_pagemap = peer.pagemap(&peer_session)?;
    let mm = mm.mmget_not_zero().ok_or(EINVAL)?;
    let mut room = Room::<PAGES>::new(PAGES)?;

    let mmap = mm.mmap_read_lock();
    let mut addr = range.start;
    while addr < range.end {
        let vma = mmap.vma_lookup(addr).ok_or(EINVAL)?;
        let end = cmp::min(
            cmp::min(range.end, vma.end()),
            addr.saturating_add(PAGES * PAGE_SIZE),
        );

        for attempt in 0..=EVICTIONS {
            let migration = Migration::collect(
                &mmap,
                vma,
                addr..end,
                Select::DEVICE_PRIVATE,
                Some(peer_pagemap.owner()),
                &mut room.entries,
            )?;
            let (moved, short) = take_over(
                session,
                pagemap,
                &peer,
                peer_pagemap,
                migration,
                &mut room.segments,
            )?;

            // CAST: `usize` has 64 bits.
            req.migrated += moved as u64;
            if short == 0 || attempt == EVICTIONS || evict::make_room(session, pagemap, short)? == 0
            {
                break;
            }
        }

        addr = end;
        if addr < range.end && current!().signal_pending() {
            return Err(EINTR);
        }
    }
    Ok(())
}

/// Moves what `migration` has found of the peer here, as long as there is room. Returns how many pages moved, and for how
/// many there was none.
fn take_over(
    session: &Session<'_>,
    pagemap: &VramPagemap,
    peer: &Node,
    peer_pagemap: &VramPagemap,
    mut migration: Migration<'_, Collected>,
    segments: &mut KVVec<Segment>,
) -> Result<(usize, usize)> {
    let mut short = 0;

    segments.clear();
    for index in 0..migration.npages() {
        // With one owner for all GPUs, some of the pages may be here already.
        let src = match migration.source(index) {
            Source::Device(page) => match peer_pagemap.locate(&page) {
                Ok(location) => Location::peer(peer.gpu.index, location.address),
                Err(_) => continue,
            },
            _ => continue,
        };
        let Some(page) = pagemap.alloc(0) else {
            short += 1;
            continue;
        };

        migration.set_device(index, page)?;
        let Destination::Device(dst) = migration.destination(index) else {
            return Err(EINVAL);
        };
        segments.push(
            Segment {
                src,
                dst: pagemap.locate(&dst)?,
                // CAST: a small constant.
                length: PAGE_SIZE as u32,
            },
            GFP_KERNEL,
        )?;
    }
    session.copy(Work::Migrate, segments)?;

    let migration = migration.pages();
    let moved = migration.nr_moved();
    migration.finalize();
    // CAST: `usize` has 64 bits.
    session.stats.from_peer.add(moved as u64);
    Ok((moved, short))
}

//! Fence slots: how the guest learns that a descriptor is done.

use std::sync::atomic::{Ordering, fence};

use hmmstorm_abi::ring::{FENCE_ARM, FENCE_SIZE, FENCE_STATUS, FENCE_VALUE, Status};

use crate::guest_memory::{DmaFault, DmaGuard, Need};

/// Completes the fence slot at `address`: first the status, then the value. The value is stored with release order,
/// so whoever sees it sees the status, and the data that was copied before.
///
/// # Errors
/// [`DmaFault`] if the slot cannot be written; nothing of it was written then.
pub fn signal(guard: &DmaGuard<'_>, address: u64, value: u64, status: Status) -> Result<(), DmaFault> {
    guard.check(address, FENCE_SIZE as u64, Need::Write)?;
    guard.store_u32(address + FENCE_STATUS as u64, status as u32)?;
    guard.store_u64(address + FENCE_VALUE as u64, value)
}

/// Whether somebody sleeps until the interrupt of the fence slot at `address`, whose value was just stored.
///
/// # Errors
/// [`DmaFault`] if the slot cannot be read.
pub fn is_armed(guard: &DmaGuard<'_>, address: u64) -> Result<bool, DmaFault> {
    // Pairs with the full barrier between a waiter's arming and his last look at the value: of the two stores, at least
    // one is seen by the other side.
    fence(Ordering::SeqCst);
    Ok(guard.load_u32(address + FENCE_ARM as u64)? != 0)
}

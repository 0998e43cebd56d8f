//! Fence slots: how the guest learns that a descriptor is done.

use hmmstorm_abi::ring::{FENCE_SIZE, FENCE_STATUS, FENCE_VALUE, Status};

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

// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hardware and user-space interfaces of the hsgpu, shared by the device model, the driver and the storm.

pub mod job;
pub mod mmu;
pub mod pci;
pub mod regs;
pub mod ring;
pub mod uapi;

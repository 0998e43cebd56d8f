// SPDX-License-Identifier: Apache-2.0 OR MIT

//! PCI identity and BAR layout of the hsgpu.

/// Vendor id: Red Hat/Qumranet, whose range `10f0..=10ff` is kept for experiments (QEMU `docs/specs/pci-ids.rst`).
pub const VENDOR_ID: u16 = 0x1af4;
/// Device id of the hsgpu.
pub const DEVICE_ID: u16 = 0x10f1;
/// Revision id; counts incompatible changes of the register file.
pub const REVISION_ID: u8 = 1;
/// Class code: processing accelerator (base class 0x12), which no firmware and no display stack touches.
pub const CLASS_CODE: u32 = 0x12_00_00;

/// BAR of the register file: 32-bit, non-prefetchable, trapped.
pub const BAR_REGS: u32 = 0;
/// Size of the register BAR in bytes.
pub const BAR_REGS_SIZE: usize = 0x1_0000;
/// BAR of the VRAM aperture: 64-bit, prefetchable, mapped into the guest (occupies BAR 2 and 3).
pub const BAR_VRAM: u32 = 2;
/// BAR of the MSI-X table and pending bits, which hold nothing else.
pub const BAR_MSIX: u32 = 4;
/// Size of the MSI-X BAR in bytes.
pub const BAR_MSIX_SIZE: usize = 0x2000;
/// Offset of the MSI-X table in its BAR.
pub const MSIX_TABLE_OFFSET: u32 = 0;
/// Offset of the pending-bit array in the MSI-X BAR.
pub const MSIX_PBA_OFFSET: u32 = 0x1000;

/// Channels every hsgpu has. All can do everything; how work is spread over them is software's choice.
pub const CHANNELS: usize = 8;
/// MSI-X vector of the device as a whole (errors).
pub const VECTOR_DEVICE: u16 = 0;
/// MSI-X vector of channel 0; channel `n` has this plus `n`.
pub const VECTOR_CHANNEL0: u16 = 1;
/// MSI-X vector of the fault buffer.
pub const VECTOR_FAULT: u16 = VECTOR_CHANNEL0 + CHANNELS as u16;
/// MSI-X vectors of the function.
pub const VECTORS: usize = 2 + CHANNELS;

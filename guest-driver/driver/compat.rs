// SPDX-License-Identifier: GPL-2.0

//! All that differs between the kernels this driver is built for; `Kbuild` says which one by `cfg(kernel_since_7_1)`.
//!
//! - Coherent DMA memory: `CoherentAllocation<T>` became `Coherent<[T]>`, and `dma_read!()` and `dma_write!()` take a
//!   projection in place of an expression.
//! - Register access: the methods of `pci::Bar` moved to a trait, which has to be in scope.

use kernel::{
    device::{
        Bound,
        Device, //
    },
    dma::DmaAddress,
    dma_read,
    dma_write,
    prelude::*,
    transmute::{
        AsBytes,
        FromBytes, //
    }, //
};

#[cfg(not(kernel_since_7_1))]
use kernel::dma::CoherentAllocation as Memory;

#[cfg(kernel_since_7_1)]
type Memory<T> = kernel::dma::Coherent<[T]>;

/// An array in memory that CPU and device see alike; zeroed at first. Elements are read and written one by one, since the
/// device may do the same at any time.
pub(crate) struct CoherentArray<T: AsBytes + FromBytes>(Memory<T>);

impl<T: AsBytes + FromBytes> CoherentArray<T> {
    /// Allocates `count` elements for `dev`.
    ///
    /// # Errors
    ///
    /// [`ENOMEM`], [`EOVERFLOW`].
    pub(crate) fn new(dev: &Device<Bound>, count: usize) -> Result<Self> {
        #[cfg(not(kernel_since_7_1))]
        let memory = Memory::alloc_coherent(dev, count, GFP_KERNEL | __GFP_ZERO)?;
        #[cfg(kernel_since_7_1)]
        let memory = kernel::dma::Coherent::<T>::zeroed_slice(dev, count, GFP_KERNEL)?;

        Ok(Self(memory))
    }

    /// Reads an element.
    ///
    /// # Errors
    ///
    /// If there is none of this index.
    pub(crate) fn get(&self, index: usize) -> Result<T> {
        let memory = &self.0;

        #[cfg(not(kernel_since_7_1))]
        return dma_read!(memory[index]);
        #[cfg(kernel_since_7_1)]
        return Ok(dma_read!(memory, [index]?));
    }

    /// Writes an element.
    ///
    /// # Errors
    ///
    /// If there is none of this index.
    pub(crate) fn set(&self, index: usize, value: T) -> Result {
        let memory = &self.0;

        #[cfg(not(kernel_since_7_1))]
        dma_write!(memory[index] = value)?;
        #[cfg(kernel_since_7_1)]
        dma_write!(memory, [index]?, value);

        Ok(())
    }

    /// The address by which the device reaches the array.
    pub(crate) fn dma_handle(&self) -> DmaAddress {
        self.0.dma_handle()
    }

    /// The address by which the device reaches the element of this index.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if there is none.
    pub(crate) fn dma_handle_at(&self, index: usize) -> Result<DmaAddress> {
        let offset = index.checked_mul(size_of::<T>()).ok_or(EINVAL)?;

        if offset >= self.0.size() {
            return Err(EINVAL);
        }
        Ok(self.0.dma_handle() + DmaAddress::try_from(offset)?)
    }
}

/// What `pci::Bar` is read and written by.
pub(crate) mod bar {
    #[cfg(kernel_since_7_1)]
    use kernel::io::Io;

    use kernel::prelude::*;

    use crate::regs::Bar0;

    /// Reads the register at a constant offset.
    #[inline(always)]
    pub(crate) fn read32(bar: &Bar0, offset: usize) -> u32 {
        bar.read32(offset)
    }

    /// Writes the register at a constant offset.
    #[inline(always)]
    pub(crate) fn write32(bar: &Bar0, value: u32, offset: usize) {
        bar.write32(value, offset);
    }

    /// Reads the register at an offset that is known at run time.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the BAR ends before it.
    pub(crate) fn try_read32(bar: &Bar0, offset: usize) -> Result<u32> {
        bar.try_read32(offset)
    }

    /// Writes the register at an offset that is known at run time.
    ///
    /// # Errors
    ///
    /// [`EINVAL`] if the BAR ends before it.
    pub(crate) fn try_write32(bar: &Bar0, value: u32, offset: usize) -> Result {
        bar.try_write32(value, offset)
    }
}

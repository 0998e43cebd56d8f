// SPDX-License-Identifier: GPL-2.0

//! MSI-X: one vector per channel.
//!
//! The hard handler looks at fences in memory and completes completions. It takes no lock and reads no register, so it
//! needs no thread.

use kernel::{
    c_str,
    device::{
        Bound,
        Device, //
    },
    irq,
    pci,
    prelude::*,
    sync::Arc, //
};

use crate::{
    abi::pci::{
        VECTORS,
        VECTOR_CHANNEL0, //
    },
    channel::Channel, //
};

impl irq::Handler for Channel {
    fn handle(&self, _dev: &Device<Bound>) -> irq::IrqReturn {
        self.interrupt();
        irq::IrqReturn::Handled
    }
}

/// The handler of a channel's vector, requested.
pub(crate) type Registration = Pin<KBox<irq::Registration<Arc<Channel>>>>;

/// Requests the vector of each of `channels`, which are those from channel 0 on.
///
/// # Errors
///
/// What the PCI core says if there are not enough vectors.
pub(crate) fn request(
    pdev: &pci::Device<Bound>,
    channels: &[Arc<Channel>],
) -> Result<KVec<Registration>> {
    let count = u32::try_from(VECTORS)?;
    let types = pci::IrqTypes::default().with(pci::IrqType::MsiX);
    let vectors = pdev
        .alloc_irq_vectors(count, count, types)
        .inspect_err(|error| {
            dev_err!(
                pdev.as_ref(),
                "{} MSI-X vectors wanted, none had: {:?}\n",
                count,
                error
            )
        })?;
    let mut irqs = KVec::with_capacity(channels.len(), GFP_KERNEL)?;

    for (index, channel) in channels.iter().enumerate() {
        let vector = u32::from(VECTOR_CHANNEL0) + u32::try_from(index)?;
        let vector = pdev.irq_vector(&vectors, vector)?;
        let registration = pdev.request_irq(
            vector,
            irq::Flags::TRIGGER_NONE,
            c_str!("hsgpu"),
            Ok::<_, Error>(channel.clone()),
        );

        irqs.push(KBox::pin_init(registration, GFP_KERNEL)?, GFP_KERNEL)?;
    }
    Ok(irqs)
}

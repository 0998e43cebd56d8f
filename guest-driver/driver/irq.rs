// SPDX-License-Identifier: GPL-2.0

//! MSI-X: one vector per channel, and one for the fault buffer.
//!
//! The hard handler of a channel looks at fences in memory and completes completions, that of the fault buffer queues
//! work. They take no lock of this driver and read no register, so they need no thread.

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
        VECTOR_CHANNEL0,
        VECTOR_FAULT, //
    },
    channel::Channel,
    fault::FaultBuffer, //
};

impl irq::Handler for Channel {
    fn handle(&self, _dev: &Device<Bound>) -> irq::IrqReturn {
        self.interrupt();
        irq::IrqReturn::Handled
    }
}

/// The handler of the fault buffer's vector.
pub(crate) struct FaultHandler(Arc<FaultBuffer>);

impl irq::Handler for FaultHandler {
    fn handle(&self, _dev: &Device<Bound>) -> irq::IrqReturn {
        self.0.interrupt();
        irq::IrqReturn::Handled
    }
}

/// The handlers, requested.
pub(crate) struct Registrations {
    _channels: KVec<Pin<KBox<irq::Registration<Arc<Channel>>>>>,
    _faults: Pin<KBox<irq::Registration<FaultHandler>>>,
}

/// Requests the vector of each of `channels`, which are those from channel 0 on, and that of the fault buffer.
///
/// # Errors
///
/// What the PCI core says if there are not enough vectors.
pub(crate) fn request(
    pdev: &pci::Device<Bound>,
    channels: &[Arc<Channel>],
    faults: &Arc<FaultBuffer>,
) -> Result<Registrations> {
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

    let faults = pdev.request_irq(
        pdev.irq_vector(&vectors, u32::from(VECTOR_FAULT))?,
        irq::Flags::TRIGGER_NONE,
        c_str!("hsgpu"),
        Ok::<_, Error>(FaultHandler(faults.clone())),
    );
    Ok(Registrations {
        _channels: irqs,
        _faults: KBox::pin_init(faults, GFP_KERNEL)?,
    })
}

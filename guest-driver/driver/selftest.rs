// SPDX-License-Identifier: GPL-2.0

//! The proof, at probe, that DMA and interrupts work: with a clear message instead of a hang on the first fault.

use kernel::{
    device::{
        Bound,
        Device, //
    },
    io::poll::read_poll_timeout,
    prelude::*,
    time::Delta, //
};

use crate::{
    abi::{
        ring::{
            Descriptor,
            Location,
            FLAG_IRQ, //
        },
        uapi::PAGE_SIZE, //
    },
    channel::Channel,
    compat::CoherentArray,
    engine::{
        Segment,
        Work, //
    },
    gpu::Session,
    regs::ChannelRegs, //
};

const WORDS: usize = PAGE_SIZE / size_of::<u64>();
/// CAST: the size of a page.
const PAGE: u32 = PAGE_SIZE as u32;
/// What the device fills a page with.
const PATTERN: u64 = 0x6873_6770_7520_6f6b;

/// What no memory holds by chance: a different word at every place of every page.
fn cookie(page: usize, word: usize) -> u64 {
    // CAST: mixing the bits of small numbers.
    (((page as u64) << 32) | word as u64 | 1 << 63).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Tests all channels and the way to VRAM and back.
///
/// # Errors
///
/// `EIO` with a message that says what does not work.
pub(crate) fn run(session: &Session<'_>, synchronous: bool) -> Result {
    let dev = session.device();

    for (index, channel) in session.channels().iter().enumerate() {
        fence(dev, channel, session.regs().channel(index)?, synchronous)?;
    }
    data(session)
}

/// A descriptor that does nothing must give a fence, and an interrupt if the device sends them.
fn fence(
    dev: &Device<Bound>,
    channel: &Channel,
    regs: ChannelRegs<'_>,
    synchronous: bool,
) -> Result {
    let before = channel.interrupts();

    channel
        .job()
        .run(
            regs,
            Descriptor {
                flags: FLAG_IRQ,
                ..Descriptor::NOP
            },
        )
        .inspect_err(|failure| dev_err!(dev, "the first descriptor failed: {:?}\n", failure))?;
    if synchronous {
        return Ok(());
    }
    // The fence is written before the interrupt is raised, and may have been seen already.
    read_poll_timeout(
        || Ok(channel.interrupts()),
        |interrupts| *interrupts != before,
        Delta::from_millis(1),
        Delta::from_secs(1),
    )
    .map(|_| ())
    .inspect_err(|_| dev_err!(dev, "a fence came, but its interrupt did not within 1 s\n"))
}

/// Two pages go to VRAM, change places there, and come back; a third is filled by the device.
fn data(session: &Session<'_>) -> Result {
    const PAGES: usize = 3;

    let dev = session.device();
    let memory = CoherentArray::<u64>::new(dev, PAGES * WORDS)?;
    let system = |page: usize| memory.dma_handle_at(page * WORDS).map(Location::system);
    // CAST: a small multiple of the page size.
    let vram = |page: usize| Location::vram((page * PAGE_SIZE) as u64);
    let copy = |src, dst| Segment {
        src,
        dst,
        length: PAGE,
    };

    for page in 0..PAGES {
        for word in 0..WORDS {
            memory.set(page * WORDS + word, cookie(page, word))?;
        }
    }
    session
        .copy(
            Work::Migrate,
            &[copy(system(0)?, vram(1)), copy(system(1)?, vram(0))],
        )
        .and_then(|()| session.fill(Work::Access, vram(2), u64::from(PAGE), PATTERN))
        .inspect_err(|error| dev_err!(dev, "writing to VRAM failed: {:?}\n", error))?;
    session
        .copy(
            Work::Fault,
            &[
                copy(vram(0), system(0)?),
                copy(vram(1), system(1)?),
                copy(vram(2), system(2)?),
            ],
        )
        .inspect_err(|error| dev_err!(dev, "reading from VRAM failed: {:?}\n", error))?;
    for page in 0..PAGES {
        for word in 0..WORDS {
            let wanted = match page {
                0 | 1 => cookie(1 - page, word),
                _ => PATTERN,
            };
            let found = memory.get(page * WORDS + word)?;

            if found != wanted {
                dev_err!(
                    dev,
                    "page {} came back from VRAM with {:#018x} at word {}, not {:#018x}\n",
                    page,
                    found,
                    word,
                    wanted
                );
                return Err(EIO);
            }
        }
    }
    // Leave nothing behind in VRAM.
    session.fill(Work::Migrate, vram(0), u64::from(PAGE) * 3, 0)
}

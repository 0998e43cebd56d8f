//! The engines of a channel: decode a descriptor, check it, execute it.
//!
//! The guest is hostile: what a descriptor, list, job or page-table entry says is read once and checked before it is
//! used. [`copy`] moves bytes, [`access`] runs jobs; bindings and invalidations are done here.

pub mod access;
pub mod atomics;
pub mod copy;
pub mod place;
pub mod session;
pub mod shader;

use hmmstorm_abi::mmu::PAGE_SHIFT;
use hmmstorm_abi::ring::{Aperture, Descriptor, Opcode, Status};

use crate::guest_memory::{DmaFault, Need};
use crate::reset::Held;
use access::{Running, Suspended};
use copy::Copier;
use place::Place;
use session::Session;

/// Bytes of a page, and of a table.
const PAGE: u64 = 1 << PAGE_SHIFT;

/// Why a descriptor did not do what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It cannot be decoded, or contradicts itself.
    #[error("descriptor: {0}")]
    Descriptor(&'static str),
    /// An aperture or VRAM range that is not there.
    #[error("{length} bytes at {address:#x} of {aperture:?}, which has no such range")]
    Address {
        /// Which memory.
        aperture: Aperture,
        /// Offset.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A DMA range that the map does not allow.
    #[error(transparent)]
    Dma(#[from] DmaFault),
    /// A scatter list that is too long, unreadable or malformed.
    #[error("scatter list of {count} entries at {address:#x}: {why}")]
    List {
        /// Where.
        address: u64,
        /// How long.
        count: u32,
        /// What is wrong.
        why: &'static str,
    },
    /// The channel is being reset.
    #[error("the channel is being reset")]
    Aborted(Held),
    /// The chaos plan wants it.
    #[error("the chaos plan fails this one")]
    Injected,
    /// VRAM that the chaos plan has poisoned.
    #[error("{length} bytes of VRAM at {address:#x} are poisoned in part")]
    Poisoned {
        /// Offset.
        address: u64,
        /// Bytes.
        length: u64,
    },
    /// A page fault that was cancelled, or that there is no buffer to report in.
    #[error("page fault at {va:#x} of address space {asid}")]
    PageFault {
        /// Address space.
        asid: u32,
        /// The address without a translation.
        va: u64,
    },
    /// A job that is none, or an address space that cannot be used.
    #[error("job: {0}")]
    Job(&'static str),
}

impl Failure {
    /// The code that the fence slot gets.
    pub const fn status(self) -> Status {
        match self {
            Self::Descriptor(_) => Status::BadDescriptor,
            Self::Address { .. } => Status::BadAddress,
            Self::Dma(_) => Status::DmaFault,
            Self::List { .. } => Status::BadList,
            Self::Aborted(_) => Status::Aborted,
            Self::Injected => Status::Injected,
            Self::PageFault { .. } => Status::PageFault,
            Self::Poisoned { .. } => Status::Poisoned,
            Self::Job(_) => Status::BadJob,
        }
    }

    /// Whether it is no fault of the driver's, but part of its dealings with the device.
    pub const fn is_expected(self) -> bool {
        matches!(self, Self::Aborted(_) | Self::Injected | Self::PageFault { .. } | Self::Poisoned { .. })
    }
}

/// How far a descriptor has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// To its end.
    Done,
    /// It keeps its place; [`Engine::resume`] goes on with it.
    Suspended(Suspended),
}

/// One channel's engines, with what they keep between descriptors.
#[derive(Debug, Default)]
pub struct Engine {
    copier: Copier,
    suspended: Option<Running>,
}

impl Engine {
    /// Executes the descriptor with these words.
    ///
    /// # Errors
    /// [`Failure`]. Unless it is [`Failure::Aborted`], or the DMA map changed half-way, no byte was moved by a copy.
    pub fn execute(&mut self, session: &mut Session<'_>, words: [u64; 8]) -> Result<Progress, Failure> {
        let core = session.core;
        if core.chaos.fails_descriptor(session.channel, Opcode::from_u8(words[0] as u8)) {
            core.stats.chaos.increment();
            return Err(Failure::Injected);
        }
        let descriptor = Descriptor::from_words(words).map_err(|_| {
            Failure::Descriptor("unknown opcode, aperture or flag, or a reserved field in use")
        })?;
        let counts = matches!(
            descriptor.opcode,
            Opcode::CopyList | Opcode::Bind | Opcode::Invalidate | Opcode::Access
        );
        if descriptor.count != 0 && !counts {
            return Err(Failure::Descriptor("a count without a list or an address space"));
        }
        let Descriptor { count, src, dst, length, pattern, .. } = descriptor;
        let done = match descriptor.opcode {
            Opcode::Nop => Ok(()),
            Opcode::Copy => {
                self.copier.run(session, |copier, session| copier.copy_checked(session, src, dst, length))
            }
            Opcode::Fill => {
                self.copier.run(session, |copier, session| copier.fill(session, dst, length, pattern))
            }
            Opcode::CopyList => {
                self.copier.run(session, |copier, session| copier.copy_list(session, src, count))
            }
            Opcode::Bind => bind(session, &descriptor),
            Opcode::Invalidate => invalidate(session, &descriptor),
            Opcode::Access => {
                let running = Running::start(session, words, &descriptor)?;
                return self.go_on(session, running);
            }
        };
        done.map(|()| Progress::Done)
    }

    /// The words of the descriptor that keeps its place, if one does.
    pub fn suspended(&self) -> Option<[u64; 8]> {
        self.suspended.as_ref().map(Running::words)
    }

    /// Goes on with the descriptor that keeps its place; without one there is nothing to do.
    ///
    /// # Errors
    /// As [`Engine::execute`].
    pub fn resume(&mut self, session: &mut Session<'_>) -> Result<Progress, Failure> {
        match self.suspended.take() {
            Some(running) => self.go_on(session, running),
            None => Ok(Progress::Done),
        }
    }

    /// Ends the descriptor that keeps its place, with its outcome as far as it got; returns its words.
    pub fn abort(&mut self, session: &mut Session<'_>) -> Option<[u64; 8]> {
        let running = self.suspended.take()?;
        // It ends with an error already.
        let _ = running.put_outcome(session);
        Some(running.words())
    }

    fn go_on(&mut self, session: &mut Session<'_>, mut running: Running) -> Result<Progress, Failure> {
        let progress = running.run(session);
        match progress {
            Ok(Progress::Suspended(_)) => self.suspended = Some(running),
            Err(Failure::Aborted(Held::Drop)) => {}
            Ok(Progress::Done) => running.put_outcome(session)?,
            // Of the two, the first failure is the one to tell.
            Err(_) => drop(running.put_outcome(session)),
        }
        progress
    }
}

fn bind(session: &mut Session<'_>, descriptor: &Descriptor) -> Result<(), Failure> {
    let Descriptor { count: asid, src: root, length, .. } = *descriptor;
    let core = session.core;
    if !core.mmu.has(asid) {
        return Err(Failure::Job("an address space that does not exist"));
    }
    let root = match length {
        0 => None,
        PAGE if !root.address.is_multiple_of(PAGE) => {
            return Err(Failure::Address { aperture: root.aperture, address: root.address, length });
        }
        PAGE => {
            Place::of(core, root, PAGE)?.check(session.guard(), PAGE, Need::Read)?;
            Some(root)
        }
        _ => return Err(Failure::Descriptor("a binding with a length other than 0 and 4096")),
    };
    // Waits for accesses under way, which hold the DMA map too.
    core.mmu.bind(asid, root);
    core.stats.tlb_invalidations.increment();
    Ok(())
}

fn invalidate(session: &mut Session<'_>, descriptor: &Descriptor) -> Result<(), Failure> {
    let Descriptor { count: asid, dst, length, .. } = *descriptor;
    let core = session.core;
    if !core.mmu.has(asid) {
        return Err(Failure::Job("an address space that does not exist"));
    }
    let aligned = dst.address.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
    if dst.aperture != Aperture::System || !aligned {
        return Err(Failure::Descriptor("an invalidation of other than whole pages"));
    }
    let (first, last) = match length {
        0 => (0, u64::MAX),
        _ => (dst.address, dst.address.saturating_add(length - 1)),
    };
    core.mmu.invalidate(asid, first, last);
    core.stats.tlb_invalidations.increment();
    Ok(())
}

/// Little-endian words of `bytes`.
fn words_of<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

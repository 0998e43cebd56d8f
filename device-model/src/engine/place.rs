//! A location with its aperture looked up: VRAM ranges are checked here, DMA ranges when they are used.

use std::sync::atomic::{AtomicU64, Ordering};

use hmmstorm_abi::ring::{Aperture, Location};
use vm_memory::{VolatileMemory, VolatileSlice};

use super::Failure;
use crate::core::Core;
use crate::guest_memory::{DmaGuard, Need};
use crate::vram::Vram;

/// Memory that exists, as far as VRAM goes.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// Guest memory, at this DMA address.
    System(u64),
    /// VRAM of some GPU, at this offset.
    Vram(&'a Vram, u64),
}

impl<'a> Place<'a> {
    /// Looks up `length` bytes at `location`.
    ///
    /// # Errors
    /// [`Failure::Address`] if there is no such aperture or VRAM range.
    pub fn of(core: &'a Core, location: Location, length: u64) -> Result<Self, Failure> {
        let Location { aperture, address } = location;
        let vram = match aperture {
            Aperture::System => return Ok(Self::System(address)),
            Aperture::Vram => Some(core.vram()),
            Aperture::Peer(gpu) => core.vrams.get(usize::from(gpu)),
        };
        let vram = vram.filter(|vram| vram.contains(address, length));
        vram.map(|vram| Self::Vram(vram, address)).ok_or(Failure::Address { aperture, address, length })
    }

    /// DMA address or VRAM offset.
    pub const fn address(self) -> u64 {
        match self {
            Self::System(address) | Self::Vram(_, address) => address,
        }
    }

    /// Whether this is the GPU's own VRAM.
    pub fn is_vram_of(self, core: &Core) -> bool {
        matches!(self, Self::Vram(vram, _) if std::ptr::eq(vram, &raw const **core.vram()))
    }

    /// Whether both are in the same memory, so that their addresses can be compared.
    pub fn same_memory(self, other: Self) -> bool {
        match (self, other) {
            (Self::System(_), Self::System(_)) => true,
            (Self::Vram(a, _), Self::Vram(b, _)) => std::ptr::eq(a, b),
            _ => false,
        }
    }

    /// Checks all of `length` bytes; VRAM was checked when the place was made.
    ///
    /// # Errors
    /// [`Failure::Dma`].
    pub fn check(self, guard: &DmaGuard<'_>, length: u64, need: Need) -> Result<(), Failure> {
        match self {
            Self::System(address) => Ok(guard.check(address, length, need)?),
            Self::Vram(..) => Ok(()),
        }
    }

    /// The bytes from `offset` on, as many of `length` as lie together.
    ///
    /// # Errors
    /// [`Failure`] if not even the first can be reached.
    pub fn span<'b>(
        self,
        guard: &'b DmaGuard<'_>,
        offset: u64,
        length: u64,
        need: Need,
    ) -> Result<VolatileSlice<'b>, Failure>
    where
        'a: 'b,
    {
        match self {
            Self::System(address) => Ok(guard.span(address + offset, length, need)?),
            Self::Vram(vram, address) => vram_span(vram, address + offset, length),
        }
    }

    /// The bytes that end before `end`, as many of `length` as lie together.
    ///
    /// # Errors
    /// [`Failure`] if not even the last can be reached.
    pub fn span_back<'b>(
        self,
        guard: &'b DmaGuard<'_>,
        end: u64,
        length: u64,
        need: Need,
    ) -> Result<VolatileSlice<'b>, Failure>
    where
        'a: 'b,
    {
        match self {
            Self::System(address) => Ok(guard.span_back(address + end, length, need)?),
            Self::Vram(vram, address) => vram_span(vram, address + end - length, length),
        }
    }

    /// Checks that `length` bytes can be read: none of them is poisoned.
    ///
    /// # Errors
    /// [`Failure::Poisoned`].
    pub fn check_poison(self, core: &Core, length: u64) -> Result<(), Failure> {
        match self {
            Self::Vram(vram, address) if vram.is_poisoned(address, length) => {
                core.stats.chaos.increment();
                Err(Failure::Poisoned { address, length })
            }
            _ => Ok(()),
        }
    }

    /// Reads the aligned word here in one access, with acquire order.
    ///
    /// # Errors
    /// [`Failure`] if it cannot be reached.
    pub fn load(self, guard: &DmaGuard<'_>) -> Result<u64, Failure> {
        let span = self.span(guard, 0, 8, Need::Read)?;
        let word: &AtomicU64 = span
            .get_atomic_ref(0)
            .map_err(|_| Failure::Descriptor("a word that is not aligned, or not in one piece"))?;
        Ok(word.load(Ordering::Acquire))
    }

    /// Reads all of `buffer` from here on.
    ///
    /// # Errors
    /// [`Failure`]; part of the buffer may have been read.
    pub fn read(self, guard: &DmaGuard<'_>, buffer: &mut [u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &mut buffer[done..];
            done += self.span(guard, done as u64, rest.len() as u64, Need::Read)?.copy_to(rest);
        }
        Ok(())
    }

    /// Writes all of `buffer` from here on.
    ///
    /// # Errors
    /// [`Failure`]; part of the buffer may have been written.
    pub fn write(self, guard: &DmaGuard<'_>, buffer: &[u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < buffer.len() {
            let rest = &buffer[done..];
            let span = self.span(guard, done as u64, rest.len() as u64, Need::Write)?;
            span.copy_from(rest);
            done += span.len();
        }
        Ok(())
    }
}

fn vram_span(vram: &Vram, address: u64, length: u64) -> Result<VolatileSlice<'_>, Failure> {
    vram.slice(address, length).ok_or(Failure::Address { aperture: Aperture::Vram, address, length })
}

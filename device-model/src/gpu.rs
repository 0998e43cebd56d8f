//! One GPU: its regions and its resets. These are the entry points that the transport calls, and the tests.

use std::fmt::Display;
use std::fs::File;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use hmmstorm_abi::mmu::ADDRESS_SPACES;
use hmmstorm_abi::pci::{CHANNELS, MSIX_PBA_OFFSET};
use hmmstorm_abi::regs::{self, Caps};
use hmmstorm_abi::wire::control::{Chaos, GpuStats};
use vm_memory::VolatileSlice;

use crate::channel::Channel;
use crate::config::Mode;
use crate::config_space::{ConfigSpace, Effect};
use crate::core::Core;
use crate::faults::Channels;
use crate::faults::buffer::BufferError;
use crate::guest_memory::MapError;
use crate::irq::VectorError;
use crate::registers::{self, BadAccess, Target, high, low, set_high, set_low};
use crate::reset::Reset;
use crate::vram::Vram;

/// The regions of the PCI function that exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// BAR 0, registers.
    Registers,
    /// BAR 2, VRAM aperture.
    Vram,
    /// BAR 4, MSI-X table and pending bits.
    Msix,
    /// Configuration space.
    Config,
}

/// One GPU. Everything here may be called from any thread.
#[derive(Debug)]
pub struct Gpu {
    core: Core,
    aperture: u64,
    config: Mutex<ConfigSpace>,
    channels: [Channel; CHANNELS],
}

impl Gpu {
    /// A GPU after power-on, whose BAR 2 shows `aperture` bytes of its VRAM.
    pub fn new(core: Core, aperture: u64) -> Self {
        let config = Mutex::new(ConfigSpace::new(aperture));
        // There are CHANNELS of them, which the ABI keeps far below 2^16.
        let channels = std::array::from_fn(|index| Channel::new(index as u16));
        Self { core, aperture, config, channels }
    }

    /// Position among the GPUs of the process.
    pub fn index(&self) -> u8 {
        self.core.index
    }

    /// Bytes of VRAM that BAR 2 shows.
    pub fn aperture(&self) -> u64 {
        self.aperture
    }

    /// The GPU's memory.
    pub fn vram(&self) -> &Arc<Vram> {
        self.core.vram()
    }

    /// Reads `data` from `region` at `offset`. Always gives an answer: what does not exist reads as zero.
    pub fn region_read(&self, region: Region, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match region {
            // The VMM keeps the MSI-X table.
            Region::Config | Region::Vram if self.core.chaos.dead() => data.fill(0xff),
            Region::Config => self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            Region::Registers => self.registers_read(offset, data),
            Region::Vram => {
                if let Some(window) = self.window(offset, data.len()) {
                    window.copy_to(data);
                }
            }
            Region::Msix => {
                let pending = self.core.interrupts.pending().to_le_bytes();
                let first = offset.wrapping_sub(u64::from(MSIX_PBA_OFFSET));
                for (at, byte) in (first..).zip(data) {
                    let bits = usize::try_from(at).ok().and_then(|at| pending.get(at));
                    *byte = bits.copied().unwrap_or(0);
                }
            }
        }
    }

    /// Writes `data` to `region` at `offset`; writes to what does not exist do nothing.
    pub fn region_write(&self, region: Region, offset: u64, data: &[u8]) {
        match region {
            Region::Config | Region::Vram if self.core.chaos.dead() => {}
            Region::Config => self.config_write(offset, data),
            Region::Registers => self.registers_write(offset, data),
            Region::Vram => {
                if let Some(window) = self.window(offset, data.len()) {
                    window.copy_from(data);
                }
            }
            // The VMM keeps the MSI-X table, and the pending bits are read-only.
            Region::Msix => {}
        }
    }

    /// VRAM as BAR 2 shows it.
    fn window(&self, offset: u64, length: usize) -> Option<VolatileSlice<'_>> {
        let length = length as u64;
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.aperture);
        if inside { self.vram().slice(offset, length) } else { None }
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let effect = config.write(offset, data);
        self.core.bus_master.store(config.bus_master(), Ordering::Release);
        drop(config);
        if effect == Effect::FunctionReset {
            self.reset(Reset::Function);
        }
    }

    fn registers_read(&self, offset: u64, data: &mut [u8]) {
        self.core.stats.register_reads.increment();
        if self.core.chaos.dead() {
            data.fill(0xff);
            return;
        }
        match registers::find(offset, data.len()) {
            Ok(target) => data.copy_from_slice(&self.register(target).to_le_bytes()),
            Err(bad) => self.complain("read", bad),
        }
    }

    fn registers_write(&self, offset: u64, data: &[u8]) {
        self.core.stats.register_writes.increment();
        if self.core.chaos.dead() {
            return;
        }
        let written = registers::find(offset, data.len()).and_then(|target| {
            target.check_write()?;
            // `find` accepts four bytes only.
            let value = data.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            self.set_register(target, value)
        });
        if let Err(bad) = written {
            self.complain("write", bad);
        }
    }

    fn complain(&self, what: &str, bad: BadAccess) {
        self.core.stats.bad_accesses.increment();
        self.core.complaints.register.log(self.index(), format_args!("register {what}: {bad}"));
    }

    fn register(&self, target: Target) -> u32 {
        if let Some(channel) = target.channel {
            return self.channels[channel].read(&self.core, target.register.offset);
        }
        let synchronous = self.core.mode == Mode::Synchronous;
        let vram = self.vram().size();
        match target.register.offset {
            regs::ID => regs::ID_MAGIC,
            regs::VERSION => regs::INTERFACE_VERSION,
            regs::CAPS => Caps::new(CHANNELS as u8, ADDRESS_SPACES as u8, synchronous).0,
            regs::STATUS => regs::STATUS_READY,
            regs::GPU_INDEX => u32::from(self.index()),
            regs::GPU_COUNT => self.core.vrams.len() as u32,
            regs::VRAM_SIZE_LO => low(vram),
            regs::VRAM_SIZE_HI => high(vram),
            regs::VRAM_APERTURE_LO => low(self.aperture),
            regs::VRAM_APERTURE_HI => high(self.aperture),
            regs::FAULT_RING_LO => low(self.core.faults.settings().ring),
            regs::FAULT_RING_HI => high(self.core.faults.settings().ring),
            regs::FAULT_ORDER => self.core.faults.settings().order,
            regs::FAULT_SHADOW_LO => low(self.core.faults.settings().shadow),
            regs::FAULT_SHADOW_HI => high(self.core.faults.settings().shadow),
            regs::FAULT_CONTROL if self.core.faults.is_enabled() => regs::FAULT_CONTROL_ENABLE,
            // CONTROL holds nothing but bits that act.
            _ => 0,
        }
    }

    fn set_register(&self, target: Target, value: u32) -> Result<(), BadAccess> {
        if let Some(channel) = target.channel {
            return self.channels[channel].write(&self.core, target, value);
        }
        match (target.register.offset, value) {
            (regs::CONTROL, 0) => Ok(()),
            (regs::CONTROL, regs::CONTROL_RESET) => {
                self.reset(Reset::Device);
                Ok(())
            }
            (regs::CONTROL, _) => Err(target.refuse(value, "unknown bits")),
            (regs::FAULT_CONTROL, _) => self.fault_control(target, value),
            (regs::FAULT_REPLAY, 1) => {
                self.core.stats.replays.increment();
                self.resume(self.core.faults.replay());
                Ok(())
            }
            (regs::FAULT_REPLAY, _) => Err(target.refuse(value, "only 1 means something")),
            (regs::FAULT_CANCEL, sequence) => {
                self.cancel(self.core.faults.cancel(sequence));
                Ok(())
            }
            (offset, _) => {
                let changed = self.core.faults.set(|settings| match offset {
                    regs::FAULT_RING_LO => set_low(&mut settings.ring, value),
                    regs::FAULT_RING_HI => set_high(&mut settings.ring, value),
                    regs::FAULT_ORDER => settings.order = value,
                    regs::FAULT_SHADOW_LO => set_low(&mut settings.shadow, value),
                    regs::FAULT_SHADOW_HI => set_high(&mut settings.shadow, value),
                    _ => {}
                });
                let busy = target.refuse(value, "writable only while the fault buffer is disabled");
                if changed { Ok(()) } else { Err(busy) }
            }
        }
    }

    fn fault_control(&self, target: Target, value: u32) -> Result<(), BadAccess> {
        match value {
            regs::FAULT_CONTROL_ENABLE => self.core.faults.enable(&self.core).map_err(|error| {
                if matches!(error, BufferError::Dma(_)) {
                    self.core.stats.dma_faults.increment();
                }
                target.refuse(value, error.why())
            }),
            0 => {
                self.cancel(self.core.faults.disable());
                Ok(())
            }
            _ => Err(target.refuse(value, "unknown bits")),
        }
    }

    /// Lets the jobs of `channels` end, whose page faults were cancelled.
    fn cancel(&self, channels: Channels) {
        self.core.stats.cancels.add(channels.count());
        self.resume(channels);
    }

    /// Lets the jobs of `channels` go on, whose page faults were decided.
    fn resume(&self, channels: Channels) {
        let order = self.core.chaos.order();
        order
            .into_iter()
            .filter(|index| channels.has(*index))
            .for_each(|index| self.channels[index].resume(&self.core));
    }

    /// Adds an entry to the DMA map; see [`crate::guest_memory::GuestMemory::map`].
    ///
    /// # Errors
    /// [`MapError`].
    pub fn dma_map(
        &self,
        address: u64,
        size: u64,
        writable: bool,
        file: Option<(File, u64)>,
    ) -> Result<(), MapError> {
        self.core.memory.map(address, size, writable, file)
    }

    /// Removes entries from the DMA map, when no engine touches them any more.
    ///
    /// # Errors
    /// [`MapError::NotMapped`].
    pub fn dma_unmap(&self, address: u64, size: u64) -> Result<(), MapError> {
        self.core.memory.unmap(address, size)
    }

    /// Removes every entry of the DMA map.
    pub fn dma_unmap_all(&self) {
        self.core.memory.unmap_all();
    }

    /// Connects or disconnects vectors; see [`crate::irq::Interrupts::connect`].
    ///
    /// # Errors
    /// [`VectorError`].
    pub fn connect_vectors(&self, start: u32, count: u32, eventfds: Vec<File>) -> Result<(), VectorError> {
        self.core.interrupts.connect(start, count, eventfds)
    }

    /// Raises vectors on behalf of the VMM.
    ///
    /// # Errors
    /// [`VectorError`].
    pub fn test_vectors(&self, start: u32, count: u32) -> Result<(), VectorError> {
        self.core.interrupts.test(start, count)
    }

    /// Disconnects every vector.
    pub fn disconnect_vectors(&self) {
        self.core.interrupts.disconnect_all();
    }

    /// Logs that a request of the VMM was refused.
    pub fn refuse(&self, why: &dyn Display) {
        self.core.complaints.request.log(self.index(), format_args!("refused a request of the VMM: {why}"));
    }

    /// Resets the GPU as far as `reset` goes; see [`crate::reset`].
    pub fn reset(&self, reset: Reset) {
        let scope = reset.scope();
        self.core.stats.resets.increment();
        for channel in &self.channels {
            channel.reset(&self.core, scope.held);
        }
        self.core.faults.reset();
        self.core.mmu.clear();
        if scope.function {
            self.core.late.clear();
            self.core.interrupts.clear_pending();
            *self.config.lock().unwrap_or_else(PoisonError::into_inner) = ConfigSpace::new(self.aperture);
            self.core.bus_master.store(false, Ordering::Release);
        }
        if scope.connection {
            self.disconnect_vectors();
            self.dma_unmap_all();
            if let Err(error) = self.vram().clear() {
                log::error!("gpu{}: VRAM keeps its old contents: {error}", self.index());
            }
        }
    }

    /// Puts another chaos plan in force.
    pub fn set_chaos(&self, plan: Chaos) {
        self.vram().poison(&plan);
        self.core.chaos.replace(plan);
        // Work that a dead device left behind goes on.
        self.channels.iter().for_each(Channel::kick);
    }

    /// The referee's view.
    pub fn stats(&self) -> GpuStats {
        let queued = self.channels.iter().map(|channel| channel.queued(&self.core)).sum();
        self.core.stats.snapshot(queued, self.core.faults.pending())
    }

    /// The worker of channel `index`; returns after [`Gpu::stop`].
    pub(crate) fn work(&self, index: usize) {
        self.channels[index].work(&self.core);
    }

    /// Ends the workers.
    pub(crate) fn stop(&self) {
        self.channels.iter().for_each(|channel| channel.stop(&self.core));
    }
}

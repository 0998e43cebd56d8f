//! A guest without a guest: RAM in a memory file, mapped for DMA, and the driver's half of the ring protocol.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use clap::Parser;
use hmmstorm_abi::pci::CHANNELS;
use hmmstorm_abi::regs;
use hmmstorm_abi::ring::{
    Descriptor, FENCE_ARM, FENCE_STATUS, SHADOW_EVENT, SHADOW_HEAD, SHADOW_TAIL, Status, needs_doorbell,
};
use hmmstorm_device::config::Config;
use hmmstorm_device::gpu::{Gpu, Region};
use hmmstorm_device::machine::Machine;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Where RAM begins in DMA addresses: not at 0, so that a stray small address meets nothing.
pub(crate) const RAM: u64 = 0x4000_0000;
/// Pages of RAM that rings, shadow pages and fences of [`Driver`] take: 16 a channel.
pub(crate) const RESERVED: u64 = CHANNELS as u64 * 16 * 4096;

/// How long anything may take before a test gives up. Nothing waits this long unless the device is broken.
const PATIENCE: Duration = Duration::from_secs(60);

/// GPUs, and RAM that all of them reach.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) ram: MmapRegion<()>,
    pub(crate) file: File,
}

impl Bench {
    /// GPUs by these options, with `ram` bytes of RAM mapped at [`RAM`] and bus mastering on.
    pub(crate) fn new(options: &[&str], ram: u64) -> Self {
        let bench = Self::unmapped(options, ram);
        for gpu in bench.machine.gpus() {
            bench.map(gpu, RAM, 0, ram, true);
        }
        bench
    }

    /// The same with an empty DMA map.
    pub(crate) fn unmapped(options: &[&str], ram: u64) -> Self {
        let arguments = ["hmmstorm-device", "--socket-dir", "unused", "--vram", "1M"];
        let config = Config::parse_from(arguments.iter().filter(|_| true).chain(options));
        let machine = Machine::new(&config).expect("GPUs");
        let file = memory_file(ram);
        let region = MmapRegion::from_file(
            FileOffset::new(file.try_clone().expect("a descriptor"), 0),
            ram.try_into().expect("fits"),
        );
        let bench = Self { machine, ram: region.expect("a mapping"), file };
        bench.machine.gpus().iter().for_each(|gpu| set_master(gpu, true));
        bench
    }

    /// Maps `size` bytes from `offset` in the RAM file at DMA address `address`.
    pub(crate) fn map(&self, gpu: &Gpu, address: u64, offset: u64, size: u64, writable: bool) {
        let file = self.file.try_clone().expect("a descriptor");
        gpu.dma_map(address, size, writable, Some((file, offset))).expect("a free range");
    }

    pub(crate) fn gpu(&self, index: usize) -> &Arc<Gpu> {
        &self.machine.gpus()[index]
    }

    /// Writes to RAM at this offset.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.ram.as_volatile_slice().write_slice(data, offset as usize).expect("inside RAM");
    }

    /// Reads RAM at this offset.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.ram.as_volatile_slice().read_slice(&mut data, offset as usize).expect("inside RAM");
        data
    }

    pub(crate) fn load_u32(&self, offset: u64) -> u32 {
        self.ram.as_volatile_slice().load(offset as usize, Ordering::Acquire).expect("inside RAM, aligned")
    }

    pub(crate) fn load_u64(&self, offset: u64) -> u64 {
        self.ram.as_volatile_slice().load(offset as usize, Ordering::Acquire).expect("inside RAM, aligned")
    }

    pub(crate) fn store_u32(&self, offset: u64, value: u32) {
        let slice = self.ram.as_volatile_slice();
        slice.store(value, offset as usize, Ordering::Release).expect("inside RAM, aligned");
    }
}

/// A memory file of `size` bytes.
pub(crate) fn memory_file(size: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).expect("a memory file"));
    file.set_len(size).expect("host memory");
    file
}

/// An eventfd and a second handle to it.
pub(crate) fn eventfd_pair() -> (File, File) {
    let fd: OwnedFd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
    let ours = File::from(fd);
    let theirs = ours.try_clone().expect("a descriptor");
    (ours, theirs)
}

/// How often an eventfd was signalled since the last look.
pub(crate) fn signals(mut eventfd: &File) -> u64 {
    let mut count = [0; 8];
    eventfd.read_exact(&mut count).map_or(0, |()| u64::from_ne_bytes(count))
}

pub(crate) fn read_reg(gpu: &Gpu, offset: usize) -> u32 {
    let mut data = [0; 4];
    gpu.region_read(Region::Registers, offset as u64, &mut data);
    u32::from_le_bytes(data)
}

pub(crate) fn write_reg(gpu: &Gpu, offset: usize, value: u32) {
    gpu.region_write(Region::Registers, offset as u64, &value.to_le_bytes());
}

/// Sets or clears memory space and bus mastering in the command register.
pub(crate) fn set_master(gpu: &Gpu, on: bool) {
    gpu.region_write(Region::Config, 4, &[if on { 6 } else { 0 }, 0]);
}

/// Waits until `done` gives something.
pub(crate) fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::yield_now();
    }
}

/// The driver's half of one channel. Ring, shadow page and fences lie in the first pages of RAM.
pub(crate) struct Driver<'a> {
    pub(crate) bench: &'a Bench,
    pub(crate) gpu: &'a Gpu,
    channel: usize,
    base: u64,
    dma: u64,
    order: u32,
    pub(crate) tail: u32,
}

impl<'a> Driver<'a> {
    /// Enables channel `channel` of `gpu` with a ring of 2^`order` entries.
    pub(crate) fn start(bench: &'a Bench, gpu: usize, channel: usize, order: u32) -> Self {
        Self::start_at(bench, gpu, channel, order, RAM)
    }

    /// The same with the reserved pages mapped at DMA address `dma`.
    pub(crate) fn start_at(bench: &'a Bench, gpu: usize, channel: usize, order: u32, dma: u64) -> Self {
        let base = channel as u64 * 16 * 4096;
        bench.write(base, &[0; 16 * 4096]);
        let this = Self { bench, gpu: bench.gpu(gpu), channel, base, dma, order, tail: 0 };
        this.configure();
        this.write(regs::CH_CONTROL, regs::CH_CONTROL_ENABLE);
        this
    }

    fn configure(&self) {
        let (ring, shadow) = (self.dma + self.base, self.dma + self.shadow(0));
        self.write(regs::CH_RING_LO, ring as u32);
        self.write(regs::CH_RING_HI, (ring >> 32) as u32);
        self.write(regs::CH_RING_ORDER, self.order);
        self.write(regs::CH_SHADOW_LO, shadow as u32);
        self.write(regs::CH_SHADOW_HI, (shadow >> 32) as u32);
    }

    pub(crate) fn write(&self, register: usize, value: u32) {
        write_reg(self.gpu, regs::channel_reg(self.channel, register), value);
    }

    pub(crate) fn status(&self) -> u32 {
        read_reg(self.gpu, regs::channel_reg(self.channel, regs::CH_STATUS))
    }

    /// The code of a halted channel.
    pub(crate) fn halted(&self) -> Option<Status> {
        let status = self.status();
        let code = status >> regs::CH_STATUS_CODE_SHIFT & 0xff;
        (status & regs::CH_STATUS_HALTED != 0).then(|| Status::from_u32(code).expect("a code of the ABI"))
    }

    /// Offset in RAM of a field of the shadow page.
    fn shadow(&self, field: usize) -> u64 {
        // The ring may take twelve pages: orders up to 9.
        self.base + 12 * 4096 + field as u64
    }

    /// DMA address of fence slot `slot`; there are 768.
    pub(crate) fn fence_address(&self, slot: u64) -> u64 {
        self.dma + self.fence_offset(slot)
    }

    fn fence_offset(&self, slot: u64) -> u64 {
        self.base + 13 * 4096 + slot * 16
    }

    pub(crate) fn head(&self) -> u32 {
        self.bench.load_u32(self.shadow(SHADOW_HEAD))
    }

    pub(crate) fn event(&self) -> u32 {
        self.bench.load_u32(self.shadow(SHADOW_EVENT))
    }

    /// Puts words into the next entry, unpublished.
    pub(crate) fn put(&mut self, words: [u64; 8]) {
        let entry = u64::from(self.tail % (1 << self.order));
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.bench.write(self.base + entry * 64, &bytes);
        self.tail = self.tail.wrapping_add(1);
    }

    /// Publishes everything up to the tail. Says whether the device wants a doorbell.
    pub(crate) fn publish(&self, old: u32) -> bool {
        self.bench.store_u32(self.shadow(SHADOW_TAIL), self.tail);
        fence(Ordering::SeqCst);
        needs_doorbell(self.event(), self.tail, old)
    }

    /// Stores any tail, true or not.
    pub(crate) fn publish_tail(&self, tail: u32) {
        self.bench.store_u32(self.shadow(SHADOW_TAIL), tail);
    }

    pub(crate) fn ring_doorbell(&self) {
        self.write(regs::CH_DOORBELL, self.tail);
    }

    /// Puts, publishes, and rings if the device asks for it; says whether it did.
    pub(crate) fn submit(&mut self, words: [u64; 8]) -> bool {
        let old = self.tail;
        self.put(words);
        let ring = self.publish(old);
        if ring {
            self.ring_doorbell();
        }
        ring
    }

    /// Submits with a fence in slot 0 and an interrupt, and waits for it.
    pub(crate) fn run(&mut self, descriptor: Descriptor) -> Status {
        let value = u64::from(self.tail) + 1;
        self.submit(descriptor.with_fence(self.fence_address(0), value, true).to_words());
        self.wait(0, value)
    }

    /// Waits until fence slot `slot` holds `value`.
    pub(crate) fn wait(&self, slot: u64, value: u64) -> Status {
        wait_for("a fence", || self.fence(slot, value))
    }

    /// How fence slot `slot` ended, if it holds `value`.
    pub(crate) fn fence(&self, slot: u64, value: u64) -> Option<Status> {
        (self.bench.load_u64(self.fence_offset(slot)) == value).then(|| {
            let code = self.bench.load_u32(self.fence_offset(slot) + FENCE_STATUS as u64);
            Status::from_u32(code).expect("a code of the ABI")
        })
    }

    /// Says in fence slot `slot` whether somebody sleeps until its interrupt.
    pub(crate) fn arm(&self, slot: u64, value: u32) {
        self.bench.store_u32(self.fence_offset(slot) + FENCE_ARM as u64, value);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn reset(&self) {
        self.write(regs::CH_CONTROL, regs::CH_CONTROL_RESET);
    }
}

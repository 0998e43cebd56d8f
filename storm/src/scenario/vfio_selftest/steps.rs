//! The steps, each of which stands on the ones before it and leaves the GPU as it found it.

use std::io;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hmmstorm_abi::pci::{
    BAR_REGS, BAR_REGS_SIZE, BAR_VRAM, CHANNELS, CLASS_CODE, DEVICE_ID, REVISION_ID, VECTOR_CHANNEL0,
    VECTORS, VENDOR_ID,
};
use hmmstorm_abi::regs::{
    Access, CAPS, CH_RING_HI, CH_RING_LO, CH_RING_ORDER, CH_SHADOW_HI, CH_SHADOW_LO, CH_STATUS, CHANNEL,
    CONTROL, CONTROL_RESET, Caps, GLOBAL, GPU_COUNT, GPU_INDEX, ID, ID_MAGIC, INTERFACE_VERSION, STATUS,
    STATUS_READY, VERSION, VRAM_APERTURE_HI, VRAM_APERTURE_LO, VRAM_SIZE_HI, VRAM_SIZE_LO, channel_reg,
};
use hmmstorm_abi::ring::{Descriptor, Location, SG_ENTRY_SIZE, SgEntry, Status};
use hmmstorm_abi::uapi::PAGE_SIZE;
use vmm_sys_util::eventfd::EventFd;

use super::channel::{self, Channel, ENTRIES};
use super::{Bar0, mmu};
use crate::clock::poll;
use crate::oracle::Stamp;
use crate::scenario::WorkError;
use crate::sys::memory::Mapping;
use crate::sys::vfio::{CONFIG, Dma, Function};

/// DMA address of everything that a step gives to the GPU.
const DMA: u64 = 0x4000_0000;
/// A DMA address where there is never anything.
const NOWHERE: u64 = 0x7000_0000_0000;
/// Pages that data is copied in.
const DATA: usize = 32;
/// Guest time that an interrupt may take.
pub(super) const INTERRUPT: Duration = Duration::from_secs(10);
/// Guest time in which an interrupt that should not come may come.
const SILENCE: Duration = Duration::from_millis(50);

/// What a step works on.
#[derive(Debug)]
pub(super) struct Bench<'a> {
    /// The function, on vfio-pci.
    pub(super) function: &'a Function,
    /// Of the contents.
    pub(super) seed: u64,
}

type Step = fn(&Bench<'_>) -> Result<(), WorkError>;

/// All of them.
pub(super) const STEPS: [(&str, Step); 13] = [
    ("configuration space", configuration),
    ("registers", registers),
    ("read-only registers", read_only),
    ("VRAM aperture", aperture),
    ("copies", copies),
    ("scatter lists", scatter_lists),
    ("ring wrap-around", wrap_around),
    ("interrupts", interrupts),
    ("error fences", errors),
    ("page tables", mmu::page_tables),
    ("page faults", mmu::page_faults),
    ("channel reset", channel_reset),
    ("function reset", function_reset),
];

pub(super) fn check(holds: bool, what: impl FnOnce() -> String) -> Result<(), WorkError> {
    if holds { Ok(()) } else { Err(WorkError::Condition(what())) }
}

impl<'a> Bench<'a> {
    pub(super) fn bar(&self) -> Bar0<'a> {
        Bar0(self.function)
    }

    pub(super) fn caps(&self) -> Result<Caps, WorkError> {
        Ok(Caps(self.bar().read(CAPS)?))
    }

    fn wide(&self, low: usize, high: usize) -> Result<u64, WorkError> {
        Ok(u64::from(self.bar().read(low)?) | u64::from(self.bar().read(high)?) << 32)
    }

    fn vram(&self) -> Result<u64, WorkError> {
        self.wide(VRAM_SIZE_LO, VRAM_SIZE_HI)
    }

    pub(super) fn memory(&self, pages: usize) -> Result<Mapping, WorkError> {
        Mapping::private(pages).map_err(WorkError::system("mmap of memory for the device"))
    }

    pub(super) fn map<'m>(&'m self, memory: &'m Mapping) -> Result<Dma<'m>, WorkError> {
        self.function
            .map(DMA, memory)
            .map_err(|error| WorkError::Condition(format!("VFIO_IOMMU_MAP_DMA at {DMA:#x}: {error}")))
    }

    fn stamp(&self, page: usize, generation: u64) -> Stamp {
        Stamp { seed: self.seed, page: page as u64, generation }
    }

    /// Sets the command register's memory and bus-master bits.
    fn enable(&self) -> Result<(), WorkError> {
        const COMMAND: u64 = 4;
        const MEMORY_AND_MASTER: u16 = 1 << 1 | 1 << 2;
        let access = WorkError::system("access to the command register");
        let enabled = self.function.read(CONFIG, COMMAND).and_then(|bytes| {
            let command = u16::from_le_bytes(bytes) | MEMORY_AND_MASTER;
            self.function.write(CONFIG, COMMAND, command.to_le_bytes())
        });
        enabled.map_err(access)
    }
}

fn configuration(bench: &Bench<'_>) -> Result<(), WorkError> {
    let word =
        |offset| bench.function.read(CONFIG, offset).map_err(WorkError::system("pread of the configuration"));
    let (ids, class) = (u32::from_le_bytes(word(0)?), u32::from_le_bytes(word(8)?));
    let expected = u32::from(VENDOR_ID) | u32::from(DEVICE_ID) << 16;
    check(ids == expected, || format!("ids {ids:#010x} in place of {expected:#010x}"))?;
    let expected = u32::from(REVISION_ID) | CLASS_CODE << 8;
    check(class == expected, || format!("class and revision {class:#010x} in place of {expected:#010x}"))?;
    let size = bench.function.size(BAR_REGS);
    check(size == BAR_REGS_SIZE as u64, || format!("BAR {BAR_REGS} has {size} bytes"))?;
    bench.enable()
}

fn registers(bench: &Bench<'_>) -> Result<(), WorkError> {
    let bar = bench.bar();
    for (name, register, expected) in [("ID", ID, ID_MAGIC), ("STATUS", STATUS, STATUS_READY)] {
        let found = bar.read(register)?;
        check(found == expected, || format!("{name} is {found:#x}, not {expected:#x}"))?;
    }
    let version = bar.read(VERSION)?;
    check(version >> 16 == INTERFACE_VERSION >> 16, || format!("VERSION is {version:#x}"))?;
    let caps = bench.caps()?;
    check(usize::from(caps.channels()) == CHANNELS, || format!("{} channels", caps.channels()))?;
    let (index, count) = (bar.read(GPU_INDEX)?, bar.read(GPU_COUNT)?);
    check(index < count, || format!("GPU {index} of {count}"))?;
    let (vram, aperture) = (bench.vram()?, bench.wide(VRAM_APERTURE_LO, VRAM_APERTURE_HI)?);
    check(aperture <= vram && aperture == bench.function.size(BAR_VRAM), || {
        format!("VRAM {vram:#x}, aperture {aperture:#x}, BAR {:#x}", bench.function.size(BAR_VRAM))
    })?;
    // What a stopped channel's set-up registers are told, they say; a device reset clears them.
    let told = [
        (CH_RING_LO, 0x1234_5000),
        (CH_RING_HI, 0x9),
        (CH_RING_ORDER, 7),
        (CH_SHADOW_LO, 0x6789_a000),
        (CH_SHADOW_HI, 0xb),
    ];
    for number in 0..CHANNELS {
        for (register, value) in told {
            bar.write(channel_reg(number, register), value)?;
        }
        for (register, value) in told {
            let found = bar.read(channel_reg(number, register))?;
            check(found == value, || {
                format!("channel {number}: {register:#x} is {found:#x}, not {value:#x}")
            })?;
        }
    }
    bar.write(CONTROL, CONTROL_RESET)?;
    for number in 0..CHANNELS {
        for (register, _) in told {
            let found = bar.read(channel_reg(number, register))?;
            check(found == 0, || format!("channel {number}: {register:#x} is {found:#x} after a reset"))?;
        }
    }
    Ok(())
}

/// Writes to read-only registers do nothing; where there is no register, and for accesses of a wrong width, there is 0.
fn read_only(bench: &Bench<'_>) -> Result<(), WorkError> {
    let bar = bench.bar();
    for register in GLOBAL.iter().filter(|register| register.access == Access::ReadOnly) {
        let before = bar.read(register.offset)?;
        bar.write(register.offset, !before)?;
        let after = bar.read(register.offset)?;
        check(before == after, || format!("{} went from {before:#x} to {after:#x}", register.name))?;
    }
    for register in CHANNEL.iter().filter(|register| register.access == Access::ReadOnly) {
        let offset = channel_reg(0, register.offset);
        let before = bar.read(offset)?;
        bar.write(offset, !before)?;
        let after = bar.read(offset)?;
        check(before == after, || format!("{} went from {before:#x} to {after:#x}", register.name))?;
    }
    let hole = BAR_REGS_SIZE - 4;
    bar.write(hole, u32::MAX)?;
    let found = bar.read(hole)?;
    check(found == 0, || format!("{found:#x} at {hole:#x}, where there is no register"))?;
    let narrow = bench.function.read::<1>(BAR_REGS, ID as u64);
    let narrow = narrow.map_err(WorkError::system("pread of one byte of a register"))?;
    check(narrow == [0], || format!("a read of one byte of ID gives {narrow:?}"))
}

/// What is written through the mapping is there by mapping and by system call; first, middle and last page.
fn aperture(bench: &Bench<'_>) -> Result<(), WorkError> {
    let window = bench.function.window(BAR_VRAM).map_err(WorkError::system("mmap of the VRAM aperture"))?;
    let last = window.pages() - 1;
    let pages = [0, 1, last / 2, last];
    for page in pages {
        bench.stamp(page, 1).write(window.page(page));
    }
    for page in pages {
        bench
            .stamp(page, 1)
            .check(window.page(page))
            .map_err(WorkError::seen("read through the mapped aperture"))?;
        let bytes: [u8; PAGE_SIZE] = bench
            .function
            .read(BAR_VRAM, (page * PAGE_SIZE) as u64)
            .map_err(WorkError::system("pread of the VRAM aperture"))?;
        let copy = bench.memory(1)?;
        for (cell, word) in copy.page(0).iter().zip(bytes.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(word);
            cell.store(u64::from_ne_bytes(eight), Relaxed);
        }
        bench.stamp(page, 1).check(copy.page(0)).map_err(WorkError::seen("read by pread of the aperture"))?;
    }
    Ok(())
}

/// RAM to VRAM, VRAM to VRAM, VRAM to RAM, at any alignment; a fill.
fn copies(bench: &Bench<'_>) -> Result<(), WorkError> {
    let window = bench.function.window(BAR_VRAM).map_err(WorkError::system("mmap of the VRAM aperture"))?;
    let memory = bench.memory(channel::PAGES + 2 * DATA)?;
    let dma = bench.map(&memory)?;
    let mut gpu = Channel::start(bench.bar(), 0, &dma, 0)?;
    let (source, target) = (channel::PAGES, channel::PAGES + DATA);
    let length = (DATA * PAGE_SIZE) as u64;
    for page in 0..DATA {
        bench.stamp(page, 2).write(memory.page(source + page));
    }
    gpu.run(Descriptor::copy(Location::system(dma.page(source)), Location::vram(0), length), Status::Ok)?;
    for page in 0..DATA {
        let copied = bench.stamp(page, 2).check(window.page(page));
        copied.map_err(WorkError::seen("copied to VRAM, read through the aperture"))?;
    }
    // To the end of VRAM, which the aperture need not show, and by an odd way.
    let far = bench.vram()? - length;
    gpu.run(Descriptor::copy(Location::vram(0), Location::vram(far), length), Status::Ok)?;
    let back = |from: u64, to: u64, bytes: u64| {
        Descriptor::copy(Location::vram(far + from), Location::system(dma.page(target) + to), bytes)
    };
    gpu.run(back(0, 0, 1), Status::Ok)?;
    gpu.run(back(1, 1, 4094), Status::Ok)?;
    gpu.run(back(4095, 4095, length - 4095), Status::Ok)?;
    for page in 0..DATA {
        let copied = bench.stamp(page, 2).check(memory.page(target + page));
        copied.map_err(WorkError::seen("copied from VRAM"))?;
    }
    let pattern = 0x0123_4567_89ab_cdef;
    gpu.run(Descriptor::fill(Location::vram(0), PAGE_SIZE as u64, pattern), Status::Ok)?;
    let filled = window.page(0).iter().filter(|cell| cell.load(Relaxed) == pattern).count();
    check(filled == PAGE_SIZE / 8, || format!("{filled} of {} words are filled", PAGE_SIZE / 8))?;
    gpu.reset()
}

/// A list that reverses the order of pages, there and back.
fn scatter_lists(bench: &Bench<'_>) -> Result<(), WorkError> {
    let memory = bench.memory(channel::PAGES + DATA + 2)?;
    let dma = bench.map(&memory)?;
    let mut gpu = Channel::start(bench.bar(), 1, &dma, 0)?;
    let data = channel::PAGES;
    let (up, down) = (data + DATA, data + DATA + 1);
    for page in 0..DATA {
        bench.stamp(page, 3).write(memory.page(data + page));
        let ram = Location::system(dma.page(data + page));
        let vram = Location::vram(((DATA - 1 - page) * PAGE_SIZE) as u64);
        let forward = SgEntry { src: ram, dst: vram, length: PAGE_SIZE as u32 };
        let back = SgEntry { src: vram, dst: ram, length: PAGE_SIZE as u32 };
        for (list, entry) in [(up, forward), (down, back)] {
            let cells = &memory.page(list)[page * SG_ENTRY_SIZE / 8..];
            for (cell, word) in cells.iter().zip(entry.to_words()) {
                cell.store(word, Relaxed);
            }
        }
    }
    gpu.run(Descriptor::copy_list(dma.page(up), DATA as u32), Status::Ok)?;
    for page in 0..DATA {
        for cell in memory.page(data + page) {
            cell.store(0, Relaxed);
        }
    }
    gpu.run(Descriptor::copy_list(dma.page(down), DATA as u32), Status::Ok)?;
    for page in 0..DATA {
        let copied = bench.stamp(page, 3).check(memory.page(data + page));
        copied.map_err(WorkError::seen("through VRAM by two scatter lists"))?;
    }
    gpu.reset()
}

/// More descriptors than the ring has entries, on every channel in turn; fences come in order.
fn wrap_around(bench: &Bench<'_>) -> Result<(), WorkError> {
    let memory = bench.memory(CHANNELS * channel::PAGES)?;
    let dma = bench.map(&memory)?;
    let mut channels = (0..CHANNELS)
        .map(|number| Channel::start(bench.bar(), number, &dma, number * channel::PAGES))
        .collect::<Result<Vec<_>, _>>()?;
    for _ in 0..3 {
        let mut last = Vec::new();
        for gpu in &mut channels {
            let mut value = 0;
            for _ in 0..ENTRIES {
                value = gpu.submit(Descriptor::NOP, false)?;
            }
            last.push(value);
        }
        for (gpu, value) in channels.iter().zip(last) {
            gpu.ended(value, Status::Ok, "the last of a full ring")?;
            // Head follows the fence.
            let consumed = poll(INTERRUPT, || (u64::from(gpu.head()) == value).then_some(()));
            check(consumed.is_some(), || format!("head is {} after {value} descriptors", gpu.head()))?;
        }
    }
    channels.iter().try_for_each(Channel::reset)
}

/// Each channel's interrupt arrives at its own vector, and nowhere else.
fn interrupts(bench: &Bench<'_>) -> Result<(), WorkError> {
    let synchronous = bench.caps()?.synchronous();
    let vectors =
        bench.function.enable_msix(VECTORS).map_err(WorkError::system("VFIO_DEVICE_SET_IRQS (MSI-X)"))?;
    let memory = bench.memory(CHANNELS * channel::PAGES)?;
    let dma = bench.map(&memory)?;
    for number in 0..CHANNELS {
        let mut gpu = Channel::start(bench.bar(), number, &dma, number * channel::PAGES)?;
        let silent = gpu.submit(Descriptor::NOP, false)?;
        gpu.ended(silent, Status::Ok, "a descriptor without interrupt")?;
        let loud = gpu.submit(Descriptor::NOP, true)?;
        gpu.ended(loud, Status::Ok, "a descriptor with interrupt")?;
        let own = usize::from(VECTOR_CHANNEL0) + number;
        if synchronous {
            check(poll(SILENCE, || rang(&vectors[own])).is_none(), || {
                format!("a synchronous device sent an interrupt on vector {own}")
            })?;
        } else {
            check(poll(INTERRUPT, || rang(&vectors[own])).is_some(), || {
                format!("no interrupt on vector {own} after {} s", INTERRUPT.as_secs())
            })?;
        }
        for (vector, event) in vectors.iter().enumerate().filter(|&(vector, _)| vector != own) {
            check(rang(event).is_none(), || format!("channel {number} rang vector {vector}"))?;
        }
        gpu.reset()?;
    }
    bench.function.disable_msix().map_err(WorkError::system("VFIO_DEVICE_SET_IRQS (off)"))
}

/// Whether the eventfd was written since it was last asked.
pub(super) fn rang(event: &EventFd) -> Option<()> {
    match event.read() {
        Ok(_) => Some(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        // Not to be taken for silence.
        Err(_) => Some(()),
    }
}

/// What cannot be done ends in an error fence, nothing is moved, and the channel goes on.
fn errors(bench: &Bench<'_>) -> Result<(), WorkError> {
    let memory = bench.memory(channel::PAGES + 1)?;
    let dma = bench.map(&memory)?;
    let mut gpu = Channel::start(bench.bar(), 2, &dma, 0)?;
    let data = Location::system(dma.page(channel::PAGES));
    bench.stamp(0, 4).write(memory.page(channel::PAGES));
    let page = PAGE_SIZE as u64;
    let end = Location::vram(bench.vram()? - page / 2);
    let nobody = Location::peer(15, 0);
    for (descriptor, expected) in [
        (Descriptor::copy(end, data, page), Status::BadAddress),
        (Descriptor::copy(nobody, data, page), Status::BadAddress),
        (Descriptor::copy(Location::system(NOWHERE), data, page), Status::DmaFault),
        (Descriptor::copy(data, Location::system(NOWHERE), page), Status::DmaFault),
        (Descriptor::fill(data, 12, 0), Status::BadDescriptor),
        (Descriptor::copy_list(dma.page(channel::PAGES), u32::MAX), Status::BadList),
        (Descriptor::copy_list(NOWHERE, 1), Status::BadList),
    ] {
        gpu.run(descriptor, expected)?;
    }
    let (slot, value) = gpu.next_fence();
    let mut words = Descriptor::NOP.with_fence(slot, value, false).to_words();
    words[0] |= 0xff;
    gpu.publish(words)?;
    gpu.ended(value, Status::BadDescriptor, "opcode 0xff")?;
    bench
        .stamp(0, 4)
        .check(memory.page(channel::PAGES))
        .map_err(WorkError::seen("after descriptors that must not move anything"))?;
    gpu.run(Descriptor::NOP, Status::Ok)?;
    gpu.reset()?;
    // The IOMMU's mapping ends with the guard; from then on there is nothing for the GPU either.
    let old = dma.page(channel::PAGES);
    drop(dma);
    let memory = bench.memory(channel::PAGES)?;
    let other = bench
        .function
        .map(DMA << 1, &memory)
        .map_err(|error| WorkError::Condition(format!("VFIO_IOMMU_MAP_DMA: {error}")))?;
    let mut gpu = Channel::start(bench.bar(), 2, &other, 0)?;
    gpu.run(Descriptor::copy(Location::vram(0), Location::system(old), page), Status::DmaFault)?;
    gpu.reset()
}

/// A reset ends what is queued with `Aborted`, in order and before it is answered; then the channel can start again.
fn channel_reset(bench: &Bench<'_>) -> Result<(), WorkError> {
    const MEGABYTES: u64 = 4;
    let memory = bench.memory(channel::PAGES)?;
    let dma = bench.map(&memory)?;
    let mut gpu = Channel::start(bench.bar(), 3, &dma, 0)?;
    let half = bench.vram()? / 2;
    let length = half.min(MEGABYTES << 20);
    let copy = Descriptor::copy(Location::vram(0), Location::vram(half), length);
    let values = (0..ENTRIES).map(|_| gpu.submit(copy, false)).collect::<Result<Vec<_>, _>>()?;
    gpu.reset()?;
    let status = gpu.status()?;
    check(status == 0, || format!("CH_STATUS is {status:#x} after a reset"))?;
    let mut aborted = None;
    for value in values {
        match (gpu.wait(value)?, aborted) {
            (Status::Ok, None) => {}
            (Status::Aborted, _) => aborted = aborted.or(Some(value)),
            (status, _) => {
                return Err(WorkError::Condition(format!(
                    "fence {value} ended as {status:?}, the first aborted one was {aborted:?}"
                )));
            }
        }
    }
    let mut again = Channel::start(bench.bar(), 3, &dma, 0)?;
    again.run(Descriptor::NOP, Status::Ok)?;
    again.reset()
}

/// A reset of the function drops what is queued and clears the registers; VRAM stays.
fn function_reset(bench: &Bench<'_>) -> Result<(), WorkError> {
    let window = bench.function.window(BAR_VRAM).map_err(WorkError::system("mmap of the VRAM aperture"))?;
    bench.stamp(1, 5).write(window.page(1));
    let memory = bench.memory(channel::PAGES)?;
    let dma = bench.map(&memory)?;
    Channel::start(bench.bar(), 0, &dma, 0)?;
    // The kernel zaps mappings of BARs for the time of the reset.
    bench.function.reset();
    bench.enable()?;
    let status = bench.bar().read(channel_reg(0, CH_STATUS))?;
    check(status == 0, || format!("CH_STATUS is {status:#x} after a reset of the function"))?;
    let ready = bench.bar().read(STATUS)?;
    check(ready == STATUS_READY, || format!("STATUS is {ready:#x} after a reset of the function"))?;
    bench
        .stamp(1, 5)
        .check(window.page(1))
        .map_err(WorkError::seen("in VRAM after a reset of the function"))?;
    let mut again = Channel::start(bench.bar(), 0, &dma, 0)?;
    again.run(Descriptor::NOP, Status::Ok)?;
    again.reset()
}

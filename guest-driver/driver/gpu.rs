// SPDX-License-Identifier: GPL-2.0

//! One GPU: what its hardware, its VRAM and its counters are, and who may use them when.
//!
//! # Lock order
//!
//! From the outside in; see `docs/driver.md` for the whole story.
//!
//! 1. `mmap_lock` (read), taken by ioctls and by page faults;
//! 2. folio locks, taken by the kernel's migration code and by `do_swap_page()` before `migrate_to_ram`;
//! 3. the notifier mutex of a [`crate::mirror::Mirror`];
//! 4. a channel's slot ([`crate::channel`], bounded wait), then its ring mutex;
//! 5. the VRAM spinlock, which `folio_free` takes under a page-table lock.
//!
//! Nothing from 2 on allocates memory in a way that could start reclaim.
//!
//! # Teardown
//!
//! `unbind` runs while everything works: it closes the ioctl gate and waits for those inside ([`Gpu::close`]), then moves
//! every page off the device, which needs the copy engine, as do the CPU faults that still come in. Then devres takes
//! down, last made first: the device node, the pagemap, the use of the hardware ([`Stop`]: fault gate, reset), the
//! interrupts and the DMA memory of the channels, the vectors, the BAR. A file that is still open keeps a [`Gpu`] that
//! answers `ENODEV`; `fops.owner` keeps the module.

use core::{
    cmp,
    ops::Deref, //
};

use kernel::{
    c_str,
    device::{
        Bound,
        Device, //
    },
    devres::{
        self,
        Devres, //
    },
    fmt,
    pci,
    prelude::*,
    sizes::SZ_1M,
    sync::{
        aref::ARef,
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc, //
    },
    workqueue::{
        OwnedQueue,
        Placement, //
    }, //
};

use crate::{
    abi::{
        mmu::ADDRESS_SPACES,
        pci::CHANNELS,
        regs::{
            ID_MAGIC,
            INTERFACE_VERSION, //
        },
        uapi::{
            self,
            PAGE_SIZE, //
        },
    },
    channel::Channel,
    engine::{
        Hardware,
        COPY_CHANNELS, //
    },
    fault::FaultBuffer,
    gate::{
        Gate,
        Inside, //
    },
    irq,
    refuse::Refusal,
    registry::{
        JobChannels,
        Spaces, //
    },
    regs::{
        Bar0,
        Regs, //
    },
    selftest,
    space::Space,
    stats::Stats,
    to_ram::Around,
    vram::{
        Vram,
        CHUNK_PAGES, //
    }, //
};

/// What a device says about itself.
#[derive(Clone, Copy)]
struct Identity {
    index: u8,
    channels: usize,
    spaces: usize,
    synchronous: bool,
    gpus: u8,
    vram_pages: usize,
    /// Of these, from the beginning, coherent memory.
    coherent_pages: usize,
}

/// One GPU. Outlives the binding of the driver as long as files are open; a [`Session`] proves that it is bound.
#[pin_data]
pub(crate) struct Gpu {
    /// Position among the GPUs of the device process; the number of its node, and its address as a peer.
    pub(crate) index: u8,
    /// The allocator of its private memory.
    #[pin]
    pub(crate) vram: Vram,
    /// The allocator of its coherent memory, which may be none.
    #[pin]
    pub(crate) coherent: Vram,
    /// Its counters.
    pub(crate) stats: Arc<Stats>,
    /// Its address spaces.
    #[pin]
    pub(crate) spaces: Spaces,
    /// The channels on which access jobs run.
    #[pin]
    pub(crate) job_channels: JobChannels,
    /// CPU faults that it does not serve.
    pub(crate) refusal: Refusal,
    /// How much a CPU fault brings back.
    pub(crate) around: Around,
    identity: Identity,
    dev: ARef<Device>,
    bar: Arc<Devres<Bar0>>,
    hardware: Devres<Hardware>,
    /// Passed by every ioctl.
    #[pin]
    ioctls: Gate,
    /// Passed by whatever must go on until the device's memory is empty.
    #[pin]
    faults: Gate,
    /// For taking turns among channels.
    turn: Atomic<u32>,
    /// 1 once access jobs are over, because the device does not do as it is told.
    wedged: Atomic<u32>,
}

/// A GPU in use: its hardware works as long as this lives.
pub(crate) struct Session<'a> {
    gpu: &'a Gpu,
    dev: &'a Device<Bound>,
    regs: Regs<'a>,
    hardware: &'a Hardware,
    _inside: Inside<'a>,
}

impl Gpu {
    /// Brings the device up: identifies and resets it, starts its channels, and proves that they work.
    ///
    /// `coherent` bytes of its VRAM are to be coherent memory; `around` says how much a CPU fault brings back.
    ///
    /// # Errors
    ///
    /// `ENODEV` if this is not a device that the driver can use, `EIO` if it does not work, `EINVAL` if it has not so much
    /// memory that the CPU reaches, all with a message; errors of the resources that it needs.
    pub(crate) fn new(
        pdev: &pci::Device<Bound>,
        bar: Arc<Devres<Bar0>>,
        coherent: u64,
        around: Around,
    ) -> Result<Arc<Self>> {
        let dev = pdev.as_ref();
        let regs = Regs::new(bar.access(dev)?);
        let identity = Identity::read(dev, regs)?.with_coherent(dev, regs, coherent)?;
        let stats = Arc::new(Stats::new(), GFP_KERNEL)?;

        regs.reset()
            .inspect_err(|_| dev_err!(dev, "the device is not ready after a reset\n"))?;

        let mut channels = KVec::with_capacity(identity.channels, GFP_KERNEL)?;
        for index in 0..identity.channels {
            channels.push(
                Channel::new(dev, index, identity.synchronous, stats.clone())?,
                GFP_KERNEL,
            )?;
        }
        let faults = FaultBuffer::new(dev, stats.clone())?;
        let irqs = irq::request(pdev, &channels, &faults)?;
        let hardware = Hardware {
            irqs,
            jobs: OwnedQueue::new(c_str!("hsgpu-jobs"), Placement::Unbound)?,
            service: OwnedQueue::new(c_str!("hsgpu-faults"), Placement::UnboundHighpri)?,
            channels,
            faults,
        };
        let hardware = Devres::new(dev, Ok::<_, Error>(hardware))?;

        let gpu = Arc::pin_init(
            try_pin_init!(Self {
                index: identity.index,
                vram <- Vram::new(
                    identity.coherent_pages,
                    identity.vram_pages - identity.coherent_pages,
                ),
                coherent <- Vram::new(0, identity.coherent_pages),
                stats,
                spaces <- Spaces::new(identity.spaces)?,
                job_channels <- JobChannels::new(COPY_CHANNELS..identity.channels),
                refusal: Refusal::new(),
                around,
                identity,
                dev: dev.into(),
                bar,
                hardware,
                ioctls <- Gate::new(),
                faults <- Gate::new(),
                turn: Atomic::new(0),
                wedged: Atomic::new(0),
            }),
            GFP_KERNEL,
        )?;
        // From here on the device is reset before any of its memory is freed, also if a later step fails.
        devres::register(dev, Stop(gpu.clone()), GFP_KERNEL)?;

        let session = gpu.enter()?;
        for (index, channel) in session.hardware.channels.iter().enumerate() {
            let regs = session.regs.channel(index)?;

            channel.start(regs).inspect_err(|_| {
                dev_err!(dev, "channel {} does not start: {}\n", index, regs.status())
            })?;
        }
        if identity.spaces != 0 {
            session
                .faults()
                .enable(session.regs)
                .inspect_err(|_| dev_err!(dev, "the fault buffer does not start\n"))?;
        }
        session.hardware.faults.start(gpu.clone());
        selftest::run(&session, identity.synchronous)?;
        drop(session);
        Ok(gpu)
    }

    /// Begins an ioctl. Unbinding waits until the session ends.
    ///
    /// # Errors
    ///
    /// `ENODEV` once unbinding has begun.
    pub(crate) fn enter(&self) -> Result<Session<'_>> {
        self.session(&self.ioctls)
    }

    /// Begins what must work until no page is left on the device: `migrate_to_ram`, and eviction itself.
    ///
    /// # Errors
    ///
    /// `ENODEV` once eviction is over.
    pub(crate) fn enter_fault(&self) -> Result<Session<'_>> {
        self.session(&self.faults)
    }

    /// Lets no more ioctls in, ends every job, and waits for the ioctls that run.
    pub(crate) fn close(&self) {
        self.ioctls.close();
        // Ioctls may wait for jobs, and the one that was just being made may be a space of its own.
        self.kill_spaces();
        self.ioctls.wait_empty();
        self.kill_spaces();
    }

    fn kill_spaces(&self) {
        if let Ok(session) = self.enter_fault() {
            for asid in 0..self.identity.spaces {
                if let Some(space) = self.spaces.get(asid) {
                    space.kill(&session);
                }
            }
        }
    }

    /// Number of the node of its private memory.
    pub(crate) fn private_node(&self) -> u8 {
        self.index
    }

    /// Number of the node of its coherent memory: after those of the private memory of all GPUs, and where
    /// `tools/testing/selftests/mm/hmm-tests.c` looks for it.
    pub(crate) fn coherent_node(&self) -> u8 {
        cmp::max(self.identity.gpus, 2).saturating_add(self.index)
    }

    fn session<'a>(&'a self, gate: &'a Gate) -> Result<Session<'a>> {
        let inside = gate.enter().ok_or(ENODEV)?;
        // SAFETY: The gate is open, and `Stop` closes it and waits for `inside` before the device is unbound. The
        // reference is given away only for as long as the session lives, which holds `inside`.
        let dev = unsafe { self.dev.as_bound() };

        Ok(Session {
            gpu: self,
            dev,
            regs: Regs::new(self.bar.access(dev)?),
            hardware: self.hardware.access(dev)?,
            _inside: inside,
        })
    }

    /// The counters as `HSGPU_STATS` gives them.
    pub(crate) fn stats_snapshot(&self) -> uapi::Stats {
        let mut stats = uapi::Stats {
            // CAST: `usize` has 64 bits.
            vram_pages: self.vram.pages() as u64,
            vram_free: self.vram.free_pages() as u64,
            coherent_pages: self.coherent.pages() as u64,
            coherent_free: self.coherent.free_pages() as u64,
            flags: u64::from(self.identity.synchronous),
            ..Default::default()
        };

        self.stats.store(&mut stats);
        stats
    }
}

impl Session<'_> {
    /// The bound device, for DMA mappings.
    pub(crate) fn device(&self) -> &Device<Bound> {
        self.dev
    }

    /// The registers.
    pub(crate) fn regs(&self) -> Regs<'_> {
        self.regs
    }

    /// The channels.
    pub(crate) fn channels(&self) -> &[Arc<Channel>] {
        &self.hardware.channels
    }

    /// The address space `asid`, if it is in use.
    pub(crate) fn space(&self, asid: usize) -> Option<Arc<Space>> {
        self.gpu.spaces.get(asid)
    }

    /// All address spaces.
    pub(crate) fn spaces(&self) -> &Spaces {
        &self.gpu.spaces
    }

    /// The fault buffer.
    pub(crate) fn faults(&self) -> &FaultBuffer {
        &self.hardware.faults
    }

    /// Has every stalled job look again, and fault again if need be.
    pub(crate) fn ask_replay(&self) {
        self.stats.replays.inc();
        self.regs.replay_faults();
    }

    /// Where access jobs wait for their end.
    pub(crate) fn job_queue(&self) -> &OwnedQueue {
        &self.hardware.jobs
    }

    /// Where faults of the GPU are served.
    pub(crate) fn service_queue(&self) -> &OwnedQueue {
        &self.hardware.service
    }

    /// Whether a doorbell returns with the work done.
    pub(crate) fn is_synchronous(&self) -> bool {
        self.gpu.identity.synchronous
    }

    /// Notes that there are no access jobs any more. Returns whether there were until now.
    pub(crate) fn set_wedged(&self) -> bool {
        self.gpu.wedged.fetch_add(1, Relaxed) == 0
    }

    /// A number that grows, for taking turns.
    pub(crate) fn turn(&self) -> u32 {
        self.gpu.turn.fetch_add(1, Relaxed)
    }
}

impl Deref for Session<'_> {
    type Target = Gpu;

    fn deref(&self) -> &Gpu {
        self.gpu
    }
}

/// The end of the use of the hardware: registered with the device after everything that it stops, so that devres drops
/// it first.
struct Stop(Arc<Gpu>);

impl Drop for Stop {
    fn drop(&mut self) {
        let gpu = &self.0;

        gpu.close();
        gpu.faults.close();
        gpu.faults.wait_empty();
        // Stopping it sleeps, which must not be done with the guard of the access: that is a section of RCU.
        let faults = gpu
            .hardware
            .try_access()
            .map(|hardware| hardware.faults.clone());
        if let Some(faults) = faults {
            faults.stop();
        }
        // Nothing is in flight any more, but the channels still read their shadow pages.
        let reset = gpu.bar.try_access().map(|bar| Regs::new(&bar).reset());
        if !matches!(reset, Some(Ok(()))) {
            dev_err!(
                &gpu.dev,
                "no answer to the final reset; the device is taken for dead\n"
            );
        }
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "gpu{}: {} MiB VRAM ({} MiB coherent), {} channels, {}",
            self.identity.index,
            self.identity.vram_pages / (SZ_1M / PAGE_SIZE),
            self.identity.coherent_pages / (SZ_1M / PAGE_SIZE),
            self.identity.channels,
            if self.identity.synchronous {
                "synchronous"
            } else {
                "threaded"
            }
        )
    }
}

impl Identity {
    fn read(dev: &Device, regs: Regs<'_>) -> Result<Self> {
        let id = regs.id();
        if id != ID_MAGIC {
            dev_err!(
                dev,
                "not an hsgpu: ID {:#010x}, not {:#010x}\n",
                id,
                ID_MAGIC
            );
            return Err(ENODEV);
        }

        // A device of the same major version only adds to what this driver knows.
        let version = regs.version();
        if version >> 16 != INTERFACE_VERSION >> 16 || version < INTERFACE_VERSION {
            dev_err!(
                dev,
                "interface version {}.{} of the device, {}.{} of the driver: build both from one tree\n",
                version >> 16,
                version & 0xffff,
                INTERFACE_VERSION >> 16,
                INTERFACE_VERSION & 0xffff
            );
            return Err(ENODEV);
        }

        let caps = regs.caps();
        // This driver has vectors for so many.
        let channels = usize::from(caps.channels()).min(CHANNELS);
        if channels == 0 {
            dev_err!(dev, "the device has no channels\n");
            return Err(ENODEV);
        }

        let vram_pages = usize::try_from(regs.vram_size())? / PAGE_SIZE / CHUNK_PAGES * CHUNK_PAGES;
        if vram_pages == 0 {
            dev_err!(dev, "VRAM of {} bytes is too small\n", regs.vram_size());
            return Err(ENODEV);
        }

        let index = regs.gpu_index();
        Ok(Self {
            index: u8::try_from(index)
                .inspect_err(|_| dev_err!(dev, "GPU index {} out of range\n", index))?,
            channels,
            spaces: usize::from(caps.spaces()).min(ADDRESS_SPACES),
            synchronous: caps.synchronous(),
            gpus: u8::try_from(regs.gpu_count()).unwrap_or(u8::MAX),
            vram_pages,
            coherent_pages: 0,
        })
    }

    /// The same with `size` bytes of coherent memory, rounded up to whole chunks.
    fn with_coherent(mut self, dev: &Device, regs: Regs<'_>, size: u64) -> Result<Self> {
        let chunk = CHUNK_PAGES * PAGE_SIZE;
        let chunks = usize::try_from(size)?.div_ceil(chunk);
        let aperture = usize::try_from(regs.vram_aperture())? / chunk;

        // Private memory is not optional: the node of it is where user space expects it.
        if chunks > aperture || chunks * CHUNK_PAGES >= self.vram_pages {
            dev_err!(
                dev,
                "coherent_mib asks for {} MiB, but BAR 2 shows {} of {} MiB VRAM, of which some must stay private\n",
                size / (SZ_1M as u64),
                regs.vram_aperture() / (SZ_1M as u64),
                self.vram_pages / (SZ_1M / PAGE_SIZE)
            );
            return Err(EINVAL);
        }
        self.coherent_pages = chunks * CHUNK_PAGES;
        Ok(self)
    }
}

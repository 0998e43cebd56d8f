// SPDX-License-Identifier: GPL-2.0

//! The device nodes `/dev/hmm_dmirror<n>` and their ioctls, one node for each part of the memory of each GPU.

use kernel::{
    alloc::flags::{
        __GFP_ZERO, //
        GFP_KERNEL_ACCOUNT,
    },
    c_str,
    current,
    devres::Devres,
    fs::File,
    miscdevice::{
        MiscDevice,
        MiscDeviceOptions,
        MiscDeviceRegistration, //
    },
    mm::{
        pagemap::Kind,
        virt::VmaNew, //
    },
    new_mutex,
    page::Page,
    prelude::*,
    str::CStr,
    sync::{
        poll::PollTable,
        Arc,
        Mutex, //
    },
    time::{
        delay::fsleep,
        Delta,
        Instant,
        Monotonic, //
    },
    ThisModule, //
};

use crate::{
    abi::uapi::{
        self,
        PAGE_SIZE, //
    },
    gpu::{
        Gpu,
        Session, //
    },
    hold,
    mirror::{
        user_range,
        Mirror, //
    },
    pagemap::VramPagemap,
    peer,
    space::Space,
    uapi::Command, //
};

/// How long `HSGPU_EVICT` tries, and how long it waits in between for those who hold what is left.
const EVICT_LIMIT: Delta = Delta::from_millis(10_000);
const EVICT_PAUSE: Delta = Delta::from_millis(1);

/// Names of the nodes, by number.
const NAMES: [&CStr; 16] = [
    c_str!("hmm_dmirror0"),
    c_str!("hmm_dmirror1"),
    c_str!("hmm_dmirror2"),
    c_str!("hmm_dmirror3"),
    c_str!("hmm_dmirror4"),
    c_str!("hmm_dmirror5"),
    c_str!("hmm_dmirror6"),
    c_str!("hmm_dmirror7"),
    c_str!("hmm_dmirror8"),
    c_str!("hmm_dmirror9"),
    c_str!("hmm_dmirror10"),
    c_str!("hmm_dmirror11"),
    c_str!("hmm_dmirror12"),
    c_str!("hmm_dmirror13"),
    c_str!("hmm_dmirror14"),
    c_str!("hmm_dmirror15"),
];

/// What is behind a device node: a GPU and a part of its memory.
pub(crate) struct Node {
    pub(crate) gpu: Arc<Gpu>,
    pagemap: Devres<VramPagemap>,
    number: u8,
}

impl Node {
    /// Puts the two together, for node `number`.
    pub(crate) fn new(
        gpu: Arc<Gpu>,
        pagemap: Devres<VramPagemap>,
        number: u8,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                gpu,
                pagemap,
                number,
            },
            GFP_KERNEL,
        )?)
    }

    /// The number of the node.
    pub(crate) fn number(&self) -> u8 {
        self.number
    }

    /// Registers `/dev/hmm_dmirror<n>`.
    ///
    /// # Errors
    ///
    /// `ENODEV` if there is no name for this number; errors of the registration, among them `EEXIST` if the name
    /// is taken.
    pub(crate) fn register(
        self: Arc<Self>,
    ) -> Result<impl PinInit<MiscDeviceRegistration<OpenFile>, Error>> {
        let name = *NAMES.get(usize::from(self.number)).ok_or(ENODEV)?;

        Ok(MiscDeviceRegistration::register(
            MiscDeviceOptions { name },
            Ok::<_, Error>(self),
        ))
    }

    /// The memory.
    ///
    /// # Errors
    ///
    /// `ENODEV` once it is unregistered.
    pub(crate) fn pagemap<'a>(&'a self, session: &'a Session<'_>) -> Result<&'a VramPagemap> {
        self.pagemap.access(session.device())
    }

    /// For unbinding: ends the use by ioctls, of all nodes of the GPU, and moves every page of this part off the device.
    /// What the device does not give back is lost, and an error for who touches it.
    pub(crate) fn shut_down(self: &Arc<Self>) {
        peer::remove(self);
        self.gpu.close();

        let evicted = self
            .gpu
            .enter_fault()
            .and_then(|session| self.pagemap.access(session.device())?.give_up(&session));
        if let Err(error) = evicted {
            pr_err!(
                "gpu{}: not all of the VRAM of node {} could be evicted: {:?}\n",
                self.gpu.index,
                self.number,
                error
            );
        }
    }
}

/// An open file: a mirror of the address space of who opened it.
pub(crate) struct OpenFile {
    node: Arc<Node>,
    mirror: Arc<Mirror>,
    /// The address space of the GPU, once there was a job. Locked before anything else, and not in page faults.
    space: Pin<KBox<Mutex<Option<Arc<Space>>>>>,
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = KBox<Self>;
    type RegistrationData = Arc<Node>;
    const OWNER: &'static ThisModule = &crate::THIS_MODULE;

    fn open(_file: &File, misc: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        let node = misc.data().clone();
        let session = node.gpu.enter()?;
        let mirror = Mirror::open(&node.gpu)?;

        drop(session);
        Ok(KBox::new(
            Self {
                node,
                mirror,
                space: KBox::pin_init(new_mutex!(None, "hsgpu::file::space"), GFP_KERNEL)?,
            },
            GFP_KERNEL,
        )?)
    }

    fn poll(this: &Self, file: &File, table: &PollTable<'_>) -> u32 {
        let space = this.space.lock().clone();

        space.map_or(0, |space| space.poll(file, table))
    }

    /// Maps pages of the kernel's own, zeroed, as `lib/test_hmm` does: something that a device can look at and that is no
    /// memory of the process.
    fn mmap(_this: &Self, _file: &File, vma: &VmaNew) -> Result {
        let area = vma.set_mixedmap();

        for addr in (vma.start()..vma.end()).step_by(PAGE_SIZE) {
            let page = Page::alloc_page(GFP_KERNEL_ACCOUNT | __GFP_ZERO)?;

            // The mapping has a reference of its own.
            area.vm_insert_page(addr, &page)?;
        }
        Ok(())
    }

    fn ioctl(this: &Self, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let session = this.node.gpu.enter()?;
        let pagemap = this.node.pagemap.access(session.device())?;

        match cmd {
            uapi::HMM_DMIRROR_READ..=uapi::HMM_DMIRROR_FLAGS => {
                let mut command = uapi::DmirrorCmd::read(arg)?;

                this.dmirror(&session, pagemap, cmd, &mut command)?;
                command.write(arg)?;
            }
            uapi::HSGPU_MIGRATE => {
                let mut command = uapi::Migrate::read(arg)?;

                // What was done before an error counts, too.
                let result = this.mirror.migrate(&session, pagemap, &mut command);
                command.write(arg)?;
                result?;
            }
            uapi::HSGPU_ACCESS => {
                let mut command = uapi::Access::read(arg)?;

                let result = this.mirror.access(&session, pagemap, &mut command);
                command.write(arg)?;
                result?;
            }
            uapi::HSGPU_SUBMIT => {
                let mut command = uapi::Submit::read(arg)?;

                this.space(&session)?.submit(&session, &mut command)?;
                command.write(arg)?;
            }
            uapi::HSGPU_WAIT => {
                let mut command = uapi::Wait::read(arg)?;

                // Without a space there was no job.
                let space = this.space.lock().clone().ok_or(ENOENT)?;
                space.wait(&mut command)?;
                command.write(arg)?;
            }
            uapi::HSGPU_POLICY => {
                this.space(&session)?
                    .set_policy(&uapi::Policy::read(arg)?)?;
            }
            uapi::HSGPU_EVICT => {
                let mut command = uapi::Evict::read(arg)?;

                let result = this.evict(&session, pagemap, &mut command);
                command.write(arg)?;
                result?;
            }
            uapi::HSGPU_PEER_MIGRATE => {
                let mut command = uapi::PeerMigrate::read(arg)?;

                let result = peer::migrate(&session, pagemap, this.mirror.mm(), &mut command);
                command.write(arg)?;
                result?;
            }
            uapi::HSGPU_HOLD => {
                let mut command = uapi::Hold::read(arg)?;

                let result = hold::hold(&session, pagemap, &this.mirror, &mut command);
                command.write(arg)?;
                result?;
            }
            uapi::HSGPU_REFUSE => {
                let mut command = uapi::Refuse::read(arg)?;

                session.refusal.set(&mut command)?;
                command.write(arg)?;
            }
            uapi::HSGPU_STATS => session.stats_snapshot().write(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}

/// What to select to move pages of `pagemap` to system memory; huge folios as such where there are any.
fn to_system_select(pagemap: &VramPagemap) -> u32 {
    match pagemap.pages().kind() {
        Kind::Private => uapi::SELECT_DEVICE_PRIVATE | uapi::SELECT_HUGE,
        Kind::Coherent => uapi::SELECT_DEVICE_COHERENT,
    }
}

impl OpenFile {
    /// The address space of the GPU, which the first one to ask for makes.
    fn space(&self, session: &Session<'_>) -> Result<Arc<Space>> {
        let mut space = self.space.lock();

        match &*space {
            Some(space) => Ok(space.clone()),
            None => {
                let mm = self.mirror.mm().mmget_not_zero().ok_or(ESRCH)?;

                Ok(space.insert(Space::open(&self.node, session, &mm)?).clone())
            }
        }
    }

    /// Serves `HSGPU_EVICT`.
    ///
    /// # Errors
    ///
    /// Those of a migration; `EINTR`; `EBUSY` if pages are locked or held by others for too long.
    fn evict(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        command: &mut uapi::Evict,
    ) -> Result {
        let start = Instant::<Monotonic>::now();

        command.evicted = 0;
        loop {
            let mut migrate = uapi::Migrate {
                addr: command.addr,
                npages: command.npages,
                select: to_system_select(pagemap),
                owner: uapi::OWNER_OWN,
                direction: uapi::TO_SYSTEM,
                ..Default::default()
            };
            let result = self.mirror.migrate(session, pagemap, &mut migrate);

            command.evicted += migrate.migrated;
            result?;
            if migrate.collected == migrate.migrated {
                return Ok(());
            }
            if start.elapsed() > EVICT_LIMIT {
                return Err(EBUSY);
            }
            if current!().signal_pending() {
                return Err(EINTR);
            }
            fsleep(EVICT_PAUSE);
        }
    }

    /// The commands of `lib/test_hmm_uapi.h`, in terms of this driver's own.
    ///
    /// # Errors
    ///
    /// Those of the command; `ENOTTY` for those that this driver does not know.
    fn dmirror(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        nr: u32,
        command: &mut uapi::DmirrorCmd,
    ) -> Result {
        // Whatever the command does with them.
        user_range(command.addr, command.npages)?;
        (command.cpages, command.faults) = (0, 0);

        match nr {
            uapi::HMM_DMIRROR_READ => self.dmirror_access(session, pagemap, false, command),
            uapi::HMM_DMIRROR_WRITE => self.dmirror_access(session, pagemap, true, command),
            uapi::HMM_DMIRROR_MIGRATE_TO_DEV => {
                self.dmirror_migrate(session, pagemap, uapi::TO_DEVICE, command)?;
                // What the device has now, for user space to compare.
                self.mirror.read_back(session, pagemap, command)
            }
            uapi::HMM_DMIRROR_MIGRATE_TO_SYS => {
                self.dmirror_migrate(session, pagemap, uapi::TO_SYSTEM, command)
            }
            uapi::HMM_DMIRROR_SNAPSHOT => self.mirror.snapshot(session, pagemap, command),
            uapi::HMM_DMIRROR_EXCLUSIVE => self.mirror.exclusive(session, pagemap, command),
            uapi::HMM_DMIRROR_CHECK_EXCLUSIVE => self.mirror.check_exclusive(command),
            uapi::HMM_DMIRROR_RELEASE => pagemap.evict_all(session),
            uapi::HMM_DMIRROR_FLAGS => {
                self.mirror.failures.set(command.npages);
                Ok(())
            }
            _ => Err(ENOTTY),
        }
    }

    fn dmirror_access(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        write: bool,
        command: &mut uapi::DmirrorCmd,
    ) -> Result {
        let mut access = uapi::Access {
            addr: command.addr,
            ptr: command.ptr,
            npages: command.npages,
            write: u32::from(write),
            owner: uapi::OWNER_OWN,
            ..Default::default()
        };

        // Upstream counts the ioctls that found a page missing, not the calls of hmm_range_fault().
        let range = user_range(command.addr, command.npages)?;
        let is_there = self.mirror.notifier.lock().view.covers(range, write);

        self.mirror.access(session, pagemap, &mut access)?;
        command.cpages = access.cpages;
        command.faults = u64::from(!is_there);
        Ok(())
    }

    fn dmirror_migrate(
        &self,
        session: &Session<'_>,
        pagemap: &VramPagemap,
        direction: u32,
        command: &mut uapi::DmirrorCmd,
    ) -> Result {
        let mut migrate = uapi::Migrate {
            addr: command.addr,
            npages: command.npages,
            select: match (direction, pagemap.pages().kind()) {
                (uapi::TO_DEVICE, Kind::Private) => uapi::SELECT_SYSTEM | uapi::SELECT_HUGE,
                // Coherent memory has no huge folios.
                (uapi::TO_DEVICE, Kind::Coherent) => uapi::SELECT_SYSTEM,
                _ => to_system_select(pagemap),
            },
            owner: uapi::OWNER_OWN,
            direction,
            ..Default::default()
        };

        self.mirror.migrate(session, pagemap, &mut migrate)?;
        command.cpages = migrate.migrated;
        Ok(())
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Some(space) = self.space.lock().take() {
            space.close();
        }
    }
}

//! vfio-user: the one file that knows the transport.
//!
//! A thread for each GPU serves one client after another, since a QEMU never reconnects and another may come. The
//! crate's server has its ways, which end here:
//!
//! * Its error replies carry errno 0, which QEMU takes for success. So register and memory accesses never fail: what
//!   does not exist reads as zero. A DMA or interrupt request that fails is logged, and shows as a DMA fault later.
//! * It does not check ranges against region sizes, so everything behind this file does.
//! * It panics on a malformed VERSION. The panic ends that client's session and nothing else.
//! * It has no hook for the end of a connection: when it returns, the GPU is powered off and on.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use hmmstorm_abi::pci::{BAR_MSIX, BAR_MSIX_SIZE, BAR_REGS, BAR_REGS_SIZE, BAR_VRAM, VECTORS};
use vfio_bindings::bindings::vfio as v;
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

use crate::config_space;
use crate::gpu::{Gpu, Region};
use crate::guest_memory::MapError;
use crate::irq::VectorError;
use crate::reset::Reset;

/// Pause after an `accept()` that failed, as it does when the process is out of descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Longest access in bytes: the `max_data_xfer_size` that the crate announces.
const ACCESS_MAX: usize = 1 << 20;

/// Why a socket could not be served.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process serves it.
    #[error("{0} is served by another process; end that one, or choose another --socket-dir")]
    InUse(PathBuf),
    /// Something else is in the way.
    #[error("{0} exists and is no socket; remove it, or choose another --socket-dir")]
    NotASocket(PathBuf),
    /// The host refused.
    #[error("cannot listen on {path}: {source}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// Listens on `path`, where a dead process may have left its socket.
///
/// # Errors
/// [`SocketError`] if something alive is there, or the host refuses.
pub fn listen(path: &Path) -> Result<UnixListener, SocketError> {
    use std::os::unix::fs::FileTypeExt;
    let failed = |source| SocketError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(SocketError::InUse(path.to_owned())),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
    }
    UnixListener::bind(path).map_err(failed)
}

/// The service of one GPU. Dropping it removes the socket and takes no further client; a client that is connected
/// stays until it goes, or the process does.
#[derive(Debug)]
pub struct Transport {
    path: PathBuf,
    listener: UnixListener,
    stop: Arc<AtomicBool>,
}

impl Transport {
    /// Serves `gpu` on the socket `path`. With `trap`, clients get no mapping of VRAM.
    ///
    /// # Errors
    /// [`SocketError`] if the socket cannot be had, or no thread for it.
    pub fn serve(gpu: Arc<Gpu>, path: &Path, trap: bool) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        let listener = listen(path)?;
        let accepts = OwnedFd::from(listener.try_clone().map_err(failed)?);
        let stop = Arc::new(AtomicBool::new(false));
        let transport = Self { path: path.to_owned(), listener, stop: Arc::clone(&stop) };
        let regions = regions(&gpu, trap);
        let server = Server::from_owned_fd(accepts, true, irqs(), regions);
        let name = format!("gpu{}", gpu.index());
        thread::Builder::new().name(name).spawn(move || serve(&server, &gpu, &stop)).map_err(failed)?;
        Ok(transport)
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the thread if it waits in accept().
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Serves one client after another until told to stop.
fn serve(server: &Server, gpu: &Arc<Gpu>, stop: &AtomicBool) {
    let index = gpu.index();
    while !stop.load(Ordering::Acquire) {
        let mut backend = Backend { gpu: Arc::clone(gpu) };
        let session = catch_unwind(AssertUnwindSafe(|| server.run(&mut backend)));
        if stop.load(Ordering::Acquire) {
            break;
        }
        match session {
            Ok(Ok(())) => log::info!("gpu{index}: the client is gone"),
            Ok(Err(vfio_user::Error::SocketAccept(error))) => {
                log::error!("gpu{index}: cannot accept a client: {error}");
                thread::sleep(ACCEPT_BACKOFF);
                continue;
            }
            Ok(Err(error)) => log::warn!("gpu{index}: lost the client: {error}"),
            Err(_) => log::error!("gpu{index}: the client sent what the transport cannot digest; dropped it"),
        }
        gpu.reset(Reset::Power);
    }
}

/// The interrupt types: INTx and MSI with none, MSI-X with all. QEMU wants to know of these three at least.
fn irqs() -> Vec<IrqInfo> {
    let none = |index| IrqInfo { index, flags: 0, count: 0 };
    let flags = v::VFIO_IRQ_INFO_EVENTFD | v::VFIO_IRQ_INFO_NORESIZE;
    let msix = IrqInfo { index: v::VFIO_PCI_MSIX_IRQ_INDEX, flags, count: VECTORS as u32 };
    vec![none(v::VFIO_PCI_INTX_IRQ_INDEX), none(v::VFIO_PCI_MSI_IRQ_INDEX), msix]
}

/// The nine regions of a VFIO PCI device.
fn regions(gpu: &Gpu, trap: bool) -> Vec<ServerRegion> {
    (0..v::VFIO_PCI_NUM_REGIONS).map(|index| region(gpu, index, trap)).collect()
}

fn region(gpu: &Gpu, index: u32, trap: bool) -> ServerRegion {
    let size = match region_at(index) {
        Some(Region::Registers) => BAR_REGS_SIZE as u64,
        Some(Region::Vram) => gpu.aperture(),
        Some(Region::Msix) => BAR_MSIX_SIZE as u64,
        Some(Region::Config) => config_space::SIZE as u64,
        None => 0,
    };
    let mapped = index == BAR_VRAM && !trap;
    let mut flags = 0;
    if size > 0 {
        flags |= v::VFIO_REGION_INFO_FLAG_READ | v::VFIO_REGION_INFO_FLAG_WRITE;
    }
    if mapped {
        flags |= v::VFIO_REGION_INFO_FLAG_MMAP;
    }
    let argsz = size_of::<v::vfio_region_info>() as u32;
    let region_info = v::vfio_region_info { argsz, flags, index, cap_offset: 0, size, offset: 0 };
    // The crate hands out the file only with a sparse area, so there is one over the whole BAR.
    let whole = SparseArea { area: v::vfio_region_sparse_mmap_area { offset: 0, size } };
    ServerRegion {
        region_info,
        sparse_areas: if mapped { vec![whole] } else { Vec::new() },
        mmap_fd: mapped.then(|| gpu.vram().as_raw_fd()),
    }
}

const fn region_at(index: u32) -> Option<Region> {
    match index {
        BAR_REGS => Some(Region::Registers),
        BAR_VRAM => Some(Region::Vram),
        BAR_MSIX => Some(Region::Msix),
        v::VFIO_PCI_CONFIG_REGION_INDEX => Some(Region::Config),
        _ => None,
    }
}

/// What a client asked for and did not get.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Vector(#[from] VectorError),
    #[error("interrupt type {index} with flags {flags:#x}: only MSI-X with eventfds is there")]
    Interrupt { index: u32, flags: u32 },
    #[error("an access of {0} bytes; a message carries at most {ACCESS_MAX}")]
    Length(usize),
    #[error("removal of DMA entries with flags {0:#x}: there is no dirty tracking")]
    Unmap(u32),
}

struct Backend {
    gpu: Arc<Gpu>,
}

impl Backend {
    /// Logs a refusal, since the client may not understand it.
    fn answer<E: Into<Refusal>>(&self, result: Result<(), E>) -> io::Result<()> {
        result.map_err(|error| {
            let refusal = error.into();
            self.gpu.refuse(&refusal);
            io::Error::new(io::ErrorKind::InvalidInput, refusal)
        })
    }

    fn try_set_irqs(
        &self,
        index: u32,
        flags: u32,
        start: u32,
        count: u32,
        fds: Vec<File>,
    ) -> Result<(), Refusal> {
        let bad = Refusal::Interrupt { index, flags };
        if flags & v::VFIO_IRQ_SET_ACTION_TRIGGER == 0 || flags & v::VFIO_IRQ_SET_DATA_BOOL != 0 {
            return Err(bad);
        }
        if index != v::VFIO_PCI_MSIX_IRQ_INDEX {
            // To turn off what is not there is no mistake.
            return if count == 0 { Ok(()) } else { Err(bad) };
        }
        if count == 0 {
            self.gpu.disconnect_vectors();
        } else if flags & v::VFIO_IRQ_SET_DATA_EVENTFD != 0 {
            self.gpu.connect_vectors(start, count, fds)?;
        } else {
            self.gpu.test_vectors(start, count)?;
        }
        Ok(())
    }
}

impl ServerBackend for Backend {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        // The crate has set aside as much zeroed memory as was asked for; longer than this it stays untouched.
        if data.len() > ACCESS_MAX {
            return self.answer(Err(Refusal::Length(data.len())));
        }
        match region_at(region) {
            Some(region) => self.gpu.region_read(region, offset, data),
            None => data.fill(0),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        if let Some(region) = region_at(region) {
            self.gpu.region_write(region, offset, data);
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let writable = flags.contains(DmaMapFlags::WRITE);
        let shared = if fd.is_some() { "shared" } else { "not shared" };
        log::debug!("gpu{}: DMA map {address:#x}+{size:#x} {shared}, writable: {writable}", self.gpu.index());
        self.answer(self.gpu.dma_map(address, size, writable, fd.map(|file| (file, offset))))
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        log::debug!("gpu{}: DMA unmap {address:#x}+{size:#x} {flags:?}", self.gpu.index());
        if flags == DmaUnmapFlags::UNMAP_ALL {
            self.gpu.dma_unmap_all();
            Ok(())
        } else if flags.is_empty() {
            self.answer(self.gpu.dma_unmap(address, size))
        } else {
            self.answer(Err(Refusal::Unmap(flags.bits())))
        }
    }

    fn reset(&mut self) -> io::Result<()> {
        self.gpu.reset(Reset::Function);
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        self.answer(self.try_set_irqs(index, flags, start, count, fds))
    }
}

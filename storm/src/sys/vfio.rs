//! A PCI function that is bound to `vfio-pci`: its regions, DMA and interrupts, as safe calls.

#![expect(
    unsafe_code,
    reason = "maps a device's memory, and memory for a device; what it hands out are atomics"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use hmmstorm_abi::uapi::PAGE_SIZE;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::memory::Mapping;

/// Region of the configuration space (`VFIO_PCI_CONFIG_REGION_INDEX`). A BAR's region has the BAR's number.
pub(crate) const CONFIG: u32 = 7;
/// Flag of a region: it can be mapped (`VFIO_REGION_INFO_FLAG_MMAP`).
const MAPPABLE: u32 = 1 << 2;

/// A function that user space owns.
pub(crate) struct Function {
    container: Arc<VfioContainer>,
    device: VfioDevice,
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Function").field("fd", &self.device.as_raw_fd()).finish_non_exhaustive()
    }
}

impl Function {
    /// Opens the function of this folder of `/sys/bus/pci/devices/`, in an address space of its own.
    ///
    /// # Errors
    /// [`VfioError`]: no IOMMU, not bound to `vfio-pci`, in use.
    pub(crate) fn open(sysfs: &Path) -> Result<Self, VfioError> {
        let container = Arc::new(VfioContainer::new(None)?);
        let device = VfioDevice::new(sysfs, Arc::clone(&container) as _, false)?;
        Ok(Self { container, device })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the device owns the descriptor for as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) }
    }

    /// Size of a region; 0 if there is none.
    pub(crate) fn size(&self, region: u32) -> u64 {
        self.device.get_region_size(region)
    }

    /// Reads `N` bytes of a region by one system call, i.e. one access of the device for 1, 2 or 4 of them.
    ///
    /// # Errors
    /// Of `pread`; `EINVAL` outside the region.
    pub(crate) fn read<const N: usize>(&self, region: u32, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        let at = self.place(region, offset, N)?;
        match rustix::io::pread(self.fd(), &mut bytes, at)? {
            n if n == N => Ok(bytes),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Writes `N` bytes likewise.
    ///
    /// # Errors
    /// Of `pwrite`; `EINVAL` outside the region.
    pub(crate) fn write<const N: usize>(&self, region: u32, offset: u64, bytes: [u8; N]) -> io::Result<()> {
        let at = self.place(region, offset, N)?;
        match rustix::io::pwrite(self.fd(), &bytes, at)? {
            n if n == N => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn place(&self, region: u32, offset: u64, length: usize) -> io::Result<u64> {
        let end = offset.checked_add(length as u64).filter(|&end| end <= self.size(region));
        end.map(|_| self.device.get_region_offset(region) + offset)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))
    }

    /// Maps a whole region.
    ///
    /// # Errors
    /// `ENODEV` for a region that cannot be mapped; else of `mmap`.
    pub(crate) fn window(&self, region: u32) -> io::Result<Window> {
        if self.device.get_region_flags(region) & MAPPABLE == 0 {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let length = usize::try_from(self.size(region)).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let offset = self.device.get_region_offset(region);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let base =
            unsafe { mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, self.fd(), offset) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::EFAULT))?;
        Ok(Window { base, length })
    }

    /// Gives the device `memory` at the DMA address `address`, until the guard is dropped.
    ///
    /// # Errors
    /// [`VfioError`].
    pub(crate) fn map<'a>(&'a self, address: u64, memory: &'a Mapping) -> Result<Dma<'a>, VfioError> {
        let length = memory.pages() * PAGE_SIZE;
        let start = memory.cells().as_ptr().cast_mut().cast();
        // SAFETY: a `Mapping` is seen as atomics only, and lives for as long as the guard.
        unsafe { self.container.vfio_dma_map(address, length, start) }?;
        Ok(Dma { function: self, memory, address })
    }

    /// An eventfd for each of the first `count` MSI-X vectors.
    ///
    /// # Errors
    /// Of `eventfd`, and whatever `VFIO_DEVICE_SET_IRQS` says.
    pub(crate) fn enable_msix(&self, count: usize) -> io::Result<Vec<EventFd>> {
        let vectors = (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        self.device.enable_msix(vectors.iter().collect()).map_err(io::Error::other)?;
        Ok(vectors)
    }

    /// Takes the vectors back.
    ///
    /// # Errors
    /// Whatever `VFIO_DEVICE_SET_IRQS` says.
    pub(crate) fn disable_msix(&self) -> io::Result<()> {
        self.device.disable_msix().map_err(io::Error::other)
    }

    /// Resets the function (`VFIO_DEVICE_RESET`).
    pub(crate) fn reset(&self) {
        self.device.reset();
    }
}

/// Memory that a device reaches.
#[derive(Debug)]
pub(crate) struct Dma<'a> {
    function: &'a Function,
    memory: &'a Mapping,
    address: u64,
}

impl Dma<'_> {
    /// The memory.
    pub(crate) fn memory(&self) -> &Mapping {
        self.memory
    }

    /// DMA address of page `page`.
    pub(crate) fn page(&self, page: usize) -> u64 {
        self.address + (page * PAGE_SIZE) as u64
    }
}

impl Drop for Dma<'_> {
    fn drop(&mut self) {
        let length = self.memory.pages() * PAGE_SIZE;
        let unmapped = self.function.container.vfio_dma_unmap(self.address, length);
        debug_assert!(unmapped.is_ok());
    }
}

/// A mapped region of a device, seen as atomics. Unmapped on drop.
#[derive(Debug)]
pub(crate) struct Window {
    base: NonNull<AtomicU64>,
    length: usize,
}

impl Window {
    /// Pages that it has.
    pub(crate) fn pages(&self) -> usize {
        self.length / PAGE_SIZE
    }

    /// The cells of page `page`.
    ///
    /// # Panics
    /// If there is no such page.
    pub(crate) fn page(&self, page: usize) -> &[AtomicU64] {
        const CELLS: usize = PAGE_SIZE / size_of::<AtomicU64>();
        // SAFETY: the mapping holds this many cells for as long as `self` lives; the device may change atomics at any time.
        let cells =
            unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.length / size_of::<AtomicU64>()) };
        &cells[page * CELLS..(page + 1) * CELLS]
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: this is the range that `window` mapped; the borrow checker saw every slice of it die.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

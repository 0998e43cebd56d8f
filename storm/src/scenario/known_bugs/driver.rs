//! Whose device memory the bug is shown with: ours, or that of the kernel's own test_hmm. A bug of mm/ shows with both.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};

use hmmstorm_abi::uapi::{
    HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL, HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE, HMM_DMIRROR_PROT_ERROR,
    HMM_DMIRROR_PROT_PMD,
};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat, stat};
use rustix::io::Errno;
use rustix::system::finit_module;

use crate::gpu;
use crate::scenario::WorkError;
use crate::sys::dmirror;
use crate::sys::memory::Mapping;
use crate::sys::vma::Vma;

/// Node that is made for test_hmm, whose own names are taken by hsgpu.
const TEST_HMM: &str = "/run/test_hmm0";
/// Its name in /proc/devices.
const REGION: &str = "HMM_DMIRROR";

/// A driver of device-private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// Ours, on the emulated GPU.
    Hsgpu,
    /// lib/test_hmm.c.
    TestHmm,
}

impl Driver {
    /// Opens its first device for this address space.
    pub(super) fn open(self) -> Result<Device, WorkError> {
        let path = match self {
            Self::Hsgpu => gpu::node(0),
            Self::TestHmm => {
                load_test_hmm()?;
                TEST_HMM.to_owned()
            }
        };
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|error| WorkError::Condition(format!("cannot open {path}: {error}")))?;
        Ok(Device { file, driver: self })
    }
}

/// Loads test_hmm and makes a node for its device 0, unless that is done.
fn load_test_hmm() -> Result<(), WorkError> {
    let path = "/lib/modules/test_hmm.ko";
    let module =
        File::open(path).map_err(|error| WorkError::Condition(format!("cannot open {path}: {error}")))?;
    match finit_module(&module, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(WorkError::system("finit_module(test_hmm)")(error)),
    }
    let devices = fs::read_to_string("/proc/devices").map_err(WorkError::system("read(/proc/devices)"))?;
    let major = major(&devices);
    let major = major.ok_or_else(|| WorkError::Condition(format!("no {REGION} in /proc/devices")))?;
    hide_nodes(major);
    match mknodat(CWD, TEST_HMM, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, makedev(major, 0)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(WorkError::system("mknod of test_hmm's node")(error)),
    }
}

/// Takes away the nodes that test_hmm got in /dev beside hsgpu's: nobody is to take its devices for GPUs.
fn hide_nodes(major: u32) {
    for node in (0..4).map(gpu::node) {
        if stat(&node).is_ok_and(|stat| rustix::fs::major(stat.st_rdev) == major) {
            let _gone = fs::remove_file(node);
        }
    }
}

/// The major number of test_hmm in the text of /proc/devices.
fn major(devices: &str) -> Option<u32> {
    devices.lines().find_map(|line| {
        let (number, name) = line.trim().split_once(' ')?;
        (name.trim() == REGION).then(|| number.parse().ok())?
    })
}

/// An open device.
#[derive(Debug)]
pub(super) struct Device {
    file: File,
    driver: Driver,
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Device {
    /// Moves all pages of `vma` to the device, and sees to it that they are there.
    pub(super) fn take(&self, vma: &Vma) -> Result<(), WorkError> {
        /// Times that it is asked for: a page that somebody holds for a moment stays.
        const TRIES: usize = 100;
        let mut there = 0;
        for _ in 0..TRIES {
            self.try_take(vma, 0, vma.pages())?;
            there = self.held(vma)?.0;
            if there == vma.pages() {
                return Ok(());
            }
            std::thread::yield_now();
        }
        Err(WorkError::Condition(format!("{there} of {} pages went to {:?}", vma.pages(), self.driver)))
    }

    /// The same, as one huge page.
    pub(super) fn take_huge(&self, vma: &Vma) -> Result<(), WorkError> {
        self.take(vma)?;
        match self.held(vma)? {
            (_, huge) if huge == vma.pages() => Ok(()),
            (pages, huge) => Err(WorkError::Condition(format!(
                "{pages} pages went to {:?}, {huge} of them in huge ones: does this driver have huge device pages?",
                self.driver
            ))),
        }
    }

    /// Asks once for `pages` pages from `first` on; that some stay is no error.
    pub(super) fn try_take(&self, vma: &Vma, first: usize, pages: usize) -> Result<(), WorkError> {
        let buffer = self.buffer(pages)?;
        match dmirror::to_device(self, vma, first, &buffer) {
            // ENOENT, EFAULT: the data was to be read back and was elsewhere.
            Ok(_) | Err(Errno::NOENT | Errno::FAULT | Errno::BUSY) => Ok(()),
            Err(error) => Err(WorkError::system("HMM_DMIRROR_MIGRATE_TO_DEV")(error)),
        }
    }

    /// Moves all pages of `vma` back.
    pub(super) fn give_back(&self, vma: &Vma) -> Result<(), WorkError> {
        let buffer = self.buffer(vma.pages())?;
        match dmirror::to_system(self, vma, 0, &buffer) {
            Ok(_) => {}
            Err(error) => return Err(WorkError::system("HMM_DMIRROR_MIGRATE_TO_SYS")(error)),
        }
        match self.held(vma)?.0 {
            0 => Ok(()),
            left => Err(WorkError::Condition(format!("{left} pages stayed on {:?}", self.driver))),
        }
    }

    /// Pages of `vma` on the device, and how many of them a PMD maps.
    pub(super) fn held(&self, vma: &Vma) -> Result<(usize, usize), WorkError> {
        let bytes =
            dmirror::snapshot(self, vma, vma.pages()).map_err(WorkError::system("HMM_DMIRROR_SNAPSHOT"))?;
        let local = |byte: u8| {
            byte != HMM_DMIRROR_PROT_ERROR
                && byte & HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE == HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
        };
        let held: Vec<u8> = bytes.into_iter().filter(|&byte| local(byte)).collect();
        let huge = held.iter().filter(|&&byte| byte & HMM_DMIRROR_PROT_PMD != 0).count();
        Ok((held.len(), huge))
    }

    fn buffer(&self, pages: usize) -> Result<Mapping, WorkError> {
        Mapping::private(pages).map_err(WorkError::system("mmap of a buffer"))
    }
}

#[cfg(test)]
mod tests {
    use super::major;

    #[test]
    fn finds_the_major_number() {
        assert_eq!(major("Character devices:\n  1 mem\n241 HMM_DMIRROR\n\nBlock devices:\n"), Some(241));
        assert_eq!(major("241 HMM_DMIRRORS\n"), None);
    }
}

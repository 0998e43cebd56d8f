//! Pins of user pages by the kernel: for good, with the kernel's own `gup_test` (`CONFIG_GUP_TEST`), and for as long as a
//! pipe holds them, with `vmsplice()`.

#![expect(unsafe_code, reason = "ioctl(2) and vmsplice(2) take addresses; each wrapper says whose")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use hmmstorm_abi::uapi::PAGE_SIZE;
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Setter, ioctl};

use super::memory::{Mapping, PageSpan};

/// Node of `mm/gup_test.c`.
const NODE: &str = "/sys/kernel/debug/gup_test";

/// `struct pin_longterm_test`, `mm/gup_test.h`.
#[repr(C)]
struct PinLongterm {
    addr: u64,
    size: u64,
    flags: u32,
    padding: u32,
}

const fn iow(nr: u8, size: usize) -> rustix::ioctl::Opcode {
    1 << 30
        | (size as rustix::ioctl::Opcode) << 16
        | (b'g' as rustix::ioctl::Opcode) << 8
        | nr as rustix::ioctl::Opcode
}

const START: rustix::ioctl::Opcode = iow(7, size_of::<PinLongterm>());
const STOP: rustix::ioctl::Opcode = (b'g' as rustix::ioctl::Opcode) << 8 | 8;
const READ: rustix::ioctl::Opcode = iow(9, size_of::<u64>());
/// `PIN_LONGTERM_TEST_FLAG_USE_WRITE`
const FOR_WRITING: u32 = 1;

/// Pages pinned for long (`FOLL_LONGTERM`): the kernel may not move them. One at a time in the whole system.
#[derive(Debug)]
pub(crate) struct LongtermPin<'a> {
    node: File,
    range: PageSpan<'a>,
}

impl<'a> LongtermPin<'a> {
    /// Pins `range` as a device would that writes it.
    ///
    /// # Errors
    /// Of opening the node and of the pin; `EINVAL` if there is a pin already.
    pub(crate) fn new(range: PageSpan<'a>) -> io::Result<Self> {
        let node = OpenOptions::new().read(true).write(true).open(NODE)?;
        let size = (range.pages() * PAGE_SIZE) as u64;
        let request = PinLongterm { addr: range.address(), size, flags: FOR_WRITING, padding: 0 };
        // SAFETY: PIN_LONGTERM_TEST_START takes a `PinLongterm`; it pins pages of a `Mapping` and changes none.
        let start = unsafe { Setter::<START, PinLongterm>::new(request) };
        // SAFETY: as above.
        unsafe { ioctl(&node, start) }?;
        Ok(Self { node, range })
    }

    /// Copies the pinned pages, as the kernel sees them, to `buffer`.
    ///
    /// # Errors
    /// Of the ioctl; `EINVAL` if `buffer` is too short.
    pub(crate) fn read(&self, buffer: &Mapping) -> io::Result<()> {
        let buffer = buffer.span(0..self.range.pages()).ok_or(Errno::INVAL)?;
        // SAFETY: PIN_LONGTERM_TEST_READ takes the address of a buffer; it is that of a `Mapping` that is long enough.
        let read = unsafe { Setter::<READ, u64>::new(buffer.address()) };
        // SAFETY: as above.
        Ok(unsafe { ioctl(&self.node, read) }?)
    }
}

impl Drop for LongtermPin<'_> {
    fn drop(&mut self) {
        // SAFETY: PIN_LONGTERM_TEST_STOP takes nothing.
        let stop = unsafe { NoArg::<STOP>::new() };
        // SAFETY: as above. It cannot fail, and closing the file does the same.
        let _stopped = unsafe { ioctl(&self.node, stop) };
    }
}

/// Pages that a pipe refers to (`vmsplice()`), until they are read from it.
#[derive(Debug)]
pub(crate) struct Spliced {
    from: File,
    _to: OwnedFd,
    pages: usize,
}

impl Spliced {
    /// Gives references to `range`, of at most 16 pages, to a new pipe.
    ///
    /// # Errors
    /// Of `pipe` and `vmsplice`; `EAGAIN` if not all pages fit.
    pub(crate) fn new(range: PageSpan<'_>) -> io::Result<Self> {
        let (from, to) = rustix::pipe::pipe()?;
        let length = range.pages() * PAGE_SIZE;
        let pages = libc::iovec { iov_base: range.address() as *mut libc::c_void, iov_len: length };
        // SAFETY: the pages are a `Mapping`'s, which are only ever seen as atomics; the pipe reads them and no more.
        let spliced = unsafe { libc::vmsplice(to.as_raw_fd(), &raw const pages, 1, libc::SPLICE_F_NONBLOCK) };
        match usize::try_from(spliced) {
            Ok(all) if all == length => Ok(Self { from: from.into(), _to: to, pages: range.pages() }),
            Ok(_) => Err(Errno::AGAIN.into()),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// Reads all pages from the pipe, which gives its references back.
    ///
    /// # Errors
    /// Of `read`.
    pub(crate) fn read(mut self) -> io::Result<Vec<u64>> {
        let mut bytes = vec![0; self.pages * PAGE_SIZE];
        self.from.read_exact(&mut bytes)?;
        let words = bytes.chunks_exact(size_of::<u64>());
        Ok(words.map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn spliced_pages_come_out_of_the_pipe() {
        let mapping: Mapping = Mapping::private(2).expect("mmap");
        mapping.page(1)[3].store(9, Relaxed);
        let spliced = Spliced::new(mapping.span(0..2).expect("pages")).expect("vmsplice");
        let words = spliced.read().expect("read");
        assert_eq!((words.len(), words[512 + 3]), (1024, 9));
    }
}

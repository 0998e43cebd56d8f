//! Follows files that other processes append to, line by line, without looking at them while nothing is written.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::inotify;
use rustix::io::Errno;

/// A line longer than this is cut: the guest can write what it likes.
const LONGEST_LINE: usize = 64 * 1024;

/// Becomes readable when one of the watched files is written to.
#[derive(Debug)]
pub struct Watch {
    inotify: OwnedFd,
}

impl Watch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)? })
    }

    /// Watches the file too; it must exist.
    pub fn add(&self, path: &Path) -> io::Result<()> {
        inotify::add_watch(&self.inotify, path, inotify::WatchFlags::MODIFY)?;
        Ok(())
    }

    /// Forgets what has been notified. To be called *before* the files are read: what is written afterwards notifies
    /// again.
    pub fn clear(&self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

/// Reads a growing file by whole lines.
#[derive(Debug)]
pub struct Tail<R = File> {
    source: R,
    partial: Vec<u8>,
}

impl Tail {
    /// Starts at the beginning of the file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self::new(File::open(path)?))
    }
}

impl<R: Read> Tail<R> {
    /// Follows any source that gives `Ok(0)` where it ends for now.
    pub fn new(source: R) -> Self {
        Self { source, partial: Vec::new() }
    }

    /// The lines completed since the last call, without their ends (`\n` or `\r\n`). Bytes that are no UTF-8 become
    /// U+FFFD.
    pub fn lines(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut buffer = [0; 16 * 1024];
        loop {
            let n = match self.source.read(&mut buffer) {
                Ok(0) => return Ok(lines),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            for piece in buffer[..n].split_inclusive(|&b| b == b'\n') {
                self.partial.extend_from_slice(piece);
                if piece.ends_with(b"\n") || self.partial.len() >= LONGEST_LINE {
                    lines.extend(self.take());
                }
            }
        }
    }

    /// What is followed.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// What has been read of a line that has not ended: at the end of a run, the last words.
    pub fn rest(&mut self) -> Option<String> {
        self.take()
    }

    fn take(&mut self) -> Option<String> {
        if self.partial.is_empty() {
            return None;
        }
        let line = String::from_utf8_lossy(&self.partial).trim_end_matches(['\r', '\n']).to_owned();
        self.partial.clear();
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::Write;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::*;
    use crate::vm::poll;

    /// Gives one chunk a round: `Ok(0)` between two chunks, as a file that grows does.
    struct Chunks(VecDeque<Vec<u8>>, bool);

    impl Read for Chunks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if !self.1 {
                return Ok(0);
            }
            let chunk = self.0.pop_front().unwrap_or_default();
            buffer[..chunk.len()].copy_from_slice(&chunk);
            Ok(chunk.len())
        }
    }

    proptest! {
        /// However a text is cut into writes, its lines come out the same.
        #[test]
        fn lines_do_not_depend_on_chunks(text in "[a-zä\r\n]{0,200}", cuts in prop::collection::vec(0usize..200, 0..8)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.sort_unstable();
            cuts.insert(0, 0);
            cuts.push(bytes.len());
            let chunks: VecDeque<_> = cuts.windows(2).map(|w| bytes[w[0]..w[1]].to_vec()).filter(|c| !c.is_empty()).collect();
            let rounds = chunks.len() + 1;
            let mut tail = Tail::new(Chunks(chunks, false));
            let mut lines = Vec::new();
            for _ in 0..rounds {
                lines.extend(tail.lines().expect("lines"));
            }
            lines.extend(tail.rest());
            let expected: Vec<String> =
                text.split_inclusive('\n').map(|l| l.trim_end_matches(['\r', '\n']).to_owned()).collect();
            prop_assert_eq!(lines, expected);
        }
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut tail = Tail::new(io::repeat(b'x').take(3 * LONGEST_LINE as u64));
        let lines = tail.lines().expect("lines");
        assert!(lines.len() >= 2 && lines.iter().all(|l| l.len() < 2 * LONGEST_LINE));
    }

    #[test]
    fn writing_wakes_the_watch_and_clearing_quiets_it() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("log");
        let mut file = File::create(&path).expect("file");
        let watch = Watch::new().expect("inotify");
        watch.add(&path).expect("watch");
        let mut tail = Tail::open(&path).expect("open");
        let now = || Some(Instant::now());
        assert_eq!(poll::readable([Some(watch.as_fd())], now()).expect("poll"), [false]);
        file.write_all(b"half").expect("write");
        let limit = Some(Instant::now() + Duration::from_secs(5));
        assert_eq!(poll::readable([Some(watch.as_fd())], limit).expect("poll"), [true]);
        watch.clear().expect("clear");
        assert_eq!(tail.lines().expect("lines"), Vec::<String>::new());
        file.write_all(b" a line\nmore").expect("write");
        watch.clear().expect("clear");
        assert_eq!(tail.lines().expect("lines"), ["half a line"]);
        assert_eq!(poll::readable([Some(watch.as_fd())], now()).expect("poll"), [false]);
        assert_eq!(tail.rest().as_deref(), Some("more"));
    }
}

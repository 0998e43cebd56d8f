//! Where a machine's memory is: a file that QEMU shares with the device, and which part of it the guest sees where.

use std::fs;
use std::io;
use std::path::PathBuf;

use serde::Serialize;

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Segment {
    /// Guest physical address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// A q35 machine with more memory than this has the rest above 4 GiB (QEMU, `hw/i386/pc_q35.c`).
const ALL_LOW: u64 = 0xb000_0000;
/// What stays below 4 GiB then.
const LOW: u64 = 0x8000_0000;
const FOUR_GIB: u64 = 1 << 32;

/// The pieces of a memory of `size` bytes.
#[must_use]
pub fn segments(size: u64) -> Vec<Segment> {
    if size < ALL_LOW {
        return vec![Segment { start: 0, length: size, offset: 0 }];
    }
    vec![
        Segment { start: 0, length: LOW, offset: 0 },
        Segment { start: FOUR_GIB, length: size - LOW, offset: LOW },
    ]
}

/// The file that holds the memory of a running QEMU.
pub fn file(qemu: u32) -> io::Result<PathBuf> {
    for entry in fs::read_dir(format!("/proc/{qemu}/fd"))? {
        let path = entry?.path();
        // A descriptor may be closed while we look; it is not the one that we look for.
        if fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().contains("memory-backend-memfd")) {
            return Ok(path);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("process {qemu} holds no memory-backend-memfd")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_where_pci_begins() {
        assert_eq!(segments(1 << 30), [Segment { start: 0, length: 1 << 30, offset: 0 }]);
        let split = segments(4 << 30);
        assert_eq!(split[1], Segment { start: 4 << 30, length: 2 << 30, offset: 2 << 30 });
        assert_eq!(split.iter().map(|segment| segment.length).sum::<u64>(), 4 << 30);
    }

    #[test]
    fn a_process_without_such_memory_is_an_error() {
        assert_eq!(file(std::process::id()).expect_err("none").kind(), io::ErrorKind::NotFound);
    }
}

//! Amounts of memory, as people write them: `256M`, `1G`.

use std::fmt;
use std::str::FromStr;

/// Bytes; a multiple of 1 MiB, since QEMU and the device are told in those units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// So many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// Why a text is no [`Size`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{0}' is no size: write a whole number and M or G, as 256M or 1G")]
pub struct ParseSizeError(String);

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSizeError(text.to_owned());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text.get(digits.len()..) {
            Some("M" | "MiB" | "m") => 0,
            Some("G" | "GiB" | "g") => 10,
            _ => return Err(bad()),
        };
        let n: u64 = digits.parse().map_err(|_| bad())?;
        // 2^20 MiB is 1 TiB: more is a slip of the finger.
        let mib = n.checked_mul(1 << shift).filter(|mib| (1..=1 << 20).contains(mib)).ok_or_else(bad)?;
        Ok(Self::mib(mib))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = self.0 >> 20;
        if mib.is_multiple_of(1024) { write!(f, "{}G", mib / 1024) } else { write!(f, "{mib}M") }
    }
}

impl serde::Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_and_writes() {
        for (text, bytes) in [("256M", 256 << 20), ("1G", 1 << 30), ("1536M", 1536 << 20)] {
            let size: Size = text.parse().expect(text);
            assert_eq!((size.bytes(), size.to_string()), (bytes, text.to_owned()));
        }
        for text in ["", "M", "1", "1K", "-1M", "0M", "1.5G", "99999999999999999999G", "1048577M"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}

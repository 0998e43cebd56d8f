//! The data oracle: what every page must hold, word by word, and what it means when it holds something else.
//!
//! A page's contents derive from the run's seed, its index in the mapping and its generation; no two words of a run are
//! alike. So a page that got lost, an old copy, another page's copy, a copy that is torn or a flipped bit are all seen,
//! and told apart.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use hmmstorm_abi::uapi::PAGE_SIZE;

use crate::rng::mix;

/// What a page holds: which page it is, and which writing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Seed of the run.
    pub(crate) seed: u64,
    /// Index of the page in its mapping; above bit 32, the number of the worker where each has a mapping of its own.
    pub(crate) page: u64,
    /// Counts the writings of the page, from 1.
    pub(crate) generation: u64,
}

/// Words at the start of a page that name it in clear: the page's index, then its generation.
const HEADER: usize = 2;

impl Stamp {
    fn key(self) -> u64 {
        mix(mix(self.seed ^ mix(self.page)) ^ self.generation)
    }

    fn words(self) -> impl Iterator<Item = u64> {
        let key = self.key();
        [self.page, self.generation]
            .into_iter()
            .chain((HEADER as u64..).map(move |i| mix(key.wrapping_add(i))))
    }

    /// Writes the page.
    pub(crate) fn write(self, page: &[AtomicU64]) {
        for (cell, word) in page.iter().zip(self.words()) {
            cell.store(word, Relaxed);
        }
    }

    /// Reads the whole page and compares it.
    ///
    /// # Errors
    /// What it holds instead.
    pub(crate) fn check(self, page: &[AtomicU64]) -> Result<(), Mismatch> {
        let mut wrong = 0;
        let mut first = None;
        let mut zeros = 0;
        for (i, (cell, expected)) in page.iter().zip(self.words()).enumerate() {
            let found = cell.load(Relaxed);
            zeros += usize::from(found == 0);
            if found != expected {
                wrong += 1;
                first.get_or_insert((i, expected, found));
            }
        }
        let Some((word, expected, found)) = first else { return Ok(()) };
        let kind = if zeros == page.len() {
            Kind::Zeros
        } else if let Some(stamp) = self.sibling(page) {
            Kind::Other(stamp)
        } else {
            Kind::Damaged { wrong, words: page.len(), offset: word * size_of::<u64>(), expected, found }
        };
        Err(Mismatch { expected: self, kind })
    }

    /// The stamp of the same run that `page` holds from end to end, if it does.
    fn sibling(self, page: &[AtomicU64]) -> Option<Self> {
        let other = Self {
            seed: self.seed,
            page: page.first()?.load(Relaxed),
            generation: page.get(1)?.load(Relaxed),
        };
        page.iter().zip(other.words()).all(|(cell, word)| cell.load(Relaxed) == word).then_some(other)
    }
}

impl Stamp {
    /// Wrapping sum of the words: what a GPU's job that loads them all makes of them.
    pub(crate) fn sum(self) -> u64 {
        self.words().take(PAGE_SIZE / size_of::<u64>()).fold(0, u64::wrapping_add)
    }

    /// Index of the page in its mapping.
    pub(crate) fn index(self) -> u64 {
        self.page & u64::from(u32::MAX)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.page >> 32 {
            0 => write!(f, "page {}, generation {}", self.index(), self.generation),
            worker => write!(f, "page {} of worker {worker}, generation {}", self.index(), self.generation),
        }
    }
}

/// A page that does not hold what it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// What it should hold.
    pub(crate) expected: Stamp,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Zeros,
    Other(Stamp),
    Damaged { wrong: usize, words: usize, offset: usize, expected: u64, found: u64 },
}

impl fmt::Display for Mismatch {
    /// What it holds.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Zeros => f.write_str("zeros throughout"),
            Kind::Other(stamp)
                if stamp.page == self.expected.page && stamp.generation < self.expected.generation =>
            {
                write!(f, "an old copy: generation {}", stamp.generation)
            }
            Kind::Other(stamp) => write!(f, "the contents of {stamp}"),
            Kind::Damaged { wrong, words, offset, expected, found } => write!(
                f,
                "{wrong} of {words} words differ, the first at byte {offset}: {found:#018x} instead of {expected:#018x}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp { seed: 42, page: 5, generation: 3 };

    fn page() -> Vec<AtomicU64> {
        (0..512).map(|_| AtomicU64::new(0)).collect()
    }

    #[test]
    fn a_written_page_checks_and_every_single_bit_counts() {
        let page = page();
        STAMP.write(&page);
        assert_eq!(STAMP.check(&page), Ok(()));
        for word in 0..page.len() {
            let bit = 1_u64 << (word % 64);
            page[word].fetch_xor(bit, Relaxed);
            let found = STAMP.check(&page).expect_err("one bit is wrong").to_string();
            assert!(found.contains("1 of 512 words"), "{found}");
            assert!(found.contains(&format!("byte {}:", word * 8)), "{found}");
            page[word].fetch_xor(bit, Relaxed);
        }
    }

    #[test]
    fn tells_what_the_page_holds_instead() {
        let page = page();
        assert_eq!(STAMP.check(&page).expect_err("zeros").to_string(), "zeros throughout");
        Stamp { generation: 2, ..STAMP }.write(&page);
        assert_eq!(STAMP.check(&page).expect_err("old").to_string(), "an old copy: generation 2");
        Stamp { page: 9, ..STAMP }.write(&page);
        assert_eq!(
            STAMP.check(&page).expect_err("other").to_string(),
            "the contents of page 9, generation 3"
        );
        Stamp { seed: 1, ..STAMP }.write(&page);
        assert!(STAMP.check(&page).expect_err("seed").to_string().contains("510 of 512"));
    }

    #[test]
    fn a_torn_page_is_damaged() {
        let page = page();
        STAMP.write(&page);
        Stamp { generation: 2, ..STAMP }.write(&page[..256]);
        let found = STAMP.check(&page).expect_err("torn").to_string();
        assert!(found.starts_with("255 of 512 words differ, the first at byte 8:"), "{found}");
    }
}

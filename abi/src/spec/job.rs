// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Access jobs: what the GPU's "shaders" do, described so that device, driver and user space agree on every byte.
//!
//! A job makes `count` accesses of 8 bytes each to virtual addresses of one address space, in an order that its
//! [`Pattern`] gives, and checks what it reads. Its description is a [`Job`] in guest memory (or VRAM), named by an
//! [`Opcode::Access`](super::ring::Opcode::Access) descriptor; what came out is an [`Outcome`] behind it.
//!
//! What a word *should* hold is a function of its address and the job's tag ([`word_at`]), so that whoever wrote it,
//! CPU or GPU, the other can tell a lost, stale or misplaced page from a good one.

/// Size of a [`Job`] in memory, in bytes.
pub const JOB_SIZE: usize = 64;
/// Size of an [`Outcome`] in memory, in bytes; it follows the job.
pub const OUTCOME_SIZE: usize = 64;
/// Bytes of one access; every address is a multiple of it.
pub const WORD: u64 = 8;
/// Most accesses of one job.
pub const COUNT_MAX: u64 = 1 << 32;

/// What a job does at each address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Op {
    /// Load, and add what was found to [`Outcome::sum`].
    Load = 0,
    /// Load, and compare with [`word_at`] of the job's tag.
    Check = 1,
    /// Store [`word_at`] of the job's tag.
    Store = 2,
    /// Load and compare with [`word_at`] of `tag`, then store [`word_at`] of `operand`: a page's next generation.
    CheckStore = 3,
    /// Atomically add `operand`; what was found before is added to [`Outcome::sum`].
    AtomicAdd = 4,
    /// Atomically replace `tag` by `operand`; [`Outcome::mismatches`] counts the words that held something else.
    AtomicCompareExchange = 5,
}

impl Op {
    /// The operation with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Load),
            1 => Some(Self::Check),
            2 => Some(Self::Store),
            3 => Some(Self::CheckStore),
            4 => Some(Self::AtomicAdd),
            5 => Some(Self::AtomicCompareExchange),
            _ => None,
        }
    }
}

/// In which order a job visits its window of `window` bytes at `va`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Pattern {
    /// Access `i` at `va + (i * stride) % window`. Stride 8 is sequential.
    Strided = 0,
    /// Access `i` at `va + 8 * (mix(seed + i) % (window / 8))`, with [`mix`]; the seed is `stride`.
    Random = 1,
    /// Access 0 at `va`; the word found is the virtual address of the next. Only with [`Op::Load`]. A word that leads
    /// out of the window ends the job with a mismatch.
    Chase = 2,
}

impl Pattern {
    /// The pattern with this encoding, if there is one.
    pub const fn from_u8(value: u8) -> Option<Self> {
        match value {
            0 => Some(Self::Strided),
            1 => Some(Self::Random),
            2 => Some(Self::Chase),
            _ => None,
        }
    }
}

/// The finaliser of `SplitMix64` (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
pub const fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// What the word at virtual address `va` holds when its page is of generation `tag`.
pub const fn word_at(va: u64, tag: u64) -> u64 {
    mix(va ^ mix(tag))
}

/// A job, decoded. In memory: eight little-endian `u64` words.
///
/// | word | bits  | field |
/// |------|-------|-------|
/// | 0    | 7:0   | [`Op`] |
/// | 0    | 15:8  | [`Pattern`] |
/// | 0    | 63:16 | reserved, zero |
/// | 1    |       | first virtual address of the window, multiple of 8 |
/// | 2    |       | bytes of the window, multiple of 8, not 0 |
/// | 3    |       | number of accesses, up to [`COUNT_MAX`] |
/// | 4    |       | stride in bytes (multiple of 8), or seed |
/// | 5    |       | tag |
/// | 6    |       | operand |
/// | 7    |       | reserved, zero |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// What to do at each address.
    pub op: Op,
    /// In which order.
    pub pattern: Pattern,
    /// First virtual address of the window.
    pub va: u64,
    /// Bytes of the window.
    pub window: u64,
    /// Number of accesses.
    pub count: u64,
    /// Stride in bytes, or seed.
    pub stride: u64,
    /// Generation that the words should have; compared value of [`Op::AtomicCompareExchange`].
    pub tag: u64,
    /// What is added or stored; next generation of [`Op::CheckStore`].
    pub operand: u64,
}

impl Job {
    /// The eight words of the job.
    pub const fn to_words(self) -> [u64; 8] {
        [
            self.op as u64 | (self.pattern as u64) << 8,
            self.va,
            self.window,
            self.count,
            self.stride,
            self.tag,
            self.operand,
            0,
        ]
    }

    /// Decodes a job; `None` if it contradicts the table above.
    pub const fn from_words(w: [u64; 8]) -> Option<Self> {
        let (Some(op), Some(pattern)) = (Op::from_u8(w[0] as u8), Pattern::from_u8((w[0] >> 8) as u8)) else {
            return None;
        };
        let job =
            Self { op, pattern, va: w[1], window: w[2], count: w[3], stride: w[4], tag: w[5], operand: w[6] };
        if w[0] >> 16 != 0 || w[7] != 0 || !job.is_sound() { None } else { Some(job) }
    }

    const fn is_sound(&self) -> bool {
        let ordered = match self.pattern {
            Pattern::Strided => self.stride.is_multiple_of(WORD),
            Pattern::Random => true,
            Pattern::Chase => matches!(self.op, Op::Load),
        };
        ordered
            && self.va.is_multiple_of(WORD)
            && self.window.is_multiple_of(WORD)
            && self.window != 0
            && self.va.checked_add(self.window).is_some()
            && self.count <= COUNT_MAX
    }

    /// The virtual address of access `index`; for [`Pattern::Chase`] of access 0 only.
    pub const fn address(&self, index: u64) -> u64 {
        match self.pattern {
            Pattern::Strided => self.va + index.wrapping_mul(self.stride) % self.window,
            Pattern::Random => self.va + WORD * (mix(self.stride.wrapping_add(index)) % (self.window / WORD)),
            Pattern::Chase => self.va,
        }
    }
}

/// What came out of a job, in the 64 bytes behind it; written before its fence. Eight little-endian `u64` words, in the
/// order of the fields; the last is zero. A job that ends with an error leaves what it had got to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Accesses made.
    pub done: u64,
    /// Words that did not hold what they should.
    pub mismatches: u64,
    /// Virtual address of the first of these.
    pub first_va: u64,
    /// What was found there.
    pub first_found: u64,
    /// What should have been there.
    pub first_wanted: u64,
    /// Wrapping sum of the words found, for [`Op::Load`] and [`Op::AtomicAdd`].
    pub sum: u64,
    /// Times that the job stalled on a fault.
    pub faults: u64,
}

impl Outcome {
    /// The eight words of the outcome.
    pub const fn to_words(self) -> [u64; 8] {
        [
            self.done,
            self.mismatches,
            self.first_va,
            self.first_found,
            self.first_wanted,
            self.sum,
            self.faults,
            0,
        ]
    }
    /// Decodes an outcome.
    pub const fn from_words(w: [u64; 8]) -> Self {
        Self {
            done: w[0],
            mismatches: w[1],
            first_va: w[2],
            first_found: w[3],
            first_wanted: w[4],
            sum: w[5],
            faults: w[6],
        }
    }
}

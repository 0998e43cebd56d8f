//! The register file as a table: where a register is and what may be done with it.
//!
//! This file knows offsets and access rules, [`crate::gpu`] knows what the registers mean.

use hmmstorm_abi::pci::{BAR_REGS_SIZE, CHANNELS};
use hmmstorm_abi::regs::{self, Access, Register};

/// Width of every register in bytes.
const WIDTH: usize = 4;

/// A register of the file.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its row in the table.
    pub register: &'static Register,
    /// The channel it belongs to, if it is a channel's.
    pub channel: Option<usize>,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadAccess {
    /// Not four bytes at a multiple of four.
    #[error("{width} bytes wide at {offset:#x}: registers take aligned 32-bit accesses")]
    Shape {
        /// Offset in the BAR.
        offset: u64,
        /// Bytes.
        width: usize,
    },
    /// No register there.
    #[error("no register at {offset:#x}")]
    NoRegister {
        /// Offset in the BAR.
        offset: u64,
    },
    /// A write to a register that is only read.
    #[error("{name} is read-only")]
    ReadOnly {
        /// Which.
        name: &'static str,
    },
    /// A write that the register's present state does not allow.
    #[error("{name} cannot take {value:#x}: {why}")]
    Refused {
        /// Which.
        name: &'static str,
        /// What was written.
        value: u32,
        /// Why not.
        why: &'static str,
    },
}

/// Finds the register that an access of `width` bytes at `offset` means.
///
/// # Errors
/// [`BadAccess::Shape`], [`BadAccess::NoRegister`].
pub fn find(offset: u64, width: usize) -> Result<Target, BadAccess> {
    let aligned = width == WIDTH && offset.is_multiple_of(WIDTH as u64);
    if !aligned {
        return Err(BadAccess::Shape { offset, width });
    }
    let none = BadAccess::NoRegister { offset };
    let offset = usize::try_from(offset).ok().filter(|offset| *offset < BAR_REGS_SIZE).ok_or(none)?;
    let row = |table: &'static [Register], at| table.iter().find(|row| row.offset == at).ok_or(none);
    let Some(in_channels) = offset.checked_sub(regs::CHANNEL_BASE) else {
        return Ok(Target { register: row(regs::GLOBAL, offset)?, channel: None });
    };
    let channel = in_channels / regs::CHANNEL_STRIDE;
    if channel >= CHANNELS {
        return Err(none);
    }
    let register = row(regs::CHANNEL, in_channels % regs::CHANNEL_STRIDE)?;
    Ok(Target { register, channel: Some(channel) })
}

impl Target {
    /// Checks that the register takes writes.
    ///
    /// # Errors
    /// [`BadAccess::ReadOnly`].
    pub fn check_write(self) -> Result<(), BadAccess> {
        match self.register.access {
            Access::ReadOnly => Err(BadAccess::ReadOnly { name: self.register.name }),
            Access::ReadWrite | Access::WriteOnly => Ok(()),
        }
    }

    /// The refusal of `value`.
    pub fn refuse(self, value: u32, why: &'static str) -> BadAccess {
        BadAccess::Refused { name: self.register.name, value, why }
    }
}

/// What a register with the low half of `value` reads as.
pub const fn low(value: u64) -> u32 {
    value as u32
}

/// What a register with the high half of `value` reads as.
pub const fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

/// Writes the low half of `value`.
pub fn set_low(value: &mut u64, half: u32) {
    *value = *value & !0xffff_ffff | u64::from(half);
}

/// Writes the high half of `value`.
pub fn set_high(value: &mut u64, half: u32) {
    *value = *value & 0xffff_ffff | u64::from(half) << 32;
}

/// The register tables of the hardware manual, in Markdown.
pub fn manual() -> String {
    let mut text = String::new();
    let tables = [("Device registers", regs::GLOBAL), ("Channel registers", regs::CHANNEL)];
    for (title, table) in tables {
        text.push_str(&format!("### {title}\n\n| offset | name | access | meaning |\n|---|---|---|---|\n"));
        for row in table {
            let access = match row.access {
                Access::ReadOnly => "RO",
                Access::ReadWrite => "RW",
                Access::WriteOnly => "WO",
            };
            // Links of the Rust documentation are plain names here.
            let doc = plain(row.doc);
            text.push_str(&format!("| `{:#05x}` | `{}` | {access} | {doc} |\n", row.offset, row.name));
        }
        text.push('\n');
    }
    text
}

/// Turns ``[`NAME`](path)`` and ``[`NAME`]`` into `` `NAME` ``.
fn plain(doc: &str) -> String {
    let mut out = String::new();
    let mut rest = doc;
    while let Some((before, link)) = rest.split_once("[`") {
        let Some((name, after)) = link.split_once("`]") else { break };
        out.push_str(&format!("{before}`{name}`"));
        rest = match after.strip_prefix('(').and_then(|path| path.split_once(')')) {
            Some((_, after)) => after,
            None => after,
        };
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn registers_are_aligned_inside_the_bar_and_overlap_nowhere() {
        let mut seen = BTreeSet::new();
        let channels =
            (0..CHANNELS).flat_map(|c| regs::CHANNEL.iter().map(move |row| regs::channel_reg(c, row.offset)));
        for offset in regs::GLOBAL.iter().map(|row| row.offset).chain(channels) {
            assert!(offset.is_multiple_of(WIDTH) && offset + WIDTH <= BAR_REGS_SIZE, "{offset:#x}");
            assert!(seen.insert(offset), "{offset:#x} twice");
        }
        assert!(regs::GLOBAL.iter().all(|row| row.offset < regs::CHANNEL_BASE));
        assert!(regs::CHANNEL.iter().all(|row| row.offset < regs::CHANNEL_STRIDE));
    }

    #[test]
    fn find_meets_exactly_the_registers() {
        let found = (0..BAR_REGS_SIZE as u64 + 64).filter(|offset| find(*offset, 4).is_ok()).count();
        assert_eq!(found, regs::GLOBAL.len() + CHANNELS * regs::CHANNEL.len());
        let doorbell = find(regs::channel_reg(2, regs::CH_DOORBELL) as u64, 4).expect("a register");
        assert_eq!((doorbell.channel, doorbell.register.name), (Some(2), "CH_DOORBELL"));
    }

    #[test]
    fn other_widths_and_offsets_are_told_apart() {
        assert_eq!(find(0, 8).err(), Some(BadAccess::Shape { offset: 0, width: 8 }));
        assert_eq!(find(2, 4).err(), Some(BadAccess::Shape { offset: 2, width: 4 }));
        assert_eq!(find(0, 0).err(), Some(BadAccess::Shape { offset: 0, width: 0 }));
        assert_eq!(find(0x1c, 4).err(), Some(BadAccess::NoRegister { offset: 0x1c }));
        let past = u64::MAX - 3;
        assert_eq!(find(past, 4).err(), Some(BadAccess::NoRegister { offset: past }));
    }

    #[test]
    fn links_become_names() {
        assert_eq!(plain("see [`Caps`], or [`A`](super::b::A)."), "see `Caps`, or `A`.");
        assert_eq!(plain("nothing [here]"), "nothing [here]");
    }
}

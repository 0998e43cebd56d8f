//! One line of a kernel console: number, printk time, caller, message.

use std::sync::LazyLock;

use regex::Regex;

/// Longest line kept, bytes; what is longer is cut (printk's own limit is about 1 KiB).
pub(super) const LONGEST: usize = 8 << 10;

/// A parsed console line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// From 1.
    pub(super) number: u64,
    /// printk time, nanoseconds of the guest's clock.
    pub(super) time: Option<u64>,
    /// With `CONFIG_PRINTK_CALLER`: the task (`T12`) or CPU (`C3`) that printed.
    pub(super) caller: Option<&'a str>,
    /// The rest, with its leading spaces.
    pub(super) message: &'a str,
}

impl<'a> Line<'a> {
    /// Parses one line without its line end.
    pub(super) fn parse(number: u64, text: &'a str) -> Self {
        static PREFIX: LazyLock<Regex> = LazyLock::new(|| {
            // Kernels print `[    1.234567] text`, and with the caller `[    1.234567][   T12] text`.
            #[expect(clippy::unwrap_used, reason = "a constant pattern, compiled by the tests")]
            Regex::new(r"^\[\s*(\d{1,9})\.(\d{6})\](?:\[\s*([TC]\d+)\])? ?").unwrap()
        });
        let Some(prefix) = PREFIX.captures(text) else {
            return Self { number, time: None, caller: None, message: text };
        };
        let part = |index: usize| prefix.get(index).map_or("", |part| part.as_str());
        let time = part(1).parse::<u64>().ok().zip(part(2).parse::<u64>().ok());
        Self {
            number,
            time: time.map(|(seconds, micros)| seconds * 1_000_000_000 + micros * 1_000),
            caller: prefix.get(3).map(|caller| caller.as_str()),
            message: &text[prefix.get(0).map_or(0, |whole| whole.end())..],
        }
    }
}

/// Turns a byte stream, cut anywhere, into lines.
#[derive(Clone, Debug, Default)]
pub(super) struct Lines {
    partial: Vec<u8>,
    number: u64,
}

impl Lines {
    /// Takes in bytes and calls `each` with the number and text of every line that became whole.
    pub(super) fn feed(&mut self, bytes: &[u8], mut each: impl FnMut(u64, &str)) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            let ends = piece.last() == Some(&b'\n');
            let room = LONGEST.saturating_sub(self.partial.len());
            let text = piece.strip_suffix(b"\n").unwrap_or(piece);
            self.partial.extend_from_slice(&text[..text.len().min(room)]);
            if ends {
                self.line(&mut each);
            }
        }
    }

    /// Ends the stream: what is left without a line end is a line.
    pub(super) fn finish(&mut self, mut each: impl FnMut(u64, &str)) {
        if !self.partial.is_empty() {
            self.line(&mut each);
        }
    }

    fn line(&mut self, each: &mut impl FnMut(u64, &str)) {
        self.number += 1;
        let text = String::from_utf8_lossy(&self.partial);
        each(self.number, text.trim_end_matches('\r'));
        self.partial.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_prefix() {
        let line = Line::parse(3, "[   14.862715] watchdog: BUG");
        assert_eq!((line.time, line.caller, line.message), (Some(14_862_715_000), None, "watchdog: BUG"));
        let line = Line::parse(3, "[   14.862715][    C2]  <TASK>");
        assert_eq!((line.caller, line.message), (Some("C2"), " <TASK>"));
        let line = Line::parse(3, "no prefix");
        assert_eq!((line.time, line.message), (None, "no prefix"));
    }

    #[test]
    fn long_lines_are_cut_and_counted_once() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        lines.feed(&vec![b'x'; LONGEST * 3], |number, text| seen.push((number, text.len())));
        lines.feed(b"y\r\nz", |number, text| seen.push((number, text.len())));
        lines.finish(|number, text| seen.push((number, text.len())));
        assert_eq!(seen, [(1, LONGEST), (2, 1)]);
    }
}

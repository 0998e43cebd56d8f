//! The user's terminal: raw while the guest's console is on it, and as it was before in every other moment.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The terminal on stdin in raw mode; restored on drop. None if stdin is no terminal.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal on stdin into raw mode.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin().as_fd(), OptionalActions::Flush, &self.before);
        // A guest that is cut off in the middle of a coloured or hidden piece would leave the terminal so.
        if io::stdout().is_terminal() {
            let _ = io::stdout().write_all(b"\x1b[0m\x1b[?25h\r\n");
        }
    }
}

/// What the user typed, with the escape taken out: Ctrl-A x ends the guest, Ctrl-A Ctrl-A (or Ctrl-A a) is one Ctrl-A.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

/// Ctrl-A.
const ESCAPE: u8 = 1;

impl Keys {
    /// Bytes for the guest, and whether the user wants to leave.
    pub fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, _) => out.push(byte),
                (true, b'x' | b'X') => return (out, true),
                (true, ESCAPE | b'a') => out.push(ESCAPE),
                // No such command: the user meant both keys.
                (true, _) => out.extend([ESCAPE, byte]),
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_works_across_reads() {
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"ls\r\x01"), (b"ls\r".to_vec(), false));
        assert_eq!(keys.filter(b"x rest"), (Vec::new(), true));
        assert_eq!(Keys::default().filter(b"\x01\x01\x01a\x01b"), (b"\x01\x01\x01b".to_vec(), false));
    }
}

//! A connection to a device's control socket.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hmmstorm_abi::wire::control::{Reply, Request};

/// Time for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks one thing after another.
#[derive(Debug)]
pub struct Control(BufReader<UnixStream>);

impl Control {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Whatever the host says; most often that no device listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Asks, and waits for the answer, which may be a refusal.
    ///
    /// # Errors
    /// A connection that broke, an answer that does not come within seconds, or one that makes no sense.
    pub fn ask(&mut self, request: &Request) -> io::Result<Reply> {
        let mut line = serde_json::to_string(request)?;
        line.push('\n');
        self.0.get_mut().write_all(line.as_bytes()).map_err(late)?;
        let mut answer = String::new();
        if self.0.read_line(&mut answer).map_err(late)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&answer)?)
    }
}

/// A time limit of a socket shows as one of two errors, neither of which says so.
fn late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            let why = format!("no answer within {} s", PATIENCE.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, why)
        }
        _ => error,
    }
}

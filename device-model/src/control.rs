//! The control socket: [`Request`]s as JSON lines, a [`Reply`] to each.
//!
//! One thread serves every client. A client can cost at most a line's length of memory, and one that does not read
//! its replies is dropped.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use hmmstorm_abi::wire::control::{Reply, Request};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::chaos::check;
use crate::machine::Machine;
use crate::transport::{SocketError, listen};

/// Longest request in bytes, newline included.
const LINE_MAX: usize = 16 << 10;
/// Most clients at a time; more wait in the socket's queue.
const CLIENTS_MAX: usize = 64;
/// Bytes read at once.
const CHUNK: usize = 4096;

/// The control service. Dropping it removes the socket.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
}

impl Control {
    /// Serves `machine` on the socket `path`; calls `shutdown` when a client asks for the end.
    ///
    /// # Errors
    /// [`SocketError`] if the socket cannot be had, or no thread for it.
    pub fn serve(
        machine: Arc<Machine>,
        path: &Path,
        shutdown: impl Fn() + Send + 'static,
    ) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Listen { path: path.to_owned(), source };
        let listener = listen(path)?;
        let control = Self { path: path.to_owned() };
        let mut server = Server::new(listener, machine).map_err(failed)?;
        let run = move || {
            if let Err(error) = server.run(&shutdown) {
                log::error!("the control socket ends: {error}");
            }
        };
        thread::Builder::new().name("control".to_owned()).spawn(run).map_err(failed)?;
        Ok(control)
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

struct Server {
    machine: Arc<Machine>,
    listener: UnixListener,
    epoll: Epoll,
    clients: BTreeMap<RawFd, Client>,
    /// Whether the listener is watched, i.e. there is room for another client.
    listening: bool,
}

struct Client {
    stream: UnixStream,
    line: Vec<u8>,
}

/// Whether a client stays.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stay {
    Yes,
    No,
}

impl Server {
    fn new(listener: UnixListener, machine: Arc<Machine>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        let mut server = Self { machine, listener, epoll, clients: BTreeMap::new(), listening: false };
        server.watch_listener()?;
        Ok(server)
    }

    /// Listens exactly while there is room.
    fn watch_listener(&mut self) -> io::Result<()> {
        let room = self.clients.len() < CLIENTS_MAX;
        if room != self.listening {
            let operation = if room { ControlOperation::Add } else { ControlOperation::Delete };
            let fd = self.listener.as_raw_fd();
            self.epoll.ctl(operation, fd, EpollEvent::new(EventSet::IN, event_data(fd)))?;
            self.listening = room;
        }
        Ok(())
    }

    fn run(&mut self, shutdown: &dyn Fn()) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            for event in &events[..ready] {
                let fd = event.fd();
                if fd == self.listener.as_raw_fd() {
                    self.accept()?;
                } else if self.serve(fd, shutdown) == Stay::No {
                    // Closing the descriptor ends its watch.
                    self.clients.remove(&fd);
                }
            }
            self.watch_listener()?;
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            // The client has changed its mind, or we are short of descriptors: it will try again.
            Err(error) => {
                log::warn!("control: cannot accept a client: {error}");
                return Ok(());
            }
        };
        stream.set_nonblocking(true)?;
        let fd = stream.as_raw_fd();
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, event_data(fd)))?;
        self.clients.insert(fd, Client { stream, line: Vec::new() });
        Ok(())
    }

    fn serve(&mut self, fd: RawFd, shutdown: &dyn Fn()) -> Stay {
        let Some(client) = self.clients.get_mut(&fd) else { return Stay::No };
        let mut chunk = [0; CHUNK];
        let read = match client.stream.read(&mut chunk) {
            Ok(0) => return Stay::No,
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Stay::Yes;
            }
            Err(_) => return Stay::No,
        };
        for piece in chunk[..read].split_inclusive(|byte| *byte == b'\n') {
            client.line.extend_from_slice(piece);
            if client.line.len() > LINE_MAX {
                let message = format!("a request of more than {LINE_MAX} bytes");
                let _ = send(&client.stream, &Reply::Error { message });
                return Stay::No;
            }
            if client.line.last() != Some(&b'\n') {
                continue;
            }
            let request = serde_json::from_slice(&client.line);
            client.line.clear();
            let ends = matches!(request, Ok(Request::Shutdown));
            let reply = match request {
                Ok(request) => answer(&self.machine, request),
                Err(error) => Reply::Error { message: format!("not a request: {error}") },
            };
            let sent = send(&client.stream, &reply);
            if ends {
                shutdown();
            }
            if sent.is_err() {
                return Stay::No;
            }
        }
        Stay::Yes
    }
}

/// Descriptors are small and not negative.
fn event_data(fd: RawFd) -> u64 {
    u64::from(fd.cast_unsigned())
}

fn answer(machine: &Machine, request: Request) -> Reply {
    match request {
        Request::Stats => Reply::Stats { gpus: machine.stats() },
        Request::Chaos { gpu, plan } => match check(&plan) {
            Ok(()) if machine.set_chaos(gpu, &plan) => Reply::Ok,
            Ok(()) => {
                let (gpu, count) = (gpu.unwrap_or_default(), machine.gpus().len());
                Reply::Error { message: format!("no GPU {gpu}: there are {count}") }
            }
            Err(message) => Reply::Error { message },
        },
        Request::Shutdown => Reply::Ok,
    }
}

fn send(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

//! The process: everything that listens, and how it ends.

use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::config::Config;
use crate::control::Control;
use crate::machine::{Machine, MachineError};
use crate::transport::{SocketError, Transport};

/// Why the device could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No GPUs.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// No folder for sockets.
    #[error("cannot make the folder {path} for the sockets: {source}")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// No signal handlers, or no thread for them.
    #[error("cannot watch for signals or the end of standard input: {0}")]
    Watch(io::Error),
}

/// Serves the GPUs of `config` until told to end, and says on standard output when it is ready.
///
/// # Errors
/// [`StartError`] if it could not start; no socket is left behind.
pub fn run(config: &Config) -> Result<(), StartError> {
    let (end, ended) = mpsc::channel();
    watch_signals(end.clone()).map_err(StartError::Watch)?;
    let machine = Arc::new(Machine::new(config)?);
    let dir = &config.socket_dir;
    std::fs::create_dir_all(dir).map_err(|source| StartError::Folder { path: dir.clone(), source })?;
    let sockets: Vec<PathBuf> = (0..config.gpus).map(|gpu| dir.join(format!("gpu{gpu}.sock"))).collect();
    let serve = |(gpu, path): (_, &PathBuf)| Transport::serve(Arc::clone(gpu), path, config.vram_trap);
    let transports: Vec<Transport> =
        machine.gpus().iter().zip(&sockets).map(serve).collect::<Result<_, _>>()?;
    let path = dir.join("control.sock");
    let asked = end.clone();
    let control = Control::serve(Arc::clone(&machine), &path, move || {
        // Fails only if the end has begun already.
        let _ = asked.send("a client of the control socket");
    })?;
    if config.exit_with_stdin {
        watch_stdin(end).map_err(StartError::Watch)?;
    }
    announce(&sockets, &path);
    // The channel outlives its senders: one is with the signal thread, which never ends.
    let by = ended.recv().unwrap_or("nobody");
    log::info!("ending, as asked by {by}");
    drop((transports, control));
    Ok(())
}

/// The line that whoever started the device waits for. It names all sockets, but may go unheard.
fn announce(gpus: &[PathBuf], control: &PathBuf) {
    let line = serde_json::json!({ "ready": true, "gpus": gpus, "control": control });
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn watch_signals(end: Sender<&'static str>) -> io::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let watch = move || {
        for signal in signals.forever() {
            let by = if signal == SIGINT { "SIGINT" } else { "SIGTERM" };
            if end.send(by).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop)
}

fn watch_stdin(end: Sender<&'static str>) -> io::Result<()> {
    let watch = move || {
        let mut ignored = [0; 256];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut ignored) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let _ = end.send("the end of standard input");
    };
    thread::Builder::new().name("stdin".to_owned()).spawn(watch).map(drop)
}

//! `hmmstorm run`: boots the guest and puts its shell on the terminal.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::prepare::prepare;
use crate::cli::{Context, Error, ImageArgs, MachineArgs, Outcome};
use crate::vm::terminal::{Keys, RawTerminal};
use crate::vm::{Console, End, Guest, Machine, Occurrence, poll};

/// Options of `hmmstorm run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    image: ImageArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let mut prepared = prepare(&args.image, &args.machine, Guest::Shell, ctx)?;
    prepared.boot.spec.console = Console::Interactive;
    // On a terminal, what the kernel has to say at its leisure is in the log, and in dmesg.
    prepared.boot.spec.append.insert(0, "loglevel=4".into());
    if args.machine.dry_run {
        print!("{}", prepared.dry_run());
        return Ok(Outcome::Pass);
    }
    let folder = prepared.folder("run", ctx)?;
    ctx.note(format_args!(
        "booting {} under {} ({}); logs in {}",
        prepared.image.provenance.kernel_version,
        prepared.boot.spec.engine.name(),
        prepared.engine_reason,
        folder.dir().display()
    ));
    if io::stdin().is_terminal() {
        ctx.note("Ctrl-A x ends the guest at any time; `poweroff` or `exit` in its shell does so cleanly");
    }
    let mut machine = prepared.start(folder, ctx)?;
    let console =
        machine.take_console().ok_or_else(|| Error::harness("this machine has no console socket"))?;
    let result = attend(&mut machine, console);
    let folder = machine.folder().clone();
    let end = match result {
        Ok(Some(end)) => end,
        Ok(None) => machine.stop(),
        Err(error) => {
            machine.stop();
            return Err(error);
        }
    };
    match end {
        End::PoweredOff | End::Asked => Ok(Outcome::Pass),
        End::Reset => {
            ctx.note(format_args!("the guest reset itself; see {}", folder.console().display()));
            Ok(Outcome::Problem)
        }
        End::QemuDied(status) => Err(Error::harness(format!(
            "QEMU ended by itself ({status}); its log is {}",
            folder.qemu_log().display()
        ))),
        End::DeviceDied(status) => Err(Error::harness(format!(
            "the device ended while the guest ran ({status}); its log is {}",
            folder.device_log().display()
        ))),
    }
}

/// Carries bytes between terminal and guest until the machine ends (how it did) or the user leaves (none).
fn attend(machine: &mut Machine, console: UnixStream) -> Result<Option<End>, Error> {
    // The guest's output has a thread of its own: a terminal that is held (Ctrl-S) must not hold the rest.
    let mut output = console.try_clone()?;
    let printer = thread::Builder::new().name("console".into()).spawn(move || {
        let mut buffer = [0; 4096];
        let mut stdout = io::stdout();
        while let Ok(n @ 1..) = output.read(&mut buffer) {
            if stdout.write_all(&buffer[..n]).and_then(|()| stdout.flush()).is_err() {
                break;
            }
        }
    })?;
    let raw = RawTerminal::enter()?;
    // The keyboard has one too, which is left behind in its read() when the guest ends first.
    let (left, leave) = io::pipe()?;
    let input = console.try_clone()?;
    thread::Builder::new().name("keyboard".into()).spawn(move || keyboard(input, leave))?;

    let result = loop {
        if poll::readable([Some(left.as_fd())], Some(Instant::now()))?[0] {
            break Ok(None);
        }
        match machine.next_or(left.as_fd(), Instant::now() + Duration::from_secs(3600)) {
            Ok(Occurrence::Ended(end)) => break Ok(Some(end)),
            Ok(_) => {}
            Err(error) => break Err(error.into()),
        }
    };
    // The last words have been written when QEMU closed the socket; ours ends the printer if QEMU still lives.
    if result.as_ref().is_ok_and(Option::is_some) {
        let _ = printer.join();
    } else {
        let _ = console.shutdown(Shutdown::Both);
    }
    drop(raw);
    result
}

/// Types to the guest what comes on stdin. Drops `leave` when the user wants to leave. A stdin that ends (a pipe) only
/// ends the typing: the script in it decides when the guest goes.
fn keyboard(mut guest: UnixStream, leave: io::PipeWriter) {
    let mut keys = Keys::default();
    let mut buffer = [0; 1024];
    let mut stdin = io::stdin();
    let is_terminal = stdin.is_terminal();
    loop {
        match stdin.read(&mut buffer) {
            Ok(n @ 1..) => {
                let (typed, done) = keys.filter(&buffer[..n]);
                if guest.write_all(&typed).is_err() || done {
                    break;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            _ if is_terminal => break, // hung up
            _ => {
                std::mem::forget(leave);
                return;
            }
        }
    }
    drop(leave);
}

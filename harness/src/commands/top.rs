//! `hmmstorm top`: what every machine that runs on this host is doing, from the outside: the counters of its GPUs, over the
//! control socket, and what its storm told last. It asks the device's process alone and disturbs no guest.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hmmstorm_abi::wire::control::{GpuStats, Reply, Request};
use hmmstorm_abi::wire::event::{Event, Progress, Record as Told};

use crate::cli::{Context, Error, Outcome};
use crate::report::compare::short;
use crate::report::text::clean;
use crate::vm::poll::readable;

/// Options of `hmmstorm top`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Look twice, print, and end
    #[arg(long)]
    once: bool,
}

/// What is asked of a device may not take longer.
const PATIENCE: Duration = Duration::from_millis(500);
/// Bytes at the end of the events that are read: a heartbeat is far shorter.
const TAIL: u64 = 16 << 10;
/// Columns where the width is not known.
const WIDTH: usize = 100;

/// A machine, at a moment.
#[derive(Clone, Debug)]
struct Look {
    at: Instant,
    gpus: Vec<GpuStats>,
    told: Option<Progress>,
    /// When the counters last changed.
    moved: Instant,
}

/// Runs the command.
pub fn run(args: Args, ctx: &Context) -> Result<Outcome, Error> {
    let live = io::stdout().is_terminal() && !args.once;
    let interval = Duration::from_secs(args.interval);
    let mut before: BTreeMap<PathBuf, Look> = BTreeMap::new();
    let mut first = true;
    loop {
        let mut now = BTreeMap::new();
        let mut lines = vec![head()];
        for machine in machines() {
            let Some(look) = look(&machine, before.get(&machine.control)) else { continue };
            lines.push(line(&machine.name(), before.get(&machine.control), &look));
            now.insert(machine.control, look);
        }
        if now.is_empty() {
            lines = vec!["no machine of hmmstorm runs on this host".to_owned()];
        }
        // The first look has no rates; a terminal shows it nevertheless, so that something is there at once.
        if live || !first || now.is_empty() {
            show(&lines, live)?;
        }
        if args.once && (!first || now.is_empty()) {
            return Ok(Outcome::Pass);
        }
        (before, first) = (now, false);
        // Woken by Ctrl-C, which is how this ends.
        let woken = readable([Some(ctx.interrupt.as_fd())], Some(Instant::now() + interval))?;
        if woken[0] {
            return Ok(Outcome::Pass);
        }
    }
}

/// A machine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Machine {
    /// The device's control socket.
    control: PathBuf,
    /// The run's folder.
    folder: PathBuf,
}

impl Machine {
    /// The last parts of its folder's path: a matrix names cells there.
    fn name(&self) -> String {
        let parts: Vec<_> =
            self.folder.components().rev().take(3).map(|part| part.as_os_str().to_string_lossy()).collect();
        parts.into_iter().rev().collect::<Vec<_>>().join("/")
    }
}

/// The machines of this user, by what their devices and QEMUs were started with.
fn machines() -> Vec<Machine> {
    let mut folders: Vec<String> = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let numeric = process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
        let Some(line) = numeric.then(|| fs::read(process.path().join("cmdline")).ok()).flatten() else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.contains("/events.jsonl") && line.contains("vfio-user-pci") {
            folders.push(line);
        }
    }
    let mut machines: Vec<Machine> = folders.iter().filter_map(|line| machine(line)).collect();
    machines.sort_by(|a, b| a.folder.cmp(&b.folder));
    machines.dedup();
    machines
}

/// From QEMU's command line: its sockets' folder and its events file.
fn machine(line: &str) -> Option<Machine> {
    let path_before = |end: &str| {
        let stop = line.find(end)?;
        let start = line[..stop].rfind(['\0', '=', '"', ':', ','])? + 1;
        Some(PathBuf::from(&line[start..stop]))
    };
    let folder = path_before("/events.jsonl")?;
    // Every socket of a machine is in one folder.
    let sockets = path_before("/qmp.sock").filter(|dir| dir.is_absolute())?;
    Some(Machine { control: sockets.join("control.sock"), folder })
}

fn look(machine: &Machine, before: Option<&Look>) -> Option<Look> {
    let gpus = ask(&machine.control).ok()?;
    let told = told(&machine.folder.join("events.jsonl")).ok().flatten();
    let at = Instant::now();
    let same = |before: &&Look| {
        let done = |gpus: &[GpuStats]| gpus.iter().map(|gpu| gpu.completions).sum::<u64>();
        let operations = |told: &Option<Progress>| told.as_ref().map(|told| (told.operations, told.faults));
        done(&before.gpus) == done(&gpus) && operations(&before.told) == operations(&told)
    };
    let moved = before.filter(same).map_or(at, |before| before.moved);
    Some(Look { at, gpus, told, moved })
}

fn ask(socket: &Path) -> io::Result<Vec<GpuStats>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all((serde_json::to_string(&Request::Stats)? + "\n").as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    match serde_json::from_str(&answer)? {
        Reply::Stats { gpus } => Ok(gpus),
        other => Err(io::Error::other(format!("an answer to another question: {other:?}"))),
    }
}

/// The last heartbeat in the events.
fn told(events: &Path) -> io::Result<Option<Progress>> {
    let mut file = File::open(events)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let heartbeat = |line: &str| match serde_json::from_str::<Told>(line).ok()?.event {
        Event::Progress(progress) | Event::Done { progress, .. } => Some(progress),
        _ => None,
    };
    Ok(text.lines().rev().find_map(heartbeat))
}

fn head() -> String {
    format!(
        "{:>7} {:>8} {:>8} {:>7} {:>8} {:>8} {:>7} {:>6} {:>5}  {}",
        "round", "ops/s", "faults/s", "inside", "gpu/s", "MB/s", "traps/s", "queued", "still", "run"
    )
}

/// A line of the table: rates since the look before.
#[expect(clippy::cast_precision_loss, reason = "rates for people")]
fn line(name: &str, before: Option<&Look>, now: &Look) -> String {
    let seconds = before.map_or(0.0, |before| now.at.duration_since(before.at).as_secs_f64());
    let rate = |was: u64, is: u64| {
        if seconds > 0.0 { short((is.saturating_sub(was)) as f64 / seconds) } else { "-".to_owned() }
    };
    let gpu = |of: fn(&GpuStats) -> u64| {
        let sum = |look: &Look| look.gpus.iter().map(of).sum::<u64>();
        (before.map_or(0, sum), sum(now))
    };
    let storm = |of: fn(&Progress) -> u64| {
        let value = |look: &Look| look.told.as_ref().map(of);
        match (before.and_then(value), value(now)) {
            (Some(was), Some(is)) => rate(was, is),
            _ => "-".to_owned(),
        }
    };
    let of_gpu = |of: fn(&GpuStats) -> u64| {
        let (was, is) = gpu(of);
        rate(was, is)
    };
    let round = now.told.as_ref().map_or("-".to_owned(), |told| told.round.to_string());
    let inside = now.told.as_ref().map_or("-".to_owned(), |told| told.outstanding.to_string());
    let mut text = String::new();
    let _ = write!(
        text,
        "{round:>7} {:>8} {:>8} {inside:>7} {:>8} {:>8} {:>7} {:>6} {:>4}s  {}",
        storm(|told| told.operations),
        storm(|told| told.faults),
        of_gpu(|gpu| gpu.completions),
        of_gpu(|gpu| gpu.bytes / 1_000_000),
        of_gpu(|gpu| gpu.register_reads + gpu.register_writes),
        gpu(|gpu| gpu.queued).1,
        now.at.duration_since(now.moved).as_secs(),
        clean(name)
    );
    text
}

fn show(lines: &[String], live: bool) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    let mut text = String::new();
    if live {
        let size = rustix::termios::tcgetwinsize(&out).ok();
        let width = size.map_or(WIDTH, |size| usize::from(size.ws_col));
        // Home, each line to its end, and nothing below: no flicker, and nothing of the scroll-back is lost.
        text.push_str("\x1b[H");
        for line in
            lines.iter().take(size.map_or(usize::MAX, |size| usize::from(size.ws_row).saturating_sub(1)))
        {
            let _ = write!(text, "{}\x1b[K\r\n", line.chars().take(width).collect::<String>());
        }
        text.push_str("\x1b[J");
    } else {
        for line in lines {
            let _ = writeln!(text, "{}", cut_right(line));
        }
    }
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn cut_right(line: &str) -> &str {
    line.trim_end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_known_by_its_qemu() {
        let line = "qemu-system-x86_64\0-qmp\0unix:/run/user/1/hmmstorm-Ab12cd/qmp.sock,server=on\0-chardev\0file,id=e,path=/x/m/runs/cell/seed-3/events.jsonl\0-device\0{\"driver\":\"vfio-user-pci\"}";
        let found = machine(line).expect("a machine");
        assert_eq!(found.control, Path::new("/run/user/1/hmmstorm-Ab12cd/control.sock"));
        assert_eq!(found.name(), "runs/cell/seed-3");
        assert_eq!(machine("bash\0-c\0cat /x/events.jsonl"), None);
    }
}

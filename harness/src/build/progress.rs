//! Progress of long work: one live line on a terminal, a plain line now and then elsewhere, nothing with `--quiet`.

use std::cell::{Cell, RefCell};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::BuildError;
use crate::cli::{Context, Interrupt, Verbosity};

/// How often work that is shown by plain lines says where it stands.
const PLAIN_INTERVAL: Duration = Duration::from_secs(20);

/// Where the parts of a build say what they do, and ask whether to go on.
#[derive(Debug)]
pub struct Progress {
    verbosity: Verbosity,
    live: bool,
    interrupt: Interrupt,
}

impl Progress {
    /// Speaks on stderr as the command line asked for.
    pub fn new(ctx: &Context) -> Self {
        Self { verbosity: ctx.verbosity, live: io::stderr().is_terminal(), interrupt: ctx.interrupt.clone() }
    }

    /// Says nothing and is never interrupted: for tests.
    pub fn silent() -> io::Result<Self> {
        Ok(Self { verbosity: Verbosity::Quiet, live: false, interrupt: Interrupt::detached()? })
    }

    #[cfg(test)]
    pub(super) fn interruptible(interrupt: Interrupt) -> Self {
        Self { verbosity: Verbosity::Quiet, live: false, interrupt }
    }

    /// Fails once the user has asked to stop.
    pub fn check(&self) -> Result<(), BuildError> {
        if self.interrupt.is_raised() { Err(BuildError::Interrupted) } else { Ok(()) }
    }

    /// Says one line.
    pub fn note(&self, text: impl std::fmt::Display) {
        if self.verbosity >= Verbosity::Normal {
            eprintln!("{text}");
        }
    }

    /// Says one line to those who asked for more.
    pub fn detail(&self, text: impl std::fmt::Display) {
        if self.verbosity >= Verbosity::Verbose {
            eprintln!("{text}");
        }
    }

    /// Begins a piece of work that takes long enough to be shown.
    pub fn step(&self, what: impl Into<String>, unit: Unit) -> Step<'_> {
        let what = what.into();
        let bar = (self.verbosity >= Verbosity::Normal && self.live).then(|| {
            let bar = ProgressBar::no_length().with_message(what.clone());
            bar.set_style(style(unit, false));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            self.note(format_args!("{what} ..."));
        }
        let now = Instant::now();
        Step {
            progress: self,
            what,
            unit,
            bar,
            started: now,
            said: Cell::new(now),
            state: RefCell::new((0, None)),
        }
    }
}

/// What a step counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nothing: only time passes.
    None,
    /// Bytes.
    Bytes,
    /// Steps of a build: objects, mostly.
    Steps,
}

/// A piece of work under way. Dropping it without [`Step::done`] takes the live line away and says nothing.
#[derive(Debug)]
pub struct Step<'a> {
    progress: &'a Progress,
    what: String,
    unit: Unit,
    bar: Option<ProgressBar>,
    started: Instant,
    said: Cell<Instant>,
    state: RefCell<(u64, Option<u64>)>,
}

impl Step<'_> {
    /// Says how far the work is: `done` of `total` units, as far as that is known.
    pub fn at(&self, done: u64, total: Option<u64>) {
        let total = total.map(|t| t.max(done));
        let before = self.state.replace((done, total));
        if let Some(bar) = &self.bar {
            if before.1 != total {
                bar.set_style(style(self.unit, total.is_some()));
                if let Some(total) = total {
                    bar.set_length(total);
                }
            }
            bar.set_position(done);
        }
        self.tick();
    }

    /// Shows that time passes. To be called a few times a second.
    pub fn tick(&self) {
        if self.bar.is_none() && self.said.get().elapsed() >= PLAIN_INTERVAL {
            self.said.set(Instant::now());
            let so_far = self.so_far();
            self.progress.note(format_args!("{}: {so_far}{}", self.what, seconds(self.started.elapsed())));
        }
    }

    /// The work is done; says how long it took.
    pub fn done(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.progress.note(format_args!("{}: done in {}", self.what, seconds(self.started.elapsed())));
    }

    fn so_far(&self) -> String {
        let (done, total) = *self.state.borrow();
        let show = |n: u64| match self.unit {
            Unit::Bytes => format!("{} MiB", n >> 20),
            Unit::None | Unit::Steps => n.to_string(),
        };
        match (self.unit, total) {
            (Unit::None, _) => String::new(),
            (Unit::Steps, Some(total)) => format!("{} of about {} steps, ", show(done), show(total)),
            (Unit::Steps, None) => format!("{} steps, ", show(done)),
            (Unit::Bytes, Some(total)) => format!("{} of {}, ", show(done), show(total)),
            (Unit::Bytes, None) => format!("{}, ", show(done)),
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A time that was taken, for people: `8.4 s`, `4 min 46 s`.
fn seconds(elapsed: Duration) -> String {
    let s = elapsed.as_secs();
    if s < 60 { format!("{:.1} s", elapsed.as_secs_f64()) } else { format!("{} min {} s", s / 60, s % 60) }
}

fn style(unit: Unit, has_end: bool) -> ProgressStyle {
    let template = match (unit, has_end) {
        (Unit::None, _) => "{spinner} {msg} {elapsed}",
        (Unit::Bytes, true) => "{spinner} {msg} {elapsed} {bar:30} {binary_bytes}/{binary_total_bytes}",
        (Unit::Bytes, false) => "{spinner} {msg} {elapsed} {binary_bytes}",
        (Unit::Steps, true) => "{spinner} {msg} {elapsed} {bar:30} {pos}/~{len} steps",
        (Unit::Steps, false) => "{spinner} {msg} {elapsed} {pos} steps",
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

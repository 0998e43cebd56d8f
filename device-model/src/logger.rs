//! Log lines on standard error, one a line, as `level: text`.

use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

#[derive(Debug)]
struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level() && (!is_transport(metadata.target()) || verbose())
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let level = match record.level() {
                Level::Error => "error",
                Level::Warn => "warning",
                Level::Info => "info",
                Level::Debug | Level::Trace => "debug",
            };
            // Whoever closed our standard error does not want to hear of it.
            let _ = writeln!(std::io::stderr().lock(), "{level}: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// The transport crate reports as errors what QEMU asks at each boot (`GET_IRQ_INFO` beyond MSI-X, for one).
fn is_transport(target: &str) -> bool {
    target.starts_with("vfio_user")
}

fn verbose() -> bool {
    log::max_level() >= LevelFilter::Debug
}

/// Sends log lines to standard error: from `info` up, or all with `verbose`.
pub fn start(verbose: bool) {
    // Fails only if a logger is set already, which then serves as well.
    let _ = log::set_logger(&Stderr);
    log::set_max_level(if verbose { LevelFilter::Debug } else { LevelFilter::Info });
}

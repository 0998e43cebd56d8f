//! The guest side of hmmstorm: PID 1 of the guest, and the command that runs storms in its shell.

mod accounting;
mod board;
mod cli;
mod clock;
mod cmdline;
mod gpu;
mod init;
mod machine;
mod measure;
mod oracle;
mod rng;
mod scenario;
mod sink;
mod supervisor;
mod sys;

use std::process::ExitCode;

fn main() -> ExitCode {
    if std::process::id() == 1 { init::run() } else { cli::run() }
}

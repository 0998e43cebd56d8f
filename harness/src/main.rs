//! The `hmmstorm` command: hands its arguments to [`hmmstorm::cli`] and exits with the code that comes back.

use std::process::ExitCode;

fn main() -> ExitCode {
    hmmstorm::cli::main()
}

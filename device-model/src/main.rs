//! `hmmstorm-device`: see [`hmmstorm_device`].

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use hmmstorm_device::config::Config;
use hmmstorm_device::{logger, service};

fn main() -> ExitCode {
    let config = Config::parse();
    if let Err(message) = config.check() {
        Config::command().error(clap::error::ErrorKind::ValueValidation, message).exit();
    }
    logger::start(config.verbose);
    match service::run(&config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

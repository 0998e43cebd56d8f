//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use hmmstorm_abi::wire::control::Chaos;

use crate::chaos::check;

/// Smallest VRAM and smallest aperture: the granularity of memory BARs on many root ports.
const SIZE_MIN: u64 = 1 << 20;
/// Largest VRAM: what 40-bit guest physical addresses leave room for, for one GPU.
const SIZE_MAX: u64 = 1 << 38;
/// Most GPUs: what the peer apertures of descriptors can name.
const GPUS_MAX: i64 = 16;

/// hsgpu: a PCIe GPU with its own memory, served to QEMU over vfio-user.
///
/// Prints one JSON line with "ready" once every socket listens. Ends with status 0 on SIGTERM, on SIGINT, on a
/// "shutdown" request on the control socket and, if so asked, at the end of its standard input.
#[derive(Clone, Debug, Parser)]
#[command(version, name = "hmmstorm-device", args_override_self = true)]
pub struct Config {
    /// Number of GPUs; they reach each other's VRAM.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=GPUS_MAX))]
    pub gpus: u8,

    /// Folder for the sockets: gpu0.sock, gpu1.sock, … for QEMU and control.sock.
    #[arg(long, value_name = "DIR")]
    pub socket_dir: PathBuf,

    /// VRAM of each GPU: a power of two from 1M up, with suffix K, M or G.
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = memory_size)]
    pub vram: u64,

    /// Part of the VRAM that BAR 2 shows, likewise a power of two; all of it by default.
    #[arg(long, value_name = "SIZE", value_parser = memory_size)]
    pub aperture: Option<u64>,

    /// Trap every access of the guest's CPUs to VRAM, in place of mapping it into the guest.
    #[arg(long)]
    pub vram_trap: bool,

    /// When work is done: on worker threads, or before the doorbell write returns.
    #[arg(long, value_enum, default_value_t = Mode::Threaded)]
    pub mode: Mode,

    /// Longest that an idle channel looks for new work before it asks for a doorbell, in microseconds; threaded mode only.
    /// It gives up sooner once it has waited in vain.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 400, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
    pub poll_us: u64,

    /// Translations that the TLB of each GPU holds; the fewer, the more walks, and the sooner a stale one is gone.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1 << 20))]
    pub tlb_entries: u32,

    /// Faults on purpose, e.g. seed=7,corrupt-every=1000.
    #[arg(long, value_name = "KEY=VALUE,…", default_value = "", hide_default_value = true, value_parser = chaos)]
    pub chaos: Chaos,

    /// End when standard input ends, i.e. with the process that holds its other end.
    #[arg(long)]
    pub exit_with_stdin: bool,

    /// Log what the transport does, too.
    #[arg(long)]
    pub verbose: bool,
}

impl Config {
    /// Bytes of VRAM that BAR 2 shows.
    pub fn aperture(&self) -> u64 {
        self.aperture.unwrap_or(self.vram)
    }

    /// Checks what no single option can.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn check(&self) -> Result<(), String> {
        if self.aperture() > self.vram {
            return Err(format!(
                "--aperture {} is larger than --vram {}: BAR 2 can show no more than there is",
                self.aperture(),
                self.vram
            ));
        }
        Ok(())
    }
}

/// When the device works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// A worker thread for each channel, in real time, with interrupts.
    Threaded,
    /// A doorbell returns when the work is done; no interrupts, no clock: the same guest, the same result.
    Synchronous,
}

fn memory_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = u64::from_str(digits).map_err(|_| format!("'{text}' is no size like 64M or 1G"))?;
    match number.checked_mul(1 << shift) {
        Some(size) if size.is_power_of_two() && (SIZE_MIN..=SIZE_MAX).contains(&size) => Ok(size),
        _ => Err(format!(
            "'{text}' is not a power of two from 1M to {}G, as a PCI BAR must be",
            SIZE_MAX >> 30
        )),
    }
}

fn chaos(text: &str) -> Result<Chaos, String> {
    let plan = text.parse()?;
    check(&plan)?;
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(options: &[&str]) -> Result<Config, clap::Error> {
        Config::try_parse_from(["hmmstorm-device", "--socket-dir", "d"].iter().chain(options))
    }

    #[test]
    fn sizes_take_suffixes_and_must_fit_a_bar() {
        assert_eq!(memory_size("256M"), Ok(256 << 20));
        assert_eq!(memory_size("2g"), Ok(2 << 30));
        assert_eq!(memory_size("1048576"), Ok(1 << 20));
        for bad in [
            "",
            "M",
            "3M",
            "512K",
            "0",
            "-1M",
            "1T",
            "99999999999999999999",
            "18446744073709551615G",
            "1024G",
            "1é",
        ] {
            assert!(memory_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn chaos_names_what_it_does_not_know() {
        let plan = Chaos { seed: 7, corrupt_every: 1000, dead: true, ..Chaos::default() };
        assert_eq!(chaos("seed=7,corrupt-every=1000,dead=true"), Ok(plan));
        assert_eq!(chaos(""), Ok(Chaos::default()));
        let plan = Chaos { hang_channel: Some(3), exponential: true, ..Chaos::default() };
        assert_eq!(chaos("hang-channel=3,exponential=true"), Ok(plan));
        assert!(chaos("hang-channel=8").expect_err("no such channel").contains("channels are 0 to 7"));
        assert!(chaos("sed=7").expect_err("no such key").contains("sed"));
        assert!(chaos("seed").is_err());
        assert!(chaos("seed=x").is_err());
        assert!(chaos("seed=-1").is_err());
    }

    #[test]
    fn the_aperture_is_all_of_vram_unless_smaller() {
        let config = parse(&["--vram", "64M"]).expect("valid");
        assert_eq!(config.aperture(), 64 << 20);
        assert!(config.check().is_ok());
        let config = parse(&["--vram", "64M", "--aperture", "16M"]).expect("valid");
        assert_eq!(config.aperture(), 16 << 20);
        assert!(parse(&["--vram", "16M", "--aperture", "64M"]).expect("parses").check().is_err());
    }

    #[test]
    fn gpus_are_one_to_sixteen() {
        assert!(parse(&["--gpus", "0"]).is_err());
        assert!(parse(&["--gpus", "17"]).is_err());
        assert_eq!(parse(&["--gpus", "16"]).expect("valid").gpus, 16);
    }
}

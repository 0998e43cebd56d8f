//! Samples what every CPU of the guest does, from outside, over QEMU's monitor.
//!
//! A sample is mode, instruction pointer and (in kernel mode) the stack of a CPU. Nothing is injected into the guest and
//! nothing waits for it, so sampling leaves a deterministic guest's schedule alone.

pub mod registers;
mod tree;
mod walk;

use std::collections::VecDeque;
use std::time::Duration;

pub use tree::{CpuSummary, TreeRules};
use walk::walk;

use super::stack::Frame;
use super::symbols::Symbols;

/// Samples kept a CPU: ten minutes at 10 Hz.
const KEPT: usize = 6000;

/// A CPU's registers, as far as the judge needs them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuRegisters {
    /// CPU number.
    pub cpu: u32,
    /// Instruction pointer.
    pub rip: u64,
    /// Stack pointer.
    pub rsp: u64,
    /// Frame pointer.
    pub rbp: u64,
    /// Privilege level; 3 is user mode.
    pub cpl: u8,
    /// The CPU waits for an interrupt.
    pub halted: bool,
    /// Digest of what the general registers hold.
    pub values: u64,
}

/// How a sampler sees into a guest.
pub trait GuestProbe {
    /// Why it could not.
    type Error: std::error::Error;

    /// The registers of every CPU.
    fn registers(&mut self) -> Result<Vec<CpuRegisters>, Self::Error>;

    /// `length` bytes of guest memory at a virtual address, as this CPU maps it. `Ok(None)` where nothing is mapped.
    fn read_memory(&mut self, cpu: u32, address: u64, length: usize) -> Result<Option<Vec<u8>>, Self::Error>;
}

/// What a CPU did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// User code.
    User,
    /// Kernel code.
    Kernel,
    /// Nothing.
    Halted,
}

/// One look at one CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Host time since the run began.
    pub at: Duration,
    /// What it did.
    pub mode: Mode,
    /// Its instruction pointer.
    pub ip: u64,
    /// Digest of what its general registers hold.
    pub values: u64,
    /// Its kernel stack, leaf first; empty unless in kernel mode.
    pub stack: Vec<Frame>,
    /// The stack reaches its root.
    pub complete: bool,
}

/// Collects samples and says what each CPU was about.
#[derive(Debug, Default)]
pub struct Sampler {
    symbols: Symbols,
    cpus: Vec<VecDeque<Sample>>,
}

impl Sampler {
    /// A sampler that names frames by these symbols.
    #[must_use]
    pub fn new(symbols: Symbols) -> Self {
        Self { symbols, cpus: Vec::new() }
    }

    /// The symbols, to add modules to.
    pub fn symbols_mut(&mut self) -> &mut Symbols {
        &mut self.symbols
    }

    /// Looks at every CPU once.
    pub fn sample<P: GuestProbe>(&mut self, at: Duration, probe: &mut P) -> Result<(), P::Error> {
        for registers in probe.registers()? {
            let mode = match registers {
                CpuRegisters { halted: true, .. } => Mode::Halted,
                CpuRegisters { cpl: 3, .. } => Mode::User,
                _ => Mode::Kernel,
            };
            let mut failed = None;
            let walked = if mode == Mode::Kernel {
                let read = |address, length| match probe.read_memory(registers.cpu, address, length) {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        failed = Some(error);
                        None
                    }
                };
                let leaf = self.symbols.frame(registers.rip);
                let into = self.symbols.is_text(registers.rip).then_some(leaf.offset);
                let is_root = |address| self.symbols.is_root(address);
                walk(&registers, into, read, is_root)
            } else {
                walk::Walk::default()
            };
            if let Some(error) = failed {
                return Err(error);
            }
            let stack = walked.addresses.iter().map(|&address| self.symbols.frame(address)).collect();
            self.push(
                registers.cpu,
                Sample {
                    at,
                    mode,
                    ip: registers.rip,
                    values: registers.values,
                    stack,
                    complete: walked.complete,
                },
            );
        }
        Ok(())
    }

    /// Takes in a sample.
    pub fn push(&mut self, cpu: u32, sample: Sample) {
        let index = cpu as usize;
        if self.cpus.len() <= index {
            self.cpus.resize_with(index + 1, VecDeque::new);
        }
        let samples = &mut self.cpus[index];
        if samples.len() == KEPT {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// What each CPU did since a moment of host time.
    #[must_use]
    pub fn summaries(&self, since: Duration, rules: &TreeRules) -> Vec<CpuSummary> {
        let cpus = self.cpus.iter().enumerate();
        cpus.map(|(cpu, samples)| {
            let samples: Vec<&Sample> = samples.iter().filter(|sample| sample.at >= since).collect();
            CpuSummary::of(u32::try_from(cpu).unwrap_or(u32::MAX), &samples, rules)
        })
        .collect()
    }

    /// Number of CPUs seen.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        u32::try_from(self.cpus.len()).unwrap_or(u32::MAX)
    }

    /// Samples of a CPU, oldest first.
    pub fn samples(&self, cpu: u32) -> impl Iterator<Item = &Sample> {
        self.cpus.get(cpu as usize).into_iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(Vec<CpuRegisters>, Vec<u8>, u64);

    impl GuestProbe for Fixed {
        type Error = std::io::Error;

        fn registers(&mut self) -> Result<Vec<CpuRegisters>, Self::Error> {
            Ok(self.0.clone())
        }

        fn read_memory(
            &mut self,
            _cpu: u32,
            address: u64,
            length: usize,
        ) -> Result<Option<Vec<u8>>, Self::Error> {
            let Some(from) = address.checked_sub(self.2).and_then(|from| usize::try_from(from).ok()) else {
                return Ok(None);
            };
            Ok(self.1.get(from..(from + length).min(self.1.len())).map(<[u8]>::to_vec))
        }
    }

    #[test]
    fn modes_and_stacks() {
        let base = 0xffff_8880_0000_4000;
        let mut memory = vec![0; 0x4000];
        memory[0x3f08..0x3f10].copy_from_slice(&0x1020u64.to_le_bytes());
        let at = |cpu, cpl, halted| CpuRegisters {
            cpu,
            rip: 0x1001,
            rsp: base + 0x3ef0,
            rbp: base + 0x3f00,
            cpl,
            halted,
            values: 0,
        };
        let mut probe = Fixed(vec![at(0, 0, true), at(1, 3, false), at(2, 0, false)], memory, base);
        let mut sampler =
            Sampler::new(Symbols::from_table(&[(0x1000, 0x10, "leaf"), (0x1010, 0x20, "ret_from_fork")]));
        sampler.sample(Duration::from_secs(1), &mut probe).expect("a sample");
        let modes: Vec<Mode> =
            (0..3).flat_map(|cpu| sampler.samples(cpu).map(|sample| sample.mode)).collect();
        assert_eq!(modes, [Mode::Halted, Mode::User, Mode::Kernel]);
        let sample = sampler.samples(2).next().expect("a sample of CPU 2");
        let names: Vec<&str> = sample.stack.iter().map(|frame| frame.function.as_str()).collect();
        assert_eq!((names.as_slice(), sample.complete), (["leaf", "ret_from_fork"].as_slice(), true));
    }

    #[test]
    fn old_samples_make_room() {
        let mut sampler = Sampler::default();
        for n in 0..KEPT as u64 + 10 {
            sampler.push(
                0,
                Sample {
                    at: Duration::from_millis(n),
                    mode: Mode::User,
                    ip: 0,
                    values: 0,
                    stack: Vec::new(),
                    complete: true,
                },
            );
        }
        assert_eq!(sampler.samples(0).count(), KEPT);
        assert_eq!(sampler.samples(0).next().map(|sample| sample.at), Some(Duration::from_millis(10)));
    }
}

//! The judge: from what was seen of a run to a verdict that holds up.
//!
//! Observations come from independent sources: the device's own counters, the storm's records, samples of every CPU
//! taken from outside, and the kernel's console. [`console`] and [`sampler`] turn raw bytes and registers into data,
//! [`verdict`] is a state machine over that data and knows neither processes nor clocks of its own, [`cycle`] names
//! who waits for whom, [`record`] writes it down. `docs/verdicts.md` says how each verdict is reached.

pub mod console;
pub mod cycle;
pub mod kselftest;
pub mod measures;
pub mod record;
pub mod sampler;
pub mod scenario;
pub mod stack;
pub mod structures;
pub mod symbols;
pub mod verdict;

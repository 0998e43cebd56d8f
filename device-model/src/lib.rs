//! hsgpu: a PCIe GPU with its own memory, in a process beside a stock QEMU, over vfio-user.
//!
//! From the outside in: [`service`] is the process, [`transport`] knows vfio-user, [`control`] the control socket;
//! [`machine`] holds the GPUs, [`gpu`] is one of them: [`config_space`], [`registers`], and [`channel`]s, each with a
//! [`ring`], an [`engine`] and [`fence`]s. [`core`] is what they share: [`guest_memory`], [`vram`], [`mmu`],
//! [`faults`], [`irq`], [`chaos`], [`stats`]. [`reset`] says what a reset clears.
//!
//! `docs/hardware.md` is the manual of the hardware that this makes.

pub mod channel;
pub mod chaos;
pub mod config;
pub mod config_space;
pub mod control;
pub mod core;
pub mod engine;
pub mod faults;
pub mod fence;
pub mod gpu;
pub mod guest_memory;
pub mod irq;
pub mod logger;
pub mod machine;
pub mod mmu;
pub mod registers;
pub mod reset;
pub mod ring;
pub mod service;
pub mod stats;
pub mod transport;
pub mod vram;

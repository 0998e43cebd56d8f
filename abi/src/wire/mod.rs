//! JSON between hmmstorm's processes: one object a line, over a virtio-serial port and over Unix sockets.

pub mod control;
pub mod event;

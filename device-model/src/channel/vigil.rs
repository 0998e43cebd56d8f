//! How long an idle channel looks for new work before it asks for a doorbell, which costs the guest a trap.
//!
//! While work comes in quick succession, the channel looks for as long as it may. When the last piece was long in coming
//! it gives up sooner, and leaves the host's CPU to those who need it. (KVM polls for halted CPUs by the same reasoning.)

use std::time::{Duration, Instant};

/// Part of its time for which a channel looks that has waited in vain.
const SHORT: u32 = 8;

/// What one channel has learned.
#[derive(Debug)]
pub(super) struct Vigil {
    longest: Duration,
    idle_since: Option<Instant>,
    in_vain: bool,
}

impl Vigil {
    /// Never looks for longer than `longest`.
    pub(super) fn new(longest: Duration) -> Self {
        Self { longest, idle_since: None, in_vain: false }
    }

    /// The channel is idle from `now` on; for how long it should look.
    pub(super) fn begins(&mut self, now: Instant) -> Duration {
        self.idle_since = Some(now);
        if self.in_vain { self.longest / SHORT } else { self.longest }
    }

    /// There is work again.
    pub(super) fn ends(&mut self, now: Instant) {
        if let Some(since) = self.idle_since.take() {
            self.in_vain = now.duration_since(since) > self.longest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_looks_for_longer_while_that_pays() {
        let longest = Duration::from_micros(800);
        let mut vigil = Vigil::new(longest);
        let start = Instant::now();
        assert_eq!(vigil.begins(start), longest);
        // A doorbell that it would have seen coming, had it looked to the end.
        vigil.ends(start + Duration::from_micros(700));
        assert_eq!(vigil.begins(start), longest);
        vigil.ends(start + Duration::from_millis(3));
        assert_eq!(vigil.begins(start), longest / SHORT);
        // Work that came while it looked no more, but soon.
        vigil.ends(start + Duration::from_micros(300));
        assert_eq!(vigil.begins(start), longest);
    }

    #[test]
    fn work_without_a_wait_teaches_nothing() {
        let mut vigil = Vigil::new(Duration::ZERO);
        vigil.ends(Instant::now());
        assert!(!vigil.in_vain);
        assert_eq!(vigil.begins(Instant::now()), Duration::ZERO);
    }
}

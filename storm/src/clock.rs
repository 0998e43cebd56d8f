//! Guest time.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, in nanoseconds: what records carry and what limits are measured in. No choice of a workload
/// depends on it.
pub(crate) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// Polls `ready` every 10 ms of guest time until it gives something, at most for `limit`.
pub(crate) fn poll<T>(limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let end = monotonic_ns() + limit.as_nanos() as u64;
    loop {
        if let Some(value) = ready() {
            return Some(value);
        }
        if monotonic_ns() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_asks_until_there_is_something_and_at_least_once() {
        let mut asked = 0;
        let answer = poll(Duration::from_secs(60), || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(answer, Some(3));
        assert_eq!(poll(Duration::ZERO, || None::<()>), None);
    }
}

//! Others on the host: busy loops pinned to its CPUs, for a while.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Busy loops, ended when this is dropped, or by themselves after a time.
#[derive(Debug)]
pub(super) struct HostLoad {
    stop: Arc<AtomicBool>,
    loops: Vec<JoinHandle<()>>,
}

impl HostLoad {
    /// Starts `per_cpu` loops on each CPU that this process may use, for `limit` at most.
    pub(super) fn start(per_cpu: u32, limit: Duration) -> io::Result<Self> {
        let allowed = sched_getaffinity(None)?;
        let end = Instant::now() + limit;
        let mut load = Self { stop: Arc::default(), loops: Vec::new() };
        let cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
        for cpu in cpus.flat_map(|cpu| (0..per_cpu).map(move |_| cpu)) {
            let stop = Arc::clone(&load.stop);
            let body = move || {
                let mut only = CpuSet::new();
                only.set(cpu);
                // A loop that is not pinned is in the way too.
                let _ = sched_setaffinity(None, &only);
                while !stop.load(Relaxed) && Instant::now() < end {
                    for _ in 0..100_000 {
                        std::hint::spin_loop();
                    }
                }
            };
            load.loops.push(thread::Builder::new().name("load".into()).spawn(body)?);
        }
        Ok(load)
    }
}

impl Drop for HostLoad {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        for thread in self.loops.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_end_with_their_guard_and_by_themselves() {
        let load = HostLoad::start(1, Duration::from_secs(60)).expect("threads");
        assert!(!load.loops.is_empty());
        drop(load);
        let load = HostLoad::start(1, Duration::ZERO).expect("threads");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !load.loops.iter().all(JoinHandle::is_finished) {
            assert!(Instant::now() < deadline, "a loop outlives its time");
            thread::yield_now();
        }
    }
}

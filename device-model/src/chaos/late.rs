//! Interrupts that come late, by a thread that begins with the first of them and sleeps until one is due.
//!
//! Interrupts are messages that may become one, so a vector has one late interrupt at a time: the guest cannot make the
//! list of them long.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hmmstorm_abi::pci::VECTORS;

use crate::irq::Interrupts;

#[derive(Debug, Default)]
struct Due {
    vectors: [Option<Instant>; VECTORS],
    end: bool,
}

#[derive(Debug, Default)]
struct Shared {
    due: Mutex<Due>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Due> {
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, interrupts: &Interrupts) {
        let mut due = self.lock();
        while !due.end {
            let now = Instant::now();
            for (vector, at) in (0..).zip(&mut due.vectors) {
                if at.is_some_and(|at| at <= now) {
                    *at = None;
                    interrupts.raise(vector);
                }
            }
            due = match due.vectors.iter().flatten().min() {
                None => self.changed.wait(due).unwrap_or_else(PoisonError::into_inner),
                Some(next) => {
                    let time = next.saturating_duration_since(now);
                    self.changed.wait_timeout(due, time).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

/// The late interrupts of one GPU. Dropping it drops them.
#[derive(Debug)]
pub struct Late {
    shared: Arc<Shared>,
    interrupts: Arc<Interrupts>,
    start: Once,
}

impl Late {
    /// For these vectors.
    pub fn new(interrupts: Arc<Interrupts>) -> Self {
        Self { shared: Arc::default(), interrupts, start: Once::new() }
    }

    /// Raises `vector` in `time` from now, or when it is due already.
    pub fn raise(&self, vector: u16, time: Duration) {
        self.start.call_once(|| {
            let (shared, interrupts) = (Arc::clone(&self.shared), Arc::clone(&self.interrupts));
            let name = "late-interrupts".to_owned();
            if let Err(error) = thread::Builder::new().name(name).spawn(move || shared.run(&interrupts)) {
                log::error!("no thread for late interrupts, which are lost then: {error}");
            }
        });
        let at = Instant::now() + time;
        if let Some(due) = self.shared.lock().vectors.get_mut(usize::from(vector)) {
            *due = Some(due.map_or(at, |before| before.min(at)));
        }
        self.shared.changed.notify_one();
    }

    /// Forgets those that are not due yet.
    pub fn clear(&self) {
        self.shared.lock().vectors = Default::default();
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        self.shared.lock().end = true;
        self.shared.changed.notify_one();
    }
}

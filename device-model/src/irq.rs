//! MSI-X vectors: an eventfd each, given and taken by the VMM, and pending bits for those it has not given.

use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use hmmstorm_abi::pci::VECTORS;

/// Why vectors could not be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VectorError {
    /// The function has no such vectors.
    #[error("vectors {start}+{count} of {VECTORS}")]
    NoSuchVector {
        /// First vector.
        start: u32,
        /// How many.
        count: u32,
    },
    /// Neither one eventfd a vector nor none at all.
    #[error("{given} eventfds for {count} vectors")]
    WrongCount {
        /// Eventfds given.
        given: usize,
        /// Vectors named.
        count: u32,
    },
}

#[derive(Debug, Default)]
struct Vector {
    eventfd: Option<File>,
    pending: bool,
}

impl Vector {
    /// Signals the VMM, or remembers to.
    fn raise(&mut self) {
        self.pending = match &mut self.eventfd {
            // An eventfd refuses only when its counter is about to overflow: then the VMM is long since signalled.
            Some(eventfd) => eventfd.write_all(&1_u64.to_ne_bytes()).is_err(),
            None => true,
        };
    }
}

/// The vectors of one GPU. QEMU keeps table and masks; while a vector is masked or off, it has no eventfd here, and
/// an interrupt waits as a pending bit, as on any PCI function.
#[derive(Debug, Default)]
pub struct Interrupts {
    vectors: Mutex<[Vector; VECTORS]>,
}

impl Interrupts {
    fn lock(&self) -> MutexGuard<'_, [Vector; VECTORS]> {
        self.vectors.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises `vector`. Vectors the function does not have are ignored.
    pub fn raise(&self, vector: u16) {
        if let Some(vector) = self.lock().get_mut(usize::from(vector)) {
            vector.raise();
        }
    }

    /// Connects `count` vectors from `start` on to `eventfds`, or disconnects them if there are none. A vector that
    /// was pending fires at once.
    ///
    /// # Errors
    /// [`VectorError`]; nothing has changed then.
    pub fn connect(&self, start: u32, count: u32, eventfds: Vec<File>) -> Result<(), VectorError> {
        let mut vectors = self.lock();
        let none = VectorError::NoSuchVector { start, count };
        let end = start.checked_add(count).ok_or(none)?;
        let range = vectors.get_mut(start as usize..end as usize).ok_or(none)?;
        if eventfds.is_empty() {
            range.iter_mut().for_each(|vector| vector.eventfd = None);
        } else if eventfds.len() == range.len() {
            for (vector, eventfd) in range.iter_mut().zip(eventfds) {
                vector.eventfd = Some(eventfd);
                if vector.pending {
                    vector.raise();
                }
            }
        } else {
            return Err(VectorError::WrongCount { given: eventfds.len(), count });
        }
        Ok(())
    }

    /// Raises `count` vectors from `start` on, as a test of the path.
    ///
    /// # Errors
    /// [`VectorError::NoSuchVector`]; nothing was raised then.
    pub fn test(&self, start: u32, count: u32) -> Result<(), VectorError> {
        let none = VectorError::NoSuchVector { start, count };
        let end = start.checked_add(count).ok_or(none)?;
        self.lock().get_mut(start as usize..end as usize).ok_or(none)?.iter_mut().for_each(Vector::raise);
        Ok(())
    }

    /// Disconnects every vector and forgets what is pending.
    pub fn disconnect_all(&self) {
        *self.lock() = Default::default();
    }

    /// Forgets what is pending; connections stay.
    pub fn clear_pending(&self) {
        self.lock().iter_mut().for_each(|vector| vector.pending = false);
    }

    /// The pending-bit array, bit `n` for vector `n`.
    pub fn pending(&self) -> u64 {
        self.lock().iter().rev().fold(0, |bits, vector| bits << 1 | u64::from(vector.pending))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    /// An eventfd that does not block, and a second handle to it.
    fn pair() -> (File, File) {
        let ours = File::from(eventfd(0, EventfdFlags::NONBLOCK).expect("an eventfd"));
        let theirs = ours.try_clone().expect("a spare descriptor");
        (ours, theirs)
    }

    /// How often it was signalled since the last look.
    fn signals(eventfd: &File) -> u64 {
        use std::io::Read;
        let mut count = [0; 8];
        let mut eventfd = eventfd;
        eventfd.read_exact(&mut count).map_or(0, |()| u64::from_ne_bytes(count))
    }

    #[test]
    fn an_interrupt_reaches_its_eventfd_and_no_other() {
        let interrupts = Interrupts::default();
        let (a, a_fd) = pair();
        let (b, b_fd) = pair();
        interrupts.connect(1, 2, vec![a_fd, b_fd]).expect("vectors 1 and 2 exist");
        interrupts.raise(2);
        assert_eq!((signals(&a), signals(&b)), (0, 1));
    }

    #[test]
    fn a_masked_vector_pends_until_it_is_connected() {
        let interrupts = Interrupts::default();
        interrupts.raise(3);
        assert_eq!(interrupts.pending(), 1 << 3);
        let (fd, theirs) = pair();
        interrupts.connect(3, 1, vec![theirs]).expect("vector 3 exists");
        assert_eq!(signals(&fd), 1);
        assert_eq!(interrupts.pending(), 0);
        interrupts.connect(3, 1, Vec::new()).expect("vector 3 exists");
        interrupts.raise(3);
        assert_eq!(signals(&fd), 0);
    }

    #[test]
    fn vectors_outside_the_function_are_refused() {
        let interrupts = Interrupts::default();
        let (_, fd) = pair();
        assert!(interrupts.connect(u32::MAX, 2, Vec::new()).is_err());
        assert!(interrupts.connect(VECTORS as u32, 1, vec![fd]).is_err());
        assert!(interrupts.test(VECTORS as u32 - 1, 2).is_err());
        interrupts.raise(u16::MAX);
    }
}

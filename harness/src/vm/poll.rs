//! Waiting for one of several descriptors, with a deadline. Nothing in the harness sleeps or polls at intervals.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until at least one of `fds` is readable, hung up or broken, and says which are. All false: the deadline has
/// passed.
pub fn readable<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let timeout = deadline.map(|d| timespec(d.saturating_duration_since(Instant::now())));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let mut states = polled.iter().map(|p| !p.revents().is_empty());
    Ok(fds.map(|fd| fd.is_some() && states.next().unwrap_or(false)))
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: duration.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn says_which_one_and_minds_the_deadline() {
        let (a, _a) = io::pipe().expect("pipe");
        let (b, mut feed) = io::pipe().expect("pipe");
        let soon = Some(Instant::now() + Duration::from_millis(10));
        let none = readable([Some(a.as_fd()), None, Some(b.as_fd())], soon).expect("poll");
        assert_eq!(none, [false; 3]);
        feed.write_all(b"x").expect("write");
        let one = readable([Some(a.as_fd()), None, Some(b.as_fd())], None).expect("poll");
        assert_eq!(one, [false, false, true]);
    }
}

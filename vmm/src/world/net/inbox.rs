//! Frames that have come and that the guest has not got yet.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The most frames that wait, and the most bytes.
const FRAMES_MAX: usize = 4096;
const BYTES_MAX: usize = 8 << 20;
/// A frame that the guest had no buffer for during this long is of no use to it any more: whoever sent
/// it has sent it again.
const STALE: Duration = Duration::from_secs(2);

/// A queue with an end. When it is full, the link's other end waits, or drops what the kernel does not
/// keep for it; what nobody takes in time is dropped.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    frames: Mutex<Frames>,
    taken: Condvar,
    /// How many there are, for a look that costs nothing.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Frames {
    queue: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// The guest's side is gone: nobody will take anything.
    closed: bool,
}

impl Frames {
    fn is_full(&self) -> bool {
        self.queue.len() >= FRAMES_MAX || self.bytes >= BYTES_MAX
    }

    fn pop(&mut self) -> Option<(Instant, Vec<u8>)> {
        let (came, frame) = self.queue.pop_front()?;
        self.bytes -= frame.len();
        Some((came, frame))
    }
}

impl Inbox {
    fn frames(&self) -> MutexGuard<'_, Frames> {
        self.frames
            .lock()
            .expect("nobody panics with frames in hand")
    }

    /// Adds a frame, and waits while there is no room for it. Whether it is the only one there;
    /// `None` if nobody will ever take it.
    pub(super) fn push(&self, frame: Vec<u8>) -> Option<bool> {
        let mut frames = self.frames();
        while frames.is_full() && !frames.closed {
            let waited = self.taken.wait_timeout(frames, STALE);
            let (still, timeout) = waited.expect("nobody panics with frames in hand");
            frames = still;
            if timeout.timed_out() && frames.is_full() {
                frames.pop();
            }
        }
        if frames.closed {
            return None;
        }
        frames.bytes += frame.len();
        frames.queue.push_back((Instant::now(), frame));
        self.count.store(frames.queue.len(), Ordering::SeqCst);
        Some(frames.queue.len() == 1)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::SeqCst)
    }

    /// The next one that is not stale.
    pub(super) fn pop(&self) -> Option<Vec<u8>> {
        if self.count() == 0 {
            return None;
        }
        let mut frames = self.frames();
        let fresh = std::iter::from_fn(|| frames.pop()).find(|(came, _)| came.elapsed() < STALE);
        self.count.store(frames.queue.len(), Ordering::SeqCst);
        self.taken.notify_one();
        fresh.map(|(_, frame)| frame)
    }

    /// Nobody will take anything any more.
    pub(super) fn close(&self) {
        self.frames().closed = true;
        self.taken.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn frames_leave_in_the_order_in_which_they_came() {
        let inbox = Inbox::default();
        assert!(inbox.count() == 0 && inbox.pop().is_none());
        assert_eq!(inbox.push(vec![1]), Some(true));
        assert_eq!(inbox.push(vec![2]), Some(false));
        assert_eq!(
            (inbox.pop(), inbox.pop(), inbox.pop()),
            (Some(vec![1]), Some(vec![2]), None)
        );
        assert_eq!(inbox.push(vec![3]), Some(true));
    }

    #[test]
    fn a_full_queue_keeps_the_other_end_waiting_until_some_are_taken_or_nobody_will() {
        let inbox = Arc::new(Inbox::default());
        for _ in 0..FRAMES_MAX {
            inbox.push(vec![0; 60]);
        }
        let pushes = Arc::clone(&inbox);
        let pusher = std::thread::spawn(move || (pushes.push(vec![1]), pushes.push(vec![2])));
        assert!(inbox.pop().is_some());
        while inbox.count() < FRAMES_MAX {
            std::thread::yield_now();
        }
        assert!(!pusher.is_finished());
        inbox.close();
        assert_eq!(pusher.join().unwrap(), (Some(false), None));
    }

    #[test]
    fn the_longest_frames_fill_it_by_their_bytes() {
        let mut frames = Frames::default();
        while !frames.is_full() {
            frames.bytes += 65_550;
            frames.queue.push_back((Instant::now(), vec![0; 65_550]));
        }
        assert!(frames.bytes < BYTES_MAX + 65_550 && frames.queue.len() < FRAMES_MAX);
    }
}

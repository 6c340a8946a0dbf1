//! Wishes for marks, on their way to the vCPU's thread.
//!
//! It alone knows which exit is the last complete one when a wish comes. It says that and goes on: nothing is written
//! or printed there, and to the guest nothing has happened. Whoever keeps the marks hears of both and does the rest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Mutex, MutexGuard};

use hindsight_replay::Complete;

/// So many wait at most. A machine takes all of them whenever it comes back.
const WAITING_MAX: usize = 64;

/// Who wants a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkAsker {
    /// The operator, by a key.
    Key,
    /// Whoever sent SIGUSR2.
    Signal,
    /// Another program.
    Command,
}

/// A wish that the present moment be marked.
#[derive(Debug)]
pub struct MarkWish {
    /// Whose it is.
    pub by: MarkAsker,
    /// The mark's name, if that is given.
    pub name: Option<String>,
    /// Where somebody waits for what becomes of it.
    pub reply: Option<Sender<String>>,
}

/// A wish, and the last complete exit when the machine heard of it.
pub type HeardWish = (MarkWish, Complete);

/// The wishes that wait.
#[derive(Debug, Default)]
pub(super) struct MarkWishes {
    /// Whether there are any, for a look that costs nothing.
    waiting: AtomicBool,
    wishes: Mutex<Wishes>,
}

#[derive(Debug, Default)]
struct Wishes {
    waiting: Vec<MarkWish>,
    /// Where they go; `None`: nothing is being recorded.
    keeper: Option<Sender<HeardWish>>,
}

impl MarkWishes {
    /// From now on there is a recording, whose marks `keeper` keeps.
    pub(super) fn begin(&self, keeper: Sender<HeardWish>) {
        self.wishes().keeper = Some(keeper);
    }

    /// Adds a wish; `false` if nothing is being recorded, or the machine does not come back to hear of those that wait.
    pub(super) fn add(&self, wish: MarkWish) -> bool {
        let mut wishes = self.wishes();
        let takes = wishes.keeper.is_some() && wishes.waiting.len() < WAITING_MAX;
        if takes {
            wishes.waiting.push(wish);
            self.waiting.store(true, Ordering::SeqCst);
        }
        takes
    }

    /// The machine is at this exit, all of which is done.
    pub(super) fn pass(&self, complete: Complete) {
        // Each exit comes by here, and a load costs less than a lock.
        if self.waiting.load(Ordering::SeqCst) {
            self.give(&mut self.wishes(), complete);
        }
    }

    /// There is no recording any more; its last complete exit was this one. What waits is there.
    pub(super) fn end(&self, complete: Complete) {
        let mut wishes = self.wishes();
        self.give(&mut wishes, complete);
        wishes.keeper = None;
    }

    fn give(&self, wishes: &mut Wishes, complete: Complete) {
        self.waiting.store(false, Ordering::SeqCst);
        for wish in wishes.waiting.drain(..) {
            if let Some(keeper) = &wishes.keeper {
                // A keeper that is gone has left nobody to be told.
                let _ = keeper.send((wish, complete));
            }
        }
    }

    fn wishes(&self) -> MutexGuard<'_, Wishes> {
        self.wishes
            .lock()
            .expect("nobody panics with a wish in hand")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(name: &str) -> MarkWish {
        MarkWish {
            by: MarkAsker::Key,
            name: Some(name.into()),
            reply: None,
        }
    }

    fn at(exits: u64) -> Complete {
        Complete { exits, now: 0 }
    }

    #[test]
    fn a_wish_is_heard_at_the_next_exit_that_is_complete_or_at_the_end() {
        let wishes = MarkWishes::default();
        assert!(!wishes.add(wish("nobody records")));
        let (give, take) = std::sync::mpsc::channel();
        wishes.begin(give);
        wishes.pass(at(1));
        assert!(wishes.add(wish("a")) && wishes.add(wish("b")));
        wishes.pass(at(2));
        wishes.pass(at(3));
        assert!(wishes.add(wish("c")));
        wishes.end(at(4));
        assert!(!wishes.add(wish("it is over")));
        wishes.pass(at(5));
        let heard = take.iter().map(|(wish, at)| (wish.name.unwrap(), at.exits));
        let heard: Vec<_> = heard.collect();
        let expected = [("a", 2), ("b", 2), ("c", 4)].map(|(name, exit)| (name.into(), exit));
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_machine_that_does_not_come_back_keeps_a_bounded_number_waiting() {
        let wishes = MarkWishes::default();
        let (give, take) = std::sync::mpsc::channel();
        wishes.begin(give);
        let added = (0..1000).filter(|_| wishes.add(wish("x"))).count();
        assert_eq!(added, WAITING_MAX);
        wishes.end(at(0));
        assert_eq!(take.iter().count(), WAITING_MAX);
    }
}

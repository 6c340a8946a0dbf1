//! Keeps states where somebody is likely to come back to.

use crate::timeline::{CheckpointHead, Pace, Pause};

/// Where no end of the way is known, a state is kept after so many exits.
const SPACING: u64 = 64;
/// Nearer to the end of the way than this, nothing is kept: it is as costly as the way itself.
const NEAREST: u64 = 8;

/// A pace that also keeps states in memory: on the way to an exit, each at about half the distance of the one before.
/// So whoever goes back from there, further and further, replays little more than it takes.
pub(super) struct NearBy<'a> {
    pace: &'a mut dyn Pace,
    /// The last look.
    at: CheckpointHead,
    /// Where it goes on from.
    from: u64,
    to: Option<u64>,
    /// The exit at or after which the next one is kept.
    next: u64,
}

impl<'a> NearBy<'a> {
    /// Of a way that begins here, and leads to the exit `to` if that is known.
    pub(super) fn new(pace: &'a mut dyn Pace, at: CheckpointHead, to: Option<u64>) -> NearBy<'a> {
        pace.begin(at.exits, to);
        let mut near = NearBy {
            pace,
            at,
            from: at.exits,
            to,
            next: 0,
        };
        near.set_next();
        near
    }

    /// It goes on from a stop after this exit: it is as far to the next look as it was.
    pub(super) fn go_on(&mut self, exit: u64) {
        self.from = exit;
    }

    /// Whether it is wanted stopped at a stop between two exits.
    pub(super) fn is_stopped(&mut self) -> bool {
        self.pace.look(self.at) == Pause::Stop
    }

    fn set_next(&mut self) {
        let ahead = match self.to {
            Some(to) => to.saturating_sub(self.at.exits).div_ceil(2),
            None => SPACING,
        };
        let is_worth_it = self.to.is_none() || ahead >= NEAREST;
        self.next = match is_worth_it {
            true => self.at.exits.saturating_add(ahead),
            false => u64::MAX,
        };
    }
}

impl Pace for NearBy<'_> {
    fn exits(&self) -> u64 {
        let look = self.at.exits.saturating_add(self.pace.exits());
        look.min(self.next).saturating_sub(self.from).max(1)
    }

    fn look(&mut self, here: CheckpointHead) -> Pause {
        (self.at, self.from) = (here, here.exits);
        match self.pace.look(here) {
            Pause::GoOn if here.exits >= self.next => {
                self.set_next();
                Pause::Keep
            }
            pause => pause,
        }
    }

    fn made(&mut self, here: CheckpointHead) {
        self.pace.made(here);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Steady(Option<(u64, Option<u64>)>);

    impl Pace for Steady {
        fn exits(&self) -> u64 {
            50
        }

        fn look(&mut self, _: CheckpointHead) -> Pause {
            Pause::GoOn
        }

        fn begin(&mut self, from: u64, to: Option<u64>) {
            self.0 = Some((from, to));
        }
    }

    fn kept(from: u64, to: Option<u64>, end: u64) -> Vec<u64> {
        let mut steady = Steady(None);
        let start = CheckpointHead {
            exits: from,
            now: 0,
        };
        let mut near = NearBy::new(&mut steady, start, to);
        let (mut exits, mut kept) = (from, Vec::new());
        loop {
            exits += near.exits();
            if exits >= end {
                break;
            }
            if near.look(CheckpointHead { exits, now: 0 }) == Pause::Keep {
                kept.push(exits);
            }
        }
        assert_eq!(steady.0, Some((from, to)));
        kept
    }

    #[test]
    fn states_are_the_denser_the_nearer_the_end_of_the_way() {
        assert_eq!(kept(1000, Some(1256), 1256), [1128, 1192, 1224, 1240, 1248]);
        assert!(kept(1000, Some(1010), 1010).is_empty());
        assert_eq!(kept(0, None, 200), [64, 128, 192]);
    }
}

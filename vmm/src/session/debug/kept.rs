//! Whole states kept in memory, from which a replay is put at an exit: a timeline, of the simplest kind.

use std::collections::BTreeMap;

use super::replaying::Replaying;
use crate::failure::Failure;
use crate::session::state_file::State;

/// What a debugger needs of a timeline.
pub(super) trait Timeline {
    /// Puts `replay` at `exit`, where nothing of the guest has run since. `false`: it ends before.
    fn go_to(&mut self, replay: &mut Replaying, exit: u64) -> Result<bool, Failure>;

    /// `replay` has come to an exit, and nothing of the guest has run since. What it takes to come back may be kept; it
    /// surely is if one `returns` soon.
    fn pass(&mut self, replay: &mut Replaying, returns: bool) -> Result<(), Failure>;

    /// The last exit before `exit` from which it is not far to there; 0 if there is none.
    fn before(&self, exit: u64) -> u64;
}

/// How many states are kept.
const KEPT_MAX: usize = 8;
/// Exits from one to the next, at first.
const SPACING: u64 = 512;

/// States kept every so many exits, fewer as the replay gets on.
#[derive(Debug)]
pub(super) struct Kept {
    states: BTreeMap<u64, State>,
    spacing: u64,
    /// Where somebody wants to come back to.
    last: Option<(u64, State)>,
}

impl Kept {
    /// The state at power-on alone.
    pub(super) fn at_power_on(replay: &mut Replaying) -> Result<Kept, Failure> {
        Ok(Kept {
            states: BTreeMap::from([(0, replay.save()?)]),
            spacing: SPACING,
            last: None,
        })
    }

    /// Every other one goes.
    fn thin(&mut self) {
        self.spacing *= 2;
        let spacing = self.spacing;
        let mut next = 0;
        self.states.retain(|exit, _| {
            let stays = *exit >= next;
            if stays {
                next = exit + spacing;
            }
            stays
        });
    }
}

impl Timeline for Kept {
    fn go_to(&mut self, replay: &mut Replaying, exit: u64) -> Result<bool, Failure> {
        let kept = self.states.range(..=exit).next_back();
        let last = self.last.as_ref().filter(|(at, _)| *at <= exit);
        let (from, state) = match (kept, last) {
            (Some((at, _)), Some((last, state))) if last >= at => (*last, state),
            (Some((at, state)), _) => (*at, state),
            (None, _) => unreachable!("the state at power-on is kept"),
        };
        let here = replay.exit();
        if !(replay.is_at_exit() && (from..=exit).contains(&here)) {
            replay.restore(state)?;
        }
        replay.run_to_exit(exit)
    }

    fn pass(&mut self, replay: &mut Replaying, returns: bool) -> Result<(), Failure> {
        let exit = replay.exit();
        let before = self.states.range(..=exit).next_back();
        let distance = before.map_or(u64::MAX, |(at, _)| exit - at);
        if distance >= self.spacing {
            self.states.insert(exit, replay.save()?);
            if self.states.len() > KEPT_MAX {
                self.thin();
            }
        } else if returns && distance > 0 && self.last.as_ref().is_none_or(|(at, _)| *at != exit) {
            self.last = Some((exit, replay.save()?));
        }
        Ok(())
    }

    fn before(&self, exit: u64) -> u64 {
        let before = self.states.range(..exit).next_back();
        before.map_or(0, |(at, _)| *at)
    }
}

//! Checks recordings by stretches, each by itself: between two checkpoints, by whoever has the time.

use std::path::PathBuf;

use hindsight_replay::{CheckpointHead, Closed, RunError, Stretch, TravelError};

use super::open::RecordedPaths;
use super::preemption_plan::CounterWish;
use super::recording::Recording;
use super::timeline::open_timeline;
use super::{Front, Viewed};
use crate::failure::Failure;

/// One of a number of stretches of a recording that are about as long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which, from 1.
    pub number: u64,
    /// Of how many.
    pub of: u64,
}

impl Share {
    /// All of it.
    pub const WHOLE: Share = Share { number: 1, of: 1 };

    /// From after which checkpoint to which: without a first one from power-on, without a last one to the end. `None`:
    /// there are fewer checkpoints than that, or they are too unlike, and it has nothing of the recording. `costs` is what
    /// it takes to come to each checkpoint from the one before, and from the last to the end.
    fn ends(self, costs: &[u64]) -> Option<(Option<usize>, Option<usize>)> {
        let checkpoints = costs.len() - 1;
        let all: u128 = costs.iter().map(|cost| u128::from(*cost)).sum();
        // A part belongs to the share that its middle is in.
        let end = |number: u64| {
            let mut before = 0;
            let ends_before = |cost: &&u64| {
                let middle = 2 * before + u128::from(**cost);
                before += u128::from(**cost);
                middle * u128::from(self.of) < 2 * all * u128::from(number)
            };
            costs.iter().take_while(ends_before).count()
        };
        let (first, last) = (end(self.number - 1), end(self.number));
        (first < last).then(|| {
            (
                first.checked_sub(1),
                (last <= checkpoints).then(|| last - 1),
            )
        })
    }
}

/// What the parts of a recording of `exits` exits take: to each checkpoint from the one before, and from the last to the
/// end. Where that is not known it is guessed by how many exits they have.
fn costs(heads: &[CheckpointHead], exits: Option<u64>) -> Vec<u64> {
    let last = heads.last().map_or(0, |head| head.exits);
    let ends = heads.iter().map(|head| (head.exits, u64::from(head.cost)));
    let ends = ends.chain([(exits.unwrap_or(last).max(last), 0)]);
    let (cost, known) = (heads.iter().filter(|head| head.cost > 0))
        .fold((0, 0), |(cost, count), head| {
            (cost + u64::from(head.cost), count + 1)
        });
    let exits_each = (last / heads.len().max(1) as u64).max(1);
    let cost_each = cost.checked_div(known).unwrap_or(1000).max(1);
    let mut before = 0;
    let costs = ends.map(|(exits, cost)| {
        let passed = exits - std::mem::replace(&mut before, exits);
        match cost {
            0 => (u128::from(passed) * u128::from(cost_each) / u128::from(exits_each))
                .clamp(1, u128::from(u32::MAX)) as u64,
            cost => cost,
        }
    });
    costs.collect()
}

/// What is to be checked.
#[derive(Clone, Debug)]
pub struct VerifyWish {
    /// The recording.
    pub recording: PathBuf,
    /// Files that take the place of its own.
    pub instead: RecordedPaths,
    /// The counter that finds the places between exits.
    pub counter: CounterWish,
    /// Which stretch.
    pub share: Share,
}

/// A stretch that was checked.
#[derive(Debug)]
pub struct Verified {
    /// From which exit; 0 is power-on.
    pub from: u64,
    /// To which; `None`: to the end.
    pub to: Option<u64>,
    /// What became of it; `None`: it has nothing of the recording.
    pub stretch: Option<Stretch>,
    /// How it diverged, if it did.
    pub divergence: Option<String>,
    /// The last exit that was replayed.
    pub exits: u64,
    /// Of which recording it is, and between which checkpoints.
    pub place: StretchPlace,
}

/// What verdicts of several machines are put together by: checks that are in the file of the checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StretchPlace {
    /// The check of the journal's head: it stands for the recording.
    pub recording: u64,
    /// The check of the checkpoint at which the stretch begins; `None`: at power-on.
    pub from: Option<u64>,
    /// That of the checkpoint at which it ends; `None`: where the recording does.
    pub to: Option<u64>,
}

/// Checks a stretch.
///
/// # Errors
///
/// Files that are not the recorded ones, or a host that will not do or failed on the way.
pub fn verify(wish: &VerifyWish, front: &mut dyn Front) -> Result<Verified, Failure> {
    let recording = Recording::at(&wish.recording);
    let journal = recording.journal()?;
    let console = journal.header().host.console;
    let mut timeline = open_timeline(&recording, journal, &wish.instead, &wish.counter)?;
    let heads: Vec<CheckpointHead> = timeline.store().heads().to_vec();
    let costs = costs(&heads, super::replay::last_exit(&recording));
    let Some((from, to)) = wish.share.ends(&costs) else {
        return Ok(Verified {
            from: 0,
            to: Some(0),
            stretch: None,
            divergence: None,
            exits: 0,
            place: StretchPlace {
                recording: timeline.store().recording(),
                ..StretchPlace::default()
            },
        });
    };
    let exit_of = |number: usize| heads[number].exits;
    let store = &*timeline.store();
    let check_of = |number: usize| store.check_at(number);
    let place = StretchPlace {
        recording: store.recording(),
        from: from.map(check_of),
        to: to.map(check_of),
    };
    let last_exit = to
        .map(exit_of)
        .or_else(|| super::replay::last_exit(&recording));
    let mut view = front.view(Viewed {
        console,
        preemption: None,
        hold: None,
        last_exit,
    })?;
    let (stretch, divergence) = match timeline.check_stretch(from, to, &mut *view) {
        Ok(stretch) => (Some(stretch), None),
        Err(TravelError::Run(RunError::Closed(Closed::Diverged(divergence)))) => {
            (None, Some(divergence.to_string()))
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(complaint) = view.finish().complaint() {
        front.notice(&complaint);
    }
    let exits = timeline
        .parts()
        .map_or(0, |(machine, _, _)| machine.at().exits);
    Ok(Verified {
        from: from.map_or(0, exit_of),
        to: to.map(exit_of),
        stretch,
        divergence,
        exits,
        place,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_one_another_from_power_on_to_the_end() {
        for checkpoints in 0..40 {
            let unlike = (0..=checkpoints).map(|number| [7, 1, 900, 3][number % 4]);
            for costs in [vec![1; checkpoints + 1], unlike.collect()] {
                for of in 1..50 {
                    let shares = (1..=of).filter_map(|number| Share { number, of }.ends(&costs));
                    let shares: Vec<_> = shares.collect();
                    assert_eq!(shares.first().map(|share| share.0), Some(None));
                    assert_eq!(shares.last().map(|share| share.1), Some(None));
                    assert!(
                        shares
                            .windows(2)
                            .all(|pair| pair[0].1 == pair[1].0 && pair[1].0.is_some())
                    );
                    assert!(
                        shares
                            .iter()
                            .all(|(_, to)| to.is_none_or(|to| to < checkpoints))
                    );
                }
            }
        }
    }

    #[test]
    fn shares_take_about_as_long_as_each_other() {
        let costs = [10, 10, 10, 10, 40, 40, 40];
        let ends = |number| Share { number, of: 2 }.ends(&costs);
        assert_eq!(ends(1), Some((None, Some(4))));
        assert_eq!(ends(2), Some((Some(4), None)));
    }

    #[test]
    fn what_is_not_known_of_a_part_is_guessed_by_its_exits() {
        let head = |exits, cost| CheckpointHead {
            exits,
            now: 0,
            cost,
        };
        let heads = [head(100, 800), head(300, 0), head(400, 600)];
        assert_eq!(costs(&heads, Some(500)), [800, 1052, 600, 526]);
        assert_eq!(costs(&[head(7, 0)], None), [1000, 1]);
        assert_eq!(costs(&[], None), [1]);
    }
}

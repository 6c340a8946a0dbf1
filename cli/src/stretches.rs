//! Verdicts on the stretches of a recording: what whoever checks one says of it, and all of them put together.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Output;

use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::session::{Share, StretchPlace};
use serde::{Deserialize, Serialize};

use crate::children;
use crate::format::{seconds, thousands};
use crate::outcome::Outcome;

/// A recording is cut in no more stretches than this.
pub(crate) const STRETCHES_MAX: u64 = 1 << 20;
/// A file of verdicts is no longer.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Of several verdicts on one stretch the last of these counts: one that could not be come to is no verdict, and one that is
/// bad is not made good by another try.
const BY_CERTAINTY: [Outcome; 6] = [
    Outcome::HostFailed,
    Outcome::Unfit,
    Outcome::Good,
    Outcome::BadInput,
    Outcome::CutShort,
    Outcome::Different,
];

/// What came of a stretch, as `verify --stretch --json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StretchVerdict {
    stretch: u64,
    of: u64,
    verdict: String,
    detail: String,
    from_exit: u64,
    to_exit: u64,
    exit_code: i32,
    host_ns: u64,
    /// These three are checks in hexadecimal. Without a recording it is not known where the stretch is.
    recording: Option<String>,
    /// `None`: it begins at power-on.
    from_checkpoint: Option<String>,
    /// `None`: it ends where the recording does.
    to_checkpoint: Option<String>,
}

/// A check as verdicts have it.
pub(crate) fn check_text(check: u64) -> String {
    format!("{check:016x}")
}

impl StretchVerdict {
    /// Of a stretch that was looked at, from one exit to another.
    pub(crate) fn new(
        share: Share,
        place: StretchPlace,
        (from_exit, to_exit): (u64, u64),
        (verdict, detail, outcome): (&str, String, Outcome),
        host_ns: u64,
    ) -> StretchVerdict {
        StretchVerdict {
            from_exit,
            to_exit,
            recording: Some(check_text(place.recording)),
            from_checkpoint: place.from.map(check_text),
            to_checkpoint: place.to.map(check_text),
            host_ns,
            ..StretchVerdict::without(share, verdict, detail, outcome)
        }
    }

    /// Of one that could not be looked at.
    pub(crate) fn without(
        share: Share,
        verdict: &str,
        detail: String,
        outcome: Outcome,
    ) -> StretchVerdict {
        StretchVerdict {
            stretch: share.number,
            of: share.of,
            verdict: verdict.into(),
            detail,
            from_exit: 0,
            to_exit: 0,
            exit_code: outcome as i32,
            host_ns: 0,
            recording: None,
            from_checkpoint: None,
            to_checkpoint: None,
        }
    }

    /// What a process says of its stretch, or why it does not.
    pub(crate) fn of_process(share: Share, ran: &Output) -> StretchVerdict {
        let outcome = Outcome::of(ran.status);
        match serde_json::from_slice::<StretchVerdict>(&ran.stdout) {
            Ok(said) => StretchVerdict {
                exit_code: outcome as i32,
                ..said
            },
            Err(_) => StretchVerdict::without(share, "failed", children::said(ran, None), outcome),
        }
    }

    /// What it says of the recording.
    pub(crate) fn outcome(&self) -> Outcome {
        Outcome::of_code(self.exit_code).unwrap_or(Outcome::HostFailed)
    }

    /// How long it took.
    pub(crate) fn host_ns(&self) -> u64 {
        self.host_ns
    }

    /// For people.
    pub(crate) fn line(&self) -> String {
        let where_it_is = match self.recording {
            Some(_) => format!(
                ", exits {} to {}",
                thousands(self.from_exit),
                thousands(self.to_exit)
            ),
            None => String::new(),
        };
        let time = match self.recording {
            Some(_) => format!(" in {}", seconds(self.host_ns)),
            None => String::new(),
        };
        let detail = match &*self.detail {
            "" => String::new(),
            detail => format!(": {detail}"),
        };
        let StretchVerdict { stretch, of, .. } = self;
        let words = &self.verdict;
        shown_lines(format!(
            "stretch {stretch} of {of}{where_it_is}: {words}{time}{detail}"
        ))
        .to_string()
    }

    fn is_empty(&self) -> bool {
        self.verdict == "empty"
    }
}

/// The verdicts in a file: one, or one after the other.
pub(crate) fn read(path: &Path) -> Result<Vec<StretchVerdict>, String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    let read = file.take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    read.map_err(|error| error.to_string())?;
    let verdicts = serde_json::Deserializer::from_slice(&bytes).into_iter();
    let verdicts: Result<Vec<StretchVerdict>, _> = verdicts.collect();
    match verdicts {
        Err(error) => Err(format!(
            "this is not what `verify --stretch --json` prints: {error}"
        )),
        Ok(verdicts) if verdicts.is_empty() => {
            Err("it is empty: whoever should have written it did not come to its end".into())
        }
        Ok(verdicts) => Ok(verdicts),
    }
}

/// One verdict for each stretch of the recording, in order; those that there are none for are missing.
pub(crate) fn put_together(
    verdicts: Vec<StretchVerdict>,
    recording: &str,
) -> Result<Vec<StretchVerdict>, String> {
    let Some(of) = verdicts.first().map(|verdict| verdict.of) else {
        return Ok(Vec::new());
    };
    let certainty = |verdict: &StretchVerdict| {
        let outcome = verdict.outcome();
        BY_CERTAINTY.iter().position(|one| *one == outcome)
    };
    let mut best: BTreeMap<u64, StretchVerdict> = BTreeMap::new();
    for verdict in verdicts {
        let StretchVerdict { stretch, of: n, .. } = verdict;
        if n != of {
            return Err(format!(
                "there are verdicts on stretches of {of} and of {n}: give those of one run"
            ));
        }
        if !(1..=of).contains(&stretch) || of > STRETCHES_MAX {
            return Err(format!("there is no stretch {stretch} of {of}"));
        }
        let theirs = verdict.recording.as_deref();
        if theirs.is_some_and(|theirs| theirs != recording) {
            return Err(format!(
                "the verdict on stretch {stretch} is on another recording than this"
            ));
        }
        let is_better = best
            .get(&stretch)
            .is_none_or(|known| certainty(known) < certainty(&verdict));
        if is_better {
            best.insert(stretch, verdict);
        }
    }
    let one = |number| {
        let missing = || {
            let share = Share { number, of };
            let why = "no file has a verdict on it; check it again".into();
            StretchVerdict::without(share, "missing", why, Outcome::HostFailed)
        };
        best.remove(&number).unwrap_or_else(missing)
    };
    Ok((1..=of).map(one).collect())
}

/// Whether the stretches, which are all there are, leave nothing between them: each begins where the one before ends. Two
/// that were checked with different checkpoints may not.
pub(crate) fn check_joined(all: &[StretchVerdict]) -> Result<(), String> {
    let mut reached = Reached::PowerOn;
    let mut before = "power-on".to_string();
    for verdict in all.iter().filter(|verdict| !verdict.is_empty()) {
        let here = format!("stretch {}", verdict.stretch);
        let begins = match &verdict.from_checkpoint {
            _ if verdict.recording.is_none() => Reached::Unknown,
            None => Reached::PowerOn,
            Some(check) => Reached::Checkpoint(check),
        };
        if ![reached, begins].contains(&Reached::Unknown) && reached != begins {
            return Err(not_joined(&before, &here));
        }
        reached = match &verdict.to_checkpoint {
            _ if verdict.recording.is_none() => Reached::Unknown,
            None => Reached::End,
            Some(check) => Reached::Checkpoint(check),
        };
        before = here;
    }
    match reached {
        Reached::Unknown | Reached::End => Ok(()),
        _ => Err(not_joined(&before, "the end of the recording")),
    }
}

/// How far in a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reached<'a> {
    PowerOn,
    /// The one with this check.
    Checkpoint(&'a str),
    End,
    /// Somebody failed to say it.
    Unknown,
}

fn not_joined(before: &str, after: &str) -> String {
    format!(
        "{before} and {after} do not join: the checkpoints were not the same for all stretches; \
         leave them alone and check all stretches again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORDING: u64 = 7;

    fn verdict(
        number: u64,
        from: Option<u64>,
        to: Option<u64>,
        outcome: Outcome,
    ) -> StretchVerdict {
        let (share, recording) = (Share { number, of: 4 }, RECORDING);
        let place = StretchPlace {
            recording,
            from,
            to,
        };
        let said = ("some words", String::new(), outcome);
        StretchVerdict::new(share, place, (0, 0), said, 1)
    }

    /// All four of them, of which the third is empty.
    fn right() -> Vec<StretchVerdict> {
        let empty = StretchVerdict {
            verdict: "empty".into(),
            ..verdict(3, None, None, Outcome::Good)
        };
        vec![
            verdict(1, None, Some(11), Outcome::Good),
            verdict(2, Some(11), Some(12), Outcome::Good),
            empty,
            verdict(4, Some(12), None, Outcome::Good),
        ]
    }

    fn together(verdicts: Vec<StretchVerdict>) -> Result<Vec<StretchVerdict>, String> {
        put_together(verdicts, &check_text(RECORDING))
    }

    #[test]
    fn verdicts_are_put_in_order_and_those_that_are_not_there_are_missing() {
        let mut some = right();
        some.rotate_left(2);
        assert_eq!(together(some.clone()).unwrap(), right());
        assert_eq!(check_joined(&right()), Ok(()));
        for lost in 0..4 {
            let mut some = right();
            some.remove(lost);
            let all = together(some).unwrap();
            let is_missing = |verdict: &StretchVerdict| verdict.verdict == "missing";
            assert_eq!(all.iter().position(is_missing), Some(lost));
            assert_eq!(all[lost].outcome(), Outcome::HostFailed);
            assert_eq!(check_joined(&all), Ok(()), "{lost}");
        }
        assert_eq!(together(Vec::new()).unwrap(), Vec::new());
    }

    #[test]
    fn a_try_that_came_to_a_verdict_counts_and_a_bad_verdict_counts_most() {
        use Outcome::*;
        let tries = |outcomes: &[Outcome]| {
            let tries = outcomes
                .iter()
                .map(|one| verdict(2, Some(11), Some(12), *one));
            together(tries.collect()).unwrap()[1].outcome()
        };
        assert_eq!(tries(&[HostFailed, Unfit, Good]), Good);
        assert_eq!(tries(&[Good, HostFailed]), Good);
        assert_eq!(tries(&[Good, Different, Good]), Different);
        assert_eq!(tries(&[CutShort, Good]), CutShort);
        assert_eq!(tries(&[HostFailed]), HostFailed);
    }

    #[test]
    fn verdicts_that_do_not_belong_together_are_refused() {
        let mut other = verdict(2, Some(11), Some(12), Outcome::Good);
        other.recording = Some(check_text(8));
        assert!(
            together(vec![other])
                .unwrap_err()
                .contains("another recording")
        );
        let mut other = right();
        other[1].of = 5;
        assert!(together(other).unwrap_err().contains("of 4 and of 5"));
        for (stretch, of) in [(0, 4), (5, 4), (1, u64::MAX)] {
            let mut other = verdict(1, None, None, Outcome::Good);
            (other.stretch, other.of) = (stretch, of);
            assert!(together(vec![other]).unwrap_err().contains("no stretch"));
        }
    }

    #[test]
    fn stretches_between_other_checkpoints_are_noticed() {
        for at in [0, 1, 3] {
            for (from, to) in [(Some(99), None), (Some(99), Some(98)), (None, Some(99))] {
                let mut all = right();
                let (from, to) = (from.map(check_text), to.map(check_text));
                if (&all[at].from_checkpoint, &all[at].to_checkpoint) != (&from, &to) {
                    (all[at].from_checkpoint, all[at].to_checkpoint) = (from, to);
                    assert!(check_joined(&all).is_err(), "{at} {:?}", all[at]);
                }
            }
        }
        // A recording that is all of it empty, and one that ends twice.
        let mut all = right();
        all.iter_mut().for_each(|one| one.verdict = "empty".into());
        assert!(check_joined(&all).is_err());
        let mut all = right();
        (all[1].from_checkpoint, all[1].to_checkpoint) = (Some(check_text(11)), None);
        assert!(check_joined(&all).is_err());
    }

    #[test]
    fn a_file_may_hold_several_verdicts_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verdicts");
        let lines: Vec<_> = right()
            .iter()
            .map(|one| serde_json::to_string(one).unwrap())
            .collect();
        std::fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(read(&path).unwrap(), right());
        for bad in ["", "\n", "{}", "equal", &lines[0][..40]] {
            std::fs::write(&path, bad).unwrap();
            assert!(read(&path).is_err(), "{bad:?}");
        }
        assert!(read(&dir.path().join("none")).is_err());
    }
}

//! What a script can tell from the exit code.

use std::process::ExitStatus;

use hindsight_vmm::failure::Kind;

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All went well; for a replay: equal, to the end.
    Good = 0,
    /// A replay diverged, or two recordings differ.
    Different = 1,
    /// The input is no good: arguments, files, a damaged head.
    BadInput = 2,
    /// The recording was cut short or damaged; equal up to there.
    CutShort = 3,
    /// This host cannot do it.
    Unfit = 4,
    /// The host failed on the way: disk full, KVM error, network lost.
    HostFailed = 5,
}

impl Outcome {
    /// All of them, the one that says most of a recording last.
    pub(crate) const BY_WEIGHT: [Outcome; 6] = [
        Outcome::Good,
        Outcome::BadInput,
        Outcome::CutShort,
        Outcome::Unfit,
        Outcome::HostFailed,
        Outcome::Different,
    ];

    /// How another process of this program ended. One that was killed, or crashed, was failed by its host.
    pub(crate) fn of(status: ExitStatus) -> Outcome {
        let known = status.code().and_then(Outcome::of_code);
        known.unwrap_or(Outcome::HostFailed)
    }

    /// What an exit code of this program says; `None`: it has no such code.
    pub(crate) fn of_code(code: i32) -> Option<Outcome> {
        let mut all = Outcome::BY_WEIGHT.into_iter();
        all.find(|outcome| *outcome as i32 == code)
    }

    /// The one of these that says most of a recording.
    pub(crate) fn weightiest(outcomes: impl Iterator<Item = Outcome>) -> Outcome {
        let weight = |outcome: &Outcome| Outcome::BY_WEIGHT.iter().position(|one| one == outcome);
        outcomes.max_by_key(weight).unwrap_or(Outcome::Good)
    }
}

impl From<Kind> for Outcome {
    fn from(kind: Kind) -> Outcome {
        match kind {
            Kind::Different => Outcome::Different,
            Kind::BadInput => Outcome::BadInput,
            Kind::Unfit => Outcome::Unfit,
            Kind::HostFailed => Outcome::HostFailed,
        }
    }
}

/// What the main help says of them.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  it worked; a replay was equal to the end
  1  a replay diverged, two recordings differ, a hunt found no crash, or it was stopped before the guest ran
  2  bad arguments, a file that cannot be used, a recording that does not fit
  3  the recording was cut short or is damaged; what there is replays equal
  4  this host cannot record (see `hindsight doctor`)
  5  the host failed on the way (disk full, KVM error, network lost)";

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn a_process_that_crashed_is_never_taken_for_one_that_found_all_well() {
        let of_code = |code: i32| Outcome::of(ExitStatus::from_raw(code << 8));
        for outcome in Outcome::BY_WEIGHT {
            assert_eq!(of_code(outcome as i32), outcome);
        }
        assert_eq!(of_code(101), Outcome::HostFailed);
        assert_eq!(Outcome::of(ExitStatus::from_raw(9)), Outcome::HostFailed);
        let worst = [Outcome::Good, of_code(101), Outcome::Good];
        assert_eq!(Outcome::weightiest(worst.into_iter()), Outcome::HostFailed);
        let worst = [Outcome::BadInput, Outcome::CutShort, Outcome::Good];
        assert_eq!(Outcome::weightiest(worst.into_iter()), Outcome::CutShort);
        assert_eq!(Outcome::weightiest([].into_iter()), Outcome::Good);
    }
}

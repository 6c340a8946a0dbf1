//! What a script can tell from the exit code.

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

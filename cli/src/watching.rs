//! Commands that replay a recording to look at it.

use std::io::Read;

use hindsight_replay::foreign::shown_lines;
use hindsight_replay::{JournalReader, Observer};
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{RecordedPaths, Recording, Until, Verdict, Watch};

use crate::outcome::Outcome;
use crate::tell::tell;

/// Replays all of `recording` for an observer. It is made by `begin` when all is ready, and done with by `finish`,
/// whose argument says whether what was seen is right as far as the recording goes.
///
/// # Errors
///
/// What cannot be replayed, or written of what was seen.
pub(crate) fn watch<O: Observer>(
    recording: Recording,
    journal: JournalReader<impl Read>,
    begin: impl FnOnce() -> Result<O, Failure>,
    finish: impl FnOnce(O, bool) -> Result<(), Failure>,
) -> Result<Outcome, Failure> {
    let watch = Watch::open(recording, journal, &RecordedPaths::default())?;
    let mut disks = watch.images().fresh_disks()?;
    let (watched, observer) = watch.run(&mut disks, Until::End, begin)?;
    let right = watched.verdict.is_right();
    match finish(observer, right) {
        // A divergence decides how the program ends.
        Err(failure) if !right => tell!("hindsight: {}", shown_lines(failure)),
        finished => finished?,
    }
    Ok(match watched.verdict {
        Verdict::Equal(_) | Verdict::Reached => Outcome::Good,
        Verdict::CutShort(tail) => {
            tell!("hindsight: {}", shown_lines(tail));
            Outcome::CutShort
        }
        Verdict::Diverged(divergence) => {
            tell!("hindsight: {}", shown_lines(divergence));
            Outcome::Different
        }
    })
}

//! Damage to files, as disks and people do it.

use hindsight_replay::rng::Rng;

/// Damages a file that is not empty.
pub fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let length = bytes.len() as u64;
    let at = rng.below(length) as usize;
    let some = (1 + rng.below(100)).min(length - at as u64) as usize;
    match rng.below(6) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes[at..at + some].fill(0),
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(at..at + some)),
        4 => bytes.copy_within(at..at + some, rng.below(length - some as u64 + 1) as usize),
        _ => bytes.extend((0..some).map(|_| rng.number() as u8)),
    }
}

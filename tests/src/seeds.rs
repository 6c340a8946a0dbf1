//! Running a check for many seeds, and saying which one failed.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Runs `check` for one seed in `share` of `default`, or of as many as `HINDSIGHT_SIM_SEEDS` says;
/// `HINDSIGHT_SIM_SEED` picks one. A failure names its seed and how to run it alone. `file` is the
/// test file it stands in.
pub fn for_seeds(file: &str, default: u64, share: u64, check: impl Fn(u64)) {
    let number = |name| -> Option<u64> {
        std::env::var(name)
            .ok()
            .map(|text| text.parse().expect("a number"))
    };
    let one = number("HINDSIGHT_SIM_SEED");
    let count = number("HINDSIGHT_SIM_SEEDS").unwrap_or(default);
    let seeds = one.map_or(0..count.div_ceil(share), |seed| seed..seed + 1);
    for seed in seeds {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(seed))) {
            let thread = std::thread::current();
            let test = thread.name().unwrap_or_default();
            eprintln!(
                "seed {seed} failed; this runs it alone:\n  HINDSIGHT_SIM_SEED={seed} cargo test -p \
                 hindsight-tests --test {file} -- --exact {test}"
            );
            resume_unwind(panic);
        }
    }
}

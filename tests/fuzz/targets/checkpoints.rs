//! See `tests/src/drive`.
#![no_main]

use hindsight_fuzz::drive::{CHECKPOINT_MEMORY_MAX, Target, drive};
use hindsight_fuzz::limit_allocations;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    limit_allocations(CHECKPOINT_MEMORY_MAX);
    drive(Target::Checkpoints, data);
});

//! See `tests/src/drive`.
#![no_main]

use hindsight_fuzz::drive::{MEMORY_BYTES_MAX, Target, drive};
use hindsight_fuzz::limit_allocations;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    limit_allocations(MEMORY_BYTES_MAX);
    drive(Target::Journal, data);
});

//! See `tests/src/drive`.
#![no_main]

use hindsight_fuzz::drive::{Target, drive, limit_allocations_by};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    limit_allocations_by(hindsight_fuzz::limit_allocations);
    drive(Target::Kernel, data);
});

//! See `tests/src/drive`.
#![no_main]

use hindsight_fuzz::drive::{Target, drive};

libfuzzer_sys::fuzz_target!(|data: &[u8]| drive(Target::Files, data));

//! See `tests/src/drive`.
#![no_main]

use hindsight_fuzz::drive::{MEMORY_BYTES_MAX, Target, drive};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    drive(Target::Journal, data);
    let peak = MEMORY.peak_usage() - before;
    assert!(peak <= MEMORY_BYTES_MAX, "it took {peak} bytes");
});

//! How much memory something needs, in a test program whose allocator is [`PeakAlloc`].

use std::sync::{Mutex, MutexGuard, PoisonError};

use peak_alloc::PeakAlloc;

static TURN: Mutex<()> = Mutex::new(());

/// One test at a time: what another allocates meanwhile would be counted.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many bytes `work` needs beside what there is.
pub fn peak_bytes(work: impl FnOnce()) -> usize {
    let before = PeakAlloc.current_usage();
    PeakAlloc.reset_peak_usage();
    work();
    PeakAlloc.peak_usage() - before
}

//! Tests that cannot be had everywhere.
//!
//! A test that is skipped proves nothing, so each is counted, in the file that `HINDSIGHT_SKIPS` names; and where a
//! variable says that what it wants is there, a skip is a failure: `HINDSIGHT_MUST_RECORD`, a KVM that can record;
//! `HINDSIGHT_MUST_STOP`, one whose guests have debug registers.

use std::fs::File;
use std::io::Write;

/// Says that the test at hand is skipped, for want of a KVM that can record, and why.
///
/// # Panics
///
/// It must not be, here.
pub fn skip(why: &str) {
    skip_unless("HINDSIGHT_MUST_RECORD", why);
}

/// The same of a test, or a part of it, that wants debug registers.
///
/// # Panics
///
/// It must not be, here.
pub fn skip_stops(why: &str) {
    skip_unless("HINDSIGHT_MUST_STOP", why);
}

fn skip_unless(must: &str, why: &str) {
    eprintln!("skipped: {why}");
    let must = std::env::var_os(must).is_some();
    assert!(!must, "skipped, where it can be had: {why}");
    let Some(path) = std::env::var_os("HINDSIGHT_SKIPS") else {
        return;
    };
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test");
    let file = File::options().append(true).create(true).open(path);
    file.and_then(|mut file| writeln!(file, "{test}: {why}"))
        .expect("the file that counts skipped tests can be written");
}

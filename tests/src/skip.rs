//! Tests that cannot be had everywhere.
//!
//! A test that is skipped proves nothing, so each is counted, in the file that `HINDSIGHT_SKIPS` names; and where
//! `HINDSIGHT_MUST_RECORD` says that there is a KVM that can record, a skip is a failure.

use std::fs::File;
use std::io::Write;

/// Says that the test at hand is skipped, and why.
///
/// # Panics
///
/// It must not be, here.
pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
    let must = std::env::var_os("HINDSIGHT_MUST_RECORD").is_some();
    assert!(
        !must,
        "skipped, where there is a KVM that can record: {why}"
    );
    let Some(path) = std::env::var_os("HINDSIGHT_SKIPS") else {
        return;
    };
    let test = std::thread::current();
    let test = test.name().unwrap_or("a test");
    let file = File::options().append(true).create(true).open(path);
    file.and_then(|mut file| writeln!(file, "{test}: {why}"))
        .expect("the file that counts skipped tests can be written");
}

//! `tests/src/drive` alone, without the rest of that crate and all that it needs: it builds in a
//! fraction of the time, and is all that the sanitizer looks at.

#[path = "../../src/drive/mod.rs"]
pub mod drive;

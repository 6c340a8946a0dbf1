//! `tests/src/drive` alone, without the rest of that crate and all that it needs: that and the libraries which
//! it drives are all that the sanitizer looks at.

#[path = "../../src/drive/mod.rs"]
pub mod drive;

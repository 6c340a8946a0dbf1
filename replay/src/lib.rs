//! What a recording is.
#![forbid(unsafe_code)]

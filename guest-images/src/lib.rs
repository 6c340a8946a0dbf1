//! Micro-guests, written with an assembler in Rust, and the recipes of the larger guests.

//! The names and types that a kernel carries of itself.

pub mod btf;
pub mod kallsyms;

pub use kallsyms::Symbols;

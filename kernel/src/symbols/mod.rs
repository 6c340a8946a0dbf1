//! The names and types that a kernel carries of itself.

pub(crate) mod btf;
pub(crate) mod kallsyms;

pub use kallsyms::Symbols;

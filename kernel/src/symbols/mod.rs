//! The names and types that a kernel carries of itself.

pub(crate) mod btf;
pub(crate) mod kallsyms;
mod symbol_file;

pub use kallsyms::Symbols;
pub use symbol_file::symbol_file;

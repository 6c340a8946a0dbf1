//! What is wrong with a kernel that is looked at.

use thiserror::Error;

/// Why something of a kernel cannot be shown, or not all of it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ViewError {
    /// Nobody knows where its variables are.
    #[error(
        "the kernel's image has no symbol table (CONFIG_KALLSYMS), so nothing in its memory can be found"
    )]
    NoSymbols,
    /// Nobody knows what its structures are.
    #[error(
        "the kernel's image does not describe its types (CONFIG_DEBUG_INFO_BTF), so its memory cannot be read"
    )]
    NoTypes,
    /// A variable, or a member of a structure, that this version or configuration has not.
    #[error(
        "this kernel has no {what}: it is of a version or a configuration that is not known here"
    )]
    Lacks {
        /// What it is.
        what: String,
    },
    /// A pointer to nowhere, or a kernel that has not come so far.
    #[error("nothing is mapped at {address:#x}, where the kernel's {what} should be")]
    Unmapped {
        /// What should be there.
        what: &'static str,
        /// Where that would be.
        address: u64,
    },
    /// A value that cannot be there.
    #[error("the kernel's {what} is {value:#x}, which it cannot be")]
    Strange {
        /// What has it.
        what: &'static str,
        /// The value.
        value: u64,
    },
    /// A list that does not end.
    #[error("the kernel's {what} lead in a circle, at {address:#x}")]
    Circle {
        /// What is linked by it.
        what: &'static str,
        /// Where it comes to a second time.
        address: u64,
    },
    /// More than there is room for.
    #[error("the kernel has more {what} than {limit}, which is as many as are shown")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The most that are looked at.
        limit: usize,
    },
}

/// What was found, and what kept the rest from being found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing<T> {
    /// What was found, in the kernel's order.
    pub items: Vec<T>,
    /// Why there may be more.
    pub broken: Option<ViewError>,
}

impl<T> Default for Listing<T> {
    fn default() -> Listing<T> {
        Listing {
            items: Vec::new(),
            broken: None,
        }
    }
}

impl<T> Listing<T> {
    /// Notes what is wrong, if nothing was wrong before.
    pub(super) fn note(&mut self, error: ViewError) {
        self.broken.get_or_insert(error);
    }
}

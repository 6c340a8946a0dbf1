//! Why a saved board is refused.

use thiserror::Error;

/// A saved board that this program cannot continue from.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RestoreError {
    /// Saved by another version of these devices.
    #[error(
        "the saved board has version {found}, this program reads version {expected}; \
         restore it with the program that saved it, or replay from the start"
    )]
    Version {
        /// What this program writes and reads.
        expected: u32,
        /// What the saved board says.
        found: u32,
    },
    /// A value that no run of the devices could have produced: the save is damaged.
    #[error("the saved board is damaged: {what} holds an impossible value; replay from the start")]
    Impossible {
        /// The register or field.
        what: &'static str,
    },
}

/// `Ok` if `holds`, else the state is damaged at `what`.
pub(crate) fn ensure(what: &'static str, holds: bool) -> Result<(), RestoreError> {
    if holds {
        Ok(())
    } else {
        Err(RestoreError::Impossible { what })
    }
}

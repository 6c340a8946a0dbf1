//! What ends something that a user asked for, and of what kind it is.
//!
//! The kind is what a script learns from the exit code. Each error says its own where it is declared
//! ([`Classified`]), so that a new error cannot become "bad input" because nobody thought of it.

use std::error::Error;
use std::fmt::{self, Display};

use hindsight_replay::{JournalError, RunError, StateError};

/// Of what kind a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A replay diverged, or there is nothing of what was asked for.
    Different,
    /// The input is no good: arguments, files, a damaged head.
    BadInput,
    /// This host cannot do it.
    Unfit,
    /// The host failed on the way: disk full, KVM error, network lost.
    HostFailed,
}

/// An error that knows its kind.
pub trait Classified: Error {
    /// Of what kind it is.
    fn kind(&self) -> Kind;
}

/// What ended it: a message for people, and a kind for scripts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    kind: Kind,
    text: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: Kind, text: impl Display) -> Failure {
        let text = text.to_string();
        Failure { kind, text }
    }

    /// The same, which concerns `what`.
    pub fn about(self, what: impl Display) -> Failure {
        let text = format!("{what}: {}", self.text);
        Failure { text, ..self }
    }

    /// Of what kind it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Failure {}

impl<E: Classified> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::new(error.kind(), with_causes(&error))
    }
}

/// An error with its causes, each said once: many of our errors quote theirs.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = cause.source();
    }
    text
}

/// A file that cannot be read has an error that names it. What has no more than this concerns threads, descriptors and
/// directories of our own.
impl Classified for std::io::Error {
    fn kind(&self) -> Kind {
        Kind::HostFailed
    }
}

impl Classified for JournalError {
    fn kind(&self) -> Kind {
        Kind::BadInput
    }
}

/// A run that could not go on because of the host. How a door closes is told by its verdict.
impl<E: Error + 'static> Classified for RunError<E> {
    fn kind(&self) -> Kind {
        Kind::HostFailed
    }
}

impl<E: Classified + 'static> Classified for StateError<E> {
    fn kind(&self) -> Kind {
        match self {
            StateError::Cpu(error) => error.kind(),
            StateError::Storage(_) => Kind::HostFailed,
            StateError::NotAtAnExit
            | StateError::Damaged(_)
            | StateError::OtherMachine
            | StateError::Board(_) => Kind::BadInput,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer{}", if *.quotes { ": inner" } else { "" })]
    struct Outer {
        quotes: bool,
        source: Inner,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner;

    impl Classified for Outer {
        fn kind(&self) -> Kind {
            Kind::Unfit
        }
    }

    #[test]
    fn a_failure_has_the_kind_of_its_error_and_says_each_cause_once() {
        for quotes in [false, true] {
            let source = Inner;
            let failure = Failure::from(Outer { quotes, source });
            assert_eq!(failure, Failure::new(Kind::Unfit, "outer: inner"));
        }
        let failure = Failure::new(Kind::BadInput, "no").about("x");
        assert_eq!(
            (failure.kind(), failure.to_string()),
            (Kind::BadInput, "x: no".into())
        );
    }
}

//! What can go wrong between us and KVM.

use thiserror::Error;

use crate::failure::{Classified, Kind};

/// A failure of the host's KVM, or something the guest did that stock KVM cannot carry.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` is missing or closed to us.
    #[error("cannot open /dev/kvm: {0}; load kvm_intel or kvm_amd, or join group kvm")]
    Open(#[source] kvm_ioctls::Error),
    /// One of KVM's calls failed.
    #[error("{call} failed: {source}")]
    Call {
        /// Its name.
        call: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM lacks something that Hindsight cannot do without.
    #[error("this KVM lacks {0}")]
    Lacks(&'static str),
    /// The host's CPU lacks something.
    #[error("this host's CPU is not the recorded one: {0}")]
    Cpu(String),
    /// Guest memory cannot be had.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map {
        bytes: u64,
        #[source]
        source: std::io::Error,
    },
    /// KVM gave up on the guest.
    #[error("KVM stopped at rip {rip:#x} ({bytes:02x?}): {what}")]
    Stopped {
        rip: u64,
        /// The instruction bytes there, as far as they are mapped.
        bytes: Vec<u8>,
        /// What KVM said.
        what: String,
    },
    /// The guest ran past a place at which it had to stop.
    #[error(transparent)]
    Overshoot(#[from] hindsight_replay::Overshoot),
    /// The branch counter cannot be relied on.
    #[error("{0}")]
    Counter(#[source] Box<crate::perf::CounterError>),
    /// A saved state could not have been, or KVM does not take it.
    #[error(
        "a saved state that cannot be restored: {0}; take another one, or replay from the start"
    )]
    State(String),
    /// The host's page map cannot be read.
    #[error("cannot read this process's page map: {0}")]
    PageMap(#[source] std::io::Error),
}

impl From<KvmError> for crate::perf::CounterError {
    fn from(error: KvmError) -> Self {
        crate::perf::CounterError::Kvm(Box::new(error))
    }
}

impl From<crate::perf::CounterError> for KvmError {
    fn from(error: crate::perf::CounterError) -> KvmError {
        KvmError::Counter(Box::new(error))
    }
}

/// Names the call in the error of a KVM result.
pub(crate) trait Named<T> {
    /// `self`, its error naming `call`.
    fn named(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Call { call, source })
    }
}

impl Classified for KvmError {
    fn kind(&self) -> Kind {
        match self {
            KvmError::Open(_) | KvmError::Lacks(_) => Kind::Unfit,
            // The recording is of another CPU.
            KvmError::Cpu(_) | KvmError::State(_) => Kind::BadInput,
            _ => Kind::HostFailed,
        }
    }
}

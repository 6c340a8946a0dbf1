//! Where the local APIC's registers are, and which of their bits a guest may write (Intel SDM
//! vol. 3, table 11-1 and table 11-6).

use serde::{Deserialize, Serialize};

/// The local vector table's entries, in the order of their registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    pub(super) const COUNT: usize = 6;
    pub(super) const ALL: [Lvt; Lvt::COUNT] = [
        Lvt::Timer,
        Lvt::Thermal,
        Lvt::Performance,
        Lvt::Lint0,
        Lvt::Lint1,
        Lvt::Error,
    ];

    /// Vector and mask; the timer's mode; delivery modes; the pins' polarity and trigger mode.
    pub(super) fn writable_bits(self) -> u32 {
        match self {
            Lvt::Timer => 0x7_00ff,
            Lvt::Thermal | Lvt::Performance => 0x1_07ff,
            Lvt::Lint0 | Lvt::Lint1 => 0x1_a7ff,
            Lvt::Error => 0x1_00ff,
        }
    }
}

/// One register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Id,
    Version,
    TaskPriority,
    ProcessorPriority,
    EndOfInterrupt,
    LogicalDestination,
    DestinationFormat,
    Spurious,
    InService(u8),
    TriggerMode(u8),
    Requested(u8),
    Errors,
    Command,
    CommandHigh,
    Lvt(Lvt),
    InitialCount,
    CurrentCount,
    Divide,
    SelfIpi,
    /// Arbitration priority and remote read: of older APICs, and zero.
    Reserved,
}

impl Register {
    /// The register at this offset into the page.
    pub(super) fn at(offset: u16) -> Option<Register> {
        if offset & 0xf != 0 {
            return None;
        }
        let index = offset >> 4;
        Some(match index {
            0x02 => Register::Id,
            0x03 => Register::Version,
            0x08 => Register::TaskPriority,
            0x09 | 0x0c => Register::Reserved,
            0x0a => Register::ProcessorPriority,
            0x0b => Register::EndOfInterrupt,
            0x0d => Register::LogicalDestination,
            0x0e => Register::DestinationFormat,
            0x0f => Register::Spurious,
            0x10..=0x17 => Register::InService(index as u8 & 7),
            0x18..=0x1f => Register::TriggerMode(index as u8 & 7),
            0x20..=0x27 => Register::Requested(index as u8 & 7),
            0x28 => Register::Errors,
            0x30 => Register::Command,
            0x31 => Register::CommandHigh,
            0x32..=0x37 => Register::Lvt(Lvt::ALL[usize::from(index - 0x32)]),
            0x38 => Register::InitialCount,
            0x39 => Register::CurrentCount,
            0x3e => Register::Divide,
            _ => return None,
        })
    }

    /// The register that only an x2APIC has.
    pub(super) fn x2apic_only(offset: u16) -> Option<Register> {
        (offset == 0x3f0).then_some(Register::SelfIpi)
    }

    /// Whether RDMSR reads it.
    pub(super) fn is_readable(self) -> bool {
        !matches!(
            self,
            Register::EndOfInterrupt | Register::SelfIpi | Register::Reserved
        )
    }

    /// Whether a write is more than an error.
    pub(super) fn is_writable(self) -> bool {
        !matches!(
            self,
            Register::Id
                | Register::Version
                | Register::ProcessorPriority
                | Register::InService(_)
                | Register::TriggerMode(_)
                | Register::Requested(_)
                | Register::CurrentCount
                | Register::Reserved
        )
    }

    /// The bits that a write takes; an x2APIC faults on others.
    pub(super) fn writable_bits(self) -> u64 {
        match self {
            Register::TaskPriority | Register::SelfIpi => 0xff,
            Register::LogicalDestination => 0xff00_0000,
            Register::DestinationFormat => 0xf000_0000,
            Register::Spurious => 0x1ff,
            Register::Command => 0xffff_ffff_000c_cfff,
            Register::Lvt(entry) => entry.writable_bits().into(),
            Register::InitialCount => 0xffff_ffff,
            Register::Divide => 0xb,
            // Any value ends an interrupt or updates ESR by memory; an x2APIC wants 0.
            _ => 0,
        }
    }
}

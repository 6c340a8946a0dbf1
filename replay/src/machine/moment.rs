//! A point in the guest's execution, as the guest itself could count it.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How many vCPUs a machine has. A journal and a machine's state name a vCPU wherever they name a moment, so that
/// more of them need no other format.
pub const VCPUS: u8 = 1;

/// One of a machine's vCPUs, by its number.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct VcpuNumber(pub u8);

impl VcpuNumber {
    /// The one that runs from power-on.
    pub const BOOT: VcpuNumber = VcpuNumber(0);

    /// Whether a machine with `vcpus` vCPUs has it.
    pub fn is_among(self, vcpus: u8) -> bool {
        self.0 < vcpus
    }

    /// What is said after what happened on it. Nothing of the boot vCPU: most machines have no other.
    pub fn suffix(self) -> String {
        match self {
            VcpuNumber::BOOT => String::new(),
            VcpuNumber(number) => format!(" on vCPU {number}"),
        }
    }
}

/// A point in the guest's execution.
///
/// Positions are made of what the guest's own instructions cause, never of host time: how many
/// exits there have been, and where after the last exit the guest is. A place between two exits
/// at which something happened counts as an exit too, from then on; `branches` tells how far after
/// the one before it lies. `rip` and `rcx` are the registers there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment {
    /// Exits since power-on. Exits that the guest causes count, wake-ups from HLT, and places at
    /// which it was preempted; signals, breakpoints and interrupt windows are the host's and do not.
    pub exits: u64,
    /// The vCPU that `rip` and `rcx` are of. Exits are counted over all of them.
    pub vcpu: VcpuNumber,
    /// At a preemption, the conditional branches retired since the exit before it; else 0.
    pub branches: u64,
    /// Instruction pointer.
    pub rip: u64,
    /// RCX, which tells the iterations of one REP instruction apart.
    pub rcx: u64,
}

impl Moment {
    /// Power-on.
    pub const START: Moment = Moment {
        exits: 0,
        vcpu: VcpuNumber::BOOT,
        branches: 0,
        rip: 0,
        rcx: 0,
    };
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {}{}", self.exits, self.vcpu.suffix())?;
        if self.branches > 0 {
            write!(f, " ({} branches after the one before)", self.branches)?;
        }
        write!(f, " at rip {:#x}", self.rip)
    }
}

/// A moment as an operator names it: the number of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExitNumber(pub u64);

impl FromStr for ExitNumber {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.replace(['_', ','], "").parse().map(ExitNumber)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_names_its_vcpu_where_it_is_not_the_one_that_every_machine_has() {
        let at = |vcpu| Moment {
            exits: 7,
            vcpu: VcpuNumber(vcpu),
            branches: 0,
            rip: 0x1000,
            rcx: 0,
        };
        assert_eq!(at(0).to_string(), "exit 7 at rip 0x1000");
        assert_eq!(at(3).to_string(), "exit 7 on vCPU 3 at rip 0x1000");
    }

    #[test]
    fn a_machine_has_the_vcpus_below_their_number() {
        assert!(VcpuNumber::BOOT.is_among(VCPUS));
        for number in VCPUS..=u8::MAX {
            assert!(!VcpuNumber(number).is_among(VCPUS));
        }
    }
}

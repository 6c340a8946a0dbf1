//! The model-specific registers that KVM does not answer for the guest.
//!
//! The time stamp counter is the machine's own: one tick per nanosecond of guest time plus
//! what the guest has added. A short table follows of registers that stock Linux reads or
//! writes without being ready for a fault, each with its reason; everything else faults, as
//! a register that a CPU does not have.

use serde::{Deserialize, Serialize};

use crate::{Nanos, Reply};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_ADJUST: u32 = 0x3b;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const AMD_HWCR: u32 = 0xc001_0015;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const TSC_AUX: u32 = 0xc000_0103;

/// What a WRMSR to a register in the table does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnWrite {
    Fault,
    /// Taken, without effect.
    Ignore,
    /// Taken without effect if these bits stay set, else a fault.
    Keep(u64),
    /// Read back as written.
    Store,
    /// Read back as written; must be an address, else a fault.
    StoreAddress,
}

/// One register of the table.
struct Harmless {
    index: u32,
    /// What RDMSR reads (at power-on, if writes are stored); `None` faults.
    reads: Option<u64>,
    write: OnWrite,
    /// Why stock Linux needs it, for the reader of this table.
    #[cfg_attr(not(test), expect(dead_code))]
    why: &'static str,
}

const HARMLESS: [Harmless; 14] = [
    Harmless {
        index: 0x17, // IA32_PLATFORM_ID
        reads: Some(0),
        write: OnWrite::Fault,
        why: "read unguarded for the microcode signature on Intel",
    },
    Harmless {
        index: 0x79, // IA32_BIOS_UPDT_TRIG
        reads: None,
        write: OnWrite::Ignore,
        why: "the microcode loader writes it unguarded; there is nothing to update",
    },
    Harmless {
        index: 0x8b, // IA32_BIOS_SIGN_ID, on AMD MSR_AMD64_PATCH_LEVEL
        // Intel's revision is the upper half. For a low one Linux takes the TSC deadline away, of
        // which real CPUs had flaws. AMD's is the lower.
        reads: Some(0x7fff_ffff << 32),
        write: OnWrite::Ignore,
        why: "Intel's protocol writes 0, runs CPUID, then reads the revision; AMD only reads",
    },
    Harmless {
        index: IA32_SYSENTER_CS,
        reads: Some(0),
        write: OnWrite::Store,
        why: "where SYSENTER enters the kernel; KVM forgets the upper half of what it is given for AMD's CPUs",
    },
    Harmless {
        index: IA32_SYSENTER_ESP,
        reads: Some(0),
        write: OnWrite::StoreAddress,
        why: "the same: the stack that it enters with",
    },
    Harmless {
        index: IA32_SYSENTER_EIP,
        reads: Some(0),
        write: OnWrite::StoreAddress,
        why: "the same: the address that it enters at",
    },
    Harmless {
        index: IA32_MISC_ENABLE,
        reads: Some(1), // fast strings
        write: OnWrite::Store,
        why: "read unguarded for the fast-string bit, written back with bits changed",
    },
    Harmless {
        index: LSTAR,
        reads: Some(0),
        write: OnWrite::StoreAddress,
        why: "where SYSCALL enters the kernel; the CPU's own may lead there by way of a counter",
    },
    Harmless {
        index: CSTAR,
        reads: Some(0),
        write: OnWrite::StoreAddress,
        why: "the same for SYSCALL in 32-bit programs",
    },
    Harmless {
        index: 0xc001_0010, // MSR_AMD64_SYSCFG
        reads: Some(0),
        write: OnWrite::Ignore,
        why: "the MTRR code looks for Tom2ForceMemTypeWB; 0 says no memory above 4 GiB is forced",
    },
    Harmless {
        index: AMD_HWCR,
        // TscFreqSel, bit 24: without it Linux calls the firmware buggy.
        reads: Some(1 << 24),
        write: OnWrite::Store,
        why: "bsp_init_amd() reads it unguarded wherever the TSC is constant",
    },
    Harmless {
        index: 0xc001_001f, // MSR_AMD64_NB_CFG
        reads: Some(0),
        write: OnWrite::Ignore,
        why: "read unguarded on family 10h and by the PCI quirks",
    },
    Harmless {
        index: 0xc001_0055, // MSR_K8_INT_PENDING_MSG
        reads: Some(0),
        write: OnWrite::Ignore,
        why: "read unguarded for the C1E erratum; 0 says that C1E is off",
    },
    Harmless {
        index: 0xc001_1029, // MSR_AMD64_DE_CFG
        reads: Some(2),     // LFENCE waits for all earlier instructions
        write: OnWrite::Keep(2),
        why: "init_amd() makes LFENCE serialising and reads the bit back",
    },
];

/// The registers that hold a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msrs {
    /// IA32_TSC_ADJUST, which is also all that separates the TSC from guest time: every
    /// write to either moves both by the same amount (Intel SDM vol. 3, 18.17.3).
    tsc_adjust: u64,
    tsc_aux: u32,
    misc_enable: u64,
    hwcr: u64,
    lstar: u64,
    cstar: u64,
    /// Code segment, stack and entry.
    sysenter: [u64; 3],
}

impl Msrs {
    pub(crate) fn new() -> Msrs {
        let power_on = |index: u32| {
            let entry = HARMLESS.iter().find(|entry| entry.index == index);
            entry
                .and_then(|entry| entry.reads)
                .expect("a stored register is in the table")
        };
        Msrs {
            tsc_adjust: 0,
            tsc_aux: 0,
            misc_enable: power_on(IA32_MISC_ENABLE),
            hwcr: power_on(AMD_HWCR),
            lstar: power_on(LSTAR),
            cstar: power_on(CSTAR),
            sysenter: [IA32_SYSENTER_CS, IA32_SYSENTER_ESP, IA32_SYSENTER_EIP].map(power_on),
        }
    }

    /// The time stamp counter: 1 GHz.
    pub(crate) fn time_stamp(&self, now: Nanos) -> u64 {
        now.wrapping_add(self.tsc_adjust)
    }

    /// What RDTSCP puts in ECX.
    pub(crate) fn tsc_aux(&self) -> u32 {
        self.tsc_aux
    }

    /// RDMSR.
    pub(crate) fn read(&self, index: u32, now: Nanos) -> Reply {
        let value = match index {
            IA32_TSC => Some(self.time_stamp(now)),
            IA32_TSC_ADJUST => Some(self.tsc_adjust),
            TSC_AUX => Some(u64::from(self.tsc_aux)),
            IA32_MISC_ENABLE => Some(self.misc_enable),
            AMD_HWCR => Some(self.hwcr),
            LSTAR => Some(self.lstar),
            CSTAR => Some(self.cstar),
            IA32_SYSENTER_CS..=IA32_SYSENTER_EIP => {
                Some(self.sysenter[(index - IA32_SYSENTER_CS) as usize])
            }
            _ => HARMLESS
                .iter()
                .find(|entry| entry.index == index)
                .and_then(|entry| entry.reads),
        };
        value.map_or(Reply::Fault, Reply::Value)
    }

    /// WRMSR.
    pub(crate) fn write(&mut self, index: u32, value: u64, now: Nanos) -> Reply {
        match index {
            IA32_TSC => {
                self.tsc_adjust = value.wrapping_sub(now);
                return Reply::Done;
            }
            IA32_TSC_ADJUST => {
                self.tsc_adjust = value;
                return Reply::Done;
            }
            TSC_AUX => {
                // The upper half is reserved (AMD APM vol. 2, 3.2.3).
                let Ok(value) = u32::try_from(value) else {
                    return Reply::Fault;
                };
                self.tsc_aux = value;
                return Reply::Done;
            }
            _ => {}
        }
        match HARMLESS
            .iter()
            .find(|entry| entry.index == index)
            .map(|entry| entry.write)
        {
            None | Some(OnWrite::Fault) => Reply::Fault,
            Some(OnWrite::Ignore) => Reply::Done,
            Some(OnWrite::Keep(bits)) if value & bits == bits => Reply::Done,
            Some(OnWrite::Keep(_)) => Reply::Fault,
            Some(OnWrite::StoreAddress) if !is_canonical(value) => Reply::Fault,
            Some(OnWrite::Store | OnWrite::StoreAddress) => {
                match index {
                    IA32_MISC_ENABLE => self.misc_enable = value,
                    AMD_HWCR => self.hwcr = value,
                    LSTAR => self.lstar = value,
                    CSTAR => self.cstar = value,
                    IA32_SYSENTER_CS..=IA32_SYSENTER_EIP => {
                        self.sysenter[(index - IA32_SYSENTER_CS) as usize] = value;
                    }
                    _ => unreachable!("MSR {index:#x} is stored, but nowhere"),
                }
                Reply::Done
            }
        }
    }
}

/// Whether all bits from 47 on are equal (Intel SDM vol. 1, 3.3.7.1); five-level paging is hidden.
fn is_canonical(address: u64) -> bool {
    address.cast_signed() << 16 >> 16 == address.cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_stamp_is_guest_time_until_the_guest_moves_it() {
        let mut msrs = Msrs::new();
        assert_eq!(msrs.read(IA32_TSC, 5_000), Reply::Value(5_000));
        msrs.write(IA32_TSC, 100, 5_000);
        assert_eq!(msrs.read(IA32_TSC, 5_001), Reply::Value(101));
        assert_eq!(
            msrs.read(IA32_TSC_ADJUST, 5_001),
            Reply::Value(100u64.wrapping_sub(5_000))
        );
    }

    #[test]
    fn adjusting_moves_the_time_stamp_by_the_difference() {
        let mut msrs = Msrs::new();
        msrs.write(IA32_TSC_ADJUST, 1_000, 7);
        assert_eq!(msrs.time_stamp(7), 1_007);
        msrs.write(IA32_TSC_ADJUST, 0, 7);
        assert_eq!(msrs.time_stamp(7), 7);
    }

    #[test]
    fn tsc_aux_is_kept_and_its_upper_half_faults() {
        let mut msrs = Msrs::new();
        assert_eq!(msrs.write(TSC_AUX, 0x1003, 0), Reply::Done);
        assert_eq!(msrs.tsc_aux(), 0x1003);
        assert_eq!(msrs.write(TSC_AUX, 1 << 32, 0), Reply::Fault);
        assert_eq!(msrs.tsc_aux(), 0x1003);
    }

    #[test]
    fn a_register_no_one_listed_faults_both_ways() {
        let mut msrs = Msrs::new();
        for index in [0xce, 0x198, 0xe7, 0xe8, 0x6e0, 0xc001_0114] {
            assert_eq!(msrs.read(index, 0), Reply::Fault);
            assert_eq!(msrs.write(index, 0, 0), Reply::Fault);
        }
    }

    #[test]
    fn lfence_stays_serialising() {
        let mut msrs = Msrs::new();
        assert_eq!(msrs.read(0xc001_1029, 0), Reply::Value(2));
        assert_eq!(msrs.write(0xc001_1029, 0x202, 0), Reply::Done);
        assert_eq!(msrs.read(0xc001_1029, 0), Reply::Value(2));
        assert_eq!(msrs.write(0xc001_1029, 0, 0), Reply::Fault);
    }

    #[test]
    fn where_system_calls_enter_must_be_an_address() {
        for index in [LSTAR, CSTAR] {
            let mut msrs = Msrs::new();
            let entry = 0xffff_ffff_81c0_0040;
            assert_eq!(msrs.write(index, entry, 0), Reply::Done);
            for value in [0x0000_8000_0000_0000, 0xffff_7fff_ffff_ffff] {
                assert_eq!(msrs.write(index, value, 0), Reply::Fault);
            }
            assert_eq!(msrs.read(index, 0), Reply::Value(entry));
        }
    }

    #[test]
    fn the_table_is_sorted_and_every_entry_says_why() {
        assert!(
            HARMLESS
                .windows(2)
                .all(|pair| pair[0].index < pair[1].index)
        );
        assert!(HARMLESS.iter().all(|entry| entry.why.len() > 20));
    }

    #[test]
    fn every_stored_register_reads_back_what_was_written() {
        for entry in HARMLESS
            .iter()
            .filter(|entry| matches!(entry.write, OnWrite::Store | OnWrite::StoreAddress))
        {
            let mut msrs = Msrs::new();
            assert_eq!(
                msrs.read(entry.index, 0),
                Reply::Value(entry.reads.unwrap())
            );
            assert_eq!(msrs.write(entry.index, 0x1234_5678, 0), Reply::Done);
            assert_eq!(msrs.read(entry.index, 0), Reply::Value(0x1234_5678));
        }
    }
}

//! The CPU the guest believes in: a stated set of features, as far as the host has them.
//!
//! An allowlist, for a feature not thought about is a hole. Left out on purpose: RDRAND, RDSEED, RDPMC, RDPID,
//! WAITPKG, MONITOR, TSX (answers the guest could not compute); XSAVE and with it AVX and AMX (whether a state
//! component counts as in use, which XSAVE writes to memory, depends on when the host last switched the
//! thread); SMAP (its CLAC would be written over the trap at the #GP entry by the kernel's own patching); PCID,
//! kvmclock and all hypervisor leaves.
//!
//! What the board has is shown whatever the host has: the local APIC, that its timer never stops, and its TSC
//! deadline, unless KVM keeps that from the board (see `deadline`). The x2APIC is there too, but not
//! shown: a Linux that does not know itself to be under a hypervisor asks for interrupt remapping first, finds
//! none and goes back to the xAPIC, which costs some 200 exits.
//!
//! Bit numbers are those of the Intel SDM vol. 2, CPUID, and the AMD APM vol. 3, appendix E.

use hindsight_replay::{CpuidEntry, CpuidTable};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;

use super::deadline;
use super::error::{KvmError, Named};

/// Highest basic leaf shown.
const MAX_BASIC: u32 = 7;
/// Highest extended leaf shown.
const MAX_EXTENDED: u32 = 0x8000_0008;

const fn bits(list: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < list.len() {
        word |= 1 << list[i];
        i += 1;
    }
    word
}

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES.
const LEAF1_ECX: u32 = bits(&[0, 1, 9, 13, 19, 20, 22, 23, 25]);
/// Leaf 1 EDX: FPU VME DE PSE TSC MSR PAE CX8 SEP MTRR PGE CMOV PAT PSE36 CLFSH MMX FXSR SSE SSE2.
const LEAF1_EDX: u32 = bits(&[
    0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 13, 15, 16, 17, 19, 23, 24, 25, 26,
]);
/// Leaf 1 ECX, the board's, if KVM lets it: the local APIC's TSC deadline.
const BOARD1_ECX: u32 = bits(&[24]);
/// Leaf 1 EDX, the board's: the local APIC.
const BOARD1_EDX: u32 = bits(&[9]);
/// Leaf 6 EAX, the board's: the local APIC's timer always runs (ARAT).
const BOARD6_EAX: u32 = bits(&[2]);
/// Leaf 7 EBX: FSGSBASE, BMI1, SMEP, BMI2, ERMS, ADX, CLFLUSHOPT, SHA.
const LEAF7_EBX: u32 = bits(&[0, 3, 7, 8, 9, 19, 23, 29]);
/// Leaf 0x80000001 ECX: LAHF, ABM, SSE4A, 3DNow! prefetch.
const EXTENDED1_ECX: u32 = bits(&[0, 5, 6, 8]);
/// Leaf 0x80000001 EDX: what it repeats of leaf 1 on AMD (the APIC too), and SYSCALL, NX, MMX extensions, 1 GiB
/// pages, RDTSCP, long mode.
const EXTENDED1_EDX: u32 = (LEAF1_EDX
    & bits(&[0, 1, 2, 3, 4, 5, 6, 8, 12, 13, 15, 16, 17, 23, 24]))
    | bits(&[9, 11, 20, 22, 26, 27, 29]);
/// Leaf 0x80000007 EDX: the TSC is invariant, as ours is.
const EXTENDED7_EDX: u32 = bits(&[8]);

/// The table for this host.
pub fn for_host(kvm: &Kvm) -> Result<CpuidTable, KvmError> {
    let mut table = without_deadline(kvm)?;
    if deadline::reaches_us(kvm)? {
        let leaf1 = table.entries.iter_mut().filter(|entry| entry.leaf == 1);
        leaf1.for_each(|entry| entry.values[2] |= BOARD1_ECX);
    }
    Ok(table)
}

/// The table as far as it is known without running a guest, for those that find out whether one
/// can be run at all.
pub fn without_deadline(kvm: &Kvm) -> Result<CpuidTable, KvmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .named("KVM_GET_SUPPORTED_CPUID")?;
    Ok(filter(supported.as_slice()))
}

/// What of `supported` the guest is shown.
fn filter(supported: &[kvm_cpuid_entry2]) -> CpuidTable {
    let mut entries: Vec<CpuidEntry> = supported.iter().filter_map(shown).collect();
    entries.sort_by_key(|entry| (entry.leaf, entry.subleaf));
    entries.dedup_by_key(|entry| (entry.leaf, entry.subleaf));
    CpuidTable { entries }
}

fn shown(entry: &kvm_cpuid_entry2) -> Option<CpuidEntry> {
    let kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..
    } = *entry;
    let values = match leaf {
        0 => [eax.min(MAX_BASIC), ebx, ecx, edx],
        // EBX: APIC ID 0, one logical CPU, the CLFLUSH line as it is.
        1 => [
            eax,
            (ebx & 0xff00) | 1 << 16,
            ecx & LEAF1_ECX,
            edx & LEAF1_EDX | BOARD1_EDX,
        ],
        2 => [eax, ebx, ecx, edx],
        // EAX[31:14]: how many share the cache and the package; one.
        4 => [eax & 0x3fff, ebx, ecx, edx],
        6 => [BOARD6_EAX, 0, 0, 0],
        7 if index == 0 => [0, ebx & LEAF7_EBX, 0, 0],
        0x8000_0000 => [eax.min(MAX_EXTENDED), ebx, ecx, edx],
        0x8000_0001 => [eax, ebx, ecx & EXTENDED1_ECX, edx & EXTENDED1_EDX],
        0x8000_0002..=0x8000_0006 => [eax, ebx, ecx, edx],
        0x8000_0007 => [0, 0, 0, EXTENDED7_EDX],
        // EAX: physical and linear address bits.
        0x8000_0008 => [eax & 0xffff, 0, 0, 0],
        _ => return None,
    };
    let indexed = flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    Some(CpuidEntry {
        leaf,
        subleaf: indexed.then_some(index),
        values,
    })
}

/// The table in KVM's own form, for programs in user mode, whose CPUID KVM answers.
pub fn for_kvm(table: &CpuidTable) -> Result<CpuId, KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = table
        .entries
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.leaf,
            index: entry.subleaf.unwrap_or(0),
            flags: if entry.subleaf.is_some() {
                KVM_CPUID_FLAG_SIGNIFCANT_INDEX
            } else {
                0
            },
            eax: entry.values[0],
            ebx: entry.values[1],
            ecx: entry.values[2],
            edx: entry.values[3],
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|_| KvmError::Cpu(format!("its CPUID table has {} entries", entries.len())))
}

/// Refuses a host whose CPU is of another make or lacks a feature that the guest was shown.
pub fn check_host(recorded: &CpuidTable, host: &CpuidTable) -> Result<(), KvmError> {
    let (theirs, ours) = (recorded.vendor(), host.vendor());
    if theirs != ours {
        return Err(KvmError::Cpu(format!(
            "recorded on {theirs}, this host is {ours}"
        )));
    }
    let flags: [(u32, usize, &str, u32); 6] = [
        (1, 2, "leaf 1 ECX", LEAF1_ECX | BOARD1_ECX),
        (1, 3, "leaf 1 EDX", LEAF1_EDX | BOARD1_EDX),
        (7, 1, "leaf 7 EBX", LEAF7_EBX),
        (0x8000_0001, 2, "leaf 0x80000001 ECX", EXTENDED1_ECX),
        (0x8000_0001, 3, "leaf 0x80000001 EDX", EXTENDED1_EDX),
        (0x8000_0007, 3, "leaf 0x80000007 EDX", EXTENDED7_EDX),
    ];
    for (leaf, word, name, allowed) in flags {
        let (theirs, ours) = (recorded.answer(leaf, 0)[word], host.answer(leaf, 0)[word]);
        let missing = theirs & !ours;
        if missing != 0 {
            return Err(KvmError::Cpu(format!(
                "the guest was shown {theirs:#010x} in CPUID {name}, this host has {ours:#010x} \
                 and lacks {missing:#010x}"
            )));
        }
        if theirs & !allowed != 0 {
            return Err(KvmError::Cpu(format!(
                "the recording shows the guest {:#010x} in CPUID {name}, which Hindsight never does",
                theirs & !allowed
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = values;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn a_host_with_every_feature_shows_only_the_stated_ones() {
        let all: Vec<_> = (0..=0x24)
            .chain(0x4000_0000..0x4000_0008)
            .chain(0x8000_0000..0x8000_0028)
            .map(|leaf| entry(leaf, [!0; 4]))
            .collect();
        let table = filter(&all);
        let rdrand = 1 << 30;
        let hypervisor = 1 << 31;
        let xsave = 3 << 26;
        let x2apic = 1 << 21;
        let hidden = rdrand | hypervisor | xsave | x2apic;
        assert_eq!(table.answer(1, 0)[2] & hidden, 0);
        assert_eq!(table.answer(7, 0), [0, LEAF7_EBX, 0, 0]);
        assert_eq!(table.answer(0xd, 0), [0; 4]);
        assert_eq!(table.answer(0x4000_0000, 0), [0; 4]);
        assert_eq!(table.answer(0, 0)[0], 7);
    }

    #[test]
    fn the_boards_apic_is_shown_whatever_the_host_has() {
        let table = filter(&[entry(1, [0; 4]), entry(6, [0; 4])]);
        assert_eq!(table.answer(1, 0)[3], 1 << 9);
        assert_eq!(table.answer(6, 0), [1 << 2, 0, 0, 0]);
    }

    #[test]
    fn a_host_that_lacks_a_shown_feature_is_refused_by_name() {
        let amd = [7, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
        let recorded = filter(&[entry(0, amd), entry(1, [0, 0, LEAF1_ECX, LEAF1_EDX])]);
        let poorer = filter(&[
            entry(0, amd),
            entry(1, [0, 0, LEAF1_ECX & !(1 << 23), LEAF1_EDX]),
        ]);
        assert!(check_host(&recorded, &recorded).is_ok());
        let error = check_host(&recorded, &poorer).unwrap_err().to_string();
        assert!(
            error.contains("leaf 1 ECX") && error.contains("0x00800000"),
            "{error}"
        );
        let intel = filter(&[entry(0, [7, 0x756e_6547, 0x6c65_746e, 0x4965_6e69])]);
        assert!(
            check_host(&recorded, &intel)
                .unwrap_err()
                .to_string()
                .contains("GenuineIntel")
        );
    }
}

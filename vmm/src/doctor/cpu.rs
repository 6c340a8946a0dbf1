//! CPUID, MSRs, time, and the way between the rings.

use hindsight_guest_images::layout::{DATA, INTERRUPT_STACK, KERNEL_CS, PML4, USER_CS};
use hindsight_guest_images::{MicroGuest, Ring, micro};

use super::finding::{BRAND, BRAND_LEAF, Bench, Checked, Miss, Probe, Weight, expect, fails};
use crate::kvm::msr::LSTAR;
use crate::kvm::probe::{Fault, ProbeVm, Stop};

const CR4_TSD: u64 = 1 << 2;

/// All probes of these groups.
pub(super) const PROBES: &[Probe] = &[
    Probe {
        group: "CPUID",
        name: "ring 0 sees the table we set",
        weight: Weight::Gate,
        cost: "the kernel sees the host's CPU, and another host's in replay",
        check: |bench| cpuid(bench, Ring::Kernel),
    },
    Probe {
        group: "CPUID",
        name: "ring 3 sees the table we set",
        weight: Weight::Gate,
        cost: "programs see the host's CPU, use what should be hidden, and differ in replay",
        check: |bench| cpuid(bench, Ring::User),
    },
    Probe {
        group: "CPUID",
        name: "it has what Linux wants",
        weight: Weight::Needed,
        cost: "a 64-bit kernel does not boot",
        check: features,
    },
    Probe {
        group: "rings",
        name: "SYSCALL enters ring 0",
        weight: Weight::Gate,
        cost: "the kernel runs without privilege: no distribution's kernel gets past its first program",
        check: syscall,
    },
    Probe {
        group: "rings",
        name: "SYSRET returns to ring 3",
        weight: Weight::Gate,
        cost: "no program runs",
        check: sysret,
    },
    Probe {
        group: "rings",
        name: "an exception enters ring 0, IRET returns",
        weight: Weight::Needed,
        cost: "interrupts and exceptions of programs do not do what a CPU's do",
        check: gate,
    },
    Probe {
        group: "rings",
        name: "a refused instruction faults where it is",
        weight: Weight::Feature,
        cost: "a kernel that writes what its CPU refuses to CR4 gets the fault at another instruction",
        check: refused,
    },
    Probe {
        group: "MSRs",
        name: "filtered MSRs reach us",
        weight: Weight::Gate,
        cost: "KVM answers with the host's clocks and counters",
        check: msr_reads,
    },
    Probe {
        group: "MSRs",
        name: "a refused MSR is #GP",
        weight: Weight::Needed,
        cost: "a kernel that probes for an MSR crashes or believes in it",
        check: msr_refused,
    },
    Probe {
        group: "MSRs",
        name: "a TSC deadline reaches us",
        weight: Weight::Feature,
        cost: "guests have a timer without it, which they must measure first, and recordings with it do not replay here",
        check: tsc_deadline,
    },
    Probe {
        group: "time",
        name: "CR4.TSD stops RDTSC in ring 3",
        weight: Weight::Gate,
        cost: "programs that read the TSC see the host's, and differ in replay",
        check: tsd,
    },
];

fn cpuid(bench: &mut Bench, ring: Ring) -> Checked {
    let leaves = [(BRAND_LEAF, 0), (1, 0), (7, 0)];
    let expected = [BRAND, bench.table.answer(1, 0), bench.table.answer(7, 0)];
    let vm = bench.run(&micro::cpuid(ring, &leaves))?;
    let bytes = vm.bytes(DATA, 16 * leaves.len());
    let words: Vec<u32> = bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let mut seen = words.chunks_exact(4);
    for ((leaf, _), expected) in leaves.iter().zip(expected) {
        let seen = seen.next().expect("the guest asked for this leaf");
        // EDX of leaf 1 holds the APIC's presence, ECX OSXSAVE and EBX the APIC ID, which KVM
        // keeps for itself; the feature bits that concern us are in ECX.
        let same = match leaf {
            1 => (seen[2] ^ expected[2]) & !(1 << 27) == 0,
            _ => seen == expected,
        };
        if !same {
            return fails(format!(
                "leaf {leaf:#x} was set to {expected:08x?}, the guest got {seen:08x?}"
            ));
        }
    }
    Ok("a made-up brand string, and features hidden in leaves 1 and 7".to_string())
}

fn features(bench: &mut Bench) -> Checked {
    // Linux, arch/x86/include/asm/required-features.h, for 64 bits; SYSCALL, NX and long mode.
    let wanted: [(u32, u32, &str); 11] = [
        (1, 0, "FPU"),
        (1, 3, "PSE"),
        (1, 4, "TSC"),
        (1, 5, "MSR"),
        (1, 6, "PAE"),
        (1, 8, "CX8"),
        (1, 24, "FXSR"),
        (1, 26, "SSE2"),
        (0x8000_0001, 11, "SYSCALL"),
        (0x8000_0001, 20, "NX"),
        (0x8000_0001, 29, "LM"),
    ];
    let missing: Vec<&str> = wanted
        .iter()
        .filter(|(leaf, bit, _)| bench.table.answer(*leaf, 0)[3] & 1 << bit == 0)
        .map(|(_, _, name)| *name)
        .collect();
    if !missing.is_empty() {
        return fails(format!("this KVM does not offer {}", missing.join(", ")));
    }
    let [one, seven] = [bench.table.answer(1, 0)[2], bench.table.answer(7, 0)[1]];
    let names: [(u32, u32, &str); 12] = [
        (one, 0, "SSE3"),
        (one, 9, "SSSE3"),
        (one, 19, "SSE4.1"),
        (one, 20, "SSE4.2"),
        (one, 23, "POPCNT"),
        (one, 25, "AES"),
        (seven, 0, "FSGSBASE"),
        (seven, 3, "BMI1"),
        (seven, 7, "SMEP"),
        (seven, 8, "BMI2"),
        (seven, 9, "ERMS"),
        (seven, 29, "SHA"),
    ];
    let shown: Vec<&str> = names
        .iter()
        .filter(|(word, bit, _)| word & 1 << bit != 0)
        .map(|(_, _, name)| *name)
        .collect();
    let shown = if shown.is_empty() {
        "nothing".to_string()
    } else {
        shown.join(" ")
    };
    Ok(format!("{}; beyond x86-64: {shown}", bench.table.vendor()))
}

/// The guest that does SYSCALL, after its write of LSTAR: that comes to us, and we load it.
fn start_syscall<'a>(bench: &'a mut Bench, guest: &MicroGuest) -> Result<&'a mut ProbeVm, Miss> {
    let vm = bench.start(guest)?;
    match vm.run()? {
        Stop::MsrWrite(LSTAR, entry) => vm.load_msr(LSTAR, entry)?,
        stop => return Err(Miss::Fails(format!("instead of a write of LSTAR: {stop}"))),
    }
    Ok(vm)
}

fn syscall(bench: &mut Bench) -> Checked {
    let guest = micro::syscall();
    let vm = start_syscall(bench, &guest)?;
    match vm.run()? {
        Stop::Mark => {}
        Stop::Fault(fault) if fault.cs & 3 == 3 => {
            return fails(format!("{}: CPL stayed 3", Stop::Fault(fault)));
        }
        stop => return fails(stop),
    }
    let (privilege, rcx) = (vm.privilege()?, vm.registers()?.rcx);
    let [cs, cr3] = vm.words(DATA);
    if privilege != 0 || cs != u64::from(KERNEL_CS) {
        return fails(format!(
            "the entry runs at CPL {privilege}, with CS {cs:#x}"
        ));
    }
    if rcx != guest.place("back") || cr3 != PML4 {
        return fails(format!("the entry sees RCX {rcx:#x} and CR3 {cr3:#x}"));
    }
    Ok("CPL 0, and the entry may read CR3".to_string())
}

fn sysret(bench: &mut Bench) -> Checked {
    let vm = start_syscall(bench, &micro::syscall())?;
    match vm.run()? {
        Stop::Mark => {}
        stop => return Err(Miss::Unknown(format!("SYSCALL does not get there: {stop}"))),
    }
    expect(vm, &Stop::Done)?;
    match vm.words(DATA + 16) {
        [cs] if cs == u64::from(USER_CS) => Ok("CPL 3".to_string()),
        [cs] => fails(format!("CS is {cs:#x} after SYSRET")),
    }
}

fn gate(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::gate())?;
    expect(vm, &Stop::Mark)?;
    let privilege = vm.privilege()?;
    expect(vm, &Stop::Done)?;
    let [inside, rsp, after] = vm.words(DATA);
    if privilege != 0 || inside != u64::from(KERNEL_CS) || after != u64::from(USER_CS) {
        return fails(format!(
            "CPL {privilege}, CS {inside:#x} in the entry, CS {after:#x} after it"
        ));
    }
    if rsp != INTERRUPT_STACK - 40 {
        return fails(format!(
            "the entry has RSP {rsp:#x}, not the stack the TSS names"
        ));
    }
    Ok("by a gate and the TSS's stack".to_string())
}

fn refused(bench: &mut Bench) -> Checked {
    // A rewritten instruction is an OUT, which KVM finishes by moving RIP after it.
    const PORT: u8 = 0xe8;
    let guest = micro::trap_port(PORT);
    let out = guest.place("next") - 2;
    let vm = bench.start(&guest)?;
    match vm.run()? {
        Stop::PortWrite(port, 1, _) if port == u16::from(PORT) => vm.refuse(out)?,
        stop => return Err(Miss::Unknown(stop.to_string())),
    }
    let fault = Fault {
        vector: 13,
        error: 0,
        rip: out,
        cs: KERNEL_CS,
    };
    expect(vm, &Stop::Fault(fault))?;
    Ok("#GP(0) at the instruction, and not after it".to_string())
}

fn msr_reads(bench: &mut Bench) -> Checked {
    let (tsc, mperf, star) = (0x10, 0xe7, 0xc000_0081);
    let vm = bench.start(&micro::read_msrs(&[tsc, mperf, star]))?;
    if let Some(error) = &vm.filter_error {
        return fails(error);
    }
    let given = [0x1234_5678_9abc, 0xfeed_f00d_cafe];
    for (index, value) in [tsc, mperf].into_iter().zip(given) {
        expect(vm, &Stop::MsrRead(index))?;
        vm.give_msr(Some(value));
    }
    expect(vm, &Stop::Done)?;
    let got: [u64; 2] = vm.words(DATA);
    if got != given {
        return fails(format!("answered {given:x?}, but the guest has {got:x?}"));
    }
    Ok("0x10 (TSC) and 0xe7 (MPERF) are ours, STAR stays KVM's".to_string())
}

fn tsc_deadline(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::write_msr(0x6e0, 0x1122_3344_5566))?;
    match vm.run()? {
        Stop::MsrWrite(0x6e0, 0x1122_3344_5566) => Ok("0x6e0, as it was written".to_string()),
        Stop::Done => fails("KVM keeps 0x6e0, against the filter".to_string()),
        stop => fails(stop),
    }
}

fn msr_refused(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::write_msr(0x10, 0x1122_3344_5566))?;
    expect(vm, &Stop::MsrWrite(0x10, 0x1122_3344_5566))?;
    vm.give_msr(None);
    match vm.run()? {
        Stop::Fault(Fault {
            vector: 13,
            error: 0,
            ..
        }) => Ok("WRMSR, then #GP(0)".to_string()),
        stop => fails(stop),
    }
}

fn tsd(bench: &mut Bench) -> Checked {
    let guest = micro::rdtsc(Ring::User);
    let vm = bench.start_with(&guest, CR4_TSD)?;
    let rip = guest.place("rdtsc");
    let fault = Fault {
        vector: 13,
        error: 0,
        rip,
        cs: USER_CS,
    };
    expect(vm, &Stop::Fault(fault))?;
    Ok("#GP(0) at the instruction".to_string())
}

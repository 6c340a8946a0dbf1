//! Exits: does each arrive, with all it says, and does the answer arrive in the guest?

use hindsight_guest_images::layout::{DATA, MMIO, PORT_DEVICE};
use hindsight_guest_images::micro;
use kvm_ioctls::Cap;

use super::finding::{Bench, Checked, Probe, Weight, expect, fails};
use crate::kvm::probe::Stop;
use hindsight_kernel::rewrite::traps::TRAP_CPUID;

const GROUP: &str = "exits";
const UNUSABLE: &str = "no device works, so no guest runs";

/// All probes of this group.
pub(super) const PROBES: &[Probe] = &[
    Probe {
        group: GROUP,
        name: "IN and OUT reach us",
        weight: Weight::Needed,
        cost: UNUSABLE,
        check: ports,
    },
    Probe {
        group: GROUP,
        name: "an OUT can wait for the next exit",
        weight: Weight::Gate,
        cost: "no machine: its serial port is written so (KVM_CAP_COALESCED_PIO, Linux 5.0)",
        check: posted_ports,
    },
    Probe {
        group: GROUP,
        name: "string IN and OUT reach us",
        weight: Weight::Needed,
        cost: UNUSABLE,
        check: string_ports,
    },
    Probe {
        group: GROUP,
        name: "memory-mapped I/O reaches us",
        weight: Weight::Needed,
        cost: UNUSABLE,
        check: memory_mapped,
    },
    Probe {
        group: GROUP,
        name: "HLT reaches us",
        weight: Weight::Needed,
        cost: "an idle guest never yields",
        check: halt,
    },
    Probe {
        group: GROUP,
        name: "a triple fault is a shutdown",
        weight: Weight::Needed,
        cost: "a guest that reboots or crashes hard does not end",
        check: shutdown,
    },
    Probe {
        group: GROUP,
        name: "registers come with each exit",
        weight: Weight::Gate,
        cost: "no exit can be checked in replay",
        check: sync_regs,
    },
    Probe {
        group: GROUP,
        name: "a trap port is answered",
        weight: Weight::Gate,
        cost: "no time read and no CPUID of the kernel can be recorded",
        check: trap_port,
    },
];

fn ports(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::ports())?;
    let writes = [(1, 0x5a), (2, 0x1234), (4, 0xdead_beef)];
    for (port, (size, value)) in (PORT_DEVICE..).zip(writes) {
        expect(vm, &Stop::PortWrite(port, size, vec![value]))?;
    }
    let reads = [(1, 0xa5), (2, 0x4321), (4, 0xfeed_f00d)];
    for (port, (size, value)) in (PORT_DEVICE + 3..).zip(reads) {
        expect(vm, &Stop::PortRead(port, size, 1))?;
        vm.give_port([value]);
    }
    expect(vm, &Stop::Done)?;
    let got: [u64; 3] = vm.words(DATA);
    if got != reads.map(|(_, value)| u64::from(value)) {
        return fails(format!("the guest read {got:x?} instead of {reads:x?}"));
    }
    Ok("1, 2 and 4 bytes, both ways".to_string())
}

fn posted_ports(bench: &mut Bench) -> Checked {
    match bench.kvm().check_extension(Cap::CoalescedPio) {
        true => Ok("KVM can keep it".to_string()),
        false => fails("KVM cannot keep it"),
    }
}

fn string_ports(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::string_ports())?;
    let (mut written, mut given, mut exits) = (Vec::new(), 0u32, 0);
    loop {
        match vm.run()? {
            Stop::PortWrite(PORT_DEVICE, 1, values) => written.extend(values),
            Stop::PortRead(port, 1, count) if port == PORT_DEVICE + 1 => {
                vm.give_port((given..).take(count));
                given += count as u32;
            }
            Stop::Done => break,
            stop => return fails(stop),
        }
        exits += 1;
    }
    let read = vm.bytes(DATA + 0x100, 8);
    if written != b"Hindsite".map(u32::from) || read != [0, 1, 2, 3, 4, 5, 6, 7] {
        return fails(format!("the guest wrote {written:x?} and read {read:x?}"));
    }
    Ok(format!("8 bytes out and 8 in, in {exits} exits"))
}

fn memory_mapped(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::memory_mapped())?;
    expect(vm, &Stop::MemoryWrite(MMIO, vec![0x5a]))?;
    let eight = 0x1122_3344_5566_7788u64.to_le_bytes().to_vec();
    expect(vm, &Stop::MemoryWrite(MMIO + 8, eight))?;
    expect(vm, &Stop::MemoryRead(MMIO + 0x10, 1))?;
    vm.give_memory(0xa5);
    expect(vm, &Stop::MemoryRead(MMIO + 0x18, 8))?;
    vm.give_memory(0x8877_6655_4433_2211);
    expect(vm, &Stop::Done)?;
    match vm.words(DATA) {
        [0xa5, 0x8877_6655_4433_2211] => Ok("1 and 8 bytes, both ways".to_string()),
        other => fails(format!("the guest loaded {other:x?}")),
    }
}

fn halt(bench: &mut Bench) -> Checked {
    expect(bench.start(&micro::halt())?, &Stop::Halt)?;
    Ok("KVM_EXIT_HLT".to_string())
}

fn shutdown(bench: &mut Bench) -> Checked {
    expect(bench.start(&micro::triple_fault())?, &Stop::Shutdown)?;
    Ok("KVM_EXIT_SHUTDOWN".to_string())
}

fn sync_regs(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::trap_port(TRAP_CPUID))?;
    expect(vm, &Stop::PortWrite(TRAP_CPUID.into(), 1, vec![0xa]))?;
    let shared = vm.shared_registers();
    let asked = vm.registers()?;
    let same = [asked.rax, asked.rbx, asked.rcx, asked.rdx] == shared.0[..4]
        && (asked.rsp, asked.rip, asked.rflags) == (shared.0[6], shared.0[16], shared.0[17]);
    if !same || shared.0[..4] != [0xa, 0xb, 0xc, 0xd] {
        return fails(format!(
            "they say {shared:x?}, KVM_GET_REGS says {asked:x?}"
        ));
    }
    Ok("KVM_SYNC_X86_REGS, equal to KVM_GET_REGS".to_string())
}

fn trap_port(bench: &mut Bench) -> Checked {
    let vm = bench.start(&micro::trap_port(TRAP_CPUID))?;
    expect(vm, &Stop::PortWrite(TRAP_CPUID.into(), 1, vec![0xa]))?;
    let answer = [0x1_0000_0001, 0x2222_2222, 0x3333_3333, 0x4444_4444_4444];
    vm.change_registers(|registers| {
        (registers.rax, registers.rbx) = (answer[0], answer[1]);
        (registers.rcx, registers.rdx) = (answer[2], answer[3]);
    });
    expect(vm, &Stop::Done)?;
    let got: [u64; 4] = vm.words(DATA);
    if got != answer {
        return fails(format!("answered {answer:x?}, but the guest has {got:x?}"));
    }
    Ok("an OUT answered through the shared page, in four registers".to_string())
}

//! A guest that debugs itself: single-steps, debug registers, and interrupts beside them.

use hindsight_kernel::rewrite::traps::TRAP_WRITE_DR;
use hindsight_tests::skip::skip;

use super::*;

/// Where the handlers of these guests write down what they saw, and where they begin to.
const LOG: u64 = DATA + 0x200;
const R9: usize = 9;
const R10: usize = 10;
const R11: usize = 11;
const RFLAGS_TF: i32 = 1 << 8;
const RFLAGS_IF: i32 = 1 << 9;

/// Records a guest in each world and replays it.
fn ran_in_each_world(guest: &Guest) -> Vec<Ran> {
    if kvm().is_none() {
        return Vec::new();
    }
    let each = SEEDS.into_iter().map(|seed| {
        let guest = guest.clone();
        let how = How {
            seed,
            detail: Detail::Full,
            memory_every: None,
        };
        in_time(move |kvm| recorded_and_replayed(kvm, &guest, how))
    });
    each.collect()
}

/// Has `vector` lead to `entry`, an address below 4 GiB, by way of RAX and RCX.
pub(super) fn set_gate(
    a: &mut CodeAssembler,
    vector: u8,
    entry: CodeLabel,
) -> Result<(), IcedError> {
    let at = IDT + 16 * u64::from(vector);
    let present_interrupt = u64::from(KERNEL_CS) << 16 | 0x8e00 << 32;
    a.lea(rax, ptr(entry))?;
    a.mov(ecx, eax)?;
    a.and(ecx, 0xffff)?;
    a.shr(rax, 16)?;
    a.shl(rax, 48)?;
    a.or(rax, rcx)?;
    a.mov(rcx, present_interrupt)?;
    a.or(rax, rcx)?;
    a.mov(rcx, at)?;
    a.mov(qword_ptr(rcx), rax)?;
    a.mov(dword_ptr(rcx + 8), 0)
}

/// Writes down where each exception of `vector` came, at R9 and on.
fn log_exceptions(a: &mut CodeAssembler, vector: u8) -> Result<(), IcedError> {
    let (mut entry, mut start) = (a.create_label(), a.create_label());
    a.jmp(start)?;
    a.set_label(&mut entry)?;
    a.push(rax)?;
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.mov(qword_ptr(r9), rax)?;
    a.add(r9, 8)?;
    a.pop(rax)?;
    a.iretq()?;
    a.set_label(&mut start)?;
    a.lidt(ptr(IDT_POINTER))?;
    a.mov(r9, LOG)?;
    set_gate(a, vector, entry)
}

/// What the guest has written down.
fn log(ran: &Ran) -> Vec<u64> {
    let end = ran.registers()[R9];
    let bytes = &ran.memory[LOG as usize..end as usize];
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

/// The address of these bytes in a guest.
fn find(guest: &Guest, bytes: &[u8]) -> u64 {
    let at = guest.code.windows(bytes.len()).position(|at| at == bytes);
    CODE + at.expect("the guest has this") as u64
}

#[test]
fn a_single_step_over_a_trap_stops_right_after_the_instruction_that_it_replaced() {
    // A NOP as a yardstick, then what was RDTSC, RDTSCP, CPUID and a read of CR4, each with a NOP after it.
    let stepped: [&[u8]; 5] = [
        &[0x90],
        &[0xe6, TRAP_RDTSC],
        &[0xe6, TRAP_RDTSCP, 0x90],
        &[0xe6, TRAP_CPUID],
        &[0xe6, TRAP_READ_CR4, 0x90],
    ];
    let mut guest = Guest::new(|a| {
        log_exceptions(a, 1)?;
        a.xor(ecx, ecx)?;
        a.xor(eax, eax)?;
        a.pushfq()?;
        a.or(qword_ptr(rsp), RFLAGS_TF)?;
        a.popfq()?;
        for bytes in stepped {
            a.db(bytes)?;
            a.nop()?;
        }
        a.pushfq()?;
        a.and(qword_ptr(rsp), !RFLAGS_TF)?;
        a.popfq()
    });
    let rdtscp = find(&guest, stepped[2]);
    guest.text.sites.insert(rdtscp, SiteKind::Rdtscp, 3);
    let read = SiteKind::ReadCr4 { target: 11 };
    guest.text.sites.insert(find(&guest, stepped[4]), read, 3);
    let mut expected = Vec::new();
    let mut at = rdtscp - 5;
    for bytes in stepped {
        expected.extend([at + bytes.len() as u64, at + bytes.len() as u64 + 1]);
        at += bytes.len() as u64 + 1;
    }
    for ran in ran_in_each_world(&guest) {
        let log = log(&ran);
        if log.first() != expected.first() {
            skip(&format!("this KVM's guests do not single-step: {log:x?}"));
            return;
        }
        assert_eq!(
            log[..expected.len()],
            expected,
            "{log:x?} in {:x?}",
            guest.code
        );
        assert_eq!(ran.registers()[R11], 1 << 5, "CR4: PAE");
    }
}

#[test]
fn debug_registers_read_back_as_they_were_written() {
    // DR3, then DR7 with breakpoint 3 enabled on writes of four bytes, and two bits that are always clear. The reads are
    // the CPU's.
    let (address, control) = (0x1234_5678u64, 0xd000_0080u64);
    let mut guest = Guest::new(|a| {
        a.mov(rbx, address)?;
        a.db(&[0xe6, TRAP_WRITE_DR, 0x90])?;
        a.mov(rsi, control | 0xd000)?;
        a.db(&[0xe6, TRAP_WRITE_DR, 0x90])?;
        a.mov(r10, dr3)?;
        a.mov(r11, dr7)
    });
    let first = find(&guest, &[0xe6, TRAP_WRITE_DR]);
    let skipped = (first - CODE) as usize + 1;
    let rest = &guest.code[skipped..];
    let second = rest.windows(2).position(|two| two == [0xe6, TRAP_WRITE_DR]);
    let second = first + 1 + second.expect("there are two") as u64;
    for (at, number, source) in [(first, 3, 3), (second, 7, 6)] {
        let kind = SiteKind::WriteDr { number, source };
        guest.text.sites.insert(at, kind, 3);
    }
    for ran in ran_in_each_world(&guest) {
        let wrote = |number, value| Exit::WriteDr { number, value };
        assert_eq!(
            ran.exits(),
            [wrote(3, address), wrote(7, control | 0xd000), Exit::Halt]
        );
        let registers = ran.registers();
        assert_eq!((registers[R10], registers[R11]), (address, control | 0x400));
    }
}

/// Waits until the timer's interrupt is pending.
fn wait_for_timer(a: &mut CodeAssembler) -> Result<(), IcedError> {
    start_timer(a, 1)?;
    out(a, 0x20, 0x0a)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.in_(al, 0x20)?;
    a.test(al, 1)?;
    a.jz(again)?;
    a.xor(ebx, ebx)
}

/// Whether a guest in this world is to be believed: some KVMs open no window.
fn has_windows(ran: &Ran) -> bool {
    if ran.tally.windows > 0 {
        return true;
    }
    let Err(why) = in_time(hindsight_vmm::doctor::check_recorder) else {
        panic!("no window opened: {:?}", ran.counts);
    };
    skip(&format!("no window opened, and {why}"));
    false
}

#[test]
fn flags_that_are_pushed_or_popped_after_sti_are_those_of_a_cpu() {
    // STI; PUSHFQ: the interrupt comes after it. STI; POPFQ of flags with IF clear: none comes until the next STI.
    let pushes = Guest::new(|a| {
        wait_for_timer(a)?;
        a.sti()?;
        a.pushfq()?;
        a.mov(r8d, ebx)?;
        a.pop(r10)
    });
    let pops = Guest::new(|a| {
        wait_for_timer(a)?;
        a.pushfq()?;
        a.sti()?;
        a.popfq()?;
        a.mov(r8d, ebx)?;
        a.nop()?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.mov(r10d, ebx)
    });
    for ran in ran_in_each_world(&pushes) {
        if !has_windows(&ran) {
            return;
        }
        let registers = ran.registers();
        assert_eq!(registers[R8], 1, "the interrupt has come");
        assert_eq!(registers[R10] & 0x300, RFLAGS_IF as u64, "IF and no TF");
        assert_eq!(registers[RSP], STACK0);
    }
    for ran in ran_in_each_world(&pops) {
        if !has_windows(&ran) {
            return;
        }
        let registers = ran.registers();
        assert_eq!((registers[R8], registers[R10]), (0, 1), "not before");
        assert_eq!(registers[RSP], STACK0);
    }
}

#[test]
fn no_instruction_after_the_byte_of_an_sti_ends_a_recording() {
    // `mov al, 0xfb`, whose last byte looks like STI, and then what KVM cannot step over. The guest comes there by IRETQ,
    // with an interrupt pending, which is what opens the window right there.
    if let Err(why) = in_time(hindsight_vmm::doctor::check_recorder) {
        skip(&why);
        return;
    }
    let int3 = [0xcc, 0x90];
    let pushf16 = [0x66, 0x9c];
    let int_0x31 = [0xcd, 0x31];
    for refused in [int3, pushf16, int_0x31] {
        let guest = Guest::new(|a| {
            log_exceptions(a, 3)?;
            let mut entry = a.create_label();
            let (mut start, mut there) = (a.create_label(), a.create_label());
            a.jmp(start)?;
            a.set_label(&mut entry)?;
            a.iretq()?;
            a.set_label(&mut start)?;
            set_gate(a, 0x31, entry)?;
            wait_for_timer(a)?;
            a.mov(rbp, rsp)?;
            a.push(i32::from(KERNEL_SS))?;
            a.push(rbp)?;
            a.pushfq()?;
            a.or(qword_ptr(rsp), RFLAGS_IF)?;
            a.push(i32::from(KERNEL_CS))?;
            a.lea(rax, ptr(there))?;
            a.push(rax)?;
            a.iretq()?;
            a.mov(al, 0xfbu32 as i32)?;
            a.set_label(&mut there)?;
            a.db(&refused)?;
            a.mov(r8d, ebx)?;
            a.mov(rsp, rbp)
        });
        let at = find(&guest, &[0xb0, 0xfb]) + 2;
        for ran in ran_in_each_world(&guest) {
            if !has_windows(&ran) {
                return;
            }
            let [(there, TIMER_VECTOR)] = ran.trace.interrupts[..] else {
                panic!("one interrupt, not {:?}", ran.trace.interrupts);
            };
            assert_eq!(there.rip, at, "{refused:x?}");
            assert_eq!(ran.registers()[R8], 1);
        }
    }
}

//! Interrupts and halts.

use super::*;

#[test]
fn the_timer_wakes_a_halted_guest_through_the_interrupt_controller() {
    let guest = Guest::new(|a| {
        start_timer(a, 200)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.hlt()?;
        a.mov(r8d, ebx)
    });
    for ran in proved(&guest) {
        let vectors: Vec<u8> = ran.trace.interrupts.iter().map(|i| i.1).collect();
        assert_eq!(vectors, [TIMER_VECTOR]);
        assert_eq!(
            ran.registers()[R8],
            1,
            "once, and before the next instruction"
        );
        assert!(ran.exits().contains(&Exit::Woken));
        assert_eq!(ran.tally.windows, 0, "a wake-up needs no window");
        let set = 200 * 1_000_000_000 / 1_193_182;
        assert!(ran.end().now >= set, "200 ticks are {set} ns");
    }
}

#[test]
fn the_local_apic_is_the_boards_and_its_deadline_wakes_a_halted_guest() {
    // As an x2APIC: KVM lets no filter near its registers, and hands them on all the same.
    let guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        a.xor(ebx, ebx)?;
        write_msr(a, 0x1b, 0xfee0_0d00)?;
        write_msr(a, 0x832, 2 << 17 | u32::from(TIMER_VECTOR))?;
        write_msr(a, 0x6e0, 3_000_000)?;
        a.sti()?;
        a.hlt()?;
        write_msr(a, 0x80b, 0)?;
        write_msr(a, 0x83f, TIMER_VECTOR.into())?;
        a.nop()?;
        a.mov(r8d, ebx)?;
        a.mov(ecx, 0x803)?;
        a.rdmsr()
    });
    for ran in proved(&guest) {
        let vectors: Vec<u8> = ran.trace.interrupts.iter().map(|i| i.1).collect();
        assert_eq!(
            vectors, [TIMER_VECTOR; 2],
            "the deadline and an IPI to itself"
        );
        assert_eq!(ran.registers()[R8], 2);
        assert_eq!(ran.registers()[RAX], 0x0005_0014, "its version");
        assert!(ran.exits().contains(&Exit::Woken) && ran.end().now >= 3_000_000);
    }
}

#[test]
fn a_guest_that_uses_cr8_goes_on() {
    let guest = Guest::new(|a| {
        a.mov(eax, 15)?;
        a.mov(cr8, rax)?;
        a.xor(eax, eax)?;
        a.mov(cr8, rax)?;
        out(a, NOBODY, 1)
    });
    for ran in proved(&guest) {
        assert_eq!(
            ran.exits(),
            [port_write(NOBODY, Width::Byte, 1), Exit::Halt]
        );
    }
}

#[test]
fn a_pending_interrupt_lands_behind_the_instruction_that_follows_sti() {
    let guest = Guest::new(|a| {
        start_timer(a, 1)?;
        out(a, 0x20, 0x0a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.in_(al, 0x20)?;
        a.test(al, 1)?;
        a.jz(again)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.mov(r8d, ebx)?;
        a.mov(r9d, ebx)
    });
    for ran in proved(&guest) {
        if ran.tally.windows == 0
            && let Err(why) = in_time(hindsight_vmm::doctor::check_recorder)
        {
            skip(&format!("no window opened, and {why}"));
            return;
        }
        let [(at, TIMER_VECTOR)] = ran.trace.interrupts[..] else {
            panic!("one interrupt, not {:?}", ran.trace.interrupts);
        };
        assert_eq!(ran.registers()[R8..=R8 + 1], [0, 1]);
        // After the two moves, of three bytes each, stand CLI and two HLT.
        let behind_r8 = CODE + guest.code.len() as u64 - 3 - 3;
        assert_eq!(at.rip, behind_r8);
        assert!(ran.tally.windows >= 1, "{:?}", ran.counts);
    }
}

#[test]
fn a_guest_that_halts_behind_sti_does_not_sleep_through_a_pending_interrupt() {
    let guest = Guest::new(|a| {
        start_timer(a, 1)?;
        out(a, 0x20, 0x0a)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.in_(al, 0x20)?;
        a.test(al, 1)?;
        a.jz(again)?;
        a.xor(ebx, ebx)?;
        a.sti()?;
        a.hlt()?;
        a.mov(r8d, ebx)
    });
    for ran in proved(&guest) {
        let [(at, TIMER_VECTOR)] = ran.trace.interrupts[..] else {
            panic!("one interrupt, not {:?}", ran.trace.interrupts);
        };
        // After HLT stand a move of three bytes, CLI and two HLT.
        assert_eq!(at.rip, CODE + guest.code.len() as u64 - 6);
        assert_eq!(ran.registers()[R8], 1);
    }
}

/// Writes a register that fits into EAX.
fn write_msr(a: &mut CodeAssembler, index: u32, value: u32) -> Result<(), IcedError> {
    a.mov(ecx, index)?;
    a.mov(eax, value)?;
    a.xor(edx, edx)?;
    a.wrmsr()
}

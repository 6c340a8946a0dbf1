//! What the guest prints and what is typed, and how it ends.

use super::*;

#[test]
fn a_guest_can_turn_the_machine_off() {
    let guest = Guest::new(|a| {
        a.mov(edx, 0x605)?;
        out_dx(a, 0x34)
    });
    for ran in proved(&guest) {
        assert_eq!(ran.end().ending, Ending::PowerOff);
    }
}

#[test]
fn a_triple_fault_ends_the_run() {
    let guest = Guest::new(|a| {
        a.lidt(ptr(NO_IDT_POINTER))?;
        a.ud2()
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Shutdown]);
        assert_eq!(ran.end().ending, Ending::TripleFault);
    }
}

#[test]
fn the_keyboard_controller_resets_the_machine() {
    let guest = Guest::new(|a| out(a, 0x64, 0xfe));
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [port_write(0x64, Width::Byte, 0xfe)]);
        assert_eq!(ran.end().ending, Ending::Reset(Reset::Keyboard));
    }
}

#[test]
fn what_the_guest_prints_is_seen() {
    let guest = Guest::new(|a| {
        a.mov(edx, 0x3f8)?;
        for byte in b"ok" {
            a.mov(al, u32::from(*byte))?;
            a.out(dx, al)?;
        }
        Ok(())
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Halt]);
        assert_eq!(ran.trace.output, [(1, b"ok".to_vec())]);
    }
}

#[test]
fn what_the_guest_prints_waits_for_the_next_exit_as_far_as_there_is_room() {
    let mut guest = Guest::new(|a| {
        // Another port, and a wider write: neither waits.
        a.mov(edx, 0x3ff)?;
        out_dx(a, 7)?;
        a.cld()?;
        a.mov(edx, 0x3f8)?;
        a.mov(ebx, 210)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 10)?;
        a.rep().outsb()?;
        a.dec(ebx)?;
        a.jnz(again)?;
        a.mov(eax, 0x4241)?;
        a.out(dx, ax)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)
    });
    guest.data = b"0123456789";
    let byte = |at: usize| guest.data[at % guest.data.len()];
    for ran in proved(&guest) {
        let full = |count| {
            port_write(
                0x3f8,
                Width::Byte,
                byte(count * (POSTED_MAX + 1) - 1).into(),
            )
        };
        let expected = [
            port_write(0x3ff, Width::Byte, 7),
            full(1),
            full(2),
            port_write(0x3f8, Width::Word, 0x4241),
            port_read(0x3fd, Width::Byte),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let output: Vec<u8> = ran.trace.output.iter().flat_map(|o| o.1.clone()).collect();
        let printed: Vec<u8> = (0..2100).map(byte).collect();
        assert!(output.starts_with(&printed), "{output:?}");
        assert_eq!(ran.trace.output.len(), 3, "each exit shows what waited");
    }
}

#[test]
fn what_is_typed_comes_back_as_an_echo() {
    // RTS up, then ninety looks at the line status (16550D data sheet, 8.4).
    let guest = Guest::new(|a| {
        a.mov(edx, 0x3fc)?;
        out_dx(a, 2)?;
        a.mov(ecx, 90)?;
        let (mut again, mut nothing) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(edx, 0x3fd)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(nothing)?;
        a.mov(edx, 0x3f8)?;
        a.in_(al, dx)?;
        a.out(dx, al)?;
        a.set_label(&mut nothing)?;
        a.dec(ecx)?;
        a.jnz(again)
    });
    let runs = proved(&guest);
    let mut echoed = 0;
    for ran in &runs {
        let inputs = records_of(&ran.journal).into_iter();
        let typed: Vec<u8> = inputs
            .filter_map(|record| match record.event {
                Event::Input(Input::Console(bytes)) => Some(bytes),
                _ => None,
            })
            .flatten()
            .collect();
        let output: Vec<u8> = ran.trace.output.iter().flat_map(|o| o.1.clone()).collect();
        assert!(typed.starts_with(&output), "{typed:?} came as {output:?}");
        echoed += output.len();
    }
    assert!(echoed > 0 || runs.is_empty(), "somebody types something");
}

/// `out %al, %dx`.
fn out_dx(a: &mut CodeAssembler, value: u32) -> Result<(), IcedError> {
    a.mov(al, value)?;
    a.out(dx, al)
}

//! Ports, memory without RAM, and MSRs.

use super::*;

#[test]
fn a_port_takes_and_gives_one_two_and_four_bytes() {
    let guest = Guest::new(|a| {
        a.mov(eax, 0xdead_beefu32)?;
        a.out(NOBODY, al)?;
        a.out(NOBODY, ax)?;
        a.out(NOBODY, eax)?;
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.in_(al, 0x92)?;
        a.mov(rbx, rax)?;
        a.in_(ax, 0x91)?;
        a.mov(rcx, rax)?;
        a.in_(eax, 0x90)
    });
    for ran in proved(&guest) {
        let expected = [
            port_write(NOBODY, Width::Byte, 0xef),
            port_write(NOBODY, Width::Word, 0xbeef),
            port_write(NOBODY, Width::Dword, 0xdead_beef),
            port_read(0x92, Width::Byte),
            port_read(0x91, Width::Word),
            port_read(0x90, Width::Dword),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        // Port 0x92 says that A20 is open; its neighbours float.
        let registers = ran.registers();
        assert_eq!(registers[RBX], 0x1111_2222_3333_4402);
        assert_eq!(registers[RCX], 0x1111_2222_3333_02ff);
        assert_eq!(registers[RAX], 0xff02_ffff, "a 32-bit read clears the rest");
        assert_eq!(ran.end().ending, Ending::Halted);
    }
}

#[test]
fn each_byte_of_a_string_instruction_is_an_exit_of_its_own() {
    let mut guest = Guest::new(|a| {
        a.cld()?;
        a.mov(rsi, DATA)?;
        a.mov(ecx, 5)?;
        a.mov(edx, NOBODY)?;
        a.rep().outsb()?;
        a.mov(rdi, DATA + 0x10)?;
        a.mov(ecx, 4)?;
        a.mov(edx, 0x92)?;
        a.rep().insb()
    });
    guest.data = b"hello";
    for ran in proved(&guest) {
        let written = b"hello".map(|byte| port_write(NOBODY, Width::Byte, byte.into()));
        let read = [port_read(0x92, Width::Byte); 4];
        let expected = [&written[..], &read, &[Exit::Halt]].concat();
        assert_eq!(ran.exits(), expected);
        assert_eq!(ran.words(DATA + 0x10), [0x0202_0202]);
        assert_eq!(ran.registers()[RCX], 0);
        assert_eq!(ran.registers()[RSI], DATA + 5);
    }
}

#[test]
fn memory_without_ram_takes_stores_and_floats_in_every_width() {
    let guest = Guest::new(|a| {
        a.mov(rdi, MMIO)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(word_ptr(rdi + 2), ax)?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(al, byte_ptr(rdi))?;
        a.mov(rbx, rax)?;
        a.mov(ax, word_ptr(rdi + 2))?;
        a.mov(rcx, rax)?;
        a.mov(eax, dword_ptr(rdi + 4))?;
        a.mov(rdx, qword_ptr(rdi + 8))
    });
    let store = |gpa, width, value| Exit::Access(Access::MemoryWrite { gpa, width, value });
    let load = |gpa, width| Exit::Access(Access::MemoryRead { gpa, width });
    for ran in proved(&guest) {
        let expected = [
            store(MMIO, Width::Byte, 0x88),
            store(MMIO + 2, Width::Word, 0x7788),
            store(MMIO + 4, Width::Dword, 0x5566_7788),
            store(MMIO + 8, Width::Qword, 0x1122_3344_5566_7788),
            load(MMIO, Width::Byte),
            load(MMIO + 2, Width::Word),
            load(MMIO + 4, Width::Dword),
            load(MMIO + 8, Width::Qword),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let registers = ran.registers();
        assert_eq!(registers[RBX], 0x1122_3344_5566_77ff);
        assert_eq!(registers[RCX], 0x1122_3344_5566_ffff);
        assert_eq!(registers[RAX], 0xffff_ffff);
        assert_eq!(registers[RDX], u64::MAX);
    }
}

#[test]
fn an_instruction_that_reads_and_writes_without_ram_is_an_exit_for_each() {
    let guest = Guest::new(|a| {
        a.mov(rdi, MMIO)?;
        a.mov(eax, 3)?;
        a.add(dword_ptr(rdi), eax)?;
        a.cld()?;
        a.mov(rsi, MMIO + 0x20)?;
        a.mov(rdi, MMIO + 0x10)?;
        a.mov(ecx, 2)?;
        a.rep().movsd()
    });
    let store = |gpa, value| {
        let width = Width::Dword;
        Exit::Access(Access::MemoryWrite { gpa, width, value })
    };
    let load = |gpa| {
        let width = Width::Dword;
        Exit::Access(Access::MemoryRead { gpa, width })
    };
    for ran in proved(&guest) {
        let ones = 0xffff_ffff;
        let expected = [
            load(MMIO),
            store(MMIO, 2),
            load(MMIO + 0x20),
            store(MMIO + 0x10, ones),
            load(MMIO + 0x24),
            store(MMIO + 0x14, ones),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
    }
}

#[test]
fn an_access_across_a_page_edge_arrives_whole() {
    let edge = MMIO + 0x1000;
    let guest = Guest::new(|a| {
        a.mov(rdi, edge - 3)?;
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(qword_ptr(rdi), rax)?;
        a.mov(rbx, qword_ptr(rdi))
    });
    for ran in proved(&guest) {
        let (mut stored, mut loaded) = (Vec::<u8>::new(), 0);
        for exit in ran.exits() {
            match exit {
                Exit::Access(Access::MemoryWrite { gpa, width, value }) => {
                    assert_eq!(gpa, edge - 3 + stored.len() as u64);
                    stored.extend(&value.to_le_bytes()[..width.bytes()]);
                }
                Exit::Access(Access::MemoryRead { gpa, width }) => {
                    assert_eq!(gpa, edge - 3 + loaded);
                    loaded += width.bytes() as u64;
                }
                exit => assert_eq!(exit, Exit::Halt),
            }
        }
        assert_eq!(stored, 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!((loaded, ran.registers()[RBX]), (8, u64::MAX));
    }
}

#[test]
fn the_board_answers_for_the_time_stamp_counter_and_its_neighbour() {
    let guest = Guest::new(|a| {
        a.mov(ecx, 0xc000_0103u32)?;
        a.mov(eax, 0x1234)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(rax, -1i64)?;
        a.mov(rdx, -1i64)?;
        a.rdmsr()?;
        a.mov(r8, rax)?;
        a.mov(ecx, 0x10)?;
        a.rdmsr()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)
    });
    for ran in proved(&guest) {
        let aux = 0xc000_0103;
        let expected = [
            Exit::Access(Access::MsrWrite {
                index: aux,
                value: 0x1234,
            }),
            Exit::Access(Access::MsrRead { index: aux }),
            Exit::Access(Access::MsrRead { index: 0x10 }),
            Exit::Halt,
        ];
        assert_eq!(ran.exits(), expected);
        let registers = ran.registers();
        assert_eq!(registers[R8], 0x1234);
        assert_eq!(
            registers[RAX], ran.trace.turns[2].now,
            "one tick per nanosecond"
        );
    }
}

#[test]
fn a_register_that_the_board_refuses_is_a_protection_fault() {
    let guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        a.mov(ecx, 0x198)?;
        a.rdmsr()
    });
    for ran in proved(&guest) {
        let fault = port_write(
            PORT_FAULT.into(),
            Width::Byte,
            ran.registers()[RAX] as u32 & 0xff,
        );
        let read = Exit::Access(Access::MsrRead { index: 0x198 });
        assert_eq!(ran.exits(), [read, fault, Exit::Halt]);
        assert_eq!(ran.answers()[0], Answer::Fault);
        // The default entry leaves vector, error code and RIP on the stack.
        let stack = ran.trace.turns[1].registers.0[RSP];
        let rdmsr = CODE + guest.code.len() as u64 - 5;
        assert_eq!(ran.words(stack), [13, 0, rdmsr, KERNEL_CS.into()]);
    }
}

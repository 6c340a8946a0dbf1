//! The instructions that are traps, and what they do for the guest.

use super::*;

#[test]
fn time_reads_through_trap_ports_land_in_the_right_registers() {
    let guest = Guest::new(|a| {
        a.mov(ecx, 0xc000_0103u32)?;
        a.mov(eax, 0x77)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        for trap in [TRAP_RDTSC, TRAP_RDTSCP] {
            a.mov(rax, -1i64)?;
            a.mov(rcx, -1i64)?;
            a.mov(rdx, -1i64)?;
            a.out(u32::from(trap), al)?;
            a.out(NOBODY, al)?;
        }
        Ok(())
    });
    let read = |instruction| Exit::TimeRead {
        instruction,
        mode: Mode::Kernel,
    };
    for ran in proved(&guest) {
        let turns = &ran.trace.turns;
        assert_eq!(turns.len(), 6);
        assert_eq!(turns[1].exit, read(TimeInstruction::Rdtsc));
        assert_eq!(turns[3].exit, read(TimeInstruction::Rdtscp));
        for (at, counter, aux) in [(1, u64::MAX, 0), (3, 0x77, 0x77)] {
            let tsc = turns[at].now;
            assert_eq!(turns[at].answer, Answer::Time { tsc, aux });
            let after = turns[at + 1].registers.0;
            assert_eq!(after[RAX], tsc & 0xffff_ffff);
            assert_eq!((after[RCX], after[RDX]), (counter, tsc >> 32));
        }
    }
}

#[test]
fn cpuid_through_its_trap_port_answers_from_the_table() {
    let guest = Guest::new(|a| {
        a.mov(rax, 0xffff_ffff_8000_0002u64)?;
        a.mov(rcx, -1i64)?;
        a.out(u32::from(TRAP_CPUID), al)?;
        a.out(NOBODY, eax)?;
        a.mov(eax, 0x4000_0000)?;
        a.out(u32::from(TRAP_CPUID), al)
    });
    for ran in proved(&guest) {
        let [first, _, second, halt] = ran.trace.turns[..] else {
            panic!("four exits, not {:?}", ran.exits());
        };
        let table = in_time(|kvm| hindsight_vmm::kvm::cpuid::for_host(kvm).expect("a table"));
        let answer = table.answer(0x8000_0002, 0xffff_ffff);
        let cpuid = |leaf| Exit::Cpuid {
            leaf,
            subleaf: first.registers.rcx() as u32,
        };
        assert_eq!(first.exit, cpuid(0x8000_0002));
        assert_eq!(first.answer, Answer::Cpuid(answer));
        let after = ran.trace.turns[1].registers.0;
        let order = [RAX, RBX, RCX, RDX].map(|at| after[at]);
        assert_eq!(order, answer.map(u64::from));
        // Nobody tells this guest of the hypervisor.
        assert_eq!(second.answer, Answer::Cpuid([0; 4]));
        assert_eq!(halt.registers.0[..4], [0; 4]);
    }
}

#[test]
fn a_pause_through_its_trap_port_changes_no_register() {
    let guest = Guest::new(|a| {
        a.mov(rax, -1i64)?;
        a.out(u32::from(TRAP_PAUSE), al)
    });
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Pause, Exit::Halt]);
        let [pause, halt] = [0, 1].map(|at| ran.trace.turns[at].registers.0);
        assert_eq!(pause[..16], halt[..16]);
    }
}

#[test]
fn control_register_4_reads_back_as_it_was_written() {
    // PAE, which it had, and OSFXSR. The time-stamp bit that the machine keeps set stays hidden.
    let value = 1 << 5 | 1 << 9;
    let mut guest = Guest::new(|a| {
        a.mov(ebx, value as u32)?;
        a.out(u32::from(TRAP_WRITE_CR4), al)?;
        a.mov(rsi, -1i64)?;
        a.out(u32::from(TRAP_READ_CR4), al)
    });
    // By the registers' numbers in instructions: RBX is 3, RSI 6.
    let sites = [
        (TRAP_WRITE_CR4, SiteKind::WriteCr4 { source: 3 }),
        (TRAP_READ_CR4, SiteKind::ReadCr4 { target: 6 }),
    ];
    for (trap, kind) in sites {
        let at = guest.code.windows(2).position(|two| two == [0xe6, trap]);
        let at = CODE + at.expect("the guest has this trap") as u64;
        guest.text.sites.insert(at, kind, 3);
    }
    for ran in proved(&guest) {
        assert_eq!(
            ran.exits(),
            [Exit::WriteCr4 { value }, Exit::ReadCr4, Exit::Halt]
        );
        assert_eq!(ran.registers()[RSI], value);
    }
}

#[test]
fn a_refused_write_of_control_register_4_faults_where_it_stands() {
    let mut guest = Guest::new(|a| {
        a.lidt(ptr(IDT_POINTER))?;
        // A bit that no CPU has.
        a.mov(rbx, 1u64 << 63)?;
        a.db(&[0xe6, TRAP_WRITE_CR4, 0x90])
    });
    let trap = [0xe6, TRAP_WRITE_CR4, 0x90];
    let at = guest.code.windows(3).position(|three| three == trap);
    let at = CODE + at.expect("the guest has this trap") as u64;
    let kind = SiteKind::WriteCr4 { source: 3 };
    guest.text.sites.insert(at, kind, 3);
    for ran in proved(&guest) {
        let write = Exit::WriteCr4 { value: 1 << 63 };
        let fault = port_write(PORT_FAULT.into(), Width::Byte, 0);
        assert_eq!(ran.exits(), [write, fault, Exit::Halt]);
        let [vector, error, rip, code] = ran.words(ran.registers()[RSP]);
        assert_eq!([vector, error, code], [13, 0, KERNEL_CS.into()]);
        assert_eq!(rip, at, "what the fault pushed");
    }
}

#[test]
fn a_kernel_that_says_that_it_panics_is_seen_and_its_call_is_made() {
    let mut guest = Guest::new(|a| {
        let (mut start, mut print) = (a.create_label(), a.create_label());
        a.jmp(start)?;
        a.set_label(&mut print)?;
        a.mov(r8, qword_ptr(rsp))?;
        a.ret()?;
        a.set_label(&mut start)?;
        a.mov(rsi, DATA)?;
        a.db(&[0xe6, TRAP_PANIC, 0x90, 0x90, 0x90])
    });
    guest.data = b"the toaster is on fire\nand more\0";
    let find = |bytes: &[u8]| {
        let at = guest.code.windows(bytes.len()).position(|at| at == bytes);
        CODE + at.expect("the guest has this") as u64
    };
    let (call, target) = (find(&[0xe6, TRAP_PANIC]), find(&[0x4c, 0x8b, 0x04, 0x24]));
    guest.text.sites.insert(call, SiteKind::Panic { target }, 5);
    for ran in proved(&guest) {
        assert_eq!(ran.exits(), [Exit::Panic { message: DATA }, Exit::Halt]);
        assert_eq!(ran.registers()[R8], call + 5, "what the call pushed");
        let panic = ran.end().panic.as_deref();
        assert_eq!(panic, Some("the toaster is on fire"));
    }
}

/// A guest that "loads a module" of two functions, one across the edge of two pages, by a call or a jump that the loader
/// has rewritten; `target` of it begins with the load of R8.
fn module_guest(returns: bool) -> (Guest, u64) {
    let mut guest = Guest::new(|a| {
        let mut start = a.create_label();
        let mut after = a.create_label();
        a.jmp(start)?;
        a.mov(r8, qword_ptr(rsp))?;
        for function in MODULE_TEXTS {
            a.mov(rbx, function)?;
            a.call(rbx)?;
        }
        if returns {
            a.ret()?;
        } else {
            a.jmp(after)?;
        }
        a.set_label(&mut start)?;
        a.mov(rdi, MODULE)?;
        for (place, (at, code)) in MODULE_TEXTS.into_iter().zip(MODULE_CODE).enumerate() {
            a.mov(rax, u64::from_le_bytes(code.0))?;
            a.mov(rbx, at)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(qword_ptr(rdi + 16 * place), rbx)?;
            a.mov(dword_ptr(rdi + 16 * place + 8), code.1)?;
        }
        a.db(&[0xe6, TRAP_MODULE, 0x90, 0x90, 0x90])?;
        a.set_label(&mut after)?;
        a.nop()
    });
    let find = |bytes: &[u8]| {
        let at = guest.code.windows(bytes.len()).position(|at| at == bytes);
        CODE + at.expect("the guest has this") as u64
    };
    let (call, target) = (find(&[0xe6, TRAP_MODULE]), find(&[0x4c, 0x8b, 0x04, 0x24]));
    let kind = SiteKind::Module { target, returns };
    guest.text.sites.insert(call, kind, 5);
    let place = |base| TextPlace {
        base,
        bytes: base + 8,
    };
    guest.text.modules = Some(ModuleLayout {
        texts: [place(0), place(16)],
        symbols: None,
    });
    (guest, call)
}

/// Where the guest's kernel keeps its `struct module`.
const MODULE: u64 = 0x6_0000;

const MODULE_TEXTS: [u64; 2] = [0x5_0fff, 0x5_2000];

/// RDTSC and RDTSCP, each with a RET, and their lengths in bytes.
const MODULE_CODE: [([u8; 8], u32); 2] = [
    ([0x0f, 0x31, 0xc3, 0, 0, 0, 0, 0], 3),
    ([0x0f, 0x01, 0xf9, 0xc3, 0, 0, 0, 0], 4),
];

#[test]
fn a_module_is_rewritten_at_the_call_that_makes_it_executable_and_the_call_is_made() {
    for returns in [true, false] {
        let (guest, call) = module_guest(returns);
        for ran in proved(&guest) {
            let read = |instruction| Exit::TimeRead {
                instruction,
                mode: Mode::Kernel,
            };
            let loaded = Exit::Module {
                module: MODULE,
                sites: 2,
            };
            let [rdtsc, rdtscp] = [TimeInstruction::Rdtsc, TimeInstruction::Rdtscp].map(read);
            assert_eq!(ran.exits(), [loaded, rdtsc, rdtscp, Exit::Halt]);
            assert_eq!(ran.tally.module_sites, 2);
            assert_eq!(ran.registers()[RSP], STACK0);
            let text = |at: u64, bytes: usize| &ran.memory[at as usize..][..bytes];
            assert_eq!(text(MODULE_TEXTS[0], 3), [0xe6, TRAP_RDTSC, 0xc3]);
            assert_eq!(text(MODULE_TEXTS[1], 4), [0xe6, TRAP_RDTSCP, 0x90, 0xc3]);
            if returns {
                assert_eq!(ran.registers()[R8], call + 5, "what the call pushed");
            }
        }
    }
}

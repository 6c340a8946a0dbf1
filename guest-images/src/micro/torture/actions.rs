//! What the torture does in one turn. Each action may use the free registers, decides by RBX (the
//! generator), and leaves RSP and DF as they were.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, al, byte_ptr, cl, cs, dl, dword_ptr, eax, ebp, ebx, ecx, edi, edx, esi, ptr,
    qword_ptr, r8, r8d, r9, r9d, r10, r10b, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp, ss,
};

use super::{
    ACTIONS, BUFFER, INT_LOOP, INT_OUT, INT_UNMAP, LOCKED, LOCKED_PAIR, Labels, OTHER_BUFFER,
    PAGE_TABLE, PAGES, bind, here,
};
use crate::Ring;
use crate::micro_guest::Draft;

type Written = Result<(), IcedError>;
type Action = fn(&mut Draft, Ring, Labels) -> Written;

/// How often each is in the table says how often its turn comes.
const LIST: &[(usize, Action)] = &[
    (1, arithmetic),
    (1, bit_tests),
    (3, branches),
    (1, loops),
    (2, copy),
    (1, store_over_pages),
    (2, copy_over_pages),
    (2, search),
    (2, calls),
    (2, flags),
    (1, software_interrupt),
    (1, breakpoint),
    (1, invalid),
    (1, divide_by_zero),
    (2, touch),
    (1, unmap),
    (2, return_from_ring),
    (1, stack_segment),
    (1, windows),
    (1, self_modifying),
    (2, locked),
    (1, port),
];

/// Writes all actions for `ring`, without INT where `int` is false; returns where they begin, one
/// for each place of the table.
pub(super) fn write(
    g: &mut Draft,
    ring: Ring,
    int: bool,
    labels: Labels,
) -> Result<Vec<CodeLabel>, IcedError> {
    let mut table = Vec::new();
    for (times, action) in LIST {
        let begin = here(g)?;
        let by_int = [software_interrupt as Action, breakpoint].iter();
        if int
            || !by_int
                .into_iter()
                .any(|other| std::ptr::fn_addr_eq(*other, *action))
        {
            action(g, ring, labels)?;
        }
        g.a.jmp(labels.next)?;
        table.extend(std::iter::repeat_n(begin, *times));
    }
    assert_eq!(table.len(), ACTIONS, "the table has {ACTIONS} places");
    Ok(table)
}

/// `register = RBX >> shift & mask`, for ECX.
fn draw_ecx(g: &mut Draft, shift: u32, mask: u32) -> Written {
    g.a.mov(rcx, rbx)?;
    g.a.shr(rcx, shift)?;
    g.a.and(ecx, mask)
}

/// RDI = an address `offset` bytes into one of 32 pages.
fn draw_page(g: &mut Draft, shift: u32, offset: u32) -> Written {
    g.a.mov(rdi, rbx)?;
    g.a.shr(rdi, shift)?;
    g.a.and(edi, 31u32)?;
    g.a.shl(edi, 12u32)?;
    g.a.add(edi, PAGES as u32 + offset)
}

fn arithmetic(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(rax, rbx)?;
    g.a.mul(rbp)?;
    g.a.add(r8, rax)?;
    g.a.adc(r9, rdx)?;
    g.a.mov(ecx, ebx)?;
    g.a.rol(rbp, cl)?;
    g.a.bswap(rbp)?;
    g.a.or(rax, 1i32)?;
    g.a.bsf(rdx, rax)?;
    g.a.bsr(rsi, rax)?;
    g.a.cmp(r8, r9)?;
    g.a.cmovb(r8, rbx)?;
    g.a.setl(r10b)?;
    g.a.sbb(rbp, r8)?;
    g.a.xchg(r8, r9)?;
    g.a.mov(ecx, 1000u32)?;
    g.a.mov(eax, ebx)?;
    g.a.mov(edx, 0u32)?;
    g.a.div(ecx)?;
    g.a.imul_3(edx, edx, 77i32)?;
    g.a.movsx(rsi, dl)?;
    g.a.neg(rsi)?;
    g.a.not(rax)?;
    g.a.lea(rdi, ptr(rax + rdx * 4 + 5))
}

/// A loop of up to 1,024 turns, whose branches go one way and the other.
fn branches(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut even, mut small) = (g.a.create_label(), g.a.create_label());
    draw_ecx(g, 40, 0x3ff)?;
    g.a.inc(ecx)?;
    g.a.mov(eax, ebx)?;
    let again = here(g)?;
    g.a.imul_3(eax, eax, 0x19660di32)?;
    g.a.add(eax, 0x3c6ef35fu32)?;
    g.a.test(eax, 0x10000u32)?;
    g.a.jz(even)?;
    g.a.add(edx, ecx)?;
    bind(g, &mut even)?;
    g.a.cmp(eax, 0x2000_0000i32)?;
    g.a.jl(small)?;
    g.a.xor(edx, eax)?;
    bind(g, &mut small)?;
    g.a.dec(ecx)?;
    g.a.jnz(again)
}

/// BT before each branch: an interrupt that lands after it finds in RFLAGS what BT leaves undefined,
/// which must not depend on where the guest was stopped before.
fn bit_tests(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut clear, mut set) = (g.a.create_label(), g.a.create_label());
    draw_ecx(g, 39, 0xff)?;
    g.a.inc(ecx)?;
    g.a.mov(eax, ebx)?;
    let again = here(g)?;
    g.a.add(eax, 0x3c6e_f35fu32)?;
    g.a.bt(eax, ecx)?;
    g.a.jnc(clear)?;
    g.a.mov(edx, eax)?;
    bind(g, &mut clear)?;
    g.a.bt(eax, 7u32)?;
    g.a.jc(set)?;
    g.a.mov(esi, eax)?;
    bind(g, &mut set)?;
    g.a.dec(ecx)?;
    g.a.jnz(again)
}

/// LOOP, LOOPNE and JRCXZ.
fn loops(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut none, mut skip) = (g.a.create_label(), g.a.create_label());
    draw_ecx(g, 44, 0x7f)?;
    g.a.jrcxz(none)?;
    let again = here(g)?;
    g.a.test(cl, 3i32)?;
    g.a.jnz(skip)?;
    g.a.add(r8, rcx)?;
    bind(g, &mut skip)?;
    g.a.loop_(again)?;
    bind(g, &mut none)?;
    g.a.mov(ecx, 20u32)?;
    let until = here(g)?;
    g.a.inc(r9d)?;
    g.a.test(r9d, 15u32)?;
    g.a.loopne(until)
}

/// REP MOVSB of 0 to 511 bytes, forwards or backwards, and REP STOSQ.
fn copy(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut backwards, mut done) = (g.a.create_label(), g.a.create_label());
    draw_ecx(g, 35, 0x1ff)?;
    g.a.test(ebx, 0x4_0000u32)?;
    g.a.jnz(backwards)?;
    g.a.mov(rsi, BUFFER + 3)?;
    g.a.mov(rdi, OTHER_BUFFER)?;
    g.a.rep().movsb()?;
    g.a.mov(ecx, 40u32)?;
    g.a.mov(rax, rbx)?;
    g.a.mov(rdi, OTHER_BUFFER + 0x200)?;
    g.a.rep().stosq()?;
    g.a.jmp(done)?;
    bind(g, &mut backwards)?;
    g.a.std()?;
    g.a.mov(rsi, OTHER_BUFFER + 0x3ff)?;
    g.a.mov(rdi, BUFFER + 0x3ff)?;
    g.a.rep().movsb()?;
    g.a.cld()?;
    bind(g, &mut done)
}

/// REP STOSQ that begins at the end of one page, which may be missing, and ends on the next.
fn store_over_pages(g: &mut Draft, _: Ring, _: Labels) -> Written {
    draw_page(g, 36, 0xf00)?;
    draw_ecx(g, 45, 0x7f)?;
    g.a.add(ecx, 40u32)?;
    g.a.mov(rax, rbx)?;
    g.a.rep().stosq()
}

/// REP MOVSQ from one page to another, over the ends of both.
fn copy_over_pages(g: &mut Draft, _: Ring, _: Labels) -> Written {
    draw_page(g, 36, 0xf80)?;
    g.a.mov(rsi, rdi)?;
    draw_page(g, 41, 0xfc8)?;
    g.a.mov(ecx, 60u32)?;
    g.a.rep().movsq()?;
    g.a.add(rbp, qword_ptr(rdi - 8))
}

/// REPNE SCASB and REPE CMPSB, which end where they find something.
fn search(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(rdi, BUFFER)?;
    draw_ecx(g, 37, 0x1ff)?;
    g.a.add(rdi, rcx)?;
    g.a.mov(ecx, 500u32)?;
    g.a.mov(al, u32::from(b'c'))?;
    g.a.repne().scasb()?;
    g.a.mov(r8, rcx)?;
    g.a.mov(rsi, BUFFER)?;
    g.a.mov(rdi, BUFFER + 48)?;
    draw_ecx(g, 46, 0x1ff)?;
    g.a.repe().cmpsb()
}

/// CALL and RET up to sixteen deep, direct and not, with a conditional way out.
fn calls(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut function, mut bottom) = (g.a.create_label(), g.a.create_label());
    let mut done = g.a.create_label();
    draw_ecx(g, 42, 15)?;
    g.a.call(function)?;
    g.address(rax, function)?;
    g.a.mov(ecx, 3u32)?;
    g.a.call(rax)?;
    g.a.push(rax)?;
    g.a.mov(ecx, 2u32)?;
    g.a.call(qword_ptr(rsp))?;
    g.a.pop(rax)?;
    g.address(rdx, done)?;
    g.a.jmp(rdx)?;
    bind(g, &mut function)?;
    g.a.test(ecx, ecx)?;
    g.a.jz(bottom)?;
    g.a.push(rcx)?;
    g.a.dec(ecx)?;
    g.a.call(function)?;
    g.a.pop(rcx)?;
    g.a.add(rbp, rcx)?;
    bind(g, &mut bottom)?;
    g.a.ret()?;
    bind(g, &mut done)
}

/// POPF with any of the arithmetic flags and DF, and in ring 0 with interrupts off; every condition;
/// PUSHF.
fn flags(g: &mut Draft, ring: Ring, _: Labels) -> Written {
    g.a.mov(rax, rbx)?;
    g.a.shr(rax, 38u32)?;
    // CF, PF, AF, ZF, SF, DF, OF.
    g.a.and(eax, 0xcd5u32)?;
    if ring == Ring::User {
        g.a.or(eax, 0x200u32)?;
    }
    g.a.push(rax)?;
    g.a.popfq()?;
    g.a.pushfq()?;
    for condition in 0..16u8 {
        // Jcc over an INC of R8D (41 ff c0), short; INC leaves CF alone and changes the rest.
        g.a.db(&[0x70 | condition, 3])?;
        g.a.inc(r8d)?;
    }
    g.a.pushfq()?;
    g.a.pop(rdx)?;
    g.a.pop(rcx)?;
    g.a.cld()?;
    if ring == Ring::Kernel {
        // By POPF, which has no shadow.
        g.a.push(0x202i32)?;
        g.a.popfq()?;
    }
    Ok(())
}

fn software_interrupt(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(ecx, ebx)?;
    g.a.int(i32::from(INT_LOOP))?;
    g.a.add(ebp, edx)
}

fn breakpoint(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.inc(ebp)?;
    g.a.int3()?;
    g.a.add(ebp, 2u32)
}

fn invalid(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(ecx, 7u32)?;
    g.a.ud2()?;
    g.a.inc(ecx)
}

fn divide_by_zero(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(ecx, 0u32)?;
    g.a.mov(eax, ebx)?;
    g.a.mov(edx, 1u32)?;
    g.a.div(ecx)?;
    g.a.add(ecx, 5u32)
}

/// Loads and stores in pages that may be missing, one of them across the end of a page.
fn touch(g: &mut Draft, _: Ring, _: Labels) -> Written {
    draw_page(g, 36, 0x10)?;
    g.a.mov(rdx, qword_ptr(rdi))?;
    g.a.add(qword_ptr(rdi + 8), rbx)?;
    draw_page(g, 43, 0xffc)?;
    g.a.xor(qword_ptr(rdi), rdx)?;
    g.a.push(qword_ptr(rdi + 4))?;
    g.a.pop(rsi)
}

/// Takes all pages away, or in ring 0 just one now and then.
fn unmap(g: &mut Draft, ring: Ring, labels: Labels) -> Written {
    if ring == Ring::User {
        return g.a.int(i32::from(INT_UNMAP));
    }
    let (mut all, mut done) = (g.a.create_label(), g.a.create_label());
    g.a.test(ebx, 0x8_0000u32)?;
    g.a.jz(all)?;
    draw_page(g, 36, 0)?;
    draw_ecx(g, 36, 31)?;
    g.a.mov(qword_ptr(rcx * 8 + PAGE_TABLE), 0i32)?;
    g.a.invlpg(byte_ptr(rdi))?;
    g.a.jmp(done)?;
    bind(g, &mut all)?;
    g.a.call(labels.unmap)?;
    bind(g, &mut done)
}

/// IRETQ to ring 0 itself; SYSCALL and SYSRET.
fn return_from_ring(g: &mut Draft, ring: Ring, _: Labels) -> Written {
    if ring == Ring::User {
        g.a.mov(eax, 0u32)?;
        // R11 will hold the flags: none of them undefined.
        g.a.cmp(eax, eax)?;
        g.a.syscall()?;
        return g.a.add(rbp, rdx);
    }
    let mut target = g.a.create_label();
    g.a.mov(rdx, rsp)?;
    g.a.mov(eax, ss)?;
    g.a.push(rax)?;
    g.a.push(rdx)?;
    g.a.cmp(rdx, rbx)?;
    g.a.pushfq()?;
    g.a.mov(eax, cs)?;
    g.a.push(rax)?;
    g.address(rcx, target)?;
    g.a.push(rcx)?;
    g.a.iretq()?;
    bind(g, &mut target)?;
    g.a.cmova(r8, rdx)
}

/// MOV SS, which holds interrupts back over the next instruction, as a switch of stacks does it.
fn stack_segment(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(rdx, rsp)?;
    g.a.lea(rcx, ptr(rsp - 256))?;
    for stack in [rcx, rdx] {
        g.a.mov(eax, ss)?;
        g.a.mov(ss, eax)?;
        g.a.mov(rsp, stack)?;
        g.a.push(rbx)?;
        g.a.pop(r9)?;
    }
    Ok(())
}

/// STI's shadow: windows of one instruction and of none, between stretches without. In ring 3 plain
/// instructions.
fn windows(g: &mut Draft, ring: Ring, labels: Labels) -> Written {
    if ring == Ring::User {
        return arithmetic(g, ring, labels);
    }
    g.a.mov(ecx, 6u32)?;
    let again = here(g)?;
    g.a.cli()?;
    g.a.add(rbp, rcx)?;
    g.a.sti()?;
    g.a.nop()?;
    g.a.cli()?;
    g.a.xor(rbp, rbx)?;
    g.a.sti()?;
    g.a.cli()?;
    g.a.nop()?;
    g.a.sti()?;
    g.a.dec(ecx)?;
    g.a.jnz(again)
}

/// A loop that rewrites a constant and a jump in itself.
fn self_modifying(g: &mut Draft, _: Ring, _: Labels) -> Written {
    let (mut constant, mut jump) = (g.a.create_label(), g.a.create_label());
    draw_ecx(g, 48, 15)?;
    g.a.inc(ecx)?;
    g.address(rsi, constant)?;
    g.address(rdi, jump)?;
    let again = here(g)?;
    // B8: MOV EAX, imm32. EB: JMP rel8.
    g.a.lea(edx, ptr(rbx + rcx * 2))?;
    g.a.mov(dword_ptr(rsi + 1), edx)?;
    g.a.and(edx, 6u32)?;
    g.a.mov(byte_ptr(rdi + 1), dl)?;
    bind(g, &mut constant)?;
    g.a.mov(eax, 0x1234_5678u32)?;
    g.a.add(r8, rax)?;
    bind(g, &mut jump)?;
    g.a.db(&[0xeb, 0])?;
    for _ in 0..4 {
        // Two bytes each, so that each place the jump can lead to is the beginning of one.
        g.a.inc(ebp)?;
    }
    g.a.dec(ecx)?;
    g.a.jnz(again)
}

fn locked(g: &mut Draft, _: Ring, _: Labels) -> Written {
    g.a.mov(ecx, 5u32)?;
    let again = here(g)?;
    g.a.mov(rdx, rcx)?;
    g.a.lock().xadd(qword_ptr(LOCKED), rdx)?;
    g.a.mov(rax, rdx)?;
    g.a.lock().cmpxchg(qword_ptr(LOCKED), rbx)?;
    g.a.xchg(qword_ptr(LOCKED), rdx)?;
    g.a.lock().inc(dword_ptr(LOCKED))?;
    g.a.lock().bts(dword_ptr(LOCKED), 9u32)?;
    g.a.setb(r10b)?;
    g.a.dec(ecx)?;
    g.a.jnz(again)?;
    // EDX:EAX is what is there, so it becomes ECX:EBX; the generator is not to change.
    g.a.mov(rcx, rbp)?;
    g.a.mov(eax, dword_ptr(LOCKED_PAIR))?;
    g.a.mov(edx, dword_ptr(LOCKED_PAIR + 4))?;
    g.a.lock().cmpxchg8b(qword_ptr(LOCKED_PAIR))?;
    g.a.setz(r10b)?;
    g.a.mov(r9, r10)
}

/// An exit.
fn port(g: &mut Draft, ring: Ring, _: Labels) -> Written {
    if ring == Ring::User {
        return g.a.int(i32::from(INT_OUT));
    }
    g.a.mov(eax, ebx)?;
    g.mark()
}

//! Guests to be stepped, stopped and interrupted.

use iced_x86::code_asm::{eax, ecx, qword_ptr, rax, rsp};

use crate::layout::DATA;
use crate::{MicroGuest, Ring};

/// The vector of the non-maskable interrupt.
pub const NMI_VECTOR: u8 = 2;

/// Six instructions of different lengths, one of them a jump, at the places `0` to `5`, then the
/// end at the place `6`. Stepped from the start, RIP is at `1`, `2`, ... `6`.
pub fn straight_line(ring: Ring) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        let mut five = g.a.create_label();
        g.place("0")?;
        g.a.nop()?;
        g.place("1")?;
        g.a.mov(eax, 1u32)?;
        g.place("2")?;
        g.a.add(eax, 2u32)?;
        g.place("3")?;
        g.a.mov(qword_ptr(DATA), rax)?;
        g.place("4")?;
        g.a.jmp(five)?;
        g.a.ud2()?;
        g.a.set_label(&mut five)?;
        g.a.zero_bytes()?;
        g.place("5")?;
        g.a.inc(eax)?;
        g.place("6")?;
        g.done()
    })
}

/// Counts EAX from 0 to 3 in three instructions; the place `target` is the second. A breakpoint
/// there stops with RIP at it and 1 in RAX.
pub fn breakpoint(ring: Ring) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.a.mov(eax, 0u32)?;
        g.a.inc(eax)?;
        g.place("target")?;
        g.a.inc(eax)?;
        g.a.inc(eax)?;
        g.done()
    })
}

/// INT3 at the place `int3`. Where the host asked for it (`KVM_GUESTDBG_USE_SW_BP`) it stops
/// there; elsewhere vector 3 shows at the fault port.
pub fn int3(ring: Ring) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.a.nop()?;
        g.place("int3")?;
        g.a.int3()?;
        g.done()
    })
}

/// Turns interrupts on and marks itself; an interrupt with `vector` given there arrives before
/// the place `next`. Its entry stores the interrupted RIP at `DATA` and counts at `DATA + 8`.
pub fn interruptible(vector: u8) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.data = vec![0; 16];
        g.a.sti()?;
        g.a.nop()?;
        g.mark()?;
        g.place("next")?;
        g.a.nop()?;
        g.a.nop()?;
        g.done()?;

        g.entry(vector)?;
        g.a.push(rax)?;
        g.a.mov(rax, qword_ptr(rsp + 8))?;
        g.a.mov(qword_ptr(DATA), rax)?;
        g.a.inc(qword_ptr(DATA + 8))?;
        g.a.pop(rax)?;
        g.a.iretq()
    })
}

/// `count` times: marks itself with interrupts off, then turns them on by STI. A window asked
/// for at the mark must open at the place `open`, never before the place `shadow`, which is the
/// instruction that STI protects, nor at it.
pub fn window(count: u32) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.mov(ecx, count)?;
        let again = g.place("again")?;
        g.a.cli()?;
        g.mark()?;
        g.a.nop()?;
        g.a.sti()?;
        g.place("shadow")?;
        g.a.nop()?;
        g.place("open")?;
        g.a.nop()?;
        g.a.nop()?;
        g.a.dec(ecx)?;
        g.a.jnz(again)?;
        g.a.cli()?;
        g.done()
    })
}

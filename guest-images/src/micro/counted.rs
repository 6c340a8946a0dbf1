//! Guests that retire a known number of conditional branches.

use iced_x86::code_asm::{dword_ptr, eax, ebp, ecx, qword_ptr, r8, r9, r10, rax, rcx, rsp};

use crate::layout::{DATA, MMIO, STACK3, USER_CS, USER_SS};
use crate::{MicroGuest, Ring};

/// The interrupt that [`counted`] expects, any time.
pub const COUNTED_VECTOR: u8 = 0x41;
/// Branches of each round of [`counted`]: the inner loop, one that is taken every other time, and
/// the outer loop's.
const PER_ROUND: u64 = INNER + 2;
const INNER: u64 = 20;
/// Branches of its page fault handler; there is one fault a round.
const PER_FAULT: u64 = 3;
/// Branches of its interrupt handler.
const PER_INTERRUPT: u64 = 5;
/// An address without a translation: the tables end at 1 GiB.
const UNMAPPED: u64 = 1 << 30;

/// Conditional branches that [`counted`] retires.
pub fn counted_branches(rounds: u32, interrupts: u64) -> u64 {
    u64::from(rounds) * (PER_ROUND + PER_FAULT) + interrupts * PER_INTERRUPT
}

/// Does `rounds` rounds of branches, a page fault, a memory-mapped store (one exit) and a CPUID
/// (an exit that stays in KVM), in ring 0 or in ring 3, and takes interrupts meanwhile. How many
/// faults and interrupts its handlers saw is at `DATA` and `DATA + 8`.
pub fn counted(ring: Ring, rounds: u32) -> MicroGuest {
    // It starts in ring 0 in any case: only there can it turn interrupts on.
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.data = vec![0; 16];
        let mut behind_fault = g.a.create_label();
        let mut body = g.a.create_label();
        if ring == Ring::User {
            let interrupts_on = 0x202i32;
            g.a.push(i32::from(USER_SS))?;
            g.a.push(STACK3 as i32)?;
            g.a.push(interrupts_on)?;
            g.a.push(i32::from(USER_CS))?;
            g.address(rax, body)?;
            g.a.push(rax)?;
            g.a.iretq()?;
        } else {
            g.a.sti()?;
        }
        g.a.set_label(&mut body)?;
        g.a.mov(ebp, rounds)?;
        g.a.mov(r8, UNMAPPED)?;
        g.address(r9, behind_fault)?;
        g.a.mov(r10, MMIO)?;
        let again = g.place("again")?;
        let mut even = g.a.create_label();
        g.a.mov(ecx, INNER as u32)?;
        let mut next = g.a.create_label();
        g.a.set_label(&mut next)?;
        g.a.dec(ecx)?;
        g.a.jnz(next)?;
        g.a.test(ebp, 1u32)?;
        g.a.jz(even)?;
        g.a.nop()?;
        g.a.set_label(&mut even)?;
        g.a.mov(dword_ptr(r8), eax)?;
        g.a.set_label(&mut behind_fault)?;
        g.a.mov(dword_ptr(r10), eax)?;
        g.a.xor(eax, eax)?;
        g.a.cpuid()?;
        g.a.dec(ebp)?;
        g.a.jnz(again)?;
        if ring == Ring::User {
            g.a.ud2()?;
        } else {
            g.done()?;
        }

        // #PF: the error code, then RIP, which is set after the store.
        g.entry(14)?;
        handler_loop(g, PER_FAULT)?;
        g.a.inc(qword_ptr(DATA))?;
        g.a.mov(qword_ptr(rsp + 8), r9)?;
        g.a.add(rsp, 8)?;
        g.a.iretq()?;

        g.entry(COUNTED_VECTOR)?;
        handler_loop(g, PER_INTERRUPT)?;
        g.a.inc(qword_ptr(DATA + 8))?;
        g.a.iretq()
    })
}

/// `count` branches that leave all registers as they are.
fn handler_loop(g: &mut crate::micro_guest::Draft, count: u64) -> Result<(), iced_x86::IcedError> {
    let mut next = g.a.create_label();
    g.a.push(rcx)?;
    g.a.mov(ecx, count as u32)?;
    g.a.set_label(&mut next)?;
    g.a.dec(ecx)?;
    g.a.jnz(next)?;
    g.a.pop(rcx)
}

/// Conditional branches and hardly anything else, for as long as anybody wants: how many of them
/// an overflow signal is late is as many as it can be.
pub fn dense_branches(ring: Ring) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.a.mov(ecx, u32::MAX)?;
        // Clears CF, which DEC leaves alone.
        g.a.xor(eax, eax)?;
        let again = g.place("again")?;
        // jc, to the next instruction; never taken.
        g.a.db(&[0x72, 0x00].repeat(1000))?;
        g.a.dec(ecx)?;
        g.a.jnz(again)?;
        g.done()
    })
}

/// `count` locked instructions, and twice as many conditional branches around them.
pub fn locked(ring: Ring, count: u32) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.data = vec![0; 8];
        g.a.mov(ecx, count)?;
        let again = g.place("again")?;
        g.a.lock().inc(qword_ptr(DATA))?;
        // jc, to the next instruction.
        g.a.db(&[0x72, 0x00])?;
        g.a.dec(ecx)?;
        g.a.jnz(again)?;
        g.done()
    })
}

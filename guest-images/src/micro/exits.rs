//! Guests that leave for the host in each of the ways there are.

use iced_x86::code_asm::{al, ax, byte_ptr, dx, eax, ecx, ptr, qword_ptr, rax, rbx, rcx, rdi, rsi};

use crate::layout::{DATA, MMIO, PORT_DEVICE, RAM_BYTES};
use crate::{MicroGuest, Ring};

/// Writes 0x5a, 0x1234 and 0xdeadbeef to ports 0x40, 0x41 and 0x42 in one, two and four bytes,
/// then reads ports 0x43, 0x44 and 0x45 in as many. Six exits; the three values read are at
/// `DATA`, eight bytes apart, zero-extended.
pub fn ports() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        let port = u32::from(PORT_DEVICE);
        g.a.mov(eax, 0x5au32)?;
        g.a.out(port, al)?;
        g.a.mov(eax, 0x1234u32)?;
        g.a.out(port + 1, ax)?;
        g.a.mov(eax, 0xdead_beefu32)?;
        g.a.out(port + 2, eax)?;
        for i in 0..3u32 {
            g.a.mov(eax, 0u32)?;
            match i {
                0 => g.a.in_(al, port + 3)?,
                1 => g.a.in_(ax, port + 4)?,
                _ => g.a.in_(eax, port + 5)?,
            }
            g.a.mov(qword_ptr(DATA + 8 * u64::from(i)), rax)?;
        }
        g.done()
    })
}

/// Writes the eight bytes at `DATA` (they spell `Hindsite`) to port 0x40 with REP OUTSB, then reads
/// eight from port 0x41 to `DATA + 0x100` with REP INSB. The host sees all bytes, in order, in as
/// many exits as its KVM likes.
pub fn string_ports() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.data = b"Hindsite".to_vec();
        g.a.cld()?;
        g.a.mov(rsi, DATA)?;
        g.a.mov(ecx, 8u32)?;
        g.a.mov(dx, u32::from(PORT_DEVICE))?;
        g.a.rep().outsb()?;
        g.a.mov(rdi, DATA + 0x100)?;
        g.a.mov(ecx, 8u32)?;
        g.a.mov(dx, u32::from(PORT_DEVICE + 1))?;
        g.a.rep().insb()?;
        g.done()
    })
}

/// Stores one byte (0x5a) at `MMIO` and eight (0x1122334455667788) at `MMIO + 8`, then loads one
/// byte from `MMIO + 0x10` and eight from `MMIO + 0x18`. Four exits; what was loaded is at
/// `DATA` and `DATA + 8`.
pub fn memory_mapped() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.mov(rbx, MMIO)?;
        g.a.mov(rax, 0x1122_3344_5566_7788u64)?;
        g.a.mov(byte_ptr(rbx), 0x5au32)?;
        g.a.mov(qword_ptr(rbx + 8), rax)?;
        g.a.movzx(eax, byte_ptr(rbx + 0x10))?;
        g.a.mov(rcx, qword_ptr(rbx + 0x18))?;
        g.a.mov(qword_ptr(DATA), rax)?;
        g.a.mov(qword_ptr(DATA + 8), rcx)?;
        g.done()
    })
}

/// HLT with interrupts off. The exit is a halt.
pub fn halt() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.hlt()?;
        g.done()
    })
}

/// An invalid instruction with an empty IDT: a triple fault. The exit is a shutdown.
pub fn triple_fault() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.data = vec![0; 10];
        g.a.lidt(ptr(DATA))?;
        g.a.ud2()?;
        g.done()
    })
}

/// `count` times OUT to port 0x40, and nothing else but the loop around it.
pub fn many_outs(count: u32) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.mov(ecx, count)?;
        let again = g.place("out")?;
        g.a.out(u32::from(PORT_DEVICE), al)?;
        g.a.dec(ecx)?;
        g.a.jnz(again)?;
        g.done()
    })
}

/// A loop of `count` conditional branches (all but the last one taken) and no exit.
pub fn branch_loop(ring: Ring, count: u32) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.a.mov(ecx, count)?;
        let again = g.place("loop")?;
        g.a.dec(ecx)?;
        g.a.jnz(again)?;
        g.done()
    })
}

/// Stores one byte into each of `pages`, numbers of 4 KiB pages.
pub fn dirty_pages(pages: &[u64]) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        for page in pages {
            assert!(page * 4096 < RAM_BYTES, "page {page} is not RAM");
            g.a.mov(byte_ptr(page * 4096), 1u32)?;
        }
        g.done()
    })
}

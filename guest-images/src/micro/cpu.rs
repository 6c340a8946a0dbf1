//! Guests that ask the CPU what it is, and what time it is.

use iced_x86::code_asm::{al, dword_ptr, eax, ebx, ecx, edx, ptr, qword_ptr, rax, rbx, rcx, rdx};

use crate::layout::DATA;
use crate::{MicroGuest, Ring};

/// CPUID for each (leaf, subleaf). EAX, EBX, ECX and EDX of number `i` are at `DATA + 16 * i`.
pub fn cpuid(ring: Ring, leaves: &[(u32, u32)]) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        for (at, (leaf, subleaf)) in (DATA..).step_by(16).zip(leaves) {
            g.a.mov(eax, *leaf)?;
            g.a.mov(ecx, *subleaf)?;
            g.a.cpuid()?;
            g.a.mov(dword_ptr(at), eax)?;
            g.a.mov(dword_ptr(at + 4), ebx)?;
            g.a.mov(dword_ptr(at + 8), ecx)?;
            g.a.mov(dword_ptr(at + 12), edx)?;
        }
        g.done()
    })
}

/// RDMSR for each index. EDX:EAX of number `i` is at `DATA + 8 * i`.
pub fn read_msrs(indices: &[u32]) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        for (at, index) in (DATA..).step_by(8).zip(indices) {
            g.a.mov(ecx, *index)?;
            g.a.rdmsr()?;
            g.a.mov(dword_ptr(at), eax)?;
            g.a.mov(dword_ptr(at + 4), edx)?;
        }
        g.done()
    })
}

/// WRMSR. Place: `wrmsr`.
pub fn write_msr(index: u32, value: u64) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.nop()?;
        g.write_msr(index, value)?;
        g.done()
    })
}

/// `out %al` to `port` with 0xa, 0xb, 0xc and 0xd in RAX, RBX, RCX and RDX, as a rewritten CPUID
/// does; what the four registers hold afterwards is at `DATA`, eight bytes each.
/// Place: `next`, the instruction after the OUT.
pub fn trap_port(port: u8) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        for (register, value) in [(rax, 0xau64), (rbx, 0xb), (rcx, 0xc), (rdx, 0xd)] {
            g.a.mov(register, value)?;
        }
        g.a.out(u32::from(port), al)?;
        g.place("next")?;
        for (at, register) in (DATA..).step_by(8).zip([rax, rbx, rcx, rdx]) {
            // The absolute address takes no register: `mov %reg, disp32`.
            g.a.mov(qword_ptr(at), register)?;
        }
        g.done()
    })
}

/// Where [`x87_pointers`] leaves what FNSTENV stores, before its mark and after it.
pub const X87_ENVIRONMENTS: [u64; 2] = [DATA + 0x40, DATA + 0x80];
/// Bytes of an environment, in the format of 32-bit protected mode (Intel SDM vol. 1, 8.1.10).
pub const X87_ENVIRONMENT_BYTES: usize = 28;

/// An x87 load, FNSTENV, a mark, and FNSTENV again.
pub fn x87_pointers() -> MicroGuest {
    let [before, after] = X87_ENVIRONMENTS;
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.fninit()?;
        g.a.fld(qword_ptr(DATA))?;
        g.a.fnstenv(ptr(before))?;
        g.mark()?;
        g.a.fnstenv(ptr(after))?;
        g.done()
    })
}

/// RDTSC. Place: `rdtsc`. With CR4.TSD set and in ring 3 it faults there: #GP with error code 0.
pub fn rdtsc(ring: Ring) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.a.nop()?;
        g.place("rdtsc")?;
        g.a.rdtsc()?;
        g.done()
    })
}

/// A hypercall with RAX = `number`, RBX = `DATA + 0x100` and RCX = 0, by VMMCALL (AMD) or VMCALL
/// (Intel). What comes back in RAX is at `DATA`.
pub fn hypercall(number: u32, amd: bool) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.a.mov(eax, number)?;
        g.a.mov(rbx, DATA + 0x100)?;
        g.a.mov(ecx, 0u32)?;
        if amd {
            g.a.vmmcall()?
        } else {
            g.a.vmcall()?
        }
        g.a.mov(qword_ptr(DATA), rax)?;
        g.done()
    })
}

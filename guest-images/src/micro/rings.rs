//! Guests that go from ring 3 to ring 0 and back.

use iced_x86::code_asm::{cr3, cs, eax, ecx, edx, qword_ptr, rax, rsp};

use crate::layout::{DATA, KERNEL_CS, STACK3, USER_BASE, USER_CS, USER_SS};
use crate::{MicroGuest, Ring};

pub(super) const STAR: u32 = 0xc000_0081;
pub(super) const LSTAR: u32 = 0xc000_0082;
pub(super) const SFMASK: u32 = 0xc000_0084;
pub(super) const EFER: u32 = 0xc000_0080;
/// IF, TF and DF, as Linux masks them.
pub(super) const MASKED_FLAGS: u64 = 0x700;

/// Starts in ring 0, sets the SYSCALL MSRs, goes to ring 3 with IRETQ, and there does SYSCALL.
/// The entry does what only ring 0 may (it reads CR3) and marks itself: at the mark CPL must be 0
/// and RCX the place `back`. SYSRET then returns there, and ring 3 ends the guest. CS in the entry
/// is at `DATA`, CR3 at `DATA + 8`, CS after SYSRET at `DATA + 16`. Places: `back`.
pub fn syscall() -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        let mut user = g.a.create_label();
        let mut entry = g.a.create_label();
        g.a.mov(ecx, EFER)?;
        g.a.rdmsr()?;
        g.a.or(eax, 1u32)?;
        g.a.wrmsr()?;
        g.write_msr(
            STAR,
            u64::from(USER_BASE) << 48 | u64::from(KERNEL_CS) << 32,
        )?;
        g.write_msr(SFMASK, MASKED_FLAGS)?;
        g.address(rax, entry)?;
        g.a.mov(ecx, LSTAR)?;
        g.a.mov(edx, 0u32)?;
        g.a.wrmsr()?;
        g.a.push(i32::from(USER_SS))?;
        g.a.push(STACK3 as i32)?;
        g.a.push(2i32)?;
        g.a.push(i32::from(USER_CS))?;
        g.address(rax, user)?;
        g.a.push(rax)?;
        g.a.iretq()?;

        g.a.set_label(&mut user)?;
        g.a.nop()?;
        g.a.syscall()?;
        g.place("back")?;
        g.a.mov(eax, cs)?;
        g.a.mov(qword_ptr(DATA + 16), rax)?;
        g.a.ud2()?;

        g.a.set_label(&mut entry)?;
        g.a.mov(eax, cs)?;
        g.a.mov(qword_ptr(DATA), rax)?;
        g.a.mov(rax, cr3)?;
        g.a.mov(qword_ptr(DATA + 8), rax)?;
        g.mark()?;
        g.a.sysretq()
    })
}

/// Starts in ring 3 and divides by zero. The entry marks itself; CS there must be ring 0's and RSP
/// five words below [`INTERRUPT_STACK`](crate::layout::INTERRUPT_STACK). IRETQ returns to ring 3,
/// after the division, and ring 3 ends the guest. CS in the entry is at `DATA`, RSP at
/// `DATA + 8`, CS after IRETQ at `DATA + 16`.
pub fn gate() -> MicroGuest {
    MicroGuest::assemble(Ring::User, |g| {
        let mut after = g.a.create_label();
        g.a.mov(eax, 0u32)?;
        g.a.div(eax)?;
        g.a.set_label(&mut after)?;
        g.a.mov(eax, cs)?;
        g.a.mov(qword_ptr(DATA + 16), rax)?;
        g.done()?;

        g.entry(0)?;
        g.a.mov(eax, cs)?;
        g.a.mov(qword_ptr(DATA), rax)?;
        g.a.mov(qword_ptr(DATA + 8), rsp)?;
        g.mark()?;
        g.address(rax, after)?;
        g.a.mov(qword_ptr(rsp), rax)?;
        g.a.iretq()
    })
}

//! Guests that try an instruction whose answer a guest cannot compute, and survive it.
//!
//! Whether CPUID shows the feature is the host's choice; the question is whether the instruction
//! runs all the same.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeLabel, byte_ptr, cr4, eax, ecx, edx, ptr, qword_ptr, r12, r12b, r12d, r13d, r14, r15, rax,
    rsp, ymm0,
};

use crate::layout::DATA;
use crate::micro_guest::Draft;
use crate::{MicroGuest, Ring};

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// RDRAND.
    Rdrand,
    /// RDSEED.
    Rdseed,
    /// RDPMC of counter 0.
    Rdpmc,
    /// RDPID.
    Rdpid,
    /// RDPRU of MPERF (AMD).
    Rdpru,
    /// MONITOR.
    Monitor,
    /// TPAUSE with a deadline long past. Where it is not known, its bytes may mean MFENCE, which
    /// leaves the flags alone; the answer is 1 if it changed them.
    Tpause,
    /// XBEGIN, whose abort goes on after it.
    Xbegin,
    /// XGETBV of XCR0.
    Xgetbv,
    /// XSAVE of everything.
    Xsave,
    /// An AVX instruction.
    Avx,
    /// CR4.OSXSAVE set, which opens the three before.
    SetOsxsave,
    /// RDTSC.
    Rdtsc,
    /// RDTSCP.
    Rdtscp,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest did not come so far.
    NotReached,
    /// The guest did not come back from it.
    Lost,
    /// It ran, and this is its answer where it gives one.
    Ran(u64),
    /// It raised the exception with this vector.
    Faulted(u8),
}

/// Bytes of memory per attempt: how it went, the vector, and at 8 the answer.
const SLOT: u64 = 16;
const STARTED: u32 = 1;
const RAN: u32 = 2;
const FAULTED: u32 = 3;
/// #DE to #PF, without those that take no part: NMI (2), double fault (8).
const CAUGHT: [u8; 9] = [0, 1, 5, 6, 7, 10, 12, 13, 14];

/// Tries each in turn. [`outcomes`] reads from `DATA` how they went.
pub fn attempts(ring: Ring, list: &[Attempt]) -> MicroGuest {
    MicroGuest::assemble(ring, |g| {
        g.data = vec![0; SLOT as usize * list.len()];
        let mut end = g.a.create_label();
        g.a.mov(r13d, 0u32)?;
        for (slot, attempt) in (DATA..).step_by(SLOT as usize).zip(list) {
            let mut resume = g.a.create_label();
            g.a.mov(r14, slot)?;
            g.address(r15, resume)?;
            g.a.mov(byte_ptr(r14), STARTED)?;
            g.a.mov(r12, 0u64)?;
            write_attempt(g, *attempt)?;
            g.a.mov(qword_ptr(r14 + 8), r12)?;
            g.a.mov(byte_ptr(r14), RAN)?;
            g.a.set_label(&mut resume)?;
            g.a.nop()?;
        }
        // From either ring: the entry of #UD sees that this one is meant.
        g.a.mov(r13d, 1u32)?;
        g.a.ud2()?;
        for vector in CAUGHT {
            g.entry(vector)?;
            g.a.test(r13d, r13d)?;
            g.a.jnz(end)?;
            g.a.mov(byte_ptr(r14), FAULTED)?;
            g.a.mov(byte_ptr(r14 + 1), u32::from(vector))?;
            if matches!(vector, 10..=14) {
                g.a.add(rsp, 8i32)?;
            }
            g.a.mov(qword_ptr(rsp), r15)?;
            g.a.iretq()?;
        }
        g.a.set_label(&mut end)?;
        g.done_in_ring_0()
    })
}

fn write_attempt(g: &mut Draft, attempt: Attempt) -> Result<(), IcedError> {
    // Above the slots, aligned to 64 bytes as XSAVE wants it.
    let scratch = DATA + 0x1000;
    g.a.mov(eax, 0u32)?;
    g.a.mov(ecx, 0u32)?;
    g.a.mov(edx, 0u32)?;
    match attempt {
        Attempt::Rdrand => g.a.rdrand(r12)?,
        Attempt::Rdseed => g.a.rdseed(r12)?,
        Attempt::Rdpid => g.a.rdpid(r12)?,
        Attempt::Rdpmc => {
            g.a.rdpmc()?;
            g.a.mov(r12, rax)?;
        }
        Attempt::Rdpru => {
            g.a.rdpru()?;
            g.a.mov(r12, rax)?;
        }
        Attempt::Rdtsc => {
            g.a.rdtsc()?;
            g.a.mov(r12, rax)?;
        }
        Attempt::Rdtscp => {
            g.a.rdtscp()?;
            g.a.mov(r12d, ecx)?;
        }
        Attempt::Monitor => {
            g.a.mov(rax, scratch)?;
            g.a.monitor()?;
        }
        Attempt::Tpause => {
            g.a.cmp(eax, eax)?;
            g.a.tpause(r12d)?;
            g.a.setnz(r12b)?;
        }
        Attempt::Xbegin => {
            let mut aborted: CodeLabel = g.a.create_label();
            g.a.xbegin(aborted)?;
            g.a.xend()?;
            g.a.set_label(&mut aborted)?;
            g.a.mov(r12, rax)?;
        }
        Attempt::Xgetbv => {
            g.a.xgetbv()?;
            g.a.mov(r12, rax)?;
        }
        Attempt::Xsave => {
            g.a.mov(eax, u32::MAX)?;
            g.a.mov(edx, u32::MAX)?;
            g.a.xsave(ptr(scratch))?;
        }
        Attempt::Avx => g.a.vpxor(ymm0, ymm0, ymm0)?,
        Attempt::SetOsxsave => {
            g.a.mov(rax, cr4)?;
            g.a.or(eax, 1u32 << 18)?;
            g.a.mov(cr4, rax)?;
        }
    }
    Ok(())
}

/// How the attempts went, out of the bytes at `DATA`.
pub fn outcomes(data: &[u8]) -> Vec<Outcome> {
    let slots = data.chunks_exact(SLOT as usize);
    slots
        .map(|slot| match u32::from(slot[0]) {
            STARTED => Outcome::Lost,
            RAN => Outcome::Ran(u64::from_le_bytes(slot[8..].try_into().expect("8 bytes"))),
            FAULTED => Outcome::Faulted(slot[1]),
            _ => Outcome::NotReached,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_attempt_assembles_for_both_rings_and_fits() {
        use Attempt::*;
        let all = [
            Rdrand, Rdseed, Rdpmc, Rdpid, Rdpru, Monitor, Tpause, Xbegin, Xgetbv, Xsave, Avx,
            SetOsxsave, Rdtsc, Rdtscp,
        ];
        for ring in [Ring::Kernel, Ring::User] {
            let guest = attempts(ring, &all);
            assert!(guest.data.len() == 16 * all.len() && guest.data.len() < 0x1000);
            guest.image();
        }
    }

    #[test]
    fn outcomes_tell_the_four_cases_apart() {
        let mut data = [0; 64];
        data[16] = STARTED as u8;
        data[32] = RAN as u8;
        data[40] = 7;
        data[48] = FAULTED as u8;
        data[49] = 13;
        let expected = [
            Outcome::NotReached,
            Outcome::Lost,
            Outcome::Ran(7),
            Outcome::Faulted(13),
        ];
        assert_eq!(outcomes(&data), expected);
    }
}

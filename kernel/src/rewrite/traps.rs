//! Finds the instructions that KVM answers behind our back, and makes each of them exit.
//!
//! RDTSC, RDTSCP and CPUID never reach the VMM, and CR4 must keep its TSD bit whatever the kernel writes. So before
//! the guest starts, each of these instructions becomes an OUT to a port that no device owns, which exits on any KVM.
//!
//! **Why OUT and not IN:** an OUT's exit is over when we see it, except that RIP must move on. An IN's is not: KVM still
//! has to write the port's value to EAX, would do so over the value we gave, and on the emulated path loses what was set
//! before. Both encode in two bytes (`e6 ib`), and the three- and four-byte instructions are filled
//! up with NOPs, which the guest executes by itself after the trap.
//!
//! **Why PAUSE too:** the kernel says PAUSE (`cpu_relax()`) where it waits for something that another
//! task or an interrupt must bring about. Without an exit there the interrupt could not land, and
//! the kernel would wait for good; as a trap, every turn of such a loop is a moment.
//!
//! **Decoded, never searched.** `0f 31` also occurs inside immediates, displacements and data. Each code section
//! is decoded from its first byte, one instruction after the other, as objdump does.

use iced_x86::{Code as Opcode, Decoder, DecoderOptions, Instruction, OpKind, Register};
use serde::{Deserialize, Serialize};

use super::Patch;
use crate::error::KernelError;
use crate::image::{Code, Elf};
use crate::rewrite::panics::Panics;
use crate::symbols::kallsyms::Symbols;

/// Port of a RDTSC.
pub const TRAP_RDTSC: u8 = 0xf1;
/// Port of a RDTSCP.
pub const TRAP_RDTSCP: u8 = 0xf2;
/// Port of a CPUID.
pub const TRAP_CPUID: u8 = 0xf3;
/// Port of a `mov %reg,%cr4`.
pub const TRAP_WRITE_CR4: u8 = 0xf4;
/// Port of a `mov %cr4,%reg`.
pub const TRAP_READ_CR4: u8 = 0xf5;
/// Port of the first instruction of the #GP entry, rewritten while the guest runs.
pub const TRAP_GP_ENTRY: u8 = 0xf6;
/// Port of a PAUSE.
pub const TRAP_PAUSE: u8 = 0xf7;
/// Port of the kernel entry that was waited for (see `kvm::entries`).
pub const TRAP_ENTRY: u8 = 0xf8;
/// Port of the call with which the kernel makes a loaded module's text executable (see [`crate::rewrite::modules`]).
pub const TRAP_MODULE: u8 = 0xf9;
/// Port of a `mov %reg,%drN` that sets a breakpoint.
pub const TRAP_WRITE_DR: u8 = 0xfa;
/// Port of the call with which the kernel says that it panics (see `crate::rewrite::panics`).
pub const TRAP_PANIC: u8 = 0xfb;
/// All of these ports.
const TRAP_PORTS: std::ops::RangeInclusive<u8> = TRAP_RDTSC..=TRAP_PANIC;

/// `out %al, imm8`.
pub const OUT: u8 = 0xe6;
const NOP: u8 = 0x90;
/// Shortest trap: OUT and its port.
pub const SHORTEST: usize = 2;
/// Longest trap in the kernel: a call with its 32-bit displacement.
const LONGEST: usize = 5;
/// Longest trap that is not a call: `mov %r8,%cr4` with its REX prefix.
const LONGEST_PLAIN: usize = 4;
/// No instruction is longer (Intel SDM vol. 2, 2.3.11), so no trap in a module is.
pub const LONGEST_INSTRUCTION: usize = 15;
/// Linux has some 500. More is no kernel, and would cost more memory than its file has.
const SITES_MAX: usize = 1 << 16;
/// What kexec copies, and how much of it (`KEXEC_CONTROL_CODE_MAX_SIZE`, Linux, arch/x86/include/asm/kexec.h).
const COPIED: &str = "relocate_kernel";
const COPIED_BYTES: u64 = 2048;
/// How much of `.text` runs before the kernel's own page tables stand (head_64.S).
const EARLY_BYTES: u64 = 0x1000;

/// What an instruction did before it became a trap.
///
/// Register numbers are those of the encoding: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SiteKind {
    /// Time to EDX:EAX.
    Rdtsc,
    /// Time to EDX:EAX, processor number to ECX.
    Rdtscp,
    /// What the CPU has, to EAX, EBX, ECX and EDX.
    Cpuid,
    /// CR4 set from a register.
    WriteCr4 {
        /// Number of the register.
        source: u8,
    },
    /// CR4 read to a register.
    ReadCr4 {
        /// Number of the register.
        target: u8,
    },
    /// A wait for somebody else.
    Pause,
    /// DR0 to DR3 or DR7 set from a register.
    WriteDr {
        /// Number of the debug register.
        number: u8,
        /// Number of the register that it is set from.
        source: u8,
    },
    /// A module is about to be made executable, by a direct call or a jump at a function's end.
    Module {
        /// Virtual address that it leads to.
        target: u64,
        /// Whether it pushes a return address.
        returns: bool,
    },
    /// The kernel says that it panics, by a direct call.
    Panic {
        /// Virtual address that it leads to.
        target: u64,
    },
}

impl SiteKind {
    /// The port that a trap of this kind writes to.
    pub fn port(self) -> u8 {
        match self {
            SiteKind::Rdtsc => TRAP_RDTSC,
            SiteKind::Rdtscp => TRAP_RDTSCP,
            SiteKind::Cpuid => TRAP_CPUID,
            SiteKind::WriteCr4 { .. } => TRAP_WRITE_CR4,
            SiteKind::ReadCr4 { .. } => TRAP_READ_CR4,
            SiteKind::Pause => TRAP_PAUSE,
            SiteKind::WriteDr { .. } => TRAP_WRITE_DR,
            SiteKind::Module { .. } => TRAP_MODULE,
            SiteKind::Panic { .. } => TRAP_PANIC,
        }
    }

    /// What a trap with this port stood for, if the port says all of it.
    pub fn of_port(port: u8) -> Option<Self> {
        match port {
            TRAP_RDTSC => Some(SiteKind::Rdtsc),
            TRAP_RDTSCP => Some(SiteKind::Rdtscp),
            TRAP_CPUID => Some(SiteKind::Cpuid),
            TRAP_PAUSE => Some(SiteKind::Pause),
            _ => None,
        }
    }

    /// The instruction, as errors call it.
    pub fn name(self) -> &'static str {
        match self {
            SiteKind::Rdtsc => "rdtsc",
            SiteKind::Rdtscp => "rdtscp",
            SiteKind::Cpuid => "cpuid",
            SiteKind::WriteCr4 { .. } => "write of cr4",
            SiteKind::ReadCr4 { .. } => "read of cr4",
            SiteKind::Pause => "pause",
            SiteKind::WriteDr { .. } => "write of a debug register",
            SiteKind::Module { .. } => "call that makes a module executable",
            SiteKind::Panic { .. } => "call that says that the kernel panics",
        }
    }

    /// What of the kernel's own calls is a site: one that leads to one of `loads`.
    fn of_call(instruction: &Instruction, loads: &[u64]) -> Option<Self> {
        let target = instruction.near_branch_target();
        let returns = match instruction.code() {
            Opcode::Call_rel32_64 => true,
            Opcode::Jmp_rel32_64 | Opcode::Jmp_rel8_64 => false,
            _ => return None,
        };
        loads
            .contains(&target)
            .then_some(SiteKind::Module { target, returns })
    }

    /// What a single instruction is, wherever it stands.
    pub(crate) fn of(instruction: &Instruction) -> Option<Self> {
        match instruction.code() {
            Opcode::Rdtsc => Some(SiteKind::Rdtsc),
            Opcode::Rdtscp => Some(SiteKind::Rdtscp),
            Opcode::Cpuid => Some(SiteKind::Cpuid),
            Opcode::Pause => Some(SiteKind::Pause),
            Opcode::Mov_cr_r64 if instruction.op0_register() == Register::CR4 => {
                Some(SiteKind::WriteCr4 {
                    source: instruction.op1_register().number() as u8,
                })
            }
            Opcode::Mov_r64_cr if instruction.op1_register() == Register::CR4 => {
                debug_assert_eq!(instruction.op0_kind(), OpKind::Register);
                Some(SiteKind::ReadCr4 {
                    target: instruction.op0_register().number() as u8,
                })
            }
            Opcode::Mov_dr_r64 => match instruction.op0_register().number() as u8 {
                number @ (0..=3 | 7) => Some(SiteKind::WriteDr {
                    number,
                    source: instruction.op1_register().number() as u8,
                }),
                _ => None,
            },
            _ => None,
        }
    }

    fn is_call(self) -> bool {
        matches!(self, SiteKind::Module { .. } | SiteKind::Panic { .. })
    }

    fn is_cr4(self) -> bool {
        matches!(self, SiteKind::WriteCr4 { .. } | SiteKind::ReadCr4 { .. })
    }
}

/// One instruction to trap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its virtual address.
    pub address: u64,
    /// Its physical address.
    pub physical: u64,
    /// Its length in bytes, 2 to 5.
    pub length: u8,
    /// What it did.
    pub kind: SiteKind,
}

/// How many instructions there are to trap, by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrapCounts {
    /// RDTSC.
    pub rdtsc: u32,
    /// RDTSCP.
    pub rdtscp: u32,
    /// CPUID.
    pub cpuid: u32,
    /// Writes of CR4.
    pub cr4_writes: u32,
    /// Reads of CR4.
    pub cr4_reads: u32,
    /// PAUSE.
    pub pause: u32,
    /// Writes of debug registers.
    pub dr_writes: u32,
    /// Calls that make a module executable.
    pub module_loads: u32,
    /// Calls that say that the kernel panics.
    pub panics: u32,
}

/// All instructions to trap, sorted by virtual address.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sites {
    /// The sites.
    pub sites: Vec<Site>,
    /// Virtual addresses of the kernel's own OUTs to a trap port, in ascending order: they are no traps.
    pub own_outs: Vec<u64>,
}

impl Sites {
    /// Leaves the CR4 accesses alone of the code that kexec copies elsewhere and runs there, where nobody would know which
    /// they are; what comes after is another kernel.
    pub fn leave_alone(&mut self, symbols: Option<&Symbols<'_>>) {
        let Some(start) = symbols.and_then(|symbols| symbols.lookup(COPIED)) else {
            return;
        };
        let copied = start..start.saturating_add(COPIED_BYTES);
        self.sites
            .retain(|site| !(site.kind.is_cr4() && copied.contains(&site.address)));
    }

    /// Whether any begins at one of these addresses.
    pub fn any_in(&self, range: std::ops::Range<u64>) -> bool {
        let first = self
            .sites
            .partition_point(|site| site.address < range.start);
        self.sites
            .get(first)
            .is_some_and(|site| site.address < range.end)
    }

    /// The traps, over the kernel's own instructions.
    ///
    /// # Errors
    ///
    /// Sites that were found in another kernel.
    pub fn patches(&self, elf: &Elf<'_>) -> Result<Vec<Patch>, KernelError> {
        let patch = |site: &Site| {
            check(elf, site)?;
            let (trap, length) = rewrite(site.kind, site.length.into());
            Ok(Patch {
                gpa: site.physical,
                bytes: trap[..length].to_vec(),
            })
        };
        self.sites.iter().map(patch).collect()
    }

    /// How many there are of each kind.
    pub fn counts(&self) -> TrapCounts {
        let mut counts = TrapCounts::default();
        for site in &self.sites {
            *match site.kind {
                SiteKind::Rdtsc => &mut counts.rdtsc,
                SiteKind::Rdtscp => &mut counts.rdtscp,
                SiteKind::Cpuid => &mut counts.cpuid,
                SiteKind::WriteCr4 { .. } => &mut counts.cr4_writes,
                SiteKind::ReadCr4 { .. } => &mut counts.cr4_reads,
                SiteKind::Pause => &mut counts.pause,
                SiteKind::WriteDr { .. } => &mut counts.dr_writes,
                SiteKind::Module { .. } => &mut counts.module_loads,
                SiteKind::Panic { .. } => &mut counts.panics,
            } += 1;
        }
        counts
    }
}

/// Finds every site in a kernel's code.
///
/// `loads` are the addresses of the functions whose call says that a module is about to run, the best first: the calls of
/// the first that is called directly become sites. Reads and writes of CR4 in head_64.S, before the kernel's own tables
/// stand, are left alone.
///
/// # Errors
///
/// A kernel without any RDTSC, or one with a site that no trap fits.
pub fn find(elf: &Elf<'_>, loads: &[u64]) -> Result<Sites, KernelError> {
    find_and_show(elf, loads, &mut |_| {})
}

/// The same, and shows each decoded instruction to `see`.
///
/// # Errors
///
/// As [`find`].
pub fn find_and_show(
    elf: &Elf<'_>,
    loads: &[u64],
    see: &mut impl FnMut(&Instruction),
) -> Result<Sites, KernelError> {
    let (mut sites, mut own_outs) = (Vec::new(), Vec::new());
    let mut panics = Panics::of(elf);
    let mut kind = |instruction: &Instruction| {
        see(instruction);
        if is_own_out(instruction) {
            own_outs.push(instruction.ip());
        }
        // Seen by all: the call need not come right after what announces it.
        let panic = panics.see(instruction);
        SiteKind::of(instruction)
            .or_else(|| SiteKind::of_call(instruction, loads))
            .or(panic)
    };
    for code in &elf.code {
        sweep(elf, code, &mut kind, &mut sites)?;
    }
    own_outs.sort_unstable();
    // Sections come in the file's order, and damaged files may name one twice.
    sites.sort_by_key(|site| site.address);
    sites.dedup_by_key(|site| site.address);
    let leads_to =
        |site: &Site, to: u64| matches!(site.kind, SiteKind::Module { target, .. } if target == to);
    let best = loads
        .iter()
        .find(|&&load| sites.iter().any(|site| leads_to(site, load)));
    sites.retain(|site| {
        let is_load = matches!(site.kind, SiteKind::Module { .. });
        !is_load || best.is_some_and(|&best| leads_to(site, best))
    });
    let sites = Sites { sites, own_outs };
    if sites.counts().rdtsc == 0 {
        return Err(KernelError::NoTimeReads {
            code_bytes: elf.code.iter().map(|code| code.file.len() as u64).sum(),
        });
    }
    Ok(sites)
}

/// Whether a port is one of the traps'.
pub fn is_trap_port(port: u8) -> bool {
    TRAP_PORTS.contains(&port)
}

/// Whether an instruction, as it was before anything was rewritten, looks like a trap.
pub(crate) fn is_own_out(instruction: &Instruction) -> bool {
    instruction.code() == Opcode::Out_imm8_AL && TRAP_PORTS.contains(&instruction.immediate8())
}

/// The bytes of a trap of `length` bytes: `out %al,PORT`, then NOPs to the instruction's length, which count.
pub fn rewrite(kind: SiteKind, length: usize) -> ([u8; LONGEST_INSTRUCTION], usize) {
    assert!(
        (SHORTEST..=LONGEST_INSTRUCTION).contains(&length),
        "a {} is {length} bytes long",
        kind.name()
    );
    let mut trap = [NOP; LONGEST_INSTRUCTION];
    trap[..SHORTEST].copy_from_slice(&[OUT, kind.port()]);
    (trap, length)
}

/// Length of a call with a 32-bit displacement.
pub const CALL_BYTES: usize = 5;

/// The call at `from` to `to` that was rewritten.
pub fn call(from: u64, to: u64) -> [u8; CALL_BYTES] {
    let displacement = to.wrapping_sub(from.wrapping_add(CALL_BYTES as u64)) as u32;
    let [a, b, c, d] = displacement.to_le_bytes();
    [0xe8, a, b, c, d]
}

/// Checks that this kernel has the instruction that `site` speaks of.
fn check(elf: &Elf<'_>, site: &Site) -> Result<(), KernelError> {
    let found = elf
        .at(site.address, usize::from(site.length))
        .is_some_and(|bytes| {
            let instruction = decoder(bytes, site.address).decode();
            let kind = match site.kind {
                SiteKind::Module { target, .. } => SiteKind::of_call(&instruction, &[target]),
                SiteKind::Panic { target } => (instruction.code() == Opcode::Call_rel32_64
                    && instruction.near_branch_target() == target)
                    .then_some(site.kind),
                _ => SiteKind::of(&instruction),
            };
            kind == Some(site.kind)
                && instruction.len() == usize::from(site.length)
                && (SHORTEST..=LONGEST).contains(&instruction.len())
        });
    if found && elf.physical(site.address) == Some(site.physical) {
        return Ok(());
    }
    Err(KernelError::ForeignSite {
        address: site.address,
        kind: site.kind.name(),
    })
}

fn decoder(bytes: &[u8], address: u64) -> Decoder<'_> {
    Decoder::with_ip(64, bytes, address, DecoderOptions::NONE)
}

/// Decodes code from its first byte to its last, and shows each instruction.
///
/// `starts` are addresses, in ascending order, at which an instruction is known to begin whatever the bytes before them
/// look like: where one function or section ends in padding, the decoder must not take the next one's first bytes for
/// the rest of it.
pub(crate) fn each_instruction<E>(
    bytes: &[u8],
    address: u64,
    starts: &[u64],
    mut show: impl FnMut(&Instruction) -> Result<(), E>,
) -> Result<(), E> {
    let mut decoder = decoder(bytes, address);
    let mut instruction = Instruction::default();
    let mut starts = starts.iter().copied().peekable();
    while decoder.can_decode() {
        let ip = decoder.ip();
        decoder.decode_out(&mut instruction);
        while starts.next_if(|&start| start <= ip).is_some() {}
        let next = match starts.peek() {
            Some(&start) if start < decoder.ip() => start,
            // Start again one byte on, as objdump does: the bad byte need not have cost us the good ones after it.
            _ if instruction.is_invalid() => ip + 1,
            _ => {
                show(&instruction)?;
                continue;
            }
        };
        decoder
            .set_position((next - address) as usize)
            .expect("what was decoded was inside");
        decoder.set_ip(next);
    }
    Ok(())
}

/// Decodes one section.
fn sweep(
    elf: &Elf<'_>,
    code: &Code,
    kind: &mut impl FnMut(&Instruction) -> Option<SiteKind>,
    sites: &mut Vec<Site>,
) -> Result<(), KernelError> {
    each_instruction(elf.bytes(&code.file), code.address, &[], |instruction| {
        if let Some(kind) = kind(instruction) {
            sites.extend(site(elf, code, kind, instruction.ip(), instruction.len())?);
            if sites.len() > SITES_MAX {
                return Err(KernelError::TooManySites { limit: SITES_MAX });
            }
        }
        Ok(())
    })
}

/// One found instruction as a site, unless it is one to be left alone.
fn site(
    elf: &Elf<'_>,
    code: &Code,
    kind: SiteKind,
    address: u64,
    length: usize,
) -> Result<Option<Site>, KernelError> {
    let early = match &code.name[..] {
        ".text" => address - code.address < EARLY_BYTES,
        name => name.starts_with(".head"),
    };
    if early && kind.is_cr4() {
        return Ok(None);
    }
    let longest = if kind.is_call() {
        LONGEST
    } else {
        LONGEST_PLAIN
    };
    if !(SHORTEST..=longest).contains(&length) {
        return Err(KernelError::OddSite { address, length });
    }
    let physical = elf
        .physical(address)
        .expect("Elf::parse lets no code section out of its segment");
    Ok(Some(Site {
        address,
        physical,
        length: length as u8,
        kind,
    }))
}

#[cfg(test)]
mod tests;

//! Which time reads can give way to a jump, and be done without an exit.
//!
//! A RDTSC has two bytes, a jump to anywhere in the kernel five. So instructions after it have to
//! move along, to where the jump leads (see `quick_stub`). A *span* is the RDTSC and those: what a jump takes the place of.
//! It must be certain that nobody ever enters a span but at its first byte, that nobody patches
//! it, and that the moved instructions do elsewhere what they did here. Where one of these is not,
//! the read stays an exit, which is always right.
//!
//! **Alternatives.** `rdtsc_ordered()` is five bytes long for a reason of its own: the kernel patches it to
//! `lfence; rdtsc` or to `rdtscp`, whichever the CPU has (Linux, arch/x86/include/asm/msr.h). There is nothing to
//! order in a read of memory by the same CPU, so such a place becomes a span as it is, and the
//! kernel's list is changed so that it patches each replacement onto itself, which changes nothing.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use serde::{Deserialize, Serialize};

use crate::image::{Code, Elf};
use crate::rewrite::alternatives::{self, Alternative, Alternatives};
use crate::rewrite::named::Named;
use crate::rewrite::quick_stub::{MOVED_MAX, SPAN_MIN};
use crate::rewrite::traps::{Site, SiteKind, Sites};

/// `rdtsc`.
const RDTSC_BYTES: u64 = 2;
/// The flags that a stub changes: CF, PF, AF, ZF, SF, OF.
const FLAGS: u32 = iced_x86::RflagsBits::CF
    | iced_x86::RflagsBits::PF
    | iced_x86::RflagsBits::AF
    | iced_x86::RflagsBits::ZF
    | iced_x86::RflagsBits::SF
    | iced_x86::RflagsBits::OF;
/// How many instructions are looked at to find the flags overwritten.
const FLAGS_BUDGET: u32 = 24;

/// A time read, and what moves with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Virtual address of the RDTSC.
    pub address: u64,
    /// Length in bytes, 5 or more.
    pub bytes: u8,
    /// How many bytes after the RDTSC are moved; the rest of the span is padding.
    pub moved: u8,
}

/// Why a time read stays an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Refusal {
    /// It is no RDTSC.
    OtherInstruction,
    /// The kernel may copy other code over it, or it is such code.
    Patched,
    /// The section ends too soon.
    SectionEnd,
    /// An instruction after it cannot be moved.
    Immovable,
    /// Another trap is in the way.
    OtherSite,
    /// Something may lead into the span.
    Named,
    /// The flags it leaves as they are may be looked at.
    Flags,
}

/// Finds the spans among `sites`.
pub(super) fn find(elf: &Elf<'_>, sites: &Sites, named: &Named) -> Vec<Span> {
    let Some(alternatives) = alternatives::read(elf) else {
        return Vec::new();
    };
    sites
        .sites
        .iter()
        .filter_map(|site| span(elf, site, sites, named, &alternatives).ok())
        .collect()
}

/// The span of one site.
fn span(
    elf: &Elf<'_>,
    site: &Site,
    sites: &Sites,
    named: &Named,
    alternatives: &Alternatives,
) -> Result<Span, Refusal> {
    if site.kind != SiteKind::Rdtsc || u64::from(site.length) != RDTSC_BYTES {
        return Err(Refusal::OtherInstruction);
    }
    let code = elf.code_at(site.address).ok_or(Refusal::SectionEnd)?;
    if code.name.starts_with(".altinstr") {
        return Err(Refusal::Patched);
    }
    let span = match slot(elf, site.address, alternatives)? {
        Some(slot) => slot,
        None => grown(elf, code, site.address)?,
    };
    let end = span.address + u64::from(span.bytes);
    if sites.any_in(span.address + 1..end) {
        return Err(Refusal::OtherSite);
    }
    if span.moved != 0 && alternatives.touching(span.address..end).next().is_some() {
        return Err(Refusal::Patched);
    }
    if moved_starts(elf, &span).any(|start| named.contains(start)) {
        return Err(Refusal::Named);
    }
    if !flags_are_dead(elf, span.address + RDTSC_BYTES) {
        return Err(Refusal::Flags);
    }
    Ok(span)
}

/// Where the instructions begin that a span moves.
fn moved_starts(elf: &Elf<'_>, span: &Span) -> impl Iterator<Item = u64> {
    let address = span.address + RDTSC_BYTES;
    let bytes = elf.at(address, span.moved.into()).unwrap_or(&[]);
    decoder(bytes, address).into_iter().map(|i| i.ip())
}

/// The span that the kernel would patch as a whole, if this is one: a RDTSC, padding, and only time
/// reads to replace it. `None` if the kernel does not patch it.
fn slot(elf: &Elf<'_>, address: u64, alternatives: &Alternatives) -> Result<Option<Span>, Refusal> {
    let mut slot = None;
    for patch in alternatives.touching(address..address + 1) {
        let same = slot.is_none_or(|bytes| bytes == patch.bytes);
        if patch.address != address || !same || !reads_time(elf, patch) {
            return Err(Refusal::Patched);
        }
        slot = Some(patch.bytes);
    }
    let Some(bytes) = slot else {
        return Ok(None);
    };
    let padding = elf
        .at(
            address + RDTSC_BYTES,
            usize::from(bytes).saturating_sub(RDTSC_BYTES as usize),
        )
        .ok_or(Refusal::SectionEnd)?;
    let mut decoder = decoder(padding, 0);
    let padded = decoder.iter().all(|i| i.mnemonic() == Mnemonic::Nop);
    if !padded || usize::from(bytes) < SPAN_MIN {
        return Err(Refusal::Patched);
    }
    Ok(Some(Span {
        address,
        bytes,
        moved: 0,
    }))
}

/// Whether an alternative's replacement is one time read and nothing else.
fn reads_time(elf: &Elf<'_>, patch: &Alternative) -> bool {
    let Some(bytes) = elf.at(patch.replacement, patch.replacement_bytes.into()) else {
        return false;
    };
    let mut reads = 0;
    for instruction in decoder(bytes, 0).iter() {
        match instruction.mnemonic() {
            Mnemonic::Rdtsc | Mnemonic::Rdtscp => reads += 1,
            Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Nop => {}
            _ => return false,
        }
    }
    reads == 1
}

/// The shortest span whose instructions can all be moved.
fn grown(elf: &Elf<'_>, code: &Code, address: u64) -> Result<Span, Refusal> {
    let left = code.address + code.file.len() as u64 - address;
    let bytes = elf
        .at(address, left.min(64) as usize)
        .ok_or(Refusal::SectionEnd)?;
    let mut decoder = decoder(bytes, address);
    let mut instruction = Instruction::default();
    decoder.decode_out(&mut instruction);
    while decoder.position() < SPAN_MIN {
        decoder.decode_out(&mut instruction);
        if instruction.is_invalid() {
            return Err(Refusal::SectionEnd);
        }
        if !can_move(&instruction) {
            return Err(Refusal::Immovable);
        }
    }
    let moved = decoder.position() - RDTSC_BYTES as usize;
    if moved > MOVED_MAX {
        return Err(Refusal::Immovable);
    }
    Ok(Span {
        address,
        bytes: decoder.position() as u8,
        moved: moved as u8,
    })
}

/// Whether an instruction does elsewhere what it does here: plain computing on general registers and memory. NOPs stay,
/// since the kernel patches them (jump labels, tracing), and so does what it patches LOCK into.
fn can_move(instruction: &Instruction) -> bool {
    use Mnemonic::{
        Add, And, Cmp, Dec, Imul, Inc, Lea, Mov, Movsx, Movsxd, Movzx, Neg, Not, Or, Sar, Shl, Shr,
        Sub, Test, Xor,
    };
    let plain = matches!(
        instruction.mnemonic(),
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Sub
            | And
            | Or
            | Xor
            | Not
            | Neg
            | Inc
            | Dec
            | Shl
            | Shr
            | Sar
            | Imul
            | Test
            | Cmp
    );
    let operands = (0..instruction.op_count()).all(|operand| match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).is_gpr(),
        _ => true,
    });
    plain && operands && !instruction.has_lock_prefix()
}

/// Whether all flags that a stub changes are overwritten from `address` on before anything looks.
fn flags_are_dead(elf: &Elf<'_>, address: u64) -> bool {
    let mut budget = FLAGS_BUDGET;
    dead(elf, address, FLAGS, &mut budget)
}

/// Whether `alive` flags die from `address` on. Calls and returns end them: they cross neither (System V
/// ABI, AMD64, 3.2.1).
fn dead(elf: &Elf<'_>, mut address: u64, mut alive: u32, budget: &mut u32) -> bool {
    while *budget > 0 {
        *budget -= 1;
        let Some(bytes) = (1..=15).rev().find_map(|length| elf.at(address, length)) else {
            return false;
        };
        let instruction = decoder(bytes, address).decode();
        if instruction.is_invalid() || instruction.rflags_read() & alive != 0 {
            return false;
        }
        alive &= !overwritten(&instruction);
        if alive == 0 {
            return true;
        }
        address = instruction.next_ip();
        match instruction.flow_control() {
            FlowControl::Next => {}
            FlowControl::Call | FlowControl::IndirectCall | FlowControl::Return => return true,
            FlowControl::UnconditionalBranch => address = instruction.near_branch_target(),
            FlowControl::ConditionalBranch => {
                if !dead(elf, instruction.near_branch_target(), alive, budget) {
                    return false;
                }
            }
            _ => return false,
        }
    }
    false
}

/// The flags that an instruction overwrites whatever its operands are. A shift by CL may be one by
/// zero, which leaves them.
fn overwritten(instruction: &Instruction) -> u32 {
    let by_cl = instruction.op_count() > 1
        && instruction.op_kind(instruction.op_count() - 1) == OpKind::Register
        && instruction.op_register(instruction.op_count() - 1) == Register::CL
        && !matches!(
            instruction.mnemonic(),
            Mnemonic::Add
                | Mnemonic::Sub
                | Mnemonic::And
                | Mnemonic::Or
                | Mnemonic::Xor
                | Mnemonic::Cmp
                | Mnemonic::Test
        );
    if by_cl || instruction.has_rep_prefix() || instruction.has_repne_prefix() {
        0
    } else {
        instruction.rflags_modified()
    }
}

fn decoder(bytes: &[u8], address: u64) -> Decoder<'_> {
    Decoder::with_ip(64, bytes, address, DecoderOptions::NONE)
}

#[cfg(test)]
mod tests;

//! The landing torture: every class of instruction, in long loops with many conditional branches,
//! and a checksum that changes if an interrupt lands one instruction off.
//!
//! It walks through the actions of [`actions`] in an order that a seed decides: some turns in ring
//! 0, some in ring 3, and so on. After each turn all registers go into a sum. The entry of
//! [`TORTURE_VECTOR`] adds to another the place at which the guest was interrupted (RIP, RFLAGS,
//! RSP), all registers, and how many interrupts there were. In the end both make one.
//!
//! Without interrupts the checksum is the same on every CPU: no undefined flag goes into it.

mod actions;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    AsmRegister64, CodeLabel, al, ax, byte_ptr, cr2, cr3, eax, ecx, edx, ptr, qword_ptr, r8, r9,
    r10, r11, r12, r12d, r13, r13b, r13d, r14, r15, rax, rbp, rbx, rcx, rdi, rdx, rsi, rsp,
};

use super::rings::{EFER, LSTAR, MASKED_FLAGS, SFMASK, STAR};
use crate::layout::{
    DATA, GDT, IDT, KERNEL_CS, PAGE_DIRECTORY, PORT_FAULT, STACK0, STACK3, TASK, USER_BASE,
    USER_CS, USER_SS,
};
use crate::micro_guest::Draft;
use crate::{MicroGuest, Ring};

/// What to interrupt the torture with; there is an entry for it, and none for any other.
pub const TORTURE_VECTOR: u8 = 0x20;

/// Where the torture goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Ring 0, and no INT n nor INT3: what a KVM that emulates ring 0 can do.
    Emulated,
    /// Ring 0.
    Kernel,
    /// Rings 0 and 3 in turn.
    Both,
}

/// How to torture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Torture {
    /// Decides what comes when.
    pub seed: u64,
    /// How long: each round is 64 actions in ring 0 and, with [`Reach::Both`], as many in ring 3.
    pub rounds: u32,
    /// In which rings.
    pub reach: Reach,
    /// Have IRQ 0 of an 8259A and an 8254 interrupt each time this number of ticks has passed, and send EOI. Otherwise the
    /// host injects [`TORTURE_VECTOR`] as it likes.
    pub timer_ticks: Option<u16>,
}

/// What a torture left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tortured {
    /// Everything in one.
    pub checksum: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// Of where and with which registers.
    pub interrupt_sum: u64,
    /// Page faults taken.
    pub faults: u64,
}

impl Tortured {
    /// Bytes to be read at `DATA`.
    pub const BYTES: usize = 32;

    /// Out of the bytes at `DATA`.
    pub fn read(data: &[u8]) -> Tortured {
        let word = |i: usize| {
            let bytes = data[8 * i..8 * i + 8].try_into().expect("eight bytes");
            u64::from_le_bytes(bytes)
        };
        Tortured {
            checksum: word(0),
            interrupts: word(1),
            interrupt_sum: word(2),
            faults: word(3),
        }
    }
}

// Words at DATA.
const SUM: u64 = DATA;
const INTERRUPTS: u64 = DATA + 0x08;
const INTERRUPT_SUM: u64 = DATA + 0x10;
const FAULTS: u64 = DATA + 0x18;
const FAULT_SUM: u64 = DATA + 0x20;
const USER_RSP: u64 = DATA + 0x28;
/// Factor and summand of the generator (Knuth, MMIX).
const FACTOR: u64 = DATA + 0x30;
const SUMMAND: u64 = DATA + 0x38;
/// For locked operations.
const LOCKED: u64 = DATA + 0x40;
const LOCKED_PAIR: u64 = DATA + 0x50;
const IDT_POINTER: u64 = DATA + 0x60;
/// Where the actions begin, for each ring.
const ACTIONS_0: u64 = DATA + 0x100;
const ACTIONS_3: u64 = DATA + 0x200;
/// Places in each table.
const ACTIONS: usize = 32;
/// Two buffers for string instructions.
const BUFFER: u64 = DATA + 0x400;
const OTHER_BUFFER: u64 = DATA + 0x800;
const BUFFER_BYTES: u64 = 0x400;

/// Pages that are there or not, 4 KiB each, for both rings: mapped at `PAGES`, they are the RAM at
/// `FRAMES`.
const PAGES: u64 = 2 << 21;
const FRAMES: u64 = 0x6_0000;
/// One more than the actions choose from, for what runs over the end of one.
const PAGE_COUNT: u64 = 33;
const PAGE_TABLE: u64 = 0x7000;
/// Present, writable, for both rings, accessed and dirty: no CPU needs to write to it.
const PAGE_FLAGS: u64 = 0x67;

/// Turns in a ring before it changes.
const TURNS: u32 = 64;

/// What ring 3 has done in ring 0, by INT.
const INT_LOOP: u8 = 0x80;
const INT_PHASE_DONE: u8 = 0x81;
const INT_UNMAP: u8 = 0x82;
const INT_OUT: u8 = 0x83;

/// The registers that actions may use; RBX is the generator, R12 to R15 and RSP hold the torture
/// together.
const FREE: [AsmRegister64; 10] = [rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, rbx];

/// The torture. Ends in ring 0; [`Tortured::read`] tells of what is at `DATA` then. Now and then it
/// marks itself. Places: `turn`, where each action begins, and `interrupt`.
pub fn torture(how: Torture) -> MicroGuest {
    MicroGuest::assemble(Ring::Kernel, |g| {
        g.data = data();
        let mut labels = Labels {
            next: g.a.create_label(),
            unmap: g.a.create_label(),
            round_done: g.a.create_label(),
            syscall: g.a.create_label(),
        };
        let rings: &[Ring] = if how.reach == Reach::Both {
            &[Ring::Kernel, Ring::User]
        } else {
            &[Ring::Kernel]
        };
        // The actions first, so that the start knows where they are.
        let mut start = g.a.create_label();
        g.a.jmp(start)?;
        let mut tables = Vec::new();
        for ring in rings {
            let int = how.reach != Reach::Emulated;
            tables.push(actions::write(g, *ring, int, labels)?);
        }
        write_handlers(g, how, &mut labels)?;

        bind(g, &mut start)?;
        write_start(g, how, labels.syscall)?;
        for (table, actions) in [ACTIONS_0, ACTIONS_3].into_iter().zip(tables) {
            for (at, action) in (table..).step_by(8).zip(actions) {
                g.address(rax, action)?;
                g.a.mov(qword_ptr(at), rax)?;
            }
        }
        write_rounds(g, how, &mut labels)
    })
}

/// Places that are used before they are there.
#[derive(Clone, Copy, Debug)]
struct Labels {
    /// What follows each action.
    next: CodeLabel,
    /// A function: takes all pages away.
    unmap: CodeLabel,
    /// Reached with ring 0's stack empty.
    round_done: CodeLabel,
    syscall: CodeLabel,
}

/// Sets a label here. (An instruction takes one label only, hence one of no bytes.)
fn bind(g: &mut Draft, label: &mut CodeLabel) -> Result<(), IcedError> {
    g.a.zero_bytes()?;
    g.a.set_label(label)
}

/// A new label, here.
fn here(g: &mut Draft) -> Result<CodeLabel, IcedError> {
    let mut label = g.a.create_label();
    bind(g, &mut label)?;
    Ok(label)
}

fn data() -> Vec<u8> {
    let mut data = vec![0; (BUFFER - DATA) as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        let at = (at - DATA) as usize;
        data[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(FACTOR, &6_364_136_223_846_793_005u64.to_le_bytes());
    put(SUMMAND, &1_442_695_040_888_963_407u64.to_le_bytes());
    put(IDT_POINTER, &0xfffu16.to_le_bytes());
    put(IDT_POINTER + 2, &IDT.to_le_bytes());
    // Text with few letters and long repeats, so that comparisons go on for a while.
    data.extend((0..2 * BUFFER_BYTES).map(|i| b"aaaaabaaaaaaaaac"[(i / 3 % 16) as usize]));
    data
}

/// Rotates, and takes in `register`, in turns one way and the other.
fn take_in(g: &mut Draft, i: usize, register: AsmRegister64) -> Result<(), IcedError> {
    g.a.rol(rax, 7u32)?;
    if i.is_multiple_of(2) {
        g.a.add(rax, register)
    } else {
        g.a.xor(rax, register)
    }
}

/// Tables, MSRs, pages: needs nothing of the host but what every micro-guest has.
fn write_start(g: &mut Draft, how: Torture, syscall: CodeLabel) -> Result<(), IcedError> {
    g.a.cld()?;
    g.a.lidt(ptr(IDT_POINTER))?;
    // LTR wants a TSS that is not busy (Intel SDM vol. 3, 8.2.2).
    g.a.mov(byte_ptr(GDT + u64::from(TASK) + 5), 0x89u32)?;
    g.a.mov(eax, u32::from(TASK))?;
    g.a.ltr(ax)?;
    if how.reach == Reach::Both {
        g.a.mov(ecx, EFER)?;
        g.a.rdmsr()?;
        g.a.or(eax, 1u32)?;
        g.a.wrmsr()?;
        let selectors = u64::from(USER_BASE) << 48 | u64::from(KERNEL_CS) << 32;
        g.write_msr(STAR, selectors)?;
        g.write_msr(SFMASK, MASKED_FLAGS)?;
        g.address(rax, syscall)?;
        g.a.mov(ecx, LSTAR)?;
        g.a.mov(edx, 0u32)?;
        g.a.wrmsr()?;
    }
    // Whoever ran before left things there.
    g.a.mov(rdi, FRAMES)?;
    g.a.mov(ecx, (PAGE_COUNT * 4096 / 8) as u32)?;
    g.a.mov(eax, 0u32)?;
    g.a.rep().stosq()?;
    g.a.mov(rax, PAGE_TABLE | 0x27)?;
    g.a.mov(qword_ptr(PAGE_DIRECTORY + 8 * (PAGES >> 21)), rax)?;
    let programming = how.timer_ticks.map(timer).unwrap_or_default();
    for (port, value) in programming {
        g.a.mov(al, u32::from(value))?;
        g.a.out(port, al)?;
    }
    Ok(())
}

/// IRQ 0 at [`TORTURE_VECTOR`] and nothing else, each time `ticks` have passed (8259A data sheet, p. 10; 8254
/// data sheet, mode 2).
fn timer(ticks: u16) -> Vec<(u32, u8)> {
    let [low, high] = ticks.to_le_bytes();
    vec![
        (0x20, 0x11),
        (0x21, TORTURE_VECTOR),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xfe),
        (0x43, 0x34),
        (0x40, low),
        (0x40, high),
    ]
}

/// The rounds, the turns, and the end.
fn write_rounds(g: &mut Draft, how: Torture, labels: &mut Labels) -> Result<(), IcedError> {
    let (mut turn, mut mix) = (g.a.create_label(), g.a.create_label());
    let (mut phase_done, mut user) = (g.a.create_label(), g.a.create_label());
    g.a.call(labels.unmap)?;
    for register in FREE.into_iter().chain([rax]) {
        g.a.mov(register, 0u64)?;
    }
    g.a.mov(rbx, how.seed)?;
    g.a.mov(r13d, how.rounds.max(1))?;
    g.a.sti()?;

    let round = here(g)?;
    g.address(r14, phase_done)?;
    g.a.mov(r15, ACTIONS_0)?;
    g.a.mov(r12d, TURNS)?;

    // One turn. The label of the place is the only one its instruction can have.
    bind(g, &mut turn)?;
    g.a.zero_bytes()?;
    g.place("turn")?;
    g.a.imul_2(rbx, qword_ptr(FACTOR))?;
    g.a.add(rbx, qword_ptr(SUMMAND))?;
    g.a.mov(rax, rbx)?;
    g.a.shr(rax, 33u32)?;
    g.a.and(eax, ACTIONS as u32 - 1)?;
    g.a.jmp(qword_ptr(r15 + rax * 8))?;
    bind(g, &mut labels.next)?;
    g.a.call(mix)?;
    g.a.dec(r12d)?;
    g.a.jnz(turn)?;
    g.a.jmp(r14)?;

    bind(g, &mut phase_done)?;
    if how.reach == Reach::Both {
        g.a.push(i32::from(USER_SS))?;
        g.a.push(STACK3 as i32)?;
        g.a.push(0x202i32)?;
        g.a.push(i32::from(USER_CS))?;
        g.address(rax, user)?;
        g.a.push(rax)?;
        g.a.iretq()?;

        bind(g, &mut user)?;
        let (mut user_done, mut by_syscall) = (g.a.create_label(), g.a.create_label());
        g.address(r14, user_done)?;
        g.a.mov(r15, ACTIONS_3)?;
        g.a.mov(r12d, TURNS)?;
        g.a.jmp(turn)?;
        bind(g, &mut user_done)?;
        g.a.test(r13b, 1i32)?;
        g.a.jz(by_syscall)?;
        g.a.int(i32::from(INT_PHASE_DONE))?;
        bind(g, &mut by_syscall)?;
        g.a.mov(eax, 1u32)?;
        g.a.syscall()?;
    }
    bind(g, &mut labels.round_done)?;
    g.a.dec(r13d)?;
    g.a.jnz(round)?;

    g.a.cli()?;
    g.a.mov(rax, qword_ptr(SUM))?;
    for (i, word) in [INTERRUPT_SUM, INTERRUPTS, FAULT_SUM, FAULTS]
        .into_iter()
        .enumerate()
    {
        g.a.mov(rcx, qword_ptr(word))?;
        take_in(g, i, rcx)?;
        g.a.imul_2(rax, qword_ptr(FACTOR))?;
    }
    g.a.mov(qword_ptr(SUM), rax)?;
    g.done_in_ring_0()?;

    // A function: all free registers go into the sum.
    bind(g, &mut mix)?;
    g.a.push(rax)?;
    g.a.mov(rax, qword_ptr(SUM))?;
    g.a.xor(rax, qword_ptr(rsp))?;
    for (i, register) in FREE.into_iter().enumerate() {
        take_in(g, i, register)?;
    }
    g.a.imul_2(rax, qword_ptr(FACTOR))?;
    g.a.mov(qword_ptr(SUM), rax)?;
    g.a.pop(rax)?;
    g.a.ret()
}

fn write_handlers(g: &mut Draft, how: Torture, labels: &mut Labels) -> Result<(), IcedError> {
    write_interrupt(g, how)?;
    write_page_fault(g)?;
    // #DE of a two-byte DIV, and #UD of UD2: skipped.
    for vector in [0, 6] {
        g.entry(vector)?;
        g.a.add(qword_ptr(rsp), 2i32)?;
        g.a.iretq()?;
    }
    // #BP is a trap: RIP is after it (Intel SDM vol. 3, 6.15).
    g.entry(3)?;
    g.a.nop()?;
    g.a.iretq()?;

    // A few branches with interrupts off, then on, then off again.
    g.entry(INT_LOOP)?;
    g.a.mov(edx, 5u32)?;
    let again = here(g)?;
    g.a.dec(edx)?;
    g.a.jnz(again)?;
    g.a.sti()?;
    g.a.add(edx, ecx)?;
    g.a.add(edx, 3u32)?;
    g.a.cli()?;
    g.a.iretq()?;

    g.entry(INT_UNMAP)?;
    g.a.call(labels.unmap)?;
    g.a.iretq()?;

    g.entry(INT_OUT)?;
    g.a.mov(al, byte_ptr(SUM))?;
    g.mark()?;
    g.a.iretq()?;

    bind(g, &mut labels.unmap)?;
    for register in [rax, rcx, rdi] {
        g.a.push(register)?;
    }
    g.a.mov(rdi, PAGE_TABLE)?;
    g.a.mov(ecx, PAGE_COUNT as u32)?;
    g.a.mov(eax, 0u32)?;
    g.a.rep().stosq()?;
    g.a.mov(rax, cr3)?;
    g.a.mov(cr3, rax)?;
    for register in [rdi, rcx, rax] {
        g.a.pop(register)?;
    }
    g.a.ret()?;
    if how.reach == Reach::Both {
        write_ways_out_of_ring_3(g, labels)?;
    }
    Ok(())
}

/// The interrupt that the torture is about.
fn write_interrupt(g: &mut Draft, how: Torture) -> Result<(), IcedError> {
    g.entry(TORTURE_VECTOR)?;
    g.a.zero_bytes()?;
    g.place("interrupt")?;
    g.a.push(rax)?;
    g.a.mov(rax, qword_ptr(INTERRUPT_SUM))?;
    g.a.xor(rax, qword_ptr(rsp))?;
    for (i, register) in FREE.into_iter().chain([r12, r13]).enumerate() {
        take_in(g, i, register)?;
    }
    g.a.inc(qword_ptr(INTERRUPTS))?;
    // RIP, CS, RFLAGS, RSP and SS of the frame, and the count.
    for word in [8, 16, 24, 32, 40] {
        g.a.rol(rax, 7u32)?;
        g.a.add(rax, qword_ptr(rsp + word))?;
    }
    g.a.rol(rax, 7u32)?;
    g.a.add(rax, qword_ptr(INTERRUPTS))?;
    g.a.imul_2(rax, qword_ptr(FACTOR))?;
    g.a.mov(qword_ptr(INTERRUPT_SUM), rax)?;
    if how.timer_ticks.is_some() {
        g.a.mov(al, 0x20u32)?;
        g.a.out(0x20u32, al)?;
    }
    g.a.pop(rax)?;
    g.a.iretq()
}

/// #PF: maps the page if it is one of ours.
fn write_page_fault(g: &mut Draft) -> Result<(), IcedError> {
    let mut not_ours = g.a.create_label();
    g.entry(14)?;
    g.a.push(rax)?;
    g.a.push(rdx)?;
    g.a.mov(rax, cr2)?;
    g.a.sub(rax, PAGES as i32)?;
    g.a.shr(rax, 12u32)?;
    g.a.cmp(rax, PAGE_COUNT as i32)?;
    g.a.jae(not_ours)?;
    g.a.mov(rdx, rax)?;
    g.a.shl(rdx, 12u32)?;
    g.a.add(rdx, (FRAMES | PAGE_FLAGS) as i32)?;
    g.a.mov(qword_ptr(rax * 8 + PAGE_TABLE), rdx)?;
    g.a.inc(qword_ptr(FAULTS))?;
    g.a.mov(rax, qword_ptr(FAULT_SUM))?;
    // RIP, CS, and how far a string instruction had come. Not the error code: a KVM that emulates
    // takes what reads and writes for a read.
    for word in [24, 32] {
        g.a.rol(rax, 7u32)?;
        g.a.add(rax, qword_ptr(rsp + word))?;
    }
    g.a.mov(rdx, cr2)?;
    for (i, register) in [rcx, rdi, rsi, rdx].into_iter().enumerate() {
        take_in(g, i, register)?;
    }
    g.a.mov(qword_ptr(FAULT_SUM), rax)?;
    g.a.pop(rdx)?;
    g.a.pop(rax)?;
    g.a.add(rsp, 8i32)?;
    g.a.iretq()?;

    bind(g, &mut not_ours)?;
    g.a.pop(rdx)?;
    g.a.pop(rax)?;
    g.a.push(14i32)?;
    g.a.out(u32::from(PORT_FAULT), al)?;
    g.a.hlt()
}

/// The end of ring 3's turns by INT and by SYSCALL, and SYSCALL's other service: a loop with
/// interrupts on.
fn write_ways_out_of_ring_3(g: &mut Draft, labels: &mut Labels) -> Result<(), IcedError> {
    g.entry(INT_PHASE_DONE)?;
    g.a.mov(rsp, STACK0)?;
    g.a.sti()?;
    g.a.jmp(labels.round_done)?;

    let mut service = g.a.create_label();
    bind(g, &mut labels.syscall)?;
    g.a.mov(qword_ptr(USER_RSP), rsp)?;
    g.a.mov(rsp, STACK0)?;
    g.a.test(eax, eax)?;
    g.a.jz(service)?;
    g.a.sti()?;
    g.a.jmp(labels.round_done)?;
    bind(g, &mut service)?;
    g.a.push(rcx)?;
    g.a.push(r11)?;
    g.a.sti()?;
    g.a.mov(ecx, 9u32)?;
    let again = here(g)?;
    g.a.add(edx, ecx)?;
    g.a.dec(ecx)?;
    g.a.jnz(again)?;
    g.a.cli()?;
    g.a.pop(r11)?;
    g.a.pop(rcx)?;
    g.a.mov(rsp, qword_ptr(USER_RSP))?;
    g.a.sysretq()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_torture_assembles_for_each_choice_and_its_pages_stand_apart() {
        for (reach, timer_ticks) in [
            (Reach::Emulated, None),
            (Reach::Kernel, Some(1)),
            (Reach::Both, None),
            (Reach::Both, Some(1193)),
        ] {
            let guest = torture(Torture {
                seed: 1,
                rounds: 1,
                reach,
                timer_ticks,
            });
            let end = FRAMES + 4096 * PAGE_COUNT;
            assert!(end <= crate::layout::RAM_BYTES);
            for (at, bytes) in guest.image() {
                let last = at + bytes.len() as u64;
                assert!(last <= FRAMES && (last <= PAGE_TABLE || at >= PAGE_TABLE + 4096));
            }
            assert!(guest.place("turn") > guest.place("interrupt"));
        }
    }
}

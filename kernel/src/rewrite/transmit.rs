//! Where Linux's serial console waits for the transmitter before a byte, and need not.
//!
//! Its 8250 driver reads the line status before each byte that it prints while nobody has opened the port, and
//! before each sixteen from then on (drivers/tty/serial/8250/8250_port.c). Each is an exit, and the answer is
//! the same each time: this machine's transmitter takes a byte at once. So the calls of these
//! waits give way to an instruction of the same length that does what they come to:
//!
//! ```text
//!         mov  esi, UART_LSR_THRE             mov  esi, UART_LSR_THRE
//!         call wait_for_lsr           ->      mov  eax, 1
//! ```
//!
//! (The functions return nothing, or since 6.13 whether the transmitter is ready.) The wait after each message,
//! for a transmitter that has sent everything, is left as it is: at that exit what was printed is shown.

use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, Register};

use crate::image::Elf;
use crate::rewrite::named::Named;
use crate::symbols::kallsyms::Symbols;

/// The functions that wait, for what their second argument says.
const WAITS: [&str; 2] = ["wait_for_lsr", "wait_for_xmitr"];
/// The holding register is empty (Linux, include/uapi/linux/serial_reg.h).
const UART_LSR_THRE: u64 = 0x20;
/// The argument is set this close to the call, in bytes.
const NEAR: u64 = 32;

/// `mov eax, 1`.
pub(super) const READY: [u8; 5] = [0xb8, 1, 0, 0, 0];

/// Looks for the calls while a kernel's code is decoded from the first byte to the last.
#[derive(Debug)]
pub(super) struct Transmits {
    functions: Vec<u64>,
    info: InstructionInfoFactory,
    /// Where the second argument was last set to what is looked for.
    set: Option<u64>,
    /// There, and the call after it.
    found: Vec<(u64, u64)>,
}

impl Transmits {
    /// For this kernel; finds nothing in one without symbols.
    pub(super) fn of(elf: &Elf<'_>) -> Transmits {
        let lookup = |symbols: Symbols<'_>| {
            let functions = WAITS.iter().filter_map(|name| symbols.lookup(name));
            functions.collect()
        };
        Transmits::to(Symbols::find(elf.file()).map(lookup).unwrap_or_default())
    }

    fn to(functions: Vec<u64>) -> Transmits {
        Transmits {
            functions,
            info: InstructionInfoFactory::new(),
            set: None,
            found: Vec::new(),
        }
    }

    /// The next instruction.
    pub(super) fn see(&mut self, instruction: &Instruction) {
        if instruction.code() == Code::Mov_r32_imm32 && instruction.op0_register() == Register::ESI
        {
            let wanted = u64::from(instruction.immediate32()) == UART_LSR_THRE;
            self.set = wanted.then_some(instruction.ip());
            return;
        }
        let Some(set) = self.set else {
            return;
        };
        if instruction.code() == Code::Call_rel32_64
            && self.functions.contains(&instruction.near_branch_target())
            && instruction.ip().wrapping_sub(set) < NEAR
        {
            self.found.push((set, instruction.ip()));
        }
        let changed = self
            .info
            .info(instruction)
            .used_registers()
            .iter()
            .any(|used| {
                use iced_x86::OpAccess::{CondRead, NoMemAccess, None as Nothing, Read};
                used.register().full_register() == Register::RSI
                    && !matches!(used.access(), Nothing | NoMemAccess | Read | CondRead)
            });
        if changed || instruction.flow_control() != FlowControl::Next {
            self.set = None;
        }
    }

    /// Virtual addresses of the calls that nothing leads to but the setting of their argument.
    pub(super) fn finish(self, named: &Named) -> Vec<u64> {
        let alone = |(set, call): &(u64, u64)| !(set + 1..=*call).any(|at| named.contains(at));
        let calls = self.found.iter().filter(|found| alone(found));
        calls.map(|(_, call)| *call).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::traps;
    use crate::testing::{TINY_VIRTUAL, tiny_elf_with};

    const TEXT: usize = 48;
    /// Where the function stands in the text.
    const WAIT: u64 = 40;

    /// `call WAIT`, to be put at this offset.
    fn call(at: u64) -> [u8; 5] {
        let [a, b, c, d] = (WAIT as u32).wrapping_sub(at as u32 + 5).to_le_bytes();
        [0xe8, a, b, c, d]
    }

    /// The offsets of the calls that are found in this code.
    fn found(code: &[u8]) -> Vec<u64> {
        let mut image = code.to_vec();
        image.extend([0x0f, 0x31]);
        image.resize(TEXT, 0x90);
        let file = tiny_elf_with(&image, &[(".text", 0, TEXT)]);
        let elf = Elf::parse(&file).unwrap();
        let mut named = Named::by_data(&elf);
        let mut transmits = Transmits::to(vec![TINY_VIRTUAL + WAIT]);
        let mut see = |instruction: &Instruction| {
            named.see(instruction);
            transmits.see(instruction);
        };
        traps::find_and_show(&elf, &[], &mut see).unwrap();
        let calls = transmits.finish(&named).into_iter();
        calls.map(|call| call - TINY_VIRTUAL).collect()
    }

    const THRE: [u8; 5] = [0xbe, 0x20, 0, 0, 0];

    #[test]
    fn a_wait_for_the_holding_register_is_found() {
        assert_eq!(found(&[&THRE[..], &call(5)].concat()), [5]);
        // push rbx; mov rbx, rdi
        let between = [0x53, 0x48, 0x89, 0xfb];
        assert_eq!(found(&[&THRE[..], &between, &call(9)].concat()), [9]);
    }

    #[test]
    fn other_waits_stay() {
        let both_empty = [0xbe, 0x60, 0, 0, 0];
        let elsewhere = [0xe8, 0, 0, 0, 0];
        let changed = [0x31, 0xf6, 0x90, 0x90]; // xor esi, esi
        let jumped_to = [0xeb, 0x00]; // jmp to the call
        let jumped_over = [0x74, 0x00]; // je to the call
        for code in [
            call(0).to_vec(),
            [&both_empty[..], &call(5)].concat(),
            [&THRE[..], &elsewhere].concat(),
            [&THRE[..], &changed, &call(9)].concat(),
            [&THRE[..], &jumped_to, &call(7)].concat(),
            [&THRE[..], &jumped_over, &call(7)].concat(),
            [&[0xeb, 0x05][..], &THRE, &call(7)].concat(),
        ] {
            assert!(found(&code).is_empty(), "{code:02x?}");
        }
    }
}

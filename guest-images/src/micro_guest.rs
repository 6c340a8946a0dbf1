//! A micro-guest: code, data, and the tables under them.

use std::collections::BTreeMap;

use iced_x86::code_asm::{CodeAssembler, CodeLabel, al, eax, ptr, rdx};
use iced_x86::{BlockEncoderOptions, IcedError};

use crate::layout::{
    CODE, DATA, DESCRIPTORS, ENTRIES, GDT, IDT, INTERRUPT_STACK, KERNEL_CS, PAGE_DIRECTORY, PDPT,
    PML4, PORT_DONE, PORT_FAULT, PORT_MARK, STACK0, STACK3, TASK, TSS, TSS_BYTES, USER_CS, USER_SS,
};

/// A privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// Ring 0.
    Kernel,
    /// Ring 3.
    User,
}

/// A few instructions, and what they need to run.
#[derive(Clone, Debug)]
pub struct MicroGuest {
    /// Machine code, at [`CODE`].
    pub code: Vec<u8>,
    /// What is at [`DATA`] when it starts.
    pub data: Vec<u8>,
    /// The ring it starts in, with interrupts off.
    pub ring: Ring,
    places: BTreeMap<&'static str, u64>,
    entries: BTreeMap<u8, u64>,
}

impl MicroGuest {
    /// Assembles what `write` writes.
    pub(crate) fn assemble(
        ring: Ring,
        write: impl FnOnce(&mut Draft) -> Result<(), IcedError>,
    ) -> MicroGuest {
        let finish = || {
            let mut draft = Draft {
                a: CodeAssembler::new(64)?,
                ring,
                data: Vec::new(),
                places: Vec::new(),
                entries: Vec::new(),
            };
            write(&mut draft)?;
            let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
            let result = draft.a.assemble_options(CODE, options)?;
            let mut places = BTreeMap::new();
            for (name, label) in &draft.places {
                let before = places.insert(*name, result.label_ip(label)?);
                assert!(before.is_none(), "two places are called {name:?}");
            }
            let mut entries = BTreeMap::new();
            for (vector, label) in &draft.entries {
                entries.insert(*vector, result.label_ip(label)?);
            }
            let code = result.inner.code_buffer;
            Ok::<_, IcedError>(MicroGuest {
                code,
                data: draft.data,
                ring,
                places,
                entries,
            })
        };
        finish().expect("the instructions of a micro-guest exist")
    }

    /// Address of the instruction that the guest's author called `name`; its documentation says
    /// which there are.
    pub fn place(&self, name: &str) -> u64 {
        *self
            .places
            .get(name)
            .unwrap_or_else(|| panic!("the guest has no place {name:?}"))
    }

    /// Everything that must be written to memory: guest-physical address and bytes.
    pub fn image(&self) -> Vec<(u64, Vec<u8>)> {
        assert!(
            CODE + self.code.len() as u64 <= ENTRIES,
            "the code overruns the entries"
        );
        assert!(
            DATA + self.data.len() as u64 <= CODE,
            "the data overruns the code"
        );
        let entries = default_entries();
        let mut gates = Vec::new();
        for vector in 0..=255u8 {
            let entry = self.entries.get(&vector).copied();
            gates.extend(gate(entry.unwrap_or(entry_address(vector))));
        }
        vec![
            (GDT, words(&descriptors())),
            (IDT, gates),
            (TSS, task_state()),
            // Present, writable, for both rings; the last level in 2 MiB pages, all of them
            // accessed and dirty, so that no CPU needs to write to the tables.
            (PML4, words(&[PDPT | 0x27])),
            (PDPT, words(&[PAGE_DIRECTORY | 0x27])),
            (
                PAGE_DIRECTORY,
                words(&std::array::from_fn::<u64, 512, _>(|i| {
                    (i as u64) << 21 | 0xe7
                })),
            ),
            (DATA, self.data.clone()),
            (CODE, self.code.clone()),
            (ENTRIES, entries),
        ]
    }

    /// CS, SS and RSP to start with.
    pub fn start(&self) -> (u16, u16, u64) {
        match self.ring {
            Ring::Kernel => (KERNEL_CS, crate::layout::KERNEL_SS, STACK0),
            Ring::User => (USER_CS, USER_SS, STACK3),
        }
    }
}

/// A micro-guest that is being written.
pub(crate) struct Draft {
    /// Where the instructions go.
    pub a: CodeAssembler,
    /// What is at [`DATA`].
    pub data: Vec<u8>,
    ring: Ring,
    places: Vec<(&'static str, CodeLabel)>,
    entries: Vec<(u8, CodeLabel)>,
}

impl Draft {
    /// Names the next instruction.
    pub fn place(&mut self, name: &'static str) -> Result<CodeLabel, IcedError> {
        let mut label = self.a.create_label();
        self.a.set_label(&mut label)?;
        self.places.push((name, label));
        Ok(label)
    }

    /// Makes the next instruction the entry of `vector`.
    pub fn entry(&mut self, vector: u8) -> Result<(), IcedError> {
        let mut label = self.a.create_label();
        self.a.set_label(&mut label)?;
        self.entries.push((vector, label));
        Ok(())
    }

    /// Ends the guest, in the ring it started in.
    pub fn done(&mut self) -> Result<(), IcedError> {
        match self.ring {
            Ring::Kernel => self.done_in_ring_0(),
            Ring::User => self.a.ud2(),
        }
    }

    /// Ends the guest from ring 0.
    pub fn done_in_ring_0(&mut self) -> Result<(), IcedError> {
        self.a.out(u32::from(PORT_DONE), al)?;
        self.a.hlt()
    }

    /// Shows itself at [`PORT_MARK`]. Ring 0 only.
    pub fn mark(&mut self) -> Result<(), IcedError> {
        self.a.out(u32::from(PORT_MARK), al)
    }

    /// Writes an MSR, by way of RCX, RDX and RAX. Ring 0 only.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), IcedError> {
        use iced_x86::code_asm::ecx;
        self.a.mov(ecx, index)?;
        self.a.mov(eax, value as u32)?;
        self.a.mov(rdx, value >> 32)?;
        self.a.wrmsr()
    }

    /// Loads the address of `label` into a register.
    pub fn address(
        &mut self,
        register: iced_x86::code_asm::AsmRegister64,
        label: CodeLabel,
    ) -> Result<(), IcedError> {
        self.a.lea(register, ptr(label))
    }
}

/// Bytes from one default entry to the next.
const ENTRY_BYTES: u64 = 16;

fn entry_address(vector: u8) -> u64 {
    ENTRIES + u64::from(vector) * ENTRY_BYTES
}

/// Vectors for which the CPU pushes an error code (Intel SDM vol. 3, 6.13; AMD APM vol. 2, 8.4).
fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

/// The default entries.
fn default_entries() -> Vec<u8> {
    let shared = entry_address(255) + ENTRY_BYTES;
    let mut code = Vec::new();
    for vector in 0..=255u8 {
        // push 0 where the CPU pushes no error code; push vector; jmp shared.
        let start = code.len();
        if !has_error_code(vector) {
            code.extend([0x6a, 0]);
        }
        code.push(0x68);
        code.extend(u32::from(vector).to_le_bytes());
        code.push(0xe9);
        let next = ENTRIES + code.len() as u64 + 4;
        code.extend(((shared - next) as u32).to_le_bytes());
        code.resize(start + ENTRY_BYTES as usize, 0x90);
    }
    // out %al; hlt; and once more should the host let the guest go on.
    code.extend([0xe6, PORT_FAULT as u8, 0xf4, 0xeb, 0xfb]);
    code
}

/// An interrupt gate that any ring may call (Intel SDM vol. 3, 6.14.1).
fn gate(entry: u64) -> Vec<u8> {
    let present_dpl3_interrupt = 0xee00;
    let low = entry & 0xffff
        | u64::from(KERNEL_CS) << 16
        | present_dpl3_interrupt << 32
        | (entry >> 16 & 0xffff) << 48;
    words(&[low, entry >> 32])
}

/// The GDT (Intel SDM vol. 3, 3.4.5 and 8.2.3).
fn descriptors() -> [u64; DESCRIPTORS as usize] {
    let (code, data, dpl3) = (0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 3 << 45);
    let mut table = [0; DESCRIPTORS as usize];
    table[usize::from(KERNEL_CS / 8)] = code;
    table[usize::from(crate::layout::KERNEL_SS / 8)] = data;
    table[usize::from(USER_SS / 8)] = data | dpl3;
    table[usize::from(USER_CS / 8)] = code | dpl3;
    // Busy, as a TSS is once it is loaded.
    table[usize::from(TASK / 8)] = (TSS_BYTES - 1) | (TSS & 0xff_ffff) << 16 | 0x8b << 40;
    table
}

fn task_state() -> Vec<u8> {
    let mut tss = vec![0; TSS_BYTES as usize];
    tss[4..12].copy_from_slice(&INTERRUPT_STACK.to_le_bytes());
    // The I/O permission map begins after the end: ring 3 has no ports.
    tss[102..104].copy_from_slice(&(TSS_BYTES as u16).to_le_bytes());
    tss
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::RAM_BYTES;

    #[test]
    fn the_pieces_of_an_image_stand_apart_and_inside_the_ram() {
        let mut pieces = crate::micro::halt().image();
        pieces.sort_by_key(|(address, _)| *address);
        let mut end = 0;
        for (address, bytes) in pieces {
            assert!(
                address >= end,
                "{address:#x} overlaps what ends at {end:#x}"
            );
            end = address + bytes.len() as u64;
        }
        assert!(end <= STACK0 - 0x1000 && INTERRUPT_STACK <= RAM_BYTES);
    }

    #[test]
    fn every_default_entry_leads_to_the_fault_port() {
        let code = default_entries();
        for vector in 0..=255u8 {
            let at = (entry_address(vector) - ENTRIES) as usize;
            let push = at + if has_error_code(vector) { 0 } else { 2 };
            assert_eq!(code[push..push + 2], [0x68, vector]);
            let jump = i32::from_le_bytes(code[push + 6..push + 10].try_into().unwrap());
            let target = push as i64 + 10 + i64::from(jump);
            assert_eq!(code[target as usize..][..2], [0xe6, PORT_FAULT as u8]);
        }
    }

    #[test]
    fn a_gate_gives_back_its_address() {
        let bytes = gate(0x1234_5678_9abc_def0);
        let low = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let high = u64::from_le_bytes(bytes[8..].try_into().unwrap());
        let entry = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        assert_eq!(entry, 0x1234_5678_9abc_def0);
    }

    #[test]
    fn places_are_addresses_of_instructions() {
        let guest = crate::micro::breakpoint(Ring::Kernel);
        let at = (guest.place("target") - CODE) as usize;
        assert_eq!(guest.code[at..at + 2], [0xff, 0xc0], "inc %eax");
    }
}

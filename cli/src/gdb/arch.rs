//! The registers of the guest as gdb knows them.
//!
//! gdb learns them from a description that the target gives (Debugging with GDB, appendix G): those of its own features
//! for x86-64, and the system registers as a feature of ours, under the names that QEMU gives them.

use std::fmt::Write;
use std::sync::LazyLock;

use gdbstub::arch;
use hindsight_vmm::kvm::GuestRegisters;

/// The registers in the order of gdb's features: general ones by their number in [`GuestRegisters::general`].
const GENERAL: [(&str, usize, &str); 18] = [
    ("rax", 0, "int64"),
    ("rbx", 1, "int64"),
    ("rcx", 2, "int64"),
    ("rdx", 3, "int64"),
    ("rsi", 4, "int64"),
    ("rdi", 5, "int64"),
    ("rbp", 7, "data_ptr"),
    ("rsp", 6, "data_ptr"),
    ("r8", 8, "int64"),
    ("r9", 9, "int64"),
    ("r10", 10, "int64"),
    ("r11", 11, "int64"),
    ("r12", 12, "int64"),
    ("r13", 13, "int64"),
    ("r14", 14, "int64"),
    ("r15", 15, "int64"),
    ("rip", 16, "code_ptr"),
    ("eflags", 17, "i386_eflags"),
];
const SEGMENTS: [&str; 6] = ["cs", "ss", "ds", "es", "fs", "gs"];
/// x87's control registers, of 32 bits each.
const X87: [&str; 8] = [
    "fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop",
];
const SYSTEM: [&str; 7] = ["k_gs_base", "cr0", "cr2", "cr3", "cr4", "cr8", "efer"];
/// The system call that a program is in, as Linux says it. Without this register gdb takes the target for no Linux, and
/// looks for no shared libraries. It is none: gdb writes that itself before it calls a function.
const ORIG_RAX: u64 = u64::MAX;
/// EFLAGS and segments have 32 bits here.
const EFLAGS: usize = 17;

/// In an FXSAVE area (Intel SDM vol. 1, table 10-2).
const ST0: usize = 32;
const XMM0: usize = 160;
const MXCSR: usize = 24;

/// x86-64 with system registers.
#[derive(Debug)]
pub(crate) struct Guest64;

/// All registers, in the order of the description.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Registers {
    rip: u64,
    bytes: Vec<u8>,
}

impl Registers {
    pub(super) fn of(guest: &GuestRegisters) -> Registers {
        let mut bytes = Vec::new();
        for (_, place, _) in GENERAL {
            let value = guest.general.0[place].to_le_bytes();
            bytes.extend(if place == EFLAGS { &value[..4] } else { &value });
        }
        for selector in guest.segments {
            bytes.extend(u32::from(selector).to_le_bytes());
        }
        for number in 0..8 {
            bytes.extend(&guest.fpu[ST0 + 16 * number..][..10]);
        }
        for value in x87(&guest.fpu) {
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(&guest.fpu[XMM0..XMM0 + 16 * 16]);
        bytes.extend(&guest.fpu[MXCSR..MXCSR + 4]);
        bytes.extend(ORIG_RAX.to_le_bytes());
        for base in [guest.fs_base, guest.gs_base] {
            bytes.extend(base.to_le_bytes());
        }
        let system = [
            guest.kernel_gs_base,
            guest.cr0,
            guest.cr2,
            guest.cr3,
            guest.cr4,
            guest.cr8,
            guest.efer,
        ];
        for value in system {
            bytes.extend(value.to_le_bytes());
        }
        Registers {
            rip: guest.general.rip(),
            bytes,
        }
    }
}

/// Takes one value after the other.
struct Values<'a>(&'a [u8]);

impl Values<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (value, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*value)
    }

    fn long(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn quad(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl Registers {
    /// What `present` becomes if all these are written to it; `None` if they are not all there.
    pub(super) fn written_to(&self, present: &GuestRegisters) -> Option<GuestRegisters> {
        let (mut guest, mut values) = (present.clone(), Values(&self.bytes));
        for (_, place, _) in GENERAL {
            guest.general.0[place] = match place {
                EFLAGS => values.long()?.into(),
                _ => values.quad()?,
            };
        }
        for selector in &mut guest.segments {
            *selector = values.long()? as u16;
        }
        for number in 0..8 {
            let register: [u8; 10] = values.take()?;
            guest.fpu[ST0 + 16 * number..][..10].copy_from_slice(&register);
        }
        let mut controls = [0; X87.len()];
        for value in &mut controls {
            *value = values.long()?;
        }
        if controls != x87(&present.fpu) {
            put_x87(controls, &mut guest.fpu);
        }
        let sse: [u8; 16 * 16 + 4] = values.take()?;
        guest.fpu[XMM0..XMM0 + 16 * 16].copy_from_slice(&sse[..16 * 16]);
        guest.fpu[MXCSR..MXCSR + 4].copy_from_slice(&sse[16 * 16..]);
        let _orig_rax = values.quad()?;
        for value in [
            &mut guest.fs_base,
            &mut guest.gs_base,
            &mut guest.kernel_gs_base,
            &mut guest.cr0,
            &mut guest.cr2,
            &mut guest.cr3,
            &mut guest.cr4,
            &mut guest.cr8,
            &mut guest.efer,
        ] {
            *value = values.quad()?;
        }
        Some(guest)
    }
}

/// Puts x87's control registers, as gdb has them, into an FXSAVE area. Of tags that has no more than whether a register is
/// empty.
fn put_x87(
    [control, status, tags, fiseg, fioff, foseg, fooff, opcode]: [u32; 8],
    fpu: &mut [u8; 512],
) {
    let used = (0..8).filter(|register| tags >> (2 * register) & 3 != 3);
    let used: u32 = used.map(|register| 1 << register).sum();
    let words = [
        (0, control),
        (2, status),
        (4, used),
        (6, opcode),
        (8, fioff),
        (10, fioff >> 16),
        (12, fiseg),
        (16, fooff),
        (18, fooff >> 16),
        (20, foseg),
    ];
    for (at, value) in words {
        fpu[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }
}

/// x87's control registers as gdb wants them, out of an FXSAVE area.
fn x87(fpu: &[u8; 512]) -> [u32; 8] {
    let word = |at: usize| u32::from(u16::from_le_bytes([fpu[at], fpu[at + 1]]));
    let long = |at: usize| word(at) | word(at + 2) << 16;
    let top = word(2) >> 11 & 7;
    let tag = |register: u32| {
        if fpu[4] >> register & 1 == 0 {
            return 3;
        }
        let at = ST0 + 16 * (register.wrapping_sub(top) & 7) as usize;
        let mantissa = u64::from(long(at + 4)) << 32 | u64::from(long(at));
        match (word(at + 8) & 0x7fff, mantissa) {
            (0, 0) => 1,
            (1..0x7fff, mantissa) if mantissa >> 63 != 0 => 0,
            _ => 2,
        }
    };
    let tags = (0..8).map(|register| tag(register) << (2 * register)).sum();
    [
        word(0),
        word(2),
        tags,
        word(12),
        long(8),
        word(20),
        long(16),
        word(6),
    ]
}

impl arch::Registers for Registers {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        for byte in &self.bytes {
            write_byte(Some(*byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.bytes = bytes.to_vec();
        Ok(())
    }
}

impl arch::Arch for Guest64 {
    type Usize = u64;
    type Registers = Registers;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        static XML: LazyLock<String> = LazyLock::new(description);
        Some(&XML)
    }
}

/// The description of the registers.
fn description() -> String {
    let mut xml = String::from(
        "<?xml version=\"1.0\"?><!DOCTYPE target SYSTEM \"gdb-target.dtd\"><target>\
         <architecture>i386:x86-64</architecture><feature name=\"org.gnu.gdb.i386.core\">\
         <flags id=\"i386_eflags\" size=\"4\">",
    );
    let flags = [
        ("CF", 0),
        ("PF", 2),
        ("AF", 4),
        ("ZF", 6),
        ("SF", 7),
        ("TF", 8),
        ("IF", 9),
        ("DF", 10),
        ("OF", 11),
        ("NT", 14),
        ("RF", 16),
        ("VM", 17),
        ("AC", 18),
        ("ID", 21),
    ];
    let mut add = |text: String| xml.push_str(&text);
    for (name, bit) in flags {
        add(format!(
            "<field name=\"{name}\" start=\"{bit}\" end=\"{bit}\"/>"
        ));
    }
    add("</flags>".into());
    let register = |name: &str, bits: u32, kind: &str| {
        let group = match kind {
            "float" => " group=\"float\"",
            _ => "",
        };
        let kind = if kind == "float" { "int" } else { kind };
        format!("<reg name=\"{name}\" bitsize=\"{bits}\" type=\"{kind}\"{group}/>")
    };
    for (name, place, kind) in GENERAL {
        let bits = if place == EFLAGS { 32 } else { 64 };
        add(register(name, bits, kind));
    }
    for name in SEGMENTS {
        add(register(name, 32, "int32"));
    }
    for number in 0..8 {
        add(register(&format!("st{number}"), 80, "i387_ext"));
    }
    for name in X87 {
        add(register(name, 32, "float"));
    }
    add("</feature><feature name=\"org.gnu.gdb.i386.sse\">\
         <vector id=\"v4f\" type=\"ieee_single\" count=\"4\"/>\
         <vector id=\"v2d\" type=\"ieee_double\" count=\"2\"/>\
         <vector id=\"v16i8\" type=\"int8\" count=\"16\"/>\
         <vector id=\"v8i16\" type=\"int16\" count=\"8\"/>\
         <vector id=\"v4i32\" type=\"int32\" count=\"4\"/>\
         <vector id=\"v2i64\" type=\"int64\" count=\"2\"/>\
         <union id=\"vec128\"><field name=\"v4_float\" type=\"v4f\"/>\
         <field name=\"v2_double\" type=\"v2d\"/><field name=\"v16_int8\" type=\"v16i8\"/>\
         <field name=\"v8_int16\" type=\"v8i16\"/><field name=\"v4_int32\" type=\"v4i32\"/>\
         <field name=\"v2_int64\" type=\"v2i64\"/><field name=\"uint128\" type=\"uint128\"/></union>"
        .into());
    for number in 0..16 {
        add(register(&format!("xmm{number}"), 128, "vec128"));
    }
    add(register("mxcsr", 32, "int"));
    add("</feature><feature name=\"org.gnu.gdb.i386.linux\">".into());
    add(register("orig_rax", 64, "int"));
    add("</feature><feature name=\"org.gnu.gdb.i386.segments\">".into());
    for name in ["fs_base", "gs_base"] {
        add(register(name, 64, "int"));
    }
    add("</feature><feature name=\"org.hindsight.system\">".into());
    for name in SYSTEM {
        add(register(name, 64, "int64"));
    }
    write!(xml, "</feature></target>").expect("a String takes everything");
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_are_as_long_as_the_description_says() {
        let xml = description();
        let bits = xml.split("bitsize=\"").skip(1).map(|rest| {
            let (bits, _) = rest.split_once('"').expect("a number in quotes");
            bits.parse::<usize>().expect("a number")
        });
        let registers = Registers::of(&GuestRegisters {
            general: hindsight_replay::Registers::default(),
            segments: [0; 6],
            fs_base: 0,
            gs_base: 0,
            kernel_gs_base: 0,
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            fpu: [0; 512],
        });
        assert_eq!(8 * registers.bytes.len(), bits.sum::<usize>());
    }

    #[test]
    fn registers_that_are_written_are_those_that_are_read() {
        let mut rng = hindsight_replay::rng::Rng::new(1, 1);
        let mut random = || {
            let mut guest = GuestRegisters {
                general: hindsight_replay::Registers([0; 18].map(|_: u64| rng.number())),
                segments: [0; 6].map(|_: u16| rng.number() as u16),
                fs_base: rng.number(),
                gs_base: rng.number(),
                kernel_gs_base: rng.number(),
                cr0: rng.number(),
                cr2: rng.number(),
                cr3: rng.number(),
                cr4: rng.number(),
                cr8: rng.number(),
                efer: rng.number(),
                fpu: [0; 512].map(|_: u8| rng.number() as u8),
            };
            guest.general.0[EFLAGS] &= 0xffff_ffff;
            guest
        };
        for _ in 0..100 {
            let (written, present) = (random(), random());
            let registers = Registers::of(&written);
            assert_eq!(registers.written_to(&written), Some(written.clone()));
            let becomes = registers.written_to(&present).expect("they are all there");
            assert_eq!(Registers::of(&becomes), registers);
            let short = Registers {
                rip: 0,
                bytes: registers.bytes[1..].to_vec(),
            };
            assert_eq!(short.written_to(&present), None);
        }
    }

    #[test]
    fn tags_of_x87_registers_are_those_of_their_contents() {
        let mut fpu = [0; 512];
        // TOP is 6: ST0 is register 6. It holds 1, ST1 zero.
        (fpu[3], fpu[4]) = (6 << 3, 0b1100_0000);
        fpu[ST0 + 7] = 0x80;
        fpu[ST0 + 8..ST0 + 10].copy_from_slice(&[0xff, 0x3f]);
        assert_eq!(x87(&fpu)[2], 0b0100_1111_1111_1111);
    }
}

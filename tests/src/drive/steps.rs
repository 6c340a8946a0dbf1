//! Steps that need no driver: any access, input from outside, time.

use arbitrary::{Result, Unstructured};
use hindsight_devices::{Access, FRAME_BYTES_MAX, FRAME_BYTES_MIN, Input, Nanos, Width};

use super::Target;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step {
    /// The guest accesses something outside its memory.
    Access(Access),
    /// The guest writes to its memory.
    Put { gpa: u64, bytes: Vec<u8> },
    /// Something comes from outside.
    Input(Input),
    /// Time passes.
    Wait(Nanos),
    /// Time passes until a timer has something to do.
    ToDeadline,
    /// The CPU takes an interrupt.
    Acknowledge,
    /// The copy of the board is saved, and goes on as a board that was restored.
    Restore,
}

/// A step of those that every board has a use for, mostly where `target` has its devices.
pub fn plain(target: Target, bytes: &mut Unstructured<'_>) -> Result<Step> {
    Ok(match bytes.int_in_range(0..=15u8)? {
        0 => Step::Wait(bytes.int_in_range(0..=5_000)?),
        1 => Step::Wait(bytes.int_in_range(0..=5_000_000)?),
        2 => Step::Wait(match bytes.arbitrary()? {
            true => bytes.arbitrary()?,
            false => bytes.int_in_range(0..=200_000_000_000_000)?,
        }),
        3 => Step::ToDeadline,
        4 | 5 => Step::Acknowledge,
        6 => Step::Restore,
        7 => Step::Input(input(target, bytes)?),
        8 if target.is_virtio() => Step::Input(input(target, bytes)?),
        _ => Step::Access(access(target, bytes)?),
    })
}

impl Target {
    fn is_virtio(self) -> bool {
        !matches!(self, Target::Legacy | Target::Apic | Target::Journal)
    }
}

/// The width of an access.
pub fn width(bytes: &mut Unstructured<'_>) -> Result<Width> {
    Ok(match bytes.int_in_range(0..=15u8)? {
        0 | 1 => Width::Byte,
        2 => Width::Word,
        3 => Width::Qword,
        _ => Width::Dword,
    })
}

/// A value; small ones and single bits come up often.
pub fn value(bytes: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match bytes.int_in_range(0..=3u8)? {
        0 => bytes.arbitrary::<u8>()?.into(),
        1 => 1 << bytes.int_in_range(0..=63u8)?,
        2 => bytes.arbitrary::<u32>()?.into(),
        _ => bytes.arbitrary()?,
    })
}

fn input(target: Target, bytes: &mut Unstructured<'_>) -> Result<Input> {
    let kind = match target {
        Target::Net => 5,
        Target::Entropy => 6,
        Target::Console => bytes.int_in_range(3..=4u8)?,
        _ => bytes.int_in_range(0..=7u8)?,
    };
    let mut some = |most: usize| {
        let count = bytes.int_in_range(0..=most)?;
        bytes.bytes(count.min(bytes.len())).map(<[u8]>::to_vec)
    };
    Ok(match kind {
        0 => Input::WallClock {
            unix_seconds: value(bytes)?,
        },
        1 => Input::Console(some(200)?),
        2 => Input::PowerButton,
        3 => Input::VirtioConsole(some(200)?),
        4 => Input::Resize {
            columns: bytes.arbitrary()?,
            rows: bytes.arbitrary()?,
        },
        5 => {
            let length = match bytes.int_in_range(0..=3u8)? {
                0 => bytes.int_in_range(FRAME_BYTES_MIN..=FRAME_BYTES_MAX)?,
                _ => bytes.int_in_range(FRAME_BYTES_MIN..=1514)?,
            };
            Input::Frame(vec![0x45; length])
        }
        6 => Input::Entropy(some(64)?),
        _ => Input::Stop,
    })
}

fn access(target: Target, bytes: &mut Unstructured<'_>) -> Result<Access> {
    let kind = match target {
        Target::Apic => bytes.int_in_range(0..=9u8)?,
        Target::Legacy => bytes.int_in_range(0..=4u8)?,
        _ => bytes.int_in_range(0..=5u8)?,
    };
    Ok(match kind {
        0 => Access::PortRead {
            port: port(target, bytes)?,
            width: port_width(bytes)?,
        },
        1..=3 => Access::PortWrite {
            port: port(target, bytes)?,
            width: port_width(bytes)?,
            value: value(bytes)? as u32,
        },
        4 => Access::MemoryRead {
            gpa: gpa(bytes)?,
            width: width(bytes)?,
        },
        5 | 6 => Access::MemoryWrite {
            gpa: gpa(bytes)?,
            width: width(bytes)?,
            value: register(bytes)?,
        },
        7 => Access::MsrRead { index: msr(bytes)? },
        _ => Access::MsrWrite {
            index: msr(bytes)?,
            value: register(bytes)?,
        },
    })
}

/// Ports are bytes, mostly; an access of 8 bytes to one does not exist.
fn port_width(bytes: &mut Unstructured<'_>) -> Result<Width> {
    Ok(match bytes.int_in_range(0..=7u8)? {
        0 => Width::Word,
        1 => Width::Dword,
        _ => Width::Byte,
    })
}

fn port(target: Target, bytes: &mut Unstructured<'_>) -> Result<u16> {
    let kind = match target {
        Target::Apic => bytes.int_in_range(4..=6u8)?,
        _ => bytes.int_in_range(0..=6u8)?,
    };
    Ok(match kind {
        0 => bytes.int_in_range(0x40..=0x43)?,
        1 => bytes.int_in_range(0x70..=0x71)?,
        2 => bytes.int_in_range(0x3f8..=0x3ff)?,
        3 => *bytes.choose(&[0x60, 0x61, 0x64, 0x92, 0x505, 0xcf8, 0xcf9, 0xcfc])?,
        4 => *bytes.choose(&[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1])?,
        5 => bytes.int_in_range(0x600..=0x60b)?,
        _ => bytes.arbitrary()?,
    })
}

/// Mostly registers of the APICs.
fn gpa(bytes: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match bytes.int_in_range(0..=7u8)? {
        0..=3 => 0xfee0_0000 + 16 * bytes.int_in_range(0..=0x3fu64)?,
        4 | 5 => 0xfec0_0000 + 16 * bytes.int_in_range(0..=1u64)?,
        6 => 0xfee0_0000 + bytes.int_in_range(0..=0xfffu64)?,
        _ => bytes.arbitrary()?,
    })
}

/// What registers of the APICs hold: vectors with modes and masks, states of IA32_APIC_BASE.
fn register(bytes: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match bytes.int_in_range(0..=5u8)? {
        0 => bytes.int_in_range(0..=0x3f)?,
        1 => *bytes.choose(&[0xfee0_0900u64, 0xfee0_0d00, 0xfee0_0100, 0x1ff])?,
        2 | 3 => {
            let vector = u64::from(bytes.arbitrary::<u8>()?);
            let modes = u64::from(bytes.arbitrary::<u8>()?);
            vector | (modes & 7) << 8 | (modes >> 3 & 1) << 15 | (modes >> 4) << 16
        }
        _ => value(bytes)?,
    })
}

fn msr(bytes: &mut Unstructured<'_>) -> Result<u32> {
    const KNOWN: [u32; 9] = [
        0x10,
        0x17,
        0x3b,
        0x79,
        0x8b,
        0x1a0,
        0xc001_0015,
        0xc001_1029,
        0xc000_0103,
    ];
    Ok(match bytes.int_in_range(0..=7u8)? {
        0 | 1 => *bytes.choose(&KNOWN)?,
        2 | 3 => *bytes.choose(&[0x1b, 0x6e0])?,
        4..=6 => bytes.int_in_range(0x800..=0x83f)?,
        _ => bytes.arbitrary()?,
    })
}

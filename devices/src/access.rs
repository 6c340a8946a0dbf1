//! The values that cross between the guest and its devices.

use serde::{Deserialize, Serialize};

/// Guest time in nanoseconds since the machine was switched on.
pub type Nanos = u64;

/// How many bytes an access moves: 1, 2, 4 or 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Width {
    /// One byte.
    Byte,
    /// Two bytes.
    Word,
    /// Four bytes.
    Dword,
    /// Eight bytes (memory-mapped accesses only).
    Qword,
}

impl Width {
    /// The width of `bytes` bytes, or `None` if no access has that width.
    pub fn from_bytes(bytes: usize) -> Option<Width> {
        match bytes {
            1 => Some(Width::Byte),
            2 => Some(Width::Word),
            4 => Some(Width::Dword),
            8 => Some(Width::Qword),
            _ => None,
        }
    }

    /// Width in bytes.
    pub fn bytes(self) -> usize {
        1 << self as usize
    }

    /// All ones in this width: what a bus reads where nobody drives it.
    pub fn ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}

/// One access of the guest to something outside its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// IN.
    PortRead { port: u16, width: Width },
    /// OUT.
    PortWrite { port: u16, width: Width, value: u32 },
    /// A load from a guest-physical address that is not RAM.
    MemoryRead { gpa: u64, width: Width },
    /// A store to a guest-physical address that is not RAM.
    MemoryWrite { gpa: u64, width: Width, value: u64 },
    /// RDMSR of a register that KVM does not keep for the guest.
    MsrRead { index: u32 },
    /// WRMSR to a register that KVM does not keep for the guest.
    MsrWrite { index: u32, value: u64 },
}

/// What the board answers to an [`Access`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// A read's value.
    Value(u64),
    /// A write was taken.
    Done,
    /// The access is illegal: #GP(0) (RDMSR and WRMSR only).
    Fault,
}

/// Something that reaches the machine from outside, at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Wall-clock time at guest time 0, seconds since 1970-01-01 UTC; sets the RTC.
    WallClock { unix_seconds: u64 },
    /// Bytes typed at the console (COM1).
    Console(Vec<u8>),
    /// The operator asks the machine to stop here.
    Stop,
    /// The power button is pressed.
    PowerButton,
    /// Bytes typed at the virtio console (hvc0).
    VirtioConsole(Vec<u8>),
    /// The virtio console's window has this size now.
    Resize { columns: u16, rows: u16 },
    /// A frame that the network card receives, from the destination's address on, without checksum.
    Frame(Vec<u8>),
    /// Random bytes, for the guest asked for some.
    Entropy(Vec<u8>),
}

/// What the machine can take from outside now. More than this is not lost where it is a matter of
/// bytes typed, and is lost where it is a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Bytes typed at the serial console.
    pub console: usize,
    /// Bytes typed at the virtio console.
    pub virtio_console: usize,
    /// Frames.
    pub frames: usize,
    /// Random bytes that the guest has asked for and not got.
    pub entropy: usize,
}

/// Something that leaves the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Bytes from the serial console.
    Console(Vec<u8>),
    /// Bytes from the virtio console.
    VirtioConsole(Vec<u8>),
    /// A frame that the network card sends.
    Frame(Vec<u8>),
}

/// Why the machine went through a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reset {
    /// i8042 command 0xfe (pulse the reset line).
    Keyboard,
    /// Reset control register, port 0xcf9.
    ControlRegister,
    /// Fast reset, port 0x92 bit 0.
    FastReset,
}

//! Where a micro-guest's pieces are in its megabyte of memory, and the ports it speaks through.
//!
//! ```text
//! 0x01000  GDT           0x04000  PML4       0x10000  code, where it starts
//! 0x02000  IDT           0x05000  PDPT       0x2f000  stack of ring 0
//! 0x03000  TSS           0x06000  PD         0x3f000  stack of ring 3
//! 0x08000  data          0x20000  default interrupt entries
//!                                            0x4f000  stack the TSS gives interrupts from ring 3
//! ```
//!
//! The first GiB is mapped one to one in 2 MiB pages that both rings may write, so addresses are
//! the same everywhere; what lies above the RAM is memory-mapped I/O.

/// RAM in bytes.
pub const RAM_BYTES: u64 = 1 << 20;
/// The global descriptor table.
pub const GDT: u64 = 0x1000;
/// The interrupt descriptor table, all 256 gates; ring 3 may call each (DPL 3).
pub const IDT: u64 = 0x2000;
/// The task state segment, 64-bit (Intel SDM vol. 3, 8.7).
pub const TSS: u64 = 0x3000;
/// Length of the TSS in bytes.
pub const TSS_BYTES: u64 = 104;
/// Page map level 4, for CR3.
pub const PML4: u64 = 0x4000;
/// Page directory pointer table.
pub const PDPT: u64 = 0x5000;
/// Page directory of the first GiB.
pub const PAGE_DIRECTORY: u64 = 0x6000;
/// What a guest reads and leaves behind.
pub const DATA: u64 = 0x8000;
/// The code, entered at its first byte.
pub const CODE: u64 = 0x1_0000;
/// The default entries of all 256 vectors.
pub const ENTRIES: u64 = 0x2_0000;
/// Top of the stack that ring 0 starts with.
pub const STACK0: u64 = 0x2_f000;
/// Top of the stack of ring 3.
pub const STACK3: u64 = 0x3_f000;
/// Top of the stack that an interrupt from ring 3 switches to (TSS.RSP0).
pub const INTERRUPT_STACK: u64 = 0x4_f000;
/// An address without RAM.
pub const MMIO: u64 = 0x1000_0000;

/// Ring 0 code, 64 bits.
pub const KERNEL_CS: u16 = 0x08;
/// Ring 0 data.
pub const KERNEL_SS: u16 = 0x10;
/// What SYSRET counts from (STAR\[63:48\]): data at +8, 64-bit code at +16.
pub const USER_BASE: u16 = 0x18 | 3;
/// Ring 3 data.
pub const USER_SS: u16 = 0x20 | 3;
/// Ring 3 code, 64 bits.
pub const USER_CS: u16 = 0x28 | 3;
/// The TSS.
pub const TASK: u16 = 0x30;
/// Descriptors in the GDT, eight bytes each; the TSS takes two.
pub const DESCRIPTORS: u64 = 8;

/// `out %al`: the guest has done what it was made for.
pub const PORT_DONE: u16 = 0xe0;
/// `out %al`: the guest is at a place worth a look.
pub const PORT_MARK: u16 = 0xe1;
/// `out %al`: an interrupt or exception that the guest has no entry for. RSP points to seven
/// words: vector, error code, RIP, CS, RFLAGS, RSP, SS.
pub const PORT_FAULT: u16 = 0xe2;
/// What ends a guest in ring 3, where it may not do OUT: UD2, which shows as vector 6 at
/// [`PORT_FAULT`] with RIP at these bytes. (INT would be plainer, but not every KVM has it.)
pub const DONE_IN_RING_3: [u8; 2] = [0x0f, 0x0b];
/// Ports for the guests' own use, from here on.
pub const PORT_DEVICE: u16 = 0x40;

//! The micro-guests, one function each. What a guest leaves behind is at
//! [`DATA`](crate::layout::DATA), in little-endian words; "place" is a name for
//! [`MicroGuest::place`](crate::MicroGuest::place). Each ends at
//! [`PORT_DONE`](crate::layout::PORT_DONE), or in ring 3 at
//! [`DONE_IN_RING_3`](crate::layout::DONE_IN_RING_3), unless it says otherwise; and an exception it does not
//! speak of shows at [`PORT_FAULT`](crate::layout::PORT_FAULT).

mod attempts;
mod control;
mod counted;
mod cpu;
mod exits;
mod rings;
mod torture;

pub use attempts::{Attempt, Outcome, attempts, outcomes};
pub use control::{NMI_VECTOR, breakpoint, int3, interruptible, straight_line, window};
pub use counted::{COUNTED_VECTOR, counted, counted_branches, dense_branches, locked};
pub use cpu::{
    X87_ENVIRONMENT_BYTES, X87_ENVIRONMENTS, cpuid, hypercall, rdtsc, read_msrs, trap_port,
    write_msr, x87_pointers,
};
pub use exits::{
    branch_loop, dirty_pages, halt, many_outs, memory_mapped, ports, string_ports, triple_fault,
};
pub use rings::{gate, syscall};
pub use torture::{Reach, TORTURE_VECTOR, Torture, Tortured, torture};

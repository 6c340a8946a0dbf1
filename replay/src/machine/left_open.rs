//! What the guest may see that is recorded nowhere.

use serde::{Deserialize, Serialize};

/// What the monitor found out while the guest ran: from here on the guest may have seen something that is recorded
/// nowhere. Each is recorded once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LeftOpen {
    /// The guest runs another kernel than the one that was loaded.
    OtherKernel,
    /// The trap at which modules are rewritten is gone.
    ModuleCall,
    /// The function that loads modules is traced or livepatched.
    ModuleLoader,
    /// A module's text could not be looked at whole.
    ModuleText,
    /// Other traps are gone.
    Traps,
    /// A trap that only its place explains was met elsewhere.
    Copied,
}

impl LeftOpen {
    /// All of them.
    pub const ALL: [LeftOpen; 6] = [
        LeftOpen::OtherKernel,
        LeftOpen::ModuleCall,
        LeftOpen::ModuleLoader,
        LeftOpen::ModuleText,
        LeftOpen::Traps,
        LeftOpen::Copied,
    ];
}

impl std::fmt::Display for LeftOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LeftOpen::OtherKernel => {
                "rdtsc, rdtscp and cpuid of another kernel, which runs in place of the one that was loaded (kexec)"
            }
            LeftOpen::ModuleCall => {
                "rdtsc, rdtscp and cpuid in modules loaded from here on: the call that loads them was changed (a kprobe)"
            }
            LeftOpen::ModuleLoader => {
                "rdtsc, rdtscp and cpuid in modules loaded from here on, if the function that loads them is \
                 livepatched; if it is only traced, nothing"
            }
            LeftOpen::ModuleText => {
                "rdtsc, rdtscp and cpuid in a module whose text could not be read whole, or has too many of them"
            }
            LeftOpen::Traps => "instructions of the kernel that were traps and were changed while it ran (a kprobe)",
            LeftOpen::Copied => {
                "a trap of the kernel's that was copied and ran elsewhere (a kprobe on it), and did nothing there"
            }
        })
    }
}

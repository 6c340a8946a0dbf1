//! A safe view of the page that KVM shares with us for each vCPU (`struct kvm_run`).
//!
//! Every accessor checks the exit reason before it looks into the union, so that a value is never
//! read as what it is not (Linux, Documentation/virt/kvm/api.rst, section 5).

use hindsight_replay::Registers;
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO,
    KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_SYNC_X86_REGS, kvm_regs, kvm_run,
};
use kvm_ioctls::VcpuFd;

/// A port access, as KVM reports it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PortExit {
    /// IN rather than OUT.
    pub read: bool,
    /// The port.
    pub port: u16,
    /// Bytes of each element.
    pub size: usize,
    /// Elements; more than one for string instructions.
    pub count: usize,
    offset: usize,
}

/// An access to an address that is not RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct MmioExit {
    /// Store rather than load.
    pub write: bool,
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes, at most 8.
    pub bytes: usize,
    /// What is stored.
    pub data: [u8; 8],
}

/// The shared page of one vCPU.
#[derive(Debug)]
pub(super) struct RunPage<'a>(&'a mut kvm_run);

impl<'a> RunPage<'a> {
    /// The page of `vcpu`.
    pub(super) fn of(vcpu: &'a mut VcpuFd) -> RunPage<'a> {
        RunPage(vcpu.get_kvm_run())
    }

    /// Why KVM came back.
    pub(super) fn exit_reason(&self) -> u32 {
        self.0.exit_reason
    }

    /// Whether KVM would take an interrupt for the guest now.
    pub(super) fn ready_for_interrupt(&self) -> bool {
        self.0.ready_for_interrupt_injection != 0
    }

    /// Asks KVM to come back as soon as the guest takes interrupts.
    pub(super) fn request_window(&mut self, wanted: bool) {
        self.0.request_interrupt_window = wanted.into();
    }

    /// Whether that was asked for.
    pub(super) fn wants_window(&self) -> bool {
        self.0.request_interrupt_window != 0
    }

    /// Sets CR8, which KVM takes over when the vCPU runs next.
    pub(super) fn set_cr8(&mut self, cr8: u64) {
        self.0.cr8 = cr8;
    }

    /// Whether registers were changed that KVM has not taken over.
    pub(super) fn has_changed_registers(&self) -> bool {
        self.0.kvm_dirty_regs != 0
    }

    /// What was changed and not taken over is not to be.
    pub(super) fn forget_changed_registers(&mut self) {
        self.0.kvm_dirty_regs = 0;
    }

    /// Asks KVM to finish what is unfinished and come back at once.
    pub(super) fn set_immediate_exit(&mut self, wanted: bool) {
        self.0.immediate_exit = wanted.into();
    }

    /// Has KVM copy the general registers here at every exit.
    pub(super) fn keep_registers(&mut self) {
        self.0.kvm_valid_regs = u64::from(KVM_SYNC_X86_REGS);
    }

    /// The general registers of the last exit.
    pub(super) fn registers(&self) -> Registers {
        // SAFETY: `keep_registers` had KVM fill this member; any bit pattern is a valid value.
        let r = unsafe { self.0.s.regs.regs };
        Registers([
            r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15, r.rip, r.rflags,
        ])
    }

    /// Changes the general registers; KVM takes them over when the vCPU runs next.
    pub(super) fn change_registers(&mut self, change: impl FnOnce(&mut kvm_regs)) {
        // SAFETY: as in `registers`; plain integers, and nothing else refers to them.
        change(unsafe { &mut self.0.s.regs.regs });
        self.0.kvm_dirty_regs |= u64::from(KVM_SYNC_X86_REGS);
    }

    /// The port access of this exit.
    pub(super) fn port(&self) -> Option<PortExit> {
        if self.0.exit_reason != KVM_EXIT_IO {
            return None;
        }
        // SAFETY: the exit reason says that this is the member KVM filled.
        let io = unsafe { self.0.__bindgen_anon_1.io };
        Some(PortExit {
            read: u32::from(io.direction) == KVM_EXIT_IO_IN,
            port: io.port,
            size: usize::from(io.size),
            count: io.count as usize,
            offset: io.data_offset as usize,
        })
    }

    /// Element `index` of the data of a port access.
    pub(super) fn port_data(&self, io: &PortExit, index: usize) -> u32 {
        let mut bytes = [0; 4];
        // SAFETY: KVM placed `count` elements of `size` bytes (at most 4 by the architecture) at
        // `offset` inside the mapping it shares; `port_place` checked index and size.
        unsafe {
            let source = std::ptr::from_ref::<kvm_run>(self.0).cast::<u8>();
            let source = source.add(Self::port_place(io, index));
            std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), io.size);
        }
        u32::from_le_bytes(bytes)
    }

    /// Sets element `index` of what an IN reads.
    pub(super) fn set_port_data(&mut self, io: &PortExit, index: usize, value: u32) {
        let bytes = value.to_le_bytes();
        // SAFETY: as in `port_data`.
        unsafe {
            let target = std::ptr::from_mut::<kvm_run>(self.0).cast::<u8>();
            let target = target.add(Self::port_place(io, index));
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, io.size);
        }
    }

    fn port_place(io: &PortExit, index: usize) -> usize {
        assert!(
            index < io.count && io.size <= 4,
            "element {index} of {io:?}"
        );
        io.offset + index * io.size
    }

    /// The memory-mapped access of this exit.
    pub(super) fn mmio(&self) -> Option<MmioExit> {
        if self.0.exit_reason != KVM_EXIT_MMIO {
            return None;
        }
        // SAFETY: the exit reason says that this is the member KVM filled.
        let mmio = unsafe { self.0.__bindgen_anon_1.mmio };
        Some(MmioExit {
            write: mmio.is_write != 0,
            gpa: mmio.phys_addr,
            bytes: (mmio.len as usize).min(8),
            data: mmio.data,
        })
    }

    /// Sets what a memory-mapped load reads.
    pub(super) fn set_mmio_data(&mut self, data: [u8; 8]) {
        assert_eq!(
            self.0.exit_reason, KVM_EXIT_MMIO,
            "only an MMIO exit takes MMIO data"
        );
        self.0.__bindgen_anon_1.mmio.data = data;
    }

    /// The MSR access of this exit: index, and the value written.
    pub(super) fn msr(&self) -> Option<(u32, Option<u64>)> {
        let reason = self.0.exit_reason;
        if !matches!(reason, KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR) {
            return None;
        }
        // SAFETY: the exit reason says that this is the member KVM filled.
        let msr = unsafe { self.0.__bindgen_anon_1.msr };
        Some((
            msr.index,
            (reason == KVM_EXIT_X86_WRMSR).then_some(msr.data),
        ))
    }

    /// Answers an MSR access; `None` is #GP.
    pub(super) fn set_msr(&mut self, value: Option<u64>) {
        assert!(self.msr().is_some(), "only an MSR exit takes an MSR value");
        self.0.__bindgen_anon_1.msr.error = u8::from(value.is_none());
        if let Some(value) = value {
            self.0.__bindgen_anon_1.msr.data = value;
        }
    }

    /// What DR6 says of this exit, by a breakpoint or a step.
    pub(super) fn debug_status(&self) -> u64 {
        if self.0.exit_reason != KVM_EXIT_DEBUG {
            return 0;
        }
        // SAFETY: the exit reason says that this is the member KVM filled.
        unsafe { self.0.__bindgen_anon_1.debug.arch.dr6 }
    }

    /// In words, what KVM says of an exit that it should not have made.
    pub(super) fn complaint(&self) -> String {
        if self.0.exit_reason == KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says that this is the member KVM filled.
            let internal = unsafe { self.0.__bindgen_anon_1.internal };
            let what = match internal.suberror {
                1 => "it cannot emulate this instruction",
                2 => "simultaneous exceptions",
                3 => "an exit while it delivered an event",
                4 => "an unexpected exit reason",
                _ => "unknown cause",
            };
            format!("internal error {} ({what})", internal.suberror)
        } else {
            format!("unexpected exit reason {}", self.0.exit_reason)
        }
    }
}

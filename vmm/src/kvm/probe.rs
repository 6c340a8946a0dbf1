//! A small VM for questions to KVM: runs one micro-guest after the other, and never for ever.
//!
//! Unlike [`KvmCpu`](super::KvmCpu) it expects nothing to work: whatever KVM does comes back as a
//! [`Stop`], and the thread that asks is called off when its time is up.

use std::fmt;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use hindsight_guest_images::layout::{
    DATA, DESCRIPTORS, DONE_IN_RING_3, GDT, IDT, PML4, PORT_DONE, PORT_FAULT, PORT_MARK, RAM_BYTES,
    TASK, TSS, TSS_BYTES,
};
use hindsight_guest_images::{MicroGuest, Ring};
use hindsight_replay::{CpuidTable, Registers};
use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, KVM_MEM_LOG_DIRTY_PAGES, KVMIO,
    Msrs, kvm_guest_debug, kvm_interrupt, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::error::{KvmError, Named};
use super::memory::GuestMemory;
use super::run_page::{PortExit, RunPage};
use super::{cpuid, msr, signals};
use crate::boot::GuestRam;

ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, kvm_interrupt);

/// The only memory slot.
const SLOT: u32 = 0;
/// How long a thread may take to notice that it was called off.
const GRACE: Duration = Duration::from_millis(500);
/// How often it is called off until then: it may be kicked out of something else than KVM.
const CALL_EVERY: Duration = Duration::from_millis(5);

/// Why a piece of work has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// KVM did not come back, not even for a signal. Its thread is left behind.
    InKvm,
    /// It panicked.
    Panicked,
}

/// Whether time is up.
#[derive(Clone, Debug, Default)]
pub struct Late(Arc<AtomicBool>);

impl Late {
    fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Does `work` on a thread of its own. After `limit` its guest is stopped ([`Stop::Late`]).
pub fn bounded<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce(Late) -> T + Send + 'static,
) -> Result<T, Stuck> {
    signals::install_kick().expect("these signals take a handler");
    let late = Late::default();
    let (sender, receiver) = sync_channel(1);
    let theirs = late.clone();
    let worker = std::thread::spawn(move || drop(sender.send(work(theirs))));
    let start = Instant::now();
    let mut wait = limit;
    loop {
        match receiver.recv_timeout(wait) {
            Ok(result) => {
                // It has nothing left to do but to end.
                let _ = worker.join();
                return Ok(result);
            }
            Err(RecvTimeoutError::Disconnected) => return Err(Stuck::Panicked),
            Err(RecvTimeoutError::Timeout) if start.elapsed() > limit + GRACE => {
                return Err(Stuck::InKvm);
            }
            Err(RecvTimeoutError::Timeout) => {
                wait = CALL_EVERY;
                late.0.store(true, Ordering::Relaxed);
                // SAFETY: `worker` has neither been joined nor detached, so its pthread_t is
                // valid even if the thread has ended; the signal has a handler.
                unsafe {
                    libc::pthread_kill(
                        worker.as_pthread_t() as libc::pthread_t,
                        signals::kick_signal(),
                    )
                };
            }
        }
    }
}

/// A second handle of the same `/dev/kvm`, for another thread.
pub fn share(kvm: &Kvm) -> std::io::Result<Kvm> {
    // SAFETY: F_DUPFD_CLOEXEC takes an fd and a number, and touches no memory.
    let fd = unsafe { libc::fcntl(kvm.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the fd is new, so nobody else closes it, and it is a /dev/kvm as `kvm` is.
    Ok(unsafe { Kvm::from_raw_fd(fd) })
}

/// An exception or interrupt that the guest has no entry for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u8,
    /// Its error code, 0 where it has none.
    pub error: u64,
    /// Where it happened.
    pub rip: u64,
    /// The code segment there.
    pub cs: u16,
}

/// Why the guest stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It has done what it was made for.
    Done,
    /// It is at its mark.
    Mark,
    /// An exception or interrupt it does not expect.
    Fault(Fault),
    /// OUT: port, bytes of each element, elements.
    PortWrite(u16, usize, Vec<u32>),
    /// IN: port, bytes of each element, how many elements.
    PortRead(u16, usize, usize),
    /// Store to an address without RAM: address, bytes.
    MemoryWrite(u64, Vec<u8>),
    /// Load from one: address, how many bytes.
    MemoryRead(u64, usize),
    /// RDMSR.
    MsrRead(u32),
    /// WRMSR.
    MsrWrite(u32, u64),
    /// HLT.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The interrupt window that was asked for is open.
    Window,
    /// A debug exit, with the RIP and the exception (1 or 3) that KVM names.
    Debug(u64, u32),
    /// Its time is up.
    Late,
    /// Something else, as KVM puts it.
    Odd(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stop::Done => write!(f, "the guest went on to its end"),
            Stop::Mark => write!(f, "the guest came to its mark"),
            Stop::Fault(Fault {
                vector,
                error,
                rip,
                cs,
            }) => {
                let ring = cs & 3;
                let name = exception_name(*vector);
                write!(
                    f,
                    "the guest got {name} (error {error:#x}) at {rip:#x} in ring {ring}"
                )
            }
            Stop::PortWrite(port, size, values) => {
                write!(
                    f,
                    "OUT of {} x {size} bytes to port {port:#x}: {values:x?}",
                    values.len()
                )
            }
            Stop::PortRead(port, size, count) => {
                write!(f, "IN of {count} x {size} bytes from port {port:#x}")
            }
            Stop::MemoryWrite(gpa, data) => write!(f, "a store of {data:02x?} to {gpa:#x}"),
            Stop::MemoryRead(gpa, bytes) => write!(f, "a load of {bytes} bytes from {gpa:#x}"),
            Stop::MsrRead(index) => write!(f, "a read of MSR {index:#x}"),
            Stop::MsrWrite(index, value) => write!(f, "a write of {value:#x} to MSR {index:#x}"),
            Stop::Halt => write!(f, "the guest halted"),
            Stop::Shutdown => write!(f, "the guest shut down (triple fault)"),
            Stop::Window => write!(f, "an interrupt window"),
            Stop::Debug(pc, exception) => {
                write!(
                    f,
                    "a debug exit at {pc:#x} by {}",
                    exception_name(*exception as u8)
                )
            }
            Stop::Late => write!(f, "the guest did not come to its end in time"),
            Stop::Odd(what) => write!(f, "KVM gave up: {what}"),
        }
    }
}

/// The name of an exception, or its number.
pub fn exception_name(vector: u8) -> String {
    let name = match vector {
        0 => "#DE",
        1 => "#DB",
        2 => "NMI",
        3 => "#BP",
        5 => "#BR",
        6 => "#UD",
        7 => "#NM",
        8 => "#DF",
        10 => "#TS",
        11 => "#NP",
        12 => "#SS",
        13 => "#GP",
        14 => "#PF",
        _ => return format!("interrupt {vector:#x}"),
    };
    name.to_string()
}

/// A VM of one vCPU and a megabyte, and the micro-guest in it.
#[derive(Debug)]
pub struct ProbeVm {
    // The order of the fields is the order of their end: the VM is gone before the memory is.
    fd: VcpuFd,
    vm: VmFd,
    memory: GuestMemory,
    late: Late,
    unfinished: bool,
    /// Why the MSR filter could not be installed.
    pub filter_error: Option<String>,
}

impl ProbeVm {
    /// A VM in which CPUID answers by `table`, the MSR filter is in place and registers come with
    /// each exit.
    pub fn new(kvm: &Kvm, table: &CpuidTable, late: Late) -> Result<ProbeVm, KvmError> {
        let memory = GuestMemory::new(RAM_BYTES)?;
        let vm = kvm.create_vm().named("KVM_CREATE_VM")?;
        let filter_error = msr::install_filter(&vm)
            .err()
            .map(|error| error.to_string());
        let mut fd = vm.create_vcpu(0).named("KVM_CREATE_VCPU")?;
        fd.set_cpuid2(&cpuid::for_kvm(table)?)
            .named("KVM_SET_CPUID2")?;
        RunPage::of(&mut fd).keep_registers();
        let probe = ProbeVm {
            fd,
            vm,
            memory,
            late,
            unfinished: false,
            filter_error,
        };
        probe.map_memory(0)?;
        Ok(probe)
    }

    fn map_memory(&self, flags: u32) -> Result<(), KvmError> {
        let region = self.memory.regions()[0];
        let region = kvm_userspace_memory_region {
            slot: SLOT,
            flags,
            guest_phys_addr: region.gpa,
            memory_size: region.bytes,
            userspace_addr: region.host,
        };
        // SAFETY: the region is the mapping that `memory` owns; this value owns both, and its
        // fields are declared so that the VM is dropped first.
        unsafe { self.vm.set_user_memory_region(region) }.named("KVM_SET_USER_MEMORY_REGION")
    }

    /// Starts `guest`, with bits of CR4 beyond the needed ones.
    pub fn load(&mut self, guest: &MicroGuest, cr4: u64) -> Result<(), KvmError> {
        self.settle()?;
        self.debug(0, None)?;
        self.request_window(false);
        let blank = vec![0; 0x4000];
        let image = std::iter::once((DATA, blank)).chain(guest.image());
        for (gpa, bytes) in image {
            self.memory
                .write(gpa, &bytes)
                .expect("a micro-guest fits into its memory");
        }
        let (cs, ss, rsp) = guest.start();
        let mut sregs = self.fd.get_sregs().named("KVM_GET_SREGS")?;
        let dpl = if guest.ring == Ring::User { 3 } else { 0 };
        sregs.cs = segment(cs, 0xb, dpl, true);
        let data = segment(ss, 0x3, dpl, false);
        (sregs.ss, sregs.ds, sregs.es) = (data, data, data);
        (sregs.fs, sregs.gs) = (data, data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: TSS_BYTES as u32 - 1,
            selector: TASK,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.ldt = kvm_segment {
            type_: 2,
            unusable: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, (DESCRIPTORS * 8 - 1) as u16);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        sregs.cr3 = PML4;
        // CR0: PG AM WP NE ET MP PE. CR4: PAE and OSFXSR. EFER: LMA LME SCE.
        sregs.cr0 = 0x8005_0033;
        sregs.cr4 = 1 << 5 | 1 << 9 | cr4;
        sregs.efer = 1 << 10 | 1 << 8 | 1;
        self.fd.set_sregs(&sregs).named("KVM_SET_SREGS")?;
        let rip = hindsight_guest_images::layout::CODE;
        let regs = kvm_regs {
            rip,
            rsp,
            rflags: 2,
            ..Default::default()
        };
        self.fd.set_regs(&regs).named("KVM_SET_REGS")
    }

    /// Lets the guest run until it stops.
    pub fn run(&mut self) -> Result<Stop, KvmError> {
        loop {
            if let Some(stop) = self.run_or_kick()? {
                return Ok(stop);
            }
        }
    }

    /// Lets the guest run until it stops; `None` if a kick brought it back before.
    pub fn run_or_kick(&mut self) -> Result<Option<Stop>, KvmError> {
        if self.late.is_up() {
            return Ok(Some(Stop::Late));
        }
        match signals::enter(&mut self.fd)? {
            Some(reason) => self.stop(reason).map(Some),
            None => Ok(None),
        }
    }

    fn stop(&mut self, reason: u32) -> Result<Stop, KvmError> {
        self.unfinished = matches!(
            reason,
            KVM_EXIT_IO | KVM_EXIT_MMIO | KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR
        );
        Ok(match reason {
            KVM_EXIT_IO => self.port_stop()?,
            KVM_EXIT_MMIO => {
                let mmio = self
                    .page()
                    .mmio()
                    .expect("the reason is a memory-mapped access");
                if mmio.write {
                    Stop::MemoryWrite(mmio.gpa, mmio.data[..mmio.bytes].to_vec())
                } else {
                    Stop::MemoryRead(mmio.gpa, mmio.bytes)
                }
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                match self.page().msr().expect("the reason is an MSR access") {
                    (index, None) => Stop::MsrRead(index),
                    (index, Some(value)) => Stop::MsrWrite(index, value),
                }
            }
            KVM_EXIT_HLT => Stop::Halt,
            KVM_EXIT_SHUTDOWN => Stop::Shutdown,
            KVM_EXIT_IRQ_WINDOW_OPEN => Stop::Window,
            KVM_EXIT_DEBUG => {
                // SAFETY: the exit reason says that this is the member KVM filled.
                let arch = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.debug.arch };
                Stop::Debug(arch.pc, arch.exception)
            }
            _ => Stop::Odd(self.page().complaint()),
        })
    }

    fn port_stop(&mut self) -> Result<Stop, KvmError> {
        let io = self.port();
        if io.read {
            return Ok(Stop::PortRead(io.port, io.size, io.count));
        }
        Ok(match io.port {
            PORT_DONE => Stop::Done,
            PORT_MARK => Stop::Mark,
            PORT_FAULT => {
                let rsp = self.registers()?.rsp;
                let [vector, error, rip, cs] = self.words(rsp);
                if (vector, cs & 3) == (6, 3) && self.bytes(rip, 2) == DONE_IN_RING_3 {
                    return Ok(Stop::Done);
                }
                Stop::Fault(Fault {
                    vector: vector as u8,
                    error,
                    rip,
                    cs: cs as u16,
                })
            }
            port => {
                let values = (0..io.count)
                    .map(|i| self.page().port_data(&io, i))
                    .collect();
                Stop::PortWrite(port, io.size, values)
            }
        })
    }

    fn port(&mut self) -> PortExit {
        self.page()
            .port()
            .expect("the guest stopped at a port access")
    }

    fn page(&mut self) -> RunPage<'_> {
        RunPage::of(&mut self.fd)
    }

    /// Answers [`Stop::PortRead`], one value per element.
    pub fn give_port(&mut self, values: impl IntoIterator<Item = u32>) {
        let io = self.port();
        for (i, value) in (0..io.count).zip(values) {
            self.page().set_port_data(&io, i, value);
        }
    }

    /// Answers [`Stop::MemoryRead`].
    pub fn give_memory(&mut self, value: u64) {
        self.page().set_mmio_data(value.to_le_bytes());
    }

    /// Answers [`Stop::MsrRead`], or accepts [`Stop::MsrWrite`]; `None` refuses with #GP.
    pub fn give_msr(&mut self, value: Option<u64>) {
        self.page().set_msr(value);
    }

    /// Accepts [`Stop::MsrWrite`] to a register of the CPU's own, and loads it.
    pub fn load_msr(&mut self, index: u32, value: u64) -> Result<(), KvmError> {
        self.give_msr(Some(value));
        msr::load(&self.fd, index, value)
    }

    /// Has KVM finish what is unfinished. Returns whether the guest takes an interrupt now.
    pub fn settle(&mut self) -> Result<bool, KvmError> {
        if self.unfinished {
            self.unfinished = false;
            signals::finish(&mut self.fd)?;
        }
        Ok(self.page().ready_for_interrupt())
    }

    /// Injects an interrupt.
    pub fn interrupt(&mut self, vector: u8) -> Result<(), KvmError> {
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: the ioctl reads a `kvm_interrupt` and nothing else; the fd is a vCPU's.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if result < 0 {
            Err(kvm_ioctls::Error::last()).named("KVM_INTERRUPT")
        } else {
            Ok(())
        }
    }

    /// Injects #GP(0), as of the instruction at `rip`, instead of what the guest stopped at.
    pub fn refuse(&mut self, rip: u64) -> Result<(), KvmError> {
        // First: KVM would finish the instruction over the RIP that is set.
        self.settle()?;
        self.change_registers(|registers| registers.rip = rip);
        let mut events = self.fd.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?;
        events.exception.injected = 1;
        events.exception.nr = 13;
        events.exception.has_error_code = 1;
        events.exception.error_code = 0;
        self.fd
            .set_vcpu_events(&events)
            .named("KVM_SET_VCPU_EVENTS")
    }

    /// Injects a non-maskable interrupt.
    pub fn nmi(&self) -> Result<(), KvmError> {
        self.fd.nmi().named("KVM_NMI")
    }

    /// Asks for an interrupt window, or takes that back.
    pub fn request_window(&mut self, wanted: bool) {
        self.page().request_window(wanted);
    }

    /// `KVM_SET_GUEST_DEBUG` with these control bits and perhaps an execution breakpoint.
    pub fn debug(&self, control: u32, breakpoint: Option<u64>) -> Result<(), KvmError> {
        let mut debug = kvm_guest_debug {
            control,
            ..Default::default()
        };
        if let Some(address) = breakpoint {
            debug.arch.debugreg[0] = address;
            // DR7: bit 10 is always one, G0; condition and length 0 mean execution
            // (Intel SDM vol. 3, 18.2.4).
            debug.arch.debugreg[7] = 1 << 10 | 1 << 1;
        }
        self.fd.set_guest_debug(&debug).named("KVM_SET_GUEST_DEBUG")
    }

    /// Registers as KVM_GET_REGS tells them.
    pub fn registers(&self) -> Result<kvm_regs, KvmError> {
        self.fd.get_regs().named("KVM_GET_REGS")
    }

    /// Registers as they came with the exit.
    pub fn shared_registers(&mut self) -> Registers {
        self.page().registers()
    }

    /// Changes registers by way of the shared page.
    pub fn change_registers(&mut self, change: impl FnOnce(&mut kvm_regs)) {
        self.page().change_registers(change);
    }

    /// Current privilege level, by the stack segment's descriptor (AMD APM vol. 2, 15.5.1).
    pub fn privilege(&self) -> Result<u8, KvmError> {
        Ok(self.fd.get_sregs().named("KVM_GET_SREGS")?.ss.dpl)
    }

    /// Sets an MSR as the host may. `false` if KVM has no such MSR.
    pub fn set_msr(&self, index: u32, data: u64) -> bool {
        let entry = kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let entries = Msrs::from_entries(&[entry]).expect("one entry is not too many");
        self.fd.set_msrs(&entries).is_ok_and(|count| count == 1)
    }

    /// Turns the dirty log on.
    pub fn log_dirty_pages(&self) -> Result<(), KvmError> {
        self.map_memory(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Pages written since the last call, as a bitmap.
    pub fn dirty_pages(&self) -> Result<Vec<u64>, KvmError> {
        self.vm
            .get_dirty_log(SLOT, RAM_BYTES as usize)
            .named("KVM_GET_DIRTY_LOG")
    }

    /// Words of guest memory; zeroes where there is none.
    pub fn words<const N: usize>(&self, gpa: u64) -> [u64; N] {
        std::array::from_fn(|i| {
            let mut word = [0; 8];
            self.memory.read(gpa.wrapping_add(8 * i as u64), &mut word);
            u64::from_le_bytes(word)
        })
    }

    /// Bytes of guest memory.
    pub fn bytes(&self, gpa: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.memory.read(gpa, &mut bytes);
        bytes
    }
}

fn segment(selector: u16, type_: u8, dpl: u8, code: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;

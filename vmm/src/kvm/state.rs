//! The vCPU as a value, with what is known of the kernel that it runs: taken out of one VM and put into another.
//!
//! The order in which KVM is given the parts back matters. System registers come first, twice: KVM flushes the TLB for a
//! CR4 that differs in PGE, and not for a CR3 that is the same. General registers make KVM forget an exception,
//! so events come last. What KVM is to take from the shared page (CR8, the wish for a window) goes there.
//!
//! Long, because what is taken, in which order it is put back, and what of it is digested has to agree.

use hindsight_devices::Access;
use hindsight_replay::{CpuDigest, PAGE_BYTES, Stateful, memory};
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_guest_debug_arch, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::cpu::KvmCpu;
use super::debug::Breakpoints;
use super::entries::KernelEntries;
use super::error::{KvmError, Named};
use super::msr::{CSTAR, LSTAR, SYSENTER};
use super::preemption::Preemption;
use super::rewritten::Noticed;
use super::signals;
use super::trap_sites::TrapSites;
use super::traps::TrapMemory;

/// CR4.PGE: changing it flushes the TLB (Intel SDM vol. 3, 4.10.4.1).
const CR4_PGE: u64 = 1 << 7;

/// What SWAPGS exchanges with the base of GS.
pub(super) const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The MSRs in which a guest can keep something: those that KVM keeps for it ([`super::msr::KEPT`]), less the constant
/// one and those among the system registers; and those that are loaded after the board's.
pub(super) fn kept_msrs() -> impl Iterator<Item = u32> {
    let variable_mtrrs = 0x200..=0x20f;
    let fixed_mtrrs = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    let pat_and_default = [0x277, 0x2ff];
    let syscall = [0xc000_0081, LSTAR, CSTAR, 0xc000_0084];
    let kernel_gs = [KERNEL_GS_BASE];
    SYSENTER
        .chain(variable_mtrrs)
        .chain(fixed_mtrrs)
        .chain(pat_and_default)
        .chain(syscall)
        .chain(kernel_gs)
}

/// The part of an XSAVE area that holds x87 and SSE state (Intel SDM vol. 1, 13.4.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fpu(Vec<u8>);

impl Fpu {
    pub(super) const BYTES: usize = 512;
    /// Last opcode, instruction pointer and operand pointer of x87.
    const POINTERS: std::ops::Range<usize> = 6..24;
    const MXCSR: std::ops::Range<usize> = 24..28;
    /// Which bits MXCSR has is the CPU's.
    const MXCSR_MASK: std::ops::Range<usize> = 28..32;
    const X87: std::ops::Range<usize> = 32..160;
    const XMM: std::ops::Range<usize> = 160..416;
    /// XSTATE_BV: which components are in use; the others have their initial values, whatever the area holds.
    const IN_USE: usize = Fpu::BYTES;
    const X87_AND_SSE: [u8; 8] = 3u64.to_le_bytes();

    fn of(area: &kvm_xsave) -> Fpu {
        let words = area.region.map(u32::to_le_bytes);
        let bytes = words.as_flattened();
        let in_use = bytes[Fpu::IN_USE];
        let mut fpu = bytes[..Fpu::BYTES].to_vec();
        if in_use & 1 == 0 {
            fpu[..Fpu::POINTERS.end].fill(0);
            fpu[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
            fpu[Fpu::X87].fill(0);
        }
        if in_use & 2 == 0 {
            fpu[Fpu::MXCSR].copy_from_slice(&0x1f80_u32.to_le_bytes());
            fpu[Fpu::XMM].fill(0);
        }
        fpu[Fpu::MXCSR_MASK].fill(0);
        fpu[Fpu::XMM.end..].fill(0);
        Fpu(fpu)
    }

    /// As KVM takes it; `None` if it is too short or too long.
    fn area(&self) -> Option<kvm_xsave> {
        let mut words = [[0; 4]; 1024];
        let bytes = words.as_flattened_mut();
        bytes.get_mut(..self.0.len())?.copy_from_slice(&self.0);
        bytes[Fpu::IN_USE..][..8].copy_from_slice(&Fpu::X87_AND_SSE);
        (self.0.len() == Fpu::BYTES).then(|| kvm_xsave {
            region: words.map(u32::from_le_bytes),
            ..Default::default()
        })
    }

    /// What of it is the same on every run: CPUs without XSAVEERPTR keep x87's pointers only after an exception, and
    /// else give back those of whoever had the CPU before (AMD APM vol. 2, 11.4.4.3).
    fn digested(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes[Fpu::POINTERS].fill(0);
        bytes
    }
}

/// Where in an instruction the vCPU is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Middle {
    /// Writes of it that are exits to come.
    writes: Vec<Access>,
    /// The answers that it has had, if its reads have not come to an end.
    answers: Option<Vec<u64>>,
}

/// A VM and its vCPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KvmState {
    /// In the order of their numbers.
    vcpus: Vec<VcpuState>,
    known: Known,
}

/// A vCPU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct VcpuState {
    registers: kvm_regs,
    system: kvm_sregs,
    /// In the order of [`kept_msrs`].
    msrs: Vec<u64>,
    fpu: Fpu,
    debug: kvm_debugregs,
    /// What the guest believes to have in them.
    breakpoints: Breakpoints,
    traps: TrapMemory,
    events: kvm_vcpu_events,
    middle: Middle,
    /// An interrupt window is wanted.
    window: bool,
}

/// What is known of the guest's kernel, and of what it has asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Known {
    entries: KernelEntries,
    sites: TrapSites,
    noticed: Noticed,
}

/// A register in which a test flips a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flip {
    /// R15.
    R15,
    /// An SSE register.
    Xmm(usize),
    /// The control register of SSE.
    Mxcsr,
    /// An x87 register.
    X87(usize),
    /// The base of FS.
    FsBase,
    /// The base of GS.
    GsBase,
    /// Where the GDT is.
    GdtBase,
    /// The address of the last page fault.
    Cr2,
    /// One of the MSRs that a guest can keep something in.
    Msr(u32),
    /// The address of a breakpoint.
    Dr(usize),
}

impl KvmState {
    /// Flips one bit of the first vCPU, for whoever wants to know that it is noticed.
    ///
    /// # Panics
    ///
    /// If there is no such register.
    pub fn flip(&mut self, flip: Flip) {
        const BIT: u64 = 1 << 5;
        let vcpu = self.vcpus.first_mut().expect("a machine has a vCPU");
        match flip {
            Flip::R15 => vcpu.registers.r15 ^= BIT,
            Flip::Xmm(number) => vcpu.fpu.0[Fpu::XMM][16 * number] ^= BIT as u8,
            Flip::Mxcsr => vcpu.fpu.0[Fpu::MXCSR][0] ^= BIT as u8,
            Flip::X87(number) => vcpu.fpu.0[Fpu::X87][16 * number] ^= BIT as u8,
            Flip::FsBase => vcpu.system.fs.base ^= BIT,
            Flip::GsBase => vcpu.system.gs.base ^= BIT,
            Flip::GdtBase => vcpu.system.gdt.base ^= BIT,
            Flip::Cr2 => vcpu.system.cr2 ^= BIT,
            Flip::Msr(index) => {
                let place = kept_msrs().position(|kept| kept == index);
                vcpu.msrs[place.expect("one of those that are kept")] ^= BIT;
            }
            Flip::Dr(number) => {
                vcpu.debug.db[number] ^= BIT;
                vcpu.breakpoints.flip(number, BIT);
            }
        }
    }
}

impl KvmCpu {
    fn known(&self) -> Known {
        Known {
            entries: self.vm.entries.kernel_entries(),
            sites: self.vm.text.sites.clone(),
            noticed: self.vm.noticed.clone(),
        }
    }

    pub(super) fn kept_msr_values(&self) -> Result<Vec<u64>, KvmError> {
        let entries: Vec<_> = kept_msrs()
            .map(|index| kvm_msr_entry {
                index,
                ..Default::default()
            })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).expect("they are few");
        let count = self.vcpu.fd.get_msrs(&mut msrs).named("KVM_GET_MSRS")?;
        if count < entries.len() {
            return Err(KvmError::Lacks("an MSR that it keeps for guests"));
        }
        Ok(msrs.as_slice().iter().map(|msr| msr.data).collect())
    }

    /// x87 and SSE, as FXSAVE stores them.
    pub(super) fn fxsave_area(&self) -> Result<[u8; Fpu::BYTES], KvmError> {
        let fpu = self.fpu()?.0;
        Ok(fpu.try_into().expect("it was made with this length"))
    }

    /// Sets them.
    pub(super) fn write_fxsave_area(&self, area: &[u8; Fpu::BYTES]) -> Result<(), KvmError> {
        self.put_fpu(&Fpu(area.to_vec()))
    }

    fn fpu(&self) -> Result<Fpu, KvmError> {
        let area = self.vcpu.fd.get_xsave().named("KVM_GET_XSAVE")?;
        Ok(Fpu::of(&area))
    }

    fn middle(&self) -> Middle {
        Middle {
            writes: self.vcpu.parts.writes(),
            answers: self.vcpu.parts.answers().map(<[u64]>::to_vec),
        }
    }

    /// The system registers without the interrupt that is on its way in, which is among the events.
    fn system_registers(&self) -> Result<kvm_sregs, KvmError> {
        Ok(kvm_sregs {
            interrupt_bitmap: [0; 4],
            ..self.sregs()?
        })
    }

    /// Registers that were changed in the shared page reach KVM.
    fn hand_over_registers(&mut self) -> Result<(), KvmError> {
        // In the middle of its reads nothing has been changed, and KVM must not go on.
        if self.page().has_changed_registers() && self.vcpu.parts.answers().is_none() {
            self.vcpu.unfinished = true;
            self.finish_exit()?;
        }
        Ok(())
    }

    /// What is under way. KVM keeps numbers of what was delivered long ago: those are gone.
    fn pending_events(&self) -> Result<kvm_vcpu_events, KvmError> {
        let mut events = self
            .vcpu
            .fd
            .get_vcpu_events()
            .named("KVM_GET_VCPU_EVENTS")?;
        if events.exception.injected | events.exception.pending == 0 {
            events.exception = Default::default();
            (events.exception_has_payload, events.exception_payload) = (0, 0);
        }
        if events.interrupt.injected == 0 {
            (events.interrupt.nr, events.interrupt.soft) = (0, 0);
        }
        Ok(events)
    }

    /// See [`hindsight_replay::Cpu::state_digest`].
    pub(super) fn digest(&mut self) -> Result<CpuDigest, KvmError> {
        self.hand_over_registers()?;
        let registers = self.page().registers().0.map(u64::to_le_bytes);
        let system = digested_system(&self.system_registers()?);
        let msrs = bytes(&self.kept_msr_values()?);
        let fpu = self.fpu()?.digested();
        let debug = self.vcpu.fd.get_debug_regs().named("KVM_GET_DEBUGREGS")?;
        let debug = bytes(&(debug, self.vcpu.breakpoints));
        let events = bytes(&digested_events(self.pending_events()?));
        let known = (self.known(), &self.vcpu.traps.memory, self.middle());
        let known = bytes(&known);
        Ok(CpuDigest::of([
            registers.as_flattened(),
            &system,
            &msrs,
            &fpu,
            &debug,
            &events,
            &known,
        ]))
    }

    /// Drops whatever was under way, so that it does not fall on what comes.
    fn drop_unfinished(&mut self) -> Result<(), KvmError> {
        self.page().request_window(false);
        self.page().forget_changed_registers();
        // An access across pages has two parts.
        while signals::finish(&mut self.vcpu.fd)?.is_some() {}
        self.vcpu.unfinished = false;
        self.vcpu.parts.begin();
        self.loading = None;
        while self
            .vm
            .posted
            .take(&self.vm.fd, &mut self.vcpu.fd)?
            .is_some()
        {}
        self.debugger.moved();
        if self.has_stops() {
            self.debug(0, kvm_guest_debug_arch::default())?;
            self.forget_stops();
        }
        Ok(())
    }

    /// Sets the system registers, and has nothing left of what was known of page tables.
    pub(super) fn put_system_registers(&self, system: &kvm_sregs) -> Result<(), KvmError> {
        let other = kvm_sregs {
            cr4: system.cr4 ^ CR4_PGE,
            ..*system
        };
        for system in [&other, system] {
            self.vcpu.fd.set_sregs(system).named("KVM_SET_SREGS")?;
        }
        Ok(())
    }

    fn put_fpu(&self, fpu: &Fpu) -> Result<(), KvmError> {
        let area = fpu.area();
        let area = area.ok_or_else(|| refused("the x87 and SSE registers are not complete"))?;
        // SAFETY: KVM reads as much as the process has enabled by arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM), which this
        // one never calls: the 4096 bytes that the area has.
        unsafe { self.vcpu.fd.set_xsave(&area) }.named("KVM_SET_XSAVE")
    }

    fn put_registers(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        self.put_system_registers(&state.system)?;
        let present = self.kept_msr_values()?;
        let changed = kept_msrs().zip(state.msrs.iter().zip(present));
        let changed = changed.filter(|(_, (wanted, present))| *wanted != present);
        let changed: Vec<_> = changed
            .map(|(index, (data, _))| kvm_msr_entry {
                index,
                data: *data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&changed).expect("they are few");
        let count = self.vcpu.fd.set_msrs(&msrs).named("KVM_SET_MSRS")?;
        if count < changed.len() {
            return Err(refused("an MSR has a value that it cannot have"));
        }
        self.put_fpu(&state.fpu)?;
        self.vcpu
            .fd
            .set_regs(&state.registers)
            .named("KVM_SET_REGS")?;
        self.vcpu
            .fd
            .set_debug_regs(&state.debug)
            .named("KVM_SET_DEBUGREGS")?;
        self.vcpu
            .fd
            .set_vcpu_events(&state.events)
            .named("KVM_SET_VCPU_EVENTS")?;
        self.page().set_cr8(state.system.cr8);
        // KVM takes CR8, and fills the page with the registers.
        match signals::finish(&mut self.vcpu.fd)? {
            None => Ok(()),
            Some(_) => Err(refused("the vCPU would not stay where it was put")),
        }
    }
}

impl KvmCpu {
    fn save_vcpu(&mut self) -> Result<VcpuState, KvmError> {
        self.hand_over_registers()?;
        let fd = &self.vcpu.fd;
        Ok(VcpuState {
            registers: fd.get_regs().named("KVM_GET_REGS")?,
            system: self.system_registers()?,
            msrs: self.kept_msr_values()?,
            fpu: self.fpu()?,
            debug: fd.get_debug_regs().named("KVM_GET_DEBUGREGS")?,
            breakpoints: self.vcpu.breakpoints,
            traps: self.vcpu.traps.memory.clone(),
            events: self.pending_events()?,
            middle: self.middle(),
            window: self.page().wants_window(),
        })
    }

    fn restore_vcpu(&mut self, state: &VcpuState) -> Result<(), KvmError> {
        self.drop_unfinished()?;
        self.vcpu.traps.put(&state.traps);
        self.counts.gp_entry = state.traps.gp_entry();
        self.vcpu.breakpoints = state.breakpoints;
        self.put_registers(state)?;
        if let Some(answers) = &state.middle.answers
            && !self.redo_reads(answers)?
        {
            return Err(refused("no instruction there reads what was read"));
        }
        self.vcpu.parts.put_writes(&state.middle.writes);
        self.page().request_window(state.window);
        Ok(())
    }
}

/// Refuses what could not be put into a vCPU, before anything is changed.
fn check(state: &VcpuState) -> Result<(), KvmError> {
    let is_write = |access: &Access| {
        matches!(
            access,
            Access::PortWrite { .. } | Access::MemoryWrite { .. }
        )
    };
    if state.msrs.len() != kept_msrs().count() {
        return Err(refused("it has other MSRs"));
    }
    if !state.middle.writes.iter().all(is_write) {
        return Err(refused("a read waits where only writes can"));
    }
    Ok(())
}

impl Stateful for KvmCpu {
    type State = KvmState;
    type Error = KvmError;

    fn save(&mut self) -> Result<KvmState, KvmError> {
        Ok(KvmState {
            vcpus: vec![self.save_vcpu()?],
            known: self.known(),
        })
    }

    fn restore(&mut self, state: &KvmState) -> Result<(), KvmError> {
        let KvmState { vcpus, known } = state;
        let [vcpu] = &vcpus[..] else {
            return Err(refused("it has more than one vCPU, or none"));
        };
        check(vcpu)?;
        if !self.vm.entries.put_kernel_entries(&known.entries) {
            return Err(refused("it has kernel entries where the kernel has none"));
        }
        self.counts.entry_points = self.vm.entries.count();
        self.vm.text.sites = known.sites.clone();
        self.vm.noticed = known.noticed.clone();
        self.restore_vcpu(vcpu)?;
        if let Preemption::Branches(lander) = &mut self.preemption {
            lander.begin_at_exit()?;
        }
        Ok(())
    }

    fn pages(&mut self) -> Result<Vec<u64>, KvmError> {
        let mut pages = Vec::new();
        let say = |gpa| pages.push(gpa / PAGE_BYTES as u64);
        self.vm.memory.each_page_backed(say)?;
        Ok(pages)
    }

    fn has_page(&self, number: u64) -> bool {
        memory::has(self.vm.memory.ram(), number)
    }

    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), KvmError> {
        match memory::read(self.vm.memory.ram(), number, into) {
            true => Ok(()),
            false => Err(refused("there is no such page")),
        }
    }

    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), KvmError> {
        match memory::write(self.vm.memory.ram(), number, from) {
            true => Ok(()),
            false => Err(refused("there is no such page")),
        }
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, KvmError> {
        self.vm.take_changed_pages()
    }
}

fn refused(what: &str) -> KvmError {
    KvmError::State(what.to_string())
}

/// What of the system registers decides anything: a segment that is unusable has its selector, its privilege, and, in
/// FS and GS, its base; CPUs differ in what else they leave there.
fn digested_system(system: &kvm_sregs) -> Vec<u8> {
    let usable = |segment: kvm_segment, keeps_base: bool| match segment.unusable {
        0 => segment,
        _ => kvm_segment {
            selector: segment.selector,
            dpl: segment.dpl,
            base: if keeps_base { segment.base } else { 0 },
            unusable: 1,
            ..Default::default()
        },
    };
    let system = kvm_sregs {
        cs: usable(system.cs, false),
        ds: usable(system.ds, false),
        es: usable(system.es, false),
        fs: usable(system.fs, true),
        gs: usable(system.gs, true),
        ss: usable(system.ss, false),
        ldt: usable(system.ldt, false),
        ..*system
    };
    bytes(&system)
}

/// Events without the shadow of an STI, which some hosts forget (see [`super::shadow`]), and without what a machine
/// like this one never has.
fn digested_events(events: kvm_vcpu_events) -> kvm_vcpu_events {
    let mut digested = kvm_vcpu_events {
        exception: events.exception,
        interrupt: events.interrupt,
        nmi: events.nmi,
        ..Default::default()
    };
    digested.interrupt.shadow = 0;
    digested
}

fn bytes(value: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(value).expect("plain values serialise")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(in_use: u8) -> kvm_xsave {
        let mut bytes = [[0xa5; 4]; 1024];
        bytes.as_flattened_mut()[Fpu::IN_USE] = in_use;
        kvm_xsave {
            region: bytes.map(u32::from_le_bytes),
            ..Default::default()
        }
    }

    #[test]
    fn what_is_not_in_use_has_its_initial_values_whatever_the_area_holds() {
        let [none, x87, sse, all] = [0, 1, 2, 3].map(|in_use| Fpu::of(&area(in_use)).0);
        assert_eq!(none[..2], 0x37f_u16.to_le_bytes());
        assert_eq!(none[Fpu::MXCSR], 0x1f80_u32.to_le_bytes());
        assert!(
            none[Fpu::X87]
                .iter()
                .chain(&none[Fpu::XMM])
                .all(|b| *b == 0)
        );
        assert_eq!(x87[Fpu::X87], all[Fpu::X87]);
        assert_eq!(x87[Fpu::XMM], none[Fpu::XMM]);
        assert_eq!(sse[Fpu::XMM], all[Fpu::XMM]);
        assert_eq!(sse[Fpu::X87], none[Fpu::X87]);
        assert!(all[Fpu::X87].iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn a_state_in_the_middle_of_reads_that_nothing_makes_is_refused_in_time() {
        // `jmp .`, which never comes back.
        let kvm = kvm_ioctls::Kvm::new().ok();
        let Some(mut cpu) =
            kvm.and_then(|kvm| super::super::real_mode::guest(&kvm, &[0xeb, 0xfe]).ok())
        else {
            eprintln!("skipped: there is no KVM");
            return;
        };
        let mut state = cpu.save().expect("it is at its start");
        cpu.restore(&state).expect("it was there");
        state.vcpus[0].middle.answers = Some(vec![1, 2]);
        let refused = cpu.restore(&state);
        assert!(matches!(refused, Err(KvmError::State(_))), "{refused:?}");
    }

    #[test]
    fn x87_and_sse_registers_come_back_as_they_were() {
        let fpu = Fpu::of(&area(3));
        assert_eq!(Fpu::of(&fpu.area().expect("it is whole")), fpu);
        assert!(Fpu(vec![0; Fpu::BYTES - 1]).area().is_none());
        assert!(Fpu(vec![0; 8192]).area().is_none());
    }

    #[test]
    fn the_msrs_of_a_state_are_those_that_kvm_keeps_and_each_is_there_once() {
        let all: Vec<u32> = kept_msrs().collect();
        assert!(all.is_sorted_by(|a, b| a < b));
        let kept = |index: u32| {
            let ranges = super::super::msr::KEPT;
            ranges
                .iter()
                .any(|(first, count, _)| (*first..first + count).contains(&index))
        };
        let loaded = |index| index == LSTAR || index == CSTAR || SYSENTER.contains(&index);
        assert!(all.iter().all(|index| kept(*index) || loaded(*index)));
    }
}

//! The law of states on the host's own KVM: a guest that is saved at any of its exits, and restored in another VM, does
//! from there on what it would have done. And what a guest has in a register that no exit shows is noticed.

use std::io::Cursor;
use std::sync::OnceLock;

use hindsight_replay::{Difference, Divergence, Machine, MachineState, StateOf};
use hindsight_vmm::kvm::Flip;

use super::*;

type State = StateOf<KvmCpu, NoDisks>;

/// A guest in the middle of a replay.
pub(super) struct Replay<'a> {
    journal: &'a [u8],
    pub(super) cpu: KvmCpu,
    pub(super) machine: Machine,
    door: Replayer<Cursor<&'a [u8]>>,
    pub(super) trace: Trace,
}

fn reader(journal: &[u8]) -> JournalReader<Cursor<&[u8]>> {
    JournalReader::open(Cursor::new(journal)).expect("a whole journal opens")
}

impl<'a> Replay<'a> {
    pub(super) fn new(kvm: &Kvm, guest: &Guest, journal: &'a [u8]) -> Replay<'a> {
        let reader = reader(journal);
        let cpu = guest.load(kvm, &reader.header().machine.cpuid);
        let machine = machine_of(reader.header());
        Replay {
            journal,
            cpu: cpu.expect("KVM loads a guest"),
            machine,
            door: Replayer::new(reader, None, None),
            trace: Trace::default(),
        }
    }

    pub(super) fn run(&mut self, until: Option<u64>) -> Result<End, RunError<KvmError>> {
        self.door.close_after(until);
        let disks = &mut NoDisks;
        (self.machine).run(&mut self.cpu, disks, &mut self.door, &mut self.trace)
    }

    pub(super) fn run_to(&mut self, until: u64) {
        let reached = self.run(Some(until));
        assert!(
            matches!(reached, Err(RunError::Closed(Closed::Reached(exits))) if exits == until),
            "on the way to exit {until}: {reached:?}"
        );
    }

    pub(super) fn save(&mut self) -> State {
        let state = self.machine.save(&mut self.cpu, &mut NoDisks, &self.door);
        state.expect("a guest at an exit can be saved")
    }

    pub(super) fn restore(&mut self, state: &State) {
        let restored = self.machine.restore(state, &mut self.cpu, &mut NoDisks);
        restored.unwrap_or_else(|error| panic!("{error}"));
        let place = state.core.journal.as_ref().expect("a replay has a place");
        self.door = Replayer::at(reader(self.journal), place).expect("it is this journal's");
        self.trace = Trace::beginning_after(self.machine.at().exits);
    }

    pub(super) fn memory(&self) -> Vec<u8> {
        let mut memory = vec![0; RAM_BYTES as usize];
        assert!(self.cpu.memory().read(0, &mut memory), "all of it is RAM");
        memory
    }
}

/// Saves the recorded guest at its exits, restores it elsewhere, and compares everything that can be seen from there on.
pub fn obeys_the_law(guest: &Guest, recorded: &Ran) {
    // A KVM whose windows cannot be relied on does not even replay such a guest each time.
    const STI: u8 = 0xfb;
    if guest.code.contains(&STI) && !windows_are_sure() {
        skip("a guest that takes interrupts is not saved on a KVM that cannot record");
        return;
    }
    let exits = recorded.trace.turns.len() as u64;
    let end = recorded.end();
    for exit in 1..exits {
        let (guest, journal, end) = (guest.clone(), recorded.journal.clone(), end.clone());
        in_time(move |kvm| obeys_the_law_at(kvm, &guest, &journal, &end, exit));
    }
}

fn obeys_the_law_at(kvm: &Kvm, guest: &Guest, journal: &[u8], recorded: &End, exit: u64) {
    let mut straight = Replay::new(kvm, guest, journal);
    straight.run_to(exit);
    let state = straight.save();
    let bytes = state.to_bytes();
    assert!(
        straight.save().to_bytes() == bytes,
        "exit {exit}: saved twice"
    );
    straight.trace = Trace::beginning_after(exit);
    let end = straight.run(None).expect("it is the recording");
    assert_eq!(end, *recorded, "exit {exit}: after it was saved");

    let state: State = MachineState::from_bytes(&bytes).expect("it was kept");
    // In a fresh VM, and in one that has run to its end.
    let (memory, trace) = (straight.memory(), straight.trace.clone());
    for mut other in [Replay::new(kvm, guest, journal), straight] {
        other.restore(&state);
        let again = other.save();
        let differences = again.digest().differences(&state.digest());
        assert!(
            again.to_bytes() == bytes,
            "exit {exit}: restored, it differs in {differences:?}: {:?}, not {:?}",
            again.core.cpu,
            state.core.cpu
        );
        let end = other.run(None);
        let end = end.unwrap_or_else(|error| panic!("restored at exit {exit}: {error}"));
        assert_eq!(end, *recorded, "restored at exit {exit}");
        assert!(
            other.trace == trace,
            "restored at exit {exit}: another trace"
        );
        assert!(
            other.memory() == memory,
            "restored at exit {exit}: other memory"
        );
    }
}

pub(super) fn windows_are_sure() -> bool {
    static SURE: OnceLock<bool> = OnceLock::new();
    *SURE.get_or_init(|| in_time(hindsight_vmm::doctor::check_recorder).is_ok())
}

/// What comes of a guest in which one bit is flipped at exit `at`.
fn flipped(kvm: &Kvm, guest: &Guest, journal: &[u8], at: u64, flip: Flip) -> Box<Divergence> {
    let mut replay = Replay::new(kvm, guest, journal);
    replay.run_to(at);
    let mut state = replay.save();
    state.core.cpu.flip(flip);
    replay.restore(&state);
    match replay.run(None) {
        Err(RunError::Closed(Closed::Diverged(divergence))) => divergence,
        other => panic!("{flip:?} at exit {at} was not noticed: {other:?}"),
    }
}

#[test]
fn a_flipped_register_that_no_exit_shows_is_noticed_at_the_next_digest_and_named() {
    if kvm().is_none() {
        return;
    }
    let guest = Guest::new(|a| {
        for value in 0..6 {
            out(a, NOBODY, value)?;
        }
        Ok(())
    });
    let how = How {
        seed: 1,
        detail: Detail::Default,
        memory_every: Some(1),
    };
    in_time(move |kvm| {
        let recorded = record(kvm, &guest, how);
        recorded.end();
        for (flip, part) in [
            (Flip::Xmm(3), "x87 and SSE registers"),
            (Flip::Mxcsr, "x87 and SSE registers"),
            (Flip::X87(7), "x87 and SSE registers"),
            (Flip::FsBase, "segment and control registers"),
            (Flip::GsBase, "segment and control registers"),
            (Flip::GdtBase, "segment and control registers"),
            (Flip::Cr2, "segment and control registers"),
            (Flip::Msr(0xc000_0102), "MSRs"),
            (Flip::Msr(0xc000_0081), "MSRs"),
            (Flip::Msr(0x175), "MSRs"),
            (Flip::Dr(0), "debug registers"),
            (Flip::Dr(3), "debug registers"),
            (Flip::R15, "general registers"),
        ] {
            for at in [1, 3] {
                let divergence = flipped(kvm, &guest, &recorded.journal, at, flip);
                // General registers are in the turn itself.
                let named = match divergence.difference {
                    Difference::State { expected, found } => {
                        let found = found.expect("the guest was at an exit");
                        found.differences(&expected.expect("and so it was recorded"))
                    }
                    _ => vec!["general registers"],
                };
                assert_eq!(named, [part], "{flip:?} at exit {at}: {divergence}");
                let (exits, next) = (divergence.at.exits, at + 1);
                assert_eq!(exits, next, "{flip:?}: {divergence}");
            }
        }
    });
}

#[test]
fn what_a_guest_keeps_in_its_registers_is_there_when_it_is_restored() {
    if kvm().is_none() || !windows_are_sure() {
        skip("a KVM that cannot record may not have all of these instructions");
        return;
    }
    const FS_BASE: u32 = 0xc000_0100;
    let guest = Guest::new(|a| {
        // CR4.OSFXSR, without which there is no SSE.
        a.mov(rax, cr4)?;
        a.or(eax, 1 << 9)?;
        a.mov(cr4, rax)?;
        // Whatever has no exit of its own: SSE, x87, segment bases, MSRs that KVM keeps, CR2, CR8, debug registers.
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.movq(xmm0, rax)?;
        a.movq(xmm15, rax)?;
        a.fninit()?;
        a.fld1()?;
        a.fldpi()?;
        for (index, value) in [
            (FS_BASE, 0x5000_u32),
            (FS_BASE + 1, 0x6000),
            (FS_BASE + 2, 0x7000),
            (0x277, 0x0007_0406),
        ] {
            a.mov(ecx, index)?;
            a.mov(eax, value)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.mov(rax, 0x1234_5000u64)?;
        a.mov(cr2, rax)?;
        a.mov(dr1, rax)?;
        a.mov(eax, 5)?;
        a.mov(cr8, rax)?;
        out(a, NOBODY, 1)?;
        out(a, NOBODY, 2)?;
        // And all of it shown.
        a.mov(rdi, DATA + 0x200)?;
        a.movups(xmmword_ptr(rdi), xmm0)?;
        a.movups(xmmword_ptr(rdi + 0x10), xmm15)?;
        a.fstp(qword_ptr(rdi + 0x20))?;
        a.fstp(qword_ptr(rdi + 0x28))?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(rdi + 0x30), rax)?;
        a.mov(rax, dr1)?;
        a.mov(qword_ptr(rdi + 0x38), rax)?;
        a.mov(rax, cr8)?;
        a.mov(qword_ptr(rdi + 0x40), rax)?;
        for (place, index) in [(0x48, FS_BASE), (0x50, FS_BASE + 2), (0x58, 0x277)] {
            a.mov(ecx, index)?;
            a.rdmsr()?;
            a.mov(dword_ptr(rdi + place), eax)?;
        }
        a.xor(eax, eax)?;
        a.mov(cr8, rax)
    });
    for ran in proved(&guest) {
        assert_eq!(ran.end().ending, Ending::Halted);
        let shown: [u64; 12] = ran.words(DATA + 0x200);
        let wide = 0x1111_2222_3333_4444;
        let expected = [
            wide,
            0,
            wide,
            0,
            std::f64::consts::PI.to_bits(),
            1f64.to_bits(),
            0x1234_5000,
            0x1234_5000,
            5,
            0x5000,
            0x7000,
            0x0007_0406,
        ];
        assert_eq!(shown, expected);
    }
}

#[test]
fn a_restored_guest_sees_no_page_through_what_the_cpu_knew_of_another_mapping() {
    // The second page of 2 MiB is where the first is, then without RAM, then back.
    const ENTRY: u64 = PAGE_DIRECTORY + 8;
    const PAGE: u64 = 2 << 20;
    let guest = Guest::new(|a| {
        a.mov(rsi, ENTRY)?;
        a.mov(rdi, PAGE + DATA)?;
        for (number, frame) in [(1, 0u64), (2, MMIO), (3, 0)] {
            a.mov(rax, frame | 0x83)?;
            a.mov(qword_ptr(rsi), rax)?;
            a.invlpg(byte_ptr(rdi))?;
            a.mov(ebx, dword_ptr(rdi))?;
            out(a, NOBODY, number)?;
            a.mov(r8d, dword_ptr(rdi))?;
            out(a, NOBODY, number)?;
        }
        Ok(())
    });
    let guest = Guest {
        data: b"here",
        ..guest
    };
    for ran in proved(&guest) {
        assert_eq!(
            ran.registers()[RBX],
            u64::from(u32::from_le_bytes(*b"here"))
        );
        assert_eq!(ran.registers()[R8], ran.registers()[RBX]);
    }
}

#[test]
fn a_state_with_any_bit_flipped_is_refused_or_noticed_and_is_no_panic() {
    const FLIPS: u64 = 400;
    if kvm().is_none() {
        return;
    }
    let guest = Guest::new(|a| {
        for value in 0..6 {
            out(a, NOBODY, value)?;
            a.in_(al, 0x92)?;
        }
        Ok(())
    });
    let how = How {
        seed: 1,
        detail: Detail::Default,
        memory_every: Some(1),
    };
    let (recorded, state) = {
        let guest = guest.clone();
        in_time(move |kvm| {
            let recorded = record(kvm, &guest, how);
            let mut replay = Replay::new(kvm, &guest, &recorded.journal);
            replay.run_to(4);
            let state = replay.save();
            (recorded.journal, state)
        })
    };
    let bytes = postcard::to_stdvec(&state.core.cpu).expect("plain values serialise");
    let mut rng = hindsight_replay::rng::Rng::new(1, 77);
    let (mut noticed, mut of_no_account) = (0, 0);
    for _ in 0..FLIPS {
        let bit = rng.below(8 * bytes.len() as u64);
        let mut altered = bytes.clone();
        altered[bit as usize / 8] ^= 1 << (bit % 8);
        let Ok(cpu) = postcard::from_bytes(&altered) else {
            noticed += 1;
            continue;
        };
        let mut state = state.clone();
        state.core.cpu = cpu;
        let (guest, journal) = (guest.clone(), recorded.clone());
        let result = bounded(ALTERED_GUEST_TIME, move |_| {
            let kvm = kvm().expect("it opened before");
            let mut replay = Replay::new(&kvm, &guest, &journal);
            if replay
                .machine
                .restore(&state, &mut replay.cpu, &mut NoDisks)
                .is_err()
            {
                return true;
            }
            replay.restore(&state);
            replay.run(None).is_err()
        });
        match result {
            Ok(true) => noticed += 1,
            // What only says which parts of it are meant, or is a host's.
            Ok(false) => of_no_account += 1,
            Err(Stuck::Panicked) => panic!("bit {bit} flipped, and the replayer panics"),
            // It runs on without an exit.
            Err(_) => noticed += 1,
        }
    }
    eprintln!("{noticed} of {FLIPS} noticed, {of_no_account} decide nothing");
    assert!(10 * noticed >= 7 * FLIPS, "{noticed} of {FLIPS} noticed");
}

//! The law of diversions on the host's own KVM: whatever a debugger writes to a guest, and wherever that takes it, it is
//! then where it was, and comes to the recorded end.

use std::io::Cursor;

use hindsight_replay::rng::Rng;
use hindsight_replay::{
    CheckpointHead, Machine, Pace, Pause, Reverse, ReverseError, Stopped, Target, Timeline,
};
use hindsight_tests::toy_store::ToyStore;
use hindsight_vmm::kvm::{KvmState, Stops};

use super::states::windows_are_sure;
use super::*;

/// So many diversions a guest is taken on, and so many steps on each.
const DIVERSIONS: u64 = 6;
const STEPS: u64 = 5;

/// Stops at the next look, or never.
struct Brief(bool);

impl Pace for Brief {
    fn exits(&self) -> u64 {
        8
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        match self.0 {
            true => Pause::Stop,
            false => Pause::GoOn,
        }
    }
}

type Made = Result<(Machine, KvmCpu, NoDisks), KvmError>;

/// Diverts the recorded guest.
pub(super) fn leave_nothing(guest: &Guest, recorded: &Ran) {
    const STI: u8 = 0xfb;
    const MOV_TO_DR: [u8; 2] = [0x0f, 0x23];
    if guest.code.contains(&STI) && !windows_are_sure() {
        return;
    }
    if guest.code.windows(2).any(|two| two == MOV_TO_DR) {
        return;
    }
    let exits = recorded.trace.turns.len() as u64;
    let (guest, journal, end) = (
        guest.clone(),
        recorded.journal.clone(),
        recorded.end().clone(),
    );
    in_time(move |kvm| {
        let reader = || JournalReader::open(Cursor::new(&journal[..])).expect("it is whole");
        let header = reader().header().clone();
        let make = || -> Made {
            let mut cpu = guest.load(kvm, &header.machine.cpuid)?;
            // Where debug registers work or not, these do.
            cpu.use_no_debug_registers();
            Ok((machine_of(&header), cpu, NoDisks))
        };
        let store = ToyStore::<KvmState, ()>::new(None);
        let replay = Reverse::new(Timeline::new(reader(), store, make));
        let mut replay = replay.expect("it is made");
        let mut rng = Rng::new(exits, 70);
        for number in 0..DIVERSIONS {
            let exit = rng.below(exits);
            let reached = replay.go_to(Target::Exit(exit), &mut Brief(false));
            if !matches!(reached, Ok(Stopped::Interrupted)) || replay.exit() != exit {
                continue;
            }
            let state = replay.save().expect("it is at an exit");
            for _ in 0..rng.below(2) {
                replay.step(&mut Brief(false)).expect("it replays");
            }
            let (here, registers) = (replay.exit(), replay.registers().expect("KVM works"));
            if replay.ended().is_some() {
                continue;
            }
            let cpu = match replay.divert(rng.one_in(2)) {
                // A place in the middle of an instruction of several accesses may not be found again, and this is said.
                Err(ReverseError::Lost { .. }) => continue,
                cpu => cpu.expect("it goes on here"),
            };
            let mut wanted = cpu.guest_registers().expect("KVM works");
            for _ in 0..1 + rng.below(3) {
                wanted.general.0[rng.below(6) as usize] ^= rng.number();
            }
            wanted.fpu[160] ^= 0xff;
            wanted.fs_base ^= 1 << 12;
            if !cpu.is_in_instruction() {
                cpu.write_registers(&wanted).expect("KVM takes them");
                assert_eq!(cpu.guest_registers().expect("KVM works"), wanted);
            }
            for _ in 0..4 {
                let gpa = rng.below(RAM_BYTES / 8) * 8;
                let written = cpu.write_physical(gpa, &rng.number().to_le_bytes());
                assert!(written.expect("KVM works"), "it is RAM");
            }
            for _ in 0..rng.below(STEPS) {
                // What this KVM cannot run ends it.
                if replay.step(&mut Brief(true)).is_err() || replay.ended().is_some() {
                    break;
                }
            }
            replay.end_diversion().expect("it is thrown away");
            assert_eq!(replay.exit(), here, "diversion {number}");
            assert_eq!(replay.registers().expect("KVM works"), registers);
            let back = replay.go_to(Target::Exit(exit), &mut Brief(false));
            back.expect("it replays");
            let after = replay.save().expect("it is at an exit");
            let differences = after.digest().differences(&state.digest());
            assert!(
                differences.is_empty(),
                "diversion {number}: {differences:?}"
            );
        }
        let stopped = replay.resume(&Stops::default(), &mut Brief(false));
        let stopped = stopped.unwrap_or_else(|error| panic!("to the end: {error}"));
        assert_eq!(stopped, Stopped::End(end.to_string()));
    });
}

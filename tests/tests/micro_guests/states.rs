//! The law of states on the host's own KVM: a guest that is saved at any of its exits, and restored in another VM, does
//! from there on what it would have done. And what a guest has in a register that no exit shows is noticed.

use std::io::Cursor;
use std::sync::OnceLock;

use hindsight_replay::{Difference, Divergence, Machine, MachineState, StateOf};
use hindsight_vmm::kvm::Flip;

use super::*;

type State = StateOf<KvmCpu, NoDisks>;

/// How many of a guest's exits are tried; of a guest with more, as many spread over all of them.
const EXITS_TRIED: u64 = 48;

/// A guest in the middle of a replay.
struct Replay<'a> {
    journal: &'a [u8],
    cpu: KvmCpu,
    machine: Machine,
    door: Replayer<Cursor<&'a [u8]>>,
    trace: Trace,
}

fn reader(journal: &[u8]) -> JournalReader<Cursor<&[u8]>> {
    JournalReader::open(Cursor::new(journal)).expect("a whole journal opens")
}

impl<'a> Replay<'a> {
    fn new(kvm: &Kvm, guest: &Guest, journal: &'a [u8]) -> Replay<'a> {
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

    fn run(&mut self, until: Option<u64>) -> Result<End, RunError<KvmError>> {
        self.door.close_after(until);
        let disks = &mut NoDisks;
        (self.machine).run(&mut self.cpu, disks, &mut self.door, &mut self.trace)
    }

    fn run_to(&mut self, until: u64) {
        let reached = self.run(Some(until));
        assert!(
            matches!(reached, Err(RunError::Closed(Closed::Reached(exits))) if exits == until),
            "on the way to exit {until}: {reached:?}"
        );
    }

    fn save(&mut self) -> State {
        let state = self.machine.save(&mut self.cpu, &mut NoDisks, &self.door);
        state.expect("a guest at an exit can be saved")
    }

    fn restore(&mut self, state: &State) {
        let restored = self.machine.restore(state, &mut self.cpu, &mut NoDisks);
        restored.unwrap_or_else(|error| panic!("{error}"));
        let place = state.journal.as_ref().expect("a replay has a place");
        self.door = Replayer::at(reader(self.journal), place).expect("it is this journal's");
        self.trace = Trace::beginning_after(self.machine.at().exits);
    }

    fn memory(&self) -> Vec<u8> {
        let mut memory = vec![0; RAM_BYTES as usize];
        assert!(self.cpu.memory().read(0, &mut memory), "all of it is RAM");
        memory
    }
}

/// Saves the recorded guest at its exits, restores it elsewhere, and compares everything that can be seen from there on.
pub fn obeys_the_law(kvm: &Kvm, guest: &Guest, recorded: &Ran) {
    // A KVM whose windows cannot be relied on does not even replay such a guest each time.
    const STI: u8 = 0xfb;
    if guest.code.contains(&STI) && !windows_are_sure() {
        skip("a guest that takes interrupts is not saved on a KVM that cannot record");
        return;
    }
    let exits = recorded.trace.turns.len() as u64;
    for exit in (1..exits).step_by(exits.div_ceil(EXITS_TRIED) as usize) {
        let mut straight = Replay::new(kvm, guest, &recorded.journal);
        straight.run_to(exit);
        let state = straight.save();
        let bytes = state.to_bytes();
        assert!(
            straight.save().to_bytes() == bytes,
            "exit {exit}: saved twice"
        );
        straight.trace = Trace::beginning_after(exit);
        let end = straight.run(None).expect("it is the recording");
        assert_eq!(end, *recorded.end(), "exit {exit}: after it was saved");

        let state: State = MachineState::from_bytes(&bytes).expect("it was kept");
        // In a fresh VM, and in one that has run to its end.
        let (memory, trace) = (straight.memory(), straight.trace.clone());
        for mut other in [Replay::new(kvm, guest, &recorded.journal), straight] {
            other.restore(&state);
            let again = other.save();
            let differences = again.digest().differences(&state.digest());
            assert!(
                again.to_bytes() == bytes,
                "exit {exit}: restored, it differs in {differences:?}: {:?}, not {:?}",
                again.cpu,
                state.cpu
            );
            let end = other.run(None);
            let end = end.unwrap_or_else(|error| panic!("restored at exit {exit}: {error}"));
            assert_eq!(end, *recorded.end(), "restored at exit {exit}");
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
}

fn windows_are_sure() -> bool {
    static SURE: OnceLock<bool> = OnceLock::new();
    *SURE.get_or_init(|| in_time(hindsight_vmm::doctor::check_recorder).is_ok())
}

/// What comes of a guest in which one bit is flipped at exit `at`.
fn flipped(kvm: &Kvm, guest: &Guest, journal: &[u8], at: u64, flip: Flip) -> Box<Divergence> {
    let mut replay = Replay::new(kvm, guest, journal);
    replay.run_to(at);
    let mut state = replay.save();
    state.cpu.flip(flip);
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

//! The law of debugging on the host's own KVM: a guest that is stopped between its exits, by steps, breakpoints and
//! watchpoints, does what it would have done, and comes to the same end.

use std::sync::OnceLock;

use hindsight_tests::skip::skip_stops;
use hindsight_vmm::kvm::{Hit, Stops, WatchKind, Watchpoint};

use super::states::{Replay, windows_are_sure};
use super::*;

/// So many steps of a guest are taken; a loop that waits would take for ever.
const STEPS_MAX: usize = 600;

/// And so often it is replayed with breakpoints.
const REPLAYS_MAX: usize = 12;

/// Whether breakpoints work here at all, in ring 0.
fn breakpoints_work() -> bool {
    static WORK: OnceLock<bool> = OnceLock::new();
    *WORK.get_or_init(|| in_time(|kvm| hindsight_vmm::doctor::check_breakpoints(kvm)[0]))
}

/// Where a debugger's stops are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stopping {
    InRegisters,
    InMemory,
}

impl Stopping {
    /// The recorded guest, to be stopped like this.
    fn replay<'a>(self, kvm: &Kvm, guest: &Guest, journal: &'a [u8]) -> Replay<'a> {
        let mut replay = Replay::new(kvm, guest, journal);
        if self == Stopping::InMemory {
            replay.cpu.use_no_debug_registers();
        }
        replay
    }

    /// Those that can be had here.
    fn all() -> Vec<Stopping> {
        let registers = ready().then_some(Stopping::InRegisters);
        let memory = kvm().map(|_| Stopping::InMemory);
        registers.into_iter().chain(memory).collect()
    }
}

fn ready() -> bool {
    if kvm().is_none() {
        return false;
    }
    if !breakpoints_work() {
        skip_stops("this KVM has no breakpoints in debug registers");
    }
    breakpoints_work()
}

/// Runs on to the next stop; `None` at the end, which is held against the recording.
fn next_stop(replay: &mut Replay<'_>, recorded: &End) -> Option<Hit> {
    let result = replay.run(None);
    came_back(replay, result, recorded)
}

/// Whether this KVM is one that emulates, and delivers an exception to a handler that begins with a breakpoint over and
/// over.
fn gives_up(result: &Result<End, RunError<KvmError>>) -> bool {
    let gives_up = matches!(result, Err(RunError::Cpu { .. })) && !windows_are_sure();
    if gives_up {
        skip_stops("this KVM does not get past a breakpoint");
    }
    gives_up
}

fn came_back(
    replay: &mut Replay<'_>,
    result: Result<End, RunError<KvmError>>,
    recorded: &End,
) -> Option<Hit> {
    match result {
        Err(RunError::Closed(Closed::Stopped(_))) => Some(replay.cpu.hit().expect("it says why")),
        Ok(end) => {
            assert_eq!(end, *recorded, "another end");
            None
        }
        Err(error) => panic!("stopped by {error}"),
    }
}

fn step(replay: &mut Replay<'_>) {
    let step = replay.cpu.begin_step().expect("an instruction is there");
    let stops = Stops {
        step: Some(step),
        ..Stops::default()
    };
    replay.cpu.stop_at(stops).expect("KVM takes it");
}

fn rip(replay: &mut Replay<'_>) -> u64 {
    hindsight_replay::Cpu::registers(&mut replay.cpu).rip()
}

/// Debugs the recorded guest in several ways, and holds each against the recording.
pub(super) fn are_unseen(guest: &Guest, recorded: &Ran) {
    // A guest whose writes of debug registers are not trapped is none that a debugger can share them with.
    const MOV_TO_DR: [u8; 2] = [0x0f, 0x23];
    if guest.code.windows(2).any(|two| two == MOV_TO_DR) {
        return;
    }
    for stopping in Stopping::all() {
        are_unseen_so(guest, recorded, stopping);
    }
}

fn are_unseen_so(guest: &Guest, recorded: &Ran, stopping: Stopping) {
    let (guest, journal) = (guest.clone(), recorded.journal.clone());
    let end = recorded.end().clone();
    in_time(move |kvm| {
        let mut straight = Replay::new(kvm, &guest, &journal);
        assert_eq!(next_stop(&mut straight, &end), None);
        let (trace, memory) = (straight.trace.clone(), straight.memory());
        let same = |replay: &Replay<'_>, how: &str| {
            assert!(replay.trace == trace, "{stopping:?} {how}: another trace");
            assert!(
                replay.memory() == memory,
                "{stopping:?} {how}: other memory"
            );
        };
        // Step by step, as far as that goes.
        let mut replay = stopping.replay(kvm, &guest, &journal);
        let mut places = Vec::new();
        loop {
            if places.len() < STEPS_MAX {
                step(&mut replay);
            } else {
                replay.cpu.stop_at(Stops::default()).expect("KVM takes it");
            }
            let result = replay.run(None);
            if gives_up(&result) {
                return;
            }
            match came_back(&mut replay, result, &end) {
                Some(_) => places.push(rip(&mut replay)),
                None => break,
            }
        }
        same(&replay, "step by step");
        // With breakpoints where the steps led, some of them at a time, and data watched.
        places.sort_unstable();
        places.dedup();
        let at_once = match stopping {
            Stopping::InRegisters => 3,
            Stopping::InMemory => places.len().max(1),
        };
        let chunks = places.chunks(at_once);
        let every = chunks.len().div_ceil(REPLAYS_MAX).max(1);
        for some in chunks.step_by(every) {
            let mut replay = stopping.replay(kvm, &guest, &journal);
            let stops = Stops {
                execution: some.to_vec(),
                ..Stops::default()
            };
            replay.cpu.stop_at(stops).expect("KVM takes it");
            let mut hits = 0;
            loop {
                let result = replay.run(None);
                if gives_up(&result) {
                    return;
                }
                let Some(hit) = came_back(&mut replay, result, &end) else {
                    break;
                };
                if let Hit::NoRoom { .. } = hit {
                    return;
                }
                assert!(
                    matches!(hit, Hit::Execution(at) if some.contains(&at)),
                    "{hit:x?} at {some:x?}"
                );
                assert_eq!(hit, Hit::Execution(rip(&mut replay)));
                hits += 1;
                if hits == STEPS_MAX {
                    replay.cpu.stop_at(Stops::default()).expect("KVM takes it");
                }
            }
            assert!(hits > 0, "{some:x?} is never come to");
            same(&replay, "with breakpoints");
        }
    });
}

/// A recording of a guest.
fn recorded(kvm: &Kvm, guest: &Guest) -> Ran {
    let how = How {
        seed: 1,
        detail: Detail::Default,
        memory_every: Some(1),
    };
    let ran = record(kvm, guest, how);
    ran.end();
    ran
}

#[test]
fn a_step_leads_from_each_instruction_to_the_next_one_of_the_guests() {
    for stopping in Stopping::all() {
        in_time(move |kvm| each_step_leads_to_the_next(kvm, stopping));
    }
}

fn each_step_leads_to_the_next(kvm: &Kvm, stopping: Stopping) {
    let guest = Guest::new(|a| {
        let (mut function, mut over) = (a.create_label(), a.create_label());
        a.mov(ecx, 2)?;
        a.jmp(over)?;
        a.set_label(&mut function)?;
        a.inc(ebx)?;
        a.ret()?;
        a.set_label(&mut over)?;
        a.call(function)?;
        out(a, NOBODY, 1)?;
        a.dec(ecx)?;
        a.jnz(over)?;
        a.lea(rax, ptr(function))?;
        a.call(rax)
    });
    let ran = recorded(kvm, &guest);
    let mut replay = stopping.replay(kvm, &guest, &ran.journal);
    let mut lengths = Vec::new();
    let mut at = CODE;
    loop {
        step(&mut replay);
        if next_stop(&mut replay, ran.end()).is_none() {
            break;
        }
        let next = rip(&mut replay);
        lengths.push(next.wrapping_sub(at) as i64);
        at = next;
    }
    // mov, jmp; twice call, inc, ret, mov, out, dec, jnz; lea, call, inc, ret, cli.
    let round = [-3, 2, 6, 2, 2, 2];
    let expected = [&[5, 5][..], &round, &[-11], &round, &[2, 7, -23, 2, 23, 1]].concat();
    assert_eq!(lengths, expected, "{stopping:?}");
}

#[test]
fn a_place_is_found_again_by_how_often_it_was_come_to_since_the_exit() {
    for stopping in Stopping::all() {
        in_time(move |kvm| is_found_again(kvm, stopping));
    }
}

fn is_found_again(kvm: &Kvm, stopping: Stopping) {
    let guest = Guest::new(|a| {
        out(a, NOBODY, 1)?;
        a.mov(ecx, 50)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(rbx)?;
        a.loop_(again)?;
        out(a, NOBODY, 2)
    });
    let ran = recorded(kvm, &guest);
    let inc = CODE + 9;
    for number in [1, 2, 17, 50] {
        let mut replay = stopping.replay(kvm, &guest, &ran.journal);
        replay.run_to(1);
        let stops = Stops {
            arrival: Some((inc, number)),
            ..Stops::default()
        };
        replay.cpu.stop_at(stops).expect("KVM takes it");
        let hit = next_stop(&mut replay, ran.end());
        assert_eq!(hit, Some(Hit::Arrival(inc)));
        let registers = hindsight_replay::Cpu::registers(&mut replay.cpu);
        assert_eq!(registers.0[RBX], number - 1);
        // And by counting, on the way elsewhere.
        let mut replay = stopping.replay(kvm, &guest, &ran.journal);
        replay.run_to(1);
        replay.cpu.count_arrivals(Some(inc)).expect("KVM takes it");
        assert_eq!(next_stop(&mut replay, ran.end()), None);
    }
}

#[test]
fn a_watchpoint_stops_after_each_write_and_not_after_a_read() {
    if !ready() {
        return;
    }
    in_time(|kvm| {
        let guest = Guest::new(|a| {
            a.mov(rsi, DATA + 0x200)?;
            for value in 1..4 {
                a.mov(dword_ptr(rsi), value)?;
                a.mov(eax, dword_ptr(rsi))?;
                out(a, NOBODY, value as u32)?;
            }
            Ok(())
        });
        let ran = recorded(kvm, &guest);
        for (kind, hits) in [(WatchKind::Write, 3), (WatchKind::Access, 6)] {
            let mut replay = Replay::new(kvm, &guest, &ran.journal);
            let watchpoint = Watchpoint {
                address: DATA + 0x200,
                bytes: 4,
                kind,
            };
            let stops = Stops {
                data: vec![watchpoint],
                ..Stops::default()
            };
            replay.cpu.stop_at(stops).expect("KVM takes it");
            let mut found = 0;
            while let Some(hit) = next_stop(&mut replay, ran.end()) {
                assert_eq!(hit, Hit::Data(watchpoint));
                found += 1;
            }
            if found == 0 && !windows_are_sure() {
                skip_stops("this KVM has no watchpoints in debug registers");
                return;
            }
            assert_eq!(found, hits, "{kind:?}");
            assert!(replay.memory() == ran.memory);
        }
    });
}

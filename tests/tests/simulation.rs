//! Thousands of seeds, each a machine, a program and a world, through the production loop.
//!
//! Long, because each is one claim about the same loop over the same seeds.
//!
//! `HINDSIGHT_SIM_SEEDS` says how many seeds (default 5,000), `HINDSIGHT_SIM_SEED` picks one. A
//! failure names its seed and how to run it alone.

use hindsight_devices::{Access, Input, Nanos, NoDisks, Ram, Room, Width};
use hindsight_replay::rng::{Rng, mix};
use hindsight_replay::{
    Answer, Back, Closed, Cpu, CpuDigest, Detail, Difference, Ending, Event, Exit, FullDigest,
    Horizon, JournalReader, LeftOpen, Machine, MemoryDigest, Mode, Record, Registers, Replayer,
    RunError, ShownClock, TimeInstruction, WITNESS_EVERY, World,
};
use hindsight_tests::sim::{
    Recording, Replayed, Scenario, Unchecked, Verdict, bare_machine, cpuid_table, machine_of,
    records_of, relog, replay, replay_on, write_records,
};
use hindsight_tests::sim_world::SimWorld;
use hindsight_tests::toy_cpu::{Broken, Fault, FaultKind, MEMORY_BYTES, ToyCpu};

/// A witness has 16 bits: once in 65,536 times it is equal by chance, and the next one is not.
const LATE_WITNESSES_MAX: u32 = 1;

/// Runs `check` for one seed in `share` of those asked for.
fn for_seeds(share: u64, check: impl Fn(u64)) {
    hindsight_tests::seeds::for_seeds("simulation", 5_000, share, check);
}

/// The host of the recording, and two hosts for replays, all different.
fn noises(seed: u64) -> [u64; 3] {
    [mix(seed ^ 0xaa), mix(seed ^ 0xbb), mix(seed ^ 0xcc)]
}

fn assert_equal(recording: &Recording, replayed: &Replayed) {
    match &replayed.verdict {
        Verdict::Equal(end) => assert_eq!(Some(end), recording.end.as_ref()),
        other => panic!("expected an equal replay, found {other:?}"),
    }
    assert_eq!(recording.trace, replayed.trace);
    assert!(
        recording.memory == replayed.memory || stopped_running(recording),
        "memory differs"
    );
}

/// A guest stopped between exits is at no moment; its memory is not compared.
fn stopped_running(recording: &Recording) -> bool {
    recording
        .end
        .as_ref()
        .is_some_and(|end| end.ending == Ending::StoppedRunning)
}

fn diverged_at(replayed: &Replayed) -> Option<u64> {
    match &replayed.verdict {
        Verdict::Diverged(divergence) => Some(divergence.at.exits),
        _ => None,
    }
}

#[test]
fn every_seed_replays_bit_for_bit_on_another_host() {
    for_seeds(1, |seed| {
        let [here, there, _] = noises(seed);
        let recording = Scenario::new(seed).record(Detail::Default, here);
        let replayed = replay(&recording.journal, ToyCpu::new(seed, there), None);
        assert_equal(&recording, &replayed);
        let asked = records_of(&recording.journal)
            .iter()
            .filter(|record| matches!(record.event, Event::State { .. }))
            .count() as u64;
        let at_end = u64::from(!stopped_running(&recording));
        assert_eq!(
            replayed.states_checked,
            asked + at_end,
            "every memory digest is compared"
        );
    });
}

/// The toy asserts at each read of the time that it did not run backwards; this is about how many of
/// them there are, and that some come to the end of the clock.
#[test]
fn a_kernel_that_reads_the_time_from_memory_exits_less_for_it() {
    let [mut quick, mut exit] = [0_u64; 2];
    for seed in 0..500 {
        for (count, is_quick) in [(&mut quick, true), (&mut exit, false)] {
            let scenario = Scenario {
                quick: is_quick,
                ..Scenario::new(seed)
            };
            let recording = scenario.record(Detail::Default, seed);
            let reads = recording.trace.turns.iter().filter(|turn| {
                matches!(
                    turn.exit,
                    Exit::TimeRead {
                        instruction: TimeInstruction::Rdtsc,
                        mode: Mode::Kernel,
                    }
                )
            });
            *count += reads.count() as u64;
            let replayed = replay(&recording.journal, ToyCpu::new(seed, seed + 1), None);
            assert_equal(&recording, &replayed);
        }
    }
    assert!(
        0 < quick && quick < exit / 4,
        "{quick} exits, {exit} without it"
    );
}

#[test]
fn a_full_recording_replays_and_says_the_same_as_a_default_one() {
    for_seeds(4, |seed| {
        let [here, _, elsewhere] = noises(seed);
        let brief = Scenario::new(seed).record(Detail::Default, here);
        let full = Scenario::new(seed).record(Detail::Full, here);
        assert_eq!(brief.end, full.end);
        assert_eq!(brief.trace, full.trace);
        let replayed = replay(&full.journal, ToyCpu::new(seed, elsewhere), None);
        assert_equal(&full, &replayed);

        let records = records_of(&full.journal);
        let turns = records.iter().filter_map(|record| match &record.event {
            Event::Turn(turn) => Some(**turn),
            _ => None,
        });
        assert!(
            turns.eq(full.trace.turns.iter().copied()),
            "a full journal holds every turn"
        );
        let without_turns: Vec<Record> = records
            .into_iter()
            .filter(|record| !matches!(record.event, Event::Turn(_) | Event::Posted(_)))
            .collect();
        assert_eq!(without_turns, records_of(&brief.journal));
    });
}

#[test]
fn a_replay_recorded_again_gives_the_same_bytes() {
    for_seeds(4, |seed| {
        let [here, there, elsewhere] = noises(seed);
        let scenario = Scenario::new(seed);
        let brief = scenario.record(Detail::Default, here).journal;
        let full = scenario.record(Detail::Full, here).journal;
        for (from, detail, expected) in [
            (&brief, Detail::Default, &brief),
            (&brief, Detail::Full, &full),
            (&full, Detail::Default, &brief),
        ] {
            let noise = if detail == Detail::Full {
                there
            } else {
                elsewhere
            };
            let (verdict, copy) = relog(from, &scenario.header(detail), ToyCpu::new(seed, noise));
            assert!(matches!(verdict, Verdict::Equal(_)), "{verdict:?}");
            assert_eq!(
                records_of(&copy),
                records_of(expected),
                "relogged as {detail:?}"
            );
            assert!(
                copy == *expected,
                "same events, other bytes: relogged as {detail:?}"
            );
        }
    });
}

#[test]
fn a_replay_stops_at_exactly_the_exit_asked_for() {
    for_seeds(4, |seed| {
        let [here, there, _] = noises(seed);
        let recording = Scenario::new(seed).record(Detail::Default, here);
        for until in [0, 1, mix(seed) % recording.exits, recording.exits - 1] {
            if until >= recording.exits {
                continue;
            }
            let replayed = replay(&recording.journal, ToyCpu::new(seed, there), Some(until));
            assert!(
                matches!(replayed.verdict, Verdict::Reached(exits) if exits == until),
                "asked for {until}, came to {:?}",
                replayed.verdict
            );
            let expected = recording.trace.through(until);
            assert_eq!(replayed.trace.turns, expected.turns);
            // Windows that open after the exit lie beyond the stop.
            assert!(expected.interrupts.starts_with(&replayed.trace.interrupts));
            let before = recording.trace.through(until.saturating_sub(1)).interrupts;
            assert!(replayed.trace.interrupts.starts_with(&before));
        }
    });
}

#[test]
fn a_replay_stops_at_the_first_exit_at_the_guest_time_asked_for() {
    for_seeds(8, |seed| {
        let [here, there, _] = noises(seed);
        let recording = Scenario::new(seed).record(Detail::Default, here);
        let turns = &recording.trace.turns;
        if turns.len() < 2 {
            return;
        }
        // Not the last one: a run that has ended is not stopped.
        let wanted = turns[mix(seed) as usize % (turns.len() - 1)].now;
        let before = turns.iter().take_while(|turn| turn.now < wanted).count() as u64;
        // It is 0 before the first exit.
        let expected = if wanted == 0 { 0 } else { before + 1 };
        let reader = JournalReader::open(recording.journal.as_slice()).expect("the head is whole");
        let mut machine = machine_of(reader.header());
        let mut replayer = Replayer::new(reader, None, None);
        replayer.close_at_time(Some(wanted));
        let result = machine.run(
            &mut ToyCpu::new(seed, there),
            &mut NoDisks,
            &mut replayer,
            &mut (),
        );
        assert!(
            matches!(result, Err(RunError::Closed(Closed::Reached(exits))) if exits == expected),
            "asked for {wanted} ns at exit {expected}, came to {result:?}"
        );
    });
}

#[test]
fn a_recording_whose_cpu_failed_replays_up_to_the_failure() {
    for_seeds(8, |seed| {
        let [here, there, _] = noises(seed);
        let scenario = Scenario::new(seed);
        let exit = 1 + mix(seed) % 60;
        let cpu = ToyCpu::new(seed, here).with_fault(Fault {
            exit,
            kind: FaultKind::Host,
        });
        let world = SimWorld::new(seed, scenario.pace_ns);
        let (result, recording) = scenario.record_with(Detail::Default, world, cpu);
        if result.is_ok() {
            return;
        }
        let replayed = replay(&recording.journal, ToyCpu::new(seed, there), None);
        match &replayed.verdict {
            // Turns after the last event leave no trace; there are few of those.
            Verdict::CutShort(tail) => {
                assert!(tail.through <= recording.exits, "{tail}");
                assert!(recording.exits - tail.through < WITNESS_EVERY, "{tail}");
                assert_eq!(replayed.trace, recording.trace.through(tail.through));
            }
            other => panic!("expected a recording cut short, found {other:?}"),
        }
    });
}

/// What a machine with this fault does when nobody stops it.
fn unchecked(recording: &Recording, machine: &mut Machine, cpu: &mut ToyCpu) -> Recording {
    let mut door = Unchecked::new(&records_of(&recording.journal), recording.exits);
    let mut faulty = Recording {
        end: None,
        ..recording.clone()
    };
    faulty.trace = Default::default();
    let result = machine.run(cpu, &mut NoDisks, &mut door, &mut faulty.trace);
    faulty.end = result.ok();
    faulty.memory = cpu.memory().to_vec();
    faulty
}

#[test]
fn one_flipped_bit_is_noticed_at_the_first_exit_it_affects() {
    let late_witnesses = std::cell::Cell::new(0);
    for_seeds(4, |seed| {
        let [here, there, _] = noises(seed);
        let mut rng = Rng::new(seed, 9);
        let scenario = Scenario::new(seed);
        let full = scenario.record(Detail::Full, here);
        let brief = scenario.record(Detail::Default, here);
        let exit = 1 + rng.below(full.exits.min(150));
        let kind = if rng.one_in(2) {
            let index = rng.below(Registers::COUNT as u64) as usize;
            FaultKind::Register {
                index,
                bit: rng.below(64) as u32,
            }
        } else {
            FaultKind::Memory {
                bit: rng.below(8 * MEMORY_BYTES as u64) as usize,
            }
        };
        let fault = Fault { exit, kind };
        let cpu = || ToyCpu::new(seed, there).with_fault(fault);
        let machine = || machine_of(&scenario.header(Detail::Full));
        let faulty = unchecked(&full, &mut machine(), &mut cpu());
        let first = full.trace.first_difference(&faulty.trace);

        let replayed = replay(&full.journal, cpu(), None);
        match (first, &replayed.verdict) {
            (Some(first), Verdict::Diverged(divergence)) => {
                // An interrupt that did not come is missed at the exit after it.
                let missed = matches!(divergence.difference, Difference::Missed { .. });
                let at = divergence.at.exits;
                // Memory is looked at in between.
                let memory = matches!(divergence.difference, Difference::State { .. });
                assert!(
                    at == first || (missed && at == first + 1) || (memory && at < first),
                    "first affected at {first}, noticed at {at}: {divergence}"
                );
                if let FaultKind::Register { .. } = kind {
                    assert_eq!(at, first, "{divergence}");
                    let named = matches!(divergence.difference, Difference::Turn { .. });
                    assert!(named, "a register's fault is named: {divergence}");
                }
            }
            // Never reached, or written over before anybody looked.
            (None, Verdict::Equal(end)) => {
                assert_eq!(Some(end), full.end.as_ref());
                assert!(stopped_running(&full) || replayed.memory == full.memory);
            }
            (None, Verdict::Diverged(divergence)) => {
                let last = divergence.at.exits == full.exits;
                let memory = matches!(divergence.difference, Difference::State { .. });
                assert!(last || memory, "{divergence}");
            }
            (first, other) => panic!("first affected at {first:?}, but {other:?}"),
        }

        let replayed = replay(&brief.journal, cpu(), None);
        match (first, diverged_at(&replayed)) {
            (Some(first), Some(at)) => {
                assert!(
                    at < first + 2 * WITNESS_EVERY,
                    "affected at {first}, noticed at {at}"
                );
                let late = u32::from(at >= first + WITNESS_EVERY);
                late_witnesses.set(late_witnesses.get() + late);
            }
            (None, _) => {}
            (Some(first), None) => panic!("affected at {first}, but {:?}", replayed.verdict),
        }
    });
    assert!(
        late_witnesses.get() <= 1,
        "{} witnesses were late",
        late_witnesses.get()
    );
}

#[test]
fn memory_that_differs_in_accessed_bits_alone_is_told_and_ends_no_replay() {
    for_seeds(20, |seed| {
        let [here, there, _] = noises(seed);
        let scenario = Scenario {
            memory_every: Some(7),
            ..Scenario::new(seed)
        };
        let recording = scenario.record(Detail::Default, here);
        let replayed = replay(&recording.journal, ToyCpu::new(seed, there), None);
        assert_eq!(replayed.states_but_accessed, 0);

        let mut records = records_of(&recording.journal);
        let other = |state: &mut FullDigest| state.memory = state.memory.otherwise_accessed();
        let mut others = 0;
        for record in &mut records {
            match &mut record.event {
                Event::State { digest } => other(digest),
                Event::End(end) if end.state.is_some() => end.state.iter_mut().for_each(other),
                _ => continue,
            }
            others += 1;
        }
        let header = scenario.header(Detail::Default);
        let journal = write_records(&header, &records, 1000);
        let replayed = replay(&journal, ToyCpu::new(seed, there), None);
        let equal = matches!(replayed.verdict, Verdict::Equal(_));
        assert!(equal, "{:?}", replayed.verdict);
        assert_eq!(replayed.states_but_accessed, others);
        assert_eq!(replayed.states_checked, others);
    });
}

/// Replays recordings of many seeds in a machine that is wrong from its first exit on.
fn notices_from_the_first_exit(wrong: impl Fn(&Scenario) -> Machine) {
    let late_witnesses = std::cell::Cell::new(0);
    for_seeds(10, |seed| {
        let [here, there, _] = noises(seed);
        let scenario = Scenario::new(seed);
        for detail in [Detail::Default, Detail::Full] {
            let recording = scenario.record(detail, here);
            let cpu = ToyCpu::new(seed, there);
            let replayed = replay_on(wrong(&scenario), &recording.journal, cpu, None);
            let at = diverged_at(&replayed);
            let at = at.unwrap_or_else(|| panic!("not noticed: {:?}", replayed.verdict));
            if detail == Detail::Full {
                assert_eq!(at, 1, "a full recording has every turn");
            } else {
                assert!(at <= 2 * WITNESS_EVERY, "noticed at {at}");
                late_witnesses.set(late_witnesses.get() + u32::from(at > WITNESS_EVERY));
            }
        }
    });
    assert!(
        late_witnesses.get() <= LATE_WITNESSES_MAX,
        "{} were late",
        late_witnesses.get()
    );
}

#[test]
fn another_time_rule_diverges() {
    notices_from_the_first_exit(|scenario| {
        // Not much of the time passes by the rule where reads have their own.
        let ns_per_exit = scenario.ns_per_exit + if scenario.quick { 100 } else { 1 };
        let quick = scenario.header(Detail::Default).machine.quick_reads;
        bare_machine(cpuid_table(), ns_per_exit).with_quick_reads(quick)
    });
}

#[test]
fn another_cpu_diverges() {
    // The program's first instruction is CPUID.
    notices_from_the_first_exit(|scenario| {
        let mut table = cpuid_table();
        table.entries[0].values[2] ^= 1 << 9;
        let quick = scenario.header(Detail::Default).machine.quick_reads;
        bare_machine(table, scenario.ns_per_exit).with_quick_reads(quick)
    });
}

/// Changes one field of one event; `None` if the event has nothing of that kind.
fn tampered(record: &Record, rng: &mut Rng) -> Option<Record> {
    let mut record = record.clone();
    match &mut record.event {
        Event::Turn(turn) => match rng.below(4) {
            0 => match &mut turn.exit {
                Exit::Access(Access::PortWrite { value, .. }) => *value ^= 1 << rng.below(8),
                Exit::Access(Access::PortRead { port, .. }) => *port ^= 1 << rng.below(16),
                Exit::Access(Access::MemoryWrite { value, .. }) => *value ^= 1 << rng.below(8),
                Exit::Cpuid { leaf, .. } => *leaf ^= 1 << rng.below(32),
                Exit::WriteCr4 { value } => *value ^= 1 << rng.below(64),
                _ => return None,
            },
            1 => match &mut turn.answer {
                Answer::Value(value) => *value ^= 1 << rng.below(64),
                Answer::Time { tsc, .. } => *tsc ^= 1 << rng.below(64),
                Answer::Cpuid(values) => values[rng.below(4) as usize] ^= 1 << rng.below(32),
                answer @ Answer::Done => *answer = Answer::Fault,
                answer @ Answer::Fault => *answer = Answer::Value(0),
            },
            2 => turn.now ^= 1 << rng.below(20),
            _ => turn.registers.0[rng.below(18) as usize] ^= 1 << rng.below(64),
        },
        Event::Time { ahead_ns } => *ahead_ns += 1 + rng.below(1_000) as i64,
        Event::Interrupt { vector, at } => match rng.below(3) {
            0 => *vector ^= 1 << rng.below(8),
            1 => at.rip ^= 1 << rng.below(64),
            _ => at.rcx ^= 1 << rng.below(64),
        },
        Event::Witness { check } => check[rng.below(2) as usize] ^= 1 << rng.below(8),
        Event::FirstReads { check } => *check ^= 1 << rng.below(64),
        Event::State { digest } => digest.memory = MemoryDigest::of_parts(rng.below(u64::MAX), 0),
        Event::End(end) => match rng.below(4) {
            0 => end.digest ^= 1 << rng.below(64),
            1 => end.now += 1,
            2 => end.panic = Some("no".into()),
            _ => end.state = end.state.map_or(Some(FullDigest::default()), |_| None),
        },
        Event::Posted(bytes) => bytes[0] ^= 1 << rng.below(8),
        Event::LeftOpen(what) => {
            let all = LeftOpen::ALL;
            let other = (*what as usize + 1 + rng.below(all.len() as u64 - 1) as usize) % all.len();
            *what = all[other];
        }
        Event::Input(_) | Event::Preempted { .. } => return None,
    }
    Some(record)
}

#[test]
fn one_changed_field_of_a_full_journal_is_refused_at_its_own_exit() {
    for_seeds(4, |seed| {
        let [here, there, _] = noises(seed);
        let mut rng = Rng::new(seed, 10);
        let scenario = Scenario::new(seed);
        let full = scenario.record(Detail::Full, here);
        let records = records_of(&full.journal);
        let whole = write_records(&scenario.header(Detail::Full), &records, 40);
        assert_equal(&full, &replay(&whole, ToyCpu::new(seed, there), None));
        for _ in 0..6 {
            // Turns are the most frequent; every second time take something rarer.
            let start = rng.below(records.len() as u64) as usize;
            let rare = rng.one_in(2);
            let place = (start..records.len())
                .find(|i| !rare || !matches!(records[*i].event, Event::Turn(_)))
                .expect("the end is not a turn");
            let Some(record) = tampered(&records[place], &mut rng) else {
                continue;
            };
            let mut changed = records.clone();
            changed[place] = record.clone();
            let journal = write_records(&scenario.header(Detail::Full), &changed, 40);
            let replayed = replay(&journal, ToyCpu::new(seed, there), None);
            let at = diverged_at(&replayed);
            assert_eq!(
                at,
                Some(record.exits),
                "changed {:?}\nto {:?}\nand got {:?}",
                records[place].event,
                record.event,
                replayed.verdict
            );
        }
    });
}

#[test]
fn the_seeds_reach_what_they_are_meant_to_reach() {
    let mut exits = [0; Exit::KINDS];
    let mut events = [0; Event::KINDS];
    let mut endings = std::collections::BTreeMap::new();
    let mut posted = 0;
    let (mut at_exits, mut in_windows, mut frames, mut panics, mut vectors) =
        (0, 0, 0, 0, [0; 256]);
    for seed in 0..400 {
        let recording = Scenario::new(seed).record(Detail::Default, 1);
        for turn in &recording.trace.turns {
            exits[turn.exit.kind()] += 1;
        }
        for record in records_of(&recording.journal) {
            events[record.event.kind()] += 1;
        }
        for (at, vector) in &recording.trace.interrupts {
            vectors[usize::from(*vector)] += 1;
            let turn = &recording.trace.turns[at.exits as usize - 1];
            if turn.registers.interrupts_enabled() {
                at_exits += 1
            } else {
                in_windows += 1
            }
        }
        let mut reader = JournalReader::open(recording.journal.as_slice()).expect("it opens");
        while reader.next_frame().expect("it reads").is_some() {
            frames += 1;
        }
        let end = recording.end.expect("it ended");
        panics += u32::from(end.panic.is_some());
        posted += recording.trace.posted.len();
        *endings.entry(format!("{:?}", end.ending)).or_insert(0) += 1;
    }
    println!("exits {exits:?}\nevents {events:?}\nendings {endings:?}");
    println!(
        "interrupts at exits {at_exits}, in windows {in_windows}; frames {frames}; panics {panics}"
    );
    println!(
        "timer {}, UART {}, RTC {}",
        vectors[0x30], vectors[0x34], vectors[0x38]
    );
    // Whole turns and posted writes are for full detail, preemptions for CPUs with a counter (landing.rs), and first
    // reads for machines with a disk.
    let counted = (0..Exit::KINDS).filter(|kind| *kind != Exit::PREEMPTED);
    assert!(
        counted.into_iter().all(|kind| exits[kind] >= 20),
        "exits: {exits:?}"
    );
    assert_eq!(exits[Exit::PREEMPTED], 0);
    assert!(posted >= 100, "{posted} exits after posted writes");
    let [_, rest @ .., _, _, _, left_open] = events;
    assert!(left_open >= 100, "{left_open} events of what is left open");
    assert!(rest.iter().all(|count| *count >= 100), "events: {events:?}");
    assert!(
        endings.len() >= 6 && endings.values().all(|count| *count >= 3),
        "{endings:?}"
    );
    assert!(
        at_exits >= 200 && in_windows >= 200,
        "{at_exits} at exits, {in_windows} in windows"
    );
    assert!(
        frames >= 600 && panics >= 8,
        "{frames} frames, {panics} panics"
    );
    for vector in [0x30, 0x34, 0x38] {
        assert!(
            vectors[vector] >= 20,
            "vector {vector:#x} came {} times",
            vectors[vector]
        );
    }
}

/// Says that it is ready to receive, then reads the UART's line status, for ever.
struct Poller(u64, Ram);

impl Cpu for Poller {
    type Error = Broken;

    fn run(&mut self, _: Horizon) -> Result<Back, Broken> {
        self.0 += 1;
        Ok(Back::Exit(Exit::Access(if self.0 == 1 {
            // MCR bit 1: request to send (16550D data sheet, 8.7).
            Access::PortWrite {
                port: 0x3fc,
                width: Width::Byte,
                value: 2,
            }
        } else {
            Access::PortRead {
                port: 0x3fd,
                width: Width::Byte,
            }
        })))
    }
    fn registers(&mut self) -> Registers {
        Registers([self.0; Registers::COUNT])
    }
    fn answer(&mut self, _: &Exit, _: &Answer) -> Result<(), Broken> {
        Ok(())
    }
    fn settle(&mut self) -> Result<bool, Broken> {
        Ok(false)
    }
    fn interrupt(&mut self, _: u8) -> Result<(), Broken> {
        unreachable!("it never takes one")
    }
    fn show_clock(&mut self, _clock: ShownClock) {}
    fn request_window(&mut self, _: bool) {}
    fn ram(&self) -> &Ram {
        &self.1
    }
    fn memory_digest(&mut self) -> Result<MemoryDigest, Broken> {
        Ok(MemoryDigest::default())
    }
    fn state_digest(&mut self) -> Result<CpuDigest, Broken> {
        Ok(CpuDigest::default())
    }
}

/// Types one byte at one exit and stops the machine at another.
struct OneByte {
    exit: u64,
    typed_at: u64,
    stop_at: u64,
}

impl World for OneByte {
    fn now(&mut self) -> Nanos {
        0
    }
    fn poll(&mut self, _: &Room) -> Option<Input> {
        if self.exit == self.typed_at {
            self.typed_at = 0;
            return Some(Input::Console(b"x".to_vec()));
        }
        if self.exit == self.stop_at {
            self.stop_at = 0;
            return Some(Input::Stop);
        }
        self.exit += 1;
        None
    }
    fn sleep(&mut self, _: Option<Nanos>, _: &Room) -> bool {
        false
    }
    fn gives_up(&mut self) -> bool {
        false
    }
    fn alarm(&mut self, _: Option<Nanos>) {}
    fn input_waits(&mut self, _: &Room) -> bool {
        false
    }
}

#[test]
fn a_byte_typed_at_a_moment_arrives_at_that_moment() {
    use hindsight_replay::{Live, Recorder, Replayer};
    use hindsight_tests::sim::Trace;

    let header = Scenario {
        seed: 0,
        ns_per_exit: 10,
        pace_ns: 0,
        memory_every: None,
        patience_ns: None,
        chaos: None,
        quick: false,
        panic_grace_ns: None,
    }
    .header(Detail::Default);
    for typed_at in [2, 7, 16, 17] {
        let world = OneByte {
            exit: 1,
            typed_at,
            stop_at: 20,
        };
        let mut journal = Vec::new();
        let mut door = Recorder::create(Live::new(world, None), &mut journal, &header).unwrap();
        let mut seen = [Trace::default(), Trace::default()];
        machine_of(&header)
            .run(
                &mut Poller(0, Ram::new()),
                &mut NoDisks,
                &mut door,
                &mut seen[0],
            )
            .unwrap();
        let reader = JournalReader::open(journal.as_slice()).unwrap();
        let mut door = Replayer::new(reader, None, None);
        machine_of(&header)
            .run(
                &mut Poller(0, Ram::new()),
                &mut NoDisks,
                &mut door,
                &mut seen[1],
            )
            .unwrap();
        for trace in seen {
            let ready = trace.turns.iter().position(|turn| {
                // LSR bit 0: data ready (16550D data sheet, 8.6.3).
                matches!(turn.answer, Answer::Value(value) if value & 1 != 0)
            });
            assert_eq!(
                ready,
                Some(typed_at as usize - 1),
                "typed at exit {typed_at}"
            );
            assert_eq!(trace.turns.len(), 20);
        }
    }
}

//! One seed, one machine: recorded, replayed, and told apart.
//!
//! Long, because whatever a run can show has to be collected, cut and compared in the same way.

use std::collections::BTreeMap;

use hindsight_devices::{Devices, FirstReads, Input, Nanos, NoDisks, Output, Room};
use hindsight_replay::{
    Chaos, Closed, Complete, Content, CpuidEntry, CpuidTable, Detail, Divergence, End, Event,
    FullDigest, Guest, Header, Horizon, Host, JournalError, JournalReader, JournalWriter, LeftOpen,
    Live, Machine, MachineDescription, Moment, Observer, Outside, Patience, Place, Position,
    QuickReads, Record, Recorder, Replayer, RunError, Tail, TrapCounts, Turn, Unit, VCPUS,
    VcpuNumber,
};

use crate::sim_world::SimWorld;
use crate::toy_cpu::{Broken, ToyCpu};
use hindsight_replay::rng::Rng;

/// A machine and its world, both made of a seed.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// The seed.
    pub seed: u64,
    /// The time rule.
    pub ns_per_exit: u64,
    /// How fast the host runs against that.
    pub pace_ns: Nanos,
    /// How often the recorder digests all of memory.
    pub memory_every: Option<u64>,
    /// How long what is due waits for an exit, where there is a counter.
    pub patience_ns: Option<Nanos>,
    /// The seed of its chaos.
    pub chaos: Option<u64>,
    /// Its kernel reads the time without exits.
    pub quick: bool,
    /// How long its guest may run on after a panic.
    pub panic_grace_ns: Option<Nanos>,
}

impl Scenario {
    /// The scenario of a seed.
    pub fn new(seed: u64) -> Scenario {
        let mut rng = Rng::new(seed, 4);
        let ns_per_exit = [0, 1, 1_000, 5_000, 50_000][rng.below(5) as usize];
        let pace_ns = [1, 1_000, 8_000, 100_000, 2_000_000][rng.below(5) as usize];
        let memory_every = [None, Some(1), Some(7), Some(64)][rng.below(4) as usize];
        Scenario {
            seed,
            ns_per_exit,
            pace_ns,
            memory_every,
            patience_ns: None,
            chaos: None,
            quick: rng.one_in(2),
            panic_grace_ns: None,
        }
    }

    /// The same, but what is due waits no longer than `patience_ns` for an exit.
    pub fn with_patience(self, patience_ns: Nanos) -> Scenario {
        Scenario {
            patience_ns: Some(patience_ns),
            ..self
        }
    }

    /// The head of its journals.
    pub fn header(&self, detail: Detail) -> Header {
        let content = Content {
            bytes: self.seed,
            blake3: [7; 32],
        };
        Header {
            detail,
            machine: MachineDescription {
                memory_bytes: crate::toy_cpu::MEMORY_BYTES as u64,
                vcpus: VCPUS,
                cmdline: format!("toy seed={}", self.seed),
                kernel: content,
                kernel_version: "toy".into(),
                initrd: None,
                traps: TrapCounts::default(),
                cpuid: cpuid_table(),
                seed: [3; 32],
                ns_per_exit: self.ns_per_exit,
                preemption: self.patience_ns.map(|_| Unit::Branches),
                quick_reads: self.quick.then(|| QuickReads {
                    // So few that a toy gets to the end of them.
                    reads: 1 + self.seed as u32 % 2,
                    ..QuickReads::new(1, 2, self.ns_per_exit)
                }),
                devices: Devices::default(),
                images: Vec::new(),
            },
            host: Host {
                recorder: "simulation".into(),
                cpu: "toy".into(),
                kernel: "none".into(),
                unix_seconds: 1_700_000_000,
                holes: Vec::new(),
                counter: None,
                chaos: None,
                console: hindsight_replay::OperatorConsole::default(),
            },
        }
    }

    /// Records it on the host of `noise`.
    pub fn record(&self, detail: Detail, noise: u64) -> Recording {
        let world = SimWorld::new(self.seed, self.pace_ns);
        let cpu = ToyCpu::new(self.seed, noise);
        let (result, recording) = self.record_with(detail, world, cpu);
        let end = result.unwrap_or_else(|failure| panic!("the recording failed: {failure}"));
        Recording {
            end: Some(end),
            ..recording
        }
    }

    /// The door to a live world.
    pub fn live(&self, world: SimWorld) -> Live<SimWorld> {
        let chaos = |seed| Chaos::new(seed, Some(Unit::Branches));
        Live::new(world, self.memory_every)
            .with_patience(self.patience_ns.map_or(Patience::Endless, Patience::Fixed))
            .with_panic_grace(self.panic_grace_ns)
            .with_chaos(self.chaos.map(chaos))
    }

    /// Records `cpu` in `world`, which need not be its own.
    pub fn record_with(&self, detail: Detail, world: SimWorld, cpu: ToyCpu) -> (RunEnd, Recording) {
        self.record_by(detail, world, cpu, |machine, cpu, recorder, trace| {
            machine.run(cpu, &mut NoDisks, recorder, trace)
        })
    }

    /// The same by whoever runs the machine.
    pub fn record_by(
        &self,
        detail: Detail,
        world: SimWorld,
        mut cpu: ToyCpu,
        run: impl FnOnce(&mut Machine, &mut ToyCpu, &mut SimRecorder<'_>, &mut Trace) -> RunEnd,
    ) -> (RunEnd, Recording) {
        let mut journal = Vec::new();
        let live = self.live(world);
        let header = self.header(detail);
        let mut recorder =
            Recorder::create(live, &mut journal, &header).expect("a Vec takes everything");
        let mut machine = machine_of(&header);
        let mut trace = Trace::default();
        let result = run(&mut machine, &mut cpu, &mut recorder, &mut trace);
        let passed = recorder.into_inner().into_world().into_passed();
        let exits = machine.at().exits;
        let memory = cpu.memory().to_vec();
        (
            result,
            Recording {
                journal,
                passed,
                end: None,
                exits,
                trace,
                memory,
            },
        )
    }
}

/// What records a toy.
pub type SimRecorder<'a> = Recorder<Live<SimWorld>, &'a mut Vec<u8>>;
/// How a toy's run ended.
pub type RunEnd = Result<End, RunError<Broken>>;

/// What a recording left behind.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The file.
    pub journal: Vec<u8>,
    /// The exits of which the world has heard that all of them is done.
    pub passed: Vec<Complete>,
    /// How the run ended, if it did.
    pub end: Option<End>,
    /// Exits counted.
    pub exits: u64,
    /// What an observer saw.
    pub trace: Trace,
    /// Memory at the end.
    pub memory: Vec<u8>,
}

/// Everything an observer can see of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trace {
    /// The exit after which it began to look.
    pub begins_after: u64,
    /// Turns, the first at index 0.
    pub turns: Vec<Turn>,
    /// Interrupts.
    pub interrupts: Vec<(Moment, u8)>,
    /// What the guest wrote to its console, with the exit.
    pub output: Vec<(u64, Vec<u8>)>,
    /// What else left the machine.
    pub sent: Vec<(u64, Output)>,
    /// What reached it.
    pub inputs: Vec<(u64, Input)>,
    /// What it wrote without an exit, with the exit after it.
    pub posted: Vec<(u64, Vec<u8>)>,
    /// What was found to be left open, and the exit.
    pub left_open: Vec<(u64, LeftOpen)>,
}

impl Trace {
    /// Of one who begins to look after this exit.
    pub fn beginning_after(exits: u64) -> Trace {
        Trace {
            begins_after: exits,
            ..Trace::default()
        }
    }

    /// What of it lies after `exits`.
    pub fn after(&self, exits: u64) -> Trace {
        let mut after = self.clone();
        let passed = exits.saturating_sub(self.begins_after) as usize;
        after.turns.drain(..passed.min(after.turns.len()));
        after.begins_after = exits;
        after.interrupts.retain(|(at, _)| at.exits > exits);
        after.output.retain(|(at, _)| *at > exits);
        after.sent.retain(|(at, _)| *at > exits);
        after.inputs.retain(|(at, _)| *at > exits);
        after.posted.retain(|(at, _)| *at > exits);
        after.left_open.retain(|(at, _)| *at > exits);
        after
    }

    /// What of it lies at or before `exits`.
    pub fn through(&self, exits: u64) -> Trace {
        let mut through = self.clone();
        let seen = exits.saturating_sub(self.begins_after) as usize;
        through.turns.truncate(seen);
        through.interrupts.retain(|(at, _)| at.exits <= exits);
        through.output.retain(|(at, _)| *at <= exits);
        through.sent.retain(|(at, _)| *at <= exits);
        through.inputs.retain(|(at, _)| *at <= exits);
        through.posted.retain(|(at, _)| *at <= exits);
        through.left_open.retain(|(at, _)| *at <= exits);
        through
    }

    /// The first exit at which two runs differ; `None` if one is the beginning of the other.
    pub fn first_difference(&self, other: &Trace) -> Option<u64> {
        let exits = self.turns.len().min(other.turns.len()) as u64;
        let turn = (1..)
            .zip(self.turns.iter().zip(&other.turns))
            .find(|(_, (a, b))| a != b);
        let turn = turn.map(|(at, _)| at);
        // Interrupts of one exit come after its turn; those after the last common turn do not
        // count, as the shorter run may have stopped before them.
        let count = self.interrupts.len().max(other.interrupts.len());
        let interrupt = (0..count)
            .map(|i| (self.interrupts.get(i), other.interrupts.get(i)))
            .find(|(a, b)| a != b)
            .and_then(|(a, b)| a.into_iter().chain(b).map(|(at, _)| at.exits).min())
            .filter(|at| *at < exits);
        turn.into_iter().chain(interrupt).min()
    }
}

impl Observer for Trace {
    fn output(&mut self, exits: u64, _now: Nanos, output: &Output) {
        match output {
            Output::Console(bytes) => self.output.push((exits, bytes.clone())),
            output => self.sent.push((exits, output.clone())),
        }
    }

    fn input(&mut self, exits: u64, _now: Nanos, input: &Input) {
        self.inputs.push((exits, input.clone()));
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) {
        self.posted.push((exits, bytes.to_vec()));
    }

    fn turn(&mut self, exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        self.turns.push(*turn);
        assert_eq!(
            exits,
            self.begins_after + self.turns.len() as u64,
            "exits are counted from 1, without a gap"
        );
    }

    fn interrupt(&mut self, at: &Moment, vector: u8, _now: Nanos) {
        self.interrupts.push((*at, vector));
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        self.left_open.push((exits, what));
    }
}

/// What a replay came to.
#[derive(Debug)]
pub enum Verdict {
    /// Equal to the end.
    Equal(End),
    /// Equal as far as the journal goes.
    CutShort(Tail),
    /// Not equal.
    Diverged(Box<Divergence>),
    /// Stopped where the test wanted.
    Reached(u64),
    /// The host failed.
    Failed(Broken),
    /// Not a journal that can be replayed.
    Refused(JournalError),
}

/// A replay.
#[derive(Debug)]
pub struct Replayed {
    /// What it came to.
    pub verdict: Verdict,
    /// What an observer saw.
    pub trace: Trace,
    /// Memory at the end.
    pub memory: Vec<u8>,
    /// The machine's time rule and state.
    pub digest: u64,
    /// Memory digests compared.
    pub states_checked: u64,
    /// Of those, how many were equal but for Accessed bits.
    pub states_but_accessed: u64,
}

/// Replays `journal` on `cpu`, up to exit `until` if given.
pub fn replay(journal: &[u8], cpu: ToyCpu, until: Option<u64>) -> Replayed {
    let machine = JournalReader::open(journal)
        .ok()
        .map(|reader| machine_of(reader.header()));
    replay_on(
        machine.unwrap_or_else(|| bare_machine(CpuidTable::default(), 0)),
        journal,
        cpu,
        until,
    )
}

/// Replays `journal` on `cpu` in `machine`.
pub fn replay_on(
    mut machine: Machine,
    journal: &[u8],
    mut cpu: ToyCpu,
    until: Option<u64>,
) -> Replayed {
    let mut trace = Trace::default();
    let (mut states_checked, mut states_but_accessed) = (0, 0);
    let verdict = match JournalReader::open(journal) {
        Err(error) => Verdict::Refused(error),
        Ok(reader) => {
            let mut replayer = Replayer::new(reader, until, None);
            let verdict = verdict(machine.run(&mut cpu, &mut NoDisks, &mut replayer, &mut trace));
            states_checked = replayer.states_checked();
            states_but_accessed = replayer.states_but_accessed();
            verdict
        }
    };
    let memory = cpu.memory().to_vec();
    Replayed {
        verdict,
        trace,
        memory,
        digest: machine.digest().value(),
        states_checked,
        states_but_accessed,
    }
}

/// Replays `journal` and records the replay, under `header`.
pub fn relog(journal: &[u8], header: &Header, mut cpu: ToyCpu) -> (Verdict, Vec<u8>) {
    let reader = match JournalReader::open(journal) {
        Ok(reader) => reader,
        Err(error) => return (Verdict::Refused(error), Vec::new()),
    };
    let mut machine = machine_of(reader.header());
    let mut copy = Vec::new();
    let replayer = Replayer::new(reader, None, None);
    let mut recorder =
        Recorder::create(replayer, &mut copy, header).expect("a Vec takes everything");
    let result = machine.run(&mut cpu, &mut NoDisks, &mut recorder, &mut ());
    if result.is_err() {
        // What is known so far is kept, as after any run that cannot go on.
        recorder
            .abandon(machine.complete())
            .expect("a Vec takes everything");
    }
    (verdict(result), copy)
}

fn verdict(result: Result<End, RunError<Broken>>) -> Verdict {
    match result {
        Ok(end) => Verdict::Equal(end),
        Err(RunError::Closed(Closed::CutShort(tail))) => Verdict::CutShort(tail),
        Err(RunError::Closed(Closed::Diverged(divergence))) => Verdict::Diverged(divergence),
        Err(RunError::Closed(Closed::Reached(exits))) => Verdict::Reached(exits),
        Err(RunError::Closed(Closed::Stopped(_))) => unreachable!("nobody debugs it"),
        Err(RunError::Closed(Closed::Journal(error))) => Verdict::Refused(error),
        Err(RunError::Closed(Closed::End(ending))) => panic!("an ending escaped: {ending:?}"),
        Err(RunError::Cpu { source, .. }) => Verdict::Failed(source),
        Err(RunError::Storage { source, .. }) => {
            panic!("a disk that is not there failed: {source}")
        }
    }
}

/// A machine without virtio devices.
pub fn bare_machine(cpuid: CpuidTable, ns_per_exit: u64) -> Machine {
    Machine::new(&Devices::default(), cpuid, ns_per_exit)
}

/// A machine as the head of a journal describes it.
pub fn machine_of(header: &Header) -> Machine {
    let machine = &header.machine;
    Machine::new(&machine.devices, machine.cpuid.clone(), machine.ns_per_exit)
        .with_quick_reads(machine.quick_reads)
}

/// The CPUID table of every toy.
pub fn cpuid_table() -> CpuidTable {
    let vendor = [2, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
    let entries = vec![
        CpuidEntry {
            leaf: 0,
            subleaf: None,
            values: vendor,
        },
        CpuidEntry {
            leaf: 1,
            subleaf: Some(0),
            values: [1, 2, 3, 4],
        },
        CpuidEntry {
            leaf: 1,
            subleaf: Some(1),
            values: [5, 6, 7, 8],
        },
        CpuidEntry {
            leaf: 2,
            subleaf: None,
            values: [9; 4],
        },
    ];
    CpuidTable { entries }
}

/// All frames' events and their places, of a journal that is whole.
pub fn records_of(journal: &[u8]) -> Vec<Record> {
    let mut reader = JournalReader::open(journal).expect("a whole journal opens");
    let mut records = Vec::new();
    while let Some(record) = reader.next_record().expect("memory can be read") {
        records.push(record);
    }
    records
}

/// The vCPU that an event is of, if it is of one, becomes this one.
pub fn move_to_vcpu(event: &mut Event, to: VcpuNumber) {
    match event {
        Event::Turn(turn) => turn.vcpu = to,
        Event::Interrupt { at, .. } => at.vcpu = to,
        Event::Preempted { vcpu, .. } => *vcpu = to,
        _ => assert_eq!(event.vcpu(), None),
    }
}

/// Writes `records`, whatever they are, in frames of at most `per_frame` events, with correct checks throughout.
///
/// Frames begin where `records` allow it: a frame ends with the last event of an exit. Where guest
/// time runs backwards a frame begins too, as within one the writer takes no such turns.
pub fn write_records(header: &Header, records: &[Record], per_frame: usize) -> Vec<u8> {
    let mut journal = Vec::new();
    let writer = JournalWriter::create(&mut journal, header).expect("a Vec takes everything");
    let mut writer = writer.unchecked();
    let mut in_frame = 0;
    let mut now = 0;
    let mut last = 0;
    for record in records {
        let backwards = matches!(&record.event, Event::Turn(turn) if turn.now < now);
        if in_frame > 0 && (backwards || (in_frame >= per_frame && record.exits > last)) {
            writer.close_frame(last, 0).expect("a Vec takes everything");
            in_frame = 0;
        }
        if let Event::Turn(turn) = &record.event {
            now = turn.now;
        }
        writer
            .append(record.exits, record.event.clone())
            .expect("nothing is checked");
        last = record.exits;
        in_frame += 1;
    }
    writer.close_frame(last, 0).expect("a Vec takes everything");
    journal
}

/// A door that gives what a journal gives and checks nothing: what would the machine do?
#[derive(Debug)]
pub struct Unchecked {
    times: BTreeMap<u64, i64>,
    inputs: BTreeMap<u64, Vec<Input>>,
    preemptions: BTreeMap<u64, Place>,
    exits_max: u64,
}

impl Unchecked {
    /// A door to `records` that closes after `exits_max`.
    pub fn new(records: &[Record], exits_max: u64) -> Unchecked {
        let mut door = Unchecked {
            times: BTreeMap::new(),
            inputs: BTreeMap::new(),
            preemptions: BTreeMap::new(),
            exits_max,
        };
        for Record { exits, event } in records {
            match event {
                Event::Time { ahead_ns } => {
                    door.times.insert(*exits, *ahead_ns);
                }
                Event::Input(input) => {
                    door.inputs
                        .entry(*exits)
                        .or_default()
                        .insert(0, input.clone());
                }
                Event::Preempted { place, .. } => {
                    door.preemptions.insert(*exits, *place);
                }
                _ => {}
            }
        }
        door
    }
}

impl Outside for Unchecked {
    type Closed = Closed;

    fn time(&mut self, query: &hindsight_replay::TimeQuery) -> Result<Nanos, Closed> {
        let ahead_ns = self.times.get(&query.exits).copied().unwrap_or(0);
        Ok(query
            .rule
            .saturating_add_signed(ahead_ns)
            .max(query.earliest))
    }

    fn arrival(&mut self, exits: u64, room: &Room) -> Result<Option<Input>, Closed> {
        let input = self.inputs.get_mut(&exits).and_then(Vec::pop);
        Ok(input.filter(|input| match input {
            Input::Console(bytes) => bytes.len() <= room.console,
            _ => true,
        }))
    }

    fn first_reads(&mut self, _: u64, _: &FirstReads) -> Result<(), Closed> {
        Ok(())
    }

    fn posted(&mut self, _exits: u64, _bytes: &[u8]) -> Result<(), Closed> {
        Ok(())
    }
    fn turn(&mut self, _: u64, _: &Turn, _: hindsight_replay::Digest) -> Result<(), Closed> {
        Ok(())
    }

    fn interrupt(&mut self, _: &Moment, _: u8) -> Result<(), Closed> {
        Ok(())
    }

    fn left_open(&mut self, _: u64, _: LeftOpen) -> Result<(), Closed> {
        Ok(())
    }

    fn wants_state(&mut self, _: u64) -> bool {
        false
    }

    fn state(&mut self, _: u64, _: FullDigest) -> Result<(), Closed> {
        Ok(())
    }

    fn horizon(&mut self, position: &Position) -> Result<Horizon, Closed> {
        if position.exits >= self.exits_max {
            return Err(Closed::Reached(position.exits));
        }
        let place = self.preemptions.get(&(position.exits + 1));
        Ok(place.map_or(Horizon::Exit, |place| Horizon::At(*place)))
    }

    fn kicked(&mut self, _: &Position) -> Result<(), Closed> {
        Ok(())
    }

    fn end(&mut self, _: u64, _: &End) -> Result<(), Closed> {
        Ok(())
    }

    fn abandon(&mut self, _: Complete) -> Result<(), Closed> {
        Ok(())
    }
}

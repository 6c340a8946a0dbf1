//! The target that reads journals: any bytes, or bytes that are sealed first, so that what is after the
//! checks is reached. They go through what each command does with a journal that somebody sent: `inspect`
//! and the index it makes, its listings, `diff`, and what `replay`, `console` and `pcap` do, on a CPU that
//! is none.

use std::io::sink;

use hindsight_cli::commands::diff::Comparison;
use hindsight_cli::commands::inspect::{Listing, Survey};
use hindsight_cli::commands::pcap::Capture;
use hindsight_cli::transcript::{Form, Transcript};
use hindsight_devices::{Board, Nanos, NetSpec, NoDisks, Output, Ram};
use hindsight_replay::{
    Answer, Back, Cpu, CpuDigest, Event, Exit, FRAME_HEAD_BYTES, FRAME_MAGIC, FRAME_RAW_MAX, Guest,
    Header, Horizon, JournalReader, MAGIC, Machine, MemoryDigest, Moment, Observer,
    OperatorConsole, Registers, Replayer, ShownClock, TailReason, Turn, VERSION,
};
use hindsight_vmm::session::index;
use vm_memory::GuestAddress;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// No reading of a journal may need more memory than this beside the file itself: two frames, as `diff` has
/// them, and room to unpack a third.
pub const MEMORY_BYTES_MAX: usize = 3 * FRAME_RAW_MAX + (4 << 20);
/// A replay is given up after this exit: its CPU executes nothing, and would go on for ever.
const EXITS_MAX: u64 = 200;

/// Reads `data`: its first byte says whether it is a file as it is (even) or the contents of one to be
/// sealed (odd), and then whether each frame says what it says once or over and over (bit 1), and whether the
/// contents begin with a head (bit 2 clear) or a head is made for them, which stays right whatever becomes of
/// the format of heads.
pub fn read(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    match first & 1 {
        0 => read_file(rest),
        _ => read_file(&sealed(*first, rest)),
    }
}

/// The journal that an input of this first byte stands for.
pub fn sealed(first: u8, contents: &[u8]) -> Vec<u8> {
    let mut parts = Parts(contents);
    let made = made_head();
    let head = match first & 4 {
        0 => parts.next().unwrap_or_default(),
        _ => &made,
    };
    let times = if first & 2 == 0 { 1 } else { 4096 };
    let over_and_over = |events: &[u8]| {
        let most = (256 << 10) / events.len().max(1);
        events.repeat(times.min(most).max(1))
    };
    let frames: Vec<Vec<u8>> = parts.map(over_and_over).collect();
    seal_journal(head, frames.iter().map(Vec::as_slice))
}

/// A machine with all that takes something from outside.
fn made_head() -> Vec<u8> {
    let mut header = Header::smallest();
    header.machine.devices.console = true;
    header.machine.devices.entropy = true;
    header.machine.devices.net = Some(NetSpec::default());
    postcard::to_stdvec(&header).expect("plain values serialise")
}

/// Parts of contents, each after its length in two bytes, little-endian.
pub(super) struct Parts<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Parts<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let (length, after) = self.0.split_first_chunk::<2>()?;
        let length = usize::from(u16::from_le_bytes(*length));
        let (part, after) = after.split_at(length.min(after.len()));
        self.0 = after;
        Some(part)
    }
}

/// A journal whose checks are right, whatever its head and its frames' events are; what a frame covers
/// follows from its number.
pub fn seal_journal<'a>(head: &[u8], frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut seed = xxh3_64_with_seed(head, u64::from(VERSION));
    let mut file = MAGIC.to_vec();
    file.extend(VERSION.to_le_bytes());
    file.extend((head.len() as u32).to_le_bytes());
    file.extend(seed.to_le_bytes());
    file.extend(head);
    for (number, events) in (0..).zip(frames) {
        seed = seal_frame(&mut file, number, events, seed);
    }
    file
}

/// Adds a frame; returns the seed of the next.
fn seal_frame(file: &mut Vec<u8>, number: u32, events: &[u8], seed: u64) -> u64 {
    let payload = zstd::bulk::compress(events, 1).expect("memory takes all");
    let mut head = FRAME_MAGIC.to_vec();
    head.extend(number.to_le_bytes());
    head.extend((payload.len() as u32).to_le_bytes());
    head.extend((events.len() as u32).to_le_bytes());
    head.extend((u64::from(number) << 20).to_le_bytes());
    head.extend((u64::from(number + 1) << 20).to_le_bytes());
    head.resize(FRAME_HEAD_BYTES, 0);
    let check = xxh3_64_with_seed(&payload, xxh3_64_with_seed(&head, seed));
    head[48..].copy_from_slice(&check.to_le_bytes());
    file.extend(head);
    file.extend(payload);
    check
}

/// Whatever the file says: each reading of it ends, in a bounded memory.
pub fn read_file(file: &[u8]) {
    let Ok(reader) = JournalReader::open(file) else {
        return;
    };
    reader.header().check().expect("the reader refuses others");
    read_frames(file);
    inspect(file);
    compare(file);
    replay(file);
}

fn open(file: &[u8]) -> JournalReader<&[u8]> {
    JournalReader::open(file).expect("it opened before")
}

/// What each frame says can be given to a board, and the end is where it is said to be.
fn read_frames(file: &[u8]) {
    let mut reader = open(file);
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("64 KiB can be mapped");
    let mut board = Board::new(&reader.header().machine.devices);
    let mut frames = 0;
    let mut events = 0;
    while let Some(frame) = reader.next_frame().expect("memory can be read") {
        frames += 1;
        assert!(
            frames * FRAME_HEAD_BYTES <= file.len(),
            "more frames than there is room for"
        );
        let mut records = frame.records();
        for record in records.by_ref() {
            events += 1;
            assert!(
                record.exits <= frame.head.through,
                "an event after its frame"
            );
            if let Event::Input(input) = record.event {
                board.accept(input, &ram);
                board.take_outputs();
            }
        }
        assert_eq!(records.position(), frame.head.raw_bytes as usize);
    }
    let tail = reader.tail().expect("what is read has an end");
    assert!(tail.offset <= file.len() as u64);
    if tail.reason == TailReason::Closed {
        assert_eq!(tail.offset, file.len() as u64);
    }
    let mut again = open(file);
    while again.next_record().expect("memory can be read").is_some() {
        events -= 1;
    }
    assert_eq!(events, 0, "event by event there are as many");
    assert_eq!(again.tail(), reader.tail());
}

/// `inspect`, and the index that it makes.
fn inspect(file: &[u8]) {
    let mut reader = open(file);
    let survey = Survey::of(&mut reader).expect("memory can be read");
    let closed = reader
        .tail()
        .is_some_and(|tail| tail.reason == TailReason::Closed);
    assert!(survey.end.is_some() || !closed, "closed without an end");
    let written = index::to_bytes(&survey.frames);
    let found = index::from_bytes(&written, file.len() as u64);
    assert_eq!(found, (!survey.frames.is_empty()).then_some(survey.frames));
    // The file may pass for an index, too.
    let _ = index::from_bytes(file, file.len() as u64);
    for (json, io_only) in [(false, false), (true, true)] {
        let mut listing = Listing::new(sink(), json);
        let listed = listing.journal(&mut open(file), io_only);
        listed.expect("memory can be read");
    }
}

/// `diff`, with itself and with what is left of it where it is cut.
fn compare(file: &[u8]) {
    let own = Comparison::of(&mut open(file), &mut open(file)).expect("memory can be read");
    let names = ["a".to_string(), "b".to_string()];
    assert!(!own.text(&names).contains("differ"));
    let cut = &file[..file.len() - file.len() / 4];
    let Ok(mut cut) = JournalReader::open(cut) else {
        return;
    };
    let found = Comparison::of(&mut open(file), &mut cut).expect("memory can be read");
    let text = found.text(&names);
    assert!(!text.contains('\x1b'), "{text:?}");
    let _ = found.to_json();
}

/// `replay`, with the eyes of `console`, `pcap` and `inspect --io` on it.
fn replay(file: &[u8]) {
    let reader = open(file);
    let header = reader.header().clone();
    let machine = &header.machine;
    let mut devices = machine.devices.clone();
    // There are no images here.
    devices.disks.clear();
    let cpuid = machine.cpuid.clone();
    let mut machine =
        Machine::new(&devices, cpuid, machine.ns_per_exit).with_quick_reads(machine.quick_reads);
    let mut eyes = Eyes {
        lines: Transcript::new(sink(), Form::Lines, OperatorConsole::Serial),
        cast: Transcript::new(sink(), Form::Cast, OperatorConsole::Virtio),
        capture: Capture::new(sink(), "fuzzed"),
        listing: Listing::new(sink(), true),
    };
    let mut replayer = Replayer::new(reader, Some(EXITS_MAX), None);
    let result = machine.run(&mut NoCpu::new(), &mut NoDisks, &mut replayer, &mut eyes);
    if let Err(error) = result {
        assert!(!error.to_string().contains('\x1b'), "{error}");
    }
    eyes.lines.finish().expect("a sink takes all");
    eyes.cast.finish().expect("a sink takes all");
    eyes.capture.finish().expect("a sink takes all");
}

/// Everybody who looks on at a replay.
struct Eyes {
    lines: Transcript<std::io::Sink>,
    cast: Transcript<std::io::Sink>,
    capture: Capture<std::io::Sink>,
    listing: Listing<std::io::Sink>,
}

impl Observer for Eyes {
    fn output(&mut self, exits: u64, now: Nanos, output: &Output) {
        self.lines.output(exits, now, output);
        self.cast.output(exits, now, output);
        self.capture.output(exits, now, output);
    }

    fn input(&mut self, exits: u64, now: Nanos, input: &hindsight_devices::Input) {
        self.cast.input(exits, now, input);
        self.capture.input(exits, now, input);
    }

    fn posted(&mut self, exits: u64, bytes: &[u8]) {
        self.listing.posted(exits, bytes);
    }

    fn turn(&mut self, exits: u64, turn: &Turn, guest: &mut dyn Guest) {
        self.listing.turn(exits, turn, guest);
    }

    fn interrupt(&mut self, at: &Moment, vector: u8, now: Nanos) {
        self.listing.interrupt(at, vector, now);
    }
}

/// A CPU that does one thing over and over, and goes where the journal says it went.
struct NoCpu {
    ram: Ram,
    exits: u64,
}

/// What a CPU that is none does wrong.
#[derive(Debug)]
pub struct Never;

impl std::fmt::Display for Never {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("never")
    }
}

impl std::error::Error for Never {}

impl NoCpu {
    fn new() -> NoCpu {
        NoCpu {
            ram: Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("64 KiB can be mapped"),
            exits: 0,
        }
    }
}

impl Cpu for NoCpu {
    type Error = Never;

    fn run(&mut self, horizon: Horizon) -> Result<Back, Never> {
        self.exits += 1;
        Ok(Back::Exit(match horizon {
            Horizon::At(place) => Exit::Preempted(place),
            _ if self.exits.is_multiple_of(5) => Exit::Halt,
            _ => Exit::Access(hindsight_devices::Access::PortWrite {
                port: 0x3f8,
                width: hindsight_devices::Width::Byte,
                value: 0x1b,
            }),
        }))
    }

    fn registers(&mut self) -> Registers {
        let mut registers = Registers::default();
        // RFLAGS.IF: a halted machine can be woken.
        registers.0[17] = 1 << 9;
        registers
    }

    fn answer(&mut self, _exit: &Exit, _answer: &Answer) -> Result<(), Never> {
        Ok(())
    }

    fn settle(&mut self) -> Result<bool, Never> {
        Ok(true)
    }

    fn interrupt(&mut self, _vector: u8) -> Result<(), Never> {
        Ok(())
    }

    fn request_window(&mut self, _wanted: bool) {}

    fn show_clock(&mut self, _clock: ShownClock) {}

    fn ram(&self) -> &Ram {
        &self.ram
    }

    fn memory_digest(&mut self) -> Result<MemoryDigest, Never> {
        Ok(MemoryDigest::default())
    }
    fn state_digest(&mut self) -> Result<CpuDigest, Never> {
        Ok(CpuDigest::default())
    }
}

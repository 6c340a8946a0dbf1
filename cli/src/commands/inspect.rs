//! `hindsight inspect`: what a recording is and what is in it.

use std::io::{BufWriter, Read, Write};
use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use hindsight_devices::{Nanos, POSTED_PORT};
use hindsight_replay::{
    Detail, End, Event, FRAME_HEAD_BYTES, Frame, FullDigest, Guest, Header, IndexEntry,
    JournalError, JournalReader, LeftOpen, Moment, Observer, Place, Record, TailReason, Turn,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::commands::marks::tell_complaints;
use crate::format::{bytes, seconds, thousands};
use crate::outcome::Outcome;
use crate::output::Output;
use crate::tell::{out, tell};
use crate::watching::watch;
use hindsight_replay::foreign::{shown, shown_lines, shown_path};
use hindsight_vmm::disk::OpenImage;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{Marks, Recording};

/// So many marks are shown.
const MARKS_SHOWN: usize = 20;

/// Options of `inspect`.
#[derive(Debug, Args)]
pub struct Options {
    /// The recording.
    recording: PathBuf,
    /// List every event of the journal.
    #[arg(long, conflicts_with = "io")]
    events: bool,
    /// List every exit (device accesses, time reads, CPUID) with its value, and every interrupt.
    ///
    /// Read from the journal if it is of full detail, else found out by replaying.
    #[arg(long)]
    io: bool,
    /// Print JSON: one object, or with --events and --io one line each.
    #[arg(long)]
    json: bool,
}

pub fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    if options.io && journal.header().detail == Detail::Default {
        let begin = || Ok(Listing::new(stdout(), options.json));
        return watch(recording, journal, begin, |listing, _| listing.finish());
    }
    if options.io || options.events {
        return list(journal, Listing::new(stdout(), options.json), options.io);
    }
    overview(&recording, journal, options.json)
}

/// One line of a listing, as text or as JSON.
#[derive(Debug)]
pub struct Listing<W: Write> {
    out: Output<W>,
    json: bool,
}

impl<W: Write> Listing<W> {
    /// A listing that goes to `out`.
    pub fn new(out: W, json: bool) -> Listing<W> {
        Listing {
            out: Output::new(out),
            json,
        }
    }

    fn event(&mut self, exits: u64, event: &Event) {
        if self.out.has_failed() {
            return;
        }
        let line = if self.json {
            format!("{}\n", event_json(exits, event))
        } else {
            format!("{exits:>9} {event}\n")
        };
        self.out.write(line.as_bytes());
    }

    /// Lists what a journal says, event by event; `io_only`: exits and interrupts.
    pub fn journal(
        &mut self,
        journal: &mut JournalReader<impl Read>,
        io_only: bool,
    ) -> Result<(), JournalError> {
        while let Some(record) = journal.next_record()? {
            let is_io = matches!(
                record.event,
                Event::Turn(_) | Event::Posted(_) | Event::LeftOpen(_) | Event::Interrupt { .. }
            );
            if is_io || !io_only {
                self.event(record.exits, &record.event);
            }
        }
        Ok(())
    }

    fn finish(self) -> Result<(), Failure> {
        self.out.finish()
    }
}

fn state_json(state: &FullDigest) -> Value {
    json!({"memory": state.memory.to_string(), "digest": state.to_string()})
}

/// One line of `--json`.
fn event_json(exits: u64, event: &Event) -> Value {
    let (name, value) = match event {
        Event::Turn(turn) => ("turn", json!(turn)),
        Event::Time { ahead_ns } => ("time", json!({"ahead_ns": ahead_ns})),
        Event::Input(input) => ("input", json!(input)),
        Event::Interrupt { vector, at } => ("interrupt", json!({"vector": vector, "at": at})),
        Event::Witness { check } => ("witness", json!(u16::from_le_bytes(*check))),
        Event::State { digest } => ("state", state_json(digest)),
        Event::End(end) => {
            let mut value = json!(end);
            value["state"] = json!(end.state.as_ref().map(state_json));
            ("end", value)
        }
        Event::Preempted { vcpu, place } => {
            let Place { unit, number, rip } = place;
            let place = json!({"vcpu": vcpu, "unit": unit, "number": number, "rip": rip});
            ("preempted", place)
        }
        Event::FirstReads { check } => ("first_reads", json!(format!("{check:016x}"))),
        Event::Posted(bytes) => ("posted", json!({"port": POSTED_PORT, "bytes": bytes})),
        Event::LeftOpen(what) => ("left_open", json!(what.to_string())),
    };
    json!({"exit": exits, name: value})
}

impl<W: Write> Observer for Listing<W> {
    fn posted(&mut self, exits: u64, bytes: &[u8]) {
        self.event(exits, &Event::Posted(bytes.to_vec()));
    }

    fn turn(&mut self, exits: u64, turn: &Turn, _guest: &mut dyn Guest) {
        self.event(exits, &Event::Turn(Box::new(*turn)));
    }

    fn interrupt(&mut self, at: &Moment, vector: u8, _now: Nanos) {
        self.event(at.exits, &Event::Interrupt { vector, at: *at });
    }

    fn left_open(&mut self, exits: u64, what: LeftOpen) {
        self.event(exits, &Event::LeftOpen(what));
    }
}

fn stdout() -> BufWriter<std::io::Stdout> {
    BufWriter::with_capacity(1 << 16, std::io::stdout())
}

fn list(
    mut journal: JournalReader<impl Read>,
    mut listing: Listing<impl Write>,
    io_only: bool,
) -> Result<Outcome, Failure> {
    listing.journal(&mut journal, io_only)?;
    listing.finish()?;
    Ok(report_tail(&journal))
}

/// Says so if the journal was not read to a proper end.
fn report_tail(journal: &JournalReader<impl Read>) -> Outcome {
    match journal.tail() {
        Some(tail) if tail.reason != TailReason::Closed => {
            tell!("hindsight: {tail}");
            Outcome::CutShort
        }
        _ => Outcome::Good,
    }
}

/// What is counted over a whole journal.
#[derive(Debug, Default, Serialize)]
struct Census {
    frames: u64,
    frame_bytes: u64,
    raw_bytes: u64,
    events: [u64; Event::KINDS],
    event_bytes: [u64; Event::KINDS],
    /// Exits, journal bytes and interrupts by whole second of guest time.
    seconds: Vec<[u64; 3]>,
}

impl Census {
    /// Adds a frame, and shows each of its events.
    fn count(&mut self, frame: &Frame, mut see: impl FnMut(Record)) {
        self.frames += 1;
        self.frame_bytes += FRAME_HEAD_BYTES as u64 + u64::from(frame.head.compressed_bytes);
        self.raw_bytes += u64::from(frame.head.raw_bytes);
        let second = (frame.place.now / 1_000_000_000) as usize;
        // A journal may claim any time; a table of a day is as long as anyone reads.
        let second = second.min(86_400);
        if self.seconds.len() <= second {
            self.seconds.resize(second + 1, [0; 3]);
        }
        let row = &mut self.seconds[second];
        row[0] += frame.place.through - frame.place.first;
        row[1] += FRAME_HEAD_BYTES as u64 + u64::from(frame.head.compressed_bytes);
        let mut records = frame.records();
        let mut before = 0;
        while let Some(record) = records.next() {
            let kind = record.event.kind();
            self.events[kind] += 1;
            self.event_bytes[kind] += (records.position() - before) as u64;
            before = records.position();
            row[2] += u64::from(matches!(record.event, Event::Interrupt { .. }));
            see(record);
        }
    }
}

/// What a journal comes to, read to its end.
#[derive(Debug, Default)]
pub struct Survey {
    census: Census,
    /// How the guest ended, if the journal says it.
    pub end: Option<End>,
    /// Where the frames are: what the index holds.
    pub frames: Vec<IndexEntry>,
    /// What was found to be left open, and at which exit. Each is listed once; a journal that somebody made may say
    /// anything.
    pub left_open: Vec<(u64, LeftOpen)>,
}

impl Survey {
    /// Reads `journal` to its end.
    pub fn of(journal: &mut JournalReader<impl Read>) -> Result<Survey, JournalError> {
        let mut survey = Survey::default();
        while let Some(frame) = journal.next_frame()? {
            let Survey {
                census,
                end,
                left_open,
                ..
            } = &mut survey;
            *end = None;
            census.count(&frame, |Record { exits, event }| match event {
                Event::End(found) => *end = Some(*found),
                Event::LeftOpen(what) if !left_open.iter().any(|(_, told)| *told == what) => {
                    left_open.push((exits, what));
                }
                _ => {}
            });
            survey.frames.push(frame.place);
        }
        Ok(survey)
    }
}

fn overview(
    recording: &Recording,
    mut journal: JournalReader<impl Read>,
    as_json: bool,
) -> Result<Outcome, Failure> {
    let Survey {
        census,
        end,
        frames,
        left_open,
    } = Survey::of(&mut journal)?;
    let header = journal.header().clone();
    let tail = journal
        .tail()
        .expect("the journal was read to its end")
        .clone();
    if recording.directory().is_dir() && recording.read_index().is_none() && !frames.is_empty() {
        // The index only saves time; a directory that cannot be written to does without.
        let _ = recording.write_index(&frames);
    }
    // A file of marks that is none is no reason to tell nothing of the rest.
    let marks = Marks::read(recording).unwrap_or_else(|error| {
        tell!("hindsight: {}", shown_lines(error));
        Marks::default()
    });
    tell_complaints(&marks);
    if as_json {
        let value = json!({
            "header": header,
            "exits": journal.through(),
            "end": end,
            "tail": tail.to_string(),
            "closed": tail.reason == TailReason::Closed,
            "left_open": left_open
                .iter()
                .map(|(exit, what)| json!({"exit": exit, "what": what.to_string()}))
                .collect::<Vec<_>>(),
            "disks": disks(recording, &header).collect::<Vec<_>>(),
            "marks": marks.list(),
            "journal": census,
        });
        out!("{value}");
    } else {
        print_header(&header, &left_open);
        print_devices(recording, &header);
        match &end {
            Some(end) => out!(
                "end         {}, after exit {} and {}\n            digest {:016x}, memory {}",
                end,
                thousands(journal.through()),
                seconds(end.now),
                end.digest,
                end.state.map_or("none".into(), |state| format!(
                    "{}, state {state}",
                    state.memory
                ))
            ),
            None => out!("end         none: {tail}"),
        }
        for (at, mark) in marks.list().iter().take(MARKS_SHOWN).enumerate() {
            out!(
                "{:<12}{}, exit {}, {}",
                if at == 0 { "marks" } else { "" },
                mark.name,
                thousands(mark.exit),
                seconds(mark.guest_ns)
            );
        }
        if let more @ 1.. = marks.list().len().saturating_sub(MARKS_SHOWN) {
            out!("            and {} more", thousands(more as u64));
        }
        print_census(&census);
    }
    Ok(report_tail(&journal))
}

fn print_header(header: &Header, left_open: &[(u64, LeftOpen)]) {
    let machine = &header.machine;
    let detail = match header.detail {
        Detail::Default => "default",
        Detail::Full => "full",
    };
    let recorder = shown(&header.host.recorder);
    out!("recorded    by {recorder}, {detail} detail");
    out!(
        "host        {}, Linux {}",
        shown(&header.host.cpu),
        shown(&header.host.kernel)
    );
    for hole in &header.host.holes {
        out!("left open   {}", shown(hole));
    }
    for (exit, what) in left_open {
        out!("left open   {what}; from exit {} on", thousands(*exit));
    }
    out!("kernel      {}", shown(&machine.kernel_version));
    out!(
        "            {} bytes, BLAKE3 {}",
        thousands(machine.kernel.bytes),
        machine.kernel.hex()
    );
    if let Some(initrd) = &machine.initrd {
        out!(
            "initrd      {} bytes, BLAKE3 {}",
            thousands(initrd.bytes),
            initrd.hex()
        );
    }
    out!("cmdline     {}", shown(&machine.cmdline));
    out!("memory      {}", bytes(machine.memory_bytes));
    out!(
        "cpu         {}, {} CPUID entries",
        shown(&machine.cpuid.vendor()),
        machine.cpuid.entries.len()
    );
    let traps = &machine.traps;
    out!(
        "traps       {} rdtsc, {} rdtscp, {} cpuid, {} CR4 writes, {} CR4 reads, {} DR writes, {} pause, {} module loads, {} panics, {} kept ages of pages",
        traps.rdtsc,
        traps.rdtscp,
        traps.cpuid,
        traps.cr4_writes,
        traps.cr4_reads,
        traps.dr_writes,
        traps.pause,
        traps.module_loads,
        traps.panics,
        traps.ages
    );
    match &machine.quick_reads {
        Some(quick) => out!(
            "time reads  quick at {} places: up to {} between two exits, {} ns each",
            quick.sites,
            quick.reads,
            quick.step_ns
        ),
        None => out!("time reads  each exits"),
    }
}

/// Where the image of a recorded disk is.
#[derive(Debug, Serialize)]
struct DiskImage {
    /// Its place: what the recording links to, or the recording's own file.
    image: PathBuf,
    /// Why it cannot be replayed with, if so.
    missing: Option<String>,
}

/// The images of a recording's disks, in the order of the disks.
fn disks(recording: &Recording, header: &Header) -> impl Iterator<Item = DiskImage> {
    let images = header.machine.images.iter().enumerate();
    images.filter_map(|(disk, image)| {
        let path = recording.disk_path(disk)?;
        let opened = OpenImage::open(&path).and_then(|opened| opened.check(disk, image));
        Some(DiskImage {
            image: std::fs::read_link(&path).unwrap_or(path),
            missing: opened.err().map(|error| error.to_string()),
        })
    })
}

fn print_devices(recording: &Recording, header: &Header) {
    let devices = &header.machine.devices;
    let found = disks(recording, header);
    for (disk, (spec, found)) in devices.disks.iter().zip(found).enumerate() {
        let read_only = if spec.read_only { ", read-only" } else { "" };
        let serial = match spec.serial.as_str() {
            "" => String::new(),
            serial => format!(", serial \"{}\"", shown(serial)),
        };
        out!("disk {disk}      {}{read_only}{serial}", bytes(spec.bytes));
        out!("            {}", shown_path(&found.image));
        if let Some(missing) = found.missing {
            out!("            it will not replay: {}", shown(&missing));
        }
    }
    if let Some(net) = &devices.net {
        let mac = net.mac.map(|byte| format!("{byte:02x}")).join(":");
        out!("network     a card, {mac}");
    }
}

fn print_census(census: &Census) {
    out!(
        "journal     {} in {} frames, {} raw\n",
        bytes(census.frame_bytes),
        census.frames,
        bytes(census.raw_bytes)
    );
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["event", "count", "raw bytes"]);
    for (kind, name) in Event::KIND_NAMES.into_iter().enumerate() {
        if census.events[kind] > 0 {
            table.add_row([
                name.to_string(),
                thousands(census.events[kind]),
                thousands(census.event_bytes[kind]),
            ]);
        }
    }
    right_align(&mut table);
    out!("{table}\n");
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "guest second",
        "exits",
        "journal bytes",
        "interrupts",
    ]);
    // At most twenty rows: a long recording is shown in larger steps.
    let step = census.seconds.len().div_ceil(20).max(1);
    for (row, seconds) in census.seconds.chunks(step).enumerate() {
        let sum = |column: usize| thousands(seconds.iter().map(|second| second[column]).sum());
        table.add_row([format!("{}..", row * step), sum(0), sum(1), sum(2)]);
    }
    right_align(&mut table);
    out!("{table}");
}

fn right_align(table: &mut Table) {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}

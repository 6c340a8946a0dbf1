//! The target that reads the checkpoints of a recording: any bytes, or contents that are sealed first, so that what is
//! after the checks is reached. They go through what whoever seeks does with them: heads, notes, states, pages, and a
//! machine that is put at them and goes on from there, on a CPU that is hardly one.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::io::{Cursor, Write};
use std::ops::ControlFlow;
use std::path::Path;

use hindsight_devices::{Access, NoDisks, Ram, Width};
use hindsight_replay::{
    Answer, Arrival, Back, CheckpointHead, Checkpoints, CoreOf, CoreState, Cpu, CpuDigest, Exit,
    Header, Horizon, JournalReader, Machine, MemoryDigest, PAGE_BYTES, Pace, PagePlace, Pause,
    Registers, ShownClock, Stateful, Target, Timeline, WITNESS_EVERY, memory,
};
use hindsight_vmm::disk::Disks;
use hindsight_vmm::kvm::KvmCpu;
use hindsight_vmm::session::{CheckpointFile, PageLimit};
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh64::xxh64;

use super::journal::{Never, Parts, seal_journal};

/// No reading of a checkpoints file may need more memory than this beside the file itself: what notes are in, what they
/// are, and as much as a vector has that grows.
pub const CHECKPOINT_MEMORY_MAX: usize = 192 << 20;
/// The pages of the machine.
const PAGES: u64 = 16;
/// Which pages there are.
pub const PAGE_LIMIT: PageLimit = PageLimit {
    memory: PAGES,
    disks: 1 << 10,
};
/// Where the recording ends, for whoever makes checkpoints of it: from the next exit on it would have to have witnesses.
pub const WALK_EXITS: u64 = WITNESS_EVERY - 1;
/// From one checkpoint to the next.
const SPACING_EXITS: u64 = 3;
/// Nobody goes further: a file names exits as it likes.
const EXITS_MAX: u64 = 2 * WALK_EXITS;
/// Of so many checkpoints of a file everything is read.
const READ_MAX: usize = 12;
/// Pages in a group.
const GROUP_PAGES: usize = 16;
/// What an input has of a page: how it begins. The rest is zeroes.
const PAGE_START: usize = 16;
/// An input makes no more pages than this of one part.
const SEALED_PAGES_MAX: usize = 4 * GROUP_PAGES;

/// Reads `data`: its first byte says whether it is a file as it is (even) or contents to be sealed (odd), and then as
/// [`sealed_checkpoints`] has it.
pub fn read(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    match first & 1 {
        0 => read_checkpoints(rest),
        _ => read_checkpoints(&sealed_checkpoints(*first, rest)),
    }
}

/// The recording: of a guest that writes to memory and to a port, for ever.
pub fn journal() -> Vec<u8> {
    let mut header = Header::smallest();
    header.machine.ns_per_exit = 1_000;
    let head = postcard::to_stdvec(&header).expect("plain values serialise");
    // At the first exit, guest time is put forwards by nothing.
    seal_journal(&head, [&[1, 1, 0][..]])
}

/// A checkpoint as it is sealed. Everything is compressed already.
#[derive(Clone, Debug, Default)]
pub struct Sealed {
    /// The exit.
    pub exits: u64,
    /// Guest time there.
    pub now: u64,
    /// Groups of pages.
    pub groups: Vec<u8>,
    /// Which pages have changed, and notes.
    pub directory: Vec<u8>,
    /// The state.
    pub core: Vec<u8>,
}

/// A file of checkpoints of [`journal`] whose checks are right, whatever they say.
pub fn seal_checkpoints(checkpoints: impl IntoIterator<Item = Sealed>) -> Vec<u8> {
    let journal = journal();
    let start = JournalReader::open(&journal[..])
        .expect("it is one")
        .start();
    let mut file = b"HSchkpts".to_vec();
    file.extend(2u64.to_le_bytes());
    file.extend(start.check.to_le_bytes());
    file.extend(xxh64(&file, 0).to_le_bytes());
    let mut before = xxh64(&file, 0);
    for checkpoint in checkpoints {
        let Sealed {
            exits,
            now,
            groups,
            directory,
            core,
        } = checkpoint;
        let mut head = b"HSck".to_vec();
        head.extend((directory.len() as u32).to_le_bytes());
        let words = [exits, now, groups.len() as u64, xxh64(&directory, 0)];
        head.extend(words.map(u64::to_le_bytes).as_flattened());
        head.extend(xxh64(&core, 0).to_le_bytes());
        head.extend((core.len() as u64).to_le_bytes());
        before = xxh64(&head, before);
        head.extend(before.to_le_bytes());
        for part in [head, groups, directory, core] {
            file.extend(part);
        }
    }
    file
}

/// What is read, compressed as it is in a file.
pub fn packed(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).expect("memory takes all")
}

/// The file that an input of this first byte stands for. For each checkpoint it has four parts, each after its length:
/// exit and time, pages (see `PAGE_START`), directory, state. Of the directory what says how long the groups are is
/// made, unless bit 2 is set; with bit 1 a part says what it says over and over.
pub fn sealed_checkpoints(first: u8, contents: &[u8]) -> Vec<u8> {
    let times = if first & 2 == 0 { 1 } else { 4096 };
    let over_and_over = |part: &[u8]| {
        let most = (256 << 10) / part.len().max(1);
        part.repeat(times.min(most).max(1))
    };
    let mut parts = Parts(contents);
    let mut checkpoints = Vec::new();
    while let Some(numbers) = parts.next() {
        let mut rest = || parts.next().unwrap_or_default();
        let mut words = [[0; 8]; 2];
        let length = numbers.len().min(16);
        words.as_flattened_mut()[..length].copy_from_slice(&numbers[..length]);
        let pages = over_and_over(rest());
        let pages = pages
            .chunks(PAGE_START)
            .take(SEALED_PAGES_MAX)
            .map(|start| {
                let mut page = [0; PAGE_BYTES];
                page[..start.len()].copy_from_slice(start);
                page
            });
        let pages: Vec<_> = pages.collect();
        let groups = pages
            .chunks(GROUP_PAGES)
            .map(|group| packed(group.as_flattened()));
        let groups: Vec<Vec<u8>> = groups.collect();
        let lengths = groups
            .iter()
            .map(|group| (group.len() as u32, xxh64(group, 0)));
        let lengths: Vec<(u32, u64)> = lengths.collect();
        let mut directory = postcard::to_stdvec(&lengths).expect("plain values serialise");
        if first & 4 != 0 {
            directory.clear();
        }
        directory.extend(over_and_over(rest()));
        checkpoints.push(Sealed {
            exits: u64::from_le_bytes(words[0]),
            now: u64::from_le_bytes(words[1]),
            groups: groups.concat(),
            directory: packed(&directory),
            core: packed(&over_and_over(rest())),
        });
    }
    seal_checkpoints(checkpoints)
}

/// What [`sealed_checkpoints`] makes this file of, with 1 as its first byte.
///
/// # Panics
///
/// If the file is not whole.
pub fn checkpoint_contents(file: &[u8]) -> Vec<u8> {
    let mut contents = Vec::new();
    let mut part = |bytes: &[u8]| {
        let length = u16::try_from(bytes.len()).expect("there are few pages");
        contents.extend(length.to_le_bytes());
        contents.extend(bytes);
    };
    let mut rest = &file[32..];
    while let Some((head, after)) = rest.split_at_checked(64) {
        let length =
            |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("4 bytes")) as usize;
        let (groups, after) = after.split_at(length(24));
        let (directory, after) = after.split_at(length(4));
        let (core, after) = after.split_at(length(48));
        let [groups, directory, core] = [groups, directory, core]
            .map(|packed| zstd::stream::decode_all(packed).expect("it was packed"));
        let made = postcard::take_from_bytes::<Vec<(u32, u64)>>(&directory);
        let (_, directory) = made.expect("it says how long groups are");
        part(&head[8..24]);
        let pages = groups.as_chunks::<PAGE_BYTES>().0.iter();
        part(
            pages
                .map(|page| &page[..PAGE_START])
                .collect::<Vec<_>>()
                .concat()
                .as_slice(),
        );
        part(directory);
        part(&core);
        rest = after;
    }
    contents
}

/// Whatever the file says: each reading of it ends, in a bounded memory, and a machine that is put there is where it is
/// said to be.
pub fn read_checkpoints(bytes: &[u8]) {
    let mut file = tempfile::tempfile().expect("the host has room");
    file.write_all(bytes).expect("the host has room");
    let journal = journal();
    let start = JournalReader::open(&journal[..])
        .expect("it is one")
        .start();
    let mut store = CheckpointFile::of(file, start.check, PAGE_LIMIT);
    assert!(!store.is_open() && store.bytes() <= bytes.len().max(32) as u64);
    let heads = store.heads().to_vec();
    assert!(heads.is_sorted_by(|a, b| a.exits < b.exits));
    let _ = store.recent(3);
    for number in 0..heads.len().min(READ_MAX) {
        read_one(&mut store, number);
    }
    let mut timeline = walk(&journal, store);
    for head in heads.iter().rev().take(READ_MAX) {
        let exit = head.exits.saturating_add(1);
        if exit > EXITS_MAX {
            continue;
        }
        // A state that could have been and was not is a difference, or none that anybody sees.
        if let Ok(arrival) = timeline.go_to(Target::Exit(exit), &mut Walk) {
            assert!(matches!(arrival, Arrival::Reached), "{arrival:?}");
            let (machine, _, _) = timeline.parts().expect("it is somewhere");
            assert_eq!(machine.at().exits, exit);
        }
        for complaint in timeline.take_complaints() {
            assert!(!complaint.contains('\x1b'), "{complaint:?}");
        }
    }
}

fn read_one(store: &mut CheckpointFile, number: usize) {
    fn load<C, S>(store: &mut impl Checkpoints<C, S>, number: usize) -> Option<CoreState<C, S>> {
        store.load(number).ok()
    }
    // Those of this machine, and those of one that there is.
    let _: Option<CoreOf<Walker, NoDisks>> = load(store, number);
    let _: Option<CoreOf<KvmCpu, Disks>> = load(store, number);
    if let Some(notes) = Checkpoints::<u64, ()>::notes(store, number) {
        notes.tell(store.heads()[number].exits, &mut ());
    }
    for base in [None, number.checked_sub(1)] {
        let mut places = BTreeSet::new();
        let mut put = |place: PagePlace, _: Option<&[u8; PAGE_BYTES]>| {
            assert!(places.insert(place), "a page is given twice: {place:?}");
            assert!(place.number().map_or(true, |number| number < PAGES));
            ControlFlow::Continue(())
        };
        // It may be damaged.
        let _ = Checkpoints::<u64, ()>::pages(store, number, base, &BTreeSet::new(), &mut put);
    }
}

/// A recording to move about in, of the guest that is recorded in `journal`.
pub type WalkTimeline<'a, M> = Timeline<Walker, NoDisks, Cursor<&'a [u8]>, CheckpointFile, M>;

/// Moves about in `journal`, by the checkpoints in `store`.
pub fn walk(
    journal: &[u8],
    store: CheckpointFile,
) -> WalkTimeline<'_, impl FnMut() -> Result<(Machine, Walker, NoDisks), Infallible>> {
    let reader = JournalReader::open(Cursor::new(journal)).expect("it is one");
    let machine = reader.header().machine.clone();
    let make = move || {
        let devices = &machine.devices;
        let made = Machine::new(devices, machine.cpuid.clone(), machine.ns_per_exit);
        let made = made.with_quick_reads(machine.quick_reads);
        Ok((made, Walker::new(), NoDisks))
    };
    Timeline::new(reader, store, make)
}

/// Makes checkpoints on the way.
pub struct Walk;

impl Pace for Walk {
    fn exits(&self) -> u64 {
        SPACING_EXITS
    }

    fn look(&mut self, _here: CheckpointHead) -> Pause {
        Pause::Checkpoint { cost: 1 }
    }
}

/// Makes the checkpoints of [`journal`] in a file at `path`.
pub fn walked(path: &Path) -> CheckpointFile {
    let journal = journal();
    let start = JournalReader::open(&journal[..])
        .expect("it is one")
        .start();
    let store = CheckpointFile::open(path, start.check, PAGE_LIMIT).expect("the host has room");
    let mut timeline = walk(&journal, store);
    let arrival = timeline.go_to(Target::Exit(WALK_EXITS), &mut Walk);
    assert!(matches!(arrival, Ok(Arrival::Reached)), "{arrival:?}");
    let mut store = timeline.into_store();
    store.settle().expect("the host has room");
    store
}

/// A CPU that writes to memory and to a port.
#[derive(Debug)]
pub struct Walker {
    ram: Ram,
    exits: u64,
}

impl Walker {
    fn new() -> Walker {
        let bytes = PAGES as usize * PAGE_BYTES;
        Walker {
            ram: Ram::from_ranges(&[(GuestAddress(0), bytes)]).expect("64 KiB can be mapped"),
            exits: 0,
        }
    }
}

impl Cpu for Walker {
    type Error = Never;

    fn run(&mut self, horizon: Horizon) -> Result<Back, Never> {
        if let Horizon::At(place) = horizon {
            return Ok(Back::Exit(Exit::Preempted(place)));
        }
        // A state that somebody made has any number.
        let page = self.exits.wrapping_mul(5) % PAGES;
        let address = GuestAddress(page * PAGE_BYTES as u64 + self.exits % 4000);
        let value = self.exits as u8 | 1;
        self.ram.write_obj(value, address).expect("it is there");
        self.exits = self.exits.wrapping_add(1);
        Ok(Back::Exit(Exit::Access(Access::PortWrite {
            port: 0x3f8,
            width: Width::Byte,
            value: u32::from(value),
        })))
    }

    fn registers(&mut self) -> Registers {
        let mut registers = Registers::default();
        registers.0[0] = self.exits;
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

impl Stateful for Walker {
    type State = u64;
    type Error = Never;

    fn save(&mut self) -> Result<u64, Never> {
        Ok(self.exits)
    }

    fn restore(&mut self, state: &u64) -> Result<(), Never> {
        self.exits = *state;
        Ok(())
    }

    fn pages(&mut self) -> Result<Vec<u64>, Never> {
        Ok((0..PAGES).collect())
    }

    fn has_page(&self, number: u64) -> bool {
        memory::has(&self.ram, number)
    }

    fn read_page(&mut self, number: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), Never> {
        assert!(
            memory::read(&self.ram, number, into),
            "nobody asks for others"
        );
        Ok(())
    }

    fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), Never> {
        assert!(
            memory::write(&self.ram, number, from),
            "nobody asks for others"
        );
        Ok(())
    }

    fn take_changed_pages(&mut self) -> Result<Vec<u64>, Never> {
        self.pages()
    }
}

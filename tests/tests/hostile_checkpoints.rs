//! Files of checkpoints that were damaged, or made by somebody who wants harm: what is read of them is what was written or
//! is refused, and takes no more memory than there is a bound for.
//!
//! What is allocated is counted, by an allocator of this test program's own. So its tests take turns.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::ops::ControlFlow;

use hindsight_devices::NoDisks;
use hindsight_replay::rng::Rng;
use hindsight_replay::{
    Arrival, CheckpointHead, Checkpoints, CoreState, JournalReader, Notes, PAGE_BYTES, PagePlace,
    Pause, StateOf, Target,
};
use hindsight_tests::damage::damage;
use hindsight_tests::drive::{
    CHECKPOINT_MEMORY_MAX, PAGE_LIMIT, Sealed, Target as Fuzzed, WALK_EXITS, Walker,
    checkpoint_contents, drive, journal, packed, read_checkpoints, seal_checkpoints,
    sealed_checkpoints, walk, walked,
};
use hindsight_tests::peak::{peak_bytes, turn};
use hindsight_vmm::session::CheckpointFile;
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Changes of a file that are tried, of each kind.
const MUTATIONS: u64 = 2_000;

/// A file of checkpoints as a recording has it.
fn whole() -> Vec<u8> {
    let directory = tempfile::tempdir().expect("there is room");
    let path = directory.path().join("checkpoints");
    drop(walked(&path));
    std::fs::read(&path).expect("it was written")
}

fn open(bytes: &[u8]) -> CheckpointFile {
    let mut file = tempfile::tempfile().expect("there is room");
    file.write_all(bytes).expect("there is room");
    let start = JournalReader::open(&journal()[..])
        .expect("it is one")
        .start();
    CheckpointFile::of(file, start.check, PAGE_LIMIT)
}

type Core = CoreState<u64, ()>;
type Pages = BTreeMap<PagePlace, Option<[u8; PAGE_BYTES]>>;

/// All of a checkpoint but where it is; what is damaged is not there.
#[derive(Debug, PartialEq)]
struct Content {
    notes: Option<Notes>,
    core: Option<Core>,
    pages: Option<Pages>,
}

fn contents(store: &mut CheckpointFile) -> (Vec<CheckpointHead>, Vec<Content>) {
    let heads = store.heads().to_vec();
    let store: &mut dyn Readable = store;
    let each = (0..heads.len()).map(|number| store.content(number));
    (heads, each.collect())
}

/// Of all stores the one of this guest.
trait Readable {
    fn content(&mut self, number: usize) -> Content;
}

impl<K: Checkpoints<u64, ()>> Readable for K {
    fn content(&mut self, number: usize) -> Content {
        let mut pages = Pages::new();
        let given = self.pages(number, None, &BTreeSet::new(), &mut |place, bytes| {
            pages.insert(place, bytes.copied());
            ControlFlow::Continue(())
        });
        Content {
            notes: self.notes(number),
            core: self.load(number).ok(),
            pages: given.is_ok().then_some(pages),
        }
    }
}

/// The states of a straight replay, by their exits.
fn straight() -> Vec<StateOf<Walker, NoDisks>> {
    let journal = journal();
    let mut timeline = walk(&journal, open(&[]));
    let state = |exit| {
        let arrival = timeline.go_to(Target::Exit(exit), &mut Never);
        assert!(matches!(arrival, Ok(Arrival::Reached)), "{arrival:?}");
        timeline.save().expect("it is at an exit")
    };
    (0..=WALK_EXITS).map(state).collect()
}

/// No checkpoint on the way.
struct Never;

impl hindsight_replay::Pace for Never {
    fn exits(&self) -> u64 {
        u64::MAX
    }

    fn look(&mut self, _: CheckpointHead) -> Pause {
        Pause::GoOn
    }
}

#[test]
fn what_is_read_of_a_damaged_file_is_what_was_written_or_nothing() {
    let _turn = turn();
    let whole = whole();
    let (heads, written) = contents(&mut open(&whole));
    assert!(heads.len() > 3, "{heads:?}");
    let is_whole = |content: &Content| {
        let pages = content
            .pages
            .as_ref()
            .is_some_and(|pages| !pages.is_empty());
        pages && content.core.is_some() && content.notes.is_some()
    };
    assert!(written.iter().all(is_whole));
    let states = straight();
    let journal = journal();
    let (mut lost, mut complaints) = (0, 0);
    for seed in 0..MUTATIONS {
        let mut rng = Rng::new(seed, 51);
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.below(2) {
            if !bytes.is_empty() {
                damage(&mut bytes, &mut rng);
            }
        }
        let mut store = open(&bytes);
        let (found, read) = contents(&mut store);
        assert!(heads.starts_with(&found), "seed {seed}: {found:?}");
        lost += heads.len() - found.len();
        for (number, (read, written)) in read.into_iter().zip(&written).enumerate() {
            assert_eq!(read.notes, written.notes, "seed {seed}: notes at {number}");
            let core = read.core.is_none() || read.core == written.core;
            let pages = read.pages.is_none() || read.pages == written.pages;
            assert!(core && pages, "seed {seed}: another state at {number}");
        }
        let mut timeline = walk(&journal, store);
        let exit = rng.below(WALK_EXITS + 1);
        let arrival = timeline.go_to(Target::Exit(exit), &mut Never);
        assert!(matches!(arrival, Ok(Arrival::Reached)), "{arrival:?}");
        let state = timeline.save().expect("it is at an exit");
        assert!(state == states[exit as usize], "seed {seed}: at {exit}");
        complaints += timeline.take_complaints().len();
    }
    // Else nothing was damaged that anybody reads.
    assert!(lost > 100 && complaints > 10, "{lost}, {complaints}");
}

#[test]
fn what_is_sealed_with_right_checks_is_survived_in_a_bounded_memory() {
    let _turn = turn();
    let whole = whole();
    let contents = checkpoint_contents(&whole);
    let again = sealed_checkpoints(1, &contents);
    assert_eq!(open(&again).heads().len(), open(&whole).heads().len());
    let mut reached = 0;
    for seed in 0..MUTATIONS {
        let mut rng = Rng::new(seed, 52);
        let mut contents = contents.clone();
        for _ in 0..1 + rng.below(4) {
            if !contents.is_empty() {
                damage(&mut contents, &mut rng);
            }
        }
        // As they are, now and then with the lengths of groups among what is damaged, or over and over.
        let first = match rng.below(128) {
            0 => 3,
            1 => 7,
            2..16 => 5,
            _ => 1,
        };
        contents.insert(0, first);
        reached += open(&sealed_checkpoints(first, &contents[1..]))
            .heads()
            .len();
        let peak = peak_bytes(|| drive(Fuzzed::Checkpoints, &contents));
        assert!(peak <= CHECKPOINT_MEMORY_MAX, "seed {seed}: {peak} bytes");
    }
    assert!(reached > MUTATIONS as usize, "{reached}");
}

/// A zstd frame (RFC 8878, 3.1.1) of nothing that says it has so many bytes, and that it needs a window, which has 8 MiB
/// but for one segment.
fn lying_frame(bytes: u64, is_segment: bool) -> Vec<u8> {
    let mut frame = 0xfd2f_b528_u32.to_le_bytes().to_vec();
    match is_segment {
        true => frame.push(0xe0),
        false => frame.extend([0xc0, 13 << 3]),
    }
    frame.extend(bytes.to_le_bytes());
    // The last block, raw and empty.
    frame.extend([1, 0, 0]);
    frame
}

fn number(value: u64) -> Vec<u8> {
    postcard::to_stdvec(&value).expect("it serialises")
}

/// A file of one checkpoint.
fn one(groups: Vec<u8>, directory: Vec<u8>, core: Vec<u8>) -> Vec<u8> {
    seal_checkpoints([Sealed {
        exits: 1,
        now: 1,
        groups,
        directory,
        core,
    }])
}

#[test]
fn lengths_that_are_only_claimed_are_not_reserved() {
    let _turn = turn();
    let nothing = packed(&[0, 0, 0]);
    for claim in [1 << 20, 1 << 29, 1 << 62] {
        for is_segment in [false, true] {
            let lie = lying_frame(claim, is_segment);
            for file in [
                one(vec![], lie.clone(), vec![]),
                one(vec![], nothing.clone(), lie),
            ] {
                let peak = peak_bytes(|| read_checkpoints(&file));
                assert!(peak < 1 << 20, "{claim}: {peak} bytes");
            }
        }
        // Of groups, of changes, of notes, of what was said.
        let said = [&[0, 1, 0, 0, 0][..], &number(claim)].concat();
        let said = [&[0, 0][..], &number(said.len() as u64), &said].concat();
        for before in [&[][..], &[0], &[0, 0]] {
            let directory = packed(&[before, &number(claim)].concat());
            let peak = peak_bytes(|| read_checkpoints(&one(vec![], directory, vec![])));
            assert!(peak < 1 << 20, "{before:?}, {claim}: {peak} bytes");
        }
        let peak = peak_bytes(|| read_checkpoints(&one(vec![], packed(&said), vec![])));
        assert!(peak < 1 << 20, "said, {claim}: {peak} bytes");
    }
}

#[test]
fn no_file_of_a_few_kilobytes_takes_much_memory() {
    let _turn = turn();
    let nothing = packed(&[0, 0, 0]);
    let zeroes = |mib: usize| vec![0; mib << 20];
    // Notes of as many words as there may be, each of nothing.
    let notes = [&[0][..], &number(10 << 20), &zeroes(30)].concat();
    let notes = [&[0, 0][..], &number(notes.len() as u64), &notes].concat();
    let groups = [&number(64 << 20)[..], &zeroes(128)].concat();
    let changes = [&[0][..], &number(64 << 20), &zeroes(128)].concat();
    let core = |count: u64| [&zeroes(0)[..], &number(count), &zeroes(7)].concat();
    let files = [
        ("notes", one(vec![], packed(&notes), vec![])),
        ("groups", one(vec![0; 1 << 10], packed(&groups), vec![])),
        ("changes", one(vec![], packed(&changes), vec![])),
        ("a core", one(vec![], nothing.clone(), packed(&zeroes(8)))),
        (
            "a long core",
            one(vec![], nothing.clone(), packed(&zeroes(200))),
        ),
        ("counts", one(vec![], nothing, packed(&core(1 << 60)))),
    ];
    for (name, file) in files {
        assert!(file.len() < 20_000, "{name}: {}", file.len());
        let peak = peak_bytes(|| read_checkpoints(&file));
        println!("{name}: {} bytes of file; {peak} bytes", file.len());
        assert!(peak <= CHECKPOINT_MEMORY_MAX, "{name}: {peak} bytes");
    }
}

//! The fuzz targets' corpus, and some hundred inputs made of seeds: they run as everything else does, with
//! nothing but cargo. `scripts/fuzz` looks for new ones.

use std::path::PathBuf;

use hindsight_devices::DiskSpec;
use hindsight_replay::rng::Rng;
use hindsight_replay::{Detail, FRAME_HEAD_BYTES, Header, JournalReader, TailReason};
use hindsight_tests::drive::{
    Target, checkpoint_contents, drive, seal_journal, sealed, sealed_checkpoints, walked,
};
use hindsight_tests::sim::Scenario;

const SEEDS: u64 = 500;

/// Set, it makes the recordings among the journals anew, and the files among the checkpoints.
const WRITE: &str = "HINDSIGHT_WRITE_CORPUS";

fn folder(target: Target) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target.name())
}

fn corpus(target: Target) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = folder(target);
    let files = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let mut paths: Vec<_> = files.map(|file| file.expect("it reads").path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let bytes = std::fs::read(&path).expect("it reads");
            (path, bytes)
        })
        .collect()
}

/// The name is shown if the input panics.
fn run(target: Target, name: &str, data: &[u8]) {
    struct Named<'a>(&'a str);
    impl Drop for Named<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the input is {}", self.0);
            }
        }
    }
    let _named = Named(name);
    drive(target, data);
}

#[test]
fn every_input_of_the_corpus_is_survived() {
    for target in Target::ALL {
        let corpus = corpus(target);
        assert!(!corpus.is_empty(), "no input for {}", target.name());
        for (path, data) in corpus {
            run(target, &path.display().to_string(), &data);
        }
    }
}

#[test]
fn random_bytes_are_survived() {
    for target in Target::ALL {
        for seed in 0..SEEDS {
            let mut rng = Rng::new(seed, 7);
            let length = 16 + rng.below(700);
            let data: Vec<u8> = (0..length).map(|_| rng.number() as u8).collect();
            run(target, &format!("{} of seed {seed}", target.name()), &data);
        }
    }
}

/// The inputs that are journals, by name: as files, and as contents to be sealed.
fn journals() -> Vec<(&'static str, Vec<u8>)> {
    let scenario = Scenario::new(3);
    let [default, full] = [Detail::Default, Detail::Full].map(|detail| scenario.record(detail, 1));
    let file = |journal: &[u8]| [&[0], journal].concat();
    let mut header = scenario.header(Detail::Default);
    let disk = DiskSpec {
        bytes: 512,
        read_only: false,
        serial: String::new(),
    };
    header.machine.devices.disks = vec![disk; 9];
    vec![
        ("a_recording", file(&default.journal)),
        ("a_recording_of_every_turn", file(&full.journal)),
        ("sealed_a_recording", contents(&default.journal)),
        ("sealed_a_recording_of_every_turn", contents(&full.journal)),
        // Turns of no bytes but zeroes, a frame full of them.
        (
            "sealed_turns_over_and_over",
            [&[7, 10, 0][..], &[0; 10]].concat(),
        ),
        (
            "devices_that_no_machine_has",
            file(&seal_journal(&body(&header), [])),
        ),
    ]
}

fn body(header: &Header) -> Vec<u8> {
    postcard::to_stdvec(header).expect("plain values serialise")
}

/// What [`sealed`] makes this journal of.
fn contents(journal: &[u8]) -> Vec<u8> {
    let mut reader = JournalReader::open(journal).expect("it opens");
    let mut data = vec![1];
    let mut part = |bytes: &[u8]| {
        let length = u16::try_from(bytes.len()).expect("frames of a simulation are small");
        data.extend(length.to_le_bytes());
        data.extend(bytes);
    };
    part(&body(reader.header()));
    while let Some(frame) = reader.next_frame().expect("memory can be read") {
        let begin = frame.place.offset as usize + FRAME_HEAD_BYTES;
        let payload = &journal[begin..begin + frame.head.compressed_bytes as usize];
        let raw = zstd::bulk::decompress(payload, frame.head.raw_bytes as usize);
        part(&raw.expect("it was unpacked before"));
    }
    data
}

/// What the corpus has of this name is to be this; makes it so where that is wanted.
fn is_in_corpus(target: Target, name: &str, data: &[u8]) {
    let path = folder(target).join(name);
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, data).expect("it can be written");
    }
    let found = std::fs::read(&path).expect("it reads");
    assert!(
        found == data,
        "{} is of another version; run this test with {WRITE}=1",
        path.display()
    );
}

/// The inputs that are checkpoints, by name: as a file, and as contents to be sealed.
#[test]
fn the_corpus_has_checkpoints_of_this_version_of_the_format() {
    let directory = tempfile::tempdir().expect("there is room");
    let path = directory.path().join("checkpoints");
    let count = walked(&path).heads().len();
    assert!(count > 3, "{count}");
    let file = std::fs::read(&path).expect("it was written");
    let contents = checkpoint_contents(&file);
    let of = |first: u8| [&[first], &contents[..]].concat();
    // Otherwise compressed, it is the same.
    let again = sealed_checkpoints(1, &contents);
    assert_eq!(checkpoint_contents(&again), contents);
    let inputs = [
        ("a_file", [&[0], &file[..]].concat()),
        ("sealed_a_file", of(1)),
        ("sealed_over_and_over", of(3)),
        ("sealed_without_lengths", of(5)),
    ];
    for (name, data) in inputs {
        is_in_corpus(Target::Checkpoints, name, &data);
    }
}

/// A corpus whose journals are of another version tests the reader's first line alone.
#[test]
fn the_corpus_has_recordings_of_this_version_of_the_format() {
    for (name, data) in journals() {
        is_in_corpus(Target::Journal, name, &data);
        let journal = match data[0] {
            0 => data[1..].to_vec(),
            first => sealed(first, &data[1..]),
        };
        let reader = JournalReader::open(journal.as_slice());
        if name.starts_with("devices") {
            assert!(reader.is_err(), "{name}");
            continue;
        }
        let mut reader = reader.expect(name);
        while reader.next_record().expect("memory can be read").is_some() {}
        let tail = reader.tail().expect("it was read to its end");
        let closed = !name.ends_with("over");
        assert_eq!(tail.reason == TailReason::Closed, closed, "{name}: {tail}");
    }
}

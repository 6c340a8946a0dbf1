//! What may become of a recording's checkpoints: damaged, exchanged, taken away while somebody uses them. Whoever goes to a
//! moment then comes to the same state as without them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use hindsight_replay::FullDigest;
use hindsight_replay::rng::Rng;
use hindsight_vmm::session::SPACING;
use xxhash_rust::xxh64::xxh64;

use crate::seeking::{digest, go_to, open, straight};

/// See `docs/journal-format.md`.
const FILE_HEAD_BYTES: usize = 32;
const HEAD_BYTES: usize = 64;
/// A page of zeroes or of nonsense, at most.
const HOLE_BYTES: u64 = 1 << 16;

/// A way of doing damage. It gets the bytes as they were, those of another recording, and a place.
type Way = fn(&mut Vec<u8>, &[u8], &mut Rng);
/// What is done to the file itself, in whose place the bytes were.
type Trick = fn(&Path, &[u8], &mut Rng);

/// What is done to the bytes, before anybody opens them.
const WAYS: &[(&str, Way)] = &[
    ("cut off", |bytes, _, rng| {
        bytes.truncate(place(bytes, rng));
    }),
    ("cut off in its first bytes", |bytes, _, rng| {
        bytes.truncate(rng.below(FILE_HEAD_BYTES as u64 + 8) as usize);
    }),
    ("empty", |bytes, _, _| bytes.clear()),
    ("a bit of its first bytes", |bytes, _, rng| {
        flip(bytes, 0, FILE_HEAD_BYTES, rng);
    }),
    ("a bit of a head", |bytes, _, rng| {
        let part = any(bytes, rng);
        flip(bytes, part.head, HEAD_BYTES, rng);
    }),
    ("a bit of pages", |bytes, _, rng| {
        let part = any(bytes, rng);
        flip(bytes, part.groups(), part.groups_bytes, rng);
    }),
    (
        "a bit of the names of pages, or of the notes",
        |bytes, _, rng| {
            let part = any(bytes, rng);
            flip(bytes, part.directory(), part.directory_bytes, rng);
        },
    ),
    ("a bit of a state", |bytes, _, rng| {
        let part = any(bytes, rng);
        flip(bytes, part.core(), part.core_bytes, rng);
    }),
    ("a stretch of nonsense", |bytes, _, rng| {
        let at = place(bytes, rng);
        let end = bytes.len().min(at + 1 + rng.below(HOLE_BYTES) as usize);
        bytes[at..end].fill_with(|| rng.number() as u8);
    }),
    ("a stretch of zeroes", |bytes, _, rng| {
        let at = place(bytes, rng);
        let end = bytes.len().min(at + 1 + rng.below(HOLE_BYTES) as usize);
        bytes[at..end].fill(0);
    }),
    ("all nonsense", |bytes, _, rng| {
        bytes.fill_with(|| rng.number() as u8);
    }),
    ("nonsense after its end", |bytes, _, rng| {
        bytes.extend((0..HOLE_BYTES).map(|_| rng.number() as u8));
    }),
    (
        "a length beyond all bounds, with the right check",
        |bytes, _, rng| {
            let part = any(bytes, rng);
            let length = [4..8, 24..32, 48..52][rng.below(3) as usize].clone();
            let huge = u64::MAX >> rng.below(16);
            let width = length.len();
            bytes[part.head..][length].copy_from_slice(&huge.to_le_bytes()[..width]);
            check_head(bytes, &part);
        },
    ),
    (
        "an exit and a time of their own, with the right check",
        |bytes, _, rng| {
            let part = any(bytes, rng);
            for at in [8, 16] {
                let number = rng.number() >> rng.below(64);
                bytes[part.head + at..][..8].copy_from_slice(&number.to_le_bytes());
            }
            check_head(bytes, &part);
        },
    ),
    ("all of it twice", |bytes, _, _| {
        bytes.extend_from_within(FILE_HEAD_BYTES..);
    }),
    ("one of them twice", |bytes, _, rng| {
        let part = any(bytes, rng);
        let twice = bytes[part.head..part.end()].to_vec();
        bytes.splice(part.end()..part.end(), twice);
    }),
    ("one of them missing", |bytes, _, rng| {
        let part = any(bytes, rng);
        bytes.drain(part.head..part.end());
    }),
    ("of another recording", |bytes, other, _| {
        *bytes = other.to_vec();
    }),
    (
        "of another recording after its first bytes",
        |bytes, other, _| {
            bytes.truncate(FILE_HEAD_BYTES);
            bytes.extend(&other[FILE_HEAD_BYTES..]);
        },
    ),
    (
        "of another recording from one of them on",
        |bytes, other, rng| {
            let part = any(bytes, rng);
            bytes.truncate(part.head);
            bytes.extend(&other[FILE_HEAD_BYTES..]);
        },
    ),
];

/// What is done to the file, before anybody opens it.
const BEFORE: &[(&str, Trick)] = &[
    ("deleted", |path, _, _| remove(path)),
    ("a directory", |path, _, _| {
        remove(path);
        std::fs::create_dir(path).expect("there is room");
    }),
    ("a pipe that nobody writes to", |path, _, _| {
        remove(path);
        let made = Command::new("mkfifo").arg(path).status();
        assert!(made.expect("mkfifo starts").success());
    }),
    ("a link to itself", |path, _, _| {
        remove(path);
        symlink(path, path).expect("there is room");
    }),
    ("a link to a device without an end", |path, _, _| {
        remove(path);
        symlink("/dev/zero", path).expect("there is room");
    }),
    ("a link to where there is nothing", |path, _, _| {
        remove(path);
        symlink("/nowhere/checkpoints", path).expect("there is room");
    }),
    ("a socket", |path, _, _| {
        remove(path);
        drop(UnixListener::bind(path).expect("there is room"));
    }),
    ("a terabyte of nothing after its end", |path, bytes, _| {
        let file = File::options().write(true).open(path).expect("it is there");
        file.set_len(bytes.len() as u64 + (1 << 40))
            .expect("it has holes");
    }),
];

/// What is done to the file while it is in use.
const MEANWHILE: &[(&str, Trick)] = &[
    ("deleted while in use", |path, _, _| remove(path)),
    ("cut off while in use", |path, bytes, rng| {
        let file = File::options().write(true).open(path).expect("it is there");
        file.set_len(rng.below(bytes.len() as u64))
            .expect("there is room");
    }),
    ("emptied while in use", |path, _, _| {
        drop(File::create(path).expect("it is there"));
    }),
    ("overwritten while in use", |path, bytes, rng| {
        let file = File::options().write(true).open(path).expect("it is there");
        let from = rng.below(bytes.len() as u64);
        let nonsense: Vec<u8> = (from..bytes.len() as u64)
            .map(|_| rng.number() as u8)
            .collect();
        file.write_all_at(&nonsense, from).expect("there is room");
    }),
    ("another in its place while in use", |path, bytes, rng| {
        let beside = path.with_extension("new");
        std::fs::write(&beside, &bytes[..place(bytes, rng)]).expect("there is room");
        std::fs::rename(&beside, path).expect("it can be renamed");
    }),
];

/// In how many ways that differ.
pub const KINDS: u64 = (WAYS.len() + BEFORE.len() + MEANWHILE.len() + 2) as u64;

/// A checkpoint in the bytes of a file.
struct Part {
    head: usize,
    exits: u64,
    /// The check of the head before.
    before: u64,
    groups_bytes: usize,
    directory_bytes: usize,
    core_bytes: usize,
}

impl Part {
    fn groups(&self) -> usize {
        self.head + HEAD_BYTES
    }

    fn directory(&self) -> usize {
        self.groups() + self.groups_bytes
    }

    fn core(&self) -> usize {
        self.directory() + self.directory_bytes
    }

    fn end(&self) -> usize {
        self.core() + self.core_bytes
    }
}

/// The checkpoints in the bytes of a file that is whole.
fn parts(bytes: &[u8]) -> Vec<Part> {
    let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let mut parts = Vec::new();
    let (mut head, mut before) = (FILE_HEAD_BYTES, xxh64(&bytes[..FILE_HEAD_BYTES], 0));
    while head < bytes.len() {
        let part = Part {
            head,
            exits: long(head + 8),
            before,
            groups_bytes: long(head + 24) as usize,
            directory_bytes: (long(head) >> 32) as usize,
            core_bytes: long(head + 48) as u32 as usize,
        };
        head = part.end();
        before = long(part.head + HEAD_BYTES - 8);
        parts.push(part);
    }
    parts
}

fn any(bytes: &[u8], rng: &mut Rng) -> Part {
    let mut parts = parts(bytes);
    let count = parts.len() as u64;
    parts.swap_remove(rng.below(count) as usize)
}

/// Gives a head the check that it should have.
fn check_head(bytes: &mut [u8], part: &Part) -> u64 {
    let head = &mut bytes[part.head..][..HEAD_BYTES];
    let check = xxh64(&head[..HEAD_BYTES - 8], part.before);
    head[HEAD_BYTES - 8..].copy_from_slice(&check.to_le_bytes());
    check
}

fn place(bytes: &[u8], rng: &mut Rng) -> usize {
    rng.below(bytes.len() as u64) as usize
}

fn flip(bytes: &mut [u8], from: usize, length: usize, rng: &mut Rng) {
    let at = from + rng.below(length as u64) as usize;
    bytes[at] ^= 1 << rng.below(8);
}

fn remove(path: &Path) {
    std::fs::remove_file(path).expect("it is there");
}

/// The same checkpoints, as those of another recording.
fn of_another(bytes: &[u8]) -> Vec<u8> {
    let mut other = bytes.to_vec();
    other[FILE_HEAD_BYTES - 16] ^= 1;
    let check = xxh64(&other[..FILE_HEAD_BYTES - 8], 0);
    other[FILE_HEAD_BYTES - 8..FILE_HEAD_BYTES].copy_from_slice(&check.to_le_bytes());
    let mut before = xxh64(&other[..FILE_HEAD_BYTES], 0);
    for part in parts(bytes) {
        before = check_head(&mut other, &Part { before, ..part });
    }
    other
}

/// A recording whose checkpoints are damaged, and what it is without them.
#[derive(Debug)]
pub struct Victim {
    recording: PathBuf,
    /// Its checkpoints, as they were.
    whole: Vec<u8>,
    other: Vec<u8>,
    expected: BTreeMap<u64, FullDigest>,
}

impl Victim {
    /// The recording, which is indexed, with those of its checkpoints that are before the exit `end`, or the first; and
    /// `moments` exits before that.
    ///
    /// # Panics
    ///
    /// If there are none, or it cannot be replayed.
    pub fn new(recording: &Path, moments: u64, end: u64, seed: u64) -> Victim {
        let index = recording.join("checkpoints");
        let mut whole = std::fs::read(&index).expect("it is indexed");
        let parts = parts(&whole);
        // A fast host has none so early.
        let end = end.max(parts.first().expect("it has a checkpoint").exits + 1);
        let late = parts.iter().find(|part| part.exits >= end);
        whole.truncate(late.map_or(whole.len(), |part| part.head));
        remove(&index);
        let mut rng = Rng::new(seed, 60);
        let moments = (0..moments).map(|_| 1 + rng.below(end));
        let victim = Victim {
            recording: recording.into(),
            other: of_another(&whole),
            whole,
            expected: straight(recording, moments),
        };
        victim.mend();
        victim
    }

    fn index(&self) -> PathBuf {
        self.recording.join("checkpoints")
    }

    /// Its checkpoints are again what they were.
    ///
    /// # Panics
    ///
    /// If they cannot be written.
    pub fn mend(&self) {
        let index = self.index();
        match index.symlink_metadata() {
            Ok(found) if found.is_dir() => std::fs::remove_dir(&index).expect("it is empty"),
            Ok(_) => remove(&index),
            Err(_) => {}
        }
        std::fs::write(&index, &self.whole).expect("there is room");
    }

    /// One of the moments.
    fn moment(&self, rng: &mut Rng) -> u64 {
        let at = rng.below(self.expected.len() as u64) as usize;
        *self.expected.keys().nth(at).expect("there are so many")
    }

    /// Goes to one of the moments, does `meanwhile`, and goes to two more, with checkpoints on the way. What was complained
    /// of.
    ///
    /// # Panics
    ///
    /// If the state is not what it is without checkpoints.
    pub fn is_the_same(
        &self,
        what: &str,
        rng: &mut Rng,
        meanwhile: impl FnOnce(&mut Rng),
    ) -> usize {
        let mut timeline = open(&self.recording);
        let mut meanwhile = Some(meanwhile);
        for _ in 0..3 {
            let exit = self.moment(rng);
            go_to(&mut timeline, exit, SPACING);
            assert_eq!(
                digest(&mut timeline),
                self.expected[&exit],
                "{what}: exit {exit}"
            );
            if let Some(meanwhile) = meanwhile.take() {
                meanwhile(rng);
            }
        }
        timeline.take_complaints().len()
    }

    /// Damages its checkpoints in the way with this number, and goes about in it. Says which way that is, and what was
    /// complained of.
    ///
    /// # Panics
    ///
    /// If the state is anywhere not what it is without checkpoints.
    pub fn survives(&self, number: u64) -> String {
        let mut rng = Rng::new(number, 61);
        self.mend();
        let index = self.index();
        let mut kind = (number % KINDS) as usize;
        let nothing = |_: &mut Rng| {};
        let told = |what: &str, complaints: usize| format!("{what}, {complaints} complaints");
        if let Some((what, way)) = WAYS.get(kind) {
            let mut bytes = self.whole.clone();
            way(&mut bytes, &self.other, &mut rng);
            std::fs::write(&index, bytes).expect("there is room");
            return told(what, self.is_the_same(what, &mut rng, nothing));
        }
        kind -= WAYS.len();
        if let Some((what, trick)) = BEFORE.get(kind) {
            trick(&index, &self.whole, &mut rng);
            return told(what, self.is_the_same(what, &mut rng, nothing));
        }
        kind -= BEFORE.len();
        if let Some((what, trick)) = MEANWHILE.get(kind) {
            let meanwhile = |rng: &mut Rng| trick(&index, &self.whole, rng);
            return told(what, self.is_the_same(what, &mut rng, meanwhile));
        }
        kind -= MEANWHILE.len();
        if kind == 0 {
            let what = "written to by another process";
            let other = open(&self.recording);
            let complaints = self.is_the_same(what, &mut rng, nothing);
            drop(other);
            return told(what, complaints);
        }
        let what = "in a directory that cannot be written";
        let mounted = ReadOnly::mount(&self.recording);
        let complaints = self.is_the_same(what, &mut rng, nothing);
        drop(mounted);
        told(what, complaints)
    }
}

/// A directory that nobody can write to, not even root.
struct ReadOnly<'a>(&'a Path);

impl ReadOnly<'_> {
    fn mount(directory: &Path) -> ReadOnly<'_> {
        for options in [["--bind"].as_slice(), &["-o", "remount,bind,ro"]] {
            let mut mount = Command::new("mount");
            mount.args(options);
            if options.len() == 1 {
                mount.arg(directory);
            }
            let status = mount.arg(directory).status();
            assert!(status.expect("mount starts").success(), "is this root?");
        }
        ReadOnly(directory)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

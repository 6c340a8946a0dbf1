//! File systems that kernels have made and left in use: see `images/make`.

use std::rc::Rc;

use super::*;
use crate::disk::files::testing::Memory;
use crate::disk::{Files, changes};

/// An image, the same in use, and that as a kernel finds it when it mounts it the next time.
struct Images {
    before: Memory,
    used: Memory,
    mounted: Memory,
}

const NAMES: [(&str, &[u8]); 28] = {
    macro_rules! images {
        ($($name:literal)*) => { [$(($name, include_bytes!(concat!("images/", $name, ".zst")))),*] };
    }
    images!(
        "async" "async-sums" "attributes" "backups" "bigalloc" "bigalloc-small" "casefold" "data" "ext2" "ext3"
        "ext3-data" "ext4" "ext4-2010" "fast" "fast-inline" "fast-plain" "inline" "largedir" "metabg" "metabg-old"
        "mmp" "no-kinds" "plain" "revision-0" "small-blocks" "sparse" "wrap" "wrap-old"
    )
};

fn unpack(packed: &[u8]) -> Images {
    let mut decoder = zstd::stream::read::Decoder::new(packed).unwrap();
    decoder.window_log_max(27).unwrap();
    let mut all = Vec::new();
    std::io::copy(&mut decoder, &mut all).unwrap();
    let length = all.len() / 3;
    let image = |index: usize| Memory::new(all[index * length..(index + 1) * length].to_vec());
    Images {
        before: image(0),
        used: image(1),
        mounted: image(2),
    }
}

fn compared(before: &Memory, now: &Memory) -> Files {
    changes(before, now, &|_, _, _| false)
}

fn told(files: &Files) -> Vec<String> {
    assert_eq!(files.unknown, Vec::<String>::new());
    let changed = files.changed.as_ref().expect("something was compared");
    let line = |file: &crate::disk::FileChange| {
        format!("{:?} {} {}", file.change, file.path, file.what.join(" "))
    };
    changed.iter().map(line).collect()
}

#[test]
fn a_log_that_says_it_is_empty_and_begins_after_its_end_is_refused() {
    let (_, packed) = NAMES.iter().find(|(name, _)| *name == "ext3").unwrap();
    let images = unpack(packed);
    let mut disk = vec![0; images.used.bytes() as usize];
    images.used.read_at(0, &mut disk).unwrap();
    let is_head = |block: &[u8]| block[..4] == journal::MAGIC && be32(block, 4) == 4;
    let mut blocks = disk.chunks_mut(1024);
    let head = blocks.find(|block| is_head(block)).unwrap();
    head[0x14..0x18].fill(0xff);
    head[0x1c..0x20].fill(0);
    let files = compared(&images.before, &Memory::new(disk));
    assert!(files.unknown[0].contains("its first block"), "{files:?}");
}

#[test]
fn a_file_system_in_use_is_what_a_kernel_would_mount() {
    for (name, packed) in NAMES {
        let images = unpack(packed);
        let used = told(&compared(&images.used, &images.mounted));
        let expected: &[&str] = match name {
            // A kernel that does this fast commit again loses what a file had in its inode before it grew, and
            // the blocks that it grew by; the next test has what they are.
            "fast-inline" => &[
                "Modified /later/2 content",
                "Modified /later/linked content",
            ],
            _ => &[],
        };
        assert_eq!(used, expected, "{name}");
        let found = told(&compared(&images.before, &images.used));
        let mut expected = vec!["Added /made ", "Added /new ", "Removed /gone "];
        if name != "casefold" {
            expected.extend([
                "Added /long ",
                "Added /made/inside ",
                "Modified /link content time",
                "Modified /magic content",
                "Modified /old content size time",
            ]);
        }
        if name.starts_with("fast") {
            expected.extend([
                "Added /later/renamed ",
                "Added /later/linked ",
                "Added /later/2 ",
            ]);
            assert!(
                !found
                    .iter()
                    .any(|line| line.ends_with("later/1 ") || line.ends_with("later/3 "))
            );
        }
        for line in expected {
            assert!(
                found.iter().any(|found| found.starts_with(line)),
                "{name}: {line:?} is not in {found:#?}"
            );
        }
    }
}

#[test]
fn a_file_that_outgrew_its_inode_in_a_fast_commit_is_as_it_was_written() {
    let (_, packed) = NAMES
        .iter()
        .find(|(name, _)| *name == "fast-inline")
        .unwrap();
    let used = unpack(packed).used;
    let budget = Rc::new(Budget::new(used.bytes()));
    let system = FileSystem::open(used, budget).unwrap().unwrap();
    let inside = |directory, name: &[u8]| system.names(&directory).unwrap()[name];
    let directory = system
        .inode(inside(system.inode(ROOT).unwrap(), b"later"))
        .unwrap();
    let file = system.inode(inside(directory, b"2")).unwrap();
    assert_eq!(file.size, 20_001);
    let mut content = vec![0; 20_001];
    for piece in system.pieces(&file).unwrap() {
        let start = piece.start as usize;
        let end = content.len().min(start + piece.bytes as usize);
        system.read(piece.offset, &mut content[start..end]).unwrap();
    }
    assert_eq!(content[..2], *b"2\n");
    assert!(content[2..20_000].iter().all(|byte| *byte == 0));
    assert_eq!(content[20_000], b'x');
}

#[test]
fn a_directory_that_leads_into_itself_is_told_and_gone_through_once() {
    let images = unpack(include_bytes!("images/loops.zst"));
    let files = compared(&images.before, &images.used);
    let changed = files.changed.expect("something was compared");
    let paths: Vec<&str> = changed.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["/made", "/made/full", "/made/self"]);
    let why = "it is in more than one directory, which none can be";
    assert_eq!(
        files.unknown,
        [format!("/made/full: {why}"), format!("/made/self: {why}")]
    );
}

#[test]
fn a_superblock_that_is_not_of_its_disk_is_refused_before_anything_is_reserved() {
    let sound = unpack(include_bytes!("images/ext4.zst")).before;
    let mut raw = [0; superblock::BYTES];
    sound.read_at(superblock::OFFSET, &mut raw).unwrap();
    let parse = |at: usize, bytes: &[u8]| {
        let mut raw = raw;
        raw[at..at + bytes.len()].copy_from_slice(bytes);
        Superblock::parse(&raw, sound.bytes())
    };
    assert!(parse(0, &raw[..4]).unwrap().is_some());
    assert!(parse(0x38, &[0, 0]).unwrap().is_none());
    for (at, bytes) in [
        (0x0, &[0xff; 4][..]), // inodes
        (0x4, &[0xff; 4]),     // blocks
        (0x4, &[0; 4]),
        (0x150, &[1, 0, 0, 0]), // blocks, upper half
        (0x14, &[0xff; 4]),     // its first block
        (0x18, &[7, 0, 0, 0]),  // size of a block
        (0x18, &[0xff; 4]),
        (0x20, &[0; 4]), // blocks of a group
        (0x28, &[0; 4]), // inodes of a group
        (0x28, &[0xff; 4]),
        (0x58, &[0, 0]), // size of an inode
        (0x58, &[0x81, 0]),
        (0x58, &[0, 0x80]),
        (0xfe, &[0, 0]), // size of a descriptor
        (0xfe, &[0, 8]),
        (0x60, &[0xff; 4]), // features
    ] {
        assert!(parse(at, bytes).is_err(), "{at:#x} {bytes:?}");
    }
}

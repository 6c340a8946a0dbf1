//! Archives as cpio writes them, one after another, packed in every way; and damaged ones.

use super::*;
use crate::testing::ALL_COMPRESSIONS;

/// Appends a file to an archive.
fn add(archive: &mut Vec<u8>, name: &str, (mode, links, inode): (u32, u32, u32), content: &[u8]) {
    let fields = [
        inode,
        mode,
        0,
        0,
        links,
        7,
        content.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (name, content)) in files.iter().enumerate() {
        add(&mut archive, name, (0o100_755, 1, number as u32), content);
    }
    add(&mut archive, "TRAILER!!!", (0, 1, 0), b"");
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive
}

fn content<'a>(files: &'a Initramfs, path: &str) -> Option<&'a [u8]> {
    let entry = files.entry(path.as_bytes())?;
    Some(files.content(entry))
}

#[test]
fn files_of_a_plain_archive_and_of_a_packed_one_after_it_are_found() {
    for (name, compress) in ALL_COMPRESSIONS {
        let mut initrd = archive(&[("kernel/x86/microcode.bin", b"microcode"), ("init", b"old")]);
        let mut packed = compress(&archive(&[("./init", b"new"), ("bin//sh", b"a shell")]));
        // A kernel's build appends the size to what others pack as it is.
        if name != "gzip" {
            packed.truncate(packed.len() - 4);
        }
        initrd.extend(packed);
        let (files, why) = Initramfs::read(&initrd);
        assert_eq!(why, None, "{name}");
        assert_eq!(content(&files, "init"), Some(&b"new"[..]), "{name}");
        assert_eq!(content(&files, "bin/sh"), Some(&b"a shell"[..]), "{name}");
        let microcode = content(&files, "kernel/x86/microcode.bin");
        assert_eq!(microcode, Some(&b"microcode"[..]), "{name}");
        assert_eq!(content(&files, "bin"), None, "{name}");
    }
}

#[test]
fn names_of_one_inode_have_one_content() {
    let mut archive = Vec::new();
    add(&mut archive, "bin/cat", (0o100_755, 3, 9), b"");
    add(&mut archive, "bin/ls", (0o100_755, 3, 9), b"");
    add(&mut archive, "other", (0o100_755, 1, 10), b"other");
    add(
        &mut archive,
        "bin/busybox",
        (0o100_755, 3, 9),
        b"all of them",
    );
    let (files, why) = Initramfs::read(&archive);
    assert_eq!((files.len(), why), (4, None));
    for name in ["bin/cat", "bin/ls", "bin/busybox"] {
        assert_eq!(content(&files, name), Some(&b"all of them"[..]), "{name}");
    }
}

#[test]
fn an_initrd_that_is_cut_or_spoilt_anywhere_gives_what_it_has_and_never_a_panic() {
    let mut initrd = archive(&[("first", b"one"), ("second", b"two")]);
    let packed = ALL_COMPRESSIONS[0].1;
    initrd.extend(packed(&archive(&[("third", b"three")])));
    for length in 0..initrd.len() {
        let (files, _) = Initramfs::read(&initrd[..length]);
        assert!(files.len() < 3 || length + 16 > initrd.len(), "{length}");
        for value in [b'0', b'f', 0xff, 0] {
            let mut spoilt = initrd.clone();
            spoilt[length] = value;
            let (files, _) = Initramfs::read(&spoilt);
            for path in ["first", "second", "third"] {
                content(&files, path);
            }
        }
    }
    let (files, why) = Initramfs::read(b"none of it");
    assert!(files.is_empty() && why.is_some());
}

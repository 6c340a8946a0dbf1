//! A guest with a disk: see `guest-images/programs/disk.c` for what it does to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hindsight_tests::debian::{Debian, Ran};
use serde_json::{Value, json};

use super::{path, read_until, scratch};

/// How long the guest's disk is, in bytes.
const LENGTH: u64 = 16 << 20;

/// Makes the image that the guest expects. mke2fs and e2fsck come with Debian's e2fsprogs.
fn image(dir: &Path) -> PathBuf {
    image_of_kind(dir, &["-t", "ext4"])
}

/// The same of another kind of file system: what mke2fs makes with these options.
fn image_of_kind(dir: &Path, options: &[&str]) -> PathBuf {
    let (tree, image) = (dir.join("tree"), dir.join("base.img"));
    std::fs::create_dir_all(&tree).expect("it can be made");
    let large: Vec<u8> = (0..4 << 20).map(|i: u32| (i / 5) as u8).collect();
    for (name, content) in [
        ("large", &large[..]),
        ("middle", &large[..64 << 10]),
        ("modified", b"as it was\n"),
        ("removed", b"soon gone\n"),
        ("same", b"the same\n"),
    ] {
        std::fs::write(tree.join(name), content).expect("it can be written");
    }
    let mut mke2fs = Command::new("/sbin/mke2fs");
    mke2fs.args(["-q", "-F"]).args(options).arg("-d").arg(&tree);
    let status = mke2fs
        .arg(&image)
        .arg(format!("{}k", LENGTH >> 10))
        .stdout(Stdio::null())
        .status();
    assert!(status.expect("mke2fs is there").success());
    image
}

/// Asserts that an image holds a file system without a fault, which nobody has mounted.
fn check(image: &Path) {
    let mut e2fsck = Command::new("/sbin/e2fsck");
    let output = e2fsck
        .arg("-fn")
        .arg(image)
        .output()
        .expect("e2fsck is there");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
}

fn changes(debian: &Debian, recording: &Path, more: &[&str]) -> Value {
    let options = ["disk", path(recording), "--changed", "--json"];
    debian.run(&[&options[..], more].concat()).expect(0).json()
}

#[test]
#[ignore = "needs a KVM that can record"]
fn what_a_guest_does_to_its_disk_replays_and_can_be_looked_at() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, base) = (dir.path().join("r"), image(dir.path()));
    let pristine = std::fs::read(&base).expect("it can be read");
    let disk = format!("{},serial=first", path(&base));
    let recorded = debian
        .record(&recording, "disk", &["--disk", &disk], b"")
        .expect(0);
    assert!(
        recorded.text().contains("disk: done"),
        "{}",
        recorded.text()
    );
    let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
    assert!(replayed.stdout == recorded.stdout, "{}", replayed.text());

    // At the end: a sound file system, and exactly those files.
    let written = dir.path().join("end.img");
    let told = changes(&debian, &recording, &["-o", path(&written)]);
    check(&written);
    let file = |change: &str, path: &str, what: &[&str]| json!({"change": change, "path": path, "what": what});
    let expected = [
        file("added", "/added", &[]),
        file("added", "/directory", &[]),
        file("added", "/directory/inside", &[]),
        file("modified", "/middle", &["content", "time"]),
        file("modified", "/modified", &["content", "size", "time"]),
        file("removed", "/removed", &[]),
    ];
    assert_eq!(told["files"]["changed"], json!(expected), "{told}");
    let end = std::fs::read(&written).expect("it can be read");
    what_differs_was_written(&pristine, &end, &told["ranges"]);
    let listed = debian
        .run(&["disk", path(&recording), "--changed"])
        .expect(0)
        .text();
    assert!(
        listed.contains("added     /directory/inside")
            && listed.contains("modified  /middle  (content, time)"),
        "{listed}"
    );

    // At the beginning: the image itself, and what is there stays without --force.
    let first = [
        "disk",
        path(&recording),
        "--at",
        "1000",
        "-o",
        path(&written),
    ];
    debian.run(&first).expect(2);
    debian.run(&[&first[..], &["--force"]].concat()).expect(0);
    let beginning = std::fs::read(&written).expect("it can be read");
    assert!(beginning == pristine, "the guest has written nothing yet");
    let told = changes(&debian, &recording, &["--at", "0.01s"]);
    assert_eq!(told["written_bytes"], 0, "{told}");
    assert_eq!(told["files"]["changed"], json!([]), "{told}");

    // The image is never written to, and nor is the recording.
    debian
        .run(&["disk", path(&recording), "--force", "-o", path(&base)])
        .expect(2);
    debian
        .run(&["disk", path(&recording), "--disk", "1", "--changed"])
        .expect(2);
    assert!(std::fs::read(&base).expect("it can be read") == pristine);
    the_image_is_looked_for_where_it_was(&debian, &recording, &base);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn files_of_a_disk_that_is_still_in_use_are_compared_whatever_kind_of_ext_it_is() {
    let debian = Debian::from_env();
    for options in [
        &["-t", "ext2"][..],
        &["-t", "ext3"],
        &["-t", "ext4"],
        &["-t", "ext4", "-O", "^64bit,^metadata_csum,uninit_bg"],
        &["-t", "ext4", "-O", "fast_commit"],
        &[
            "-t",
            "ext4",
            "-O",
            "inline_data,casefold,ea_inode,large_dir,mmp",
        ],
        &[
            "-t",
            "ext4",
            "-b",
            "1024",
            "-g",
            "1024",
            "-O",
            "meta_bg,^resize_inode",
        ],
    ] {
        let dir = scratch();
        let (recording, base) = (dir.path().join("r"), image_of_kind(dir.path(), options));
        let more = ["--disk", path(&base), "--cmdline", "crash"];
        let recorded = debian.record(&recording, "disk", &more, b"").expect(0);
        assert!(
            recorded.text().contains("disk: done"),
            "{options:?}: {}",
            recorded.text()
        );
        let told = changes(&debian, &recording, &[]);
        let found = told["files"]["changed"]
            .as_array()
            .expect("files were compared");
        let found: Vec<String> = found
            .iter()
            .map(|file| {
                let word = |name: &str| file[name].as_str().expect("a word").to_owned();
                format!("{} {} {}", word("change"), word("path"), file["what"])
            })
            .collect();
        let expected = [
            "added /added []",
            "added /directory []",
            "added /directory/inside []",
            r#"modified /middle ["content","time"]"#,
            r#"modified /modified ["content","size","time"]"#,
            "removed /removed []",
        ];
        assert_eq!(found, expected, "{options:?}");
        assert_eq!(told["files"]["unknown"], json!([]), "{options:?}");
    }
}

/// Each block that differs lies in a range that the guest is said to have written.
fn what_differs_was_written(before: &[u8], after: &[u8], ranges: &Value) {
    let ranges: Vec<std::ops::Range<u64>> = ranges
        .as_array()
        .expect("ranges")
        .iter()
        .map(|range| {
            let (offset, bytes) = (range["offset"].as_u64(), range["bytes"].as_u64());
            let offset = offset.expect("an offset");
            offset..offset + bytes.expect("a length")
        })
        .collect();
    assert_eq!(before.len(), after.len());
    let blocks = before.chunks(4096).zip(after.chunks(4096)).enumerate();
    for (block, (before, after)) in blocks {
        let start = block as u64 * 4096;
        let written = ranges.iter().any(|range| range.contains(&start));
        assert!(before == after || written, "block {block}");
    }
}

fn the_image_is_looked_for_where_it_was(debian: &Debian, recording: &Path, base: &Path) {
    let inspected = debian.inspect(recording, &[]).expect(0).text();
    for wanted in ["disk 0      16.0 MiB, serial \"first\"", path(base)] {
        assert!(inspected.contains(wanted), "{wanted}: {inspected}");
    }
    let moved = base.with_extension("moved");
    std::fs::rename(base, &moved).expect("it can be moved");
    let inspected = debian.inspect(recording, &[]).expect(0).text();
    assert!(inspected.contains("it will not replay"), "{inspected}");
    debian.replay(recording, &["--quiet"]).expect(2);
    let there = path(&moved);
    debian
        .replay(recording, &["--quiet", "--disk", there])
        .expect(0);
    changes(debian, recording, &["--image", there]);

    // Another image is refused, or noticed where the guest reads what is not as it was.
    let mut other = std::fs::read(&moved).expect("it can be read");
    let at = other.windows(8).position(|bytes| bytes == b"the same");
    assert!(at.is_some(), "the content is in the image");
    other[1024 + 0x78] ^= 1; // The volume's name, in the superblock.
    std::fs::write(base, other).expect("it can be written");
    let refused = debian.replay(recording, &["--quiet"]);
    assert!(matches!(refused.code, 1 | 2), "{}", refused.stderr);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn an_image_that_is_cut_while_it_is_recorded_ends_the_recording_which_replays_to_there() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, base) = (dir.path().join("r"), image(dir.path()));
    let whole = dir.path().join("whole.img");
    std::fs::copy(&base, &whole).expect("it can be copied");
    let options = ["--disk", path(&base), "--cmdline", "wait"];
    let mut child = debian
        .recording(&recording, "disk", &options)
        .stdin(Stdio::piped())
        .spawn()
        .expect("hindsight starts");
    let mut console = child.stdout.take().expect("it is piped");
    read_until(&mut console, &mut Vec::new(), "disk: mounted");
    let file = std::fs::File::options().write(true).open(&base);
    file.and_then(|file| file.set_len(64 << 10))
        .expect("it can be cut");
    hindsight_tests::debian::type_into(&mut child, b"go\n");
    std::io::copy(&mut console, &mut std::io::sink()).expect("it can be read");
    let recorded = Ran::new(child.wait_with_output().expect("hindsight ends")).expect(5);
    for wanted in ["disk 0: cannot read", path(&base), "must stay as it is"] {
        assert!(recorded.stderr.contains(wanted), "{}", recorded.stderr);
    }
    let refused = debian.replay(&recording, &["--quiet"]).expect(2);
    assert!(
        refused
            .stderr
            .contains("is not the recorded image of disk 0"),
        "{}",
        refused.stderr
    );
    let replayed = debian
        .replay(&recording, &["--disk", path(&whole)])
        .expect(3);
    assert!(replayed.text().contains("disk: mounted"));
}

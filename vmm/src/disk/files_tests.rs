//! Made with mke2fs, which comes with Debian's e2fsprogs; without it nothing is tested, and that is said.

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use hindsight_devices::Storage;

use super::*;
use crate::disk::Disks;
use crate::disk::partitions::testing::divide;

/// An image of what stands in `tree`.
fn make(tree: &Path, image: &Path, options: &[&str]) -> bool {
    let mut command = Command::new("/sbin/mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-U", "clear"]);
    command
        .args(options)
        .arg("-d")
        .arg(tree)
        .arg(image)
        .arg("8M");
    match command.stdout(Stdio::null()).status() {
        Ok(status) => status.success() || panic!("mke2fs failed"),
        Err(error) => {
            eprintln!("SKIPPED: mke2fs cannot be started: {error}");
            false
        }
    }
}

/// A disk with the file system of `system` in the first of its two partitions, which begins at 1 MiB and has
/// `mib` of them.
fn partitioned(table: &str, mib: u64, system: &Path, disk: &Path) -> bool {
    let file = std::fs::File::create(disk).unwrap();
    file.set_len(32 << 20).unwrap();
    file.write_all_at(&std::fs::read(system).unwrap(), 1 << 20)
        .unwrap();
    divide(
        disk,
        &format!("label: {table}\nstart=1MiB, size={mib}MiB, type=L\nstart=24MiB, type=S\n"),
    )
}

/// Disks over `before` to which `now` has been written.
fn overwritten(before: &Path, now: &Path) -> SharedDisks {
    let mut disks = SharedDisks::new(Disks::new(vec![OpenImage::open(before).unwrap()]).unwrap());
    let old = std::fs::read(before).unwrap();
    let new = std::fs::read(now).unwrap();
    let blocks = old.chunks(4096).zip(new.chunks(4096)).enumerate();
    for (number, (_, new)) in blocks.filter(|(_, (old, new))| old != new) {
        disks.write(0, number as u64 * 4096, new).unwrap();
    }
    disks
}

fn told(files: &Files) -> Vec<String> {
    let line = |file: &FileChange| {
        let partition = file.partition.map(|number| format!("{number}:"));
        let place = partition.unwrap_or_default();
        format!("{:?} {place}{} {:?}", file.change, file.path, file.what)
    };
    let changed = files.changed.as_ref().expect("something was compared");
    changed.iter().map(line).collect()
}

fn touch(path: &Path, content: &str, seconds: u64) {
    std::fs::write(path, content).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_modified(time).unwrap();
}

#[test]
fn files_that_were_added_removed_and_modified_are_told_and_no_others() {
    for options in [
        &[][..],
        &["-O", "^has_journal,^extents,^64bit,^metadata_csum"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let (before, now) = (dir.path().join("before"), dir.path().join("now"));
        std::fs::create_dir_all(tree.join("d/e")).unwrap();
        for (name, content) in [
            ("same", "same"),
            ("d/gone", "gone"),
            ("d/e/same time, same size", "old"),
            ("grown", "1"),
            ("touched", "2"),
            ("kind", "3"),
            ("mode", "4"),
        ] {
            touch(&tree.join(name), content, 1_000);
        }
        touch(&tree.join("large"), &"x".repeat(300_000), 1_000);
        symlink("same", tree.join("link")).unwrap();
        std::fs::create_dir(tree.join("empty")).unwrap();
        if !make(&tree, &before, options) {
            return;
        }
        std::fs::remove_file(tree.join("d/gone")).unwrap();
        touch(&tree.join("d/e/same time, same size"), "new", 1_000);
        touch(&tree.join("grown"), "12", 2_000);
        touch(&tree.join("touched"), "2", 1_001);
        std::fs::remove_file(tree.join("kind")).unwrap();
        std::fs::create_dir(tree.join("kind")).unwrap();
        touch(&tree.join("kind/new\nline"), "", 1);
        let mode = std::fs::metadata(tree.join("mode")).unwrap().mode();
        std::fs::set_permissions(tree.join("mode"), PermissionsExt::from_mode(mode ^ 0o100))
            .unwrap();
        touch(
            &tree.join("large"),
            &format!("{}y", "x".repeat(299_999)),
            1_000,
        );
        std::fs::remove_dir(tree.join("empty")).unwrap();
        assert!(make(&tree, &now, options));

        let expected = [
            "Removed /d/gone []",
            "Modified /d/e/same time, same size [\"content\"]",
            "Removed /empty []",
            "Modified /grown [\"content\", \"size\", \"time\"]",
            "Removed /kind []",
            "Added /kind []",
            "Added /kind/new\\nline []",
            "Modified /large [\"content\"]",
            "Modified /mode [\"mode\"]",
            "Modified /touched [\"time\"]",
        ];
        let mut found = told(&changed_files(&overwritten(&before, &now), 0));
        let mut expected = expected.map(String::from).to_vec();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        assert_eq!(told(&changed_files(&overwritten(&now, &now), 0)).len(), 0);
    }
}

#[test]
fn what_cannot_be_read_is_said_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    let blank = dir.path().join("blank");
    std::fs::create_dir(&tree).unwrap();
    touch(&tree.join("file"), "content", 1);
    if !make(&tree, &image, &[]) {
        return;
    }
    let length = std::fs::metadata(&image).unwrap().len();
    std::fs::write(&blank, vec![0; length as usize]).unwrap();
    let unknown = |disks: &SharedDisks| {
        let files = changed_files(disks, 0);
        assert_eq!(files.changed, None);
        files.unknown.concat()
    };
    assert!(unknown(&overwritten(&blank, &blank)).starts_with("there is no ext2, ext3 or ext4"));

    // A file system that the guest has made, or wiped, is all of it new, or gone.
    let made = told(&changed_files(&overwritten(&blank, &image), 0));
    assert_eq!(made, ["Added /file []", "Added /lost+found []"]);
    let gone = told(&changed_files(&overwritten(&image, &blank), 0));
    assert_eq!(gone, ["Removed /file []", "Removed /lost+found []"]);

    // Damage anywhere near the front is an answer, never a panic or a hang.
    let mut rng = hindsight_replay::rng::Rng::new(1, 1);
    for _ in 0..150 {
        let mut disks = overwritten(&image, &image);
        let sector = rng.below(200) * 512;
        let mut data = [0; 512];
        disks.look().peek(0, sector, &mut data).unwrap();
        for _ in 0..1 + rng.below(4) {
            data[rng.below(512) as usize] = rng.number() as u8;
        }
        disks.write(0, sector, &data).unwrap();
        let _ = changed_files(&disks, 0);
    }
    let mut disks = overwritten(&image, &image);
    disks
        .write(0, 1024, &[0x5a; 0x38])
        .unwrap_or_else(|error| panic!("{error}"));
    assert!(
        unknown(&disks).contains("cannot be read"),
        "{}",
        unknown(&disks)
    );
}

#[test]
fn files_on_partitions_are_compared_although_a_partition_has_grown() {
    for table in ["dos", "gpt"] {
        let dir = tempfile::tempdir().unwrap();
        let file = |name| dir.path().join(name);
        let (tree, small, large) = (file("tree"), file("small"), file("large"));
        let (before, now) = (file("before"), file("now"));
        std::fs::create_dir(&tree).unwrap();
        touch(&tree.join("same"), "same", 1);
        touch(&tree.join("grown"), "1", 1);
        if !make(&tree, &small, &[]) || !partitioned(table, 8, &small, &before) {
            return;
        }
        touch(&tree.join("grown"), "12", 1);
        assert!(make(&tree, &large, &[]));
        assert!(partitioned(table, 16, &large, &now));

        let files = changed_files(&overwritten(&before, &now), 0);
        assert_eq!(
            told(&files),
            ["Modified 1:/grown [\"content\", \"size\"]"],
            "{table}"
        );
        assert_eq!(
            files.unknown,
            ["partition 2: there is no ext2, ext3 or ext4 file system"]
        );
        // A table that the guest has wiped takes its files with it.
        let mut disks = overwritten(&before, &before);
        disks.write(0, 0, &[0; 512]).unwrap();
        let gone = told(&changed_files(&disks, 0));
        assert_eq!(
            gone,
            [
                "Removed 1:/grown []",
                "Removed 1:/lost+found []",
                "Removed 1:/same []"
            ]
        );
    }
}

//! Made with mke2fs, which comes with Debian's e2fsprogs; without it nothing is tested, and that is said.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use hindsight_devices::Storage;

use super::*;
use crate::disk::Disks;

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

fn told(changes: &Files) -> Vec<String> {
    let Files::Changed(changes) = changes else {
        panic!("{changes:?}")
    };
    let line = |file: &FileChange| format!("{:?} {} {:?}", file.change, file.path, file.what);
    changes.iter().map(line).collect()
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
    let unknown = |disks: &SharedDisks| match changed_files(disks, 0) {
        Files::Unknown(why) => why,
        changed @ Files::Changed(_) => panic!("{changed:?}"),
    };
    let mut disks = overwritten(&blank, &blank);
    assert!(unknown(&disks).starts_with("there is no ext2, ext3 or ext4"));
    disks
        .write(0, 0, &[[0; 510].as_slice(), &[0x55, 0xaa]].concat())
        .unwrap();
    assert!(unknown(&disks).contains("partitions"));

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

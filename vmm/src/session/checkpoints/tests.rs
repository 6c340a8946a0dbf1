use super::format::GROUP_BYTES;
use super::*;

#[test]
fn what_does_not_stay_in_the_recording_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let limit = PageLimit {
        memory: 1,
        disks: 0,
    };
    let open = |name: &str| CheckpointFile::open(&directory.path().join(name), 1, limit).unwrap();
    let first = open("checkpoints");
    first.check_kept().unwrap();
    let second = open("checkpoints");
    assert!(matches!(second.check_kept(), Err(CheckpointError::InUse)) && !second.is_open());
    drop(first);
    open("checkpoints").check_kept().unwrap();
    // Neither a directory that is not there, nor what is no file, nor where a link leads to.
    std::os::unix::fs::symlink("checkpoints", directory.path().join("link")).unwrap();
    std::fs::create_dir(directory.path().join("directory")).unwrap();
    for name in ["none/checkpoints", "directory", "link"] {
        let elsewhere = open(name);
        let kept = elsewhere.check_kept();
        assert!(matches!(kept, Err(CheckpointError::NotWritable)), "{name}");
        assert!(
            elsewhere.is_open(),
            "it is of use for as long as it is open"
        );
    }
}

/// A file of checkpoints, each of which has changed all pages of memory.
fn file_of_many(journal: u64, count: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    let limit = PageLimit {
        memory: 64,
        disks: 0,
    };
    let empty = CheckpointFile::new(file.try_clone().unwrap(), Place::Kept, journal, limit);
    let mut writer = empty.writer().unwrap();
    for exits in 1..=count {
        writer.begin(None);
        for page in 0..64 {
            let bytes = [exits as u8 | 1; PAGE_BYTES];
            match exits % 2 {
                0 => writer.as_at_power_on(PagePlace::in_memory(page)),
                _ => writer.page(PagePlace::in_memory(page), &bytes).unwrap(),
            }
        }
        let head = CheckpointHead {
            exits,
            now: exits,
            cost: 0,
        };
        let rest = Rest {
            head,
            core: Vec::new(),
            notes: Vec::new(),
        };
        writer.finish(rest).unwrap();
    }
    file
}

#[test]
fn what_is_kept_in_memory_of_a_file_has_a_bound_and_the_rest_is_not_there() {
    let limit = PageLimit {
        memory: 64,
        disks: 0,
    };
    let file = file_of_many(1, 10);
    let read = |room_bytes| {
        let file = CheckpointFile {
            room_bytes,
            ..CheckpointFile::new(file.try_clone().unwrap(), Place::Kept, 1, limit)
        };
        file.read().heads().len()
    };
    assert_eq!(read(KEPT_BYTES_MAX), 10);
    // Each has 64 pages of 16 bytes, every second one a group, and half a one is none.
    let each = 64 * size_of::<(PagePlace, PageName)>();
    assert_eq!(read(3 * each + 4 * size_of::<Group>()), 3);
    assert_eq!(read(each - 1), 0);
}

#[test]
fn pages_that_are_wanted_together_are_there_together_however_little_is_kept() {
    let limit = PageLimit {
        memory: 64,
        disks: 0,
    };
    let mut file = CheckpointFile::new(tempfile::tempfile().unwrap(), Place::Kept, 1, limit);
    let mut writer = file.writer().unwrap();
    writer.begin(None);
    for page in 0..64 {
        let bytes = [page as u8 + 1; PAGE_BYTES];
        writer.page(PagePlace::in_memory(page), &bytes).unwrap();
    }
    let head = CheckpointHead {
        exits: 1,
        now: 1,
        cost: 0,
    };
    let rest = Rest {
        head,
        core: Vec::new(),
        notes: Vec::new(),
    };
    file.keep(writer.finish(rest).unwrap());
    // Room for one group of the four: the first is there when the others are read.
    file.unpacked = Unpacked::with_room(GROUP_BYTES);
    file.unpack(&[0]).unwrap();
    let mut pages = Vec::new();
    let given = file.give(0, None, &BTreeSet::new(), &mut |place, bytes| {
        pages.push((place, bytes.unwrap()[0]));
        std::ops::ControlFlow::Continue(())
    });
    given.unwrap();
    let expected = (0..64).map(|page| (PagePlace::in_memory(page), page as u8 + 1));
    assert_eq!(pages, expected.collect::<Vec<_>>());
}

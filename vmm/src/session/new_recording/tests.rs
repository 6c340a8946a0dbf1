//! What is there before, while, and after a recording is made in a directory.

use super::*;

/// All files below `directory` with their contents, by name; of a link, where it leads.
fn tree(directory: &Path) -> Vec<(String, String)> {
    fn walk(directory: &Path, prefix: &str, found: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("{prefix}{}", path.file_name().unwrap().to_str().unwrap());
            if path.is_symlink() {
                let target = path.read_link().unwrap();
                found.push((name, format!("-> {}", target.display())));
            } else if path.is_dir() {
                // Not by the letters that chance has given it.
                let name = name.split_inclusive('-').next().unwrap().to_string();
                walk(&path, &format!("{name}/"), found);
            } else {
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(directory, "", &mut found);
    found.sort();
    found
}

fn names(directory: &Path) -> Vec<String> {
    tree(directory).into_iter().map(|(name, _)| name).collect()
}

/// Writes all that a recording of `generation` has before its guest runs.
fn prepare(at: &Path, force: bool, generation: &str) -> Result<NewRecording, RecordingError> {
    let new = NewRecording::create(at, force)?;
    new.write("kernel", format!("kernel {generation}").as_bytes())?;
    new.write("initrd", format!("initrd {generation}").as_bytes())?;
    let mut journal = new.create_journal()?;
    write!(journal, "journal {generation}").unwrap();
    Ok(new)
}

fn make_old(at: &Path) -> Vec<(String, String)> {
    let mut new = prepare(at, false, "old").unwrap();
    new.begin().unwrap();
    new.finish().unwrap();
    std::fs::write(at.join("notes"), "mine").unwrap();
    tree(at)
}

#[test]
fn what_fails_before_the_guest_runs_leaves_the_directory_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    drop(prepare(&at, false, "new").unwrap());
    assert!(!at.exists(), "a directory that was not there is gone again");

    let old = make_old(&at);
    let refused = prepare(&at, false, "new");
    assert!(matches!(refused, Err(RecordingError::Exists(_))));
    assert_eq!(tree(&at), old);
    let new = prepare(&at, true, "new").unwrap();
    let during = tree(&at);
    assert!(old.iter().all(|file| during.contains(file)), "{during:?}");
    drop(new);
    assert_eq!(tree(&at), old);
}

#[test]
fn the_old_recording_is_whole_until_the_new_one_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    let old = make_old(&at);
    let mut new = prepare(&at, true, "new").unwrap();
    new.begin().unwrap();
    let replaced = new.replaced().unwrap().to_path_buf();
    assert_eq!(std::fs::read(at.join("journal")).unwrap(), b"journal new");
    assert_eq!(replaced.parent(), Some(&*at));
    for (name, content) in old.iter().filter(|(name, _)| name != "notes") {
        assert_eq!(
            std::fs::read_to_string(replaced.join(name)).unwrap(),
            *content
        );
    }
    new.finish().unwrap();
    assert_eq!(names(&at), ["initrd", "journal", "kernel", "notes"]);
    assert_eq!(std::fs::read(at.join("kernel")).unwrap(), b"kernel new");
}

#[test]
fn a_recording_that_fails_on_the_way_is_kept_and_so_is_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    make_old(&at);
    for generation in ["second", "third"] {
        let mut new = prepare(&at, true, generation).unwrap();
        new.begin().unwrap();
    }
    let found = tree(&at);
    for (name, content) in [
        ("journal", "journal third"),
        ("kernel", "kernel third"),
        ("replaced-/journal", "journal old"),
        ("replaced-/journal", "journal second"),
        ("replaced-/kernel", "kernel old"),
    ] {
        let wanted = (name.to_string(), content.to_string());
        assert!(found.contains(&wanted), "{wanted:?}: {found:?}");
    }
}

#[test]
fn a_recording_that_is_not_wanted_gives_the_one_before_its_place_back() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    let old = make_old(&at);
    let mut new = prepare(&at, true, "new").unwrap();
    new.begin().unwrap();
    // Another run of the same machine, which has fewer files than the old one.
    new.recording().write_index(&[]).unwrap();
    drop(new.create_journal().unwrap());
    assert!(!at.join("index").exists());
    new.withdraw().unwrap();
    assert_eq!(tree(&at), old);

    let fresh = dir.path().join("fresh");
    let mut new = prepare(&fresh, false, "new").unwrap();
    new.begin().unwrap();
    new.withdraw().unwrap();
    assert!(!fresh.exists());
}

#[test]
fn two_recorders_never_share_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    let mut first = prepare(&at, false, "first").unwrap();
    for force in [false, true] {
        let second = prepare(&at, force, "second");
        assert!(
            matches!(second, Err(RecordingError::InUse(_))),
            "{second:?}"
        );
    }
    first.begin().unwrap();
    let second = prepare(&at, true, "second");
    assert!(
        matches!(second, Err(RecordingError::InUse(_))),
        "{second:?}"
    );
    first.finish().unwrap();
    assert_eq!(names(&at), ["initrd", "journal", "kernel"]);
    prepare(&at, true, "second").unwrap();
}

#[test]
fn what_a_killed_recorder_left_before_it_began_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("r");
    let killed = prepare(&at, false, "killed").unwrap();
    // As a kill does: nothing is tidied up, and the lock goes with the process.
    flock(&killed.lock, FlockOperation::Unlock).unwrap();
    std::mem::forget(killed);
    assert!(names(&at).contains(&".new-/kernel".to_string()));
    let mut new = prepare(&at, false, "new").unwrap();
    new.begin().unwrap();
    new.finish().unwrap();
    assert_eq!(names(&at), ["initrd", "journal", "kernel"]);
}

#[test]
fn what_is_no_directory_is_refused_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    for path in [file.clone(), file.join("below")] {
        let refused = NewRecording::create(&path, true);
        assert!(
            matches!(refused, Err(RecordingError::Directory { .. })),
            "{refused:?}"
        );
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    std::fs::create_dir_all(dir.path().join("r/journal")).unwrap();
    let refused = NewRecording::create(&dir.path().join("r"), true);
    assert!(
        matches!(refused, Err(RecordingError::NotAFile(_))),
        "{refused:?}"
    );
    let deep = dir.path().join("a/b/c");
    drop(NewRecording::create(&deep, false).unwrap());
    assert!(!deep.exists());
}

#[test]
fn replacing_a_recording_removes_links_to_images_and_never_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (image, at) = (dir.path().join("image"), dir.path().join("r"));
    std::fs::write(&image, [7; 512]).unwrap();
    let opened = OpenImage::open(&image).unwrap();
    let mut new = NewRecording::create(&at, false).unwrap();
    new.link_disks(std::slice::from_ref(&opened)).unwrap();
    new.begin().unwrap();
    new.finish().unwrap();
    // By way of the link that is about to go.
    let through_link = OpenImage::open(&at.join("disk0")).unwrap();
    assert!(matches!(
        NewRecording::create(&at, false),
        Err(RecordingError::Exists(_))
    ));
    let mut new = NewRecording::create(&at, true).unwrap();
    new.begin().unwrap();
    assert!(at.join("disk0").symlink_metadata().is_err());
    new.finish().unwrap();
    let mut new = NewRecording::create(&at, true).unwrap();
    new.link_disks(&[through_link]).unwrap();
    new.write("kernel", b"kernel").unwrap();
    new.begin().unwrap();
    assert_eq!(std::fs::read(at.join("disk0")).unwrap(), [7; 512]);

    // The image itself in the place of the link: refused, before anything is removed.
    std::fs::remove_file(at.join("disk0")).unwrap();
    std::fs::rename(&image, at.join("disk0")).unwrap();
    let refused = new.withdraw();
    assert!(
        matches!(refused, Err(RecordingError::Image(_))),
        "{refused:?}"
    );
    let refused = NewRecording::create(&at, true).map(drop);
    assert!(
        matches!(refused, Err(RecordingError::Image(_))),
        "{refused:?}"
    );
    assert_eq!(std::fs::read(at.join("disk0")).unwrap(), [7; 512]);
    assert_eq!(std::fs::read(at.join("kernel")).unwrap(), b"kernel");
}

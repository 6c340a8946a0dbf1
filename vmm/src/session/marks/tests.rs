//! What a file of marks may hold, who may write it, and what its names lead to.

use super::*;

fn recording() -> (tempfile::TempDir, Recording) {
    let dir = tempfile::tempdir().unwrap();
    let recording = Recording::at(dir.path());
    (dir, recording)
}

fn at(exits: u64) -> Complete {
    let now = exits * 1_000;
    Complete { exits, now }
}

fn names(recording: &Recording) -> Vec<String> {
    let marks = Marks::read(recording).unwrap();
    marks.list.into_iter().map(|mark| mark.name).collect()
}

#[test]
fn marks_are_listed_by_exit_and_names_that_are_not_given_are_made() {
    let (_dir, recording) = recording();
    assert!(Marks::read(&recording).unwrap().list().is_empty());
    for (name, exit, becomes) in [
        (None, 70, "mark-1"),
        (Some("login"), 30, "login"),
        (Some("mark-4"), 90, "mark-4"),
        (None, 10, "mark-5"),
    ] {
        assert_eq!(add_mark(&recording, name, at(exit)).unwrap().name, becomes);
    }
    assert_eq!(names(&recording), ["mark-5", "login", "mark-1", "mark-4"]);
    let taken = add_mark(&recording, Some("login"), at(31)).unwrap_err();
    assert!(
        matches!(taken, MarkError::Taken { exit: 30, .. }),
        "{taken}"
    );
    assert!(add_mark(&recording, Some("a b"), at(1)).is_err());

    let removed = remove_mark(&recording, "login").unwrap();
    assert_eq!((removed.exit, removed.guest_ns), (30, 30_000));
    let missing = remove_mark(&recording, "login").unwrap_err().to_string();
    assert!(missing.contains("mark-5, mark-1, mark-4"), "{missing}");
    assert_eq!(add_mark(&recording, Some("login"), at(5)).unwrap().exit, 5);
    assert_eq!(names(&recording)[0], "login");
}

#[test]
fn a_damaged_line_is_skipped_and_said_and_the_others_are_there() {
    let (_dir, recording) = recording();
    add_mark(&recording, Some("a"), at(1)).unwrap();
    let good = std::fs::read_to_string(recording.path(MARKS)).unwrap();
    let hostile = good.replace("\"a\"", "\"\\u001b[2Jx\"");
    let text = format!("{good}\nnonsense\n{hostile}{good}\u{1}{{\"name\":\"cut");
    std::fs::write(recording.path(MARKS), &text).unwrap();
    // What comes after a line that was cut short is whole.
    add_mark(&recording, Some("b"), at(2)).unwrap();
    let marks = Marks::read(&recording).unwrap();
    assert_eq!(names(&recording), ["a", "b"]);
    let lines: Vec<_> = marks.complaints().iter().map(|c| &c[..6]).collect();
    assert_eq!(lines, ["line 3", "line 4", "line 5", "line 6"]);
    assert!(!marks.complaints().concat().contains('\x1b'));
    // They stay for whoever can repair them.
    remove_mark(&recording, "b").unwrap();
    assert_eq!(Marks::read(&recording).unwrap().complaints().len(), 4);

    std::fs::write(recording.path(MARKS), "x\n".repeat(100_000)).unwrap();
    assert_eq!(
        Marks::read(&recording).unwrap().complaints().len(),
        TOLD_MAX + 1
    );
    std::fs::write(recording.path(MARKS), [0xff, b'\n', 0xfe]).unwrap();
    assert_eq!(Marks::read(&recording).unwrap().complaints().len(), 2);
}

#[test]
fn a_file_is_bounded_and_nothing_else_is_read_or_written_in_its_place() {
    let (dir, recording) = recording();
    let path = recording.path(MARKS);
    let line = |number: usize| {
        let name = format!("mark-{number}");
        let (exit, guest_ns, by) = (7, u64::MAX, MadeBy::Key);
        let mark = Mark {
            name,
            exit,
            guest_ns,
            by,
        };
        line_of(&mark)
    };
    let all: String = (0..MARKS_MAX + 2).map(line).collect();
    std::fs::write(&path, &all).unwrap();
    let marks = Marks::read(&recording).unwrap();
    assert_eq!(
        (marks.list().len(), marks.complaints().len()),
        (MARKS_MAX, 2)
    );
    let full = add_mark(&recording, None, at(1)).unwrap_err();
    assert!(matches!(full, MarkError::Full(_)), "{full}");
    File::create(&path).unwrap().set_len(1 << 43).unwrap();
    assert!(matches!(
        Marks::read(&recording),
        Err(ReadError::TooLarge { .. })
    ));

    std::fs::remove_file(&path).unwrap();
    let precious = dir.path().join("precious");
    for _ in 0..2 {
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        add_mark(&recording, None, at(1)).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&precious, "mine").unwrap();
    }
    assert_eq!(std::fs::read(&precious).unwrap(), b"mine");
    let lone = add_mark(&Recording::at(&precious), None, at(1)).unwrap_err();
    assert!(matches!(lone, MarkError::NoDirectory(_)), "{lone}");
    assert!(
        Marks::read(&Recording::at(&precious))
            .unwrap()
            .list()
            .is_empty()
    );
}

#[test]
fn whoever_records_there_is_alone_with_its_marks() {
    let (dir, recording) = recording();
    let recorder = File::open(dir.path()).unwrap();
    flock(&recorder, FlockOperation::LockExclusive).unwrap();
    let refused = add_mark(&recording, None, at(1)).unwrap_err();
    assert!(matches!(refused, MarkError::Recorded(_)), "{refused}");
    append(&recording, None, at(1), MadeBy::Signal).unwrap();
    drop(recorder);
    add_mark(&recording, None, at(2)).unwrap();
    assert_eq!(names(&recording), ["mark-1", "mark-2"]);
}

#[test]
fn a_moment_by_a_marks_name_is_the_exit_that_the_mark_is_at() {
    let (_dir, recording) = recording();
    let exit = |text: &str| -> Result<u64, String> {
        match unmarked(&recording, &text.parse().unwrap()) {
            Ok(When {
                anchor: Anchor::Exit(exit),
                offset: 0,
            }) => Ok(exit),
            Ok(other) => panic!("{other}"),
            Err(failure) => Err(failure.to_string()),
        }
    };
    assert!(exit("login").unwrap_err().contains("there are none"));
    append(&recording, Some("login"), at(100), MadeBy::Key).unwrap();
    append(&recording, Some("end"), at(7), MadeBy::Key).unwrap();
    for (text, expected) in [
        ("login", 100),
        ("login+5", 105),
        ("mark:login-1", 99),
        ("login-1+3", 102),
        ("mark:end", 7),
    ] {
        assert_eq!(exit(text), Ok(expected), "{text}");
    }
    append(&recording, Some("login-1"), at(200), MadeBy::Key).unwrap();
    assert_eq!(exit("login-1"), Ok(200));
    assert_eq!(exit("login-1-1"), Ok(199));
    assert!(exit("login-101").unwrap_err().contains("before power-on"));
    let missing = exit("logout").unwrap_err();
    assert!(
        missing.contains("there are end, login, login-1"),
        "{missing}"
    );
    let end: When = "end".parse().unwrap();
    assert_eq!(unmarked(&recording, &end).unwrap(), end);
}

#[test]
fn a_recording_that_goes_on_from_another_has_its_marks_up_to_there() {
    let ((_dir, old), (_dir_too, new)) = (recording(), recording());
    for exit in [10, 30, 20] {
        append(&old, None, at(exit), MadeBy::Key).unwrap();
    }
    carry_over(&old, &new, 20).unwrap();
    let marks = Marks::read(&new).unwrap();
    assert_eq!(names(&new), ["mark-1", "mark-3"]);
    assert_eq!(
        marks.find("mark-3"),
        Marks::read(&old).unwrap().find("mark-3")
    );
}

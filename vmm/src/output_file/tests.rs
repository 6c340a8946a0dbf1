//! What is written, and what is not.

use std::os::unix::fs::symlink;

use super::*;

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn write(path: &Path, force: bool, text: &str) -> Result<(), OutputError> {
    let mut output = Plan::new(path, force, Kept::default())?.begin()?;
    output.write_all(text.as_bytes()).unwrap();
    output.finish()
}

fn refusal(path: &Path, force: bool, kept: &Kept) -> String {
    match Plan::new(path, force, kept.clone()) {
        Err(OutputError::Refused { why, .. }) => why,
        other => panic!("{}: {other:?}", path.display()),
    }
}

#[test]
fn a_file_is_whole_or_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let plan = Plan::new(&path, false, Kept::default()).unwrap();
    assert_eq!(entries(dir.path()), [""; 0], "planning makes nothing");
    let mut output = plan.begin().unwrap();
    output.write_all(b"half").unwrap();
    assert!(!path.exists());
    drop(output);
    assert_eq!(entries(dir.path()), [""; 0]);
    write(&path, false, "whole").unwrap();
    assert_eq!(entries(dir.path()), ["out"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"whole");
}

#[test]
fn a_file_takes_its_place_whether_it_had_a_name_before_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let named = || {
        let file = Builder::new().prefix(UNFINISHED).tempfile_in(dir.path());
        Unfinished(Draft::Named(file.unwrap()))
    };
    let as_it_comes = || Unfinished::beside(&path, 0o640).unwrap();
    for make in [&named as &dyn Fn() -> Unfinished, &as_it_comes] {
        let kind = |put: std::io::Result<()>| put.map_err(|error| error.kind());
        assert_eq!(kind(make().put(&path, false)), Ok(()));
        let there = Err(ErrorKind::AlreadyExists);
        assert_eq!(kind(make().put(&path, false)), there);
        assert_eq!(kind(make().put(&path, true)), Ok(()));
        assert_eq!(entries(dir.path()), ["out"]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_is_there_is_replaced_only_by_force_and_keeps_its_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    std::fs::write(&path, "mine").unwrap();
    std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    assert!(refusal(&path, false, &Kept::default()).contains("--force"));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    write(&path, true, "new").unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    assert_eq!(entries(dir.path()), ["out"]);
}

#[test]
fn what_appears_while_it_is_written_is_not_replaced_either() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out");
    let begin = |force| {
        let plan = Plan::new(&path, force, Kept::default()).unwrap();
        plan.begin().unwrap()
    };
    let (gently, by_force) = (begin(false), begin(true));
    std::fs::write(&path, "mine").unwrap();
    assert!(matches!(gently.finish(), Err(OutputError::Refused { .. })));
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(matches!(
        by_force.finish(),
        Err(OutputError::Refused { .. })
    ));
    assert_eq!(entries(dir.path()), ["out"]);
}

#[test]
fn nothing_is_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let [precious, link, nowhere] = ["precious", "link", "nowhere"].map(|n| dir.path().join(n));
    std::fs::write(&precious, "mine").unwrap();
    symlink(&precious, &link).unwrap();
    symlink(dir.path().join("not there"), &nowhere).unwrap();
    for force in [false, true] {
        assert!(refusal(&link, force, &Kept::default()).contains("is a link"));
        assert!(refusal(&nowhere, force, &Kept::default()).contains("is a link"));
    }
    // Nor does what replaces without asking, such as an index.
    let unfinished = Unfinished::beside(&link, 0o666).unwrap();
    unfinished.file().write_all(b"index").unwrap();
    unfinished.put(&link, true).unwrap();
    assert_eq!(std::fs::read(&precious).unwrap(), b"mine");
    assert_eq!(std::fs::read(&link).unwrap(), b"index");
}

#[test]
fn what_is_kept_is_refused_even_by_force_and_by_any_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("r")).unwrap();
    std::fs::write(at("r/journal"), "journal").unwrap();
    std::fs::write(at("image"), "image").unwrap();
    symlink(at("image"), at("r/disk0")).unwrap();
    symlink(at("r"), at("other way")).unwrap();
    symlink(at("r/journal"), at("soft")).unwrap();
    std::fs::hard_link(at("r/journal"), at("hard")).unwrap();
    std::fs::hard_link(at("image"), at("hard image")).unwrap();
    let mut kept = Kept::default();
    for name in ["journal", "index", "disk0"] {
        kept.keep(
            &at("r").join(name),
            &format!("the {name} of this recording"),
        );
    }
    let names = [
        "r/journal",
        "r/../r/journal",
        "other way/journal",
        "soft",
        "hard",
        "r/disk0",
        "image",
        "hard image",
        "r/index",
        "other way/index",
    ];
    for name in names {
        for force in [false, true] {
            let why = refusal(&at(name), force, &kept);
            assert!(why.contains("of this recording"), "{name}: {why}");
        }
    }
    Plan::new(&at("r/another"), false, kept).unwrap();
}

#[test]
fn what_is_no_file_is_refused_and_a_pipe_is_written_as_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let none = Kept::default();
    assert!(refusal(dir.path(), true, &none).contains("is a directory"));
    assert!(refusal(&at("new/"), true, &none).contains("name of a directory"));
    assert!(refusal(&at("no/where"), true, &none).contains("does not exist"));
    std::fs::write(at("file"), "").unwrap();
    assert!(refusal(&at("file/in"), true, &none).contains("cannot be written"));
    let socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    assert!(refusal(&at("socket"), true, &none).contains("socket"));
    drop(socket);

    write(Path::new("/dev/null"), false, "gone").unwrap();
    let pipe = at("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || std::fs::read_to_string(pipe).unwrap()
    });
    write(&pipe, false, "through").unwrap();
    assert_eq!(reader.join().unwrap(), "through");
}

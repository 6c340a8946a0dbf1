use super::*;

#[test]
fn what_does_not_stay_in_the_recording_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let limit = PageLimit { memory: 1 };
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

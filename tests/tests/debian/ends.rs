//! How a recording ends: by the guest, by a signal, by a full disk or a killed recorder.

use super::*;

#[test]
#[ignore = "needs a KVM that can record"]
fn a_killed_recorder_leaves_what_replays_to_the_last_whole_frame() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut child = debian
        .recording(&recording, "boot", &["--quiet"])
        .spawn()
        .expect("it starts");
    wait_for_journal(&recording, 6_000);
    child.kill().expect("it can be killed");
    child.wait().expect("it ends");
    let replayed = debian.replay(&recording, &["--quiet"]).expect(3);
    assert!(
        replayed.stderr.contains("replay cut short"),
        "{}",
        replayed.stderr
    );

    // Cut inside the last frames: still a prefix, and the words say where.
    let whole = std::fs::read(recording.join("journal")).expect("a journal");
    let cut = dir.path().join("cut");
    for cut_at in [whole.len() - 1, whole.len() * 2 / 3] {
        copy(&recording, &cut);
        std::fs::write(cut.join("journal"), &whole[..cut_at]).expect("it can be written");
        let replayed = debian.replay(&cut, &["--quiet"]).expect(3);
        assert!(
            replayed
                .stderr
                .contains("breaks off inside a frame at byte"),
            "{}",
            replayed.stderr
        );
    }
}

#[test]
#[ignore = "needs a KVM that can record, and root to mount a small file system"]
fn a_full_file_system_ends_the_recording_and_loses_nothing_written() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let small = dir.path().join("small");
    std::fs::create_dir(&small).expect("it can be made");
    let bytes = |path: &Path| std::fs::metadata(path).expect("it is there").len();
    let images = bytes(debian.kernel()) + bytes(&debian.image("hello"));
    // Room for some frames of the journal, and not for all of it.
    let size = format!("size={}", images + (40 << 10));
    let mount = |arguments: &[&str]| {
        let status = std::process::Command::new("mount")
            .args(arguments)
            .arg(&small)
            .status();
        assert!(status.expect("mount starts").success(), "mount failed");
    };
    mount(&["-t", "tmpfs", "-o", &size, "tmpfs"]);
    let recording = small.join("r");
    let recorded = debian.record(&recording, "hello", &["--detail", "full", "--quiet"], b"");
    let replayed = (recorded.code == 5).then(|| debian.replay(&recording, &["--quiet"]));
    let unmounted = std::process::Command::new("umount")
        .arg("-l")
        .arg(&small)
        .status();
    assert!(unmounted.expect("umount starts").success());
    let recorded = recorded.expect(5);
    assert!(
        recorded.stderr.contains("No space left on device"),
        "{}",
        recorded.stderr
    );
    let replayed: Ran = replayed.expect("it failed as expected");
    assert_eq!(replayed.code, 3, "{}", replayed.stderr);
    assert!(
        replayed.stderr.contains("whole up to exit"),
        "{}",
        replayed.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn an_interrupted_recording_is_closed_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let child = debian
        .recording(&recording, "boot", &["--quiet"])
        .spawn()
        .expect("it starts");
    wait_for_journal(&recording, 5_000);
    interrupt(&child);
    let recorded = Ran::new(child.wait_with_output().expect("it ends")).expect(0);
    assert!(
        recorded.stderr.contains("asked to stop"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &["--quiet"]).expect(0);
    assert!(
        replayed.stderr.contains("replay equal: asked to stop"),
        "{}",
        replayed.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_guest_that_turns_itself_off_ends_its_recording_and_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let recorded = debian.record(&recording, "off", &[], b"").expect(0);
    assert!(
        recorded.text().contains("off: good night") && recorded.stderr.contains("powered off"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &["--quiet"]).expect(0);
    assert!(
        replayed.stderr.contains("replay equal: powered off"),
        "{}",
        replayed.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record, and the kernel's modules in /lib/modules"]
fn the_power_button_turns_a_guest_off_that_listens() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, initrd) = (dir.path().join("r"), dir.path().join("initrd"));
    let kernel = debian.kernel().file_name().expect("a file");
    let version = kernel
        .to_str()
        .expect("a plain name")
        .trim_start_matches("vmlinuz-");
    let module = format!("/lib/modules/{version}/kernel/drivers/acpi/button.ko");
    let module = std::fs::read(&module).unwrap_or_else(|error| panic!("{module}: {error}"));
    let mut archives = std::fs::read(debian.image("off")).expect("the image is built");
    archives.extend(archive_of("button.ko", &module));
    std::fs::write(&initrd, archives).expect("it can be written");

    let mut command = debian.command(&["record", "-o", path(&recording)]);
    command.arg("--kernel").arg(debian.kernel());
    let mut child = command
        .arg("--initrd")
        .arg(&initrd)
        .spawn()
        .expect("it starts");
    let mut console = child.stdout.take().expect("it is piped");
    let mut shown = Vec::new();
    read_until(&mut console, &mut shown, "waiting for the power button");
    signal(&child, "PWR");
    console.read_to_end(&mut shown).expect("it can be read");
    let recorded = Ran::new(child.wait_with_output().expect("it ends")).expect(0);
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("off: pressed"), "{shown}");
    assert!(
        recorded.stderr.contains("powered off"),
        "{}",
        recorded.stderr
    );
    let replayed = debian.replay(&recording, &[]).expect(0);
    assert!(replayed.text() == shown, "{}", replayed.text());
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_terminal_is_raw_while_the_guest_has_it_and_the_escape_key_ends_the_recording() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let command = debian.recording(&recording, "input", &[]);
    let line = shell_line(&command);
    // script(1) gives the program a terminal of its own, fed from our pipe.
    let mut script = std::process::Command::new("script")
        .args(["-qefc", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script starts");
    let mut keyboard = script.stdin.take().expect("it is piped");
    let mut screen = script.stdout.take().expect("it is piped");
    let mut shown = Vec::new();
    let mut await_text = |wanted: &str| read_until(&mut screen, &mut shown, wanted);
    await_text("input: ready");
    keyboard.write_all(b"abc\r").expect("keys can be pressed");
    await_text("input: 1 ABC");
    keyboard
        .write_all(&[hindsight_escape()])
        .expect("keys can be pressed");
    await_text("asked to stop");
    assert!(script.wait().expect("script ends").success());
    let replayed = debian.replay(&recording, &[]).expect(0);
    assert!(
        replayed.text().contains("input: 1 ABC"),
        "{}",
        replayed.text()
    );
}

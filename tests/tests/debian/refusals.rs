//! What is not what was recorded: altered values, another machine, damage.

use super::*;

#[test]
#[ignore = "needs a KVM that can record"]
fn a_relogged_recording_says_what_inspect_io_prints() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, full) = (dir.path().join("r"), dir.path().join("full"));
    debian.record(&recording, "hello", &[], b"").expect(0);
    let relog = full.to_str().expect("a plain path");
    debian
        .replay(&recording, &["--relog", relog, "--quiet"])
        .expect(0);
    let by_replay = debian.inspect(&recording, &["--io"]).expect(0);
    let by_reading = debian.inspect(&full, &["--io"]).expect(0);
    assert!(by_replay.stdout == by_reading.stdout, "the listings differ");
    let listing = by_reading.text();
    for wanted in [
        "in8 port",
        "out8 port",
        "rdtsc ->",
        "cpuid 0x",
        "interrupt 0x",
    ] {
        assert!(
            listing.contains(wanted),
            "no {wanted:?} among {} lines",
            listing.lines().count()
        );
    }
    debian.replay(&full, &["--quiet"]).expect(0);

    // And back again: the default recording of the full one is the first one's own journal.
    let again = dir.path().join("again");
    let relog = again.to_str().expect("a plain path");
    debian
        .replay(&full, &["--relog", relog, "--detail", "default", "--quiet"])
        .expect(0);
    let journals =
        [&recording, &again].map(|d| std::fs::read(d.join("journal")).expect("a journal"));
    assert!(journals[0] == journals[1], "the journals differ");
    assert_eq!(
        debian.run(&["diff", path(&recording), path(&again)]).code,
        0
    );
    assert_eq!(debian.run(&["diff", path(&recording), path(&full)]).code, 1);

    each_altered_value_is_refused_at_its_event(&debian, &full, dir.path());
}

/// Alters one value of a kind in the middle of a full recording, with all checksums made right, and
/// expects the replay to stop at exactly that event.
fn each_altered_value_is_refused_at_its_event(debian: &Debian, full: &Path, dir: &Path) {
    type Alter = fn(&mut Event) -> bool;
    let kinds: [(&str, Alter); 7] = [
        ("a device read", |event| match event {
            Event::Turn(turn) => match (&turn.exit, &mut turn.answer) {
                (Exit::Access(_), Answer::Value(value)) => flip(value),
                _ => false,
            },
            _ => false,
        }),
        ("a time read", |event| match event {
            Event::Turn(turn) => match &mut turn.answer {
                Answer::Time { tsc, .. } => flip(tsc),
                _ => false,
            },
            _ => false,
        }),
        ("a posted write", |event| match event {
            Event::Posted(bytes) => {
                bytes[0] ^= 1;
                true
            }
            _ => false,
        }),
        ("a cpuid", |event| match event {
            Event::Turn(turn) => match &mut turn.answer {
                Answer::Cpuid(values) => {
                    values[3] ^= 1;
                    true
                }
                _ => false,
            },
            _ => false,
        }),
        ("a register", |event| match event {
            Event::Turn(turn) => flip(&mut turn.registers.0[5]),
            _ => false,
        }),
        ("an interrupt's vector", |event| match event {
            Event::Interrupt { vector, .. } => {
                *vector ^= 1;
                true
            }
            _ => false,
        }),
        ("an interrupt's place", |event| match event {
            Event::Interrupt { at, .. } => flip(&mut at.rip),
            _ => false,
        }),
    ];
    for (what, alter) in kinds {
        let altered = dir.join("altered");
        copy(full, &altered);
        let exit = rewrite(&altered, alter).unwrap_or_else(|| panic!("{what}: none was found"));
        let refused = debian.replay(&altered, &["--quiet"]).expect(1);
        let expected = format!("left the recording at exit {exit} ");
        assert!(
            refused.stderr.contains(&expected),
            "{what}: not {expected}:\n{}",
            refused.stderr
        );
    }
}

#[test]
#[ignore = "needs a KVM that can record"]
fn what_is_not_the_recorded_machine_is_refused_with_both_sides() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian.record(&recording, "hello", &[], b"").expect(0);
    let other = debian.image("spin");
    let refused = debian
        .replay(&recording, &["--initrd", path(&other)])
        .expect(2);
    assert!(
        refused.stderr.contains("is not the recorded initrd"),
        "{}",
        refused.stderr
    );
    let refused = debian
        .replay(&recording, &["--kernel", path(&other)])
        .expect(2);
    assert!(
        refused.stderr.contains("is not the recorded kernel"),
        "{}",
        refused.stderr
    );
    let refused = debian.replay(&recording, &["--memory", "512M"]).expect(2);
    assert!(refused.stderr.contains("536870912") && refused.stderr.contains("268435456"));

    let mut journal = std::fs::read(recording.join("journal")).expect("a journal");
    journal[8] += 1;
    std::fs::write(recording.join("journal"), journal).expect("the journal can be written");
    let refused = debian.replay(&recording, &[]).expect(2);
    let versions = [
        format!("version {}", VERSION + 1),
        format!("version {VERSION}"),
    ];
    assert!(
        versions.iter().all(|v| refused.stderr.contains(v)),
        "{}",
        refused.stderr
    );
    std::fs::remove_file(recording.join("journal")).expect("it is there");
    debian.replay(&recording, &[]).expect(2);
}

#[test]
#[ignore = "needs a KVM that can record"]
fn no_damage_to_a_journal_makes_a_command_panic_or_approve() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian
        .record(&recording, "hello", &["--quiet"], b"")
        .expect(0);
    let whole = std::fs::read(recording.join("journal")).expect("a journal");
    let damaged = dir.path().join("damaged");
    copy(&recording, &damaged);
    // Places all over the file; `replay` only where it ends early.
    let step = whole.len() / 60;
    for (turn, at) in (0..whole.len()).step_by(step).enumerate() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (turn % 8);
        std::fs::write(damaged.join("journal"), &bytes).expect("it can be written");
        let inspected = debian.inspect(&damaged, &["--json"]);
        assert!(
            matches!(inspected.code, 2 | 3),
            "byte {at}: {}",
            inspected.stderr
        );
        let compared = debian.run(&["diff", path(&recording), path(&damaged)]);
        assert!(
            matches!(compared.code, 1 | 2),
            "byte {at}: {}",
            compared.stderr
        );
        if at < 3 * step {
            let replayed = debian.replay(&damaged, &["--quiet"]);
            assert!(
                matches!(replayed.code, 2 | 3),
                "byte {at}: {}",
                replayed.stderr
            );
        }
    }
}

//! Modules, and kernels that take the place of the recorded one.

use super::*;

#[test]
#[ignore = "needs a KVM that can record"]
fn a_module_loader_that_is_led_away_from_is_told_at_once_and_shown_as_left_open() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let recorded = debian.record(&recording, "changed", &[], b"").expect(0);
    let what = "the function that loads them is livepatched";
    let told = |text: &str| text.contains("left open") && text.contains(what);
    assert!(told(&recorded.stderr), "{}", recorded.stderr);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(told(&inspected), "{inspected}");
    debian.replay(&recording, &[]).expect(0);

    // A guest that leaves its kernel alone is not spoken of.
    let recorded = debian
        .record(&recording, "hello", &["--force"], b"")
        .expect(0);
    assert!(
        !recorded.stderr.contains("left open"),
        "{}",
        recorded.stderr
    );
}

#[test]
#[ignore = "needs a KVM that can record"]
fn another_kernel_that_the_guest_starts_is_told_and_shown_as_left_open() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, initrd) = (dir.path().join("r"), dir.path().join("initrd"));
    let kernel = std::fs::read(debian.kernel()).expect("it reads");
    let mut archives = std::fs::read(debian.image("changed")).expect("the image is built");
    archives.extend(archive_of("kernel", &kernel));
    std::fs::write(&initrd, archives).expect("it can be written");
    let mut command = debian.command(&["record", "-q", "--memory", "512M", "-o", path(&recording)]);
    command.arg("--kernel").arg(debian.kernel());
    command.arg("--initrd").arg(&initrd);
    let recorded = Ran::new(command.output().expect("it runs")).expect(0);
    let what = "another kernel, which runs in place of the one that was loaded";
    assert!(recorded.stderr.contains(what), "{}", recorded.stderr);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(inspected.contains(what), "{inspected}");
}

#[test]
#[ignore = "needs a KVM that can record"]
fn a_module_that_reads_the_time_ten_thousand_times_replays_equal() {
    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, full) = (dir.path().join("r"), dir.path().join("full"));
    let recorded = debian.record(&recording, "module", &[], b"").expect(0);
    let console = recorded.text();
    // Twice: the second stands where the first stood. The stock modules have their say as well.
    for (line, times) in [
        ("tsc: 10 reads before the beginning", 2),
        ("tsc: 11112 reads, 0 went backwards", 2),
        ("tsc: 11113 reads at the end", 2),
        ("tsc: CR4.TSD is 0", 2),
        ("module: /lib/zstd_compress.ko: loaded", 1),
        ("module: ok", 1),
    ] {
        assert_eq!(console.matches(line).count(), times, "{line}:\n{console}");
    }
    for _ in 0..2 {
        let replayed = debian.replay(&recording, &["--verify", "memory"]).expect(0);
        assert!(
            replayed.stdout == recorded.stdout,
            "the console differs:\n{}",
            replayed.text()
        );
    }
    let relog = debian
        .replay(&recording, &["--relog", path(&full), "--json"])
        .expect(0)
        .json();
    let summary = &relog["summary"];
    assert_eq!(summary["modules"], 5, "{summary}");
    assert!(
        summary["module_sites"].as_u64() >= Some(2 * 10 + 1 + 4),
        "{summary}"
    );
    let exits = &summary["exits_by_kind"];
    // Some thousand more are the kernel's own, and those of jitterentropy_rng.
    assert!(
        exits["kernel time reads"].as_u64() >= Some(2 * 11_113),
        "{exits}"
    );
    let listed = debian.inspect(&full, &["--io"]).expect(0).text();
    assert_eq!(listed.matches(" module 0x").count(), 5);
    let inspected = debian.inspect(&recording, &[]).expect(0).text();
    assert!(inspected.contains("1 module loads"), "{inspected}");
    assert!(!inspected.contains("loadable modules"), "{inspected}");
}

//! Guests that must be preempted where they do not exit, on Debian's kernel, recorded and replayed
//! through the command line. These need a branch counter as well as a KVM: `scripts/test` runs them in
//! the box with performance counters.

use std::path::Path;

use hindsight_tests::both_ways;
use hindsight_tests::debian::{Debian, Ran};
use tempfile::TempDir;

#[path = "counted/breakpoints.rs"]
mod many_breakpoints;
#[path = "counted/race.rs"]
mod race;

mod breakpoints;

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a temporary directory can be made")
}

/// Records `image`, which must be preempted to come to its end, and replays it.
fn preempted_and_replayed(image: &str, options: &[&str]) {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let mut all = vec!["--json", "--preempt", "branches"];
    all.extend(options);
    let recorded = debian.record(&recording, image, &all, b"").expect(0);
    let summary = recorded.json();
    let count = |field: &str| summary[field].as_u64().unwrap_or_default();
    assert!(
        summary["ending"]
            .as_str()
            .is_some_and(|end| end.starts_with("reset")),
        "{summary}"
    );
    assert!(count("preemptions") > 50, "{summary}");
    assert!(count("interrupts_at_preemptions") > 25, "{summary}");
    let replayed = debian.replay(&recording, &["--json"]).expect(0).json();
    assert_eq!(replayed["verdict"], "equal", "{replayed}");
    assert_eq!(replayed["summary"]["digest"], summary["digest"]);
    assert_eq!(
        replayed["summary"]["memory_digest"],
        summary["memory_digest"]
    );
    assert_eq!(replayed["summary"]["preemptions"], summary["preemptions"]);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn threads_that_spin_on_each_other_get_on_and_replay_equal() {
    preempted_and_replayed("threads", &[]);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn a_timer_fires_beside_a_tight_loop_and_replays_equal() {
    preempted_and_replayed("timer", &[]);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn a_runtime_that_preempts_its_own_spinning_threads_replays_equal() {
    preempted_and_replayed("golike", &["--chaos=7"]);
}

/// Records `watch`, whose last line says whether all that it did with debug registers was seen.
fn watched_and_replayed(options: &[&str]) -> u64 {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    let all = [&["--patience", "100"], options].concat();
    let recorded = debian.record(&recording, "watch", &all, b"").expect(0);
    let console = recorded.text();
    let counted = console.matches("writes to a word that is counted: 500, 500 counted");
    assert_eq!(counted.count(), 8, "{console}");
    assert!(
        console.contains("instructions stepped: 201, 201 counted"),
        "{console}"
    );
    assert!(console.contains("watch: all were counted"), "{console}");
    let replayed = debian.replay(&recording, &[]).expect(0);
    assert!(replayed.stdout == recorded.stdout, "{}", replayed.text());
    assert!(
        replayed.stderr.contains("replay equal"),
        "{}",
        replayed.stderr
    );
    let inspected = debian.replay(&recording, &["--json"]).expect(0).json();
    inspected["summary"]["preemptions"]
        .as_u64()
        .unwrap_or_default()
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn gdb_and_perf_in_a_guest_preempted_by_branches_lose_no_hit_and_replay_equal() {
    let preemptions = watched_and_replayed(&["--preempt", "branches"]);
    assert!(preemptions > 50, "{preemptions} preemptions");
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn gdb_and_perf_in_a_guest_preempted_at_kernel_entries_lose_no_hit_and_replay_equal() {
    watched_and_replayed(&["--preempt", "entries"]);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn a_relog_has_the_same_preemptions_and_one_moved_by_a_branch_is_refused() {
    use hindsight_replay::{Event, JournalReader, JournalWriter};

    let (debian, dir) = (Debian::from_env(), scratch());
    let (recording, moved) = (dir.path().join("r"), dir.path().join("moved"));
    let options = ["--preempt", "branches", "--patience", "0"];
    debian.record(&recording, "hello", &options, b"").expect(0);
    let relog = dir.path().join("relog");
    let relog_path = relog.to_str().expect("a plain path");
    let options = ["--relog", relog_path, "--detail", "default"];
    debian.replay(&recording, &options).expect(0);
    let journal = |directory: &std::path::Path| {
        std::fs::read(directory.join("journal")).expect("the journal is there")
    };
    assert!(journal(&recording) == journal(&relog), "the relog differs");

    hindsight_tests::debian::copy(&recording, &moved);
    let bytes = journal(&recording);
    let mut reader = JournalReader::open(bytes.as_slice()).expect("it opens");
    let mut changed = Vec::new();
    let mut writer = JournalWriter::create(&mut changed, reader.header()).expect("it is written");
    let mut preemptions = 0;
    while let Some(frame) = reader.next_frame().expect("it reads") {
        for record in frame.records() {
            let mut event = record.event;
            if let Event::Preempted { place, .. } = &mut event {
                preemptions += 1;
                if preemptions == 20 {
                    place.number += 1;
                }
            }
            writer.append(record.exits, event).expect("it is written");
        }
        writer
            .close_frame(frame.place.through, frame.place.now)
            .expect("it is written");
    }
    assert!(preemptions >= 20, "{preemptions} preemptions");
    std::fs::write(moved.join("journal"), changed).expect("it is written");
    let refused = debian.replay(&moved, &[]);
    assert!(matches!(refused.code, 1 | 5), "{}", refused.stderr);
}

/// What gdb prints as it debugs a recording by a script, in pieces that begin with `echo == NAME\n`, by their names.
fn debugged(debian: &Debian, recording: &Path, script: &str) -> (Ran, Vec<(String, String)>) {
    let dir = scratch();
    let file = dir.path().join("script");
    std::fs::write(&file, script).expect("a temporary file is written");
    let (recording, file) = (recording.to_str(), file.to_str());
    let paths = recording.zip(file).expect("plain paths");
    let ran = debian.run(&["debug", paths.0, "--", "-batch", "-x", paths.1]);
    let ran = ran.expect(0);
    let text = ran.text();
    let pieces = text.split("== ").skip(1);
    let named = pieces.map(|piece| {
        let (name, rest) = piece.split_once('\n').unwrap_or((piece, ""));
        (name.to_string(), rest.to_string())
    });
    let named = named.collect();
    (ran, named)
}

fn gdb_goes_back_and_forth(options: &[&str]) {
    let (debian, dir) = (Debian::from_env(), scratch());
    let recording = dir.path().join("r");
    debian.record(&recording, "hello", options, b"").expect(0);
    let script = "\
seek 1200
echo == at exit\\n
info registers
stepi 50
echo == 50 steps on\\n
info registers
x/4i $pc
reverse-stepi 50
echo == 50 steps back\\n
info registers
stepi 50
echo == 50 steps on again\\n
info registers
x/4i $pc
break *$pc
reverse-continue
echo == a hit before\\n
when
continue
echo == back again\\n
info registers
x/4i $pc
when
reverse-stepi
stepi
echo == one back and on\\n
info registers
x/4i $pc
when
delete
continue
echo == the end\\n
when
reverse-stepi
echo == before the end\\n
when
x/i $pc
stepi
echo == and the end\\n
when
seek 0
echo == the beginning\\n
when
reverse-stepi
echo == no further\\n
when
break *0xffffffff00000000
continue
echo == the end again\\n
when
";
    let (ran, pieces) = debugged(&debian, &recording, script);
    let piece = |name: &str| {
        let found = pieces.iter().find(|(piece, _)| piece == name);
        let (_, text) = found.unwrap_or_else(|| panic!("{name}: {}", ran.text()));
        // What gdb says of the next command follows its registers.
        let until = text.find("\nBreakpoint").unwrap_or(text.len());
        text[..until].to_string()
    };
    let registers = |name: &str| {
        let text = piece(name);
        let lines = text.lines().filter(|line| line.contains("0x"));
        let lines = lines.take_while(|line| !line.starts_with("0x"));
        lines.map(String::from).collect::<Vec<_>>()
    };
    let start = registers("at exit");
    assert!(start.len() > 20, "{start:?}");
    assert_eq!(start, registers("50 steps back"));
    assert_ne!(start, registers("50 steps on"));
    assert_eq!(registers("50 steps on"), registers("50 steps on again"));
    assert_eq!(registers("50 steps on"), registers("back again"));
    assert_eq!(registers("50 steps on"), registers("one back and on"));
    // What the target says goes to standard error, in order.
    let lines = ran.stderr.lines();
    let places: Vec<&str> = lines
        .filter(|line| line.contains("of guest time"))
        .collect();
    let [
        at_exit,
        before,
        again,
        on,
        end,
        before_end,
        and_end,
        seek,
        beginning,
        no_further,
        end_again,
    ] = places[..]
    else {
        panic!("{}", ran.stderr)
    };
    assert!(at_exit.starts_with("at exit 1,200,"), "{at_exit}");
    // The guest may never have been there before. Then it is the first hit from the beginning on, too.
    let is_back = before.starts_with("after exit") || before.starts_with("at exit 0,");
    assert!(is_back, "{before}");
    assert_eq!(again, on);
    assert!(end.starts_with("the end, at exit"), "{end}");
    assert_eq!([and_end, end_again], [end; 2]);
    assert!(before_end.starts_with("after exit"), "{before_end}");
    for place in [seek, beginning, no_further] {
        assert!(place.starts_with("at exit 0,"), "{place}");
    }
    // The end is told where the digests of everything were equal.
    assert!(
        ran.stderr.matches("the recording ends here: reset").count() >= 3,
        "{}",
        ran.stderr
    );
    let replayed = debian.replay(&recording, &["--json"]).expect(0).json();
    assert_eq!(replayed["verdict"], "equal", "{replayed}");
    goes_both_ways(&debian, &recording);
}

/// Steps about at random, `HINDSIGHT_STEPS` times, and goes to the writes of a word of the kernel's in both directions.
fn goes_both_ways(debian: &Debian, recording: &Path) {
    let steps = std::env::var("HINDSIGHT_STEPS");
    let steps = steps.map_or(50, |text| text.parse().expect("a number"));
    let kernel = std::fs::read(debian.kernel()).expect("the kernel can be read");
    let kernel = hindsight_kernel::unpack(&kernel).expect("it is a kernel");
    let symbols = hindsight_kernel::Symbols::find(&kernel.elf).expect("it has symbols");
    let jiffies = symbols.lookup("jiffies_64").expect("it counts them");
    let mut debugger = both_ways::open(recording, 1200);
    both_ways::walk(&mut debugger, 1200, steps, 1);
    both_ways::watch(&mut debugger, 1200, jiffies, 3);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn gdb_steps_back_to_where_it_was_and_the_replay_is_equal_to_its_end() {
    gdb_goes_back_and_forth(&["--preempt", "entries"]);
}

#[test]
#[ignore = "needs a KVM that can record and a branch counter"]
fn gdb_steps_back_among_places_between_exits_and_the_replay_is_equal_to_its_end() {
    gdb_goes_back_and_forth(&["--preempt", "branches", "--patience", "0"]);
}

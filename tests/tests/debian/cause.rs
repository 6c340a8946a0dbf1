//! The way from a crash to its cause that `docs/time-travel.md` shows, command by command.

use super::*;

/// The commands of that section, without what is said of them: of the program, and of gdb.
fn commands() -> Vec<String> {
    let text = include_str!("../../../docs/time-travel.md");
    let (_, section) = text
        .split_once("## From a crash to its cause")
        .expect("it is there");
    let (section, _) = section.split_once("\n## ").expect("more follows");
    let lines = section.lines().filter_map(|line| line.strip_prefix("    "));
    let commands = lines.map(|line| line.split(" # ").next().unwrap_or(line).trim().to_string());
    commands.collect()
}

/// Goes that way in a recording of `race` that crashed.
pub fn is_found(debian: &Debian, recording: &Path, dir: &Path) {
    let commands = commands();
    assert_eq!(commands.len(), 12 + 5, "{commands:?}");
    let script: Vec<&str> = commands
        .iter()
        .filter_map(|command| command.strip_prefix("(gdb) "))
        .collect();
    let lost = script.iter().position(|line| line.contains("mark lost"));
    let (first, then) = script.split_at(lost.expect("it is there") + 1);
    let write = |name: &str, script: &[&str], before: &str, after: &str| {
        let file = dir.join(name);
        let text = format!("{before}\n{}\n{after}\n", script.join("\n"));
        std::fs::write(&file, text).expect("there is room");
        file
    };
    let first = write("first", first, "", "echo == seen\\n");
    let then = write("then", then, "echo == then\\n", "backtrace");
    for command in commands
        .iter()
        .filter_map(|command| command.strip_prefix("hindsight "))
    {
        let command = command.split(" | ").next().unwrap_or(command);
        let words = command.split_whitespace();
        let mut words: Vec<&str> = words
            .enumerate()
            .map(|(number, word)| match number {
                1 if word == "crash" => path(recording),
                _ => word,
            })
            .collect();
        if words[0] == "fork" {
            some_futures_crash_and_some_do_not(debian, &words);
            continue;
        }
        if words[0] == "debug" {
            words.extend(["--", "-batch", "-x", path(&first)]);
            // Each by itself: once its account is written, the compiler has no more use for a balance.
            words.extend(["-ex", "print from_balance == bank->balance[from]"]);
            words.extend(["-ex", "print to_balance == bank->balance[to]"]);
            words.extend(["-x", path(&then)]);
        }
        let ran = debian.run(&words).expect(0);
        let text = ran.text();
        match words[0] {
            "console" => assert!(text.contains("race: the books do not balance"), "{text}"),
            "ps" => assert!(text.lines().any(|line| line.contains("/init")), "{text}"),
            "debug" => is_seen(&ran),
            _ => {}
        }
    }
    let marks = debian.run(&["marks", path(recording)]).expect(0).text();
    assert!(marks.contains("lost") && marks.contains("opens"), "{marks}");
}

/// Before anything is wrong, chance decides: for all eight alike in some of the recordings. Then there are eight more.
fn some_futures_crash_and_some_do_not(debian: &Debian, fork: &[&str]) {
    let mut told = Vec::new();
    for first in ["1", "9", "17"] {
        let more = ["--seed", first, "--panic-grace", "0", "--json"];
        let futures = debian.run(&[fork, &more].concat()).expect(0).json();
        let futures = futures["futures"].as_array().expect("a list").clone();
        assert_eq!(futures.len(), 8);
        let crashed = futures.iter().filter(|future| future["panicked"] == true);
        let crashed = crashed.count();
        println!("from where the bank opens {crashed} of 8 futures crashed");
        if (1..8).contains(&crashed) {
            return;
        }
        told.extend(futures);
    }
    panic!("all ended alike: {told:?}");
}

/// What gdb has shown.
fn is_seen(ran: &Ran) {
    let text = ran.text();
    assert!(
        text.contains("Breakpoint 1, audit (bank="),
        "{text}\n{}",
        ran.stderr
    );
    let (way, seen) = text.split_once("== seen").expect("it came so far");
    let (seen, then) = seen.split_once("== then").expect("it came so far");
    let last = way.rsplit("#0").next().unwrap_or_default();
    assert!(last.contains("transfer (bank="), "{text}");
    let line = last.contains("race.c:64") || last.contains("race.c:65");
    assert!(line && last.contains("serve (bank="), "{text}");
    assert!(then.contains("Temporary breakpoint 4, main ("), "{text}");
    let untested = ran.stderr.contains("Error in testing");
    assert!(seen.contains(" = 0") && !untested, "{text}\n{}", ran.stderr);
}

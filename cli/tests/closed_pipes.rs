//! What the program does where nobody reads what it prints, or where that cannot be written.

use std::process::{Command, Stdio};

/// Commands that print to either output, on any host, and the exit codes that they may end with.
const COMMANDS: [(&[&str], &[i32]); 5] = [
    (&["doctor"], &[0, 4]),
    (&["doctor", "--json"], &[0, 4]),
    (&["man"], &[0]),
    (&["completions", "bash"], &[0]),
    (&["inspect", "no-such-recording"], &[2]),
];

/// A pipe that nobody reads from.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("pipes can be made");
    drop(reader);
    writer.into()
}

fn exit_code(arguments: &[&str], stdout: Stdio, stderr: Stdio) -> i32 {
    Command::new(env!("CARGO_BIN_EXE_hindsight"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout)
        .stderr(stderr)
        .status()
        .expect("hindsight starts")
        .code()
        .expect("hindsight is not killed")
}

#[test]
fn a_reader_that_has_gone_changes_nothing() {
    for (arguments, expected) in COMMANDS {
        let code = exit_code(arguments, closed_pipe(), closed_pipe());
        assert!(expected.contains(&code), "{arguments:?} ended with {code}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    for (arguments, _) in &COMMANDS[..4] {
        let full = std::fs::File::create("/dev/full").expect("/dev/full can be opened");
        let code = exit_code(arguments, full.into(), Stdio::null());
        assert_eq!(code, 5, "{arguments:?}");
    }
}

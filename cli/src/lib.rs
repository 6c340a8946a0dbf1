//! The program: commands, output, exit codes. One file per command.
#![warn(unreachable_pub)]

mod children;
pub mod commands;
mod format;
mod gdb;
mod options;
mod outcome;
mod output;
mod screen;
mod stretches;
mod summary;
mod tasks;
mod tell;
pub mod transcript;
mod watching;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;

use commands::{
    bench, console, debug, diff, disk, dmesg, doctor, fork, index, inspect, live, maps, mark,
    marks, pcap, ps, record, replay, run, verify,
};
use outcome::{EXIT_CODES, Outcome};
use tell::{out, tell};

/// Records a whole Linux machine under stock KVM, and replays it bit for bit.
#[derive(Debug, Parser)]
#[command(name = "hindsight", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a machine without recording it.
    Run(run::Options),
    /// Boot a machine and record everything it could not have computed for itself.
    Record(record::Options),
    /// Run a recorded machine again, and check every step against the recording.
    Replay(replay::Options),
    /// Make any moment of a recording quick to reach.
    Index(index::Options),
    /// Give a moment of a recording a name.
    Mark(mark::Options),
    /// List the moments of a recording that have names.
    Marks(marks::Options),
    /// Check a recording in stretches, side by side.
    Verify(verify::Options),
    /// Go on from a moment of a recording as a running machine.
    Live(live::Options),
    /// Live several futures of one moment of a recording, each with its own chaos.
    Fork(fork::Options),
    /// Tell what a recording is and what is in it.
    Inspect(inspect::Options),
    /// Print what the guest wrote to its console, with times; or make an asciicast of it.
    Console(console::Options),
    /// Write the frames that a machine sent and received as a pcapng, for Wireshark and the like.
    Pcap(pcap::Options),
    /// Write a machine's disk as it was at some moment, or list what the guest had changed on it.
    Disk(disk::Options),
    /// Show the processes that a machine had at some moment.
    Ps(ps::Options),
    /// Show what a process had mapped at some moment.
    Maps(maps::Options),
    /// Show what the kernel had said by some moment.
    Dmesg(dmesg::Options),
    /// Drive a replay with gdb, forwards and backwards.
    Debug(debug::Options),
    /// Show the first difference between two recordings, and what led up to it.
    Diff(diff::Options),
    /// Probe this host's KVM with tiny guests: can it record, and what would be left open?
    Doctor(doctor::Options),
    /// Measure what recording and replaying cost, as ratios in one run.
    Bench(bench::Options),
    /// Print a completion script for a shell.
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff).
    Man,
}

/// Parses the arguments and does what they say.
pub fn main() -> ExitCode {
    let command = Cli::from_arg_matches(&cli().get_matches());
    let command = command.unwrap_or_else(|error| error.exit()).command;
    let is_doctor = matches!(command, Command::Doctor(_));
    let result = match command {
        Command::Run(options) => run::main(&options),
        Command::Record(options) => record::main(&options),
        Command::Replay(options) => replay::main(&options),
        Command::Index(options) => index::main(&options),
        Command::Mark(options) => mark::main(&options),
        Command::Marks(options) => marks::main(&options),
        Command::Verify(options) => verify::main(&options),
        Command::Live(options) => live::main(&options),
        Command::Fork(options) => fork::main(&options),
        Command::Inspect(options) => inspect::main(&options),
        Command::Console(options) => console::main(&options),
        Command::Pcap(options) => pcap::main(&options),
        Command::Disk(options) => disk::main(&options),
        Command::Ps(options) => ps::main(&options),
        Command::Maps(options) => maps::main(&options),
        Command::Dmesg(options) => dmesg::main(&options),
        Command::Debug(options) => debug::main(&options),
        Command::Diff(options) => diff::main(&options),
        Command::Doctor(options) => doctor::main(&options),
        Command::Bench(options) => bench::main(&options),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut cli(), "hindsight", &mut script);
            out!("{}", String::from_utf8_lossy(&script).trim_end());
            Ok(Outcome::Good)
        }
        Command::Man => print_manual(),
    };
    match result {
        Ok(outcome) => ExitCode::from(outcome as u8),
        Err(error) => {
            let (outcome, mut text) = (Outcome::from(error.kind()), error.to_string());
            if outcome == Outcome::Unfit && !is_doctor && !text.contains("hindsight doctor") {
                text.push_str("; `hindsight doctor` tells more");
            }
            tell!("hindsight: {}", shown_lines(text));
            ExitCode::from(outcome as u8)
        }
    }
}

/// The commands, whose help is as wide as the terminal.
fn cli() -> clap::Command {
    Cli::command().mut_subcommands(|sub| match sub.get_after_help() {
        Some(text) => {
            let text = unwrapped(&text.to_string());
            sub.after_help(text)
        }
        None => sub,
    })
}

/// A text without the ends of lines that are in its paragraphs. A line that is indented stands by itself.
fn unwrapped(text: &str) -> String {
    let mut unwrapped = String::new();
    for line in text.lines() {
        let before = unwrapped.lines().next_back().unwrap_or_default();
        let goes_on = |line: &str| !line.is_empty() && !line.starts_with(' ');
        if goes_on(line) && goes_on(before) && !unwrapped.ends_with('\n') {
            unwrapped.push(' ');
        } else if !unwrapped.is_empty() {
            unwrapped.push('\n');
        }
        unwrapped.push_str(line);
    }
    unwrapped
}

/// The main page, and each command's after it.
fn print_manual() -> Result<Outcome, Failure> {
    let mut command = cli();
    command.build();
    let mut pages = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut pages)?;
    for sub in command
        .get_subcommands()
        .filter(|sub| sub.get_name() != "help")
    {
        let name: &'static str = format!("hindsight-{}", sub.get_name()).leak();
        clap_mangen::Man::new(sub.clone().name(name)).render(&mut pages)?;
    }
    out!("{}", String::from_utf8_lossy(&pages).trim_end());
    Ok(Outcome::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_of_help_have_no_ends_of_lines_and_examples_keep_theirs() {
        let text = "One\nparagraph.\n\nAnother\none.\n\nExamples:\n  a\n  b\n\nThe\nend";
        let expected = "One paragraph.\n\nAnother one.\n\nExamples:\n  a\n  b\n\nThe end";
        assert_eq!(unwrapped(text), expected);
    }
}

//! `hindsight marks`: lists the marks of a recording.

use std::path::PathBuf;

use clap::Args;
use comfy_table::{CellAlignment, Table, presets};
use hindsight_replay::foreign::shown_lines;
use hindsight_vmm::failure::Failure;
use hindsight_vmm::session::{Marks, Recording};
use serde_json::json;

use crate::format::{seconds, thousands};
use crate::outcome::Outcome;
use crate::tell::{out, tell};

/// Options of `marks`.
#[derive(Debug, Args)]
#[command(after_help = "\
A mark's name is a moment wherever a command takes one: `replay DIR --from NAME`, `live DIR --at NAME-1`; or
`mark:NAME`, where the name alone is something else. `hindsight mark --help` tells how marks are made.")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// Print JSON: an array of marks, by exit.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    // What is no recording has no marks either, and should not seem to be one without.
    recording.journal()?;
    let marks = Marks::read(&recording)?;
    if options.json {
        out!("{}", json!(marks.list()));
    } else if !marks.list().is_empty() {
        out!("{}", table(&marks));
    }
    tell_complaints(&marks);
    Ok(Outcome::Good)
}

/// The marks as a person reads them.
fn table(marks: &Marks) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["mark", "exit", "guest time", "made"]);
    for mark in marks.list() {
        table.add_row([
            mark.name.clone(),
            thousands(mark.exit),
            seconds(mark.guest_ns),
            mark.by.words().into(),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Says what of the file was skipped.
pub(crate) fn tell_complaints(marks: &Marks) {
    for complaint in marks.complaints() {
        tell!("hindsight: {}", shown_lines(complaint));
    }
}

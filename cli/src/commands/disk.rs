//! `hindsight disk`: a machine's disk as it was at some moment, and what the guest had changed on it.

use std::io::{BufWriter, IsTerminal};
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use hindsight_replay::{Machine, When};
use serde_json::json;

use crate::format::{bytes, seconds, thousands};
use crate::outcome::Outcome;
use crate::output::Output;
use crate::screen::{Screen, Terminal, progress_bar};
use crate::tell::tell;
use hindsight_replay::foreign::{shown, shown_lines, shown_path};
use hindsight_vmm::disk::{
    BLOCK_BYTES, Change, ExportError, Files, Range, SharedDisks, changed_files, export,
    written_ranges,
};
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::output_file::{OutputError, Plan};
use hindsight_vmm::session::{
    RecordedPaths, Recording, Until, Verdict, Viewed, Watch, until_moment,
};

/// Options of `disk`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("wanted").args(["output", "changed"]).required(true).multiple(true)))]
#[command(after_help = "\
The recording is replayed, and checked as it runs, up to the moment. What the guest had not yet
written to its disk, and had in its memory alone, is not there.

With --changed, each ext2, ext3 or ext4 file system, in use or not, on the whole disk or on its partitions
(MBR or GPT), is compared with the one on the image, file by file: kind, size, mode, owner, time and
content; not extended attributes.

Examples:
  hindsight disk boot -o vda.img
  hindsight disk boot --disk 1 --at 12.5s --changed")]
pub(crate) struct Options {
    /// The recording.
    recording: PathBuf,
    /// Which disk: 0 is vda, 1 is vdb, ...
    #[arg(long, value_name = "N", default_value_t = 0)]
    disk: usize,
    /// The moment: an exit number, a guest time such as 12.5s, `crash`, `console:TEXT`, or a mark; without
    /// it, the end.
    #[arg(long, value_name = "MOMENT")]
    at: Option<When>,
    /// Write the disk to IMG, a raw image with holes.
    ///
    /// The image is there when it is complete: not if the replay is refused or diverges. Nothing is
    /// written through a link, nor to a file of the recording or to an image of one of its disks.
    #[arg(long, short, value_name = "IMG")]
    output: Option<PathBuf>,
    /// With -o: replace a file that is there.
    #[arg(long, requires = "output")]
    force: bool,
    /// List what the guest has written: blocks, and files.
    #[arg(long)]
    changed: bool,
    /// Take the image of a disk from here instead of from where it was; it must be the same.
    ///
    /// Once for each disk, in their order.
    #[arg(long = "image", value_name = "FILE")]
    images: Vec<PathBuf>,
    /// Print JSON: one object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    let header = journal.header().clone();
    let count = header.machine.images.len();
    if options.disk >= count {
        let message = match count {
            0 => "the recorded machine has no disks".into(),
            _ => format!(
                "there is no disk {}: the last one of the recorded machine is {}",
                options.disk,
                count - 1
            ),
        };
        return Err(Failure::new(Kind::BadInput, message));
    }
    let plan = options.output.as_ref().map(|output| {
        let mut kept = recording.kept();
        for image in &options.images {
            kept.keep(image, "the image of a disk of this recording");
        }
        let plan = Plan::new(output, options.force, kept)?;
        if !plan.is_file() {
            let message = format!(
                "{} is no file; an image has holes, so give the name of a file",
                output.display()
            );
            return Err(Failure::new(Kind::BadInput, message));
        }
        Ok(plan)
    });
    let plan = plan.transpose()?;
    let instead = RecordedPaths {
        disks: options.images.clone(),
        ..RecordedPaths::default()
    };
    let until = match &options.at {
        None => Until::End,
        Some(when) => until_moment(&recording, &instead, when)?,
    };
    let watch = Watch::open(recording, journal, &instead)?;
    let mut disks = SharedDisks::new(watch.images().fresh_disks()?);
    let terminal = Terminal {
        quiet: true,
        real_time: false,
    };
    let viewed = Viewed {
        console: header.host.console,
        preemption: None,
        hold: None,
        last_exit: watch.last_exit(until),
    };
    let begin = || Screen::new(terminal, viewed);
    let (watched, screen) = watch.run(&mut disks, until, begin)?;
    drop(screen);
    let outcome = match watched.verdict {
        Verdict::Equal(_) => {
            if options.at.is_some() {
                tell!("hindsight: the recording ends before that moment; this is its end");
            }
            Outcome::Good
        }
        Verdict::Reached => Outcome::Good,
        Verdict::CutShort(tail) => {
            tell!("hindsight: {}", shown_lines(tail));
            Outcome::CutShort
        }
        Verdict::Diverged(divergence) => {
            let message = format!("{divergence}\nso what was on the disk is not known");
            return Err(Failure::new(Kind::Different, message));
        }
    };
    report(options, plan, &disks, &watched.machine)?;
    Ok(outcome)
}

/// Writes the image and lists the changes, whichever is wanted.
fn report(
    options: &Options,
    plan: Option<Plan>,
    disks: &SharedDisks,
    machine: &Machine,
) -> Result<(), Failure> {
    let disk = options.disk;
    let length = disks.look().bytes(disk).unwrap_or(0);
    let ranges = written_ranges(&disks.look(), disk);
    let written: u64 = ranges.iter().map(|range| range.bytes).sum();
    let kept = plan.map(|plan| write_image(disks, disk, length, plan));
    let kept = kept.transpose()?;
    let files = options.changed.then(|| changed_files(disks, disk));
    let mut out = Output::new(BufWriter::new(std::io::stdout()));
    if options.json {
        let mut value = json!({
            "disk": disk,
            "exits": machine.at().exits,
            "guest_ns": machine.now(),
            "bytes": length,
            "written_bytes": written,
        });
        if let (Some(output), Some(kept)) = (&options.output, kept) {
            value["image"] = json!({"path": output.to_string_lossy(), "data_bytes": kept});
        }
        if let Some(files) = &files {
            value["ranges"] = json!(ranges);
            value["files"] = json!(files);
        }
        out.write(format!("{value}\n").as_bytes());
        return out.finish();
    }
    let headline = format!(
        "disk {disk} at exit {}, {}: {} of {} written by the guest",
        thousands(machine.at().exits),
        seconds(machine.now()),
        bytes(written),
        bytes(length)
    );
    match &files {
        None => tell!("{headline}"),
        Some(files) => {
            out.write(format!("{headline}\n").as_bytes());
            list(&mut out, disk, &ranges, files);
        }
    }
    if let (Some(output), Some(kept)) = (&options.output, kept) {
        let output = shown_path(output);
        tell!("written to {output}, {} and holes", bytes(kept));
    }
    out.finish()
}

/// Lists blocks and files for a person.
fn list(out: &mut Output<impl std::io::Write>, disk: usize, ranges: &[Range], files: &Files) {
    for range in ranges {
        let first = range.offset / BLOCK_BYTES;
        let last = (range.offset + range.bytes - 1) / BLOCK_BYTES;
        let line = format!("blocks {first:>10} to {last:>10}  {}\n", bytes(range.bytes));
        out.write(line.as_bytes());
    }
    for why in &files.unknown {
        out.write(format!("files     not compared: {}\n", shown(why)).as_bytes());
    }
    let Some(changes) = &files.changed else {
        return;
    };
    if changes.is_empty() {
        out.write(b"files     none has changed\n");
    }
    for file in changes {
        let word = match file.change {
            Change::Added => "added",
            Change::Removed => "removed",
            Change::Modified => "modified",
        };
        let what = match &file.what[..] {
            [] => String::new(),
            what => format!("  ({})", what.join(", ")),
        };
        let place = match file.partition {
            None => String::new(),
            Some(number) => format!("{}{number}:", disk_name(disk)),
        };
        out.write(format!("{word:<9} {place}{}{what}\n", shown(&file.path)).as_bytes());
    }
}

/// What Linux calls it.
fn disk_name(disk: usize) -> String {
    let letter = u8::try_from(disk).map_or('?', |disk| char::from(b'a'.saturating_add(disk)));
    format!("vd{letter}")
}

fn write_image(disks: &SharedDisks, disk: usize, length: u64, plan: Plan) -> Result<u64, Failure> {
    let output = plan.begin()?;
    let file = output.file().expect("it was planned as a file");
    let bar = std::io::stderr()
        .is_terminal()
        .then(|| progress_bar(length, "{bar:40} {bytes}/{total_bytes}, {eta} left"));
    let progress = |done| {
        if let Some(bar) = &bar {
            bar.set_position(done);
        }
    };
    let result = export(&disks.look(), disk, file, progress);
    if let Some(bar) = &bar {
        bar.finish_and_clear();
    }
    let kept = result.map_err(|error| match error {
        ExportError::Write(source) => {
            let path = output.path().into();
            Failure::from(OutputError::Write { path, source })
        }
        ExportError::Disk(error) => Failure::new(Kind::HostFailed, error),
    })?;
    output.finish()?;
    Ok(kept)
}

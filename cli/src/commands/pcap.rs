//! `hindsight pcap`: what went over the machine's network, and when.

use std::borrow::Cow;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hindsight_devices::{Input, Nanos, Output};
use hindsight_replay::Observer;
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness, PcapError};

use serde_json::json;

use crate::outcome::Outcome;
use crate::output::settle;
use crate::tell::{out, tell};
use crate::watching::watch;
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::output_file::Plan;
use hindsight_vmm::session::Recording;

/// Options of `pcap`.
#[derive(Debug, Args)]
#[command(after_help = "\
The recording is replayed, and checked as it runs. Times are the guest's: its wall clock when
it was switched on, and the nanoseconds since. A frame that the guest receives is inbound, one
that it sends outbound; what was lost before it reached the guest is not there.

Examples:
  hindsight pcap boot -o boot.pcapng
  hindsight pcap boot | tshark -r - -Y http.request")]
pub struct Options {
    /// The recording.
    recording: PathBuf,
    /// Write to FILE instead of standard output (-).
    ///
    /// The file is there when it is complete: not if the replay is refused or diverges. A pipe or a
    /// device such as /dev/null is written as the replay goes. Nothing is written through a link to
    /// a file, nor to a file of the recording.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// With -o: replace FILE if it exists.
    #[arg(long, requires = "output")]
    force: bool,
    /// With -o: print what was written as JSON, one object.
    #[arg(long, requires = "output")]
    json: bool,
}

/// What the interface is called, as in the guest.
const INTERFACE: &str = "eth0";
/// if_tsresol: times are in units of 10^-9 seconds.
const NANOSECONDS: u8 = 9;
/// The longest frame, so that nothing is cut off.
const SNAP_BYTES: u32 = hindsight_devices::FRAME_BYTES_MAX as u32;

pub fn main(options: &Options) -> Result<Outcome, Failure> {
    let recording = Recording::at(&options.recording);
    let journal = recording.journal()?;
    let path = options.output.as_deref().unwrap_or(Path::new("-"));
    let plan = Plan::new(path, options.force, recording.kept())?;
    if plan.is_terminal() {
        let message = "a pcapng is nothing for a terminal; name a file with -o";
        return Err(Failure::new(Kind::BadInput, message));
    }
    if options.json && plan.is_stdout() {
        let message =
            "--json goes to standard output, and so would the frames; name a file with -o";
        return Err(Failure::new(Kind::BadInput, message));
    }
    if journal.header().machine.devices.net.is_none() {
        tell!("hindsight: the recorded machine has no network card, so there are no frames");
    }
    let name = format!("recorded by Hindsight in {}", options.recording.display());
    let begin = || Ok(Capture::new(plan.begin()?, &name));
    watch(recording, journal, begin, |capture, right| {
        let frames = capture.frames;
        let Some(output) = capture.finish()? else {
            return Ok(());
        };
        settle(output, right)?;
        if let Some(path) = options.output.as_ref().filter(|_| options.json && right) {
            let [inbound, outbound] =
                frames.map(|Frames { count, bytes }| json!({"frames": count, "bytes": bytes}));
            let output = path.to_string_lossy();
            out!(
                "{}",
                json!({"output": output, "inbound": inbound, "outbound": outbound})
            );
        }
        Ok(())
    })
}

/// Which way a frame goes (the lowest two bits of epb_flags).
#[derive(Clone, Copy, Debug)]
enum Direction {
    Inbound = 1,
    Outbound = 2,
}

/// How much went one way.
#[derive(Clone, Copy, Debug, Default)]
struct Frames {
    count: u64,
    bytes: u64,
}

/// Writes down what goes over the network.
pub struct Capture<W: Write> {
    /// The file, or why it cannot be written any more.
    writer: Result<PcapNgWriter<BufWriter<W>>, PcapError>,
    /// The guest's wall clock when it was switched on.
    power_on: Duration,
    /// What went in, and what went out.
    frames: [Frames; 2],
}

impl<W: Write> std::fmt::Debug for Capture<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("failed", &self.writer.is_err())
            .field("power_on", &self.power_on)
            .field("frames", &self.frames)
            .finish()
    }
}

impl<W: Write> Capture<W> {
    /// A capture that goes to `to`, with a comment in its head.
    pub fn new(to: W, comment: &str) -> Capture<W> {
        let section = SectionHeaderBlock {
            endianness: Endianness::Little,
            options: vec![
                SectionHeaderOption::Comment(Cow::Owned(comment.into())),
                SectionHeaderOption::UserApplication(Cow::Borrowed(concat!(
                    "hindsight ",
                    env!("CARGO_PKG_VERSION")
                ))),
            ],
            ..SectionHeaderBlock::default()
        };
        let interface = InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: SNAP_BYTES,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(INTERFACE)),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        };
        let writer = PcapNgWriter::with_section_header(BufWriter::new(to), section);
        let writer = writer.and_then(|mut writer| {
            writer.write_pcapng_block(interface)?;
            Ok(writer)
        });
        Capture {
            writer,
            power_on: Duration::ZERO,
            frames: Default::default(),
        }
    }

    fn frame(&mut self, now: Nanos, direction: Direction, frame: &[u8]) {
        let Ok(writer) = &mut self.writer else { return };
        let way = &mut self.frames[direction as usize - 1];
        way.count += 1;
        way.bytes += frame.len() as u64;
        let packet = EnhancedPacketBlock {
            interface_id: 0,
            timestamp: self.power_on.saturating_add(Duration::from_nanos(now)),
            original_len: frame.len() as u32,
            data: Cow::Borrowed(frame),
            options: vec![EnhancedPacketOption::Flags(direction as u32)],
        };
        if let Err(error) = writer.write_pcapng_block(packet) {
            self.writer = Err(error);
        }
    }

    /// Where all of it went. A reader that closed the pipe wants no more (`None`); anything else is an
    /// error.
    pub fn finish(self) -> Result<Option<W>, Failure> {
        let written = self.writer.and_then(|writer| {
            let output = writer.into_inner().into_inner();
            output.map_err(|error| PcapError::IoError(error.into_error()))
        });
        match written {
            Ok(output) => Ok(Some(output)),
            Err(PcapError::IoError(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                Ok(None)
            }
            Err(error) => Err(Failure::new(
                Kind::HostFailed,
                format!("cannot write the frames: {error}"),
            )),
        }
    }
}

impl<W: Write> Observer for Capture<W> {
    fn output(&mut self, _exits: u64, now: Nanos, output: &Output) {
        if let Output::Frame(frame) = output {
            self.frame(now, Direction::Outbound, frame);
        }
    }

    fn input(&mut self, _exits: u64, now: Nanos, input: &Input) {
        match input {
            Input::WallClock { unix_seconds } => {
                self.power_on = Duration::from_secs(*unix_seconds);
            }
            Input::Frame(frame) => self.frame(now, Direction::Inbound, frame),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pcap_file::pcapng::{Block, PcapNgReader};

    /// Two frames, one each way, each at its time.
    fn capture() -> Vec<u8> {
        let mut capture = Capture::new(Vec::new(), "recorded by somebody");
        let unix_seconds = 1_700_000_000;
        capture.input(1, 0, &Input::WallClock { unix_seconds });
        capture.input(5, 1_000_000_001, &Input::Frame(vec![1; 61]));
        capture.output(6, 1_000_000_002, &Output::Console(vec![3; 64]));
        capture.output(6, 1_000_000_002, &Output::Frame(vec![2; 1514]));
        let written = capture.finish().expect("a vector takes anything");
        written.expect("somebody reads it")
    }

    #[test]
    fn both_directions_are_written_with_guest_time() {
        let bytes = capture();
        let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
        let mut frames = Vec::new();
        while let Some(block) = reader.next_block() {
            match block.unwrap() {
                Block::InterfaceDescription(interface) => {
                    let options = interface.options;
                    assert!(options.contains(&InterfaceDescriptionOption::IfTsResol(9)));
                    assert!(options.contains(&InterfaceDescriptionOption::IfName("eth0".into())));
                }
                Block::EnhancedPacket(packet) => {
                    assert_eq!(packet.original_len as usize, packet.data.len());
                    let [EnhancedPacketOption::Flags(flags)] = packet.options[..] else {
                        panic!("{packet:?}")
                    };
                    frames.push((packet.timestamp.as_nanos(), flags, packet.data.into_owned()));
                }
                other => panic!("{other:?}"),
            }
        }
        let expected = [
            (1_700_000_001_000_000_001, 1, vec![1; 61]),
            (1_700_000_001_000_000_002, 2, vec![2; 1514]),
        ];
        assert_eq!(frames, expected);
        let comment = reader.section().options.iter().any(|option| {
            matches!(option, SectionHeaderOption::Comment(text) if text == "recorded by somebody")
        });
        assert!(comment);
    }

    /// Only where there is a tshark.
    #[test]
    fn tshark_opens_what_was_written() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&capture()).unwrap();
        let fields = [
            "frame.time_epoch",
            "frame.len",
            "frame.interface_name",
            "frame.packet_flags_direction",
        ];
        let mut tshark = std::process::Command::new("tshark");
        tshark.arg("-r").arg(file.path()).args(["-T", "fields"]);
        tshark.args(fields.iter().flat_map(|field| ["-e", field]));
        let Ok(output) = tshark.output() else { return };
        let text = String::from_utf8_lossy(&output.stdout);
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| line.split('\t').collect())
            .collect();
        let expected = [
            ["1700000001.000000001", "61", "eth0", "0x00000001"],
            ["1700000001.000000002", "1514", "eth0", "0x00000002"],
        ];
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        assert_eq!(lines, expected, "{stderr}");
    }
}

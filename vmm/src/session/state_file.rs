//! The state of a machine in a file: written where a replay stops, read where one goes on.
//!
//! It is the bytes of a [`MachineState`], compressed by zstd. It may come from anybody: what it unpacks to is bounded by
//! the machine that it is said to be of, and whether it is that machine's is looked at as it is restored.

use std::io::{BufWriter, Read, Write};
use std::path::Path;

use hindsight_replay::{Header, MachineState, StateOf};

use crate::disk::Disks;
use crate::failure::{Failure, Kind};
use crate::kvm::KvmCpu;
use crate::output_file::OutputFile;
use crate::regular_file::{self, Links};
use hindsight_replay::foreign::shown_path;

/// A machine on KVM with disks of files.
pub(super) type State = StateOf<KvmCpu, Disks>;

/// zstd's fastest level but one: a state is hundreds of megabytes, of which most is written once and read once.
const LEVEL: i32 = 1;
/// Room for what is neither memory nor disks.
const REST_BYTES_MAX: u64 = 64 << 20;

/// Writes `state`. Returns how many bytes the file has.
pub(super) fn write(state: &State, output: &mut OutputFile) -> Result<u64, Failure> {
    let failed = |source: std::io::Error| {
        Failure::new(
            Kind::HostFailed,
            format!("cannot write the state: {source}"),
        )
    };
    let mut counted = Counted {
        to: BufWriter::new(output),
        bytes: 0,
    };
    let bytes = state.to_bytes();
    zstd::stream::copy_encode(&bytes[..], &mut counted, LEVEL).map_err(failed)?;
    counted.flush().map_err(failed)?;
    Ok(counted.bytes)
}

struct Counted<W> {
    to: W,
    bytes: u64,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = self.to.write(bytes)?;
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.to.flush()
    }
}

/// Reads the state at `path` of the machine that `header` describes.
pub(super) fn read(path: &Path, header: &Header) -> Result<State, Failure> {
    let refused =
        |what: String| Failure::new(Kind::BadInput, format!("{}: {what}", shown_path(path)));
    let (file, _) = regular_file::open(path, Links::Follow)?;
    let disks = header.machine.images.iter().map(|image| image.bytes);
    let disks = disks.fold(0, u64::saturating_add);
    let memory = header.machine.memory_bytes + header.machine.memory_bytes / 64;
    let most = disks.saturating_add(memory + REST_BYTES_MAX);
    let no_state = |error| refused(format!("this is no state of a machine: {error}"));
    let reader = zstd::stream::read::Decoder::new(file).map_err(no_state)?;
    let mut bytes = Vec::new();
    let read = reader.take(most.saturating_add(1)).read_to_end(&mut bytes);
    let read = read.map_err(no_state)? as u64;
    if read > most {
        return Err(refused(format!(
            "this unpacks to more than {most} bytes, which is all that a state of the recorded machine can have"
        )));
    }
    MachineState::from_bytes(&bytes).map_err(|error| refused(error.to_string()))
}

//! Text that goes somewhere while a machine runs, which does not stop for it.

use std::io::{Error, ErrorKind, Write};

use crate::tell::tell;
use hindsight_replay::foreign::shown_path;
use hindsight_vmm::failure::{Failure, Kind};
use hindsight_vmm::output_file::OutputFile;

/// Where text goes. What goes wrong is reported at the end.
#[derive(Debug)]
pub(crate) struct Output<W: Write> {
    to: W,
    failed: Option<Error>,
}

impl<W: Write> Output<W> {
    /// Writes to `to`.
    pub(crate) fn new(to: W) -> Output<W> {
        Output { to, failed: None }
    }

    /// Whether nobody will see what is written from now on.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Writes `bytes`, unless something has gone wrong before.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.to.write_all(bytes).err();
        }
    }

    /// A reader that closed the pipe wants no more; anything else is an error.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        self.into_inner().map(drop)
    }

    /// Where it went, if all of it did; `None` if nobody reads it any more.
    pub(crate) fn into_inner(mut self) -> Result<Option<W>, Failure> {
        let failed = self.failed.take().or_else(|| self.to.flush().err());
        match failed {
            Some(error) if error.kind() == ErrorKind::BrokenPipe => Ok(None),
            Some(error) => Err(Failure::new(
                Kind::HostFailed,
                format!("cannot write the output: {error}"),
            )),
            None => Ok(Some(self.to)),
        }
    }
}

/// Puts an output in its place if it is `right`, or says that it has not taken it, for what was seen is not
/// what was recorded.
pub(crate) fn settle(output: OutputFile, right: bool) -> Result<(), Failure> {
    if right {
        output.finish()?;
    } else if output.is_withheld() {
        tell!(
            "hindsight: {} was not written, for this is not what was recorded:",
            shown_path(output.path())
        );
    }
    Ok(())
}

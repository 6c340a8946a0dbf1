//! Text that goes somewhere while a machine runs, which does not stop for it.

use std::io::{Error, ErrorKind, Write};

/// Where text goes. What goes wrong is told at the end.
#[derive(Debug)]
pub struct Output<W: Write> {
    to: W,
    failed: Option<Error>,
}

impl<W: Write> Output<W> {
    /// Writes to `to`.
    pub fn new(to: W) -> Output<W> {
        Output { to, failed: None }
    }

    /// Whether nobody will see what is written from now on.
    pub fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Writes `bytes`, unless something has gone wrong before.
    pub fn write(&mut self, bytes: &[u8]) {
        if self.failed.is_none() {
            self.failed = self.to.write_all(bytes).err();
        }
    }

    /// A reader that closed the pipe wants no more; anything else is an error.
    pub fn finish(mut self) -> anyhow::Result<()> {
        let failed = self.failed.take().or_else(|| self.to.flush().err());
        match failed {
            Some(error) if error.kind() != ErrorKind::BrokenPipe => Err(error.into()),
            _ => Ok(()),
        }
    }
}

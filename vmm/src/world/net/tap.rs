//! A tap device that somebody has made: frames as they are, one with each read and write.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use super::{NetError, share};
use crate::kvm::open_tap;

/// Linux's limit for the name of a device, without its end (IFNAMSIZ).
const NAME_MAX: usize = 15;

/// Whether a device could be called so.
pub fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name.bytes().all(plain)
        && name != "."
        && name != ".."
}

/// Opens it. It is not made if it is not there, which the kernel would do.
pub(super) fn open(name: &str) -> Result<TapWire, NetError> {
    if !Path::new("/sys/class/net").join(name).exists() {
        return Err(NetError::NoTap(name.into()));
    }
    let failed = |source| NetError::Tap {
        name: name.into(),
        source,
    };
    Ok(TapWire {
        name: name.into(),
        device: open_tap(name).map_err(failed)?,
    })
}

/// The sending side.
#[derive(Debug)]
pub(super) struct TapWire {
    name: String,
    device: OwnedFd,
}

impl TapWire {
    /// The device's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The same device, to receive from.
    pub(super) fn share(&self) -> io::Result<OwnedFd> {
        share(&self.device)
    }

    /// Sends a frame, or drops it: the device takes frames at once or, if it is down, not at all.
    pub(super) fn send(&mut self, frame: &[u8]) {
        let _ = rustix::io::write(&self.device, frame);
    }
}

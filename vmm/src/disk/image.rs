//! The raw image that a disk is made over: a file, or a block device.

use std::fs::{File, FileType, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hindsight_replay::Image;

use super::formats::{HEAD_BYTES, TAIL_BYTES, format_of};
use super::{BLOCK_BYTES, DiskError};

/// How many blocks of an image its sample has at most.
const SAMPLE_BLOCKS: u64 = 64;

/// An image, opened and found fit.
#[derive(Clone, Debug)]
pub struct OpenImage {
    path: PathBuf,
    target: PathBuf,
    file: Arc<File>,
    /// How the journal names it.
    pub image: Image,
}

impl OpenImage {
    /// Opens a raw image, for reading alone. Takes a few reads, however large it is.
    pub fn open(path: &Path) -> Result<OpenImage, DiskError> {
        let failed = |source| DiskError::File {
            path: path.into(),
            source,
        };
        // To open a tape, or the reading end of a FIFO, does something already.
        check_kind(path, std::fs::metadata(path).map_err(failed)?.file_type())?;
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        // It may be another by now.
        let kind = file.metadata().map_err(failed)?.file_type();
        check_kind(path, kind)?;
        let target = if kind.is_block_device() {
            // Where its name leads is what changes: /dev/disk/by-id/... is the same disk after the next boot.
            std::path::absolute(path)
        } else {
            path.canonicalize()
        };
        let target = target.map_err(failed)?;
        // A block device says that it has no bytes, and has an end all the same.
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
        check_format(path, &file, bytes)?;
        if bytes == 0 || !bytes.is_multiple_of(512) {
            return Err(DiskError::Length {
                path: path.into(),
                found: bytes,
            });
        }
        let sample = sample(&file, bytes).map_err(failed)?;
        Ok(OpenImage {
            path: path.into(),
            target,
            file: Arc::new(file),
            image: Image { bytes, sample },
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is, without links: a link to it stays right when links on the way to it change. A block device
    /// is where it was said to be.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Fills `into` with what is at `offset`.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(into, offset)
    }

    /// Refuses an image that cannot be the recorded one.
    pub fn check(&self, disk: usize, recorded: &Image) -> Result<(), DiskError> {
        if self.image == *recorded {
            return Ok(());
        }
        Err(DiskError::Other {
            path: self.path.clone(),
            disk,
            found_bytes: self.image.bytes,
            found: hex(&self.image.sample),
            expected_bytes: recorded.bytes,
            expected: hex(&recorded.sample),
        })
    }
}

/// Refuses what has no bytes that stay where they are.
fn check_kind(path: &Path, kind: FileType) -> Result<(), DiskError> {
    let found = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else {
        "a socket"
    };
    Err(DiskError::Kind {
        path: path.into(),
        found,
    })
}

/// Refuses files that hold a disk in another form.
fn check_format(path: &Path, file: &File, bytes: u64) -> Result<(), DiskError> {
    let read = |start: u64, count: u64| {
        let mut data = vec![0; count as usize];
        file.read_exact_at(&mut data, start).map(|()| data)
    };
    let failed = |source| DiskError::File {
        path: path.into(),
        source,
    };
    let head = read(0, bytes.min(HEAD_BYTES)).map_err(failed)?;
    let tail = bytes.min(TAIL_BYTES);
    let tail = read(bytes - tail, tail).map_err(failed)?;
    match format_of(&head, &tail) {
        None => Ok(()),
        Some(format) => Err(DiskError::Format {
            path: path.into(),
            found: format.name,
            advice: format.advice,
        }),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// BLAKE3 of blocks spread evenly over the image, the first and the last among them.
fn sample(file: &File, bytes: u64) -> std::io::Result<[u8; 32]> {
    let blocks = bytes.div_ceil(BLOCK_BYTES);
    let count = blocks.min(SAMPLE_BLOCKS);
    let mut hash = blake3::Hasher::new();
    for index in 0..count {
        let block = if count == 1 {
            0
        } else {
            (blocks - 1) * index / (count - 1)
        };
        let start = block * BLOCK_BYTES;
        let mut data = vec![0; (bytes - start).min(BLOCK_BYTES) as usize];
        file.read_exact_at(&mut data, start)?;
        hash.update(&data);
    }
    Ok(*hash.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        OpenImage::open(path).unwrap_err().to_string()
    }

    #[test]
    fn what_is_no_file_and_no_block_device_is_refused_by_name_and_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(refused(dir.path()).contains("is a directory, expected a raw disk image"));
        assert!(refused(Path::new("/dev/zero")).contains("is a character device"));
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        assert!(refused(&fifo).contains("is a FIFO"));
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert!(refused(&socket).contains("is a socket"));
    }

    #[test]
    fn an_image_in_another_form_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.vmdk");
        for (content, wanted) in [
            (
                &b"QFI\xfb"[..],
                "a qcow2 image, expected a raw disk image; convert it: qemu-img convert -O raw",
            ),
            (
                b"# Disk DescriptorFile\n",
                "the description of a VMDK image",
            ),
            (
                b"\x1f\x8b\x08\0",
                "packed with gzip, expected a raw disk image; unpack it first",
            ),
            (b"short", "5 bytes"),
        ] {
            std::fs::write(&path, content).unwrap();
            let refused = refused(&path);
            assert!(
                refused.contains("disk.vmdk") && refused.contains(wanted),
                "{refused}"
            );
        }
    }

    /// A loop device, which needs root and a kernel that has them.
    struct Loop(String);

    impl Loop {
        fn over(image: &Path) -> Option<Loop> {
            let mut losetup = std::process::Command::new("/sbin/losetup");
            let output = losetup
                .args(["--find", "--show", "-r"])
                .arg(image)
                .output()
                .ok()?;
            let name = String::from_utf8(output.stdout).unwrap();
            let name = Some(name.trim().to_string()).filter(|_| output.status.success());
            if name.is_none() {
                eprintln!(
                    "SKIPPED: no loop device: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            name.map(Loop)
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let mut losetup = std::process::Command::new("/sbin/losetup");
            let _ = losetup.arg("-d").arg(&self.0).status();
        }
    }

    #[test]
    fn a_block_device_is_as_long_as_it_is_and_has_the_sample_of_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 999) as u8).collect();
        std::fs::write(file.path(), &content).unwrap();
        let Some(device) = Loop::over(file.path()) else {
            return;
        };
        let device = Path::new(&device.0);
        let opened = OpenImage::open(device).unwrap();
        assert_eq!(opened.image, OpenImage::open(file.path()).unwrap().image);
        let mut part = [0; 1000];
        opened.read_at(999_999, &mut part).unwrap();
        assert_eq!(part, content[999_999..][..1000]);
        // A link in a recording leads to the name that was said.
        let dir = tempfile::tempdir().unwrap();
        let (named, link) = (dir.path().join("by-id"), dir.path().join("disk0"));
        std::os::unix::fs::symlink(device, &named).unwrap();
        let opened = OpenImage::open(&named).unwrap();
        assert_eq!(opened.target(), named);
        std::os::unix::fs::symlink(opened.target(), &link).unwrap();
        OpenImage::open(&link)
            .unwrap()
            .check(0, &opened.image)
            .unwrap();
    }
}

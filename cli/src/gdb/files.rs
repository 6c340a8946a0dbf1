//! The guest's files, for gdb: `set sysroot target:`.
//!
//! A file is read whole where gdb opens it, and stays as it was then: gdb reads on in it long after the guest has gone
//! elsewhere. Nothing here is a file of this host, and nothing can be written.

use std::collections::BTreeMap;

use gdbstub::target::ext::host_io::{
    FsKind, HostIo, HostIoClose, HostIoCloseOps, HostIoErrno, HostIoError, HostIoFstat,
    HostIoFstatOps, HostIoOpen, HostIoOpenFlags, HostIoOpenMode, HostIoOpenOps, HostIoPread,
    HostIoPreadOps, HostIoReadlink, HostIoReadlinkOps, HostIoResult, HostIoSetfs, HostIoSetfsOps,
    HostIoStat,
};
use hindsight_replay::foreign::{shown_bytes, shown_lines};
use hindsight_vmm::disk::TreeFile;

use super::target::Guest;
use crate::tell::tell;

/// gdb has few files open at once; a peer may ask for any number.
const OPEN_MAX: usize = 64;
/// What they may have in all.
const OPEN_BYTES_MAX: usize = 1 << 30;

/// The files that gdb has open, by the numbers that it knows them by.
#[derive(Debug, Default)]
pub(super) struct OpenFiles {
    files: BTreeMap<u32, TreeFile>,
    next: u32,
    /// Why a file could not be read, as it was told last.
    told: Option<String>,
}

impl OpenFiles {
    fn add(&mut self, file: TreeFile) -> Result<u32, HostIoErrno> {
        let bytes: usize = self.files.values().map(|file| file.content.len()).sum();
        if self.files.len() >= OPEN_MAX || bytes + file.content.len() > OPEN_BYTES_MAX {
            return Err(HostIoErrno::ENFILE);
        }
        // A number is not used again soon, so that one that was closed is not taken for another.
        while self.files.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        self.next = (self.next + 1) & 0xffff;
        self.files.insert(number, file);
        Ok(number)
    }

    fn get(&self, number: u32) -> Result<&TreeFile, HostIoErrno> {
        self.files.get(&number).ok_or(HostIoErrno::EBADF)
    }

    fn read(&self, number: u32, offset: u64, into: &mut [u8]) -> Result<usize, HostIoErrno> {
        let content = &self.get(number)?.content;
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = content.get(start..).unwrap_or_default();
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }
}

impl Guest {
    /// A file of the guest's, as it is now.
    fn find_file(&mut self, path: &[u8], follow: bool) -> Result<TreeFile, HostIoErrno> {
        let disks = self.debugger.disks().ok_or(HostIoErrno::ENODEV)?;
        let found = self.files.find(disks, path, follow);
        match found {
            Ok(found) => found.ok_or(HostIoErrno::ENOENT),
            Err(failure) => {
                let problem = shown_lines(&failure).to_string();
                if self.open_files.told.as_ref() != Some(&problem) {
                    tell!(
                        "hindsight: {} of the guest cannot be read: {problem}",
                        shown_bytes(path)
                    );
                    self.open_files.told = Some(problem);
                }
                Err(HostIoErrno::EIO)
            }
        }
    }
}

impl HostIo for Guest {
    fn support_open(&mut self) -> Option<HostIoOpenOps<'_, Self>> {
        Some(self)
    }

    fn support_close(&mut self) -> Option<HostIoCloseOps<'_, Self>> {
        Some(self)
    }

    fn support_pread(&mut self) -> Option<HostIoPreadOps<'_, Self>> {
        Some(self)
    }

    fn support_fstat(&mut self) -> Option<HostIoFstatOps<'_, Self>> {
        Some(self)
    }

    fn support_readlink(&mut self) -> Option<HostIoReadlinkOps<'_, Self>> {
        Some(self)
    }

    fn support_setfs(&mut self) -> Option<HostIoSetfsOps<'_, Self>> {
        Some(self)
    }
}

impl HostIoOpen for Guest {
    fn open(
        &mut self,
        path: &[u8],
        flags: HostIoOpenFlags,
        _: HostIoOpenMode,
    ) -> HostIoResult<u32, Self> {
        let writes = HostIoOpenFlags::O_WRONLY
            | HostIoOpenFlags::O_RDWR
            | HostIoOpenFlags::O_CREAT
            | HostIoOpenFlags::O_TRUNC;
        if flags.intersects(writes) {
            return Err(HostIoError::Errno(HostIoErrno::EROFS));
        }
        let file = self.find_file(path, true).map_err(HostIoError::Errno)?;
        if !file.is_regular() {
            return Err(HostIoError::Errno(HostIoErrno::EACCES));
        }
        self.open_files.add(file).map_err(HostIoError::Errno)
    }
}

impl HostIoClose for Guest {
    fn close(&mut self, number: u32) -> HostIoResult<(), Self> {
        let closed = self.open_files.files.remove(&number);
        closed
            .map(drop)
            .ok_or(HostIoError::Errno(HostIoErrno::EBADF))
    }
}

impl HostIoPread for Guest {
    fn pread(
        &mut self,
        number: u32,
        count: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> HostIoResult<usize, Self> {
        let count = count.min(buffer.len());
        let read = self.open_files.read(number, offset, &mut buffer[..count]);
        read.map_err(HostIoError::Errno)
    }
}

impl HostIoFstat for Guest {
    fn fstat(&mut self, number: u32) -> HostIoResult<HostIoStat, Self> {
        let file = self.open_files.get(number).map_err(HostIoError::Errno)?;
        let bytes = file.content.len() as u64;
        Ok(HostIoStat {
            st_dev: 0,
            st_ino: number,
            st_mode: HostIoOpenMode::from_bits_truncate(file.mode),
            st_nlink: 1,
            st_uid: file.owner.0,
            st_gid: file.owner.1,
            st_rdev: 0,
            st_size: bytes,
            st_blksize: 4096,
            st_blocks: bytes.div_ceil(512),
            st_atime: file.modified,
            st_mtime: file.modified,
            st_ctime: file.modified,
        })
    }
}

impl HostIoReadlink for Guest {
    fn readlink(&mut self, path: &[u8], buffer: &mut [u8]) -> HostIoResult<usize, Self> {
        let file = self.find_file(path, false).map_err(HostIoError::Errno)?;
        if !file.is_link() {
            return Err(HostIoError::Errno(HostIoErrno::EINVAL));
        }
        let into = buffer.get_mut(..file.content.len());
        let into = into.ok_or(HostIoError::Errno(HostIoErrno::ENAMETOOLONG))?;
        into.copy_from_slice(&file.content);
        Ok(file.content.len())
    }
}

impl HostIoSetfs for Guest {
    /// There is one tree of files, whichever process is meant.
    fn setfs(&mut self, _: FsKind) -> HostIoResult<(), Self> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: usize) -> TreeFile {
        TreeFile {
            mode: 0o100_644,
            owner: (0, 0),
            modified: 0,
            content: (0..bytes).map(|at| at as u8).collect(),
        }
    }

    #[test]
    fn a_peer_reads_what_it_opened_and_cannot_open_more_than_there_is_room_for() {
        let mut open = OpenFiles::default();
        let numbers: Vec<u32> = (0..OPEN_MAX)
            .map(|_| open.add(file(10)).expect("there is room"))
            .collect();
        assert!(open.add(file(10)).is_err());
        let mut buffer = [0; 8];
        assert_eq!(open.read(numbers[3], 4, &mut buffer).ok(), Some(6));
        assert_eq!(buffer, [4, 5, 6, 7, 8, 9, 0, 0]);
        for beyond in [10, u64::MAX] {
            assert_eq!(open.read(numbers[3], beyond, &mut buffer).ok(), Some(0));
        }
        open.files.remove(&numbers[3]);
        assert!(open.read(numbers[3], 0, &mut buffer).is_err());
        let again = open.add(file(1)).expect("there is room again");
        assert!(!numbers.contains(&again));
    }
}

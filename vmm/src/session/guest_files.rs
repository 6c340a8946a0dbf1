//! What a debugger wants to read of the recorded system beside its memory: its files, and its kernel's symbols.

use hindsight_kernel::initramfs::Initramfs;
use hindsight_kernel::symbol_file;
use hindsight_replay::Header;

use super::make::LoadedKernel;
use super::open::RecordedPaths;
use super::recording::Recording;
use crate::disk::{Disks, Tree, TreeFile, find_on_disks, resolve};
use crate::failure::{Failure, Kind};

/// The kernel's own symbols as an ELF file, for a debugger; `None` if it has none.
///
/// # Errors
///
/// The recording's kernel cannot be read.
pub fn kernel_symbols(
    recording: &Recording,
    instead: &RecordedPaths,
) -> Result<Option<Vec<u8>>, Failure> {
    let header = recording.journal()?.header().clone();
    let image = recording.kernel(&header, instead.kernel.as_deref())?;
    let kernel = LoadedKernel::open_as(&image, header.machine.kernel)?;
    let elf = (kernel.elf()).map_err(|error| Failure::new(Kind::BadInput, error))?;
    Ok(symbol_file(&elf))
}

/// The files of a guest: those on its disks, and those that its kernel was given to begin with.
#[derive(Debug)]
pub struct GuestFiles {
    recording: Recording,
    instead: RecordedPaths,
    header: Header,
    /// Read where it is first wanted.
    initrd: Option<Initramfs>,
}

impl GuestFiles {
    /// Those of a recording's guest.
    ///
    /// # Errors
    ///
    /// There is no such recording.
    pub fn of(recording: &Recording, instead: &RecordedPaths) -> Result<GuestFiles, Failure> {
        Ok(GuestFiles {
            recording: recording.clone(),
            instead: instead.clone(),
            header: recording.journal()?.header().clone(),
            initrd: None,
        })
    }

    /// The file that a path leads to from the root: the one on `disks`, as it is there now, or else that of the initrd, as
    /// it was unpacked. With `follow` it is what a symbolic link leads to. `None` if there is none.
    ///
    /// # Errors
    ///
    /// What might have it cannot be read.
    pub fn find(
        &mut self,
        disks: &Disks,
        path: &[u8],
        follow: bool,
    ) -> Result<Option<TreeFile>, Failure> {
        let on_disk = find_on_disks(disks, path, follow);
        if let Ok(Some(file)) = on_disk {
            return Ok(Some(file));
        }
        let initrd = self.initrd()?;
        let Ok(found) = resolve(initrd, path, follow);
        match (found.and_then(|path| file_of(initrd, &path)), on_disk) {
            (None, Err(why)) => Err(Failure::new(Kind::BadInput, why)),
            (file, _) => Ok(file),
        }
    }

    fn initrd(&mut self) -> Result<&Initramfs, Failure> {
        if self.initrd.is_none() {
            let instead = self.instead.initrd.as_deref();
            let bytes = self.recording.initrd(&self.header, instead)?;
            // What there is after a damaged place the kernel has not unpacked either.
            self.initrd = Some(Initramfs::read(&bytes).0);
        }
        Ok(self.initrd.as_ref().expect("it has just been read"))
    }
}

impl Tree for Initramfs {
    /// A path without a slash at its beginning.
    type Node = Vec<u8>;
    type Error = std::convert::Infallible;

    fn root(&self) -> Result<Vec<u8>, Self::Error> {
        Ok(Vec::new())
    }

    fn child(&self, directory: &Vec<u8>, name: &[u8]) -> Result<Option<Vec<u8>>, Self::Error> {
        let path = match directory.is_empty() {
            true => name.to_vec(),
            false => [directory, name].join(&b'/'),
        };
        Ok(self.entry(&path).is_some().then_some(path))
    }

    fn link(&self, node: &Vec<u8>) -> Result<Option<Vec<u8>>, Self::Error> {
        let link = self.entry(node).filter(|entry| entry.is_link());
        Ok(link.map(|entry| self.content(entry).to_vec()))
    }
}

/// A file of an initrd, with all that is in it.
fn file_of(initrd: &Initramfs, path: &[u8]) -> Option<TreeFile> {
    let entry = initrd.entry(path)?;
    Some(TreeFile {
        mode: entry.mode,
        owner: (0, 0),
        modified: entry.modified,
        content: initrd.content(entry).to_vec(),
    })
}

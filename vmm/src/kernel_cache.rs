//! Kernels taken apart once.
//!
//! Unpacking a kernel and decoding its text takes a tenth of a second on a fast host and seconds on
//! a slow one, and gives the same result each time. The result is kept under the user's cache
//! directory, named by the kernel's content and checked when read. What cannot be read or does not
//! check is made anew; a cache that cannot be written is done without.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use hindsight_replay::Content;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;
use xxhash_rust::xxh64::xxh64;

use crate::boot::{Kernel, Modules, Sites, Window};

/// Overrides where the cache is; empty: there is none.
const DIRECTORY: &str = "HINDSIGHT_CACHE";
/// Changes whenever what is kept, or how it is found, does.
const FORMAT: u32 = 9;
/// An entry begins with its checksum, the length of what serde writes, and that of the ELF file.
const HEAD_BYTES: usize = 24;

/// What is kept of a kernel.
#[derive(Debug, Serialize, Deserialize)]
pub struct Prepared {
    /// Its name by content.
    pub content: Content,
    /// The kernel unpacked.
    pub kernel: Kernel,
    /// What must be trapped in it.
    pub sites: Sites,
    /// Which of its time reads need not exit.
    pub windows: Vec<Window>,
    /// Which of its console's waits for the transmitter need not be.
    pub transmits: Vec<u64>,
    /// What must be known to trap it in modules.
    pub modules: Modules,
    /// Where its functions that load modules begin.
    pub loaders: Vec<u64>,
}

/// The kernel of this file, if it is in the cache.
pub fn find(image: &[u8]) -> Option<Prepared> {
    let mut file = std::fs::File::open(entry(image)?).ok()?;
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head).ok()?;
    let [check, about_bytes, elf_bytes] =
        [0, 1, 2].map(|i| u64::from_le_bytes(*head.as_chunks::<8>().0.get(i).unwrap_or(&[0; 8])));
    // The file's own length bounds what its head can make us reserve.
    let length = file.metadata().ok()?.len();
    if about_bytes
        .checked_add(elf_bytes)?
        .checked_add(HEAD_BYTES as u64)?
        != length
    {
        return None;
    }
    let mut about = vec![0; about_bytes as usize];
    file.read_exact(&mut about).ok()?;
    let mut elf = Vec::with_capacity(elf_bytes as usize);
    file.read_to_end(&mut elf).ok()?;
    if checksum(&about, &elf) != check {
        return None;
    }
    let mut prepared: Prepared = postcard::from_bytes(&about).ok()?;
    prepared.kernel.elf = elf;
    (prepared.content.bytes == image.len() as u64).then_some(prepared)
}

fn checksum(about: &[u8], elf: &[u8]) -> u64 {
    xxh64(elf, xxh64(about, FORMAT.into()))
}

/// Keeps a kernel.
pub fn keep(image: &[u8], prepared: &Prepared) {
    if let Some(path) = entry(image) {
        // Whoever comes next finds a whole entry or none.
        let _ = write(&path, prepared);
    }
}

fn write(path: &Path, prepared: &Prepared) -> std::io::Result<()> {
    let about = postcard::to_stdvec(prepared).map_err(std::io::Error::other)?;
    let elf = &prepared.kernel.elf;
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let unfinished = path.with_extension(std::process::id().to_string());
    let result = std::fs::File::create(&unfinished).and_then(|mut file| {
        for word in [checksum(&about, elf), about.len() as u64, elf.len() as u64] {
            file.write_all(&word.to_le_bytes())?;
        }
        file.write_all(&about)?;
        file.write_all(elf)?;
        std::fs::rename(&unfinished, path)
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&unfinished);
    }
    result
}

fn entry(image: &[u8]) -> Option<PathBuf> {
    let directory = match std::env::var_os(DIRECTORY) {
        Some(directory) if directory.is_empty() => return None,
        Some(directory) => PathBuf::from(directory),
        None => match std::env::var_os("XDG_CACHE_HOME").filter(|home| !home.is_empty()) {
            Some(home) => PathBuf::from(home).join("hindsight"),
            None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/hindsight"),
        },
    };
    let name = format!("kernel-{FORMAT}-{:032x}", xxh3_128(image));
    Some(directory.join(name))
}

//! Kernels taken apart once.
//!
//! Unpacking a kernel and decoding its text takes a tenth of a second on a fast host and seconds on
//! a slow one, and gives the same result each time. The result is kept under the user's cache
//! directory, named by the kernel's BLAKE3 and checked when read. What cannot be read or does not
//! check is made anew; a cache that cannot be written is done without.
//!
//! An entry decides which code runs in the guest, so one that somebody else could have written is
//! not taken: it must be a regular file, no link, of this user's or root's, that no other may write. The cache
//! has at most [`ENTRIES_MAX`] entries and [`BYTES_MAX`] bytes; what was not used for longest goes.

use std::fs::Metadata;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use hindsight_replay::Content;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh64::xxh64;

use crate::output_file::{UNFINISHED, Unfinished};
use crate::regular_file::{self, Links};
use hindsight_kernel::{Ages, Kernel, Modules, Sites, Span};

/// Overrides where the cache is; empty: there is none.
const DIRECTORY: &str = "HINDSIGHT_CACHE";
/// Changes whenever what is kept, or how it is found, does.
const FORMAT: u32 = 11;
/// An entry begins with its checksum, the length of what serde writes, and that of the ELF file.
const HEAD_BYTES: usize = 24;
/// How the name of an entry begins, of whatever format.
const ENTRY: &str = "kernel-";
/// How many kernels are kept at most.
const ENTRIES_MAX: usize = 32;
/// How many bytes of them are kept at most.
const BYTES_MAX: u64 = 1 << 30;

/// What is kept of a kernel.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Prepared {
    /// Its name by content.
    pub content: Content,
    /// The kernel unpacked.
    pub kernel: Kernel,
    /// What must be trapped in it.
    pub sites: Sites,
    /// Which of its time reads need not exit.
    pub spans: Vec<Span>,
    /// Which of its console's waits for the transmitter need not be.
    pub transmits: Vec<u64>,
    /// What keeps the Accessed bits of its page tables set.
    pub ages: Ages,
    /// What must be known to trap it in modules.
    pub modules: Modules,
    /// Where its functions that load modules begin.
    pub loaders: Vec<u64>,
}

/// Where kernels are kept.
#[derive(Debug)]
pub(super) struct Cache {
    directory: PathBuf,
    entries_max: usize,
    bytes_max: u64,
}

impl Cache {
    /// The user's, if there is one.
    pub(super) fn of_user() -> Option<Cache> {
        let directory = match std::env::var_os(DIRECTORY) {
            Some(directory) if directory.is_empty() => return None,
            Some(directory) => PathBuf::from(directory),
            None => match std::env::var_os("XDG_CACHE_HOME").filter(|home| !home.is_empty()) {
                Some(home) => PathBuf::from(home).join("hindsight"),
                None => PathBuf::from(std::env::var_os("HOME")?).join(".cache/hindsight"),
            },
        };
        Some(Cache {
            directory,
            entries_max: ENTRIES_MAX,
            bytes_max: BYTES_MAX,
        })
    }

    /// The kernel whose file has this content, if it is in the cache.
    pub(super) fn find(&self, content: &Content) -> Option<Prepared> {
        let (mut file, bytes) = regular_file::open(&self.entry(content), Links::Refuse).ok()?;
        if bytes > self.bytes_max || !is_trusted(&file.metadata().ok()?) {
            return None;
        }
        let mut head = [0; HEAD_BYTES];
        file.read_exact(&mut head).ok()?;
        let [check, about_bytes, elf_bytes] = [0, 1, 2]
            .map(|i| u64::from_le_bytes(*head.as_chunks::<8>().0.get(i).unwrap_or(&[0; 8])));
        // The file's own length bounds what its head can make us reserve.
        if about_bytes
            .checked_add(elf_bytes)?
            .checked_add(HEAD_BYTES as u64)?
            != bytes
        {
            return None;
        }
        let mut about = vec![0; about_bytes as usize];
        file.read_exact(&mut about).ok()?;
        let mut elf = vec![0; elf_bytes as usize];
        file.read_exact(&mut elf).ok()?;
        if checksum(&about, &elf) != check {
            return None;
        }
        let mut prepared: Prepared = postcard::from_bytes(&about).ok()?;
        prepared.kernel.elf = elf;
        if prepared.content != *content {
            return None;
        }
        // When it was last used decides what goes first.
        let _ = file.set_modified(SystemTime::now());
        Some(prepared)
    }

    /// Keeps a kernel.
    pub(super) fn keep(&self, prepared: &Prepared) {
        // Whoever comes next finds a whole entry or none.
        if self.write(prepared).is_ok() {
            self.evict();
        }
    }

    fn write(&self, prepared: &Prepared) -> std::io::Result<()> {
        let about = postcard::to_stdvec(prepared).map_err(std::io::Error::other)?;
        let elf = &prepared.kernel.elf;
        if (HEAD_BYTES + about.len() + elf.len()) as u64 > self.bytes_max {
            return Ok(());
        }
        std::fs::create_dir_all(&self.directory)?;
        let path = self.entry(&prepared.content);
        let unfinished = Unfinished::beside(&path, 0o600)?;
        let mut file = unfinished.file();
        for word in [checksum(&about, elf), about.len() as u64, elf.len() as u64] {
            file.write_all(&word.to_le_bytes())?;
        }
        file.write_all(&about)?;
        file.write_all(elf)?;
        // Not synced: what a crash of the host damages does not check, and is made anew.
        unfinished.put(&path, true)
    }

    /// Removes what was not used for longest, until the rest is within the limits. What somebody else put there
    /// stays, and counts for nothing.
    fn evict(&self) {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return;
        };
        let entries = entries.flatten().filter_map(|entry| {
            let name = entry.file_name();
            let name = name.to_str()?;
            let found = entry.metadata().ok()?;
            let ours = name.starts_with(ENTRY) || name.starts_with(UNFINISHED);
            (ours && found.is_file()).then(|| (entry.path(), found))
        });
        let mut entries: Vec<_> = entries.collect();
        entries.sort_by_key(|(path, found)| {
            let last_used = (found.mtime(), found.mtime_nsec());
            (std::cmp::Reverse(last_used), path.clone())
        });
        let mut bytes = 0_u64;
        for (count, (path, found)) in entries.iter().enumerate() {
            bytes = bytes.saturating_add(found.len());
            if count >= self.entries_max || bytes > self.bytes_max {
                let _ = std::fs::remove_file(path);
            }
        }
    }

    fn entry(&self, content: &Content) -> PathBuf {
        self.directory
            .join(format!("{ENTRY}{FORMAT}-{}", content.hex()))
    }
}

/// Whether nobody but this user and root can have written it.
fn is_trusted(found: &Metadata) -> bool {
    let own = rustix::process::geteuid().as_raw();
    (found.uid() == own || found.uid() == 0) && found.mode() & 0o022 == 0
}

fn checksum(about: &[u8], elf: &[u8]) -> u64 {
    xxh64(elf, xxh64(about, FORMAT.into()))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;

    use super::*;
    use crate::session::make::prepare;
    use crate::session::recording::content;
    use hindsight_kernel::testing::tiny_elf;

    const CODE_BYTES: usize = 10_000;

    fn cache(directory: &std::path::Path) -> Cache {
        Cache {
            directory: directory.join("cache"),
            entries_max: 3,
            bytes_max: 1 << 20,
        }
    }

    /// A kernel of some 10,000 bytes, another one for each number.
    fn prepared(number: u8) -> Prepared {
        let mut code = vec![0x90; CODE_BYTES];
        code.extend([0x0f, 0x31, 0x04, number]);
        let image = tiny_elf(&code);
        prepare(&image, content(&image)).unwrap()
    }

    #[test]
    fn a_kernel_is_found_by_its_whole_content_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let kernel = prepared(7);
        assert!(cache.find(&kernel.content).is_none());
        cache.keep(&kernel);
        let found = cache.find(&kernel.content).unwrap();
        assert_eq!(found.kernel, kernel.kernel);
        // Under another's name it is not taken.
        let other = prepared(8).content;
        std::fs::copy(cache.entry(&kernel.content), cache.entry(&other)).unwrap();
        assert!(cache.find(&other).is_none());
    }

    #[test]
    fn a_damaged_entry_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let kernel = prepared(7);
        cache.keep(&kernel);
        let path = cache.entry(&kernel.content);
        let whole = std::fs::read(&path).unwrap();
        for at in [0, HEAD_BYTES - 1, HEAD_BYTES, whole.len() - 1] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).unwrap();
            assert!(cache.find(&kernel.content).is_none(), "byte {at}");
        }
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(cache.find(&kernel.content).is_none());
        cache.keep(&kernel);
        assert!(cache.find(&kernel.content).is_some());
    }

    #[test]
    fn what_somebody_else_could_have_written_is_not_taken_nor_written_through() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let kernel = prepared(7);
        cache.keep(&kernel);
        let path = cache.entry(&kernel.content);
        let moved = dir.path().join("moved");
        std::fs::rename(&path, &moved).unwrap();
        let before = std::fs::read(&moved).unwrap();
        std::os::unix::fs::symlink(&moved, &path).unwrap();
        assert!(cache.find(&kernel.content).is_none(), "through a link");
        cache.keep(&prepared(8));
        cache.keep(&kernel);
        assert!(cache.find(&kernel.content).is_some());
        assert!(!path.is_symlink());
        assert_eq!(std::fs::read(&moved).unwrap(), before);

        for (mode, trusted) in [(0o600, true), (0o644, true), (0o620, false), (0o602, false)] {
            std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            assert_eq!(cache.find(&kernel.content).is_some(), trusted, "{mode:o}");
        }
        // Only root can give a file away.
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        if std::os::unix::fs::chown(&path, Some(65_534), None).is_ok() {
            assert!(cache.find(&kernel.content).is_none(), "another user's");
        }
    }

    #[test]
    fn what_was_not_used_for_longest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let age = |name: &std::path::Path, hours: u64| {
            let then = SystemTime::now() - Duration::from_secs(hours * 3600);
            let file = std::fs::File::options().write(true).open(name).unwrap();
            file.set_modified(then).unwrap();
        };
        let path = |bytes| cache.entry(&prepared(bytes).content);
        for (bytes, hours) in [(1, 9), (2, 8), (3, 7)] {
            cache.keep(&prepared(bytes));
            age(&path(bytes), hours);
        }
        for name in ["qemu", "kernel-5-of-an-older-version"] {
            std::fs::write(cache.directory.join(name), "").unwrap();
            age(&cache.directory.join(name), 100);
        }
        assert!(cache.find(&prepared(1).content).is_some(), "that is a use");
        cache.keep(&prepared(4));
        let there = [1, 2, 3, 4].map(|bytes| path(bytes).exists());
        assert_eq!(there, [true, false, true, true]);
        assert!(cache.directory.join("qemu").exists(), "not an entry");
        assert!(
            !cache
                .directory
                .join("kernel-5-of-an-older-version")
                .exists()
        );

        // By their bytes too, and one that is too large is not kept at all.
        let small = Cache {
            bytes_max: 2 * CODE_BYTES as u64,
            ..self::cache(dir.path())
        };
        age(&path(4), 1);
        age(&path(1), 2);
        small.keep(&prepared(5));
        let there = [1, 3, 4, 5].map(|bytes| path(bytes).exists());
        assert_eq!(there, [false, false, false, true]);
        let tiny = Cache {
            bytes_max: CODE_BYTES as u64,
            ..small
        };
        tiny.keep(&prepared(6));
        assert!(!tiny.entry(&prepared(6).content).exists());
    }
}

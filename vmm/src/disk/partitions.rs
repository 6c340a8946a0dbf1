//! Where a disk's partitions are (UEFI 2.10: 5.2 for the master boot record, 5.3 for a GPT).
//!
//! The tables are the guest's own and may say anything: what reaches beyond the disk is left out, and so is
//! whatever comes behind more partitions than anybody makes.

/// The unit that both kinds of table count in, in bytes.
const SECTOR_BYTES: u64 = 512;
/// What stands at the end of a master boot record, and of each link in a chain of logical partitions.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Where the four entries of a master boot record begin, and how long one is.
const ENTRIES_OFFSET: usize = 446;
const ENTRY_BYTES: usize = 16;
/// The type of the entry that covers a disk with a GPT.
const PROTECTIVE: u8 = 0xee;
/// The types of an entry that leads to logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The number of the first logical partition, as Linux counts them.
const FIRST_LOGICAL: u32 = 5;
/// The most partitions looked for; Linux takes 256 of any disk.
const PARTITIONS_MAX: u32 = 256;
const GPT_SIGNATURE: &[u8] = b"EFI PART";
/// How long an entry of a GPT is at least, and at most for us.
const GPT_ENTRY_BYTES: std::ops::RangeInclusive<u64> = 128..=4096;

type Sector = [u8; SECTOR_BYTES as usize];

/// One of a disk's partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As Linux counts them: the 1 of `vda1`.
    pub number: u32,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

/// Finds the partitions of a disk of `bytes` bytes, of which `read` fills a buffer from an offset on.
pub fn partitions<E>(
    bytes: u64,
    read: impl Fn(u64, &mut [u8]) -> Result<(), E>,
) -> Result<Vec<Partition>, E> {
    let mut tables = Tables {
        bytes,
        read,
        found: Vec::new(),
    };
    tables.find()?;
    Ok(tables.found)
}

struct Tables<R> {
    bytes: u64,
    read: R,
    found: Vec<Partition>,
}

/// An entry of a master boot record.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    first: u64,
    sectors: u64,
}

impl<E, R: Fn(u64, &mut [u8]) -> Result<(), E>> Tables<R> {
    fn find(&mut self) -> Result<(), E> {
        let Some(entries) = self.boot_record(0)? else {
            return Ok(());
        };
        if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
            return self.gpt();
        }
        for (number, entry) in (1..).zip(entries) {
            if EXTENDED.contains(&entry.kind) {
                self.logical(entry.first)?;
            } else if entry.kind != 0 {
                self.add(number, entry.first, entry.sectors);
            }
        }
        Ok(())
    }

    /// Follows a chain of logical partitions. Each link tells of one, relative to itself, and of the next
    /// link, relative to the first.
    fn logical(&mut self, chain: u64) -> Result<(), E> {
        let mut link = chain;
        for number in FIRST_LOGICAL..PARTITIONS_MAX {
            let Some(entries) = self.boot_record(link)? else {
                return Ok(());
            };
            let of_kind = |extended| {
                let wanted =
                    |entry: &&Entry| entry.kind != 0 && EXTENDED.contains(&entry.kind) == extended;
                entries.iter().find(wanted)
            };
            if let Some(entry) = of_kind(false) {
                self.add(number, link + entry.first, entry.sectors);
            }
            let Some(next) = of_kind(true) else {
                return Ok(());
            };
            link = chain + next.first;
        }
        Ok(())
    }

    /// Reads a GPT, or the copy of it at the disk's end if there is none where it should be.
    fn gpt(&mut self) -> Result<(), E> {
        let last = (self.bytes / SECTOR_BYTES).saturating_sub(1);
        for header in [1, last] {
            let Some(header) = self.sector(header)? else {
                continue;
            };
            if !header.starts_with(GPT_SIGNATURE) {
                continue;
            }
            let (entries, count) = (long(&header, 72), word(&header, 80));
            let entry_bytes = u64::from(word(&header, 84));
            if !GPT_ENTRY_BYTES.contains(&entry_bytes) {
                continue;
            }
            for number in 1..=count.min(PARTITIONS_MAX) {
                let before = u64::from(number - 1) * entry_bytes;
                let Some(offset) = in_bytes(entries).and_then(|start| start.checked_add(before))
                else {
                    break;
                };
                let mut entry = [0; 48];
                if !self.fill(offset, &mut entry)? {
                    break;
                }
                let (first, last) = (long(&entry, 32), long(&entry, 40));
                // An entry without a type is not in use.
                if entry[..16] != [0; 16] && first <= last {
                    self.add(number, first, (last - first).saturating_add(1));
                }
            }
            break;
        }
        Ok(())
    }

    /// The entries of the master boot record, or of a link, in a sector.
    fn boot_record(&self, sector: u64) -> Result<Option<[Entry; 4]>, E> {
        let sector = self.sector(sector)?;
        Ok(sector
            .filter(|sector| sector.ends_with(&SIGNATURE))
            .map(|sector| {
                std::array::from_fn(|index| {
                    let entry = &sector[ENTRIES_OFFSET + index * ENTRY_BYTES..];
                    Entry {
                        kind: entry[4],
                        first: word(entry, 8).into(),
                        sectors: word(entry, 12).into(),
                    }
                })
            }))
    }

    fn sector(&self, number: u64) -> Result<Option<Sector>, E> {
        let mut sector = [0; SECTOR_BYTES as usize];
        let there = match in_bytes(number) {
            Some(offset) => self.fill(offset, &mut sector)?,
            None => false,
        };
        Ok(there.then_some(sector))
    }

    /// Whether there is so much of the disk, and then `into` has it.
    fn fill(&self, offset: u64, into: &mut [u8]) -> Result<bool, E> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Ok(false);
        }
        (self.read)(offset, into)?;
        Ok(true)
    }

    fn add(&mut self, number: u32, first: u64, sectors: u64) {
        let (Some(offset), Some(bytes)) = (in_bytes(first), in_bytes(sectors)) else {
            return;
        };
        let end = offset.checked_add(bytes);
        if bytes > 0 && end.is_some_and(|end| end <= self.bytes) {
            self.found.push(Partition {
                number,
                offset,
                bytes,
            });
        }
    }
}

fn in_bytes(sectors: u64) -> Option<u64> {
    sectors.checked_mul(SECTOR_BYTES)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}

#[cfg(test)]
pub mod testing {
    //! Disks divided by sfdisk, which comes with Debian's fdisk.

    use std::io::Write as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// Divides the disk as sfdisk's `script` says. Without sfdisk nothing is done, and that is said.
    pub fn divide(disk: &Path, script: &str) -> bool {
        let mut command = Command::new("/sbin/sfdisk");
        command.args(["--quiet", "--no-reread", "--no-tell-kernel"]);
        command.args(["--wipe=never", "--wipe-partitions=never"]);
        let child = command.arg(disk).stdin(Stdio::piped()).spawn();
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                eprintln!("SKIPPED: sfdisk cannot be started: {error}");
                return false;
            }
        };
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(script.as_bytes()).unwrap();
        drop(stdin);
        assert!(child.wait().unwrap().success(), "sfdisk failed");
        true
    }
}

#[cfg(test)]
mod tests {
    use super::testing::divide;
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A disk of 64 MiB; `None` without sfdisk.
    fn disk(script: &str) -> Option<Vec<u8>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(64 * MIB).unwrap();
        divide(&path, script).then(|| std::fs::read(&path).unwrap())
    }

    fn found(disk: &[u8]) -> Vec<(u32, u64, u64)> {
        let read = |offset, into: &mut [u8]| {
            let offset = offset as usize;
            into.copy_from_slice(&disk[offset..offset + into.len()]);
            Ok::<(), ()>(())
        };
        let found = partitions(disk.len() as u64, read).unwrap();
        found
            .iter()
            .map(|partition| (partition.number, partition.offset, partition.bytes))
            .collect()
    }

    const DOS: &str = "label: dos
1: start=1MiB, size=4MiB, type=83
3: start=8MiB, size=40MiB, type=5
4: start=50MiB, size=2MiB, type=82
5: start=9MiB, size=3MiB, type=83
6: start=16MiB, size=5MiB, type=83
7: start=32MiB, size=1MiB, type=83
";
    const GPT: &str = "label: gpt
1: start=4MiB, size=40MiB, type=L
14: start=1MiB, size=3MiB, type=21686148-6449-6E6F-744E-656564454649
15: start=44MiB, size=8MiB, type=U
";

    #[test]
    fn primary_and_logical_partitions_of_a_boot_record_are_found() {
        let Some(disk) = disk(DOS) else { return };
        let expected = [
            (1, MIB, 4 * MIB),
            (5, 9 * MIB, 3 * MIB),
            (6, 16 * MIB, 5 * MIB),
            (7, 32 * MIB, MIB),
            (4, 50 * MIB, 2 * MIB),
        ];
        assert_eq!(found(&disk), expected);
    }

    #[test]
    fn a_gpt_is_found_and_its_copy_where_the_first_is_gone() {
        let Some(mut disk) = disk(GPT) else { return };
        let expected = [
            (1, 4 * MIB, 40 * MIB),
            (14, MIB, 3 * MIB),
            (15, 44 * MIB, 8 * MIB),
        ];
        assert_eq!(found(&disk), expected);
        disk[512..512 + 34 * 512].fill(0);
        assert_eq!(found(&disk), expected);
        let end = disk.len() - 512;
        disk[end..].fill(0);
        assert_eq!(found(&disk), []);
    }

    #[test]
    fn a_chain_that_leads_into_itself_ends() {
        let Some(mut disk) = disk(DOS) else { return };
        // The second entry of the first link, its offset from the chain's start: back to that.
        let second = 8 * MIB as usize + ENTRIES_OFFSET + ENTRY_BYTES;
        disk[second + 8..second + 12].fill(0);
        assert!(found(&disk).len() < PARTITIONS_MAX as usize + 4);
    }

    #[test]
    fn no_table_leads_beyond_its_disk() {
        let mut rng = hindsight_replay::rng::Rng::new(1, 1);
        for script in [DOS, GPT] {
            let Some(mut disk) = disk(script) else { return };
            for _ in 0..2_000 {
                let mut before = Vec::new();
                for _ in 0..1 + rng.below(4) {
                    let start = [446, 512, 1024, 8 * MIB + 446][rng.below(4) as usize];
                    let at = (start + rng.below(128)) as usize;
                    before.push((at, disk[at]));
                    disk[at] = rng.number() as u8;
                }
                let length = 512 * (1 + rng.below(64 * MIB / 512));
                for (_, offset, bytes) in found(&disk[..length as usize]) {
                    assert!(offset + bytes <= length);
                }
                for (at, byte) in before.into_iter().rev() {
                    disk[at] = byte;
                }
            }
        }
    }
}

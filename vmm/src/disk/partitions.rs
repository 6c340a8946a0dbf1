//! Where a disk's partitions are (UEFI 2.10: 5.2 for the master boot record, 5.3 for a GPT), numbered as Linux numbers
//! them (block/partitions/msdos.c and efi.c).
//!
//! The tables are the guest's own and may say anything. What begins beyond the disk's end is left out, what ends there
//! is cut, and chains and tables have a greatest length. There are crates for both tables, and neither is fit for this:
//! mbrman numbers logical partitions by their links, and follows a chain for ever; gpt reserves what a header asks for
//! before it looks at its checksum, and panics where entries have another length.

use crc::{CRC_32_ISO_HDLC, Crc};

/// The unit that both kinds of table count in, in bytes.
const SECTOR_BYTES: u64 = 512;
/// The end of a master boot record, and of each link in a chain of logical partitions.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// Where the four entries of a master boot record begin, and how long one is.
const ENTRIES_OFFSET: usize = 446;
const ENTRY_BYTES: usize = 16;
/// The type of the entry that covers a disk with a GPT.
const PROTECTIVE: u8 = 0xee;
/// The types of an entry that leads to logical partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;
/// Partitions have numbers less than this.
const NUMBERS_END: u32 = 256;
/// Links of a chain without a partition that are followed one after the other.
const EMPTY_LINKS_MAX: u32 = 100;
const GPT_SIGNATURE: &[u8] = b"EFI PART";
/// How long the header of a GPT is at least, and each of its entries.
const GPT_HEADER_BYTES: usize = 92;
const GPT_ENTRY_BYTES: u32 = 128;
/// The most entries that are read: 4 MiB, as in Linux.
const GPT_ENTRIES_MAX: u32 = (4 << 20) / GPT_ENTRY_BYTES;

const CRC: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);

type Sector = [u8; SECTOR_BYTES as usize];

/// One of a disk's partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// As Linux counts them: the 1 of `vda1`.
    pub number: u32,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length, in bytes.
    pub bytes: u64,
}

/// Finds the partitions of a disk of `bytes` bytes, of which `read` fills a buffer from an offset on.
pub(super) fn partitions<E>(
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
    boot: u8,
    kind: u8,
    first: u64,
    sectors: u64,
}

impl Entry {
    /// Whether it leads to logical partitions. An entry without sectors is not in use, whatever its type.
    fn is_extended(&self) -> bool {
        self.sectors > 0 && EXTENDED.contains(&self.kind)
    }
}

impl<E, R: Fn(u64, &mut [u8]) -> Result<(), E>> Tables<R> {
    fn find(&mut self) -> Result<(), E> {
        let Some(entries) = self.boot_record(0)? else {
            return Ok(());
        };
        let mut protective = entries.iter().filter(|entry| entry.kind == PROTECTIVE);
        if protective.clone().any(|entry| entry.first == 1) {
            return self.gpt();
        }
        // The first sector of a FAT file system ends as a table does, and has code or text in the place of one.
        let is_table = entries.iter().all(|entry| matches!(entry.boot, 0 | 0x80));
        if !is_table || protective.next().is_some() {
            return Ok(());
        }
        let mut next = FIRST_LOGICAL;
        for (number, entry) in (1..).zip(entries) {
            if entry.is_extended() {
                self.logical(entry, &mut next)?;
            } else {
                self.add(number, entry.first, entry.sectors);
            }
        }
        Ok(())
    }

    /// Follows a chain of logical partitions. Each link tells of partitions, relative to itself, and of the next
    /// link, relative to the first. Only a partition takes a number, and a second chain goes on counting.
    fn logical(&mut self, chain: Entry, next_number: &mut u32) -> Result<(), E> {
        let (mut link, mut link_sectors) = (chain.first, chain.sectors);
        let mut empty_links = 0;
        while empty_links < EMPTY_LINKS_MAX && *next_number < NUMBERS_END {
            empty_links += 1;
            let Some(entries) = self.boot_record(link)? else {
                return Ok(());
            };
            for (index, entry) in entries.iter().enumerate() {
                if entry.sectors == 0 || entry.is_extended() {
                    continue;
                }
                let first = link + entry.first;
                // Nobody uses the last two, and some have left rubbish there.
                let is_inside = entry.first + entry.sectors <= link_sectors
                    && first >= chain.first
                    && first + entry.sectors <= chain.first + chain.sectors;
                if index >= 2 && !is_inside {
                    continue;
                }
                self.add(*next_number, first, entry.sectors);
                empty_links = 0;
                *next_number += 1;
                if *next_number == NUMBERS_END {
                    return Ok(());
                }
            }
            let Some(next) = entries.iter().find(|entry| entry.is_extended()) else {
                return Ok(());
            };
            (link, link_sectors) = (chain.first + next.first, next.sectors);
        }
        Ok(())
    }

    /// Reads a GPT, or the copy of it at the disk's end if that where it should be is not whole. (Linux takes the copy
    /// only where it is booted with `gpt`; who looks at a damaged disk wants what is there.) Two that are whole
    /// and not alike: the first counts, as in Linux.
    fn gpt(&mut self) -> Result<(), E> {
        let last = (self.bytes / SECTOR_BYTES).saturating_sub(1);
        for place in [1, last] {
            let Some(entries) = self.gpt_entries(place, last)? else {
                continue;
            };
            let entries = entries.chunks_exact(GPT_ENTRY_BYTES as usize);
            for (number, entry) in (1..NUMBERS_END).zip(entries) {
                let (first, end) = (long(entry, 32), long(entry, 40));
                // An entry without a type is not in use.
                if entry[..16] != [0; 16] && first <= end && end <= last {
                    self.add(number, first, end - first + 1);
                }
            }
            break;
        }
        Ok(())
    }

    /// The entries of the GPT whose header is in this sector, if the checksums of both are right.
    fn gpt_entries(&self, place: u64, last: u64) -> Result<Option<Vec<u8>>, E> {
        let Some(mut header) = self.sector(place)? else {
            return Ok(None);
        };
        let bytes = word(&header, 12) as usize;
        if !header.starts_with(GPT_SIGNATURE) || !(GPT_HEADER_BYTES..=header.len()).contains(&bytes)
        {
            return Ok(None);
        }
        let checksum = word(&header, 16);
        header[16..20].fill(0);
        let (first_usable, last_usable) = (long(&header, 40), long(&header, 48));
        let count = word(&header, 80);
        if CRC.checksum(&header[..bytes]) != checksum
            || long(&header, 24) != place
            || first_usable > last_usable
            || last_usable > last
            || word(&header, 84) != GPT_ENTRY_BYTES
            || count > GPT_ENTRIES_MAX
        {
            return Ok(None);
        }
        let Some(start) = in_bytes(long(&header, 72)) else {
            return Ok(None);
        };
        let mut entries = vec![0; (count * GPT_ENTRY_BYTES) as usize];
        let whole = self.fill(start, &mut entries)? && CRC.checksum(&entries) == word(&header, 88);
        Ok(whole.then_some(entries))
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
                        boot: entry[0],
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
        let Some(offset) = in_bytes(first).filter(|offset| *offset < self.bytes) else {
            return;
        };
        // One that goes on after the disk's end ends there.
        let room = self.bytes - offset;
        let bytes = in_bytes(sectors).map_or(room, |bytes| bytes.min(room));
        if bytes > 0 {
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
pub(super) mod testing {
    //! Disks divided by sfdisk, which comes with Debian's fdisk.

    use std::io::Write as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// Divides the disk as sfdisk's `script` says. Without sfdisk nothing is done, and that is said.
    pub(crate) fn divide(disk: &Path, script: &str) -> bool {
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
        // Whatever is not as its checksum says, in header or entries, or is gone: the copy has all.
        let sound = disk.clone();
        for at in [512, 512 + 24, 512 + 60, 1024 + 40, 1024 + 100 * 128] {
            disk[at] ^= 1;
            assert_eq!(found(&disk), expected, "{at}");
            disk[at] ^= 1;
        }
        disk[512..512 + 34 * 512].fill(0);
        assert_eq!(found(&disk), expected);
        let end = disk.len() - 512;
        let mut bad = disk.clone();
        bad[end - 32 * 512 + 40] ^= 1;
        assert_eq!(found(&bad), [], "no copy is whole");
        disk[end..].fill(0);
        assert_eq!(found(&disk), []);
        // Without a protective entry that begins in sector 1 there is no GPT, and with one nothing else.
        let mut bare = sound.clone();
        bare[446 + 8] = 2;
        assert_eq!(found(&bare), []);
    }

    #[test]
    fn of_two_whole_gpts_that_differ_the_first_counts() {
        let (Some(disk), Some(other)) = (
            disk(GPT),
            disk("label: gpt\n1: start=9MiB, size=1MiB, type=L\n"),
        ) else {
            return;
        };
        let mut both = disk.clone();
        let end = both.len() - 33 * 512;
        both[end..].copy_from_slice(&other[end..]);
        assert_eq!(found(&both), found(&disk));
        both[512] = 0;
        assert_eq!(found(&both), [(1, 9 * MIB, MIB)]);
    }

    #[test]
    fn a_gpt_that_asks_for_more_than_can_be_is_none() {
        let Some(mut disk) = disk(GPT) else { return };
        let end = disk.len() - 512;
        disk[end..].fill(0);
        for (at, value) in [
            (80, u32::MAX),
            (80, GPT_ENTRIES_MAX + 1),
            (84, 0),
            (84, 256),
            (12, 0),
            (12, 513),
        ] {
            let mut bad = disk.clone();
            bad[512 + at..512 + at + 4].copy_from_slice(&value.to_le_bytes());
            bad[512 + 16..512 + 20].fill(0);
            let bytes = word(&bad, 512 + 12).min(512) as usize;
            let checksum = CRC.checksum(&bad[512..512 + bytes]);
            bad[512 + 16..512 + 20].copy_from_slice(&checksum.to_le_bytes());
            assert_eq!(found(&bad), [], "{at} {value}");
        }
    }

    /// A master boot record, or a link, of these entries: type, first sector, sectors.
    fn record(disk: &mut [u8], sector: u64, entries: &[(u8, u32, u32)]) {
        let sector = &mut disk[(sector * 512) as usize..][..512];
        for (index, (kind, first, sectors)) in entries.iter().enumerate() {
            let entry = &mut sector[ENTRIES_OFFSET + index * ENTRY_BYTES..][..ENTRY_BYTES];
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
        }
        sector[510..].copy_from_slice(&SIGNATURE);
    }

    #[test]
    fn only_a_partition_takes_a_number_and_a_second_chain_goes_on_counting() {
        // What Linux makes of these is in the comments: `losetup -P`, then the sizes in /sys/block.
        let mut disk = vec![0; 1000 * 512];
        record(
            &mut disk,
            0,
            &[
                (0x05, 10, 400),
                (0x0f, 500, 400),
                (0, 950, 10),
                (0x83, 990, 100),
            ],
        );
        record(&mut disk, 10, &[(0, 0, 0), (0x05, 50, 100)]);
        record(&mut disk, 60, &[(0x05, 200, 90), (0x83, 5, 20)]);
        record(
            &mut disk,
            210,
            &[(0x83, 1, 9), (0x82, 20, 9), (0x83, 40, 9), (0x83, 85, 9)],
        );
        record(&mut disk, 500, &[(0x83, 10, 30)]);
        let expected = [
            (5, 65, 20), // 5: the first link is empty.
            (6, 211, 9), // 6, 7 and 8 are of one link; its fourth entry leaves the link and does not count.
            (7, 230, 9),
            (8, 250, 9),
            (9, 510, 30), // The second chain.
            (3, 950, 10), // An entry without a type has sectors, and is one.
            (4, 990, 10), // Cut at the disk's end.
        ];
        assert_eq!(
            found(&disk),
            expected.map(|(number, first, sectors)| (number, first * 512, sectors * 512))
        );
        // A sector of code that ends as a table does.
        disk[446] = 0x33;
        assert_eq!(found(&disk), []);
    }

    #[test]
    fn a_chain_without_partitions_ends() {
        let mut disk = vec![0; 1000 * 512];
        record(&mut disk, 0, &[(0x05, 10, 400)]);
        record(&mut disk, 10, &[(0x05, 0, 100)]);
        assert_eq!(found(&disk), []);
    }

    #[test]
    fn a_chain_that_leads_into_itself_ends() {
        let Some(mut disk) = disk(DOS) else { return };
        // The second entry of the first link, its offset from the chain's start: back to that.
        let second = 8 * MIB as usize + ENTRIES_OFFSET + ENTRY_BYTES;
        disk[second + 8..second + 12].fill(0);
        assert!(found(&disk).len() < NUMBERS_END as usize);
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

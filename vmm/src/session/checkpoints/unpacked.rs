//! Pages that were unpacked: a seek wants most of those that the one before wanted.

use std::collections::{BTreeMap, VecDeque};
use std::thread;

use hindsight_replay::PAGE_BYTES;
use zstd::bulk::Decompressor;

use super::CheckpointError;
use super::format::{GROUP_BYTES, check_of};

/// How much is kept, in bytes.
const BYTES_MAX: usize = 512 << 20;
/// So many groups are kept at least.
pub(super) const GROUPS_KEPT: usize = BYTES_MAX / GROUP_BYTES;
/// Each thread has at least so many groups to unpack.
const GROUPS_EACH: usize = 16;
/// More threads than this gain nothing.
const THREADS_MAX: usize = 8;

/// A group of pages as it is in the file: its number, its bytes, and their check.
pub(super) type Packed<'a> = (u64, &'a [u8], u64);

/// Where the pages of a group are: in which slab, from where on, and how many bytes.
#[derive(Clone, Copy, Debug)]
struct InSlab {
    slab: u64,
    start: usize,
    bytes: usize,
}

/// Groups that were unpacked at once, in memory that was had at once: page by page, to have it costs more than to unpack.
#[derive(Debug)]
struct Slab {
    groups: Vec<u64>,
    memory: Vec<u8>,
}

/// Groups of pages by their numbers. The oldest go first.
#[derive(Debug)]
pub(super) struct Unpacked {
    groups: BTreeMap<u64, InSlab>,
    slabs: VecDeque<Slab>,
    /// The number of the first slab.
    first: u64,
    bytes: usize,
    bytes_max: usize,
    threads: usize,
}

impl Unpacked {
    /// Nothing yet.
    pub(super) fn new() -> Unpacked {
        Unpacked::with_room(BYTES_MAX)
    }

    /// The same, which keeps no more than this.
    pub(super) fn with_room(bytes_max: usize) -> Unpacked {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Unpacked {
            groups: BTreeMap::new(),
            slabs: VecDeque::new(),
            first: 0,
            bytes: 0,
            bytes_max,
            threads: threads.min(THREADS_MAX),
        }
    }

    /// Whether it is there.
    pub(super) fn has(&self, group: u64) -> bool {
        self.groups.contains_key(&group)
    }

    /// The pages of a group, if it is there.
    pub(super) fn get(&self, group: u64) -> Option<&[u8]> {
        let place = self.groups.get(&group)?;
        let slab = self.slabs.get((place.slab - self.first) as usize)?;
        slab.memory.get(place.start..place.start + place.bytes)
    }

    /// Checks, unpacks and keeps groups that are not there.
    pub(super) fn keep(&mut self, groups: &[Packed<'_>]) -> Result<(), CheckpointError> {
        let mut memory = vec![0; groups.len() * GROUP_BYTES];
        let each = groups.len().div_ceil(self.threads).max(GROUPS_EACH);
        let mut shares = groups
            .chunks(each)
            .zip(memory.chunks_mut(each * GROUP_BYTES));
        let Some((ours, to)) = shares.next() else {
            return Ok(());
        };
        let lengths: Vec<_> = thread::scope(|scope| {
            let others = shares.map(|(share, to)| scope.spawn(|| unpack(share, to)));
            let others: Vec<_> = others.collect();
            let ours = unpack(ours, to);
            let others = others.into_iter().map(|other| match other.join() {
                Ok(lengths) => lengths,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            std::iter::once(ours).chain(others).collect()
        });
        let lengths: Vec<Vec<usize>> = lengths.into_iter().collect::<Result<_, _>>()?;
        let numbers: Vec<u64> = groups.iter().map(|(number, ..)| *number).collect();
        let slab = self.first + self.slabs.len() as u64;
        let places = lengths.concat().into_iter().enumerate();
        let places = places.map(|(at, bytes)| InSlab {
            slab,
            start: at * GROUP_BYTES,
            bytes,
        });
        self.groups.extend(numbers.iter().copied().zip(places));
        self.push(Slab {
            groups: numbers,
            memory,
        });
        Ok(())
    }

    fn push(&mut self, slab: Slab) {
        self.bytes += slab.memory.len();
        self.slabs.push_back(slab);
    }

    /// Drops what there is no room for. What is wanted now is asked for after that: else some of it would be gone by the
    /// time that the rest is there.
    pub(super) fn make_room(&mut self) {
        while self.bytes > self.bytes_max
            && let Some(oldest) = self.slabs.pop_front()
        {
            self.bytes -= oldest.memory.len();
            self.first += 1;
            for group in oldest.groups {
                self.groups.remove(&group);
            }
        }
    }

    /// Takes what another has, none of which is here.
    pub(super) fn take(&mut self, other: Unpacked) {
        let first = self.first + self.slabs.len() as u64;
        let groups = other.groups.into_iter().map(|(group, place)| {
            let slab = first + (place.slab - other.first);
            (group, InSlab { slab, ..place })
        });
        self.groups.extend(groups);
        for slab in other.slabs {
            self.push(slab);
        }
    }
}

/// Checks groups, and unpacks them to `memory`, which has room for each. Their lengths.
fn unpack(groups: &[Packed<'_>], memory: &mut [u8]) -> Result<Vec<usize>, CheckpointError> {
    let mut decompressor = Decompressor::new()?;
    let room = memory.chunks_mut(GROUP_BYTES);
    let groups = groups.iter().zip(room).map(|((_, packed, check), room)| {
        if check_of(packed) != *check {
            return Err(CheckpointError::Damaged("pages have another check"));
        }
        match decompressor.decompress_to_buffer(packed, room) {
            Err(_) => Err(CheckpointError::Damaged("pages do not unpack")),
            Ok(bytes) if bytes == 0 || bytes % PAGE_BYTES != 0 => {
                Err(CheckpointError::Damaged("a group is not of whole pages"))
            }
            Ok(bytes) => Ok(bytes),
        }
    });
    groups.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of these numbers, each of so many pages that hold them, unpacked three at a time.
    fn unpacked(numbers: &[u64]) -> Unpacked {
        let mut unpacked = Unpacked::with_room(6 * GROUP_BYTES);
        for numbers in numbers.chunks(3) {
            let contents = numbers.iter().map(|number| {
                let bytes = vec![*number as u8; *number as usize * PAGE_BYTES];
                zstd::bulk::compress(&bytes, 1).unwrap()
            });
            let contents: Vec<Vec<u8>> = contents.collect();
            let packed = numbers.iter().zip(&contents);
            let packed = packed.map(|(number, bytes)| (*number, &bytes[..], check_of(bytes)));
            unpacked.keep(&packed.collect::<Vec<_>>()).unwrap();
        }
        unpacked
    }

    fn assert_has(unpacked: &Unpacked, numbers: &[u64]) {
        for number in 1..=16 {
            let pages = vec![number as u8; number as usize * PAGE_BYTES];
            let expected = numbers.contains(&number).then_some(&pages[..]);
            assert_eq!(unpacked.get(number), expected, "{number}");
            assert_eq!(unpacked.has(number), expected.is_some());
        }
    }

    #[test]
    fn what_was_unpacked_ahead_is_found_beside_what_was_there() {
        let mut here = unpacked(&[1, 2, 3, 9]);
        here.take(unpacked(&[16, 4, 15, 7, 8]));
        assert_has(&here, &[1, 2, 3, 9, 16, 4, 15, 7, 8]);
    }

    #[test]
    fn the_oldest_go_where_there_is_no_room_and_only_then() {
        let mut here = unpacked(&[1, 2, 3]);
        here.take(unpacked(&[4, 5, 6]));
        here.make_room();
        assert_has(&here, &[1, 2, 3, 4, 5, 6]);
        here.take(unpacked(&[7]));
        assert_has(&here, &[1, 2, 3, 4, 5, 6, 7]);
        here.make_room();
        assert_has(&here, &[4, 5, 6, 7]);
        here.take(unpacked(&[8, 9, 10]));
        here.make_room();
        assert_has(&here, &[7, 8, 9, 10]);
    }
}

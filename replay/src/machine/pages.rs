//! What a machine keeps in pages: guest memory, and what the guest has written to its disks. A page that holds only
//! zeroes and one that is not there are the same.

use std::collections::BTreeMap;

use hindsight_devices::Ram;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::digest::PAGE_BYTES;
use super::state::Stateful;

/// Where a page is: in guest memory or on the disks, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PagePlace(u64);

/// Set in the place of a page on disks.
const ON_DISKS: u64 = 1 << 63;

impl PagePlace {
    /// Page `number` of guest memory: its guest-physical address by [`PAGE_BYTES`].
    pub fn in_memory(number: u64) -> PagePlace {
        assert!(number < ON_DISKS, "addresses have 64 bits");
        PagePlace(number)
    }

    /// Page `number` of the disks, as they number them.
    pub fn on_disks(number: u64) -> PagePlace {
        assert!(number < ON_DISKS, "no disk is so large");
        PagePlace(number | ON_DISKS)
    }

    /// The number of a page of guest memory; else that of one on the disks.
    pub fn number(self) -> Result<u64, u64> {
        match self.0 & ON_DISKS {
            0 => Ok(self.0),
            _ => Err(self.0 & !ON_DISKS),
        }
    }
}

/// The content of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBytes(Box<[u8; PAGE_BYTES]>);

impl std::ops::Deref for PageBytes {
    type Target = [u8; PAGE_BYTES];

    fn deref(&self) -> &[u8; PAGE_BYTES] {
        &self.0
    }
}

impl Serialize for PageBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0[..])
    }
}

impl<'de> Deserialize<'de> for PageBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PageBytes, D::Error> {
        deserializer.deserialize_bytes(PageVisitor)
    }
}

struct PageVisitor;

impl de::Visitor<'_> for PageVisitor {
    type Value = PageBytes;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PAGE_BYTES} bytes")
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<PageBytes, E> {
        let page = <[u8; PAGE_BYTES]>::try_from(bytes);
        let page = page.map_err(|_| E::invalid_length(bytes.len(), &self))?;
        Ok(PageBytes(Box::new(page)))
    }
}

/// All pages of a machine.
///
/// They are a part of their own in a [`super::MachineState`]: whoever keeps many of those keeps the names of pages
/// in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages(BTreeMap<PagePlace, PageBytes>);

impl Pages {
    /// The pages of guest memory alone.
    pub fn of_memory(ram: &Ram) -> Pages {
        let mut pages = Pages::default();
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for number in memory::all(ram) {
            if memory::read(ram, number, &mut bytes) && !is_zero(&bytes) {
                let place = PagePlace::in_memory(number);
                pages.0.insert(place, PageBytes(bytes.clone()));
            }
        }
        pages
    }

    /// What it holds; zeroes where there is nothing.
    pub(crate) fn get(&self, place: PagePlace) -> &[u8; PAGE_BYTES] {
        self.0.get(&place).map_or(&[0; PAGE_BYTES], |page| &*page.0)
    }

    /// Takes those of one part, which are at `place(number)`.
    pub(crate) fn take<T: Stateful>(
        &mut self,
        part: &mut T,
        place: fn(u64) -> PagePlace,
    ) -> Result<(), T::Error> {
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for number in part.pages()? {
            part.read_page(number, &mut bytes)?;
            if !is_zero(&bytes) {
                self.0.insert(place(number), PageBytes(bytes.clone()));
            }
        }
        Ok(())
    }

    /// Makes the pages of one part, which are at `place(number)`, what they were. Only what differs is written: a page
    /// that nobody has touched stays so.
    pub(super) fn put<T: Stateful>(
        &self,
        part: &mut T,
        place: fn(u64) -> PagePlace,
    ) -> Result<(), T::Error> {
        let all = place(0)..=place(ON_DISKS - 1);
        let mut wanted: BTreeMap<u64, Option<&PageBytes>> = BTreeMap::new();
        wanted.extend(part.pages()?.into_iter().map(|number| (number, None)));
        let saved = self.0.range(all);
        wanted.extend(saved.map(|(place, bytes)| (number_of(*place), Some(bytes))));
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for (number, page) in wanted {
            let page = page.map_or(&[0; PAGE_BYTES], |page| &*page.0);
            part.read_page(number, &mut bytes)?;
            if *bytes != *page {
                part.write_page(number, page)?;
            }
        }
        Ok(())
    }

    /// The pages, by ascending place.
    pub fn iter(&self) -> impl Iterator<Item = (PagePlace, &PageBytes)> {
        self.0.iter().map(|(place, bytes)| (*place, bytes))
    }

    /// XXH3 over all of it, places and contents.
    pub fn digest(&self) -> u64 {
        self.iter().fold(0, |digest, (place, bytes)| {
            let place = xxh3_64_with_seed(&place.0.to_le_bytes(), digest);
            xxh3_64_with_seed(&bytes[..], place)
        })
    }
}

fn number_of(place: PagePlace) -> u64 {
    let (Ok(number) | Err(number)) = place.number();
    number
}

/// Whether a page holds only zeroes.
pub fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    let words = page.as_chunks::<8>().0.iter();
    words.fold(0, |any, word| any | u64::from_le_bytes(*word)) == 0
}

/// Guest memory, page by page. A page's number is its address by [`PAGE_BYTES`].
pub mod memory {
    use super::*;

    fn address(number: u64) -> Option<GuestAddress> {
        number.checked_mul(PAGE_BYTES as u64).map(GuestAddress)
    }

    /// The numbers of all pages, ascending.
    pub fn all(ram: &Ram) -> impl Iterator<Item = u64> {
        ram.iter().flat_map(|region| {
            let (first, bytes) = (region.start_addr().0 / PAGE_BYTES as u64, region.len());
            first..first + bytes / PAGE_BYTES as u64
        })
    }

    /// Whether there is such a page.
    pub fn has(ram: &Ram, number: u64) -> bool {
        address(number).is_some_and(|address| ram.check_range(address, PAGE_BYTES))
    }

    /// Reads a page; `false` if there is none.
    pub fn read(ram: &Ram, number: u64, into: &mut [u8; PAGE_BYTES]) -> bool {
        address(number).is_some_and(|address| ram.read_slice(into, address).is_ok())
    }

    /// Writes a page; `false` if there is none.
    pub fn write(ram: &Ram, number: u64, from: &[u8; PAGE_BYTES]) -> bool {
        address(number).is_some_and(|address| ram.write_slice(from, address).is_ok())
    }

    /// The numbers of those that were written by way of `ram` since this was asked last.
    pub fn take_written(ram: &Ram) -> Vec<u64> {
        let mut written = Vec::new();
        for region in ram.iter() {
            let first = region.start_addr().0 / PAGE_BYTES as u64;
            let mapping: &MmapRegion<AtomicBitmap> = region;
            let words = mapping.bitmap().get_and_reset();
            written.extend(set_bits(&words).map(|page| first + page));
        }
        written
    }
}

/// The numbers of the bits that are set, ascending.
pub fn set_bits(words: &[u64]) -> impl Iterator<Item = u64> {
    let words = words.iter().enumerate().filter(|(_, word)| **word != 0);
    words.flat_map(|(at, word)| {
        let bits = (0..u64::BITS).filter(move |bit| word >> bit & 1 != 0);
        bits.map(move |bit| at as u64 * u64::from(u64::BITS) + u64::from(bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        let ranges = [
            (GuestAddress(0), 4 * PAGE_BYTES),
            (GuestAddress(1 << 32), 2 * PAGE_BYTES),
        ];
        Ram::from_ranges(&ranges).expect("six pages can be mapped")
    }

    /// Memory and nothing else.
    struct Memory(Ram);

    impl Stateful for Memory {
        type State = ();
        type Error = std::convert::Infallible;

        fn save(&mut self) -> Result<(), Self::Error> {
            Ok(())
        }

        fn restore(&mut self, (): &()) -> Result<(), Self::Error> {
            Ok(())
        }

        fn pages(&mut self) -> Result<Vec<u64>, Self::Error> {
            Ok(memory::all(&self.0).collect())
        }

        fn has_page(&self, number: u64) -> bool {
            memory::has(&self.0, number)
        }

        fn read_page(
            &mut self,
            number: u64,
            into: &mut [u8; PAGE_BYTES],
        ) -> Result<(), Self::Error> {
            assert!(memory::read(&self.0, number, into));
            Ok(())
        }

        fn write_page(&mut self, number: u64, from: &[u8; PAGE_BYTES]) -> Result<(), Self::Error> {
            assert!(memory::write(&self.0, number, from));
            Ok(())
        }

        fn take_changed_pages(&mut self) -> Result<Vec<u64>, Self::Error> {
            Ok(memory::take_written(&self.0))
        }
    }

    #[test]
    fn memory_put_back_is_the_memory_that_was_saved_whatever_was_there() {
        let (saved, other) = (ram(), ram());
        for (gpa, byte) in [(0x10, 1), (0x2fff, 2), ((1 << 32) + 0x1000, 3u8)] {
            saved.write_obj(byte, GuestAddress(gpa)).expect("it is RAM");
        }
        for gpa in [0x10, 0x3000, 1 << 32] {
            other.write_obj(9u8, GuestAddress(gpa)).expect("it is RAM");
        }
        let pages = Pages::of_memory(&saved);
        let places: Vec<_> = pages.iter().map(|(place, _)| place.number()).collect();
        assert_eq!(places, [Ok(0), Ok(2), Ok((1 << 20) + 1)]);
        let mut other = Memory(other);
        let Ok(()) = pages.put(&mut other, PagePlace::in_memory);
        assert_eq!(Pages::of_memory(&other.0), pages);
        let mut taken = Pages::default();
        let Ok(()) = taken.take(&mut other, PagePlace::in_memory);
        assert_eq!(taken, pages);
        assert_eq!(taken.digest(), pages.digest());
        assert_ne!(Pages::default().digest(), pages.digest());
    }

    #[test]
    fn each_page_that_was_written_is_said_once() {
        let ram = ram();
        assert!(memory::take_written(&ram).is_empty());
        for gpa in [0x10, 0x2fff, (1 << 32) + 0x1000] {
            // Across two pages.
            ram.write_slice(&[1, 2], GuestAddress(gpa))
                .expect("it is RAM");
        }
        assert_eq!(memory::take_written(&ram), [0, 2, 3, (1 << 20) + 1]);
        assert!(memory::take_written(&ram).is_empty());
    }

    #[test]
    fn pages_that_the_memory_has_not_got_are_not_there() {
        let ram = ram();
        for number in [0, 3, 1 << 20, (1 << 20) + 1] {
            assert!(memory::has(&ram, number));
        }
        for number in [4, (1 << 20) + 2, u64::MAX, u64::MAX >> 12] {
            assert!(!memory::has(&ram, number));
            assert!(!memory::write(&ram, number, &[1; PAGE_BYTES]));
        }
    }

    #[test]
    fn a_page_of_another_length_is_none() {
        let page = (PagePlace(1), PageBytes(Box::new([7; PAGE_BYTES])));
        let bytes = postcard::to_stdvec(&page).expect("plain values serialise");
        assert_eq!(postcard::from_bytes(&bytes), Ok(page));
        let short = postcard::to_stdvec(&(1u64, vec![7u8; PAGE_BYTES - 1]));
        let short = short.expect("it serialises");
        assert!(postcard::from_bytes::<(PagePlace, PageBytes)>(&short).is_err());
    }
}

//! Guest memory as a value: those of its pages that are not all zeroes.

use hindsight_devices::Ram;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::digest::PAGE_BYTES;

/// One page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its content.
    pub bytes: PageBytes,
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

/// All of a guest's memory.
///
/// It is a part of its own in a [`super::MachineState`], so that whoever keeps many of them can keep the names of
/// pages in their place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Those that are not all zeroes, by ascending address.
    pages: Vec<Page>,
}

impl Pages {
    /// The memory as it is now.
    pub fn of(ram: &Ram) -> Pages {
        let mut pages = Vec::new();
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for gpa in addresses(ram) {
            ram.read_slice(&mut bytes[..], GuestAddress(gpa))
                .expect("a page of a region is RAM");
            if !is_zero(&bytes) {
                let bytes = PageBytes(bytes.clone());
                pages.push(Page { gpa, bytes });
            }
        }
        Pages { pages }
    }

    /// The pages, by ascending address.
    pub fn iter(&self) -> impl Iterator<Item = &Page> {
        self.pages.iter()
    }

    /// Refuses pages that this memory has not got, says which.
    pub(super) fn check(&self, ram: &Ram) -> Result<(), String> {
        let mut all = addresses(ram);
        for page in &self.pages {
            // Both ascend: what does not come any more is not there, or is out of order.
            if !all.any(|gpa| gpa == page.gpa) {
                return Err(format!(
                    "it has a page at {:#x}, where there is no RAM or was one before",
                    page.gpa
                ));
            }
        }
        Ok(())
    }

    /// Makes the memory what it was. Only what differs is written: a page that nobody has touched stays so.
    pub(super) fn put(&self, ram: &Ram) {
        let mut saved = self.pages.iter().peekable();
        let mut bytes = [0; PAGE_BYTES];
        for gpa in addresses(ram) {
            let page = saved.next_if(|page| page.gpa == gpa);
            let wanted = page.map_or(&[0; PAGE_BYTES], |page| &*page.bytes);
            ram.read_slice(&mut bytes, GuestAddress(gpa))
                .expect("a page of a region is RAM");
            if bytes != *wanted {
                ram.write_slice(wanted, GuestAddress(gpa))
                    .expect("a page of a region is RAM");
            }
        }
    }

    /// XXH3 over all of it, places and contents.
    pub fn digest(&self) -> u64 {
        self.pages.iter().fold(0, |digest, page| {
            let place = xxh3_64_with_seed(&page.gpa.to_le_bytes(), digest);
            xxh3_64_with_seed(&page.bytes[..], place)
        })
    }
}

/// The addresses of all pages, ascending.
fn addresses(ram: &Ram) -> impl Iterator<Item = u64> {
    ram.iter().flat_map(|region| {
        let start = region.start_addr().0;
        (start..start + region.len()).step_by(PAGE_BYTES)
    })
}

fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    let words = page.as_chunks::<8>().0.iter();
    words.fold(0, |any, word| any | u64::from_le_bytes(*word)) == 0
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

    #[test]
    fn memory_put_back_is_the_memory_that_was_saved_whatever_was_there() {
        let (saved, other) = (ram(), ram());
        for (gpa, byte) in [(0x10, 1), (0x2fff, 2), ((1 << 32) + 0x1000, 3u8)] {
            saved.write_obj(byte, GuestAddress(gpa)).expect("it is RAM");
        }
        for gpa in [0x10, 0x3000, 1 << 32] {
            other.write_obj(9u8, GuestAddress(gpa)).expect("it is RAM");
        }
        let pages = Pages::of(&saved);
        let places: Vec<u64> = pages.iter().map(|page| page.gpa).collect();
        assert_eq!(places, [0, 0x2000, (1 << 32) + 0x1000]);
        pages.check(&other).expect("there are such pages");
        pages.put(&other);
        assert_eq!(Pages::of(&other), pages);
        assert_eq!(Pages::of(&other).digest(), pages.digest());
        assert_ne!(Pages::default().digest(), pages.digest());
    }

    #[test]
    fn pages_that_the_memory_has_not_got_are_refused() {
        let page = |gpa| Page {
            gpa,
            bytes: PageBytes(Box::new([1; PAGE_BYTES])),
        };
        let refused = |gpas: &[u64]| {
            let pages = gpas.iter().map(|gpa| page(*gpa)).collect();
            Pages { pages }.check(&ram()).is_err()
        };
        assert!(!refused(&[0, 0x3000, 1 << 32]));
        for gpas in [&[0x10][..], &[0x4000], &[u64::MAX], &[0x1000, 0], &[0, 0]] {
            assert!(refused(gpas), "{gpas:x?}");
        }
    }

    #[test]
    fn a_page_of_another_length_is_none() {
        let page = Page {
            gpa: 0x1000,
            bytes: PageBytes(Box::new([7; PAGE_BYTES])),
        };
        let bytes = postcard::to_stdvec(&page).expect("plain values serialise");
        assert_eq!(postcard::from_bytes::<Page>(&bytes), Ok(page));
        let short = postcard::to_stdvec(&(0x1000u64, vec![7u8; PAGE_BYTES - 1]));
        assert!(postcard::from_bytes::<Page>(&short.expect("it serialises")).is_err());
    }
}

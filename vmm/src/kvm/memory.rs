//! Guest RAM: one anonymous mapping, split around the 32-bit PCI hole.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use hindsight_devices::Ram;
use hindsight_replay::{MemoryDigest, PAGE_BYTES};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use super::error::KvmError;
use crate::boot::layout::{LOW_RAM_END, RAM_ABOVE_HOLE};
use crate::boot::{GuestRam, OutOfRam};

/// A stretch of RAM, as devices see it.
type RamRegion = vm_memory::GuestRegionMmap<AtomicBitmap>;

/// x86-64's second page size.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Guest RAM.
#[derive(Debug)]
pub struct GuestMemory {
    base: NonNull<u8>,
    bytes: usize,
    /// The whole mapping: longer than the RAM, so that the RAM can begin at a huge page.
    mapping: (NonNull<u8>, usize),
    /// The same RAM, as devices see it.
    ram: Ram,
    /// Its regions. Whoever has a copy of `ram` has one of each of these.
    shared: Vec<Arc<RamRegion>>,
}

/// A stretch of RAM that is contiguous for the guest.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Address in this process.
    pub host: u64,
}

impl GuestMemory {
    /// Maps `bytes` of zeroes; a multiple of the page size.
    pub fn new(bytes: u64) -> Result<GuestMemory, KvmError> {
        let failed = |source| KvmError::Map { bytes, source };
        let length = usize::try_from(bytes)
            .ok()
            .filter(|b| *b > 0 && b.is_multiple_of(PAGE_BYTES));
        let length = length.ok_or_else(|| {
            failed(std::io::Error::other(
                "the size must be a multiple of 4 KiB and not zero",
            ))
        })?;
        // SAFETY: a fresh anonymous mapping aliases nothing; its result is checked below.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length + HUGE_PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(failed(std::io::Error::last_os_error()));
        }
        let start =
            NonNull::new(base.cast::<u8>()).expect("mmap without MAP_FIXED never returns null");
        // KVM maps 2 MiB at once only where guest and host addresses agree in the bits below, and
        // each such mapping saves 511 exits that the guest would make for its pages.
        let skip = start.as_ptr().align_offset(HUGE_PAGE_BYTES);
        // SAFETY: `skip` is less than a huge page, by which the mapping is longer than the RAM.
        let base = unsafe { start.add(skip) };
        // SAFETY: the range lies inside the mapping. Advice only: a host without huge pages is slower.
        unsafe { libc::madvise(base.as_ptr().cast(), length, libc::MADV_HUGEPAGE) };
        let mapping = (start, length + HUGE_PAGE_BYTES);
        let shared = view(&regions(base, length));
        let ram = Ram::from_arc_regions(shared.clone());
        Ok(GuestMemory {
            base,
            bytes: length,
            mapping,
            ram: ram.expect("the regions are apart and in order"),
            shared,
        })
    }

    /// RAM, as devices see it.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// The stretches of RAM, in ascending order of address.
    pub fn regions(&self) -> Vec<Region> {
        regions(self.base, self.bytes)
    }

    /// Offset into the mapping of `bytes` at `gpa`, if they are all RAM.
    fn offset(&self, gpa: u64, bytes: usize) -> Option<usize> {
        let end = gpa.checked_add(bytes as u64)?;
        let low_end = LOW_RAM_END.min(self.bytes as u64);
        let offset = if end <= low_end {
            gpa
        } else if gpa >= RAM_ABOVE_HOLE {
            gpa - RAM_ABOVE_HOLE + LOW_RAM_END
        } else {
            return None;
        };
        let offset = usize::try_from(offset).ok()?;
        (offset.checked_add(bytes)? <= self.bytes).then_some(offset)
    }

    /// Whether `bytes` bytes at `gpa` are all RAM.
    pub fn is_ram(&self, gpa: u64, bytes: usize) -> bool {
        self.offset(gpa, bytes).is_some()
    }

    /// Copies guest memory into `buffer`; `false` if it is not all RAM.
    pub fn read(&self, gpa: u64, buffer: &mut [u8]) -> bool {
        let Some(offset) = self.offset(gpa, buffer.len()) else {
            return false;
        };
        // SAFETY: `offset` checked the range against the mapping, which lives as long as `self`;
        // the guest does not run while we read, for its only vCPU runs on this thread.
        unsafe {
            let source = self.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(source, buffer.as_mut_ptr(), buffer.len());
        }
        true
    }

    /// Puts a byte in the place of another, and gives that one; `None` if it is no RAM. For what is put back before
    /// anybody looks: nobody is told that the page was written.
    pub(super) fn exchange(&self, gpa: u64, byte: u8) -> Option<u8> {
        let offset = self.offset(gpa, 1)?;
        // SAFETY: `offset` checked the place against the mapping, which lives as long as `self`. Whoever may look at it
        // meanwhile, through a copy of `ram`, makes no reference to it either.
        let place = unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset)) };
        Some(place.swap(byte, Ordering::Relaxed))
    }

    /// Whether a page of RAM holds only zeroes.
    fn is_zero(&self, gpa: u64) -> bool {
        const WORDS: usize = PAGE_BYTES / size_of::<u64>();
        let offset = self.offset(gpa, PAGE_BYTES).expect("the page is RAM");
        assert!(gpa.is_multiple_of(PAGE_BYTES as u64), "a page begins there");
        // SAFETY: `offset` checked the range against the mapping, which lives as long as `self`, and is aligned. Words
        // that others may write meanwhile are atomic ones.
        let words = unsafe {
            let first = self.base.as_ptr().add(offset).cast::<AtomicU64>();
            std::slice::from_raw_parts(first, WORDS)
        };
        words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Digests all of RAM. Pages the host never gave the guest are zero and need no look.
    pub fn digest(&self) -> Result<MemoryDigest, KvmError> {
        let mut digest = MemoryDigest::default();
        self.each_page_in_use(|gpa, page| digest.absorb_page(gpa, page))?;
        Ok(digest)
    }

    /// Shows every page that holds anything but zeroes, in ascending order: a copy, for whoever looks may have the page
    /// written meanwhile.
    pub fn each_page_in_use(
        &self,
        mut show: impl FnMut(u64, &[u8; PAGE_BYTES]),
    ) -> Result<(), KvmError> {
        let mut page = [0; PAGE_BYTES];
        self.each_page_backed(|gpa| {
            // Where the host has huge pages, most of what it has backed was never used.
            if !self.is_zero(gpa) {
                assert!(self.read(gpa, &mut page), "the page is RAM");
                show(gpa, &page);
            }
        })
    }

    /// Says the address of every page that the host has given the guest, in ascending order. All others hold zeroes.
    pub(super) fn each_page_backed(&self, mut say: impl FnMut(u64)) -> Result<(), KvmError> {
        let pagemap = File::open("/proc/self/pagemap").map_err(KvmError::PageMap)?;
        let mut entries = vec![0u8; 8 * 4096];
        for region in self.regions() {
            let pages = region.bytes as usize / PAGE_BYTES;
            for chunk in (0..pages).step_by(4096) {
                let count = 4096.min(pages - chunk);
                let host_page = region.host / PAGE_BYTES as u64 + chunk as u64;
                pagemap
                    .read_exact_at(&mut entries[..8 * count], 8 * host_page)
                    .map_err(KvmError::PageMap)?;
                for (i, entry) in entries[..8 * count].as_chunks::<8>().0.iter().enumerate() {
                    // Linux, Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 62 swapped.
                    if u64::from_ne_bytes(*entry) >> 62 != 0 {
                        say(region.gpa + ((chunk + i) * PAGE_BYTES) as u64);
                    }
                }
            }
        }
        Ok(())
    }
}

/// How RAM of `bytes` bytes at `base` lies in the guest.
fn regions(base: NonNull<u8>, bytes: usize) -> Vec<Region> {
    let bytes = bytes as u64;
    let host = base.as_ptr() as u64;
    let low = bytes.min(LOW_RAM_END);
    let mut regions = vec![Region {
        gpa: 0,
        bytes: low,
        host,
    }];
    if bytes > low {
        regions.push(Region {
            gpa: RAM_ABOVE_HOLE,
            bytes: bytes - low,
            host: host + low,
        });
    }
    regions
}

/// vm-memory's view of these regions, which does not own them.
fn view(regions: &[Region]) -> Vec<Arc<RamRegion>> {
    let regions = regions.iter().map(|region| {
        let (address, bytes) = (region.host as *mut u8, region.bytes as usize);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        // SAFETY: the range is part of the mapping that `GuestMemory` owns, which does not unmap it while anybody
        // else has one of these regions. A region made this way does not unmap anything.
        let mapped = unsafe { MmapRegion::build_raw(address, bytes, prot, flags) };
        let mapped = mapped.expect("a mapping that begins at a page can be looked at");
        let region = RamRegion::new(mapped, GuestAddress(region.gpa));
        Arc::new(region.expect("RAM ends below 2^64"))
    });
    regions.collect()
}

impl GuestRam for GuestMemory {
    fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), OutOfRam> {
        let (bytes, ram_bytes) = (data.len() as u64, self.bytes as u64);
        let offset = self.offset(gpa, data.len()).ok_or(OutOfRam {
            gpa,
            bytes,
            ram_bytes,
        })?;
        // SAFETY: `offset` checked the range, and `&mut self` makes this the only access of ours.
        unsafe {
            let target = self.base.as_ptr().add(offset);
            std::ptr::copy_nonoverlapping(data.as_ptr(), target, data.len());
        }
        // Past the view that notes what it is used to write.
        let region = self.ram.to_region_addr(GuestAddress(gpa));
        let (region, at) = region.expect("the bytes are RAM");
        region.bitmap().mark_dirty(at.0 as usize, data.len());
        Ok(())
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        self.ram = Ram::new();
        if self
            .shared
            .iter_mut()
            .any(|region| Arc::get_mut(region).is_none())
        {
            // Somebody has kept a copy of `ram`, and may look at it for as long as the program runs.
            return;
        }
        // SAFETY: the mapping is ours and whole, and no view of it is left; `KvmCpu` owns this value and drops the VM
        // first.
        unsafe { libc::munmap(self.mapping.0.as_ptr().cast(), self.mapping.1) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn a_copy_of_ram_outlives_the_memory_that_it_is_of() {
        let mut memory = GuestMemory::new(4 << 20).unwrap();
        memory.write(4096, &[7; 8]).unwrap();
        let copy = memory.ram().clone();
        drop(memory);
        let word: u64 = copy.read_obj(GuestAddress(4096)).unwrap();
        assert_eq!(word, u64::from_le_bytes([7; 8]));
    }

    #[test]
    fn a_page_that_is_shown_may_be_written_meanwhile() {
        let mut memory = GuestMemory::new(1 << 20).unwrap();
        memory.write(0, &[1; PAGE_BYTES]).unwrap();
        let mut shown = 0;
        let look = |gpa, page: &[u8; PAGE_BYTES]| {
            memory.ram().write_obj(2_u8, GuestAddress(gpa)).unwrap();
            shown += usize::from(page[0] == 1);
        };
        memory.each_page_in_use(look).unwrap();
        assert_eq!(shown, 1);
    }
}

//! The target that compares the files of a disk: one of some file systems that kernels have made and left in use,
//! alone or on a partition, with bytes in it that the input chose.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::OnceLock;

use arbitrary::Unstructured;
use hindsight_vmm::disk::{ExtError, Medium, Source, changes};

const SECTOR: usize = 512;
/// Where a partition begins, in bytes.
const PARTITION: usize = 1 << 20;
/// Edits of one input.
const EDITS_MAX: usize = 64;
/// What may be read of a disk, for each of its bytes and at least: a bound on how long it can take.
const READ_TIMES_MAX: u64 = 40;
const READ_BYTES_MAX: u64 = 256 << 20;
/// What may be reported of one disk.
const TOLD_MAX: usize = 500_000;
const TOLD_BYTES_MAX: usize = 256 << 20;

/// A disk when the machine was switched on, and as it was left.
struct Base {
    before: Vec<u8>,
    now: Vec<u8>,
    /// The sectors that are not zero in the second: that is where something can be changed.
    used: Vec<usize>,
}

/// A file system alone, on a logical partition of a chain, on a partition of a GPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Table {
    None,
    Chain,
    Gpt,
}

macro_rules! image {
    ($name:literal) => {
        include_bytes!(concat!("../../../vmm/src/disk/ext/images/", $name, ".zst"))
    };
}

const IMAGES: [(&[u8], Table); 10] = [
    (image!("ext2"), Table::None),
    (image!("ext3"), Table::None),
    (image!("ext4"), Table::None),
    (image!("plain"), Table::None),
    (image!("fast-plain"), Table::None),
    (image!("inline"), Table::None),
    (image!("metabg-old"), Table::None),
    (image!("wrap-old"), Table::None),
    (image!("ext2"), Table::Chain),
    (image!("ext2"), Table::Gpt),
];

fn base(index: usize) -> &'static Base {
    static BASES: [OnceLock<Base>; IMAGES.len()] = [const { OnceLock::new() }; IMAGES.len()];
    BASES[index].get_or_init(|| {
        let (packed, table) = IMAGES[index];
        let mut decoder = zstd::stream::read::Decoder::new(packed).expect("it is packed");
        decoder.window_log_max(27).expect("it can be set");
        let mut all = Vec::new();
        std::io::copy(&mut decoder, &mut all).expect("it can be unpacked");
        let length = all.len() / 3;
        let (before, now) = (&all[..length], &all[length..2 * length]);
        let (before, now) = (divided(before, table), divided(now, table));
        let zero = |sector: &[u8]| sector.iter().all(|byte| *byte == 0);
        let sectors = now.chunks(SECTOR).enumerate();
        let used = sectors
            .filter(|(_, sector)| !zero(sector))
            .map(|(at, _)| at)
            .collect();
        Base { before, now, used }
    })
}

/// A disk with this file system on it.
fn divided(system: &[u8], table: Table) -> Vec<u8> {
    if table == Table::None {
        return system.to_vec();
    }
    let mut disk = vec![0; PARTITION + system.len() + PARTITION];
    disk[PARTITION..][..system.len()].copy_from_slice(system);
    let sectors = (disk.len() / SECTOR) as u32;
    if table == Table::Chain {
        record(&mut disk, 0, &[(0x83, 3, 5), (0x05, 8, sectors - 8)]);
        record(&mut disk, 8, &[(0, 0, 0), (0x05, 8, sectors - 16)]);
        record(
            &mut disk,
            16,
            &[(
                0x83,
                (PARTITION / SECTOR) as u32 - 16,
                (system.len() / SECTOR) as u32,
            )],
        );
        return disk;
    }
    record(&mut disk, 0, &[(0xee, 1, sectors - 1)]);
    let entry = &mut disk[2 * SECTOR..];
    entry[0] = 1;
    let first = (PARTITION / SECTOR) as u64;
    entry[32..40].copy_from_slice(&first.to_le_bytes());
    entry[40..48].copy_from_slice(&(first + (system.len() / SECTOR) as u64 - 1).to_le_bytes());
    let header = &mut disk[SECTOR..];
    header[..8].copy_from_slice(b"EFI PART");
    for (at, value) in [
        (12, 92u32),
        (24, 1),
        (40, 34),
        (48, sectors - 34),
        (72, 2),
        (80, 128),
        (84, 128),
    ] {
        header[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    disk
}

fn record(disk: &mut [u8], sector: usize, entries: &[(u8, u32, u32)]) {
    let sector = &mut disk[sector * SECTOR..][..SECTOR];
    for (entry, (kind, first, sectors)) in sector[446..].chunks_mut(16).zip(entries) {
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&first.to_le_bytes());
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
}

/// Makes the checksums of a GPT right, so that what comes after them is reached.
fn seal(disk: &mut Disk) {
    let mut header = disk.sector(1);
    let count = u32::from_le_bytes([header[80], header[81], header[82], header[83]]).min(1 << 15);
    let mut entries = vec![0; count as usize * 128];
    if disk.read_at(2 * SECTOR as u64, &mut entries).is_ok() {
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
    }
    header[16..20].fill(0);
    let length = u32::from_le_bytes([header[12], header[13], header[14], header[15]]) as usize;
    let checksum = crc32(&header[..length.min(SECTOR)]);
    header[16..20].copy_from_slice(&checksum.to_le_bytes());
    disk.edits.insert(1, header);
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| crc >> 1 ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
    !bytes
        .iter()
        .fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// A disk with changes, or a part of one, which counts what is read of it.
#[derive(Clone)]
struct Disk {
    data: &'static [u8],
    edits: BTreeMap<usize, [u8; SECTOR]>,
    offset: u64,
    bytes: u64,
    read_bytes: Rc<Cell<u64>>,
}

impl Disk {
    fn new(data: &'static [u8], read_bytes: &Rc<Cell<u64>>) -> Disk {
        Disk {
            data,
            edits: BTreeMap::new(),
            offset: 0,
            bytes: data.len() as u64,
            read_bytes: read_bytes.clone(),
        }
    }

    fn sector(&self, sector: usize) -> [u8; SECTOR] {
        let plain = || std::array::from_fn(|at| self.data[sector * SECTOR + at]);
        self.edits.get(&sector).copied().unwrap_or_else(plain)
    }
}

impl Source for Disk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read_within(&self, offset: u64, into: &mut [u8]) -> Result<(), ExtError> {
        self.read_bytes
            .set(self.read_bytes.get() + into.len() as u64);
        let start = (self.offset + offset) as usize;
        into.copy_from_slice(&self.data[start..start + into.len()]);
        let sectors = start / SECTOR..(start + into.len()).div_ceil(SECTOR);
        for (sector, data) in self.edits.range(sectors) {
            for (at, byte) in (sector * SECTOR..).zip(data) {
                if let Some(place) = at.checked_sub(start).and_then(|at| into.get_mut(at)) {
                    *place = *byte;
                }
            }
        }
        Ok(())
    }
}

impl Medium for Disk {
    fn part(&self, offset: u64, bytes: u64) -> Disk {
        let offset = self.offset + offset;
        Disk {
            offset,
            bytes,
            ..self.clone()
        }
    }
}

/// Compares a disk that `data` describes: its first byte names the base, each of its edits is a sector, a place in it
/// and up to 16 bytes.
pub fn compare(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(first) = bytes.arbitrary::<u8>() else {
        return;
    };
    let index = usize::from(first) % IMAGES.len();
    let base = base(index);
    let read_bytes = Rc::new(Cell::new(0));
    let (before, mut now) = (
        Disk::new(&base.before, &read_bytes),
        Disk::new(&base.now, &read_bytes),
    );
    for _ in 0..EDITS_MAX {
        if edit(&mut now, base, &mut bytes).is_err() {
            break;
        }
    }
    if IMAGES[index].1 == Table::Gpt {
        seal(&mut now);
    }
    let files = changes(&before, &now, &|_, _, _| false);
    let most = READ_BYTES_MAX.max(READ_TIMES_MAX * now.bytes);
    assert!(
        read_bytes.get() <= most,
        "{} bytes were read",
        read_bytes.get()
    );
    let changed = files.changed.unwrap_or_default();
    let told: usize = changed.iter().map(|file| file.path.len()).sum();
    assert!(
        changed.len() <= TOLD_MAX && told <= TOLD_BYTES_MAX,
        "{} changes are told",
        changed.len()
    );
    assert!(files.unknown.len() <= 256 * 30);
}

fn edit(disk: &mut Disk, base: &Base, bytes: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    if bytes.is_empty() {
        return Err(arbitrary::Error::NotEnoughData);
    }
    let which = usize::from(bytes.arbitrary::<u16>()?);
    let sector = base.used[which % base.used.len()];
    let at = usize::from(bytes.arbitrary::<u16>()?) % SECTOR;
    let count = 1 + usize::from(bytes.arbitrary::<u8>()? % 16);
    let new = bytes.bytes(count.min(bytes.len()))?;
    let mut data = disk.sector(sector);
    for (place, byte) in data[at..].iter_mut().zip(new) {
        *place = *byte;
    }
    disk.edits.insert(sector, data);
    Ok(())
}

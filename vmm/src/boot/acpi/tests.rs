use hindsight_devices::{Devices, DiskSpec, NetSpec};
use xxhash_rust::xxh3::xxh3_64;

use super::*;

/// The tables as a kernel finds them: by address.
struct Found {
    area: Vec<u8>,
}

impl Found {
    fn new(slots: &[Slot]) -> Found {
        Found {
            area: tables(slots),
        }
    }

    fn at(&self, address: u64) -> &[u8] {
        &self.area[(address - ACPI_TABLES) as usize..]
    }

    /// The table at `address`, whose length and checksum are right.
    fn table(&self, address: u64, signature: &[u8; 4]) -> &[u8] {
        let table = self.at(address);
        let table = &table[..u32_at(table, 4) as usize];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "checksum of {signature:?}");
        table
    }

    /// The table of this signature that the XSDT names.
    fn by_name(&self, signature: &[u8; 4]) -> &[u8] {
        let rsdp = self.at(ACPI_TABLES);
        let xsdt = self.table(u64_at(rsdp, 24), b"XSDT");
        let entries = xsdt[36..].chunks_exact(8).map(|entry| u64_at(entry, 0));
        let named = |address: &u64| self.at(*address).starts_with(signature);
        let address = { entries }.find(named).expect("the XSDT names it");
        self.table(address, signature)
    }

    fn dsdt(&self) -> &[u8] {
        self.table(u32_at(self.by_name(b"FACP"), 40).into(), b"DSDT")
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|found| found == wanted)
}

#[test]
fn a_kernel_that_searches_the_bios_area_finds_the_rsdp() {
    let found = Found::new(&[]);
    let rsdp = &found.at(ACPI_TABLES)[..36];
    assert_eq!(&rsdp[..8], b"RSD PTR ");
    assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
    assert_eq!(ACPI_TABLES % 16, 0);
}

#[test]
fn the_fadt_names_the_boards_fixed_hardware() {
    let found = Found::new(&[]);
    let fadt = found.by_name(b"FACP");
    assert_eq!(found.at(u32_at(fadt, 36).into())[..4], *b"FACS");
    assert_eq!(u32_at(fadt, 36) % 64, 0);
    assert_eq!(u32_at(fadt, 46) & 0xffff, 9, "SCI");
    assert_eq!(u32_at(fadt, 48), 0, "no SMI command port");
    let blocks = [56, 64, 76].map(|at| u32_at(fadt, at));
    assert_eq!(blocks, [0x600, 0x604, 0x608]);
    assert_eq!(u32_at(fadt, 112) >> 4 & 1, 0, "there is a power button");
    assert_eq!(u64_at(fadt, 120), 0xcf9, "the reset register");
    assert_eq!(fadt[128], 6);
}

#[test]
fn the_madt_has_one_processor_one_io_apic_and_two_overrides() {
    let found = Found::new(&[]);
    let madt = found.by_name(b"APIC");
    assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
    let expected: [&[u8]; 4] = [
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 13, 0],
    ];
    assert_eq!(madt[44..], expected.concat());
}

#[test]
fn each_virtio_slot_is_a_device_with_its_window_and_its_interrupt() {
    let slots = [0, 1].map(|index| Slot {
        gpa: 0xd000_0000 + 0x1000 * index,
        bytes: 0x200,
        gsi: 16 + index as u8,
    });
    let found = Found::new(&slots);
    for (name, slot) in [b"VIO0", b"VIO1"].into_iter().zip(slots) {
        assert!(contains(found.dsdt(), name));
        let window = [
            &[0x86, 9, 0, 1][..],
            &(slot.gpa as u32).to_le_bytes(),
            &[0, 2, 0, 0],
        ]
        .concat();
        assert!(contains(found.dsdt(), &window));
        let interrupt = [&[0x89, 6, 0, 1, 1][..], &u32::from(slot.gsi).to_le_bytes()].concat();
        assert!(contains(found.dsdt(), &interrupt), "level, active high");
    }
    assert!(!contains(Found::new(&[]).dsdt(), b"LNRO0005"));
}

#[test]
fn soft_off_has_the_boards_sleep_type() {
    let off = [&b"\x08_S5_\x12"[..], &[7, 4, 0x0a, 5, 0, 0, 0]];
    let found = Found::new(&[]);
    let dsdt = found.dsdt();
    assert!(contains(dsdt, &off.concat()), "{dsdt:02x?}");
}

/// They are in guest memory from the first instruction on: with others, a recording does not replay.
#[test]
fn the_tables_are_those_that_recordings_were_made_on() {
    let disk = DiskSpec {
        bytes: 512,
        read_only: false,
        serial: String::new(),
    };
    let everything = Devices {
        console: true,
        entropy: true,
        net: Some(NetSpec::default()),
        disks: vec![disk; Devices::DISKS_MAX],
    };
    let found = [Devices::default(), everything].map(|devices| {
        let tables = tables(&devices.slots());
        (tables.len(), xxh3_64(&tables))
    });
    assert_eq!(
        found,
        [(820, 0x8f71_5d79_d7aa_a2be), (1332, 0x52df_1900_27bb_72fc)]
    );
}

//! The zero page (`struct boot_params`): the letter from the boot loader to Linux.
//!
//! Offsets follow `Documentation/arch/x86/zero-page.rst`; those of the setup header in it are the kernel crate's.
//! linux-loader has the whole structure, as bindings that are to be written as bytes by unsafe code; a dozen offsets do.

use hindsight_kernel::setup_header::*;

use super::load::E820Entry;

/// u64: where the RSDP is (protocol 2.14).
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const EXT_CMD_LINE_PTR: usize = 0x0c8;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_BYTES: usize = 20;
/// How many memory map entries the zero page holds (`E820_MAX_ENTRIES_ZEROPAGE`).
pub(super) const E820_LIMIT: usize = 128;

/// One zero page under construction.
#[derive(Debug)]
pub(super) struct ZeroPage {
    bytes: [u8; 4096],
}

impl ZeroPage {
    /// A zero page with the kernel's own setup header, or a plain one where the kernel brought none.
    pub(super) fn new(header: SetupHeader<'_>) -> Self {
        let mut page = ZeroPage { bytes: [0; 4096] };
        match header.0 {
            Some(header) => {
                let length = header.len().min(SETUP_HEADER_END - SETUP_HEADER);
                page.bytes[SETUP_HEADER..SETUP_HEADER + length].copy_from_slice(&header[..length]);
                page.bytes[SETUP_DATA..SETUP_DATA + 8].fill(0);
            }
            None => {
                page.bytes[BOOT_FLAG..BOOT_FLAG + 2]
                    .copy_from_slice(&BOOT_FLAG_MAGIC.to_le_bytes());
                page.u32(HEADER_MAGIC, HDRS);
                page.bytes[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
                page.bytes[LOADFLAGS] = 1;
                page.u32(KERNEL_ALIGNMENT, super::layout::KERNEL_ALIGNMENT);
            }
        }
        page.bytes[TYPE_OF_LOADER] = 0xff;
        page
    }

    fn u32(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Writes the low half of `value` at `low` and its high half at `high`.
    fn split(&mut self, low: usize, high: usize, value: u64) {
        self.u32(low, value as u32);
        self.u32(high, (value >> 32) as u32);
    }

    /// Says where the list of setup data begins.
    pub(super) fn setup_data(&mut self, gpa: u64) {
        self.split(SETUP_DATA, SETUP_DATA + 4, gpa);
    }

    /// Says where the command line is; `bytes` is its length without the NUL.
    pub(super) fn command_line(&mut self, gpa: u64, bytes: usize) {
        self.split(CMD_LINE_PTR, EXT_CMD_LINE_PTR, gpa);
        // The kernel reads at most this much; a bzImage's own value is already right.
        if self.bytes[CMDLINE_SIZE..CMDLINE_SIZE + 4] == [0; 4] {
            self.u32(
                CMDLINE_SIZE,
                u32::try_from(bytes).expect("checked against the room for it"),
            );
        }
    }

    /// Says where ACPI's RSDP is.
    pub(super) fn acpi_rsdp(&mut self, gpa: u64) {
        self.split(ACPI_RSDP_ADDR, ACPI_RSDP_ADDR + 4, gpa);
    }

    /// Says where the initrd is.
    pub(super) fn initrd(&mut self, gpa: u64, bytes: u64) {
        self.split(RAMDISK_IMAGE, EXT_RAMDISK_IMAGE, gpa);
        self.split(RAMDISK_SIZE, EXT_RAMDISK_SIZE, bytes);
    }

    /// Writes the memory map. The caller has checked that it is not longer than [`E820_LIMIT`].
    pub(super) fn memory_map(&mut self, entries: &[E820Entry]) {
        assert!(
            entries.len() <= E820_LIMIT,
            "{} memory map entries, room for {E820_LIMIT}",
            entries.len()
        );
        self.bytes[E820_ENTRIES] = entries.len() as u8;
        for (entry, slot) in entries
            .iter()
            .zip(self.bytes[E820_TABLE..].chunks_exact_mut(E820_ENTRY_BYTES))
        {
            slot[..8].copy_from_slice(&entry.address.to_le_bytes());
            slot[8..16].copy_from_slice(&entry.bytes.to_le_bytes());
            slot[16..].copy_from_slice(&entry.kind.to_le_bytes());
        }
    }

    /// The page as it goes to guest memory.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }
}

//! Where everything stands in guest memory before the first instruction.
//!
//! One picture for all of it, since the pieces must not overlap. All of it lies below the first MiB,
//! which, but for the tables, Linux takes over once it has read the zero page:
//!
//! ```text
//! 0x00500  GDT: null, unused, 64-bit code, data
//! 0x07000  zero page (struct boot_params)
//! 0x08000  stack, one page, growing down from 0x9000
//! 0x09000  PML4, 0x0a000 PDPT, 0x0b000..0x0f000 four page directories: the first 4 GiB, 2 MiB a page
//! 0x20000  command line
//! 0x21000  setup data: the seed of the kernel's random numbers
//! 0x9fc00  end of conventional memory (the EBDA begins here on a PC)
//! 0xe0000  ACPI tables, RSDP first, up to 0x100000: reserved, and Linux's to read for good
//! 0x100000 the lowest address a kernel segment may have
//! ```

use hindsight_devices::wiring::{IO_APIC, LOCAL_APIC, Registers, VIRTIO};

/// The global descriptor table that is loaded into GDTR.
pub(crate) const GDT: u64 = 0x500;
/// GDTR's limit: four descriptors, less one byte.
pub(crate) const GDT_LIMIT: u16 = 4 * 8 - 1;
/// Selector of the 64-bit code descriptor (`__BOOT_CS`, Linux boot protocol, 64-bit entry).
pub(crate) const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data descriptor (`__BOOT_DS`).
pub(crate) const DATA_SELECTOR: u16 = 0x18;
/// The zero page, passed in RSI.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack, for the few pushes before the kernel sets up its own.
pub(crate) const STACK_TOP: u64 = 0x9000;
/// Page map level 4, passed in CR3.
pub(crate) const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub(crate) const PDPT: u64 = 0xa000;
/// First of the page directories, one per GiB.
pub(crate) const PAGE_DIRECTORIES: u64 = 0xb000;
/// How many GiB are mapped one to one.
pub(crate) const IDENTITY_GIB: u64 = 4;
/// The command line, NUL-terminated.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line including its NUL, in bytes (`COMMAND_LINE_SIZE` of x86).
pub(crate) const COMMAND_LINE_BYTES: usize = 2048;
/// The list of setup data, which has one entry.
pub(crate) const SETUP_DATA: u64 = 0x2_1000;
/// End of conventional memory.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables: the RSDP, and the others after it.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// Room for the ACPI tables, in bytes: where a kernel looks for the RSDP (ACPI 6.5, 5.2.5.1).
pub(crate) const ACPI_TABLES_BYTES: u64 = 0x2_0000;
/// Start of extended memory, and the lowest address of a kernel segment.
pub(crate) const HIGH_MEMORY: u64 = 0x10_0000;
/// RAM never reaches past this below 4 GiB: above it are devices' registers.
pub(crate) const LOW_RAM_END: u64 = 3 << 30;
/// RAM that does not fit below [`LOW_RAM_END`] continues here.
pub(crate) const RAM_ABOVE_HOLE: u64 = 4 << 30;
/// Where Linux is linked to be loaded, for kernels that do not say (`LOAD_PHYSICAL_ADDR`).
pub(crate) const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// Highest initrd address plus one for kernels that do not say (boot protocol, `initrd_addr_max`).
pub(crate) const INITRD_LIMIT: u64 = 0x8000_0000;

// The pieces stand apart and in order; moving one into another fails to compile.
const _: () = {
    assert!(GDT + GDT_LIMIT as u64 <= ZERO_PAGE);
    assert!(ZERO_PAGE + 0x1000 < STACK_TOP && STACK_TOP <= PML4);
    assert!(PML4 + 0x1000 <= PDPT && PDPT + 0x1000 <= PAGE_DIRECTORIES);
    assert!(PAGE_DIRECTORIES + IDENTITY_GIB * 0x1000 <= COMMAND_LINE);
    assert!(COMMAND_LINE + COMMAND_LINE_BYTES as u64 <= SETUP_DATA);
    assert!(SETUP_DATA + 0x1000 <= CONVENTIONAL_END && CONVENTIONAL_END <= ACPI_TABLES);
    assert!(ACPI_TABLES + ACPI_TABLES_BYTES <= HIGH_MEMORY);
    // Devices' registers lie where there is no RAM.
    let registers = [VIRTIO, IO_APIC, LOCAL_APIC];
    let mut index = 0;
    while index < registers.len() {
        let Registers { gpa, bytes } = registers[index];
        assert!(LOW_RAM_END <= gpa && gpa + bytes <= RAM_ABOVE_HOLE);
        index += 1;
    }
};

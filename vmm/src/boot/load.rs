//! Writes the kernel, its traps, the initrd and the boot tables to guest memory.
//!
//! What stands there afterwards is what the 64-bit boot protocol asks for (`Documentation/arch/x86/boot.rst`, "64-bit
//! boot protocol"): long mode with the first 4 GiB mapped one to one, RSI pointing to the
//! zero page, flat segments. The addresses are those of [`super::layout`]; the registers are the caller's to load.

use hindsight_devices::Slot;
use hindsight_kernel::setup_header::{CMDLINE_SIZE, INIT_SIZE, INITRD_ADDR_MAX, SetupHeader};
use hindsight_kernel::{Elf, Kernel, Patch};

use super::acpi;
use super::error::{BootError, OutOfRam};
use super::layout::{
    ACPI_TABLES, ACPI_TABLES_BYTES, CODE_SELECTOR, COMMAND_LINE, COMMAND_LINE_BYTES,
    CONVENTIONAL_END, DATA_SELECTOR, GDT, GDT_LIMIT, HIGH_MEMORY, IDENTITY_GIB, INITRD_LIMIT,
    LOW_RAM_END, PAGE_DIRECTORIES, PDPT, PML4, RAM_ABOVE_HOLE, SETUP_DATA, STACK_TOP, ZERO_PAGE,
};
use super::zero_page::{E820_LIMIT, ZeroPage};

const PAGE: u64 = 4096;
/// E820 type of usable memory.
const E820_RAM: u32 = 1;
/// E820 type of memory that is not to be used.
const E820_RESERVED: u32 = 2;
/// Page table entry: present, writable, accessed. What the CPU would set by walking is set, so that walks write nothing.
const TABLE: u64 = 0x23;
/// Page directory entry: present, writable, accessed, dirty, and a page of 2 MiB.
const LARGE_PAGE: u64 = 0xe3;

/// Random bytes that the kernel is given at boot, as firmware would.
pub type Seed = [u8; 32];

/// Guest memory, as far as the loader needs it: zero at first, written once.
pub trait GuestRam {
    /// All RAM of the guest, in bytes.
    fn bytes(&self) -> u64;

    /// Writes `data` at guest physical address `gpa`.
    ///
    /// # Errors
    ///
    /// The range is not all RAM.
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), OutOfRam>;
}

/// One entry of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct E820Entry {
    /// First guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// 1 is usable memory, 2 is reserved (ACPI 6.5, 15.1).
    pub kind: u32,
}

/// What the vCPU's registers must hold for the first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BootPlan {
    /// RIP, mapped one to one.
    pub entry: u64,
    pub rsp: u64,
    /// RSI: the zero page.
    pub boot_params: u64,
    /// CR3.
    pub page_table: u64,
    /// GDTR's base.
    pub gdt_base: u64,
    /// GDTR's limit.
    pub gdt_limit: u16,
    /// CS.
    pub code_selector: u16,
    /// DS, ES, FS, GS and SS.
    pub data_selector: u16,
}

/// The memory map of a machine with `ram_bytes` of RAM: conventional memory, the ACPI tables, the rest up to 3 GiB, and
/// what is left from 4 GiB on. Between 3 and 4 GiB live devices.
pub fn e820(ram_bytes: u64) -> Vec<E820Entry> {
    let ram = |start: u64, end: u64| {
        (start < end).then(|| E820Entry {
            address: start,
            bytes: end - start,
            kind: E820_RAM,
        })
    };
    let tables = (ram_bytes >= ACPI_TABLES + ACPI_TABLES_BYTES).then_some(E820Entry {
        address: ACPI_TABLES,
        bytes: ACPI_TABLES_BYTES,
        kind: E820_RESERVED,
    });
    let above = ram_bytes.saturating_sub(LOW_RAM_END);
    [
        ram(0, ram_bytes.min(CONVENTIONAL_END)),
        tables,
        ram(HIGH_MEMORY, ram_bytes.min(LOW_RAM_END)),
        ram(RAM_ABOVE_HOLE, RAM_ABOVE_HOLE.saturating_add(above)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// What a kernel is given to boot with.
#[derive(Clone, Copy, Debug)]
pub struct BootParameters<'a> {
    /// The initial RAM disk; empty if there is none.
    pub initrd: &'a [u8],
    /// The command line.
    pub cmdline: &'a str,
    /// Where its random numbers begin.
    pub seed: &'a Seed,
    /// The memory map.
    pub regions: &'a [E820Entry],
    /// The virtio devices that ACPI shall tell of.
    pub slots: &'a [Slot],
}

/// Writes what is rewritten in a kernel over it.
///
/// # Errors
///
/// Memory that does not hold the kernel.
pub fn apply(ram: &mut dyn GuestRam, patches: &[Patch]) -> Result<(), OutOfRam> {
    patches
        .iter()
        .try_for_each(|patch| ram.write(patch.gpa, &patch.bytes))
}

/// Makes guest memory ready for the first instruction, and says what the registers must hold.
///
/// `ram` must be all zero where it has not been written; `patches` are what is rewritten in the kernel.
///
/// # Errors
///
/// Memory too small (with how much it takes), a command line too long, or a kernel that wants the boot tables' place.
/// Memory may then be half written.
pub fn load(
    ram: &mut dyn GuestRam,
    kernel: &Kernel,
    elf: &Elf<'_>,
    patches: &[Patch],
    parameters: &BootParameters<'_>,
) -> Result<BootPlan, BootError> {
    let BootParameters {
        initrd,
        cmdline,
        seed,
        regions,
        slots,
    } = *parameters;
    let header = SetupHeader(kernel.setup_header.as_deref());
    check_command_line(cmdline, header)?;
    if regions.len() > E820_LIMIT {
        return Err(BootError::MemoryMapTooLong {
            found: regions.len(),
            limit: E820_LIMIT,
        });
    }
    let low_end = low_memory_end(regions)?;
    let kernel_end = kernel_end(elf, header, low_end)?;
    let initrd_at = place_initrd(initrd.len() as u64, header, kernel_end, low_end)?;

    for segment in &elf.segments {
        ram.write(segment.physical_address, elf.bytes(&segment.file))?;
    }
    apply(ram, patches)?;

    let mut page = ZeroPage::new(header);
    page.command_line(COMMAND_LINE, cmdline.len());
    page.memory_map(regions);
    if let Some(gpa) = initrd_at {
        page.initrd(gpa, initrd.len() as u64);
        ram.write(gpa, initrd)?;
    }
    page.setup_data(SETUP_DATA);
    ram.write(SETUP_DATA, &seed_entry(seed))?;
    page.acpi_rsdp(ACPI_TABLES);
    ram.write(ACPI_TABLES, &acpi::tables(slots))?;
    ram.write(ZERO_PAGE, page.as_bytes())?;
    ram.write(COMMAND_LINE, cmdline.as_bytes())?;
    ram.write(COMMAND_LINE + cmdline.len() as u64, &[0])?;
    write_page_tables(ram)?;
    write_gdt(ram)?;
    Ok(BootPlan {
        entry: elf.entry,
        rsp: STACK_TOP,
        boot_params: ZERO_PAGE,
        page_table: PML4,
        gdt_base: GDT,
        gdt_limit: GDT_LIMIT,
        code_selector: CODE_SELECTOR,
        data_selector: DATA_SELECTOR,
    })
}

/// The entry of the setup data that seeds the kernel's random numbers: `struct setup_data` with no
/// next entry and type `SETUP_RNG_SEED` (Linux 6.0, arch/x86/include/uapi/asm/bootparam.h).
fn seed_entry(seed: &Seed) -> Vec<u8> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut entry = 0u64.to_le_bytes().to_vec();
    entry.extend(SETUP_RNG_SEED.to_le_bytes());
    entry.extend((seed.len() as u32).to_le_bytes());
    entry.extend(seed);
    entry
}

/// Refuses a command line that the kernel would not read to its end.
fn check_command_line(cmdline: &str, header: SetupHeader<'_>) -> Result<(), BootError> {
    let room = COMMAND_LINE_BYTES - 1;
    let limit = match header.u32(CMDLINE_SIZE) {
        // Before protocol 2.06 the field is absent and the limit 255.
        Some(0) => 255,
        Some(size) => (size as usize).min(room),
        None => room,
    };
    if cmdline.len() > limit {
        return Err(BootError::CommandLineTooLong {
            found: cmdline.len(),
            limit,
        });
    }
    match cmdline.bytes().position(|byte| byte == 0) {
        Some(at) => Err(BootError::CommandLineNul { at }),
        None => Ok(()),
    }
}

/// Where the RAM ends that begins at or below 1 MiB and holds the kernel.
fn low_memory_end(regions: &[E820Entry]) -> Result<u64, BootError> {
    regions
        .iter()
        .filter(|region| region.kind == E820_RAM && region.address <= HIGH_MEMORY)
        .map(|region| region.address.saturating_add(region.bytes))
        .find(|&end| end > HIGH_MEMORY)
        .map(|end| end.min(LOW_RAM_END))
        .ok_or(BootError::NoHighMemory)
}

/// First address that the kernel leaves alone while it sets up.
fn kernel_end(elf: &Elf<'_>, header: SetupHeader<'_>, low_end: u64) -> Result<u64, BootError> {
    for segment in &elf.segments {
        if segment.physical_address < HIGH_MEMORY {
            return Err(BootError::SegmentTooLow {
                address: segment.physical_address,
                expected: HIGH_MEMORY,
            });
        }
    }
    let start = elf
        .segments
        .iter()
        .map(|segment| segment.physical_address)
        .min()
        .unwrap_or(HIGH_MEMORY);
    let loaded = elf
        .segments
        .iter()
        .map(|segment| segment.physical_end())
        .max()
        .unwrap_or(start);
    let working = start.saturating_add(u64::from(header.u32(INIT_SIZE).unwrap_or(0)));
    let needed = loaded.max(working);
    if needed > low_end {
        return Err(BootError::MemoryTooSmall {
            what: "the kernel",
            needed,
            found: low_end,
        });
    }
    Ok(needed)
}

/// As high as the kernel can read it, so that it is out of the way; none for no initrd.
fn place_initrd(
    bytes: u64,
    header: SetupHeader<'_>,
    kernel_end: u64,
    low_end: u64,
) -> Result<Option<u64>, BootError> {
    if bytes == 0 {
        return Ok(None);
    }
    let reach = match header.u32(INITRD_ADDR_MAX) {
        None | Some(0) => INITRD_LIMIT,
        Some(last) => u64::from(last) + 1,
    };
    let lowest = kernel_end.next_multiple_of(PAGE);
    let needed = lowest.saturating_add(bytes.next_multiple_of(PAGE));
    if needed > reach {
        return Err(BootError::InitrdTooLarge {
            bytes,
            lowest,
            highest: reach,
        });
    }
    if needed > low_end {
        return Err(BootError::MemoryTooSmall {
            what: "the kernel with its initrd",
            needed,
            found: low_end,
        });
    }
    let place = (low_end.min(reach) - bytes) & !(PAGE - 1);
    assert!(
        place >= lowest,
        "initrd at {place:#x} below the kernel's end {lowest:#x}"
    );
    Ok(Some(place))
}

/// Maps the first 4 GiB one to one, 2 MiB a page (Intel SDM vol. 3, 4.5.4).
fn write_page_tables(ram: &mut dyn GuestRam) -> Result<(), OutOfRam> {
    ram.write(PML4, &(PDPT | TABLE).to_le_bytes())?;
    for gib in 0..IDENTITY_GIB {
        let directory = PAGE_DIRECTORIES + gib * PAGE;
        ram.write(PDPT + gib * 8, &(directory | TABLE).to_le_bytes())?;
        let entries: Vec<u8> = (0..512_u64)
            .flat_map(|index| ((gib << 30) | (index << 21) | LARGE_PAGE).to_le_bytes())
            .collect();
        ram.write(directory, &entries)?;
    }
    Ok(())
}

/// Null, unused, 64-bit code, data; both flat, and already marked accessed so that loading them writes nothing.
fn write_gdt(ram: &mut dyn GuestRam) -> Result<(), OutOfRam> {
    let table = [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
    ram.write(GDT, table.map(u64::to_le_bytes).as_flattened())
}

#[cfg(test)]
mod tests;

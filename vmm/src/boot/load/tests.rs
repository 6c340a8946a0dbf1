//! What stands in guest memory after loading, and what is refused before.

use super::*;
use hindsight_kernel::rewrite::traps;
use hindsight_kernel::setup_header::{CMD_LINE_PTR, RAMDISK_IMAGE, RAMDISK_SIZE, TYPE_OF_LOADER};
use hindsight_kernel::testing::{Image, TINY_PHYSICAL, debian_kernels, tiny_elf};
use hindsight_kernel::unpack;

struct Ram(Vec<u8>);

impl std::fmt::Debug for Ram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of RAM", self.0.len())
    }
}

impl GuestRam for Ram {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), OutOfRam> {
        let error = OutOfRam {
            gpa,
            bytes: data.len() as u64,
            ram_bytes: self.bytes(),
        };
        let start = usize::try_from(gpa).map_err(|_| error)?;
        let end = start.checked_add(data.len()).ok_or(error)?;
        self.0
            .get_mut(start..end)
            .ok_or(error)?
            .copy_from_slice(data);
        Ok(())
    }
}

impl Ram {
    fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.0[gpa as usize..][..4].try_into().unwrap())
    }

    fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.0[gpa as usize..][..8].try_into().unwrap())
    }
}

const CODE: [u8; 6] = [0x90, 0x0f, 0x31, 0x0f, 0x01, 0xf9];

fn boot(
    kernel: &Kernel,
    ram_bytes: usize,
    initrd: &[u8],
    cmdline: &str,
) -> Result<(Ram, BootPlan), BootError> {
    let elf = Elf::parse(&kernel.elf)?;
    let sites = traps::find(&elf, &[])?;
    let mut ram = Ram(vec![0; ram_bytes]);
    let plan = load(
        &mut ram,
        kernel,
        &elf,
        &sites.patches(&elf)?,
        &BootParameters {
            initrd,
            cmdline,
            seed: &[0x5a; 32],
            regions: &e820(ram_bytes as u64),
            slots: &[],
        },
    )?;
    Ok((ram, plan))
}

fn tiny() -> Kernel {
    unpack(&Image::gzip(&tiny_elf(&CODE)).build()).unwrap()
}

#[test]
fn a_kernel_is_loaded_with_its_traps_in_place() {
    let (ram, plan) = boot(&tiny(), 32 << 20, b"initrd", "console=ttyS0").unwrap();
    assert_eq!(plan.entry, TINY_PHYSICAL);
    assert_eq!(
        ram.0[TINY_PHYSICAL as usize..][..7],
        [0x90, 0xe6, 0xf1, 0xe6, 0xf2, 0x90, 0]
    );
}

#[test]
fn the_zero_page_says_where_everything_is() {
    let (ram, plan) = boot(&tiny(), 32 << 20, &[7; 5000], "console=ttyS0").unwrap();
    let page = plan.boot_params;
    assert_eq!(&ram.0[page as usize + 0x202..][..4], b"HdrS");
    assert_eq!(ram.0[page as usize + TYPE_OF_LOADER], 0xff);
    assert_eq!(ram.u32(page + CMD_LINE_PTR as u64), 0x2_0000);
    assert_eq!(&ram.0[0x2_0000..][..14], b"console=ttyS0\0");
    let at = u64::from(ram.u32(page + RAMDISK_IMAGE as u64));
    assert_eq!(at, (32 << 20) - 8192);
    assert_eq!(ram.u32(page + RAMDISK_SIZE as u64), 5000);
    assert_eq!(
        ram.0[at as usize..][..5001],
        [vec![7; 5000], vec![0]].concat()
    );
    assert_eq!(ram.0[page as usize + 0x1e8], 3);
    for (entry, address, bytes, kind) in [(1, 0xe_0000, 0x2_0000, 2), (2, 0x10_0000, 31 << 20, 1)] {
        let at = page + 0x2d0 + 20 * entry;
        assert_eq!((ram.u64(at), ram.u64(at + 8)), (address, bytes));
        assert_eq!(ram.u32(at + 16), kind);
    }
    let rsdp = ram.u64(page + 0x70);
    assert_eq!(&ram.0[rsdp as usize..][..8], b"RSD PTR ");
}

#[test]
fn a_vmlinux_gets_a_plain_setup_header() {
    let kernel = unpack(&tiny_elf(&CODE)).unwrap();
    let (ram, plan) = boot(&kernel, 32 << 20, &[], "quiet").unwrap();
    let page = plan.boot_params;
    assert_eq!(&ram.0[page as usize + 0x202..][..4], b"HdrS");
    assert_eq!(ram.u32(page + CMDLINE_SIZE as u64), 5);
    assert_eq!(
        (
            ram.u32(page + RAMDISK_IMAGE as u64),
            ram.u32(page + RAMDISK_SIZE as u64)
        ),
        (0, 0)
    );
}

#[test]
fn every_address_of_the_first_4_gib_is_mapped_to_itself() {
    let (ram, plan) = boot(&tiny(), 32 << 20, &[], "").unwrap();
    for address in (0..4_u64 << 30).step_by(2 << 20) {
        let pdpt = ram.u64(plan.page_table) & !0xfff;
        let directory = ram.u64(pdpt + (address >> 30) * 8) & !0xfff;
        let entry = ram.u64(directory + ((address >> 21) & 511) * 8);
        assert_eq!(entry, address | 0xe3);
    }
}

#[test]
fn too_little_memory_is_refused_with_how_much_it_takes() {
    // init_size of the test image is 3 MiB from 16 MiB on.
    let error = boot(&tiny(), 18 << 20, &[], "").unwrap_err();
    assert_eq!(
        error,
        BootError::MemoryTooSmall {
            what: "the kernel",
            needed: 19 << 20,
            found: 18 << 20
        }
    );
    let initrd = vec![0; 5000];
    let error = boot(&tiny(), 19 << 20, &initrd, "").unwrap_err();
    let needed = (19 << 20) + 8192;
    assert_eq!(
        error,
        BootError::MemoryTooSmall {
            what: "the kernel with its initrd",
            needed,
            found: 19 << 20
        }
    );
    assert!(error.to_string().contains("(20 MiB)"), "{error}");
    assert!(boot(&tiny(), (19 << 20) + 8192, &initrd, "").is_ok());
    assert_eq!(
        boot(&tiny(), 1 << 20, &[], "").unwrap_err(),
        BootError::NoHighMemory
    );
}

#[test]
fn a_command_line_that_the_kernel_would_not_read_is_refused() {
    assert!(boot(&tiny(), 32 << 20, &[], &"x".repeat(2047)).is_ok());
    let error = boot(&tiny(), 32 << 20, &[], &"x".repeat(2048)).unwrap_err();
    assert_eq!(
        error,
        BootError::CommandLineTooLong {
            found: 2048,
            limit: 2047
        }
    );
    assert_eq!(
        boot(&tiny(), 32 << 20, &[], "a\0b").unwrap_err(),
        BootError::CommandLineNul { at: 1 }
    );
}

#[test]
fn a_segment_in_the_boot_tables_place_is_refused() {
    let mut kernel = tiny();
    kernel.elf[64 + 24..64 + 32].copy_from_slice(&0x9000_u64.to_le_bytes());
    kernel.elf[24..32].copy_from_slice(&0x9000_u64.to_le_bytes());
    let error = boot(&kernel, 32 << 20, &[], "").unwrap_err();
    assert_eq!(
        error,
        BootError::SegmentTooLow {
            address: 0x9000,
            expected: 0x10_0000
        }
    );
}

#[test]
fn the_initrd_stays_below_what_the_kernel_can_read() {
    let mut kernel = tiny();
    let at = INITRD_ADDR_MAX - hindsight_kernel::setup_header::SETUP_HEADER;
    let header = kernel.setup_header.as_mut().unwrap();
    header[at..at + 4].copy_from_slice(&0x013f_ffff_u32.to_le_bytes());
    let (ram, plan) = boot(&kernel, 32 << 20, &[1; 4096], "").unwrap();
    assert_eq!(
        ram.u32(plan.boot_params + RAMDISK_IMAGE as u64),
        0x013f_f000
    );
    let error = boot(&kernel, 32 << 20, &vec![1; 2 << 20], "").unwrap_err();
    assert!(
        matches!(
            error,
            BootError::InitrdTooLarge {
                lowest: 0x130_0000,
                highest: 0x140_0000,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn the_memory_map_leaves_out_the_acpi_tables_and_the_device_hole_between_3_and_4_gib() {
    let ram = |address, bytes| E820Entry {
        address,
        bytes,
        kind: 1,
    };
    let tables = E820Entry {
        address: 0xe_0000,
        bytes: 0x2_0000,
        kind: 2,
    };
    assert_eq!(
        e820(256 << 20),
        [ram(0, 0x9fc00), tables, ram(0x10_0000, 255 << 20)]
    );
    assert_eq!(
        e820(3 << 30),
        [
            ram(0, 0x9fc00),
            tables,
            ram(0x10_0000, (3 << 30) - 0x10_0000)
        ]
    );
    let five = [
        ram(0, 0x9fc00),
        tables,
        ram(0x10_0000, (3 << 30) - 0x10_0000),
        ram(4 << 30, 2 << 30),
    ];
    assert_eq!(e820(5 << 30), five);
    assert_eq!(e820(0), []);
}

#[test]
fn debians_kernels_fit_in_256_mib_with_a_large_initrd() {
    for (path, image) in debian_kernels() {
        let kernel = unpack(&image).unwrap();
        let (ram, plan) = boot(&kernel, 256 << 20, &vec![3; 100 << 20], "console=ttyS0").unwrap();
        let elf = Elf::parse(&kernel.elf).unwrap();
        let code = elf.code.iter().any(|code| {
            let start = elf.physical(code.address).unwrap();
            (start..start + code.file.len() as u64).contains(&plan.entry)
        });
        assert!(code, "{path}: {:#x}", plan.entry);
        assert_eq!(ram.0.last(), Some(&3));
    }
}

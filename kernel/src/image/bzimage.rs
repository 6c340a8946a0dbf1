//! Takes a bzImage apart: the setup header in front, the compressed kernel inside.
//!
//! A bzImage carries its own decompressor, which would run in the guest, choose addresses and
//! read the clock on the way. So the payload is unpacked here instead: the guest then begins in
//! the kernel proper, and its code is there to be searched for trap sites before it runs.

use serde::{Deserialize, Serialize};

use crate::error::KernelError;
use crate::image::formats;
use crate::image::payload;
use crate::image::setup_header::{
    BOOT_FLAG, BOOT_FLAG_MAGIC, HDRS, HEADER_JUMP, HEADER_MAGIC, KERNEL_VERSION, LOADFLAGS,
    PAYLOAD_LENGTH, PAYLOAD_OFFSET, PROTOCOL, SETUP_HEADER, SETUP_HEADER_END, SETUP_SECTS,
    XLOADFLAGS,
};

/// Boot protocol that brought `payload_offset` (Linux 2.6.26).
const PROTOCOL_WITH_PAYLOAD: u16 = 0x0208;
/// Boot protocol that brought `xloadflags` (Linux 3.8).
const PROTOCOL_WITH_XLOADFLAGS: u16 = 0x020c;
/// `LOADED_HIGH` in loadflags.
const LOADED_HIGH: u8 = 1;
/// `XLF_KERNEL_64` in xloadflags.
const XLF_KERNEL_64: u16 = 1;
const SECTOR_BYTES: usize = 512;
/// A vmlinux with its debugging information is longer than what a bzImage holds.
const ELF_LIMIT: u64 = 1 << 30;
/// The version string is a line; a longer one is not a version.
const VERSION_LIMIT: usize = 512;

/// A kernel, unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// The kernel proper, an ELF file. Not part of what serde writes: it is kept beside.
    #[serde(skip)]
    pub elf: Vec<u8>,
    /// What the setup header says of itself (`6.1.0-56-amd64 (…) #1 SMP …`), or empty.
    pub version: String,
    /// Bytes 0x1f1 and following of the bzImage, as long as the header says it is; none for a vmlinux.
    pub setup_header: Option<Vec<u8>>,
    /// How the payload was compressed: `gzip`, `bzip2`, `lzma`, `xz`, `lzo`, `lz4`, `zstd`, or `none`.
    pub compression: String,
}

/// Unpacks a bzImage, or takes an ELF file (a vmlinux) as it is.
///
/// # Errors
///
/// Says what is wrong with the file: not a kernel, cut short, for another machine, or damaged. The unpacked
/// kernel is limited to 256 MiB.
pub fn unpack(image: &[u8]) -> Result<Kernel, KernelError> {
    if image.starts_with(b"\x7fELF") {
        let (found, limit) = (image.len() as u64, ELF_LIMIT);
        if found > limit {
            return Err(KernelError::TooLarge { found, limit });
        }
        return Ok(Kernel {
            elf: image.to_vec(),
            version: String::new(),
            setup_header: None,
            compression: "none".into(),
        });
    }
    let is_boot_sector = image
        .get(BOOT_FLAG..BOOT_FLAG + 2)
        .is_some_and(|flag| flag == BOOT_FLAG_MAGIC.to_le_bytes());
    if !is_boot_sector || u32_at(image, HEADER_MAGIC)? != HDRS {
        if let Some((what, advice)) = formats::name(image) {
            return Err(KernelError::OtherFormat { what, advice });
        }
        if image.len() >= BOOT_FLAG + 2 && !is_boot_sector {
            let found = image[..8].to_vec();
            return Err(KernelError::NotAKernel { found });
        }
    }
    let magic = u32_at(image, HEADER_MAGIC)?;
    if magic != HDRS {
        return Err(KernelError::NoSetupHeader { found: magic });
    }
    check_flags(image)?;

    let setup_bytes = match byte_at(image, SETUP_SECTS)? {
        // "For backwards compatibility, if setup_sects is 0, the real value is 4" (boot.rst).
        0 => 5 * SECTOR_BYTES,
        sectors => (usize::from(sectors) + 1) * SECTOR_BYTES,
    };
    let start = setup_bytes as u64 + u64::from(u32_at(image, PAYLOAD_OFFSET)?);
    let end = start + u64::from(u32_at(image, PAYLOAD_LENGTH)?);
    let found = image.len() as u64;
    if end > found {
        return Err(KernelError::Truncated {
            what: "the compressed kernel",
            needed: end,
            found,
        });
    }
    // Both fit a usize, being no larger than the file.
    let (elf, compression) = payload::unpack(&image[start as usize..end as usize])?;
    Ok(Kernel {
        elf,
        version: version(image, setup_bytes),
        setup_header: Some(setup_header(image)?.to_vec()),
        compression: compression.into(),
    })
}

/// Refuses kernels that cannot be entered in 64-bit mode or do not say where their payload is.
fn check_flags(image: &[u8]) -> Result<(), KernelError> {
    let protocol = u16_at(image, PROTOCOL)?;
    if protocol < PROTOCOL_WITH_PAYLOAD {
        return Err(KernelError::OldProtocol { found: protocol });
    }
    let loadflags = byte_at(image, LOADFLAGS)?;
    if loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::NotLoadedHigh { loadflags });
    }
    let xloadflags = u16_at(image, XLOADFLAGS)?;
    // Older 64-bit kernels have no such flag; the ELF header inside tells.
    if protocol >= PROTOCOL_WITH_XLOADFLAGS && xloadflags & XLF_KERNEL_64 == 0 {
        let (found, expected) = (u64::from(xloadflags), u64::from(xloadflags | XLF_KERNEL_64));
        return Err(KernelError::NotX86_64 {
            what: "xloadflags",
            found,
            expected,
        });
    }
    Ok(())
}

/// The setup header: up to where the jump over it lands, and no further than the zero page has room.
fn setup_header(image: &[u8]) -> Result<&[u8], KernelError> {
    let end = HEADER_MAGIC + usize::from(byte_at(image, HEADER_JUMP)?);
    // It reaches at least over the payload fields, which were read.
    slice(
        image,
        "the setup header",
        SETUP_HEADER,
        end.clamp(PAYLOAD_LENGTH + 4, SETUP_HEADER_END),
    )
}

/// The version string, or nothing where the pointer leads outside the setup code.
fn version(image: &[u8], setup_bytes: usize) -> String {
    let Ok(pointer @ 1..) = u16_at(image, KERNEL_VERSION) else {
        return String::new();
    };
    let Some(text) = image.get(usize::from(pointer) + 0x200..setup_bytes.min(image.len())) else {
        return String::new();
    };
    let end = text
        .iter()
        .take(VERSION_LIMIT)
        .position(|&byte| byte == 0)
        .unwrap_or(0);
    String::from_utf8_lossy(&text[..end]).into_owned()
}

fn slice<'a>(
    image: &'a [u8],
    what: &'static str,
    start: usize,
    end: usize,
) -> Result<&'a [u8], KernelError> {
    image.get(start..end).ok_or(KernelError::Truncated {
        what,
        needed: end as u64,
        found: image.len() as u64,
    })
}

fn byte_at(image: &[u8], offset: usize) -> Result<u8, KernelError> {
    Ok(slice(image, "the setup header", offset, offset + 1)?[0])
}

fn u16_at(image: &[u8], offset: usize) -> Result<u16, KernelError> {
    let bytes = slice(image, "the setup header", offset, offset + 2)?;
    Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
}

fn u32_at(image: &[u8], offset: usize) -> Result<u32, KernelError> {
    let bytes = slice(image, "the setup header", offset, offset + 4)?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Image, debian_kernels, tiny_elf};

    #[test]
    fn a_vmlinux_is_taken_as_it_is() {
        let elf = tiny_elf(&[0x0f, 0x31]);
        let kernel = unpack(&elf).unwrap();
        assert_eq!(kernel.elf, elf);
        assert_eq!(kernel.compression, "none");
        assert_eq!(kernel.setup_header, None);
    }

    #[test]
    fn a_bzimage_gives_its_kernel_its_version_and_its_header() {
        let elf = tiny_elf(&[0x0f, 0x31]);
        let kernel = unpack(&Image::gzip(&elf).build()).unwrap();
        assert_eq!(kernel.elf, elf);
        assert_eq!(kernel.version, "6.1.0-test");
        let header = kernel.setup_header.unwrap();
        assert_eq!(&header[HEADER_MAGIC - SETUP_HEADER..][..4], b"HdrS");
        assert_eq!(header.len(), 0x202 + 0x6a - SETUP_HEADER);
    }

    #[test]
    fn an_image_cut_at_any_byte_is_refused_and_never_a_panic() {
        let image = Image::gzip(&tiny_elf(&[0x0f, 0x31])).build();
        for length in 0..image.len() {
            assert!(
                unpack(&image[..length]).is_err(),
                "accepted at {length} of {} bytes",
                image.len()
            );
        }
    }

    #[test]
    fn an_image_with_any_header_byte_spoilt_is_unpacked_or_refused_and_never_a_panic() {
        let image = Image::gzip(&tiny_elf(&[0x0f, 0x31])).build();
        for offset in SETUP_HEADER..SETUP_HEADER_END {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut spoilt = image.clone();
                spoilt[offset] = value;
                let _ = unpack(&spoilt);
            }
        }
    }

    #[test]
    fn what_is_not_a_kernel_is_named_as_such() {
        assert!(matches!(unpack(&[7]), Err(KernelError::Truncated { .. })));
        assert!(matches!(
            unpack(&[7; 4096]),
            Err(KernelError::NotAKernel { .. })
        ));
        let mut image = Image::gzip(b"x");
        image.protocol = 0x0207;
        assert_eq!(
            unpack(&image.build()),
            Err(KernelError::OldProtocol { found: 0x0207 })
        );
        let mut image = Image::gzip(b"x");
        image.loadflags = 0;
        assert_eq!(
            unpack(&image.build()),
            Err(KernelError::NotLoadedHigh { loadflags: 0 })
        );
        let mut image = Image::gzip(b"x");
        image.xloadflags = 2;
        assert!(matches!(
            unpack(&image.build()),
            Err(KernelError::NotX86_64 {
                found: 2,
                expected: 3,
                ..
            })
        ));
    }

    #[test]
    fn other_files_are_named_with_what_to_do() {
        let at = |offset: usize, bytes: &[u8]| {
            let mut file = vec![0; 4096];
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
            file
        };
        let mut uki = at(0, b"MZ");
        uki[0x3c] = 0x80;
        uki[0x80..0x84].copy_from_slice(b"PE\0\0");
        uki[0x86] = 2; // sections
        uki[0x98 + 40..][..6].copy_from_slice(b".linux");
        let mut efi = uki.clone();
        efi[0x98 + 40..][..6].copy_from_slice(b".reloc");
        for (file, name) in [
            (at(0, &[0x1f, 0x8b]), "gzip"),
            (at(0, b"\xfd7zXZ\0"), "xz"),
            (at(0, &[0x28, 0xb5, 0x2f, 0xfd]), "zstd"),
            (b"BZh9".to_vec(), "bzip2"),
            (at(0x38, b"ARMd"), "64-bit ARM"),
            (at(0x24, &[0x18, 0x28, 0x6f, 0x01]), "32-bit ARM"),
            (at(0x38, b"RSC\x05"), "RISC-V"),
            (at(0, b"MZ\0\0zimg"), "EFI zboot"),
            (uki, "unified kernel image"),
            (efi, "EFI program"),
            (at(0, b"070701"), "cpio"),
            (at(0, b"!<arch>\n"), "package"),
            (at(0, &[0x27, 0x05, 0x19, 0x56]), "U-Boot"),
            (at(0, &[0xd0, 0x0d, 0xfe, 0xed]), "device tree"),
            (at(0, b"QFI\xfb"), "image of a disk"),
            (at(0x1fe, &[0x55, 0xaa]), "boot sector"),
            (b"#!/bin/sh\n".to_vec(), "script"),
            (Vec::new(), "empty"),
        ] {
            let error = unpack(&file).unwrap_err();
            assert!(matches!(error, KernelError::OtherFormat { .. }), "{error}");
            assert!(error.to_string().contains(name), "{name}: {error}");
        }
    }

    #[test]
    fn a_payload_that_reaches_past_the_file_is_refused_before_it_is_read() {
        let mut image = Image::gzip(b"x").build();
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 8].fill(0xff);
        let error = unpack(&image).unwrap_err();
        assert!(
            matches!(
                error,
                KernelError::Truncated {
                    what: "the compressed kernel",
                    ..
                }
            ),
            "{error}"
        );
    }

    #[test]
    fn a_version_pointer_to_nowhere_gives_no_version() {
        let mut image = Image::gzip(b"x").build();
        image[KERNEL_VERSION..KERNEL_VERSION + 2].fill(0xff);
        assert_eq!(unpack(&image).unwrap().version, "");
    }

    #[test]
    fn debians_kernels_unpack_to_elf_files() {
        for (path, image) in debian_kernels() {
            let started = std::time::Instant::now();
            let kernel = unpack(&image).unwrap();
            eprintln!(
                "{path}: {} {:?}, {:?}",
                kernel.compression,
                kernel.version,
                started.elapsed()
            );
            assert!(kernel.elf.starts_with(b"\x7fELF"));
            assert!(
                path.ends_with(kernel.version.split(' ').next().unwrap()),
                "{path}"
            );
        }
    }
}

//! Names files that are given for a kernel and cannot be booted here, and says what to do with each.
//!
//! A kernel is most often refused because it is packed once more, or for another architecture, or because another file of
//! the same directory was meant. The first bytes tell.

/// Bytes at an offset, what a file with them is, and what to do.
type Signature = (usize, &'static [u8], &'static str, &'static str);

const UNPACK: &str = "unpack it first";
const OTHER_MACHINE: &str = "Hindsight runs x86-64 kernels only";

/// The first that fits is taken.
const SIGNATURES: [Signature; 25] = [
    (0, &[0x1f, 0x8b], "compressed with gzip", UNPACK),
    (0, b"\xfd7zXZ\0", "compressed with xz", UNPACK),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], "compressed with zstd", UNPACK),
    (0, b"BZh", "compressed with bzip2", UNPACK),
    (0, &[0x04, 0x22, 0x4d, 0x18], "compressed with lz4", UNPACK),
    (0, &[0x02, 0x21, 0x4c, 0x18], "compressed with lz4", UNPACK),
    (0, b"\x89LZO", "compressed with lzop", UNPACK),
    (0, &[0x5d, 0x00, 0x00], "compressed with lzma", UNPACK),
    (
        4,
        b"zimg",
        "an EFI zboot image of another architecture's kernel",
        OTHER_MACHINE,
    ),
    (0x38, b"ARMd", "a kernel for 64-bit ARM", OTHER_MACHINE),
    (0x38, b"RSC\x05", "a kernel for RISC-V", OTHER_MACHINE),
    (
        0x38,
        &[0xcd, 0x23, 0x82, 0x81],
        "a kernel for LoongArch",
        OTHER_MACHINE,
    ),
    (
        0x24,
        &[0x18, 0x28, 0x6f, 0x01],
        "a kernel for 32-bit ARM",
        OTHER_MACHINE,
    ),
    (
        0,
        &[0x27, 0x05, 0x19, 0x56],
        "an image for U-Boot",
        OTHER_MACHINE,
    ),
    (
        0,
        &[0xd0, 0x0d, 0xfe, 0xed],
        "a flattened device tree or a FIT image",
        OTHER_MACHINE,
    ),
    (
        0,
        b"070701",
        "a cpio archive, such as an initrd",
        "give it as --initrd",
    ),
    (
        0,
        b"070702",
        "a cpio archive, such as an initrd",
        "give it as --initrd",
    ),
    (
        0,
        b"070707",
        "a cpio archive, such as an initrd",
        "give it as --initrd",
    ),
    (
        0,
        b"!<arch>\n",
        "an archive, such as a package of Debian's",
        "unpack it: dpkg-deb -x FILE DIRECTORY",
    ),
    (
        0,
        &[0xed, 0xab, 0xee, 0xdb],
        "a package of RPM's",
        "unpack it: rpm2cpio FILE | cpio -id",
    ),
    (
        0,
        b"QFI\xfb",
        "an image of a disk (qcow2)",
        "give the kernel in it, and the image as --disk",
    ),
    (
        0,
        b"KDMV",
        "an image of a disk (VMDK)",
        "give the kernel in it, and the image as --disk",
    ),
    (
        0,
        b"#!",
        "a script",
        "give the kernel itself, such as /boot/vmlinuz-*",
    ),
    (
        0x202,
        b"HdrS",
        "cut or damaged: a kernel whose boot sector has no signature",
        "fetch it again",
    ),
    (
        0x1fe,
        &[0x55, 0xaa],
        "a boot sector without Linux's setup header, such as a disk's",
        "give the kernel itself, such as /boot/vmlinuz-*",
    ),
];

/// What a file is that is no bzImage and no ELF file, and what to do with it; `None` if it is not known.
pub(crate) fn name(file: &[u8]) -> Option<(&'static str, &'static str)> {
    if file.is_empty() {
        return Some(("empty", "fetch it again"));
    }
    let fits = |&&(offset, bytes, ..): &&Signature| {
        file.get(offset..).is_some_and(|at| at.starts_with(bytes))
    };
    let found = SIGNATURES.iter().find(fits);
    // A PE file has a boot sector of any kind; what the table says of ARM and others comes first.
    match found {
        Some(&(offset, _, what, advice)) if offset != 0x1fe => Some((what, advice)),
        found => program(file).or(found.map(|&(.., what, advice)| (what, advice))),
    }
}

/// What an EFI program is: systemd's stub has the kernel in a section of its own.
fn program(file: &[u8]) -> Option<(&'static str, &'static str)> {
    // PE Format (Microsoft), "MS-DOS Stub", "COFF File Header", "Section Table".
    const SECTION_BYTES: usize = 40;
    if !file.starts_with(b"MZ") {
        return None;
    }
    let field = |at: usize, bytes: usize| {
        let found = file.get(at..at.checked_add(bytes)?)?;
        Some(
            found
                .iter()
                .rev()
                .fold(0, |value, &byte| value << 8 | usize::from(byte)),
        )
    };
    let head = field(0x3c, 4)?;
    if file.get(head..)?.get(..4)? != b"PE\0\0" {
        return Some((
            "a DOS program",
            "give the kernel itself, such as /boot/vmlinuz-*",
        ));
    }
    let (count, optional) = (field(head + 6, 2)?, field(head + 20, 2)?);
    let sections = file.get(head + 24 + optional..).unwrap_or(&[]);
    let mut names = sections
        .chunks_exact(SECTION_BYTES)
        .take(count)
        .map(|section| &section[..8]);
    Some(match names.any(|name| name == b".linux\0\0") {
        true => (
            "a unified kernel image (UKI)",
            "take the kernel out of it: objcopy -O binary --only-section=.linux FILE vmlinuz",
        ),
        false => (
            "an EFI program that is no Linux kernel",
            "give the kernel itself, such as /boot/vmlinuz-*",
        ),
    })
}

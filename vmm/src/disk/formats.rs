//! Files that hold a disk and are not raw images of one, recognised by what they begin or end with.

use super::BLOCK_BYTES;

const CONVERT: &str = "convert it: qemu-img convert -O raw FILE disk.img";
const UNPACK: &str = "unpack it first";

/// A kind of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// What it is, with its article.
    pub name: &'static str,
    /// What makes a raw image of it.
    pub advice: &'static str,
}

const fn format(name: &'static str, advice: &'static str) -> Format {
    Format { name, advice }
}

/// Where the bytes are, what they are, and what has them.
const MAGICS: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb", format("a qcow2 image", CONVERT)),
    (0, b"QED\0", format("a QED image", CONVERT)),
    (0, b"KDMV", format("a VMDK image", CONVERT)),
    (0, b"COWD", format("a VMDK image", CONVERT)),
    (
        0,
        b"# Disk DescriptorFile",
        format("the description of a VMDK image", CONVERT),
    ),
    (64, b"\x7f\x10\xda\xbe", format("a VDI image", CONVERT)),
    (0, b"vhdxfile", format("a VHDX image", CONVERT)),
    (0, b"conectix", format("a VHD image", CONVERT)),
    (0, b"WithoutFreeSpace", format("a Parallels image", CONVERT)),
    (0, b"WithouFreSpacExt", format("a Parallels image", CONVERT)),
    (
        0,
        b"EVF\x09\x0d\x0a\xff\x00",
        format("an E01 image (EWF)", EXPORT),
    ),
    (
        0,
        b"EVF2\x0d\x0a\x81\x00",
        format("an Ex01 image (EWF)", EXPORT),
    ),
    (
        0,
        b"LVF\x09\x0d\x0a\xff\x00",
        format("an L01 image (EWF)", EXPORT),
    ),
    (
        0,
        b"AFF10\r\n\0",
        format("an AFF image", "convert it: affconvert -r FILE"),
    ),
    (
        0,
        b"\x3a\xff\x26\xed",
        format(
            "a sparse image of Android",
            "convert it: simg2img FILE disk.img",
        ),
    ),
    (0, b"\x1f\x8b\x08", format("packed with gzip", UNPACK)),
    (0, b"\xfd7zXZ\0", format("packed with xz", UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", format("packed with zstd", UNPACK)),
    (0, b"\x04\x22\x4d\x18", format("packed with lz4", UNPACK)),
    (0, b"LZIP\x01", format("packed with lzip", UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", format("a 7z archive", UNPACK)),
    (
        0,
        b"PK\x03\x04",
        format("a zip archive, or an AFF4 image", UNPACK),
    ),
];
const EXPORT: &str = "convert it: ewfexport -f raw FILE";
const BZIP2: Format = format("packed with bzip2", UNPACK);
const VHD: Format = format("a VHD image", CONVERT);
const DMG: Format = format("a DMG image", CONVERT);

/// How many bytes of the beginning and of the end are wanted.
pub(super) const HEAD_BYTES: u64 = BLOCK_BYTES;
pub(super) const TAIL_BYTES: u64 = 512;

/// What a file with this beginning and end is; `None` for a raw image.
pub(super) fn format_of(head: &[u8], tail: &[u8]) -> Option<Format> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((.., format)) = MAGICS.iter().find(|(at, magic, _)| has(*at, magic)) {
        return Some(*format);
    }
    // "BZh", a digit, and the first block's mark.
    if has(0, b"BZh") && has(4, b"1AY&SY") {
        return Some(BZIP2);
    }
    if is_vhd_footer(tail) {
        return Some(VHD);
    }
    (tail.starts_with(b"koly\0\0\0\x04\0\0\x02\0")).then_some(DMG)
}

/// A VHD of a fixed size is a raw image with a sector more, which has a checksum.
fn is_vhd_footer(tail: &[u8]) -> bool {
    const CHECKSUM: std::ops::Range<usize> = 64..68;
    if tail.len() != TAIL_BYTES as usize || !tail.starts_with(b"conectix") {
        return false;
    }
    let sum = |bytes: &[u8]| bytes.iter().map(|byte| u32::from(*byte)).sum::<u32>();
    let found = tail[CHECKSUM]
        .iter()
        .fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    !(sum(tail) - sum(&tail[CHECKSUM])) == found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_image_is_none_of_them() {
        let mut head = vec![0; 4096];
        assert_eq!(format_of(&head, &[0; 512]), None);
        head[510..512].copy_from_slice(&[0x55, 0xaa]);
        head[512..520].copy_from_slice(b"EFI PART");
        assert_eq!(format_of(&head, b"conectix"), None);
        // The end of a disk that has the word and not the checksum.
        let mut tail = [0; 512];
        tail[..8].copy_from_slice(b"conectix");
        assert_eq!(format_of(&head, &tail), None);
        tail[64..68].copy_from_slice(
            &(!(b"conectix".iter().map(|byte| u32::from(*byte)).sum::<u32>())).to_be_bytes(),
        );
        assert_eq!(format_of(&head, &tail), Some(VHD));
        assert_eq!(format_of(&[], &[]), None);
    }

    #[test]
    fn what_tools_write_is_told_by_name() {
        let text = b"# Disk DescriptorFile\nversion=1\n";
        assert_eq!(
            format_of(text, text).unwrap().name,
            "the description of a VMDK image"
        );
        let mut vdi =
            *b"<<< Oracle VM VirtualBox Disk Image >>>\n........................\x7f\x10\xda\xbe";
        assert_eq!(format_of(&vdi, &[]).unwrap().name, "a VDI image");
        vdi[64] = 0;
        assert_eq!(format_of(&vdi, &[]), None);
        let bzip2 = [&b"BZh9"[..], b"1AY&SY"].concat();
        assert_eq!(format_of(&bzip2, &[]), Some(BZIP2));
        assert_eq!(
            format_of(b"EVF\x09\x0d\x0a\xff\x00\x01", &[])
                .unwrap()
                .advice,
            EXPORT
        );
    }
}

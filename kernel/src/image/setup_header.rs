//! The setup header: what a kernel says of itself to a boot loader.
//!
//! Offsets follow `Documentation/arch/x86/boot.rst`, and are counted as in the zero page, where the header
//! is at the same offsets as in a bzImage's first sectors.

/// Where the setup header begins, in the file and in the zero page.
pub const SETUP_HEADER: usize = 0x1f1;
/// First byte after the longest setup header that the zero page has room for.
pub const SETUP_HEADER_END: usize = 0x290;
/// u8: sectors of real-mode code after the first; 0 means 4.
pub const SETUP_SECTS: usize = 0x1f1;
/// u16: 0xaa55.
pub const BOOT_FLAG: usize = 0x1fe;
/// u8: distance from 0x202 to the end of the setup header.
pub const HEADER_JUMP: usize = 0x201;
/// u32: "HdrS".
pub const HEADER_MAGIC: usize = 0x202;
/// u16: boot protocol.
pub const PROTOCOL: usize = 0x206;
/// u16: where the version string stands, less 0x200.
pub const KERNEL_VERSION: usize = 0x20e;
/// u8: who loaded the kernel; 0xff is "somebody without a number".
pub const TYPE_OF_LOADER: usize = 0x210;
/// u8: bit 0 is LOADED_HIGH.
pub const LOADFLAGS: usize = 0x211;
/// u32: initrd address, low half.
pub const RAMDISK_IMAGE: usize = 0x218;
/// u32: initrd size, low half.
pub const RAMDISK_SIZE: usize = 0x21c;
/// u32: address of the command line, low half.
pub const CMD_LINE_PTR: usize = 0x228;
/// u32: highest address that the initrd may cover (protocol 2.03).
pub const INITRD_ADDR_MAX: usize = 0x22c;
/// u32: alignment of a relocatable kernel.
pub const KERNEL_ALIGNMENT: usize = 0x230;
/// u16: bit 0 says that there is a 64-bit entry (protocol 2.12).
pub const XLOADFLAGS: usize = 0x236;
/// u32: longest command line, without its NUL (protocol 2.06).
pub const CMDLINE_SIZE: usize = 0x238;
/// u32: where the compressed kernel begins, counted from the protected-mode code (protocol 2.08).
pub const PAYLOAD_OFFSET: usize = 0x248;
/// u32: how long it is (protocol 2.08).
pub const PAYLOAD_LENGTH: usize = 0x24c;
/// u64: list of further parameters; the file's value is not ours to pass on.
pub const SETUP_DATA: usize = 0x250;
/// u32: memory that the kernel needs from its start on while it sets up (protocol 2.10).
pub const INIT_SIZE: usize = 0x260;

/// The magic at [`HEADER_MAGIC`].
pub const HDRS: u32 = 0x5372_6448;
/// The magic at [`BOOT_FLAG`].
pub const BOOT_FLAG_MAGIC: u16 = 0xaa55;

/// A setup header as found in a bzImage, with every field absent that its length does not cover.
#[derive(Debug, Clone, Copy, Default)]
pub struct SetupHeader<'a>(pub Option<&'a [u8]>);

impl SetupHeader<'_> {
    /// The little-endian u32 at `offset` (an offset into the zero page), if the header reaches that far.
    pub fn u32(&self, offset: usize) -> Option<u32> {
        let start = offset.checked_sub(SETUP_HEADER)?;
        let bytes = self.0?.get(start..start + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }
}

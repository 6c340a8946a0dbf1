//! Kernels made in the test: a tiny ELF file, packed in any way, inside a bzImage.

use std::io::{Read, Write};

use crate::image::setup_header::*;

/// A payload compressor with its size after it, as the kernel's build makes it.
pub type Compress = fn(&[u8]) -> Vec<u8>;

pub const ALL_COMPRESSIONS: [(&str, Compress); 7] = [
    ("gzip", gzip),
    ("bzip2", |data| sized(bzip2(data), data)),
    ("lzma", |data| sized(lzma(data), data)),
    ("xz", |data| sized(xz(data), data)),
    ("lzo", |data| sized(lzop(data), data)),
    ("lz4", |data| sized(lz4(data), data)),
    ("zstd", |data| {
        sized(zstd::stream::encode_all(data, 19).unwrap(), data)
    }),
];

fn sized(mut packed: Vec<u8>, data: &[u8]) -> Vec<u8> {
    packed.extend_from_slice(&u32::try_from(data.len()).unwrap().to_le_bytes());
    packed
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn bzip2(data: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    bzip2::read::BzEncoder::new(data, bzip2::Compression::best())
        .read_to_end(&mut packed)
        .unwrap();
    packed
}

fn lzma(data: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    pack_lzma(
        data,
        liblzma::stream::Stream::new_lzma_encoder(&options).unwrap(),
    )
}

/// As `xz --check=crc32 --x86 --lzma2`, which the kernel's build calls.
fn xz(data: &[u8]) -> Vec<u8> {
    let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
    let mut filters = liblzma::stream::Filters::new();
    filters.x86().lzma2(&options);
    pack_lzma(
        data,
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32)
            .unwrap(),
    )
}

fn pack_lzma(data: &[u8], stream: liblzma::stream::Stream) -> Vec<u8> {
    let mut packed = Vec::new();
    liblzma::read::XzEncoder::new_stream(data, stream)
        .read_to_end(&mut packed)
        .unwrap();
    packed
}

/// As `lz4 -l`.
fn lz4(data: &[u8]) -> Vec<u8> {
    let mut packed = 0x184c_2102_u32.to_le_bytes().to_vec();
    for chunk in data.chunks(8 << 20) {
        let chunk = lz4_flex::block::compress(chunk);
        packed.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        packed.extend_from_slice(&chunk);
    }
    packed
}

/// As `lzop -9`, with the adler32 of every block left 0 (neither we nor the kernel look).
pub fn lzop(data: &[u8]) -> Vec<u8> {
    let mut file = b"\x89LZO\x00\r\n\x1a\n".to_vec();
    file.extend_from_slice(&[0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 3, 9]); // versions, method, level
    file.extend_from_slice(&1_u32.to_be_bytes()); // flags: adler32 of the unpacked data
    file.extend_from_slice(&[0; 12]); // mode, time
    file.push(0); // no name
    file.extend_from_slice(&[0; 4]); // header checksum
    for chunk in data.chunks(256 << 10) {
        let packed = lzokay_native::compress(chunk).unwrap();
        let packed = if packed.len() < chunk.len() {
            &packed[..]
        } else {
            chunk
        };
        file.extend_from_slice(&(chunk.len() as u32).to_be_bytes());
        file.extend_from_slice(&(packed.len() as u32).to_be_bytes());
        file.extend_from_slice(&[0; 4]);
        file.extend_from_slice(packed);
    }
    file.extend_from_slice(&[0; 4]);
    file
}

/// Bytes of which some repeat, near and far and long and short, and some do not; always the same.
pub fn mixed_bytes(length: usize) -> Vec<u8> {
    let mut seed = 0x1234_5678_9abc_def1_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 11) as usize
    };
    let mut out: Vec<u8> = Vec::with_capacity(length);
    while out.len() < length {
        let left = length - out.len();
        if out.is_empty() || next() % 3 == 0 {
            for _ in 0..(1 + next() % 40).min(left) {
                out.push(next() as u8);
            }
        } else {
            let reach = [8, 600, 2_500, 15_000, 45_000][next() % 5];
            let start = out.len() - 1 - next() % out.len().min(reach);
            for index in start..start + (2 + next() % [6, 30, 900][next() % 3]).min(left) {
                out.push(out[index]);
            }
        }
    }
    out
}

/// A bzImage to be.
#[derive(Debug)]
pub struct Image {
    pub payload: Vec<u8>,
    pub protocol: u16,
    pub loadflags: u8,
    pub xloadflags: u16,
}

impl Image {
    pub fn gzip(kernel: &[u8]) -> Self {
        Image {
            payload: gzip(kernel),
            protocol: 0x020f,
            loadflags: 1,
            xloadflags: 1,
        }
    }

    /// Two sectors of setup, 16 bytes of "decompressor", the payload.
    pub fn build(&self) -> Vec<u8> {
        let mut image = vec![0; 1024];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes)
        };
        put(SETUP_SECTS, &[1]);
        put(BOOT_FLAG, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(HEADER_MAGIC, b"HdrS");
        put(PROTOCOL, &self.protocol.to_le_bytes());
        put(KERNEL_VERSION, &0x100_u16.to_le_bytes());
        put(0x300, b"6.1.0-test\0");
        put(LOADFLAGS, &[self.loadflags]);
        put(INITRD_ADDR_MAX, &0x7fff_ffff_u32.to_le_bytes());
        put(KERNEL_ALIGNMENT, &0x20_0000_u32.to_le_bytes());
        put(XLOADFLAGS, &self.xloadflags.to_le_bytes());
        put(CMDLINE_SIZE, &2047_u32.to_le_bytes());
        put(PAYLOAD_OFFSET, &16_u32.to_le_bytes());
        put(PAYLOAD_LENGTH, &(self.payload.len() as u32).to_le_bytes());
        put(INIT_SIZE, &0x30_0000_u32.to_le_bytes());
        image.extend_from_slice(&[0xf4; 16]);
        image.extend_from_slice(&self.payload);
        image
    }
}

/// Where [`tiny_elf`] has its code: a kernel-like virtual address, and the physical one below it.
pub const TINY_VIRTUAL: u64 = 0xffff_ffff_8100_0000;
pub const TINY_PHYSICAL: u64 = 0x100_0000;
/// Where its code begins in the file.
pub const TINY_OFFSET: usize = 120;

/// An ELF file with one executable segment and a section `.init.text` over all of it.
pub fn tiny_elf(code: &[u8]) -> Vec<u8> {
    tiny_elf_with(code, &[(".init.text", 0, code.len())])
}

/// The same with these sections, each of a name, an offset into the code and a length; a name that
/// starts with `.text`, `.init` or `.head` makes it executable.
pub fn tiny_elf_with(code: &[u8], sections: &[(&str, usize, usize)]) -> Vec<u8> {
    let mut names = vec![0];
    let mut headers = vec![0; 64];
    for &(name, start, length) in sections {
        let executable = [".text", ".init", ".head"]
            .iter()
            .any(|prefix| name.starts_with(prefix));
        headers.extend_from_slice(&(names.len() as u32).to_le_bytes());
        headers.extend_from_slice(&1_u32.to_le_bytes());
        let flags = if executable { 6 } else { 2 };
        for value in [
            flags,
            TINY_VIRTUAL + start as u64,
            (TINY_OFFSET + start) as u64,
            length as u64,
            0,
            1,
            0,
        ] {
            headers.extend_from_slice(&value.to_le_bytes());
        }
        names.extend_from_slice(name.as_bytes());
        names.push(0);
    }
    headers.extend_from_slice(&[0; 4]);
    headers.extend_from_slice(&3_u32.to_le_bytes());
    for value in [
        0,
        0,
        (TINY_OFFSET + code.len()) as u64,
        names.len() as u64,
        0,
        1,
        0_u64,
    ] {
        headers.extend_from_slice(&value.to_le_bytes());
    }
    let section_count = if sections.is_empty() {
        0
    } else {
        sections.len() as u16 + 2
    };

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for value in [2_u16, 62] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&1_u32.to_le_bytes());
    let section_headers = if section_count == 0 {
        0
    } else {
        (TINY_OFFSET + code.len() + names.len()) as u64
    };
    for value in [TINY_PHYSICAL, 64, section_headers] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&0_u32.to_le_bytes());
    for value in [
        64,
        56,
        1,
        64,
        section_count,
        section_count.saturating_sub(1),
    ] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&1_u32.to_le_bytes());
    file.extend_from_slice(&5_u32.to_le_bytes());
    let length = code.len() as u64;
    for value in [
        TINY_OFFSET as u64,
        TINY_VIRTUAL,
        TINY_PHYSICAL,
        length,
        length + 0x1000,
        0x1000,
    ] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    assert_eq!(file.len(), TINY_OFFSET);
    file.extend_from_slice(code);
    if section_count != 0 {
        file.extend_from_slice(&names);
        file.extend_from_slice(&headers);
    }
    file
}

/// Debian's kernels on this host, each with its path, or those whose paths `HINDSIGHT_KERNELS` has, a line each. None is a
/// reason to skip a test, and said so.
pub fn debian_kernels() -> Vec<(String, Vec<u8>)> {
    if let Ok(paths) = std::env::var("HINDSIGHT_KERNELS") {
        let read = |path: &str| (path.to_string(), std::fs::read(path).expect("it reads"));
        return paths.lines().map(read).collect();
    }
    let mut kernels: Vec<_> = std::fs::read_dir("/boot")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().display().to_string())
        .filter(|path| path.starts_with("/boot/vmlinuz-") && path.ends_with("amd64"))
        .filter_map(|path| std::fs::read(&path).ok().map(|image| (path, image)))
        .collect();
    kernels.sort();
    if kernels.is_empty() {
        eprintln!("skipped: no /boot/vmlinuz-*amd64 on this host");
    }
    kernels
}

/// The types of a kernel to be. Types are numbered from 1.
#[derive(Default, Debug)]
pub struct BtfBuilder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

impl BtfBuilder {
    fn name(&mut self, name: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if name.is_empty() {
            return 0;
        }
        let at = self.strings.len() as u32;
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn add(&mut self, kind: u32, name: &str, count: usize, size_or_type: u32, rest: &[u32]) -> u32 {
        let words = [self.name(name), kind << 24 | count as u32, size_or_type];
        let bytes = words.iter().chain(rest).flat_map(|word| word.to_le_bytes());
        self.types.extend(bytes);
        self.count += 1;
        self.count
    }

    pub fn int(&mut self, name: &str, bytes: u32) -> u32 {
        self.add(1, name, 0, bytes, &[8 * bytes])
    }

    /// A pointer, a typedef or a qualifier.
    pub fn derived(&mut self, kind: u32, name: &str, of: u32) -> u32 {
        self.add(kind, name, 0, of, &[])
    }

    pub fn array(&mut self, of: u32, index: u32, count: u32) -> u32 {
        self.add(3, "", 0, 0, &[of, index, count])
    }

    /// Members are a name, a type and an offset in bytes.
    pub fn structure(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32)]) -> u32 {
        let words: Vec<u32> = members
            .iter()
            .flat_map(|&(name, of, offset)| [self.name(name), of, 8 * offset])
            .collect();
        self.add(4, name, members.len(), bytes, &words)
    }

    /// Members are a name, a type, and an offset and a size in bits; a size of 0 is no bit field.
    pub fn bit_fields(&mut self, name: &str, bytes: u32, members: &[(&str, u32, u32, u32)]) -> u32 {
        let words: Vec<u32> = members
            .iter()
            .flat_map(|&(name, of, offset, bits)| [self.name(name), of, bits << 24 | offset])
            .collect();
        self.add(1 << 7 | 4, name, members.len(), bytes, &words)
    }

    pub fn enumeration(&mut self, name: &str, constants: &[(&str, u32)]) -> u32 {
        let words: Vec<u32> = constants
            .iter()
            .flat_map(|&(name, value)| [self.name(name), value])
            .collect();
        self.add(6, name, constants.len(), 4, &words)
    }

    pub fn build(&self) -> Vec<u8> {
        let mut btf = 0xeb9f_u16.to_le_bytes().to_vec();
        btf.extend([1, 0]);
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        for word in [24, 0, types, types, strings] {
            btf.extend(word.to_le_bytes());
        }
        btf.extend(&self.types);
        btf.extend(&self.strings);
        btf
    }
}

//! Decompresses a bzImage's payload, in each of the seven ways that Linux offers.
//!
//! The first bytes say which, by the table of `lib/decompress.c`. The kernel's build appends the unpacked size as
//! four little-endian bytes to every format but gzip, which ends in them by itself
//! (`scripts/Makefile.lib`, `size_append`). So the size is known beforehand, nothing is unpacked beyond it, and
//! nothing is allocated on its word alone: buffers grow with what has really been unpacked.

use std::io::Read;

use liblzma::stream::Stream;

use crate::error::KernelError;
use crate::image::lzo;

/// No kernel unpacks to more than this; Debian's take 50 to 70 MiB.
pub(crate) const LIMIT: u64 = 256 << 20;
/// Memory that xz and lzma may use: the kernel's build asks for dictionaries up to 128 MiB.
const LZMA_MEMORY: u64 = 192 << 20;
/// Chunk size of the legacy lz4 frame format, unpacked.
const LZ4_CHUNK_BYTES: usize = 8 << 20;
const LZ4_MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
/// Room is made for at least so much more.
const STEP_BYTES: usize = 1 << 20;
/// A first guess at the size never exceeds this many times the packed size.
const LIKELY_RATIO: u64 = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lzo,
    Lz4,
    Zstd,
}

impl Compression {
    /// Recognises a payload by its first bytes.
    fn of(payload: &[u8]) -> Option<Self> {
        const TABLE: [(&[u8], Compression); 8] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (&[0x1f, 0x9e], Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (&[0x5d, 0x00, 0x00], Compression::Lzma),
            (b"\xfd7zXZ\x00", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (&LZ4_MAGIC, Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        ];
        TABLE
            .iter()
            .find(|(magic, _)| payload.starts_with(magic))
            .map(|&(_, compression)| compression)
    }

    fn name(self) -> &'static str {
        match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Xz => "xz",
            Compression::Lzo => "lzo",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }

    fn damaged(self, reason: impl ToString) -> KernelError {
        KernelError::Damaged {
            compression: self.name(),
            reason: reason.to_string(),
        }
    }

    /// Unpacks what there is a decoder of streams for, one byte more than is expected at most.
    fn stream(self, packed: &[u8], expected: u64) -> Result<Vec<u8>, KernelError> {
        let damaged = |error| self.damaged(error);
        let unlzma = |stream: Result<Stream, liblzma::stream::Error>| {
            let stream = stream.map_err(|error| self.damaged(error))?;
            Ok(liblzma::read::XzDecoder::new_stream(packed, stream))
        };
        match self {
            Compression::Gzip => all(flate2::read::GzDecoder::new(packed), expected, packed),
            Compression::Bzip2 => all(bzip2::read::BzDecoder::new(packed), expected, packed),
            Compression::Lzma => {
                let decoder = unlzma(Stream::new_lzma_decoder(LZMA_MEMORY))?;
                all(decoder, expected, packed)
            }
            Compression::Xz => {
                let decoder = unlzma(Stream::new_stream_decoder(LZMA_MEMORY, 0))?;
                all(decoder, expected, packed)
            }
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(packed);
                all(decoder.map_err(damaged)?.single_frame(), expected, packed)
            }
            Compression::Lzo | Compression::Lz4 => unreachable!("there is no stream of it"),
        }
        .map_err(damaged)
    }
}

/// Unpacks a payload, and names its compression.
///
/// # Errors
///
/// An unknown compression, damaged data, more than 256 MiB, or another size than the build appended.
pub(crate) fn unpack(payload: &[u8]) -> Result<(Vec<u8>, &'static str), KernelError> {
    let Some(compression) = Compression::of(payload) else {
        return Err(KernelError::UnknownCompression {
            found: payload[..payload.len().min(6)].to_vec(),
        });
    };
    let Some((body, size)) = payload.split_last_chunk::<4>() else {
        return Err(compression.damaged("it ends before its size"));
    };
    let expected = u64::from(u32::from_le_bytes(*size));
    if expected > LIMIT {
        return Err(KernelError::TooLarge {
            found: expected,
            limit: LIMIT,
        });
    }
    let unpacked = match compression {
        Compression::Lzo => {
            lzo::unpack(body, expected as usize).map_err(|fault| compression.damaged(fault))
        }
        Compression::Lz4 => {
            lz4(body, expected as usize).map_err(|fault| compression.damaged(fault))
        }
        // It ends in the size by itself.
        Compression::Gzip => compression.stream(payload, expected),
        _ => compression.stream(body, expected),
    }?;
    let found = unpacked.len() as u64;
    if found != expected {
        return Err(KernelError::WrongSize {
            compression: compression.name(),
            expected,
            found,
        });
    }
    Ok((unpacked, compression.name()))
}

/// Unpacks something that does not say how long it will be, and names its compression.
///
/// # Errors
///
/// An unknown compression, damaged data, or more than `limit` bytes.
pub(crate) fn unpack_up_to(
    packed: &[u8],
    limit: u64,
) -> Result<(Vec<u8>, &'static str), KernelError> {
    let Some(compression) = Compression::of(packed) else {
        return Err(KernelError::UnknownCompression {
            found: packed[..packed.len().min(6)].to_vec(),
        });
    };
    let most = usize::try_from(limit).unwrap_or(usize::MAX);
    let unpacked = match compression {
        Compression::Lzo => lzo::unpack(packed, most).map_err(|fault| compression.damaged(fault)),
        Compression::Lz4 => lz4(packed, most).map_err(|fault| compression.damaged(fault)),
        _ => compression.stream(packed, limit),
    }?;
    let found = unpacked.len() as u64;
    if found > limit {
        return Err(KernelError::TooLarge { found, limit });
    }
    Ok((unpacked, compression.name()))
}

/// Reads everything that `decoder` gives, one byte more than is expected at most.
fn all(decoder: impl Read, expected: u64, packed: &[u8]) -> std::io::Result<Vec<u8>> {
    // The size is not checked yet: believe it only as far as a kernel of this packed size could go.
    let likely = expected.min(packed.len() as u64 * LIKELY_RATIO);
    let mut out = Vec::with_capacity(likely as usize);
    let mut decoder = decoder.take(expected + 1);
    loop {
        make_room(&mut out, 1);
        let step = (out.capacity() - out.len()) as u64;
        if decoder.by_ref().take(step).read_to_end(&mut out)? as u64 != step {
            return Ok(out);
        }
    }
}

/// Makes room for `needed` more bytes; for not much more than that, where a vector by itself takes twice what it has.
fn make_room(out: &mut Vec<u8>, needed: usize) {
    if out.capacity() - out.len() < needed {
        out.reserve_exact(needed.max(out.len() / 4).max(STEP_BYTES));
    }
}

/// The legacy lz4 frame: a magic, then chunks of 8 MiB, each after its packed length; at most `limit` bytes and a chunk.
fn lz4(body: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let mut rest = &body[LZ4_MAGIC.len().min(body.len())..];
    let mut out = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        // `lz4 -l` starts a new frame where its input was several files; so may the kernel's.
        if *length == LZ4_MAGIC {
            rest = tail;
            continue;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let Some((chunk, tail)) = tail.split_at_checked(length) else {
            return Err(format!(
                "a chunk of {length} bytes, with {} left",
                tail.len()
            ));
        };
        if out.len() > limit {
            return Err(format!("more than the {limit} bytes that it says it holds"));
        }
        let start = out.len();
        // LZ4 packs 255 to 1 at best.
        let most = length.saturating_mul(255).min(LZ4_CHUNK_BYTES);
        make_room(&mut out, most);
        out.resize(start + most, 0);
        let unpacked = lz4_flex::block::decompress_into(chunk, &mut out[start..])
            .map_err(|error| error.to_string())?;
        out.truncate(start + unpacked);
        rest = tail;
    }
    if rest.is_empty() {
        Ok(out)
    } else {
        Err(format!("{} bytes follow the last chunk", rest.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ALL_COMPRESSIONS, mixed_bytes};

    #[test]
    fn every_compression_of_linux_is_unpacked() {
        for (name, compress) in ALL_COMPRESSIONS {
            for length in [1, 700, 300_000] {
                let data = mixed_bytes(length);
                let (unpacked, compression) =
                    unpack(&compress(&data)).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert_eq!(compression, name);
                assert!(unpacked == data, "{name}: {length} bytes differ");
            }
        }
    }

    #[test]
    fn a_payload_cut_anywhere_is_refused_and_never_a_panic() {
        for (name, compress) in ALL_COMPRESSIONS {
            let payload = compress(&mixed_bytes(700));
            for length in 0..payload.len() {
                assert!(
                    unpack(&payload[..length]).is_err(),
                    "{name}: accepted at {length} of {}",
                    payload.len()
                );
            }
        }
    }

    #[test]
    fn a_payload_with_any_byte_spoilt_is_unpacked_or_refused_and_never_a_panic() {
        for (_, compress) in ALL_COMPRESSIONS {
            let payload = compress(&mixed_bytes(700));
            for offset in 0..payload.len() {
                for value in [0x00, 0x80, 0xff] {
                    let mut spoilt = payload.clone();
                    spoilt[offset] ^= value;
                    let _ = unpack(&spoilt);
                }
            }
        }
    }

    #[test]
    fn a_size_that_lies_is_noticed() {
        for (name, compress) in ALL_COMPRESSIONS {
            let mut payload = compress(&mixed_bytes(700));
            let last = payload.len() - 4;
            payload[last] ^= 1;
            assert!(unpack(&payload).is_err(), "{name}");
            payload[last..].fill(0xff);
            assert_eq!(
                unpack(&payload),
                Err(KernelError::TooLarge {
                    found: 0xffff_ffff,
                    limit: LIMIT
                }),
                "{name}"
            );
        }
    }

    #[test]
    fn a_payload_is_unpacked_no_further_than_it_says_it_goes() {
        let bomb = vec![0; 64 << 20];
        for (name, compress) in ALL_COMPRESSIONS {
            let mut payload = compress(&bomb);
            let last = payload.len() - 4;
            payload[last..].copy_from_slice(&(3_u32 << 20).to_le_bytes());
            assert!(unpack(&payload).is_err(), "{name}");
        }
        // One byte more than is expected is looked for, and room for that is all there is.
        let out = all(std::io::repeat(7), 3 << 20, &[0; 16]).unwrap();
        assert_eq!(out.len(), (3 << 20) + 1);
        assert!(out.capacity() <= 5 << 20, "{}", out.capacity());
    }

    #[test]
    fn an_unknown_compression_shows_its_first_bytes() {
        assert_eq!(
            unpack(b"QQ"),
            Err(KernelError::UnknownCompression {
                found: b"QQ".to_vec()
            })
        );
        assert_eq!(
            unpack(b""),
            Err(KernelError::UnknownCompression { found: Vec::new() })
        );
    }
}

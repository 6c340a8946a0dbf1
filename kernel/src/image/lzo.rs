//! Decompresses LZO1X in an lzop file, the one compression of Linux without a sound crate.
//!
//! The crates to be had are either GPL, or trust their input and panic on a distance that reaches
//! before the start. The format is small: `Documentation/staging/lzo.rst` describes
//! the instructions, `lib/decompress_unlzo.c` the file around them. Only the stream that lzop writes is
//! read; the kernel's own run-length extension (first byte 17) never appears in a kernel image.

/// The lzop file's first bytes.
const MAGIC: &[u8] = b"\x89LZO\x00\r\n\x1a\n";
/// lzop version that gave the header its present shape.
const OLDEST_VERSION: u16 = 0x0940;
/// lzop splits its input in blocks of at most this many bytes.
const BLOCK_BYTES: usize = 256 << 10;
const FLAG_ADLER32_D: u32 = 0x0001;
const FLAG_ADLER32_C: u32 = 0x0002;
const FLAG_CRC32_D: u32 = 0x0100;
const FLAG_CRC32_C: u32 = 0x0200;
const FLAG_FILTER: u32 = 0x0800;

/// Why an lzop file does not unpack, in a few words for the error that carries it.
type Fault = &'static str;

/// Unpacks a whole lzop file, up to its closing block, into at most `limit` bytes.
pub(crate) fn unpack(file: &[u8], limit: usize) -> Result<Vec<u8>, Fault> {
    let mut input = Input(file);
    if input.take(MAGIC.len())? != MAGIC {
        return Err("no lzop magic");
    }
    let flags = skip_header(&mut input)?;
    let mut out = Vec::new();
    loop {
        let raw_bytes = input.be32()? as usize;
        if raw_bytes == 0 {
            return Ok(out);
        }
        let packed_bytes = input.be32()? as usize;
        if raw_bytes > BLOCK_BYTES || packed_bytes == 0 || packed_bytes > raw_bytes {
            return Err("impossible block size");
        }
        if out.len() + raw_bytes > limit {
            return Err("larger than any kernel");
        }
        // The checksums are not checked, as in the kernel: the length of every block and of the whole is.
        for flag in [FLAG_ADLER32_D, FLAG_CRC32_D] {
            input.take(if flags & flag != 0 { 4 } else { 0 })?;
        }
        for flag in [FLAG_ADLER32_C, FLAG_CRC32_C] {
            input.take(if flags & flag != 0 && packed_bytes < raw_bytes {
                4
            } else {
                0
            })?;
        }
        let packed = input.take(packed_bytes)?;
        if packed_bytes == raw_bytes {
            out.extend_from_slice(packed);
        } else {
            block(packed, raw_bytes, &mut out)?;
        }
    }
}

/// Skips version, method, names and times; returns the flags.
fn skip_header(input: &mut Input<'_>) -> Result<u32, Fault> {
    if u16::from_be_bytes([input.byte()?, input.byte()?]) < OLDEST_VERSION {
        return Err("written by an lzop older than 1.0");
    }
    // Library version, version needed, method, level.
    input.take(6)?;
    let flags = input.be32()?;
    input.take(if flags & FLAG_FILTER != 0 { 4 } else { 0 })?;
    // Mode and time; then the name with its length, and the header's checksum.
    input.take(12)?;
    let name_bytes = usize::from(input.byte()?);
    input.take(name_bytes + 4)?;
    Ok(flags)
}

/// Unpacks one LZO1X block of exactly `raw_bytes` onto the end of `out`.
fn block(packed: &[u8], raw_bytes: usize, out: &mut Vec<u8>) -> Result<(), Fault> {
    let mut input = Input(packed);
    let mut out = Output {
        floor: out.len(),
        ceiling: out.len() + raw_bytes,
        out,
    };
    // How many literals the instruction before copied: 0 to 3, or 4 for "four or more".
    let mut state = 0;
    if packed.first().is_some_and(|&first| first > 17) {
        let literals = usize::from(input.byte()? - 17);
        out.literals(input.take(literals)?)?;
        state = literals.min(4);
    }
    loop {
        let code = usize::from(input.byte()?);
        let (distance, length, literals) = match (code, state) {
            (0..16, 0) => {
                let length = 3 + if code == 0 { 15 + input.run()? } else { code };
                out.literals(input.take(length)?)?;
                state = 4;
                continue;
            }
            (0..16, 4) => (
                0x801 + (code >> 2) + (usize::from(input.byte()?) << 2),
                3,
                code & 3,
            ),
            (0..16, _) => (
                1 + (code >> 2) + (usize::from(input.byte()?) << 2),
                2,
                code & 3,
            ),
            (16..32, _) => {
                let length = 2 + if code & 7 == 0 {
                    7 + input.run()?
                } else {
                    code & 7
                };
                let tail = usize::from(u16::from_le_bytes([input.byte()?, input.byte()?]));
                let distance = ((code & 8) << 11) + (tail >> 2);
                if distance == 0 {
                    return match (length, input.0.is_empty(), out.is_full()) {
                        (3, true, true) => Ok(()),
                        _ => Err("block ends early"),
                    };
                }
                (distance + 0x4000, length, tail & 3)
            }
            (32..64, _) => {
                let length = 2 + if code & 31 == 0 {
                    31 + input.run()?
                } else {
                    code & 31
                };
                let tail = usize::from(u16::from_le_bytes([input.byte()?, input.byte()?]));
                (1 + (tail >> 2), length, tail & 3)
            }
            _ => (
                1 + ((code >> 2) & 7) + (usize::from(input.byte()?) << 3),
                (code >> 5) + 1,
                code & 3,
            ),
        };
        out.copy(distance, length)?;
        out.literals(input.take(literals)?)?;
        state = literals;
    }
}

/// Bytes still to be read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let (head, tail) = self.0.split_at_checked(count).ok_or("ends early")?;
        self.0 = tail;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    fn be32(&mut self) -> Result<u32, Fault> {
        Ok(u32::from_be_bytes([
            self.byte()?,
            self.byte()?,
            self.byte()?,
            self.byte()?,
        ]))
    }

    /// A long length: 255 for each zero byte, plus the byte that is not zero.
    fn run(&mut self) -> Result<usize, Fault> {
        let mut total = 0;
        loop {
            match self.byte()? {
                // No overflow: one step for each byte of input.
                0 => total += 255,
                last => return Ok(total + usize::from(last)),
            }
        }
    }
}

/// The block being written, which may look back to its own start only.
struct Output<'a> {
    out: &'a mut Vec<u8>,
    floor: usize,
    ceiling: usize,
}

impl Output<'_> {
    fn is_full(&self) -> bool {
        self.out.len() == self.ceiling
    }

    fn room(&self, length: usize) -> Result<(), Fault> {
        if length > self.ceiling - self.out.len() {
            Err("block is longer than it says")
        } else {
            Ok(())
        }
    }

    fn literals(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        self.room(bytes.len())?;
        self.out.extend_from_slice(bytes);
        Ok(())
    }

    /// Copies `length` bytes from `distance` back. Source and target may overlap: the copy then repeats.
    fn copy(&mut self, distance: usize, length: usize) -> Result<(), Fault> {
        self.room(length)?;
        let start = self
            .out
            .len()
            .checked_sub(distance)
            .filter(|&start| start >= self.floor);
        let start = start.ok_or("distance reaches before the start")?;
        let mut left = length;
        while left > 0 {
            // What has been copied so far is source, too, so each round may be twice as long.
            let chunk = left.min(self.out.len() - start);
            self.out.extend_from_within(start..start + chunk);
            left -= chunk;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{lzop, mixed_bytes};

    #[test]
    fn what_a_compressor_packed_comes_back_whole() {
        for length in [
            0,
            1,
            2,
            3,
            17,
            18,
            300,
            5_000,
            BLOCK_BYTES - 1,
            BLOCK_BYTES,
            3 * BLOCK_BYTES + 77,
        ] {
            let data = mixed_bytes(length);
            assert!(
                unpack(&lzop(&data), 1 << 20).unwrap() == data,
                "{length} bytes differ"
            );
        }
    }

    #[test]
    fn a_hand_made_block_unpacks_as_the_format_says() {
        // Four literals, each kind of near copy once, and the end mark.
        let packed = [
            21,
            b'a',
            b'b',
            b'c',
            b'd', // four literals, state 4
            0x40 | 3 << 2 | 1,
            0,
            b'e', // 3 bytes from 4 back, one literal
            2,
            1,
            b'f',
            b'g', // 2 bytes from 5 back, two literals
            0x20 | 5,
            2 << 2,
            0, // 7 bytes from 3 back: overlaps itself
            0x11,
            0,
            0,
        ];
        let mut out = b"before".to_vec();
        let text = b"abcdabcedafgafgafga";
        let other = lzokay_native::decompress_all(&packed, None).unwrap();
        assert_eq!(other, text, "another decoder disagrees");
        assert_eq!(
            block(&packed, text.len(), &mut out),
            Ok(()),
            "{}",
            String::from_utf8_lossy(&out)
        );
        assert_eq!(&out[6..], text, "{}", String::from_utf8_lossy(&out));
    }

    #[test]
    fn a_copy_from_before_the_block_is_refused() {
        let packed = [21, b'a', b'b', b'c', b'd', 0x40 | 7 << 2, 0, 0x11, 0, 0];
        let mut out = b"before".to_vec();
        assert_eq!(
            block(&packed, 7, &mut out),
            Err("distance reaches before the start")
        );
    }

    #[test]
    fn no_cut_and_no_flipped_bit_is_a_panic_or_outgrows_its_block() {
        let file = lzop(&mixed_bytes(600));
        for length in 0..file.len() {
            assert!(
                unpack(&file[..length], 1 << 20).is_err(),
                "accepted at {length}"
            );
        }
        for bit in 0..file.len() * 8 {
            let mut spoilt = file.clone();
            spoilt[bit / 8] ^= 1 << (bit % 8);
            if let Ok(out) = unpack(&spoilt, 1 << 20) {
                assert!(out.len() <= BLOCK_BYTES, "bit {bit}: {} bytes", out.len());
            }
        }
    }

    #[test]
    fn the_limit_holds() {
        assert_eq!(
            unpack(&lzop(&mixed_bytes(5_000)), 4_999),
            Err("larger than any kernel")
        );
    }
}

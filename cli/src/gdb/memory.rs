//! The guest's memory by physical addresses.

use std::fmt::Write;

use hindsight_vmm::kvm::GuestMemory;

/// A dump has no more bytes than this.
const DUMP_BYTES_MAX: u64 = 64 << 10;
const LINE_BYTES: usize = 16;
/// RAM is looked at in pages: it may end at each.
const PAGE_BYTES: u64 = 4096;

/// Reads RAM from a physical address on, as far as there is any; returns how many bytes.
pub(super) fn read_physical(memory: Option<&GuestMemory>, address: u64, into: &mut [u8]) -> usize {
    let Some(memory) = memory else {
        return 0;
    };
    let mut done = 0;
    while done < into.len() {
        let Some(at) = address.checked_add(done as u64) else {
            break;
        };
        let left = (PAGE_BYTES - at % PAGE_BYTES).min((into.len() - done) as u64) as usize;
        if !memory.read(at, &mut into[done..done + left]) {
            break;
        }
        done += left;
    }
    done
}

/// A number as gdb's user writes it: decimal, or hexadecimal with 0x.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// What is at a physical address, in hexadecimal and as text.
pub(super) fn dump(memory: Option<&GuestMemory>, address: u64, bytes: u64) -> String {
    let mut buffer = vec![0; bytes.min(DUMP_BYTES_MAX) as usize];
    let count = read_physical(memory, address, &mut buffer);
    let mut text = lines(address, &buffer[..count]);
    if count < buffer.len() {
        let end = address.wrapping_add(count as u64);
        let _ = writeln!(text, "there is no RAM at {end:#x}");
    } else if bytes > DUMP_BYTES_MAX {
        let _ = writeln!(
            text,
            "and so on: no more than {DUMP_BYTES_MAX} bytes are shown"
        );
    }
    text
}

fn lines(address: u64, bytes: &[u8]) -> String {
    let mut text = String::new();
    for (number, line) in bytes.chunks(LINE_BYTES).enumerate() {
        let at = address.wrapping_add((number * LINE_BYTES) as u64);
        let mut row = format!("{at:012x} ");
        for column in 0..LINE_BYTES {
            let _ = match line.get(column) {
                Some(byte) => write!(row, " {byte:02x}"),
                None => write!(row, "   "),
            };
        }
        let plain = |byte: &u8| match byte {
            b' '..=b'~' => char::from(*byte),
            _ => '.',
        };
        let _ = writeln!(
            text,
            "{row}  {}",
            line.iter().map(plain).collect::<String>()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_lines_with_their_addresses() {
        let text = lines(0x1000, b"0123456789abcdef\x00\xffz");
        let expected = "\
000000001000  30 31 32 33 34 35 36 37 38 39 61 62 63 64 65 66  0123456789abcdef
000000001010  00 ff 7a                                         ..z
";
        assert_eq!(text, expected);
    }

    #[test]
    fn numbers_are_those_of_gdb() {
        assert_eq!(number("0x1F"), Some(31));
        assert_eq!(number("31"), Some(31));
        assert_eq!(number("1f"), None);
        assert_eq!(number("0x"), None);
    }
}

//! Numbers as people read and write them.
//!
//! The crates that read sizes (bytesize, parse-size) count in floats, or take sizes that are no whole pages
//! without a word; those that write them would each save three lines.

use hindsight_replay::MEMORY_BYTES_MAX;

/// RAM comes in pages.
const PAGE_BYTES: u64 = 4096;

/// Parses a size of RAM: `256M`, `1G`, `3.5G`, `4096K` or plain bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let bad =
        || format!("{text:?}: expected bytes, or a number with K, M or G, such as 512M or 3.5G");
    let plain = text.trim_end_matches(['B', 'b']).trim_end_matches('i');
    let (number, unit_bytes) = match plain.char_indices().next_back() {
        Some((at, 'K' | 'k')) => (&plain[..at], 1_u128 << 10),
        Some((at, 'M' | 'm')) => (&plain[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&plain[..at], 1 << 30),
        _ => (text, 1),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    // Longer ones mean nothing, and their powers of ten would not fit.
    if !digits(whole) || !digits(part) || whole.len() > 20 || part.len() > 15 {
        return Err(bad());
    }
    // No floats: a fraction is a whole number of the unit over a power of ten.
    let parse = |text: &str| text.parse::<u128>().map_err(|_| bad());
    let scale = 10_u128.pow(part.len() as u32);
    let scaled = (parse(whole)? * scale + parse(part)?) * unit_bytes;
    let bytes = u64::try_from(scaled / scale).map_err(|_| format!("{text:?} is too large"))?;
    if !scaled.is_multiple_of(scale) || bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
        let near = (bytes / PAGE_BYTES).max(1) * PAGE_BYTES;
        return Err(format!(
            "{text:?} is no whole number of pages of 4 KiB; {}K would be",
            near >> 10
        ));
    }
    if bytes > MEMORY_BYTES_MAX {
        let most = MEMORY_BYTES_MAX >> 30;
        return Err(format!(
            "{bytes} bytes is more than a machine has: at most {most}G"
        ));
    }
    Ok(bytes)
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes with a unit.
pub(crate) fn bytes(number: u64) -> String {
    match number {
        0..=9_999 => format!("{} B", thousands(number)),
        10_000..=10_239_999 => format!("{:.1} KiB", number as f64 / 1024.0),
        _ => format!("{:.1} MiB", number as f64 / (1024.0 * 1024.0)),
    }
}

/// Nanoseconds as seconds.
pub(crate) fn seconds(ns: u64) -> String {
    format!("{:.3} s", ns as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_units() {
        assert_eq!(parse_size("256M"), Ok(256 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("8192"), Ok(8192));
        assert_eq!(parse_size("64m"), Ok(64 << 20));
        for bad in [
            "",
            "12Q",
            "0",
            "-1M",
            "100",
            "99999999999999999999G",
            "17179869184G",
            "1025G",
            "é",
            "é1M",
            "M",
            "1MM",
            "5 G",
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_fraction_that_comes_to_whole_pages_is_a_size() {
        assert_eq!(parse_size("3.5G"), Ok((7 << 30) / 2));
        assert_eq!(parse_size("0.5GiB"), Ok(512 << 20));
        assert_eq!(parse_size("1.25M"), Ok(1280 << 10));
        assert_eq!(parse_size("4096.0"), Ok(4096));
        for bad in [".5G", "1.G", "1.2.3G", "0.0G", "3.5", "1.0000000000000001G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        let told = parse_size("0.1G").unwrap_err();
        assert!(told.contains("104856K"), "{told}");
        assert!(parse_size("104856K").is_ok());
    }

    #[test]
    fn numbers_are_grouped_by_three() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(59_867), "59,867");
        assert_eq!(thousands(1_000_000), "1,000,000");
    }
}

//! Numbers as people read and write them.

use hindsight_replay::MEMORY_BYTES_MAX;

/// Parses a size of RAM: `256M`, `1G`, `4096K` or plain bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.trim_end_matches(['B', 'b', 'i']).split_at_checked(
        text.trim_end_matches(['B', 'b', 'i'])
            .trim_end_matches(|c: char| c.is_alphabetic())
            .len(),
    ) {
        Some(parts) => parts,
        None => (text, ""),
    };
    let shift = match unit {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        _ => return Err(format!("unknown unit {unit:?}; use K, M or G")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|error| format!("{digits:?}: {error}"))?;
    let bytes = number.checked_mul(1 << shift).ok_or("too large")?;
    if bytes == 0 || !bytes.is_multiple_of(4096) {
        return Err(format!("{bytes} bytes is not a multiple of 4 KiB"));
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
pub fn thousands(number: u64) -> String {
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
pub fn bytes(number: u64) -> String {
    match number {
        0..=9_999 => format!("{} B", thousands(number)),
        10_000..=10_239_999 => format!("{:.1} KiB", number as f64 / 1024.0),
        _ => format!("{:.1} MiB", number as f64 / (1024.0 * 1024.0)),
    }
}

/// Nanoseconds as seconds.
pub fn seconds(ns: u64) -> String {
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
        ] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_grouped_by_three() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(59_867), "59,867");
        assert_eq!(thousands(1_000_000), "1,000,000");
    }
}

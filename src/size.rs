//! Sizes as people write them: `4GiB`, `512 MiB`, `1048576`, `64k`.

/// What is wrong with a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a size; use a number of bytes, or one followed by KiB, MiB, GiB or TiB")]
pub struct BadSize(pub String);

/// Bytes of a size such as `4GiB`. Units are powers of 1024, whatever their spelling (`G`, `GB`, `GiB`).
pub fn parse(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let number: u64 = trimmed[..digits].parse().map_err(|_| bad())?;
    let shift = match trimmed[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    number.checked_mul(1 << shift).ok_or_else(bad)
}

/// A number of things: `1 shard`, `16 shards`.
pub fn count(number: u64, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A size in the largest unit that keeps it short: `4.0 GiB`.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in
            [("4GiB", 4 << 30), ("512 MiB", 512 << 20), ("64k", 64 << 10), ("7", 7), ("1TB", 1 << 40)]
        {
            assert_eq!(parse(text), Ok(bytes));
        }
        for text in ["", "GiB", "-1", "1.5GiB", "4XiB", "99999999999TiB", "18446744073709551616"] {
            assert_eq!(parse(text), Err(BadSize(text.into())));
        }
        assert_eq!(show(4 << 30), "4.0 GiB");
        assert_eq!(show(1023), "1023 bytes");
    }
}

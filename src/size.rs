//! Sizes as people write them: `4GiB`, `512 MiB`, `1048576`, `64k`, `4GB`.

/// What is wrong with a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a size; use a number of bytes, or one followed by KiB, MiB, GiB or TiB (K, M, G and T are the same; KB, MB, GB and TB are \
     powers of 1000)"
)]
pub struct BadSize(pub String);

/// Bytes of a size such as `4GiB`. `GiB` and `G` are powers of 1024, `GB` is one of 1000, in capitals or not: what the units are by
/// their standards, as in dd and truncate. (Redis has them the other way round, `1g` of 1000 and `1gb` of 1024.)
pub fn parse(text: &str) -> Result<u64, BadSize> {
    let bad = || BadSize(text.to_owned());
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let number: u64 = trimmed[..digits].parse().map_err(|_| bad())?;
    let unit: u64 = match trimmed[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(bad()),
    };
    number.checked_mul(unit).ok_or_else(bad)
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

/// Two sizes that differ, in words that do: in bytes where the units are too coarse.
pub fn show_apart(one: u64, other: u64) -> (String, String) {
    let (short, other_short) = (show(one), show(other));
    if short != other_short {
        return (short, other_short);
    }
    (count(one, "byte"), count(other, "byte"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_differ_do_not_look_the_same() {
        let pair = |one: &str, other: &str| (one.to_owned(), other.to_owned());
        assert_eq!(show_apart(64 << 20, 1 << 30), pair("64.0 MiB", "1.0 GiB"));
        assert_eq!(show_apart(64 << 20, (64 << 20) - 1), pair("67108864 bytes", "67108863 bytes"));
    }

    #[test]
    fn sizes_are_read_and_shown() {
        for (text, bytes) in [
            ("4GiB", 4 << 30),
            ("512 MiB", 512 << 20),
            ("7", 7),
            ("7b", 7),
            ("64k", 64 << 10),
            ("64K", 64 << 10),
            ("64kib", 64 << 10),
            ("64kB", 64_000),
            ("2M", 2 << 20),
            ("2MB", 2_000_000),
            ("4G", 4 << 30),
            ("4GB", 4_000_000_000),
            ("4 gb", 4_000_000_000),
            ("1T", 1 << 40),
            ("1TiB", 1 << 40),
            ("1TB", 1_000_000_000_000),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "GiB", "-1", "1.5GiB", "4XiB", "99999999999TiB", "99999999999TB", "18446744073709551616"]
        {
            assert_eq!(parse(text), Err(BadSize(text.into())));
        }
        assert_eq!(show(4 << 30), "4.0 GiB");
        assert_eq!(show(1023), "1023 bytes");
    }
}

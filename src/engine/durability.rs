//! The durability modes: when a write is acknowledged and when the device is flushed.

use std::str::FromStr;

/// When a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// After it is durable. Nothing acknowledged is ever lost.
    #[default]
    Always,
    /// At once; written and flushed every so many milliseconds: that much may be lost.
    Interval(u64),
    /// At once; written and flushed after so many logged bytes: that much, and the write that passed it, may be lost.
    Bytes(u64),
    /// At once; written within a second, never flushed until SAVE or a clean stop: a power cut may lose anything since.
    Never,
}

/// In the modes without a flush deadline, what was acknowledged is handed to the device after at most this long.
pub const WRITE_DELAY_MS: u64 = 1_000;

/// What is wrong with a durability mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is not a durability mode; use always, interval=MS (1 to 3600000), bytes=N (1 to 1GiB; KiB, MiB and GiB are understood) or never"
)]
pub struct BadDurability(pub String);

impl FromStr for Durability {
    type Err = BadDurability;

    fn from_str(text: &str) -> Result<Durability, BadDurability> {
        let bad = || BadDurability(text.to_owned());
        match text.split_once('=') {
            None if text == "always" => Ok(Durability::Always),
            None if text == "never" => Ok(Durability::Never),
            Some(("interval", ms)) => {
                let ms = ms.strip_suffix("ms").unwrap_or(ms);
                let ms = ms.parse().ok().filter(|ms| (1..=3_600_000).contains(ms)).ok_or_else(bad)?;
                Ok(Durability::Interval(ms))
            }
            Some(("bytes", size)) => {
                let size = crate::size::parse(size)
                    .ok()
                    .filter(|size| (1..=1 << 30).contains(size))
                    .ok_or_else(bad)?;
                Ok(Durability::Bytes(size))
            }
            _ => Err(bad()),
        }
    }
}

impl std::fmt::Display for Durability {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Durability::Always => f.write_str("always"),
            Durability::Interval(ms) => write!(f, "interval={ms}"),
            Durability::Bytes(size) => write!(f, "bytes={size}"),
            Durability::Never => f.write_str("never"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_read_and_written() {
        for (text, mode, back) in [
            ("always", Durability::Always, "always"),
            ("never", Durability::Never, "never"),
            ("interval=250", Durability::Interval(250), "interval=250"),
            ("interval=250ms", Durability::Interval(250), "interval=250"),
            ("bytes=1MiB", Durability::Bytes(1 << 20), "bytes=1048576"),
        ] {
            assert_eq!(text.parse(), Ok(mode));
            assert_eq!(mode.to_string(), back);
        }
        for text in
            ["", "Always", "interval", "interval=0", "interval=x", "bytes=0", "bytes=2GiB", "never=1", "sync"]
        {
            assert!(text.parse::<Durability>().is_err(), "{text}");
        }
    }
}

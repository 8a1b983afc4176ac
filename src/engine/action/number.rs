//! Numbers as text, read and written the way Redis does it.
//!
//! Invariant: a text that `parse_integer` accepts is the one text of its integer, so that what INCR writes and what
//! it reads are the same set.

/// Longest text of an `i64`: a sign and 19 digits.
const INTEGER_TEXT_SIZE_MAX: usize = 20;

/// Reads an integer strictly: no spaces, no plus sign, no leading zeros, no `-0`.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    if text.len() > INTEGER_TEXT_SIZE_MAX {
        return None;
    }
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    match digits {
        [b'0'] if !negative => return Some(0),
        [b'1'..=b'9', ..] => {}
        _ => return None,
    }
    // Collected as a negative number, since that side has one more value.
    let mut value: i64 = 0;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        value = value.checked_mul(10)?.checked_sub(i64::from(digit - b'0'))?;
    }
    if negative { Some(value) } else { value.checked_neg() }
}

/// Reads a float: decimal, with or without an exponent, or an infinity by name; never NaN, never with spaces.
///
/// Redis reads a `long double` and so also takes hexadecimal floats and exponents beyond 308; this does not.
pub fn parse_float(text: &[u8]) -> Option<f64> {
    let text = std::str::from_utf8(text).ok()?;
    let value: f64 = text.parse().ok()?;
    let named = text.trim_start_matches(['+', '-']).starts_with(['i', 'I']);
    if value.is_nan() || (value.is_infinite() && !named) {
        return None;
    }
    Some(value)
}

/// Writes a float with as few digits as read back to the same value, and without an exponent.
///
/// Redis computes in `long double` and writes 17 fractional digits with trailing zeros removed. Both agree wherever a
/// double holds the sum as it is written; 0.1 + 0.2 is 0.3 there and 0.30000000000000004 here.
pub fn format_float(value: f64) -> String {
    if value == 0.0 { "0".to_owned() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_read_strictly() {
        for (text, expected) in [
            ("0", Some(0)),
            ("7", Some(7)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("-9223372036854775809", None),
            ("99999999999999999999", None),
            ("", None),
            ("-", None),
            ("+1", None),
            ("-0", None),
            ("01", None),
            ("00", None),
            (" 1", None),
            ("1 ", None),
            ("1.0", None),
            ("1a", None),
            ("0x1", None),
        ] {
            assert_eq!(parse_integer(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn floats_take_exponents_and_named_infinities_but_no_nan() {
        for (text, expected) in [
            ("1", Some(1.0)),
            ("+1.5", Some(1.5)),
            ("-.5", Some(-0.5)),
            ("5.0e3", Some(5000.0)),
            ("1E-2", Some(0.01)),
            ("inf", Some(f64::INFINITY)),
            ("-Infinity", Some(f64::NEG_INFINITY)),
            ("nan", None),
            ("1e400", None),
            ("", None),
            (" 1", None),
            ("1 ", None),
            ("1,5", None),
            ("0x10", None),
        ] {
            assert_eq!(parse_float(text.as_bytes()), expected, "{text:?}");
        }
    }

    #[test]
    fn floats_are_written_without_exponent() {
        for (value, expected) in [
            (0.0, "0"),
            (-0.0, "0"),
            (3.0, "3"),
            (10.6, "10.6"),
            (-2.5, "-2.5"),
            (1e20, "100000000000000000000"),
            (1e-7, "0.0000001"),
        ] {
            assert_eq!(format_float(value), expected);
        }
    }
}

//! A request typed by hand: one line, split at spaces, with quotes as in a Redis configuration file.

use bytes::Bytes;

/// The quotes of a line do not match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unbalanced;

/// Splits a line into arguments. Double quotes know `\n \r \t \b \a \xHH`, single quotes know `\'`; a closing quote
/// ends its argument.
pub fn split(line: &[u8]) -> Result<Vec<Bytes>, Unbalanced> {
    let mut arguments = Vec::new();
    let mut rest = line;
    loop {
        let start = rest.iter().position(|b| !is_space(*b)).unwrap_or(rest.len());
        rest = &rest[start..];
        // As in C, a zero byte ends the line.
        if rest.first().is_none_or(|b| *b == 0) {
            return Ok(arguments);
        }
        let (argument, after) = next_argument(rest)?;
        arguments.push(Bytes::from(argument));
        rest = after;
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

fn next_argument(mut rest: &[u8]) -> Result<(Vec<u8>, &[u8]), Unbalanced> {
    let mut argument = Vec::new();
    loop {
        match rest {
            [] | [b' ' | b'\n' | b'\r' | b'\t' | 0, ..] => return Ok((argument, rest)),
            [b'"', quoted @ ..] => {
                let after = double_quoted(quoted, &mut argument)?;
                return end_of_quote(argument, after);
            }
            [b'\'', quoted @ ..] => {
                let after = single_quoted(quoted, &mut argument)?;
                return end_of_quote(argument, after);
            }
            [byte, after @ ..] => {
                argument.push(*byte);
                rest = after;
            }
        }
    }
}

fn end_of_quote(argument: Vec<u8>, after: &[u8]) -> Result<(Vec<u8>, &[u8]), Unbalanced> {
    match after.first() {
        Some(byte) if *byte != 0 && !is_space(*byte) => Err(Unbalanced),
        _ => Ok((argument, after)),
    }
}

fn double_quoted<'a>(mut rest: &'a [u8], argument: &mut Vec<u8>) -> Result<&'a [u8], Unbalanced> {
    loop {
        let (byte, after) = match rest {
            [] | [0, ..] => return Err(Unbalanced),
            [b'"', after @ ..] => return Ok(after),
            [b'\\', b'x', high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                (hex(*high) * 16 + hex(*low), after)
            }
            [b'\\', escaped, after @ ..] if *escaped != 0 => {
                let byte = match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 0x08,
                    b'a' => 0x07,
                    other => *other,
                };
                (byte, after)
            }
            [byte, after @ ..] => (*byte, after),
        };
        argument.push(byte);
        rest = after;
    }
}

fn single_quoted<'a>(mut rest: &'a [u8], argument: &mut Vec<u8>) -> Result<&'a [u8], Unbalanced> {
    loop {
        let (byte, after) = match rest {
            [] | [0, ..] => return Err(Unbalanced),
            [b'\'', after @ ..] => return Ok(after),
            [b'\\', b'\'', after @ ..] => (b'\'', after),
            [byte, after @ ..] => (*byte, after),
        };
        argument.push(byte);
        rest = after;
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_split_as_redis_splits_them() {
        for (line, expected) in [
            ("", Some(vec![])),
            ("  \t ", Some(vec![])),
            ("GET k", Some(vec!["GET", "k"])),
            ("  SET k  v\r", Some(vec!["SET", "k", "v"])),
            (r#"SET k "a b""#, Some(vec!["SET", "k", "a b"])),
            (r#"SET k "" x"#, Some(vec!["SET", "k", "", "x"])),
            (r#""\x41\n\"\q\xZ""#, Some(vec!["A\n\"qxZ"])),
            (r"'it\'s \n'", Some(vec![r"it's \n"])),
            (r#"pre"fix" y"#, Some(vec!["prefix", "y"])),
            (r#""a"b"#, None),
            (r#""a"#, None),
            ("'a", None),
            ("'a'b", None),
            (r#""a\"#, None),
        ] {
            let split = split(line.as_bytes()).ok();
            let expected = expected.map(|args| args.into_iter().map(Bytes::from).collect::<Vec<_>>());
            assert_eq!(split, expected, "{line:?}");
        }
    }
}

//! Patterns of KEYS and SCAN: `*`, `?`, `[a-z]`, `[^a]` and backslash, as Redis's `stringmatchlen` reads them.
//!
//! Invariant: the time is at most pattern length times text length. Only the last `*` is ever gone back to, which is
//! enough: what an earlier star could take more of, the later one can take as well.

/// Whether the whole text matches the pattern.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on after the last star, and how much of the text it leaves behind.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        if pattern.get(p) == Some(&b'*') {
            p += 1;
            star = Some((p, t));
            continue;
        }
        if let Some(length) = pattern.get(p).and_then(|_| match_one(&pattern[p..], text[t])) {
            p += length;
            t += 1;
            continue;
        }
        let Some((after_star, left_at)) = star else { return false };
        p = after_star;
        t = left_at + 1;
        star = Some((after_star, t));
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The bytes that every text which matches begins with.
pub fn literal_prefix(pattern: &[u8]) -> Vec<u8> {
    let (mut prefix, mut at) = (Vec::new(), 0);
    loop {
        match &pattern[at..] {
            [] | [b'*' | b'?' | b'[', ..] => return prefix,
            [b'\\', escaped, ..] => {
                prefix.push(*escaped);
                at += 2;
            }
            [literal, ..] => {
                prefix.push(*literal);
                at += 1;
            }
        }
    }
}

/// Matches one byte with the element at the front of the pattern; gives the element's length when it does.
fn match_one(pattern: &[u8], byte: u8) -> Option<usize> {
    match pattern {
        [b'?', ..] => Some(1),
        [b'[', class @ ..] => {
            let (length, holds) = class_holds(class, byte);
            holds.then_some(1 + length)
        }
        [b'\\', escaped, ..] => (*escaped == byte).then_some(2),
        [literal, ..] => (*literal == byte).then_some(1),
        [] => None,
    }
}

/// Reads a class after its bracket: its length, closing bracket included, and whether the byte is in it. A class
/// without an end goes to the end of the pattern.
fn class_holds(class: &[u8], byte: u8) -> (usize, bool) {
    let negated = class.first() == Some(&b'^');
    let mut at = usize::from(negated);
    let mut holds = false;
    loop {
        match &class[at.min(class.len())..] {
            [] => return (class.len(), holds != negated),
            [b']', ..] => return (at + 1, holds != negated),
            [b'\\', escaped, ..] => {
                holds |= *escaped == byte;
                at += 2;
            }
            [from, b'-', to, ..] => {
                holds |= (*from.min(to)..=*from.max(to)).contains(&byte);
                at += 3;
            }
            [literal, ..] => {
                holds |= *literal == byte;
                at += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_redis() {
        for (pattern, text, expected) in [
            ("", "", true),
            ("", "a", false),
            ("*", "", true),
            ("*", "anything", true),
            ("**", "a", true),
            ("h?llo", "hello", true),
            ("h?llo", "hllo", false),
            ("h*llo", "heeeello", true),
            ("h*llo", "hell", false),
            ("*a*b*c", "xxaxxbxxc", true),
            ("*a*b*c", "xxbxxaxxc", false),
            ("h[ae]llo", "hallo", true),
            ("h[ae]llo", "hillo", false),
            ("h[^e]llo", "hallo", true),
            ("h[^e]llo", "hello", false),
            ("h[a-b]llo", "hbllo", true),
            ("h[b-a]llo", "hallo", true),
            ("h[a-b]llo", "hcllo", false),
            ("[\\]]", "]", true),
            ("[a", "a", true),
            ("[^", "a", true),
            ("[", "a", false),
            ("[]", "a", false),
            ("a\\*", "a*", true),
            ("a\\*", "ab", false),
            ("a\\", "a\\", true),
            ("\\", "", false),
            ("user:*:name", "user:1:name", true),
            ("user:*:name", "user:1:names", false),
            ("*x", "x", true),
            ("x*", "x", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern:?} on {text:?}");
            let prefix = literal_prefix(pattern.as_bytes());
            assert!(!expected || text.as_bytes().starts_with(&prefix), "{pattern:?} on {text:?}");
        }
    }

    #[test]
    fn a_pattern_begins_with_what_every_text_that_matches_begins_with() {
        for (pattern, prefix) in [
            ("", ""),
            ("*", ""),
            ("user:*", "user:"),
            ("us?r:*", "us"),
            ("us[e]r", "us"),
            ("exact", "exact"),
            ("a\\*b*", "a*b"),
            ("\\[x\\]?", "[x]"),
            ("\\n\\", "n\\"),
        ] {
            assert_eq!(literal_prefix(pattern.as_bytes()), prefix.as_bytes(), "{pattern:?}");
        }
    }

    #[test]
    fn many_stars_take_no_exponential_time() {
        let pattern = [b"a*".repeat(1000), b"b".to_vec()].concat();
        assert!(!matches(&pattern, &b"a".repeat(20_000)));
    }
}

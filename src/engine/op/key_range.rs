//! Keys between two bounds, and in which order they are wanted.

use std::ops::Bound;

use super::Key;

/// Keys between two bounds, in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRange {
    /// The lower bound.
    pub from: Bound<Key>,
    /// The upper bound.
    pub to: Bound<Key>,
}

/// In which order keys are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The least key first.
    Ascending,
    /// The greatest key first.
    Descending,
}

/// What is wanted of a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeQuery {
    /// Which keys.
    pub range: KeyRange,
    /// Which of them first.
    pub order: Order,
    /// Keys at most.
    pub limit: usize,
    /// Whether their values are wanted.
    pub with_values: bool,
}

impl KeyRange {
    /// Every key.
    pub fn all() -> KeyRange {
        KeyRange { from: Bound::Unbounded, to: Bound::Unbounded }
    }

    /// The keys that begin so.
    pub fn of_prefix(prefix: Key) -> KeyRange {
        // The least string that is greater than all of them, unless the prefix is nothing but the highest byte.
        let kept = prefix.iter().rposition(|byte| *byte != u8::MAX).map_or(0, |last| last + 1);
        let mut behind = prefix[..kept].to_vec();
        let to = match behind.last_mut() {
            Some(last) => {
                *last += 1;
                Bound::Excluded(behind.into())
            }
            None => Bound::Unbounded,
        };
        KeyRange { from: Bound::Included(prefix), to }
    }

    /// Whether a key is between the bounds.
    pub fn contains(&self, key: &[u8]) -> bool {
        let is_behind = match &self.from {
            Bound::Included(from) => key >= &from[..],
            Bound::Excluded(from) => key > &from[..],
            Bound::Unbounded => true,
        };
        is_behind
            && match &self.to {
                Bound::Included(to) => key <= &to[..],
                Bound::Excluded(to) => key < &to[..],
                Bound::Unbounded => true,
            }
    }

    /// What is left of it once a key was listed, and all before that.
    pub fn after(&self, key: Key, order: Order) -> KeyRange {
        match order {
            Order::Ascending => KeyRange { from: Bound::Excluded(key), to: self.to.clone() },
            Order::Descending => KeyRange { from: self.from.clone(), to: Bound::Excluded(key) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_the_keys_that_begin_so_and_no_others() {
        let keys: [&[u8]; 9] =
            [b"", b"a", b"a\xff", b"a\xff\0", b"a\xff\xff", b"a\xff\xffz", b"b", b"\xff", b"\xff\xff1"];
        for prefix in keys {
            let range = KeyRange::of_prefix(Key::copy_from_slice(prefix));
            for key in keys {
                assert_eq!(range.contains(key), key.starts_with(prefix), "{key:?} of {prefix:?}");
            }
        }
    }

    #[test]
    fn a_range_goes_on_behind_what_was_listed() {
        let range = KeyRange { from: Bound::Included("b".into()), to: Bound::Included("d".into()) };
        let in_it = |range: &KeyRange| {
            ["a", "b", "c", "d", "e"]
                .iter()
                .filter(|key| range.contains(key.as_bytes()))
                .copied()
                .collect::<String>()
        };
        assert_eq!(in_it(&range), "bcd");
        assert_eq!(in_it(&range.after("c".into(), Order::Ascending)), "d");
        assert_eq!(in_it(&range.after("c".into(), Order::Descending)), "b");
        let none = KeyRange { from: Bound::Included("d".into()), to: Bound::Excluded("b".into()) };
        assert_eq!(in_it(&none), "");
        assert_eq!(in_it(&KeyRange::all()), "abcde");
    }
}

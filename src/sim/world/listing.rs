//! Keys in order and by prefixes: what clients ask for, and what the model says of it.

use std::collections::BTreeSet;
use std::ops::Bound;

use super::{Changes, Expect, KEYS_PER_CLIENT, Open, World, key_of};
use crate::engine::op::{Key, KeyRange, Order, RangeQuery};
use crate::engine::range::Found;
use crate::format::superblock::IndexKind;
use crate::limits::RANGE_SIZE_MAX;
use crate::sim::node::{Outcome, Request, SimNode};
use crate::sim::promise::Promise;

fn open(request: Request, expect: Expect) -> Open {
    Open { request, expect, changes: Changes::new(), seen: false }
}

impl World {
    /// A scan of everything or of the client's own keys, or a range of them. Which one follows from the number of the request.
    pub(super) fn choose_listing(&mut self, client: usize) -> Open {
        let number = self.next_id as usize;
        if self.config.index == IndexKind::Hash || number.is_multiple_of(3) {
            return open(Request::Keys, Expect::Keys);
        }
        if number % 3 == 1 {
            return open(Request::KeysOf(Key::from(format!("c{client}:"))), Expect::OwnKeys);
        }
        let bound = |number: usize| {
            let key = key_of(client, number / 2 % KEYS_PER_CLIENT);
            if number.is_multiple_of(2) { Bound::Included(key) } else { Bound::Excluded(key) }
        };
        let is_all = number.is_multiple_of(4);
        let range = if is_all {
            KeyRange::of_prefix(Key::from(format!("c{client}:")))
        } else {
            KeyRange { from: bound(number / 3), to: bound(number / 7) }
        };
        let query = RangeQuery {
            range,
            order: if number.is_multiple_of(5) { Order::Descending } else { Order::Ascending },
            limit: if number.is_multiple_of(7) { 3 } else { 100 },
            with_values: !number.is_multiple_of(11),
        };
        open(Request::Range(query.clone()), Expect::Range(query))
    }

    pub(super) fn on_own_keys(&mut self, client: usize, keys: &[Key]) {
        let mine = (0..KEYS_PER_CLIENT).map(|number| key_of(client, number));
        let expected: BTreeSet<Key> = mine.filter(|key| self.state(client, key).is_some()).collect();
        let prefix = format!("c{client}:");
        let found = keys.iter().filter(|key| key.starts_with(prefix.as_bytes()));
        let found: BTreeSet<Key> = found.cloned().collect();
        if found != expected {
            self.broken(Promise::Scans, &format!("a scan of '{prefix}' lists {found:?}, not {expected:?}"));
        }
        self.probes.hit("scan of a prefix");
    }

    /// Nothing of the client's was under way, so the answer is exact, but for what did not fit it.
    pub(super) fn on_range(&mut self, client: usize, query: &RangeQuery, found: &Found) {
        let mine = (0..KEYS_PER_CLIENT).map(|number| key_of(client, number));
        let mut expected: Found = mine
            .filter(|key| query.range.contains(key))
            .filter_map(|key| {
                let (value, _) = self.state(client, &key)?;
                Some((key, query.with_values.then(|| value.into())))
            })
            .collect();
        expected.sort();
        if query.order == Order::Descending {
            expected.reverse();
        }
        expected.truncate(query.limit);
        let size: usize = expected
            .iter()
            .take(found.len() + 1)
            .map(|(key, value)| key.len() + value.as_ref().map_or(0, |value| value.len()))
            .sum();
        let is_cut = !found.is_empty() && found.len() < expected.len() && size > RANGE_SIZE_MAX;
        if *found != expected && !(is_cut && expected.starts_with(found)) {
            let names = |found: &Found| {
                let one = |(key, value): &(Key, Option<bytes::Bytes>)| {
                    (key.clone(), value.as_ref().map(|v| v.len()))
                };
                found.iter().map(one).collect::<Vec<_>>()
            };
            let what = format!("{query:?} gives {:?}, not {:?}", names(found), names(&expected));
            self.broken(Promise::Scans, &what);
        }
        self.probes.hit("range of keys");
        self.probes.hit_if(is_cut, "range cut by its size");
    }

    /// As many keys are listed by name as there are.
    pub(super) fn check_names(&self, node: &mut SimNode, count: u64) {
        if self.config.index == IndexKind::Hash {
            return;
        }
        let query = RangeQuery {
            range: KeyRange::all(),
            order: Order::Ascending,
            limit: usize::MAX,
            with_values: false,
        };
        match node.run(&self.disk, Request::Range(query)) {
            Some(Outcome::Range(found)) if found.len() as u64 == count && found.is_sorted() => {}
            other => self
                .broken(Promise::Scans, &format!("{count} keys are there, and these are listed: {other:?}")),
        }
    }
}

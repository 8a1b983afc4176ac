//! Watches: whether a key has changed since somebody looked.

use super::Shard;
use crate::engine::op::Key;

/// Watches of one key.
pub(super) struct Watch {
    count: usize,
    version: u64,
}

impl Shard {
    pub(super) fn touch(&mut self, key: &Key) {
        if !self.watches.is_empty()
            && let Some(watch) = self.watches.get_mut(key)
        {
            self.version += 1;
            watch.version = self.version;
        }
    }

    /// Starts a watch and returns the key's version.
    pub(in crate::engine) fn watch(&mut self, key: Key) -> u64 {
        let version = self.version;
        let watch = self.watches.entry(key).or_insert(Watch { count: 0, version });
        watch.count += 1;
        watch.version
    }

    /// Ends one watch.
    pub(in crate::engine) fn unwatch(&mut self, key: &Key) {
        if let Some(watch) = self.watches.get_mut(key) {
            watch.count -= 1;
            if watch.count == 0 {
                self.watches.remove(key);
            }
        }
    }

    /// Whether a watched key is as it was.
    pub(in crate::engine) fn is_unchanged(&self, key: &Key, version: u64) -> bool {
        self.watches.get(key).is_some_and(|watch| watch.version == version)
    }
}

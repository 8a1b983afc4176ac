//! Watches: whether a key has changed since somebody looked.

use super::Shard;
use crate::engine::index::Identity;
use crate::engine::op::Key;

/// Watches of one key.
pub(super) struct Watch {
    count: usize,
    version: u64,
}

impl Shard {
    pub(super) fn touch(&mut self, identity: Identity) {
        if !self.watches.is_empty()
            && let Some(watch) = self.watches.get_mut(&identity)
        {
            self.version += 1;
            watch.version = self.version;
        }
    }

    /// Starts a watch and returns the key's version.
    pub(in crate::engine) fn watch(&mut self, key: &Key) -> u64 {
        let (version, identity) = (self.version, self.hash(key).identity());
        let watch = self.watches.entry(identity).or_insert(Watch { count: 0, version });
        watch.count += 1;
        watch.version
    }

    /// Ends one watch.
    pub(in crate::engine) fn unwatch(&mut self, key: &Key) {
        let identity = self.hash(key).identity();
        if let Some(watch) = self.watches.get_mut(&identity) {
            watch.count -= 1;
            if watch.count == 0 {
                self.watches.remove(&identity);
            }
        }
    }

    /// Whether a watched key is as it was.
    pub(in crate::engine) fn is_unchanged(&self, key: &Key, version: u64) -> bool {
        self.watches.get(&self.hash(key).identity()).is_some_and(|watch| watch.version == version)
    }
}

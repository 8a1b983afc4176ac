//! A shard's state as recovery hands it over.

use std::collections::BTreeMap;

use crate::engine::action::is_expired;
use crate::engine::extents::Extents;
use crate::engine::index::{Entry, HashIndex, Index, hash_key};
use crate::engine::log::ShardLog;
use crate::engine::op::{BatchId, Key, ShardId};
use crate::engine::recovery::Doubt;
use crate::format::manifest::ManifestPiece;

/// What recovery hands over.
pub struct ShardState {
    pub(in crate::engine) id: ShardId,
    pub(in crate::engine) index: HashIndex,
    /// Lengths and pieces of the values of keys whose record is a manifest that can be read.
    pub(in crate::engine) manifests: BTreeMap<Key, (u64, Vec<ManifestPiece>)>,
    /// Chunks that those name.
    pub(in crate::engine) chunks: BTreeMap<u64, Entry>,
    pub(in crate::engine) log: ShardLog,
    pub(in crate::engine) extents: Extents,
    pub(in crate::engine) durable_frame: u64,
    pub(in crate::engine) clean: bool,
    pub(in crate::engine) doubt: Doubt,
    /// Nothing of it is damaged, so garbage can be told from what was lost.
    pub(in crate::engine) is_collectable: bool,
    /// Batches with live parts here that only another shard's commit record decides, with that shard.
    pub(in crate::engine) copies_due: Vec<(BatchId, ShardId)>,
}

impl ShardState {
    /// Keys in it, expired ones that are still stored included.
    pub fn key_count(&self) -> u64 {
        self.index.len()
    }

    /// Bytes of memory that the index takes.
    pub fn index_size(&self) -> u64 {
        self.index.heap_size() as u64
    }

    /// Whether records were lost that may concern keys of this shard: those keys answer an error.
    pub fn is_in_doubt(&self) -> bool {
        self.doubt.is_any()
    }

    /// Keys with a long value that lacks chunks: how many, and where the manifest is.
    pub(in crate::engine) fn incomplete_values<'a>(
        &'a self,
        secret: &'a [u8; 16],
    ) -> impl Iterator<Item = (&'a Key, usize, Entry)> + 'a {
        self.manifests.iter().filter_map(|(key, (_, pieces))| {
            let missing = pieces.iter().filter(|one| !self.chunks.contains_key(&one.id)).count();
            let entry = self.index.get(hash_key(secret, key), key)?;
            (missing > 0).then_some((key, missing, *entry))
        })
    }

    /// Which shard it is.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// In what this state and another of the same shard, found another way, say different things about a key. One that has
    /// expired may be there or not.
    pub fn difference(&self, other: &ShardState, secret: &[u8; 16], now_ms: u64) -> Option<String> {
        // A frame whose write failed may be there and in the next extent again: it is the same record.
        let anywhere = |entry: &Entry| Entry { extent: 0, offset: 0, ..*entry };
        let mut found = None;
        for (one, another) in [(self, other), (other, self)] {
            one.each(&mut |key, entry| {
                let hash = hash_key(secret, key);
                let there = another.index.get(hash, key);
                if found.is_some() || is_expired(entry.expires_at_ms, now_ms) {
                    return;
                }
                if there.map(anywhere) != Some(anywhere(entry)) {
                    found = Some(format!("key '{}': {entry:?} and {there:?}", key.escape_ascii()));
                    return;
                }
                let (value, other_value) = (one.manifests.get(key), another.manifests.get(key));
                if value != other_value {
                    found = Some(format!("key '{}': two manifests", key.escape_ascii()));
                }
                for piece in value.iter().flat_map(|(_, pieces)| pieces) {
                    let (here, there) = (one.chunks.get(&piece.id), another.chunks.get(&piece.id));
                    if here.map(anywhere) != there.map(anywhere) {
                        let what = format!("chunk {}: {here:?} and {there:?}", piece.id);
                        found = Some(format!("key '{}': {what}", key.escape_ascii()));
                    }
                }
            });
        }
        found
    }

    pub(super) fn each(&self, visit: &mut dyn FnMut(&[u8], &Entry)) {
        let mut cursor = 0;
        loop {
            cursor = self.index.scan(cursor, 1024, visit);
            if cursor == 0 {
                break;
            }
        }
    }
}

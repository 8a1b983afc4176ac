//! What a shard's log says about some keys: every record of theirs that counts, not only the newest.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::frames::Found;
use crate::engine::index::RecordRef;
use crate::engine::op::BatchId;
use crate::format::manifest::ManifestPiece;
use crate::format::record::RecordType;

/// A record that a scan accepted.
#[derive(Debug, Clone)]
pub(in crate::engine) struct SeenRecord {
    pub(in crate::engine) kind: RecordType,
    pub(in crate::engine) key: Bytes,
    pub(in crate::engine) record: RecordRef,
    /// It counts only if this batch was committed.
    pub(in crate::engine) batch: Option<BatchId>,
    pub(in crate::engine) value_intact: bool,
    /// The pieces of a long value.
    pub(in crate::engine) pieces: Option<Vec<ManifestPiece>>,
    /// A FLUSHALL came after it.
    pub(in crate::engine) is_cleared: bool,
}

/// Records of the keys that somebody wants to know of, in the order of the log.
#[derive(Debug, Default)]
pub(super) struct History {
    keys: BTreeSet<Bytes>,
    pub(super) records: Vec<SeenRecord>,
}

impl History {
    pub(super) fn of(keys: BTreeSet<Bytes>) -> History {
        History { keys, records: Vec::new() }
    }

    pub(super) fn on_record(&mut self, found: &Found) {
        if found.kind == RecordType::Clear {
            for one in &mut self.records {
                one.is_cleared = true;
            }
        }
        let has_key = matches!(found.kind, RecordType::Put | RecordType::Delete);
        if has_key && !self.keys.is_empty() && self.keys.contains(&found.key) {
            self.records.push(SeenRecord {
                kind: found.kind,
                key: found.key.clone(),
                record: found.record,
                batch: found.batch.map(|(batch, _)| batch),
                value_intact: found.value_intact,
                pieces: found.pieces.clone(),
                is_cleared: false,
            });
        }
    }
}

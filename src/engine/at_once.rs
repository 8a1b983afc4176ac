//! Direct requests that are answered at once: on keys that nobody is changing, reads of what is in memory or not there, and writes
//! where the mode answers them before they are durable.
//!
//! Such a request needs no operation, no token and no memory of its own but for what is stored, and most requests of a node whose hot
//! records fit its cache are of this kind. What is to be looked up is fetched for all of them first, as in `arrivals`.
//!
//! Invariant: what is answered here is what the operation would have answered, had it begun now. It may overtake operations that have
//! arrived and not begun, so it is only for who waits for none of those: then no order of the two can be told from the other.

use super::Engine;
use super::allocator::Purpose;
use super::index::{Index, KeyHash};
use super::log::Draft;
use super::op::{Clock, Direct, DirectReply, KeyEffect, ShardId};
use crate::device::Device;
use crate::engine::shard::Lookup;
use crate::format::record::{Record, RecordType};
use crate::owned::owned;

/// The most calls in a row that do not try, as a power of two.
const IN_VAIN_MAX: u32 = 6;

/// Whether reads are worth a try: where they are mostly of records that are not in memory, a try is a look-up for nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Worth {
    /// Calls in a row that answered nothing.
    in_vain: u32,
    /// Calls that do not try before the next one that does.
    skips: u32,
}

impl Worth {
    /// Whether this call tries.
    fn is_tried(&mut self) -> bool {
        let is_tried = self.skips == 0;
        self.skips = self.skips.saturating_sub(1);
        is_tried
    }

    /// A read was answered.
    fn on_answered(&mut self) {
        self.in_vain = 0;
    }

    /// The first read of a call was of a record that is not in memory.
    fn on_in_vain(&mut self) {
        self.in_vain = (self.in_vain + 1).min(IN_VAIN_MAX);
        self.skips = (1 << self.in_vain) - 1;
    }
}

/// A request that is being tried.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tried {
    at: usize,
    hash: KeyHash,
}

impl<D: Device> Engine<D> {
    /// Does requests in order, up to the first that can't be answered at once or until `tell`, which has the answers, wants no
    /// more. Returns how many it did. The others are to be asked for with `submit`.
    pub fn run_at_once<'a>(
        &mut self,
        requests: impl Iterator<Item = (ShardId, Direct<'a>)> + Clone,
        clock: Clock,
        mut tell: impl FnMut(DirectReply<'_>) -> bool,
    ) -> usize {
        let is_read = requests.clone().next().is_some_and(|(_, request)| request.is_read());
        if self.stopping || (is_read && !self.worth.is_tried()) {
            return 0;
        }
        self.queue.set_now(clock.monotonic_us);
        let mut tried = std::mem::take(&mut self.tried);
        tried.clear();
        for (shard, request) in requests.clone() {
            let Some(at) = self.shard_at.get(usize::from(shard.0)).copied().flatten() else { break };
            let hash = self.shards[at].hash(request.key());
            self.shards[at].index().prefetch_segment(hash.identity());
            tried.push(Tried { at, hash });
        }
        for one in &tried {
            self.shards[one.at].index().prefetch_slots(one.hash.identity());
        }
        for (one, _) in tried.iter().zip(requests.clone()).filter(|(_, (_, request))| request.is_read()) {
            self.cache.prefetch(one.hash);
        }
        let mut count = 0;
        for (one, (_, request)) in tried.iter().zip(requests) {
            let told = match request {
                Direct::Get { key } => self.read_at_once(*one, key, clock, count == 0, &mut tell),
                Direct::Set { key, value } => self.write_at_once(*one, key, value, clock, &mut tell),
            };
            let Some(more) = told else { break };
            count += 1;
            if !more {
                break;
            }
        }
        self.tried = tried;
        count
    }

    fn read_at_once(
        &mut self,
        Tried { at, hash }: Tried,
        key: &[u8],
        clock: Clock,
        is_first: bool,
        tell: &mut impl FnMut(DirectReply<'_>) -> bool,
    ) -> Option<bool> {
        let waits = self.committer.waits();
        let shard = &mut self.shards[at];
        if !shard.answers_at_once(key) {
            return None;
        }
        let lookup = shard.lookup_hashed(hash, key, clock.unix_ms);
        if waits && lookup.depends_on > shard.durable_frame {
            return None;
        }
        match lookup {
            Lookup { current: None, entry: None, .. } => Some(tell(DirectReply::Nil)),
            Lookup { current: Some(current), entry: None, .. } => {
                current.value.map(|value| tell(DirectReply::Value(&value)))
            }
            Lookup { entry: Some(entry), .. } if entry.is_long => None,
            Lookup { entry: Some(entry), .. } => {
                match self.cache.get_if_here(hash, entry.extent, entry.offset) {
                    Some(value) => {
                        self.worth.on_answered();
                        Some(tell(DirectReply::Value(value)))
                    }
                    None => {
                        if is_first {
                            self.worth.on_in_vain();
                        }
                        None
                    }
                }
            }
        }
    }

    fn write_at_once(
        &mut self,
        Tried { at, hash }: Tried,
        key: &[u8],
        value: &[u8],
        clock: Clock,
        tell: &mut impl FnMut(DirectReply<'_>) -> bool,
    ) -> Option<bool> {
        let size_max = self.chunk_size.min(self.value_size_max);
        let shard = &mut self.shards[at];
        let is_free = shard.answers_at_once(key) && shard.stalled.is_empty();
        if self.committer.waits() || !is_free || value.len() as u64 > size_max {
            return None;
        }
        if !self.memory.index_may_grow && !shard.lookup_hashed(hash, key, clock.unix_ms).is_there() {
            return None;
        }
        let kind = RecordType::Put;
        let record =
            Record { kind, sequence: 0, database: 0, expires_at_ms: 0, batch: None, long: 0, key, value };
        // What fails here, or waits for room, is tried again as an operation.
        let appended = self.append(at, Draft { record, purpose: Purpose::Data, lazy: false }, clock).ok()?;
        let effect = KeyEffect::Put { value: owned(value), expires_at_ms: 0 };
        let shard = &mut self.shards[at];
        shard.log.note_entry(hash, appended.sequence);
        shard.install(hash, owned(key), effect, appended, false);
        Some(tell(DirectReply::Ok))
    }
}

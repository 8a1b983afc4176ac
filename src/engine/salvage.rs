//! Saving what can be read of a device that is not served, damaged or not. Nothing is written to it.
//!
//! ```text
//! survey -> scan every shard -> decide batches -> of each key the newest record, extent by extent
//!        -> for keys whose newest record is damaged: the scan again, for an older one
//! ```
//!
//! What counts is what recovery counts: no deletes, no batches without a commit record, nothing that was in flight. Recovery
//! answers an error where a newer record may have been lost; here such a key is given, and said to be in doubt.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::action::is_expired;
use super::check::missing_parts;
use super::device_format::{OpenError, read_superblock_for_rescue};
use super::index::{Entry, Identity, Index, RecordRef, hash_key};
use super::op::{Key, ShardId};
use super::recovery::{self, Damage, Decisions, FoundLong, Held, ReadExtent, SeenRecord, Survey, read_tried};
use super::shard::ShardState;
use crate::device::rescue::RescueDevice;
use crate::device::{Device, IoError};
use crate::format::Place;
use crate::format::manifest::ManifestPiece;
use crate::format::record::{Record, RecordType};
use crate::format::superblock::Superblock;

/// One key that was saved.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
}

/// Something that was lost, or may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// What is wrong with the device as a whole, and did not keep anything from being read.
    Note(String),
    /// Damage of the log. What it means for keys is said by the other findings.
    Damage(Damage),
    /// Nothing can be said about what was here: keys of this shard, or of any, may be missing or have had newer values.
    Region(Damage),
    /// Nothing of a shard can be read.
    Shard {
        /// The shard.
        shard: u16,
        /// Why.
        what: String,
    },
    /// Records of a shard were lost whose keys nobody knows.
    UnknownKeys {
        /// The shard.
        shard: u16,
    },
    /// The key's value can't be read.
    Lost(KeyFinding),
    /// The key's value can't be read; an older one of it can.
    Older(KeyFinding),
    /// A newer record of the key may have been lost.
    InDoubt(KeyFinding),
}

/// A key that something is wrong with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFinding {
    /// The key.
    pub key: Key,
    /// Its shard.
    pub shard: u16,
    /// The extent of the record that is meant.
    pub extent: u32,
    /// Bytes from the extent's start to it.
    pub offset: u32,
    /// What is wrong.
    pub what: String,
}

/// Whom all of that is told.
pub trait Sink {
    /// Takes a key.
    fn save(&mut self, saved: &Saved<'_>) -> std::io::Result<()>;
    /// Takes note of a finding.
    fn find(&mut self, finding: Finding);
    /// Bytes read, and bytes to read.
    fn progress(&mut self, done: u64, total: u64);
}

/// What a salvage came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// The device's identity.
    pub uuid: String,
    /// Keys that were saved.
    pub keys_saved: u64,
    /// Bytes of their keys and values.
    pub bytes_saved: u64,
    /// Keys that have expired, and were left out.
    pub keys_expired: u64,
    /// Keys whose value can't be read, and of which no older one can.
    pub keys_lost: u64,
    /// Keys whose value can't be read, but an older one.
    pub keys_older: u64,
    /// Keys of which a newer record may have been lost.
    pub keys_in_doubt: u64,
    /// Keys with an older value or in doubt that were left out.
    pub keys_left_out: u64,
    /// Shards that lost records of keys that nobody knows.
    pub shards_in_doubt: u64,
    /// Shards of which nothing can be read.
    pub shards_unreadable: u64,
    /// Places that may have held anything.
    pub regions_lost: u64,
    /// Places with damage, whether anything was lost by it or not.
    pub damaged_places: u64,
    /// Logs whose end was in flight at the last crash, and was cut: no loss.
    pub torn_tails: u64,
}

impl Report {
    /// Whether every key that was acknowledged was saved with its newest value.
    pub fn is_complete(&self) -> bool {
        let lost = self.keys_lost + self.keys_older + self.keys_in_doubt;
        lost + self.shards_in_doubt + self.shards_unreadable + self.regions_lost == 0
    }
}

/// Why nothing (more) could be saved.
#[derive(Debug, thiserror::Error)]
pub enum SalvageError {
    /// The device can't be read at all.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What was saved can't be kept.
    #[error(transparent)]
    Sink(#[from] std::io::Error),
}

impl From<IoError> for SalvageError {
    fn from(error: IoError) -> Self {
        SalvageError::Open(error.into())
    }
}

/// Saves what can be read. With `only_certain`, keys are left out whose value may not be the newest.
pub fn salvage<D: Device>(
    device: D,
    only_certain: bool,
    now_ms: u64,
    sink: &mut dyn Sink,
) -> Result<Report, SalvageError> {
    let mut device = RescueDevice::new(device);
    let (superblock, notes) = read_superblock_for_rescue(&mut device)?;
    for note in notes {
        sink.find(Finding::Note(note));
    }
    let superblock = Arc::new(superblock);
    let survey = recovery::survey(&mut device, &superblock)?;
    // Everything is read twice: once to know what counts, once for the values.
    let total = 2 * survey.extent_count() as u64 * superblock.layout.extent_size;
    let report = Report { uuid: uuid::Uuid::from_bytes(superblock.uuid).to_string(), ..Report::default() };
    let mut salvage = Salvage {
        device,
        superblock,
        survey,
        only_certain,
        now_ms,
        sink,
        suspects: BTreeSet::new(),
        done: 0,
        total,
        report,
    };
    salvage.run()?;
    Ok(salvage.report)
}

struct Salvage<'a, D> {
    device: RescueDevice<D>,
    superblock: Arc<Superblock>,
    survey: Survey,
    only_certain: bool,
    now_ms: u64,
    sink: &'a mut dyn Sink,
    /// Shards that may have had newer records where nothing can be read; `None` is any shard.
    suspects: BTreeSet<Option<u16>>,
    done: u64,
    total: u64,
    report: Report,
}

impl<D: Device> Salvage<'_, D> {
    fn run(&mut self) -> Result<(), SalvageError> {
        let mut shards = Vec::new();
        let mut unreadable = Vec::new();
        for shard in (0..self.superblock.shard_count).map(ShardId) {
            let Salvage { device, superblock, survey, sink, done, total, .. } = self;
            let scanned =
                recovery::scan_shard(device, superblock, shard, survey.chains(shard), &mut |bytes| {
                    *done += bytes;
                    sink.progress(*done, *total);
                });
            match scanned {
                Ok(scanned) => shards.push(scanned),
                Err(error @ IoError::UnrecoveredRead { .. }) => {
                    unreadable.push(shard);
                    self.report.shards_unreadable += 1;
                    self.sink.find(Finding::Shard { shard: shard.0, what: error.to_string() });
                }
                Err(error) => return Err(error.into()),
            }
        }
        let mut decisions = recovery::committed_batches(&shards);
        for shard in &unreadable {
            decisions.on_unknown_shard(*shard);
        }
        let anywhere = self.survey.damage.iter().filter(|one| one.shard.is_none()).cloned();
        let mut regions: Vec<Damage> = anywhere.collect();
        regions.extend(shards.iter().filter_map(|shard| shard.unreadable_tail().cloned()));
        self.suspects = regions.iter().map(|one| one.shard).collect();
        if unreadable.is_empty() {
            regions.extend(missing_parts(&shards));
        }
        let damage = self.survey.damage.iter().chain(shards.iter().flat_map(|shard| &shard.damage));
        for one in damage.filter(|one| !regions.contains(one)) {
            self.report.damaged_places += 1;
            // That of a value is told with its key, if it is the newest one.
            if one.key.is_none() {
                self.sink.find(Finding::Damage(one.clone()));
            }
        }
        self.report.regions_lost = regions.len() as u64;
        self.report.damaged_places += self.report.regions_lost;
        for one in regions {
            self.sink.find(Finding::Region(one));
        }
        self.report.torn_tails = shards.iter().filter(|shard| shard.torn.is_some()).count() as u64;
        for shard in shards {
            let state = shard.resolve(&decisions, &self.superblock);
            self.shard(&state, &decisions)?;
        }
        Ok(())
    }

    fn shard(&mut self, state: &ShardState, decisions: &Decisions) -> Result<(), SalvageError> {
        if state.doubt.below > 0 {
            self.report.shards_in_doubt += 1;
            self.sink.find(Finding::UnknownKeys { shard: state.id.0 });
        }
        let mut by_extent: BTreeMap<u32, Vec<(Identity, Entry)>> = BTreeMap::new();
        let mut long = Vec::new();
        let mut cursor = 0;
        loop {
            cursor =
                state.index.scan(cursor, 4096, &mut |identity, entry| match state.manifests.get(&identity) {
                    Some(found) => long.push((identity, *entry, found)),
                    None => by_extent.entry(entry.extent).or_default().push((identity, *entry)),
                });
            if cursor == 0 {
                break;
            }
        }
        for key in &state.doubt.keys {
            if state.index.get(hash_key(&self.superblock.secret, key).identity()).is_some() {
                continue;
            }
            let what = "only a batch whose commit record may have been lost has it: it is left out";
            self.report.keys_in_doubt += 1;
            let (key, shard, what) = (key.clone(), state.id.0, what.to_owned());
            self.sink.find(Finding::InDoubt(KeyFinding { key, shard, extent: 0, offset: 0, what }));
        }
        let mut failed = Vec::new();
        for (extent, mut entries) in by_extent {
            entries.sort_unstable_by_key(|(_, entry)| entry.offset);
            let read = ReadExtent::read(&mut self.device, &self.superblock, extent)?;
            for (identity, entry) in entries {
                if is_expired(state.expiries.get(identity), self.now_ms) {
                    self.report.keys_expired += 1;
                    continue;
                }
                let bytes = read.bytes.get(entry.offset as usize..).unwrap_or_default();
                let (place, sought) = ((extent, entry.offset), Sought::Identity(identity));
                let found = match self.value_of(bytes, state, place, sought) {
                    Ok(found) => Ok(found),
                    // A medium may be wrong once and right the next time.
                    Err(_) => self.read_record(state, place, entry.size(), sought)?,
                };
                match found {
                    Ok(found) => self.save(state, identity, place, &found.key, &found.value)?,
                    Err(Unread { key: Some(key), sequence, what }) => {
                        failed.push(Failed { key, sequence, place, what });
                    }
                    Err(Unread { key: None, what, .. }) => self.lose_nameless(state, &entry, what),
                }
            }
            self.done += self.superblock.layout.extent_size;
            self.sink.progress(self.done, self.total);
        }
        for (identity, entry, FoundLong { key, size, pieces }) in long {
            if is_expired(state.expiries.get(identity), self.now_ms) {
                self.report.keys_expired += 1;
                continue;
            }
            let place = (entry.extent, entry.offset);
            match self.read_long(state, key, *size, pieces, &state.chunks)? {
                Ok(value) => self.save(state, identity, place, key, &value)?,
                Err(what) => {
                    let sought = Sought::Identity(identity);
                    let found = self.read_record(state, place, entry.size(), sought)?;
                    let sequence = found.map_or_else(|unread| unread.sequence, |found| found.sequence);
                    failed.push(Failed { key: key.clone(), sequence, place, what });
                }
            }
        }
        if failed.is_empty() { Ok(()) } else { self.older(state, decisions, failed) }
    }

    /// A record that recovery could read can't be read any more, not even its key.
    fn lose_nameless(&mut self, state: &ShardState, entry: &Entry, what: String) {
        self.report.keys_lost += 1;
        self.report.damaged_places += 1;
        self.sink.find(Finding::Damage(Damage {
            shard: Some(state.id.0),
            extent: entry.extent,
            offset: u64::from(entry.offset),
            size: u64::from(entry.size()),
            key: None,
            what: format!("a key's newest record: {what}"),
            held: Held::Anything,
        }));
    }

    fn save(
        &mut self,
        state: &ShardState,
        identity: Identity,
        place: (u32, u32),
        key: &Key,
        value: &[u8],
    ) -> Result<(), SalvageError> {
        let doubt = &state.doubt;
        if self.suspects.contains(&None) || self.suspects.contains(&Some(state.id.0)) {
            // Of every key alike, so that no line for each says anything.
            self.report.keys_in_doubt += 1;
            if self.only_certain {
                self.report.keys_left_out += 1;
                return Ok(());
            }
        } else if !doubt.is_known(identity) || doubt.keys.contains(key) {
            self.report.keys_in_doubt += 1;
            let what = "a newer value of it, or its deletion, may have been lost";
            self.sink.find(Finding::InDoubt(finding(state, key, place, what)));
            if self.only_certain {
                self.report.keys_left_out += 1;
                return Ok(());
            }
        }
        self.give(key, value, state.expiries.get(identity))
    }

    fn give(&mut self, key: &Key, value: &[u8], expires_at_ms: u64) -> Result<(), SalvageError> {
        self.report.keys_saved += 1;
        self.report.bytes_saved += (key.len() + value.len()) as u64;
        Ok(self.sink.save(&Saved { key, value, expires_at_ms })?)
    }

    /// Reads a long value, chunk by chunk.
    fn read_long(
        &mut self,
        state: &ShardState,
        key: &Key,
        size: u64,
        pieces: &[ManifestPiece],
        chunks: &BTreeMap<u64, RecordRef>,
    ) -> Result<Result<Vec<u8>, String>, SalvageError> {
        let mut value = vec![0; size as usize];
        for piece in pieces {
            let Some(chunk) = chunks.get(&piece.id) else {
                return Ok(Err(format!("the chunk at byte {} is not there", piece.start)));
            };
            let start = piece.start as usize;
            let sought = Sought::Chunk { key, id: piece.id, sequence: chunk.sequence };
            match self.read_record(state, (chunk.extent, chunk.offset), chunk.size, sought)? {
                Ok(found) if found.value.len() == piece.size as usize => {
                    value[start..start + found.value.len()].copy_from_slice(&found.value);
                }
                Ok(_) => return Ok(Err(format!("the chunk at byte {start} has another length"))),
                Err(unread) => return Ok(Err(format!("the chunk at byte {start}: {}", unread.what))),
            }
        }
        Ok(Ok(value))
    }

    /// Reads one record by itself.
    fn read_record(
        &mut self,
        state: &ShardState,
        place: (u32, u32),
        size: u32,
        sought: Sought<'_>,
    ) -> Result<Result<FoundValue, Unread>, SalvageError> {
        let (offset, size, skip) = self.superblock.blocks_of(place.0, place.1, size);
        let Some(blocks) = read_tried(&mut self.device, offset, size)? else {
            return Ok(Err(Unread::new("the device can't read it".into())));
        };
        Ok(self.value_of(&blocks[skip..], state, place, sought))
    }

    /// What the record at a place says, if it is the one that is sought.
    fn value_of(
        &self,
        bytes: &[u8],
        state: &ShardState,
        (extent, offset): (u32, u32),
        sought: Sought<'_>,
    ) -> Result<FoundValue, Unread> {
        let place: Option<Place> = state.extents.get(extent).map(|one| one.place);
        let place = place.ok_or_else(|| Unread::new("its extent is not this shard's".to_owned()))?;
        let decoded = Record::decode(bytes, place, offset).map_err(|error| Unread::new(error.to_string()))?;
        let record = decoded.record;
        let has_identity = |identity| hash_key(&self.superblock.secret, record.key).identity() == identity;
        let is_sought = match sought {
            Sought::Identity(identity) => record.kind == RecordType::Put && has_identity(identity),
            Sought::Older { key, sequence } => {
                record.kind == RecordType::Put && record.key == &**key && record.sequence == sequence
            }
            Sought::Chunk { key, id, sequence } => {
                record.kind == RecordType::Chunk
                    && record.long == id
                    && record.key == &**key
                    && record.sequence == sequence
            }
        };
        if !is_sought {
            return Err(Unread::new("another record is there".into()));
        }
        let (key, sequence) = (Key::copy_from_slice(record.key), record.sequence);
        if !decoded.value_intact {
            let what = if record.is_manifest() {
                "its manifest can't be read"
            } else {
                "the value does not match its checksum"
            };
            return Err(Unread { key: Some(key), sequence, what: what.into() });
        }
        if record.is_manifest() {
            // Recovery could not make sense of it.
            return Err(Unread { key: Some(key), sequence, what: "its manifest can't be read".into() });
        }
        Ok(FoundValue { key, sequence, value: record.value.to_vec() })
    }

    /// Looks for older values of keys whose newest can't be read.
    fn older(
        &mut self,
        state: &ShardState,
        decisions: &Decisions,
        failed: Vec<Failed>,
    ) -> Result<(), SalvageError> {
        let keys: BTreeSet<Key> = failed.iter().map(|one| one.key.clone()).collect();
        let chain = self.survey.chains(state.id);
        let scanned = recovery::scan_shard_watching(
            &mut self.device,
            &self.superblock,
            state.id,
            chain,
            &keys,
            &mut |_| {},
        )?;
        let mut history: BTreeMap<&Key, Vec<&SeenRecord>> = BTreeMap::new();
        for one in scanned.history() {
            history.entry(&one.key).or_default().push(one);
        }
        for Failed { key, sequence, place, what } in failed {
            let mut older = None;
            let seen = history.get(&key).map_or(&[][..], Vec::as_slice);
            let mut seen: Vec<&SeenRecord> = seen
                .iter()
                .filter(|one| {
                    // A record that was moved keeps its sequence, and may still be where it was.
                    let is_elsewhere = (one.record.extent, one.record.offset) != place;
                    one.record.sequence < sequence || (one.record.sequence == sequence && is_elsewhere)
                })
                .filter(|one| one.value_intact && !one.is_cleared)
                .filter(|one| one.batch.is_none_or(|batch| decisions.is_committed(&batch)))
                .copied()
                .collect();
            seen.sort_by_key(|one| std::cmp::Reverse(one.record.sequence));
            // Behind a deletion there is nothing: the key was absent before the value that is lost.
            for one in seen.into_iter().take_while(|one| one.kind == RecordType::Put) {
                let value = match &one.pieces {
                    Some(pieces) => {
                        let size = u64::from(one.record.value_size);
                        self.read_long(state, &key, size, pieces, &scanned.chunks)?
                    }
                    None => {
                        let sought = Sought::Older { key: &key, sequence: one.record.sequence };
                        let place = (one.record.extent, one.record.offset);
                        let found = self.read_record(state, place, one.record.size, sought)?;
                        found.map(|found| found.value).map_err(|unread| unread.what)
                    }
                };
                if let Ok(value) = value {
                    older = Some((one.record, value));
                    break;
                }
            }
            match older.filter(|(record, _)| !is_expired(record.expires_at_ms, self.now_ms)) {
                None => {
                    self.report.keys_lost += 1;
                    self.sink.find(Finding::Lost(finding(state, &key, place, &what)));
                }
                Some((older, value)) => {
                    self.report.keys_older += 1;
                    self.sink.find(Finding::Older(finding(state, &key, place, &what)));
                    if self.only_certain {
                        self.report.keys_left_out += 1;
                    } else {
                        self.give(&key, &value, older.expires_at_ms)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn finding(state: &ShardState, key: &Key, (extent, offset): (u32, u32), what: &str) -> KeyFinding {
    KeyFinding { key: key.clone(), shard: state.id.0, extent, offset, what: what.to_owned() }
}

/// Which record is sought at a place.
#[derive(Clone, Copy)]
enum Sought<'a> {
    /// The newest of the key with this identity.
    Identity(Identity),
    /// An older one of a key.
    Older { key: &'a Key, sequence: u64 },
    /// A chunk of a key's value.
    Chunk { key: &'a Key, id: u64, sequence: u64 },
}

/// A record that was read.
struct FoundValue {
    key: Key,
    sequence: u64,
    value: Vec<u8>,
}

/// Why a record can't be read, and what could be.
struct Unread {
    key: Option<Key>,
    /// None older is known where this can't be read either.
    sequence: u64,
    what: String,
}

impl Unread {
    fn new(what: String) -> Unread {
        Unread { key: None, sequence: 0, what }
    }
}

/// A key whose newest record can't be read.
struct Failed {
    key: Key,
    sequence: u64,
    place: (u32, u32),
    what: String,
}

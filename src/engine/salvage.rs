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
use super::index::{Entry, Index};
use super::op::{Key, ShardId};
use super::recovery::{self, Damage, Decisions, ReadExtent, SeenRecord, Survey, read_tried};
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
                recovery::scan_shard(device, superblock, shard, survey.chain(shard), &mut |bytes| {
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
        let mut by_extent: BTreeMap<u32, Vec<(Key, Entry)>> = BTreeMap::new();
        let mut long = Vec::new();
        let mut doubtful = state.doubt.keys.clone();
        let mut cursor = 0;
        loop {
            cursor = state.index.scan(cursor, 4096, &mut |key, entry| {
                doubtful.remove(key);
                let one = (Key::copy_from_slice(key), *entry);
                if entry.is_long {
                    long.push(one);
                } else {
                    by_extent.entry(entry.extent).or_default().push(one);
                }
            });
            if cursor == 0 {
                break;
            }
        }
        for key in doubtful {
            let what = "only a batch whose commit record may have been lost has it: it is left out";
            self.report.keys_in_doubt += 1;
            let (shard, what) = (state.id.0, what.to_owned());
            self.sink.find(Finding::InDoubt(KeyFinding { key, shard, extent: 0, offset: 0, what }));
        }
        let mut failed: Vec<(Key, Entry, String)> = Vec::new();
        for (extent, mut entries) in by_extent {
            entries.sort_unstable_by_key(|(_, entry)| entry.offset);
            let read = ReadExtent::read(&mut self.device, &self.superblock, extent)?;
            for (key, entry) in entries {
                if is_expired(entry.expires_at_ms, self.now_ms) {
                    self.report.keys_expired += 1;
                    continue;
                }
                let at = entry.offset as usize;
                let bytes = read.bytes.get(at..at + entry.size as usize).unwrap_or_default();
                let found = match value_of(bytes, state, &key, &entry, None) {
                    Ok(value) => Ok(value.to_vec()),
                    // A medium may be wrong once and right the next time.
                    Err(_) => self.read_again(state, &key, &entry)?,
                };
                match found {
                    Ok(value) => self.save(state, &key, &value, &entry)?,
                    Err(what) => failed.push((key, entry, what)),
                }
            }
            self.done += self.superblock.layout.extent_size;
            self.sink.progress(self.done, self.total);
        }
        for (key, entry) in long {
            if is_expired(entry.expires_at_ms, self.now_ms) {
                self.report.keys_expired += 1;
                continue;
            }
            let found = match state.manifests.get(&key) {
                Some((size, pieces)) => self.read_long(state, &key, *size, pieces, &state.chunks)?,
                None => Err("its manifest can't be read".into()),
            };
            match found {
                Ok(value) => self.save(state, &key, &value, &entry)?,
                Err(what) => failed.push((key, entry, what)),
            }
        }
        if failed.is_empty() { Ok(()) } else { self.older(state, decisions, failed) }
    }

    fn save(
        &mut self,
        state: &ShardState,
        key: &Key,
        value: &[u8],
        entry: &Entry,
    ) -> Result<(), SalvageError> {
        let doubt = &state.doubt;
        if self.suspects.contains(&None) || self.suspects.contains(&Some(state.id.0)) {
            // Of every key alike, so that no line for each says anything.
            self.report.keys_in_doubt += 1;
            if self.only_certain {
                self.report.keys_left_out += 1;
                return Ok(());
            }
        } else if entry.sequence < doubt.below || doubt.keys.contains(key) {
            self.report.keys_in_doubt += 1;
            let what = "a newer value of it, or its deletion, may have been lost";
            self.sink.find(Finding::InDoubt(finding(state, key, entry, what)));
            if self.only_certain {
                self.report.keys_left_out += 1;
                return Ok(());
            }
        }
        self.give(key, value, entry)
    }

    fn give(&mut self, key: &Key, value: &[u8], entry: &Entry) -> Result<(), SalvageError> {
        self.report.keys_saved += 1;
        self.report.bytes_saved += (key.len() + value.len()) as u64;
        Ok(self.sink.save(&Saved { key, value, expires_at_ms: entry.expires_at_ms })?)
    }

    /// Reads a long value, chunk by chunk.
    fn read_long(
        &mut self,
        state: &ShardState,
        key: &Key,
        size: u64,
        pieces: &[ManifestPiece],
        chunks: &BTreeMap<u64, Entry>,
    ) -> Result<Result<Vec<u8>, String>, SalvageError> {
        let mut value = vec![0; size as usize];
        for piece in pieces {
            let Some(entry) = chunks.get(&piece.id) else {
                return Ok(Err(format!("the chunk at byte {} is not there", piece.start)));
            };
            let start = piece.start as usize;
            match self.read_record(state, key, entry, Some(piece.id))? {
                Ok(bytes) if bytes.len() == piece.size as usize => {
                    value[start..start + bytes.len()].copy_from_slice(&bytes);
                }
                Ok(_) => return Ok(Err(format!("the chunk at byte {start} has another length"))),
                Err(what) => return Ok(Err(format!("the chunk at byte {start}: {what}"))),
            }
        }
        Ok(Ok(value))
    }

    /// Reads one record by itself.
    fn read_again(
        &mut self,
        state: &ShardState,
        key: &Key,
        entry: &Entry,
    ) -> Result<Result<Vec<u8>, String>, SalvageError> {
        self.read_record(state, key, entry, None)
    }

    fn read_record(
        &mut self,
        state: &ShardState,
        key: &Key,
        entry: &Entry,
        chunk: Option<u64>,
    ) -> Result<Result<Vec<u8>, String>, SalvageError> {
        let block = u64::from(self.superblock.block_size);
        let start = self.superblock.layout.extent_offset(entry.extent) + u64::from(entry.offset);
        let from = start / block * block;
        let size = ((start + u64::from(entry.size)).next_multiple_of(block) - from) as usize;
        let Some(blocks) = read_tried(&mut self.device, from, size)? else {
            return Ok(Err("the device can't read it".into()));
        };
        let skip = (start - from) as usize;
        let bytes = &blocks[skip..skip + entry.size as usize];
        Ok(value_of(bytes, state, key, entry, chunk).map(<[u8]>::to_vec))
    }

    /// Looks for older values of keys whose newest can't be read.
    fn older(
        &mut self,
        state: &ShardState,
        decisions: &Decisions,
        failed: Vec<(Key, Entry, String)>,
    ) -> Result<(), SalvageError> {
        let keys: BTreeSet<Key> = failed.iter().map(|(key, _, _)| key.clone()).collect();
        let chain = self.survey.chain(state.id);
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
        for (key, entry, what) in failed {
            let mut older = None;
            let seen = history.get(&key).map_or(&[][..], Vec::as_slice);
            let mut seen: Vec<&SeenRecord> = seen
                .iter()
                .filter(|one| one.entry.sequence < entry.sequence && one.value_intact && !one.is_cleared)
                .filter(|one| one.batch.is_none_or(|batch| decisions.is_committed(&batch)))
                .copied()
                .collect();
            seen.sort_by_key(|one| std::cmp::Reverse(one.entry.sequence));
            // Behind a deletion there is nothing: the key was absent before the value that is lost.
            for one in seen.into_iter().take_while(|one| one.kind == RecordType::Put) {
                let value = match &one.pieces {
                    Some(pieces) => {
                        let size = u64::from(one.entry.value_size);
                        self.read_long(state, &key, size, pieces, &scanned.chunks)?
                    }
                    None => self.read_again(state, &key, &one.entry)?,
                };
                if let Ok(value) = value {
                    older = Some((one.entry, value));
                    break;
                }
            }
            match older.filter(|(entry, _)| !is_expired(entry.expires_at_ms, self.now_ms)) {
                None => {
                    self.report.keys_lost += 1;
                    self.sink.find(Finding::Lost(finding(state, &key, &entry, &what)));
                }
                Some((older, value)) => {
                    self.report.keys_older += 1;
                    self.sink.find(Finding::Older(finding(state, &key, &entry, &what)));
                    if self.only_certain {
                        self.report.keys_left_out += 1;
                    } else {
                        self.give(&key, &value, &older)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn finding(state: &ShardState, key: &Key, entry: &Entry, what: &str) -> KeyFinding {
    let (extent, offset) = (entry.extent, entry.offset);
    KeyFinding { key: key.clone(), shard: state.id.0, extent, offset, what: what.to_owned() }
}

fn value_of<'a>(
    bytes: &'a [u8],
    state: &ShardState,
    key: &Key,
    entry: &Entry,
    chunk: Option<u64>,
) -> Result<&'a [u8], String> {
    let place: Option<Place> = state.extents.get(entry.extent).map(|one| one.place);
    let place = place.ok_or_else(|| "its extent is not this shard's".to_owned())?;
    let decoded = Record::decode(bytes, place, entry.offset).map_err(|error| error.to_string())?;
    let record = decoded.record;
    let is_kind = match chunk {
        Some(id) => record.kind == RecordType::Chunk && record.long == id,
        None => record.kind == RecordType::Put,
    };
    if !is_kind || record.key != &**key || record.sequence != entry.sequence {
        return Err("another record is there".into());
    }
    if !decoded.value_intact {
        return Err("the value does not match its checksum".into());
    }
    Ok(record.value)
}

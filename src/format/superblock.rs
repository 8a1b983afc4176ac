//! The superblock: what a device is formatted as. Four copies, each one block of 4096 bytes:
//!
//! ```text
//!    0  8  magic "BASALTsb"            68  8  features that must be known
//!    8  4  checksum of bytes 12..4096  76  8  features that may be ignored
//!   12  4  format version              84  8  generation: one more at every update
//!   16  1  copy index (0..4)           92  4  checksum of the previous generation's copy 0
//!   17  1  index: 0 hash, 1 ordered    96  8  boot: starts of the node on this device
//!   18  2  shard count                104  8  created, milliseconds since the Unix epoch
//!   20  4  block size                 112 16  secret of the keyed hash and the checksums
//!   24  8  extent size                128 32  label, UTF-8, zero padded
//!   32  4  extent count               160  8  database and quota fields: zero
//!   36  8  device size                168     zero to the end
//!   44 16  device UUID
//!   60  8  zero
//! ```
//!
//! An update writes two copies without which the current generation still has two good ones, flushes, writes the other two,
//! flushes. Whatever a crash leaves, some generation then has two good copies, and [`choose`] takes the newest such one. It is
//! the previous or the new generation, and since a start writes all four copies anew before anything else happens, it stays
//! what it was found to be.

use super::layout::{Layout, SUPERBLOCK_COPIES};
use super::{FormatError, Reader};
use crate::limits::{EXTENT_COUNT_MAX, EXTENT_SIZE_MAX, EXTENT_SIZE_MIN, SHARD_COUNT_MAX};
use crate::planted::{Bug, is_planted};

/// Bytes of one copy.
pub const SUPERBLOCK_SIZE: usize = 4096;

/// `BASALTsb` as a little-endian number.
pub const SUPERBLOCK_MAGIC: u64 = u64::from_le_bytes(*b"BASALTsb");

/// The format that this version writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Feature: the log may have chunks of long values.
pub const FEATURE_LONG_VALUES: u64 = 1;

/// Feature: shards may have extents of survivors.
pub const FEATURE_SURVIVORS: u64 = 2;

/// Features of this format version that a reader must know.
///
/// `format` and every start of a node set them all: a start writes every copy anyway, and before anything that needs a feature
/// is on the device. A device without them opens as it is, and a version that lacks one refuses the device by that.
pub const FEATURES_KNOWN: u64 = FEATURE_LONG_VALUES | FEATURE_SURVIVORS;

const WHAT: &str = "superblock";
const LABEL_SIZE: usize = 32;

/// How a shard knows its keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IndexKind {
    /// By bits of their hashes.
    #[default]
    Hash,
    /// By those, and by their names in order.
    Ordered,
}

impl IndexKind {
    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            IndexKind::Hash => "hash",
            IndexKind::Ordered => "ordered",
        }
    }
}

impl std::fmt::Display for IndexKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for IndexKind {
    type Err = String;

    fn from_str(text: &str) -> Result<IndexKind, String> {
        let kinds = [IndexKind::Hash, IndexKind::Ordered];
        let found = kinds.into_iter().find(|kind| kind.name() == text);
        found.ok_or_else(|| {
            format!("'{text}' is no index: hash (the default), or ordered, which KV.RANGE needs")
        })
    }
}

/// What a device is formatted as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Which device this is: recognised by this, never by path or order.
    pub uuid: [u8; 16],
    /// Secret of the keyed hash and the checksums.
    pub secret: [u8; 16],
    /// Where the extents are.
    pub layout: Layout,
    /// Bytes of one block of the log. A device opens it when its own block size divides it.
    pub block_size: u32,
    /// Shards that the keys are spread over.
    pub shard_count: u16,
    /// How they know their keys. Versions that know of `hash` alone refuse any other device.
    pub index: IndexKind,
    /// What a reader must know of.
    pub features: u64,
    /// One more at every update.
    pub generation: u64,
    /// Checksum of copy 0 of the previous generation.
    pub parent: u32,
    /// Starts of the node on this device, so that nothing a start made can be taken for another's.
    pub boot: u64,
    /// When it was formatted, milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// A name that people give it.
    pub label: String,
}

impl Superblock {
    /// The bytes of one copy, and its checksum.
    pub fn encode(&self, copy: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(SUPERBLOCK_SIZE);
        out.extend_from_slice(&SUPERBLOCK_MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.push(copy as u8);
        out.push(match self.index {
            IndexKind::Hash => 0,
            IndexKind::Ordered => 1,
        });
        out.extend_from_slice(&self.shard_count.to_le_bytes());
        out.extend_from_slice(&self.block_size.to_le_bytes());
        out.extend_from_slice(&self.layout.extent_size.to_le_bytes());
        out.extend_from_slice(&self.layout.extent_count.to_le_bytes());
        out.extend_from_slice(&self.layout.device_size.to_le_bytes());
        out.extend_from_slice(&self.uuid);
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&self.features.to_le_bytes());
        out.extend_from_slice(&0u64.to_le_bytes());
        out.extend_from_slice(&self.generation.to_le_bytes());
        out.extend_from_slice(&self.parent.to_le_bytes());
        out.extend_from_slice(&self.boot.to_le_bytes());
        out.extend_from_slice(&self.created_ms.to_le_bytes());
        out.extend_from_slice(&self.secret);
        let label = self.label.as_bytes();
        let cut = self.label.floor_char_boundary(LABEL_SIZE);
        out.extend_from_slice(&label[..cut]);
        out.resize(SUPERBLOCK_SIZE, 0);
        let sum = crc32fast::hash(&out[12..]);
        out[8..12].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads one copy, and says which it is. The checksum comes before any other field is believed.
    pub fn decode(bytes: &[u8]) -> Result<(usize, Superblock), FormatError> {
        let bytes = bytes.get(..SUPERBLOCK_SIZE).ok_or(FormatError::Short {
            what: WHAT,
            expected: SUPERBLOCK_SIZE,
            got: bytes.len(),
        })?;
        let mut reader = Reader::new(WHAT, bytes);
        let magic = reader.u64()?;
        if magic != SUPERBLOCK_MAGIC {
            return Err(FormatError::Magic { what: WHAT, expected: SUPERBLOCK_MAGIC, got: magic });
        }
        let stored = reader.u32()?;
        let expected = crc32fast::hash(&bytes[12..]);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        let version = reader.u32()?;
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { expected: FORMAT_VERSION, got: version });
        }
        let copy = usize::from(reader.u8()?);
        if copy >= SUPERBLOCK_COPIES {
            return Err(field("copy index", copy as u64));
        }
        let index = match reader.u8()? {
            0 => IndexKind::Hash,
            1 => IndexKind::Ordered,
            got => return Err(FormatError::UnknownIndex { got }),
        };
        let shard_count = reader.u16()?;
        if shard_count == 0 || shard_count > SHARD_COUNT_MAX {
            return Err(field("shard count", u64::from(shard_count)));
        }
        let block_size = reader.u32()?;
        if !block_size.is_power_of_two() || !(512..=65_536).contains(&block_size) {
            return Err(field("block size", u64::from(block_size)));
        }
        let extent_size = reader.u64()?;
        // The bound below is what every key fits; sizes of records and values are computed from it.
        if !extent_size.is_power_of_two() || !(EXTENT_SIZE_MIN..=EXTENT_SIZE_MAX).contains(&extent_size) {
            return Err(field("extent size", extent_size));
        }
        let extent_count = reader.u32()?;
        let device_size = reader.u64()?;
        let layout = Layout { device_size, extent_size, extent_count };
        if extent_count > EXTENT_COUNT_MAX || layout.extent_offset(extent_count) > layout.superblock_offset(2)
        {
            return Err(field("extent count", u64::from(extent_count)));
        }
        let uuid = reader.array()?;
        reader.zeros(8, "reserved bytes")?;
        let features = reader.u64()?;
        let unknown = features & !FEATURES_KNOWN;
        if unknown != 0 {
            return Err(FormatError::UnknownFeature { bits: unknown });
        }
        reader.u64()?;
        let generation = reader.u64()?;
        if generation == u64::MAX {
            return Err(field("generation", generation));
        }
        let parent = reader.u32()?;
        let boot = reader.u64()?;
        // The upper half of an epoch.
        if boot >= u64::from(u32::MAX) {
            return Err(field("boot", boot));
        }
        let created_ms = reader.u64()?;
        let secret = reader.array()?;
        let label: [u8; LABEL_SIZE] = reader.array()?;
        let label_size = label.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        let label = String::from_utf8_lossy(&label[..label_size]).into_owned();
        reader.zeros(SUPERBLOCK_SIZE - reader.position(), "reserved bytes")?;
        let superblock = Superblock {
            uuid,
            secret,
            layout,
            block_size,
            shard_count,
            index,
            features,
            generation,
            parent,
            boot,
            created_ms,
            label,
        };
        Ok((copy, superblock))
    }

    /// The blocks around a record: their offset on the device, their bytes, and how many of those come before the record. As far
    /// as the extent goes, where the size is rounded up.
    pub fn blocks_of(&self, extent: u32, offset: u32, size: u32) -> (u64, usize, usize) {
        self.around(extent, offset, size, self.block_size)
    }

    /// The same where less than a block can be read: offset and bytes are multiples of `alignment`.
    pub fn around(&self, extent: u32, offset: u32, size: u32, alignment: u32) -> (u64, usize, usize) {
        let alignment = u64::from(alignment);
        let from = u64::from(offset) / alignment * alignment;
        let end = (u64::from(offset) + u64::from(size)).next_multiple_of(alignment);
        let end = end.min(self.layout.extent_size.max(from));
        (self.layout.extent_offset(extent) + from, (end - from) as usize, offset as usize - from as usize)
    }

    /// The next generation, made from this one.
    pub fn next(&self) -> Superblock {
        let copy0 = self.encode(0);
        let mut parent = [0; 4];
        parent.copy_from_slice(&copy0[8..12]);
        Superblock { generation: self.generation + 1, parent: u32::from_le_bytes(parent), ..self.clone() }
    }
}

/// Which copies agree on what: the superblock of a device, or why there is none.
#[derive(Debug, Clone)]
pub struct Quorum {
    /// The newest generation that two copies agree on.
    pub superblock: Superblock,
    /// Copies that are not it, each with what is wrong with it.
    pub bad: Vec<(usize, String)>,
}

impl Quorum {
    /// In which order the next generation replaces the copies: first two without which this one still stands, and once those
    /// are durable the others. Pairs that are always the same would not do: an update that was cut short leaves its second pair
    /// different from the first, and the next one may be cut short too.
    pub fn update_order(&self) -> [[usize; 2]; 2] {
        let is_bad = |copy: &usize| self.bad.iter().any(|(bad, _)| bad == copy);
        let mut copies: [usize; SUPERBLOCK_COPIES] = std::array::from_fn(|copy| copy);
        copies.sort_by_key(|copy| !is_bad(copy) && !is_planted(Bug::FixedSuperblockOrder));
        [[copies[0], copies[1]], [copies[2], copies[3]]]
    }
}

/// Why no superblock could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoQuorum {
    /// None of the copies was ever one.
    #[error(
        "it has no superblock: it is not a Basalt device, or all {copies} copies are gone. `basalt salvage` needs one of them, so nothing can be \
         read of it as it is: make sure that it is the right device, and copy all of it elsewhere first if anything on it matters. `basalt \
         format` makes a new device of it and destroys what is there",
        copies = SUPERBLOCK_COPIES
    )]
    NotFormatted,
    /// Some are there, but no two agree.
    #[error(
        "the superblock is damaged: no two of its {copies} copies agree ({detail}); `basalt salvage` needs one that is intact to save what \
         is there",
        copies = SUPERBLOCK_COPIES
    )]
    Damaged {
        /// What is wrong with each.
        detail: String,
    },
    /// They are of more than one device, and neither is clearly the one that this is.
    #[error(
        "its superblocks are of several devices ({detail}): one was copied over a part of another; `basalt salvage` reads what is left of the \
         one with more of its data here"
    )]
    Mixed {
        /// Whose each copy is.
        detail: String,
    },
    /// It needs another version of basalt.
    #[error(transparent)]
    Foreign(FormatError),
}

/// What each place has: a good copy, or why it is none.
fn decode_each(copies: &[Vec<u8>; SUPERBLOCK_COPIES]) -> Vec<Result<Superblock, FormatError>> {
    let decode = |(at, bytes): (usize, &Vec<u8>)| match Superblock::decode(bytes) {
        // A good copy at another copy's place is a misdirected write.
        Ok((copy, _)) if copy != at => {
            Err(FormatError::Field { what: WHAT, field: "copy index", got: copy as u64 })
        }
        Ok((_, superblock)) => Ok(superblock),
        Err(error) => Err(error),
    };
    copies.iter().enumerate().map(decode).collect()
}

/// The newest copy of each device that one is of.
pub fn of_each_device(copies: &[Vec<u8>; SUPERBLOCK_COPIES]) -> Vec<Superblock> {
    let mut found: Vec<Superblock> = Vec::new();
    for one in decode_each(copies).into_iter().flatten() {
        match found.iter_mut().find(|other| other.uuid == one.uuid) {
            Some(other) if other.generation < one.generation => *other = one,
            Some(_) => {}
            None => found.push(one),
        }
    }
    found
}

fn shown(uuid: &[u8; 16]) -> uuid::Uuid {
    uuid::Uuid::from_bytes(*uuid)
}

/// Chooses from the copies as read: the newest generation with two good copies. Copies of another device are told from older ones
/// by its UUID: formatting leaves none, so more than a single one means that this may be that other device.
pub fn choose(copies: &[Vec<u8>; SUPERBLOCK_COPIES]) -> Result<Quorum, NoQuorum> {
    let decoded = decode_each(copies);
    let good = || decoded.iter().flatten();
    let most = good().map(|one| good().filter(|other| other.uuid == one.uuid).count()).max();
    if most < Some(SUPERBLOCK_COPIES - 1) && good().any(|one| good().any(|other| other.uuid != one.uuid)) {
        let detail = decoded.iter().enumerate().filter_map(|(at, one)| {
            let one = one.as_ref().ok()?;
            Some(format!("copy {at}: {}, generation {}", shown(&one.uuid), one.generation))
        });
        return Err(NoQuorum::Mixed { detail: detail.collect::<Vec<_>>().join("; ") });
    }
    let best = decoded
        .iter()
        .flatten()
        .filter(|one| decoded.iter().flatten().filter(|other| other == one).count() >= 2)
        .max_by_key(|one| one.generation);
    if let Some(best) = best {
        let bad = decoded.iter().enumerate().filter_map(|(at, one)| match one {
            Ok(one) if one == best => None,
            Ok(one) if one.uuid != best.uuid => {
                Some((at, format!("it is of another device, {}", shown(&one.uuid))))
            }
            Ok(one) => Some((at, format!("generation {} instead of {}", one.generation, best.generation))),
            Err(error) => Some((at, error.to_string())),
        });
        return Ok(Quorum { superblock: best.clone(), bad: bad.collect() });
    }
    let foreign = decoded.iter().find_map(|one| match one {
        Err(
            error @ (FormatError::Version { .. }
            | FormatError::UnknownFeature { .. }
            | FormatError::UnknownIndex { .. }),
        ) => Some(error.clone()),
        _ => None,
    });
    if let Some(error) = foreign {
        return Err(NoQuorum::Foreign(error));
    }
    if decoded.iter().all(|one| matches!(one, Err(FormatError::Magic { .. } | FormatError::Short { .. }))) {
        return Err(NoQuorum::NotFormatted);
    }
    let detail = decoded.iter().enumerate().map(|(at, one)| match one {
        Ok(one) => format!("copy {at}: generation {}", one.generation),
        Err(error) => format!("copy {at}: {error}"),
    });
    Err(NoQuorum::Damaged { detail: detail.collect::<Vec<_>>().join("; ") })
}

/// The newest copy that is intact, although no other agrees with it: for who only reads. What records need to be found never
/// changes from one generation to the next.
pub fn choose_any(copies: &[Vec<u8>; SUPERBLOCK_COPIES]) -> Option<Superblock> {
    decode_each(copies).into_iter().flatten().max_by_key(|one| one.generation)
}

#[cfg(test)]
impl Superblock {
    /// Of a device of 1 GiB with so many shards and blocks of 4096 bytes, in its second start.
    pub fn for_tests(shard_count: u16) -> Superblock {
        Superblock {
            uuid: [7; 16],
            secret: [9; 16],
            layout: super::layout::choose(1 << 30, shard_count).expect("large enough"),
            block_size: 4096,
            shard_count,
            index: IndexKind::Hash,
            features: 0,
            generation: 3,
            parent: 0,
            boot: 2,
            created_ms: 0,
            label: String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::layout;

    fn sample() -> Superblock {
        Superblock {
            features: FEATURES_KNOWN,
            parent: 0x1234,
            created_ms: 1_700_000_000_000,
            label: "büro".into(),
            ..Superblock::for_tests(16)
        }
    }

    fn copies(of: &Superblock) -> [Vec<u8>; 4] {
        std::array::from_fn(|copy| of.encode(copy))
    }

    #[test]
    fn round_trip() {
        for copy in 0..4 {
            for index in [IndexKind::Hash, IndexKind::Ordered] {
                let sample = Superblock { index, ..sample() };
                let bytes = sample.encode(copy);
                assert_eq!(bytes.len(), SUPERBLOCK_SIZE);
                assert_eq!(Superblock::decode(&bytes), Ok((copy, sample)));
                assert_eq!(index.name().parse(), Ok(index));
            }
        }
        assert!("sorted".parse::<IndexKind>().unwrap_err().contains("ordered"));
    }

    #[test]
    fn any_flipped_bit_is_noticed() {
        let bytes = sample().encode(1);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                assert!(Superblock::decode(&flipped).is_err(), "byte {at} bit {bit}");
            }
        }
        for cut in [0, 1, 11, 12, 100, 4095] {
            assert!(Superblock::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn fields_are_checked_even_under_a_right_checksum() {
        for (at, value) in
            [(12, 2u8), (16, 4), (17, 2), (18, 0), (20, 1), (60, 1), (68, 7), (75, 1), (2000, 1)]
        {
            let mut bytes = sample().encode(0);
            bytes[at] = value;
            if at == 18 {
                bytes[19] = 0;
            }
            let sum = crc32fast::hash(&bytes[12..]);
            bytes[8..12].copy_from_slice(&sum.to_le_bytes());
            assert!(Superblock::decode(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn sizes_and_counters_that_could_not_be_worked_with_are_refused() {
        let sample = sample();
        let many =
            layout::choose((u64::from(EXTENT_COUNT_MAX) + 1) * EXTENT_SIZE_MAX + (4 << 20), 16).unwrap();
        assert!(many.extent_count > EXTENT_COUNT_MAX, "or it is about something else");
        let many = Superblock { layout: many, ..sample.clone() };
        let error = Superblock::decode(&many.encode(0)).unwrap_err();
        assert!(error.to_string().contains("extent count"), "{error}");
        let small = layout::Layout { extent_size: 64 << 10, ..sample.layout };
        for bad in [
            Superblock { layout: small, ..sample.clone() },
            Superblock { boot: 1 << 32, ..sample.clone() },
            Superblock { generation: u64::MAX, ..sample.clone() },
        ] {
            assert!(matches!(Superblock::decode(&bad.encode(0)), Err(FormatError::Field { .. })), "{bad:?}");
        }
    }

    /// Updates that are cut short at any write, one after the other: each leaves the old or the new generation.
    #[test]
    fn every_crash_during_updates_leaves_the_old_or_the_new_generation() {
        let torn = vec![0xa5; SUPERBLOCK_SIZE];
        let mut states = std::collections::BTreeSet::from([copies(&sample())]);
        for _ in 0..3 {
            let mut after = std::collections::BTreeSet::new();
            for state in &states {
                let quorum = choose(state).unwrap();
                let (old, new) = (quorum.superblock.clone(), quorum.superblock.next());
                assert_eq!(new.generation, old.generation + 1);
                let news = copies(&new);
                let [first, second] = quorum.update_order();
                let mut settled = state.clone();
                for (pair, is_second) in [(first, false), (second, true)] {
                    // Each copy of the pair being written is old, new or torn.
                    for pick in 0..9usize {
                        let mut crashed = settled.clone();
                        for (copy, pick) in [(pair[0], pick % 3), (pair[1], pick / 3)] {
                            crashed[copy] = [&settled[copy], &news[copy], &torn][pick].clone();
                        }
                        let chosen = choose(&crashed).unwrap().superblock;
                        assert!(chosen == new || (chosen == old && !is_second), "{chosen:?}");
                        after.insert(crashed);
                    }
                    for copy in pair {
                        settled[copy] = news[copy].clone();
                    }
                }
                assert_eq!(settled, news);
            }
            states = after;
        }
        assert!(states.len() > 100, "{} states", states.len());
    }

    #[test]
    fn two_bad_copies_are_survived_and_named_three_are_not() {
        let mut state = copies(&sample());
        state[0][100] ^= 1;
        state[3] = state[2].clone();
        let quorum = choose(&state).unwrap();
        assert_eq!(quorum.superblock, sample());
        assert_eq!(quorum.bad.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, 3]);
        state[1][200] ^= 1;
        assert!(matches!(choose(&state), Err(NoQuorum::Damaged { .. })));
        assert_eq!(choose(&std::array::from_fn(|_| vec![0; 4096])).unwrap_err(), NoQuorum::NotFormatted);
    }

    #[test]
    fn the_label_is_cut_at_a_character() {
        let long = Superblock { label: "ü".repeat(40), ..sample() };
        let (_, back) = Superblock::decode(&long.encode(0)).unwrap();
        assert_eq!(back.label, "ü".repeat(16));
    }

    #[test]
    fn copies_of_several_devices_are_told_apart() {
        let ours = sample();
        let other = Superblock { uuid: [8; 16], generation: ours.generation + 9, ..sample() };
        let mixed = |others: &[usize]| -> [Vec<u8>; 4] {
            std::array::from_fn(
                |copy| if others.contains(&copy) { other.encode(copy) } else { ours.encode(copy) },
            )
        };
        // A single one is a stray.
        let found = choose(&mixed(&[3])).unwrap();
        assert!(found.superblock == ours && found.bad[0].1.contains("another device"), "{:?}", found.bad);
        for others in [[0, 1], [1, 2], [2, 3]] {
            let Err(NoQuorum::Mixed { detail }) = choose(&mixed(&others)) else { panic!("{others:?}") };
            assert!(detail.contains("07070707") && detail.contains("08080808"), "{detail}");
        }
        let mut damaged = mixed(&[0, 1]);
        damaged[2][100] ^= 1;
        assert!(matches!(choose(&damaged), Err(NoQuorum::Mixed { .. })));
        assert_eq!(of_each_device(&damaged), [other, ours]);
    }
}

//! Key to slot to shard: CRC16 (XMODEM) modulo 16384 with hash tags, as the Redis Cluster specification defines it.

use crate::limits::SLOT_COUNT;

/// A shard's number on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u16);

const fn crc16_table() -> [u16; 256] {
    let mut table = [0u16; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = (i as u16) << 8;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 0x8000 != 0 { (crc << 1) ^ 0x1021 } else { crc << 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
}

static CRC16_TABLE: [u16; 256] = crc16_table();

fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, b| (crc << 8) ^ CRC16_TABLE[usize::from((crc >> 8) as u8 ^ b)])
}

/// The slot of a key: of the part between the first `{` and the next `}` when that is not empty, else of all of it.
pub fn slot_of(key: &[u8]) -> u16 {
    let hashed = match memchr::memchr(b'{', key) {
        Some(open) => match memchr::memchr(b'}', &key[open + 1..]) {
            Some(length) if length > 0 => &key[open + 1..open + 1 + length],
            _ => key,
        },
        None => key,
    };
    crc16(hashed) % SLOT_COUNT
}

/// The shard of a slot: contiguous slot ranges, as even as they come.
pub fn shard_of_slot(slot: u16, shard_count: u16) -> ShardId {
    ShardId((u32::from(slot) * u32::from(shard_count) / u32::from(SLOT_COUNT)) as u16)
}

/// The shard of a key.
pub fn shard_of(key: &[u8], shard_count: u16) -> ShardId {
    shard_of_slot(slot_of(key), shard_count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_match_the_cluster_specification() {
        // "123456789" -> 0x31C3 is the check value in the specification; the others are CLUSTER KEYSLOT's answers.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot_of(b"foo"), 12182);
        assert_eq!(slot_of(b""), 0);
        assert_eq!(slot_of(b"{user1000}.following"), slot_of(b"{user1000}.followers"));
        assert_eq!(slot_of(b"foo{}{bar}"), crc16(b"foo{}{bar}") % 16384);
        assert_eq!(slot_of(b"foo{{bar}}zap"), slot_of(b"{bar"));
        assert_eq!(slot_of(b"foo{bar}{zap}"), slot_of(b"bar"));
        assert_eq!(slot_of(b"foo{bar"), crc16(b"foo{bar") % 16384);
    }

    #[test]
    fn every_shard_count_covers_all_slots_in_order() {
        for shards in [1u16, 2, 3, 16, 255, 256] {
            let mut seen = vec![0u32; usize::from(shards)];
            let mut last = 0;
            for slot in 0..SLOT_COUNT {
                let shard = shard_of_slot(slot, shards).0;
                assert!(shard >= last && shard < shards);
                last = shard;
                seen[usize::from(shard)] += 1;
            }
            let (min, max) = (seen.iter().min().unwrap(), seen.iter().max().unwrap());
            assert!(*min > 0 && max - min <= 1, "{shards} shards: {min}..{max} slots each");
        }
    }
}

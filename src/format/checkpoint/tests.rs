//! Items, chunks and headers there and back, and what flipped bits come to.

use super::*;

const HEADER: CheckpointHeader =
    CheckpointHeader { extent: 5, epoch: 1 << 32 | 2, checkpoint: 9, part: 1, boot: 4, version: 1 };

const KEY: IndexedKey<'static> = IndexedKey {
    hash_upper: 0x0123_4567_89ab_cdef,
    hash_lower: 17,
    entry: 1 << 60 | 5,
    expires_at_ms: 0,
    long: None,
};

/// That key and another one, as they are stored.
const PLAIN: [[u8; PLAIN_KEY_SIZE]; 2] = [
    [6, 0, 17, 0xef, 0xcd, 0xab, 0x89, 0x67, 0x45, 0x23, 0x01, 5, 0, 0, 0, 0, 0, 0, 0x10],
    [6, 0, 31, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 0, 0, 0x1f],
];

fn part(key: &[u8]) -> PartRecord<'_> {
    PartRecord {
        key,
        extent: 3,
        offset: 4096,
        size: 77,
        value_size: 50,
        sequence: 1 << 40,
        expires_at_ms: 12,
        manifest: None,
    }
}

fn items() -> Vec<Item<'static>> {
    let position = ShardPosition {
        shard: ShardId(2),
        frame: 8,
        boot: 3,
        next_sequence: 99,
        open: Some((3, 8192)),
        clean: true,
    };
    let long = IndexedLong { key: b"key", value_size: 1 << 30, manifest: b"manifest" };
    vec![
        Item::Shard(position),
        Item::Shard(ShardPosition { open: None, clean: false, ..position }),
        Item::Extent(ExtentSummary {
            extent: 3,
            epoch: 7,
            first_frame: 1,
            last_frame: 8,
            end: 8192,
            carry_bytes: 5,
            carry_parts: 6,
            has_clear: true,
            is_reserve: false,
            follows: None,
        }),
        Item::Extent(ExtentSummary {
            extent: 4,
            epoch: 9,
            first_frame: 1,
            last_frame: 2,
            end: 4096,
            carry_bytes: 0,
            carry_parts: 0,
            has_clear: false,
            is_reserve: false,
            follows: Some((7, 1 << 40)),
        }),
        Item::Units(UnitPosition { last: 2, epoch: 1 << 33, open: Some((4, 4096)) }),
        Item::Units(UnitPosition { last: 0, epoch: 1, open: None }),
        Item::RetiredUnits(1, 1),
        Item::Retired(4, 6),
        Item::Commit((3, 4)),
        Item::Part((3, 5), ShardId(1), true, part(b"part")),
        Item::Part((3, 5), ShardId(1), false, PartRecord { manifest: Some(b"manifest"), ..part(b"") }),
        Item::Part((3, 5), ShardId(1), false, PartRecord { manifest: Some(b""), ..part(b"hole") }),
        Item::Plain(PlainKeys(&PLAIN)),
        Item::Entry(IndexedKey { expires_at_ms: 12, ..KEY }),
        Item::Plain(PlainKeys(&PLAIN[..1])),
        Item::Entry(IndexedKey { long: Some(long), ..KEY }),
        Item::Entry(IndexedKey { long: Some(IndexedLong { manifest: b"", ..long }), ..KEY }),
        Item::Entry(IndexedKey { long: Some(IndexedLong { key: b"", ..long }), expires_at_ms: 1, ..KEY }),
        Item::Chunk(StoredChunk {
            id: 1 << 33,
            extent: 3,
            offset: 8192,
            size: 99,
            value_size: 60,
            sequence: 1 << 34,
        }),
        Item::Names(b"\0\x01a\x01\x01b"),
        Item::Names(b""),
        Item::End(4),
    ]
}

#[test]
fn headers_round_trip_and_any_flipped_bit_is_noticed() {
    let block = HEADER.encode(&[1; 16], &[2; 16], 4096);
    assert_eq!(CheckpointHeader::decode(&block, &[1; 16], &[2; 16], 5), Ok(HEADER));
    for at in 0..block.len() {
        let mut flipped = block.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(CheckpointHeader::decode(&flipped, &[1; 16], &[2; 16], 5).is_err(), "byte {at}");
    }
    assert!(CheckpointHeader::decode(&block, &[1; 16], &[2; 16], 6).is_err());
    assert!(CheckpointHeader::decode(&block, &[9; 16], &[2; 16], 5).is_err());
    assert!(CheckpointHeader::decode(&block[..40], &[1; 16], &[2; 16], 5).is_err());
}

#[test]
fn items_round_trip_through_a_chunk_and_any_flipped_bit_is_noticed() {
    let mut bytes = Vec::new();
    items().iter().for_each(|item| item.encode(&mut bytes));
    let place = HEADER.place(&[1; 16], &[2; 16]);
    let chunk = encode_chunk(&bytes, 7, place, 4096, 4096);
    let (back, size) = decode_chunk(&chunk, 7, place, 4096, 4096).unwrap();
    assert_eq!((back, size), (&bytes[..], chunk.len()));
    let mut seen = Vec::new();
    decode_items(back, &mut |item| {
        seen.push(item);
        Ok(())
    })
    .unwrap();
    assert_eq!(seen, items());
    for at in 0..chunk.len() {
        let mut flipped = chunk.clone();
        flipped[at] ^= 1 << (at % 8);
        assert!(decode_chunk(&flipped, 7, place, 4096, 4096).is_err(), "byte {at}");
    }
    assert!(decode_chunk(&chunk, 8, place, 4096, 4096).is_err(), "another number");
    assert!(decode_chunk(&chunk, 7, place, 8192, 4096).is_err(), "another place");
}

#[test]
fn keys_that_stand_together_are_those_that_were_stored_one_by_one() {
    let mut bytes = Vec::new();
    let other = IndexedKey { hash_upper: u64::MAX, hash_lower: 31, entry: 0x1f << 56 | 1 << 8, ..KEY };
    let expiring = IndexedKey { expires_at_ms: 1, ..KEY };
    let keys = [KEY, other, expiring, other, KEY, other];
    keys.iter().for_each(|key| Item::Entry(*key).encode(&mut bytes));
    assert_eq!(bytes[..2 * PLAIN_KEY_SIZE], *PLAIN.as_flattened());
    let (mut back, mut runs) = (Vec::new(), Vec::new());
    decode_items(&bytes, &mut |item| {
        match item {
            Item::Plain(plain) => {
                runs.push(plain.count());
                back.extend(plain.iter().map(|(hash_upper, hash_lower, entry)| IndexedKey {
                    hash_upper,
                    hash_lower,
                    entry,
                    ..KEY
                }));
            }
            Item::Entry(key) => back.push(key),
            _ => unreachable!("only keys were stored"),
        }
        Ok(())
    })
    .unwrap();
    assert_eq!((back, runs), (keys.to_vec(), vec![2, 3]));
}

#[test]
fn bytes_that_are_no_items_are_refused_and_never_panic() {
    let mut bytes = Vec::new();
    items().iter().for_each(|item| item.encode(&mut bytes));
    for cut in 0..bytes.len() {
        let mut count = 0;
        let whole = decode_items(&bytes[..cut], &mut |_| {
            count += 1;
            Ok(())
        });
        assert!(whole.is_err() || count < items().len(), "cut at {cut}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            let _ = decode_items(&flipped, &mut |_| Ok(()));
        }
    }
    assert!(decode_items(&[0], &mut |_| Ok(())).is_err());
}

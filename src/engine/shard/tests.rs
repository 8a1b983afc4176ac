//! Doubt beside expiry, on a shard as recovery hands it over.

use super::*;
use crate::engine::survivors::FoundUnits;
use crate::format::retirement::Retirement;

#[test]
fn a_key_newer_than_what_was_lost_is_absent_once_it_has_expired() {
    let superblock = Arc::new(Superblock::for_tests(16));
    let (newer, older) = (Key::from("newer"), Key::from("older"));
    let (mut index, mut expiries) = (HashIndex::default(), Expiries::default());
    let mut doubt = Doubt { below: 10, ..Doubt::default() };
    for (key, sequence) in [(&newer, 20), (&older, 5)] {
        let identity = hash_key(&superblock.secret, key).identity();
        index.insert(identity, Entry::new(0, 4096, 50, true, false, false));
        expiries.set(identity, 100);
        if sequence >= 10 {
            doubt.known.insert(identity);
        }
    }
    let state = ShardState {
        id: ShardId(0),
        index,
        directory: None,
        expiries,
        manifests: BTreeMap::new(),
        chunks: BTreeMap::new(),
        log: ShardLog::new(ShardId(0), Arc::clone(&superblock), None, 30, 2, Retirement::default()),
        units: FoundUnits::default(),
        extents: Extents::default(),
        is_collectable: true,
        lost_manifests: Vec::new(),
        damage: Vec::new(),
        superseded: Vec::new(),
        copies_due: Vec::new(),
        durable_frame: 1,
        clean: false,
        doubt,
    };
    let mut shard = Shard::new(state, superblock);
    assert!(shard.doubt_about(&newer).is_none() && shard.doubt_about(&older).is_some());
    shard.reap_expired(200, usize::MAX);
    assert_eq!((shard.live(), shard.live_bytes()), (0, 0));
    assert!(shard.doubt_about(&newer).is_none(), "it was the newest, and it has ended");
    assert!(shard.doubt_about(&older).is_some(), "what was lost may have been newer");
    assert!(shard.doubt_about(&Key::from("none")).is_some());
}

//! What fits into an extent of the log.

use super::*;
use crate::engine::op::Key;

#[test]
fn a_log_without_free_extents_can_still_say_what_is_retired() {
    let superblock = Arc::new(Superblock::for_tests(4));
    let allocator = Allocator::new(1, 0, 0, 2, 0);
    let mut log = ShardLog::new(ShardId(0), superblock, None, 1, 1, Retirement::default());
    let (key, mut value) = (Key::from("key"), vec![7; 200_000]);
    while !value.is_empty() {
        let record = Record { kind: RecordType::Put, key: &key, value: &value, ..retired_record(&[]) };
        match log.append(Draft { record, purpose: Purpose::Data, lazy: false }, &allocator) {
            Ok(_) => {}
            Err(NoRoom::Stall) => assert!(log.seal(0).is_some()),
            Err(NoRoom::Full) => value.truncate(value.len() / 2),
        }
    }
    assert!(log.seal(0).is_none_or(|frame| frame.frame > 1));
    assert_eq!(allocator.free_count(), 0);
    let first = log.retire([(1, 1)], [], &allocator).expect("room at the end");
    assert_eq!(log.seal(0).map(|frame| frame.frame), Some(first.frame));
    // As long as what is kept is not taken by others' frames: this one may find nothing.
    log.mark_start();
    assert!(log.seal(0).is_some());
}

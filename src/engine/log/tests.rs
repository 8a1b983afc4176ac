//! What fits into an extent of the log.

use super::*;
use crate::engine::op::Key;

/// A log that has filled the only extent of its device.
fn full_log(block_size: u32) -> (ShardLog, Allocator) {
    let superblock = Arc::new(Superblock { block_size, ..Superblock::for_tests(4) });
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
    while log.seal(0).is_some() {}
    assert_eq!(allocator.free_count(), 0);
    (log, allocator)
}

#[test]
fn a_log_without_free_extents_can_still_say_what_is_retired() {
    for block_size in [4096, 8192, 16_384, 65_536] {
        let (mut log, allocator) = full_log(block_size);
        // What frees nothing has to wait.
        assert_eq!(log.log_retired(&allocator), Err(NoRoom::Full), "{block_size}");
        if block_size == 4096 {
            // A start behind a crash in between.
            log.mark_start();
            assert!(log.seal(0).is_some());
        }
        let first = log.retire([(1, 1)], [], &allocator).expect("room at the end");
        assert_eq!(log.seal(0).map(|frame| frame.frame), Some(first.frame), "{block_size}");
    }
}

#[test]
fn what_is_kept_grows_with_what_is_retired() {
    let superblock = Arc::new(Superblock::for_tests(4));
    let extent_size = superblock.layout.extent_size;
    let mut log = ShardLog::new(ShardId(0), superblock, None, 1, 1, Retirement::default());
    let before = log.kept_size();
    (0..700).for_each(|number| log.retired.frames.insert(2 * number + 1, 2 * number + 1));
    assert!(before >= 8192 && log.kept_size() >= 700 * 16, "{before} bytes, then {}", log.kept_size());
    (0..100_000).for_each(|number| log.retired.frames.insert(2 * number + 1, 2 * number + 1));
    assert!(log.kept_size() <= extent_size / 64, "{}", log.kept_size());
}

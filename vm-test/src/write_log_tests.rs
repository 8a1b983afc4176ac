//! Logs made by hand: what is read of them, and which images they leave.

use super::*;

/// Builds a log as QEMU writes it.
struct Log(Vec<u8>);

impl Log {
    fn new() -> Log {
        let mut bytes = vec![0u8; SECTOR_SIZE];
        // The count in the header is behind what follows.
        for (at, value) in [MAGIC, VERSION, 0, SECTOR_SIZE as u64].into_iter().enumerate() {
            bytes[8 * at..8 * at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Log(bytes)
    }

    fn entry(mut self, sector: u64, count: u64, flags: u64) -> Log {
        let at = self.0.len();
        self.0.resize(at + SECTOR_SIZE, 0);
        for (index, value) in [sector, count, flags, 0].into_iter().enumerate() {
            self.0[at + 8 * index..at + 8 * index + 8].copy_from_slice(&value.to_le_bytes());
        }
        self
    }

    fn write(self, sector: u64, count: usize, fill: u8) -> Log {
        let mut log = self.entry(sector, count as u64, 0);
        log.0.resize(log.0.len() + count * SECTOR_SIZE, fill);
        log
    }

    fn flush(self) -> Log {
        self.entry(0, 0, FLAG_FLUSH)
    }

    fn zeros(mut self, count: usize) -> Log {
        self.0.resize(self.0.len() + count * SECTOR_SIZE, 0);
        self
    }

    fn parse(self) -> WriteLog {
        WriteLog::parse(self.0).unwrap()
    }
}

/// The first byte of each sector of the image that a log leaves, over an image of `sectors` times `before`.
fn image(log: &WriteLog, sectors: usize, before: u8, survivors: Survivors) -> Vec<u8> {
    let bytes = image_bytes(log, sectors, before, survivors);
    bytes.chunks(SECTOR_SIZE).map(|sector| sector[0]).collect()
}

fn image_bytes(log: &WriteLog, sectors: usize, before: u8, survivors: Survivors) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![before; sectors * SECTOR_SIZE]).unwrap();
    log.replay(file.path(), survivors).unwrap();
    std::fs::read(file.path()).unwrap()
}

#[test]
fn what_was_flushed_stays_and_the_rest_is_gone() {
    let log = Log::new().write(1, 2, 7).write(0, 1, 8).flush().write(2, 1, 9).write(3, 1, 10).parse();
    assert_eq!((log.operation_count(), log.durable_count(), log.unflushed_count()), (5, 3, 2));
    assert_eq!(log.ending, Ending::Clean);
    assert_eq!(image(&log, 5, 1, Survivors::Flushed), [8, 7, 7, 1, 1]);
    assert_eq!(image(&log, 5, 1, Survivors::Everything), [8, 7, 9, 10, 1]);
}

#[test]
fn a_drive_that_lied_has_what_was_there_before_its_lies() {
    let log = Log::new().write(0, 1, 7).flush().write(1, 1, 8).flush().write(2, 1, 9).parse();
    let lied = |flush_count| image(&log, 3, 1, Survivors::Lied { flush_count });
    assert_eq!([lied(0), lied(1), lied(2), lied(9)], [[7, 8, 1], [7, 1, 1], [1, 1, 1], [1, 1, 1]]);
}

#[test]
fn without_a_flush_nothing_is_sure() {
    let mut log = Log::new().write(0, 1, 7);
    log.0[..SECTOR_SIZE].fill(0);
    let log = log.parse();
    assert_eq!(log.durable_count(), 0);
    assert_eq!(image(&log, 2, 1, Survivors::Flushed), [1, 1]);
    assert_eq!(WriteLog::parse(Vec::new()).unwrap().operation_count(), 0);
}

#[test]
fn every_subset_comes_up_and_leaves_the_flushed_alone() {
    let log = Log::new().write(0, 1, 7).flush().write(1, 1, 8).write(2, 1, 9).parse();
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..64 {
        seen.insert(image(&log, 3, 1, Survivors::Subset(seed)));
    }
    let all = [[7, 1, 1], [7, 1, 9], [7, 8, 1], [7, 8, 9]];
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), all);
    assert_eq!(image(&log, 3, 1, Survivors::Subset(5)), image(&log, 3, 1, Survivors::Subset(5)));
}

#[test]
fn torn_writes_lose_pieces_of_the_unit_and_nothing_else() {
    let log = Log::new().write(0, 1, 7).flush().write(1, 4, 8).parse();
    let mut shapes = std::collections::BTreeSet::new();
    for seed in 0..2_000 {
        let found = image(&log, 6, 1, Survivors::Torn { seed, unit: SECTOR_SIZE });
        assert_eq!((found[0], found[5]), (7, 1));
        shapes.insert(found);
    }
    // Of 16 subsets of 4 sectors, those with at most one gap or two ends: all but three scattered ones.
    for shape in
        [[1, 1, 1, 1], [8, 8, 8, 8], [8, 1, 1, 1], [1, 1, 1, 8], [8, 1, 1, 8], [1, 8, 1, 1], [8, 8, 1, 8]]
    {
        let wanted = [&[7], &shape[..], &[1]].concat();
        assert!(shapes.contains(&wanted), "{wanted:?} is not among {shapes:?}");
    }
    let has_odd_byte = |seed| {
        let found = image_bytes(&log, 6, 1, Survivors::Torn { seed, unit: 1 });
        found.chunks(SECTOR_SIZE).any(|sector| sector.iter().any(|byte| *byte != sector[0]))
    };
    assert!((0..20).any(has_odd_byte), "no write was torn within a sector");
}

#[test]
fn discarded_blocks_read_as_zeros() {
    let log = Log::new().write(0, 16, 7).entry(8, 8, FLAG_DISCARD).write(1, 1, 9).flush().parse();
    let found = image(&log, 16, 1, Survivors::Flushed);
    assert_eq!(found, [[7, 9, 7, 7, 7, 7, 7, 7], [0; 8]].concat());
}

#[test]
fn an_entry_that_is_cut_short_was_never_told_of() {
    let mut log = Log::new().write(0, 1, 7).flush().write(1, 3, 8);
    log.0.truncate(log.0.len() - 100);
    let log = log.parse();
    assert_eq!((log.operation_count(), log.ending), (2, Ending::Clean));
    let log = Log::new().write(0, 1, 7).flush().zeros(5).parse();
    assert_eq!((log.operation_count(), log.ending), (2, Ending::Clean));
}

#[test]
fn a_gap_is_told_apart_from_the_end() {
    let log = Log::new().write(0, 1, 7).zeros(2).flush().parse();
    assert_eq!((log.operation_count(), log.ending), (1, Ending::Gap));
}

#[test]
fn other_files_and_other_flags_are_refused() {
    let mut log = Log::new();
    log.0[0] ^= 1;
    assert!(WriteLog::parse(log.0).unwrap_err().contains("not a log of writes"));
    let mut log = Log::new();
    log.0[25] = 16; // sectors of 4096 bytes
    assert!(WriteLog::parse(log.0).unwrap_err().contains("not a log of writes"));
    let fua = Log::new().entry(0, 1, 2).zeros(1);
    assert!(WriteLog::parse(fua.0).unwrap_err().contains("flags 0x2"));
}

#[test]
fn a_growing_log_is_followed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut follower = Follower::open(file.path()).unwrap();
    assert_eq!(follower.unflushed_count(), 0);
    let steps = [
        (Log::new().write(0, 1, 7), 1),
        (Log::new().write(0, 1, 7).write(1, 2, 8), 2),
        (Log::new().write(0, 1, 7).write(1, 2, 8).flush(), 0),
        (Log::new().write(0, 1, 7).write(1, 2, 8).flush().zeros(3), 0),
        (Log::new().write(0, 1, 7).write(1, 2, 8).flush().write(1, 2, 8), 1),
    ];
    for (log, wanted) in steps {
        std::fs::write(file.path(), log.0).unwrap();
        assert_eq!(follower.unflushed_count(), wanted);
    }
}

//! Coverage probes: rare situations of recovery, counted by name where they happen, so that a test run which never produced
//! one of them can say so. A count costs one add in memory of the thread; probes stand on rare paths only.

use std::cell::RefCell;

macro_rules! probes {
    ($($(#[$doc:meta])* $name:ident $text:literal,)*) => {
        /// A situation that simulations must produce.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Probe { $($(#[$doc])* $name,)* }

        /// All of them, with their names.
        const PROBES: &[(Probe, &str)] = &[$((Probe::$name, $text),)*];
    };
}

probes! {
    /// Recovery dropped parts of a batch without a commit record.
    UndecidedPartsDropped "undecided parts dropped",
    /// Recovery cut frames behind the end of a log.
    TornTailCut "frames behind a torn tail cut",
    /// Recovery passed over frames that an older boot left.
    StaleFrameSkipped "stale frame skipped",
    /// An extent was collected into what is open while no other could be opened.
    CollectionWithoutReserve "collection without an extent of its own",
    /// A frame whose write failed was there all the same, and its copy in the next extent was taken.
    LaterCopyTaken "later copy of a frame taken",
    /// A frame's header was right but its records were not, behind the end of the log.
    TornFrameSeen "torn frame with an intact header",
    /// A frame was proven durable and is not there.
    DurableFrameMissing "durable frame missing",
    /// An extent's header was lost while its first frame was not durable.
    OrphanExtentTorn "extent header torn",
    /// An extent's header was lost although frames behind it were durable.
    OrphanExtentLost "extent header lost",
    /// Recovery read something twice and got two answers.
    RecoveryReadUnstable "recovery read unstable",
    /// Recovery read on behind damaged records.
    RecordsSalvaged "records salvaged",
    /// A direct read was answered at once.
    ReadAtOnce "read at once",
    /// A direct write was.
    WrittenAtOnce "written at once",
    /// Garbage collection emptied an extent.
    ExtentCollected "extent collected",
    /// A long value was read to its end although its key had got another one meanwhile.
    LongReadOutlived "long value read although its key has another",
    /// The log had no room for all of a long value at once.
    LongWriteStalled "long value waits for room",
    /// Garbage collection moved a chunk of a long value.
    ChunkMoved "chunk moved",
    /// A start found chunks that no value names: a write was cut short, or replaced.
    OrphanChunksDropped "chunks without a manifest dropped",
    /// A start found a manifest of a key that expires some of whose chunks are gone.
    ExpiredManifestDropped "manifest of an expired key dropped",
    /// An extent went back to the allocator.
    ExtentFreed "extent freed",
    /// A checkpoint was completed.
    CheckpointWritten "checkpoint written",
    /// A checkpoint was given up.
    CheckpointGivenUp "checkpoint given up",
    /// A shard was recovered from a checkpoint alone.
    CheckpointAlone "shard recovered from a checkpoint alone",
    /// A shard was recovered from a checkpoint and the log behind it.
    CheckpointAndLog "shard recovered from a checkpoint and the log behind it",
    /// A checkpoint fits no log that was found, and the whole log was read.
    CheckpointRefused "checkpoint refused",
    /// A checkpoint is not there in whole.
    CheckpointTorn "incomplete checkpoint passed over",
    /// The device was told that an extent is free.
    ExtentTrimmed "extent trimmed",
    /// Garbage collection met a key that somebody holds.
    CollectionMetHold "collection met a held key",
    /// Garbage collection passed over what it could not read.
    CollectionMetDamage "collection passed over damage",
    /// Garbage collection met a damaged record that is the newest of its key.
    CollectionMetLost "collection met a lost record",
    /// Recovery took a log for which frames were retired.
    RetiredFramesSkipped "retired frames skipped",
    /// Recovery looked for an older record of what is retired.
    OlderRetirementTaken "older retirement taken",
    /// A listing met the name of a key that has gone.
    LeftoverMet "name of a key that has gone met",
    /// Names of keys that have gone were swept out of the directory.
    DirectorySwept "directory swept",
    /// A scan went through the few keys of a prefix.
    PrefixScanned "few keys of a prefix scanned",
    /// A unit of survivors is durable, and its records are the ones that count.
    UnitInstalled "unit of survivors installed",
    /// A unit of survivors could not be written.
    UnitFailed "unit of survivors given up",
    /// Recovery put a unit behind the frame that it follows.
    UnitRecovered "unit of survivors recovered",
    /// Recovery found the last unit in part and left it out.
    TornUnitCut "torn unit left out",
    /// A unit was proven durable and is not there.
    DurableUnitMissing "durable unit missing",
    /// A key is in doubt because records were lost.
    KeyInDoubt "key in doubt",
}

thread_local! {
    static COUNTS: RefCell<[u64; PROBES.len()]> = const { RefCell::new([0; PROBES.len()]) };
}

/// Counts a situation.
pub fn hit(probe: Probe) {
    COUNTS.with_borrow_mut(|counts| counts[probe as usize] += 1);
}

/// Counts a situation if it is there.
pub fn hit_if(is_there: bool, probe: Probe) {
    if is_there {
        hit(probe);
    }
}

/// What this thread has counted since the last call, by name.
pub fn take() -> impl Iterator<Item = (&'static str, u64)> {
    let counts = COUNTS.replace([0; PROBES.len()]);
    PROBES.iter().map(|(_, name)| *name).zip(counts).filter(|(_, count)| *count > 0)
}

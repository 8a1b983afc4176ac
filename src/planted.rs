//! Mistakes that can be planted on purpose, to show that the simulation catches each of them. Only a build with the feature
//! `planted-bugs` has them; everywhere else the question below is the constant `false`.

macro_rules! bugs {
    ($($(#[$about:meta])* $name:ident,)*) => {
        /// A mistake that storage engines have really made, or that this one made once.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug {
            $($(#[$about])* $name,)*
        }

        /// All of them.
        pub const BUGS: &[Bug] = &[$(Bug::$name,)*];
    };
}

bugs! {
    /// A write is acknowledged before it is durable.
    AcknowledgesEarly,
    /// Groups are not flushed.
    SkipsFlush,
    /// A group is not flushed once a frame of it had to go elsewhere.
    SkipsFlushAfterRelocation,
    /// A flush that failed counts as one that did not.
    IgnoresFailedFlush,
    /// A write that failed counts as one that did not.
    IgnoresFailedWrite,
    /// A frame goes elsewhere after a failed write, and the keys in it are looked for where it was.
    RelocationLeavesKeys,
    /// A participant of a batch says that its parts are durable when they are only logged.
    PreparesEarly,
    /// A part of a batch counts although nothing has decided the batch.
    CountsUndecidedParts,
    /// A commit record is not kept for the participants that have no copy of it yet.
    ForgetsUnsettledBatches,
    /// A part of a batch that is decided late replaces what was written since.
    LateCommitWins,
    /// Another client may change a key that a read-modify-write holds.
    SkipsHolds,
    /// The same where the value is long.
    SkipsLongHolds,
    /// An expired key is still there.
    ServesExpired,
    /// A key that was written anew is removed when its earlier value would have expired.
    KeepsOldExpiry,
    /// Garbage collection moves a record without its expiry.
    MoveForgetsExpiry,
    /// A read is answered from an older record in the cache.
    ServesStaleCache,
    /// Garbage collection drops deletes although older records of their keys are left.
    DropsTombstones,
    /// Garbage collection drops commit records that parts of batches rest on.
    DropsCommitRecords,
    /// A key is moved although a batch has logged a part for it.
    MovesHeldKeys,
    /// An extent counts as empty when little in it is live.
    RoundsLiveBytesDown,
    /// An extent is free before the record that says so is durable.
    FreesEarly,
    /// An extent is free while somebody still reads from it.
    FreesExtentUnderReader,
    /// An extent is free while the scrubber still reads from it.
    FreesExtentUnderScrubber,
    /// An extent is free while a dump still wants to read from it.
    FreesPinnedExtents,
    /// An extent is used again while the device is being told that it is free.
    ReusesWhileTrimming,
    /// A dump does not keep what is written over ahead of it.
    PinMissesOverwrites,
    /// The chunks of a value that is written over are garbage although somebody still reads them.
    BuriesChunksUnderReader,
    /// What is written to a part of a long value loses against what was there.
    OldBytesWinOverEdit,
    /// Extents of a checkpoint that was given up are never free again.
    LeaksCheckpointExtents,
    /// A checkpoint leaves out the parts of batches that were not decided yet.
    CheckpointLacksParts,
    /// A checkpoint goes on although a frame went elsewhere.
    CheckpointSurvivesRelocation,
    /// What a checkpoint says of extents that were retired since is believed.
    BelievesRetiredExtents,
    /// The superblock's copies are always replaced in the same order.
    FixedSuperblockOrder,
    /// FLUSHALL is forgotten by a restart.
    ForgetsClear,
    /// A gap in the log is passed over.
    AcceptsGaps,
    /// A value is served although its checksum is wrong.
    TrustsValues,
    /// When the index grows, keys go where nobody looks for them.
    SplitsIndexWrongly,
    /// A read takes the record that the index names for the key's own.
    TrustsIdentity,
    /// A read goes on into what is being written.
    ReadsIntoWrites,
    /// A key that a batch has written is not listed in order.
    DirectoryForgetsKey,
    /// A start does not list in order what the log has brought.
    DirectoryIgnoresLog,
    /// What garbage collection keeps stands behind what is logged while it is kept.
    UnitFollowsLater,
    /// What garbage collection keeps is written before what it rests on is durable.
    UnitOvertakesLog,
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a mistake in what this thread does from now on.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this mistake is to be made.
#[cfg(feature = "planted-bugs")]
pub fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this mistake is to be made: never.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is_planted(_bug: Bug) -> bool {
    false
}

//! What a world is like, drawn from its seed.

use crate::device::sim::Tear;
use crate::device::sim::random::Random;
use crate::engine::durability::Durability;
use crate::format::superblock::IndexKind;
use crate::limits::CHUNK_SIZE_MAX;

/// What a run is like.
#[derive(Debug, Clone)]
pub struct WorldConfig {
    /// Everything is drawn from it.
    pub seed: u64,
    /// Requests in all.
    pub requests: usize,
    /// Shards of the node.
    pub shard_count: u16,
    /// How they know their keys.
    pub index: IndexKind,
    /// Engines that share them.
    pub engine_count: usize,
    /// Bytes of the disk.
    pub disk_size: u64,
    /// How writes tear.
    pub tear: Tear,
    /// The mode; `always` promises the most.
    pub durability: Durability,
    /// Bytes of each engine's cache: none, too few for everything, or enough.
    pub cache_size: usize,
    /// The disk is told which extents are free.
    pub trim: bool,
    /// What garbage collection keeps goes to extents of its own, small as the disk is.
    pub survivors_apart: bool,
    /// Bytes written between two checkpoints.
    pub checkpoint_interval: u64,
    /// Bytes of the longest chunk: small ones make long values of most.
    pub chunk_size: u64,
    /// How much longer than usual values are.
    pub value_scale: usize,
    /// Some writes fail in every life, rather than now and then.
    pub writes_fail: bool,
    /// The scrubber reads everything again and again, and some reads take their time.
    pub scrubs: bool,
    /// Keys of each shard that are made at the beginning and stay, all in one part of the index: it grows.
    pub crowd: usize,
}

impl WorldConfig {
    /// A configuration drawn from a seed.
    pub fn from_seed(seed: u64, requests: usize) -> WorldConfig {
        let mut random = Random::new(seed ^ 0x5eed);
        let shard_count = [1, 2, 4][random.index(3)];
        WorldConfig {
            seed,
            requests,
            shard_count,
            // Not drawn, so that worlds are else as they would be without it.
            index: if seed % 2 == 1 { IndexKind::Ordered } else { IndexKind::Hash },
            engine_count: if shard_count > 1 && random.chance(1, 2) { 2 } else { 1 },
            disk_size: [14u64, 24, 64][random.index(3)] << 20,
            tear: [Tear::Block, Tear::Sector512, Tear::Byte][random.index(3)],
            durability: Durability::Always,
            cache_size: [0, 0, 64 << 10, 2 << 20][random.index(4)],
            trim: random.chance(1, 2),
            survivors_apart: seed % 4 != 3,
            checkpoint_interval: [0, 64 << 10, 1 << 20][random.index(3)],
            chunk_size: [CHUNK_SIZE_MAX as u64, 60_000, 5_000, 700][random.index(4)],
            value_scale: 1,
            writes_fail: false,
            scrubs: false,
            crowd: 0,
        }
    }

    /// The same on a small disk that is written many times over: garbage is collected all the time.
    pub fn full_from_seed(seed: u64, requests: usize) -> WorldConfig {
        WorldConfig { disk_size: 14 << 20, value_scale: 16, ..WorldConfig::from_seed(seed, requests) }
    }

    /// The same beside the scrubber, which never comes to rest.
    pub fn scrubbed_from_seed(seed: u64, requests: usize) -> WorldConfig {
        WorldConfig { scrubs: true, ..WorldConfig::full_from_seed(seed, requests) }
    }

    /// The same on a disk where writes fail all the time. Each takes an extent, of which there are enough.
    pub fn failing_from_seed(seed: u64, requests: usize) -> WorldConfig {
        WorldConfig { disk_size: 64 << 20, writes_fail: true, ..WorldConfig::from_seed(seed, requests) }
    }

    /// The same with values that are nearly all long.
    pub fn long_from_seed(seed: u64, requests: usize) -> WorldConfig {
        WorldConfig { chunk_size: 700, ..WorldConfig::from_seed(seed, requests) }
    }

    /// The same with so many keys that every shard's index is of several segments.
    pub fn crowded_from_seed(seed: u64, requests: usize) -> WorldConfig {
        WorldConfig { crowd: 800, ..WorldConfig::from_seed(seed, requests) }
    }

    /// The same with one of the modes that acknowledge at once: a crash may take the end of each shard's history.
    pub fn relaxed_from_seed(seed: u64, requests: usize) -> WorldConfig {
        let modes = [
            Durability::Interval(1),
            Durability::Interval(50),
            Durability::Bytes(1),
            Durability::Bytes(64 << 10),
            Durability::Never,
        ];
        let durability = modes[Random::new(seed ^ 0x0de1).index(modes.len())];
        WorldConfig { durability, ..WorldConfig::from_seed(seed, requests) }
    }
}

//! From Identify to a geometry: what a namespace can do, and which ones are refused.

use spdk_sys::{basalt_controller_info, basalt_namespace_info};

use crate::device::{Blocks, Deallocate, Geometry};
use crate::limits;

/// The least block that the log uses, so that one image opens on every device.
const BLOCK_SIZE_MIN: u32 = 4096;

/// Longer commands gain nothing, and buffers come in sizes up to this.
const TRANSFER_SIZE_MAX: u32 = 1 << 20;

/// Why a namespace can't be used, as a sentence with what to do.
pub(super) fn refusal(info: &basalt_namespace_info) -> Option<String> {
    let block_size = info.block_size;
    if info.metadata_size > 0 || info.has_protection {
        return Some(format!(
            "its blocks carry {} bytes of metadata{}, which Basalt does not write; format it without (nvme format --lbaf=N, \
             after nvme id-ns -H lists the formats)",
            info.metadata_size,
            if info.has_protection { " and protection information" } else { "" }
        ));
    }
    if !block_size.is_power_of_two() || !(512..=65_536).contains(&block_size) {
        return Some(format!("its blocks have {block_size} bytes; powers of two from 512 to 65536 are used"));
    }
    let block_size = block_size.max(BLOCK_SIZE_MIN);
    if info.transfer_size_max < block_size {
        return Some(format!(
            "one command carries {} bytes at most, and a block of the log has {block_size}",
            info.transfer_size_max
        ));
    }
    let (size, least) = (info.block_count * u64::from(info.block_size), crate::device::file::DEVICE_SIZE_MIN);
    (size < least).then(|| format!("its {size} bytes are too few; the least is {least}"))
}

/// The geometry of a namespace that is not refused. `queue_size` is what the queues are made with.
pub(super) fn geometry(
    controller: &basalt_controller_info,
    info: &basalt_namespace_info,
    queue_size: u32,
) -> Geometry {
    let block_size = info.block_size.max(BLOCK_SIZE_MIN);
    let boundary = u64::from(info.optimal_boundary) * u64::from(info.block_size);
    Geometry {
        engine: "spdk",
        block_size,
        read_alignment: info.block_size,
        block_count: info.block_count * u64::from(info.block_size) / u64::from(block_size),
        transfer_size_max: info.transfer_size_max.min(TRANSFER_SIZE_MAX) / block_size * block_size,
        optimal_boundary_size: u32::try_from(boundary)
            .ok()
            .filter(|boundary| boundary.is_multiple_of(block_size))
            .unwrap_or(0),
        volatile_cache: controller.volatile_write_cache,
        // Controllers are known that take the bit and ignore it; one Flush after a group of writes costs little more.
        fua: false,
        atomic_size: atomic_size(controller, info),
        // Whatever DLFEAT says of deallocated blocks, a controller may deallocate fewer than it was asked to.
        deallocate: match info.supports_deallocate {
            true => Deallocate::Advisory,
            false => Deallocate::None,
        },
        blocks: Blocks::NEVER,
        // PRPs of NVMe address memory in steps of a double word.
        memory_alignment: 4,
        registered_buffers: true,
        // One entry of a queue stays empty, so that full and empty differ.
        depth: queue_size - 1,
        partition_block_size: info.block_size,
    }
}

/// Entries of each I/O queue.
pub(super) fn queue_size(controller: &basalt_controller_info) -> u32 {
    controller.queue_size_max.clamp(2, limits::DEVICE_DEPTH as u32)
}

/// Bytes that are written all or not at all across a power failure. NAWUPF and AWUPF count from 0, and the namespace's own
/// figure counts only where NSFEAT says so. A write that crosses an atomic boundary is not atomic, and Basalt places its
/// writes without regard to one: then a single block is all that is promised.
fn atomic_size(controller: &basalt_controller_info, info: &basalt_namespace_info) -> u32 {
    let has_boundary = info.atomic_is_own && info.nabspf != 0;
    let blocks = match (has_boundary, info.atomic_is_own) {
        (true, _) => 1,
        (false, true) => u32::from(info.nawupf) + 1,
        (false, false) => u32::from(controller.awupf) + 1,
    };
    blocks.saturating_mul(info.block_size)
}

/// How writes become durable here, for the user.
pub(super) fn durability_note(geometry: &Geometry) -> &'static str {
    match geometry.volatile_cache {
        true => {
            "it has a volatile write cache, so a group of writes is durable after the Flush that follows it; FUA is not \
             relied on"
        }
        false => "it has no volatile write cache, so a completed write is durable and no Flush is sent",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn controller() -> basalt_controller_info {
        basalt_controller_info { queue_size_max: 1024, ..Default::default() }
    }

    fn namespace() -> basalt_namespace_info {
        basalt_namespace_info {
            block_count: 1 << 21,
            block_size: 512,
            transfer_size_max: 128 << 10,
            supports_deallocate: true,
            ..Default::default()
        }
    }

    #[test]
    fn small_blocks_become_blocks_of_the_log() {
        let found = geometry(&controller(), &namespace(), 256);
        assert_eq!((found.block_size, found.block_count, found.partition_block_size), (4096, 1 << 18, 512));
        assert_eq!(found.read_alignment, 512);
        assert_eq!((found.transfer_size_max, found.depth), (128 << 10, 255));
        assert!(!found.volatile_cache && !found.fua && found.deallocate == Deallocate::Advisory);
        let large = basalt_namespace_info { block_size: 16_384, transfer_size_max: 5 << 20, ..namespace() };
        let found = geometry(&controller(), &large, 2);
        assert_eq!((found.block_size, found.partition_block_size), (16_384, 16_384));
        assert_eq!((found.transfer_size_max, found.depth), (1 << 20, 1));
    }

    #[test]
    fn atomicity_counts_from_zero_and_only_where_it_is_said() {
        let awupf = basalt_controller_info { awupf: 7, ..controller() };
        let own = basalt_namespace_info { atomic_is_own: true, nawupf: 31, ..namespace() };
        let unsaid = basalt_namespace_info { nawupf: 31, ..namespace() };
        let bounded = basalt_namespace_info { nabspf: 255, ..own };
        assert_eq!(atomic_size(&controller(), &namespace()), 512);
        assert_eq!(atomic_size(&awupf, &unsaid), 8 * 512);
        assert_eq!(atomic_size(&awupf, &own), 32 * 512);
        assert_eq!(atomic_size(&awupf, &bounded), 512);
    }

    #[test]
    fn a_boundary_that_no_block_fits_is_none() {
        let with = |optimal_boundary| {
            let info = basalt_namespace_info { optimal_boundary, ..namespace() };
            geometry(&controller(), &info, 128).optimal_boundary_size
        };
        assert_eq!((with(0), with(256), with(7), with(u32::MAX)), (0, 128 << 10, 0, 0));
    }

    #[test]
    fn what_can_not_be_used_is_refused_with_its_remedy() {
        assert_eq!(refusal(&namespace()), None);
        let why = |info| refusal(&info).unwrap();
        assert!(why(basalt_namespace_info { metadata_size: 8, ..namespace() }).contains("nvme format"));
        assert!(why(basalt_namespace_info { has_protection: true, ..namespace() }).contains("protection"));
        assert!(why(basalt_namespace_info { block_size: 520, ..namespace() }).contains("520 bytes"));
        assert!(
            why(basalt_namespace_info { transfer_size_max: 2048, ..namespace() }).contains("one command")
        );
        assert!(why(basalt_namespace_info { block_count: 10, ..namespace() }).contains("too few"));
    }

    #[test]
    fn a_queue_is_no_longer_than_the_controller_takes() {
        let size = |queue_size_max| queue_size(&basalt_controller_info { queue_size_max, ..controller() });
        assert_eq!((size(128), size(65_536), size(1)), (128, 256, 2));
    }
}

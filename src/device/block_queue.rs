//! What sysfs says about the block device that a file is on, or is.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The queue of a block device: its attributes are in `queue/` of its directory in sysfs.
#[derive(Debug, Clone)]
pub struct BlockQueue {
    directory: PathBuf,
}

impl BlockQueue {
    /// The queue beneath a file or block device; `None` where there is none, as on tmpfs and network file systems.
    pub fn of(file: &File) -> Option<BlockQueue> {
        let metadata = file.metadata().ok()?;
        let device = if metadata.file_type().is_block_device() { metadata.rdev() } else { metadata.dev() };
        BlockQueue::of_number(Path::new("/sys/dev/block"), device)
    }

    fn of_number(sysfs: &Path, device: u64) -> Option<BlockQueue> {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let own = std::fs::canonicalize(sysfs.join(format!("{major}:{minor}"))).ok()?;
        // A partition has no queue of its own: its disk is one level up.
        let owner =
            [own.clone(), own.parent()?.to_path_buf()].into_iter().find(|at| at.join("queue").is_dir())?;
        Some(BlockQueue { directory: owner })
    }

    /// The name of the device, such as `nvme0n1`.
    pub fn name(&self) -> String {
        self.directory.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// An attribute, such as `write_cache`; `None` where this kernel has none of the name.
    pub fn attribute(&self, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.directory.join("queue").join(name)).ok()?;
        Some(text.trim().to_owned())
    }

    /// What the driver says of the disk beneath the queue: the first of these attributes of its directory that it has.
    fn property(&self, names: &[&str]) -> Option<String> {
        let read = |name: &&str| std::fs::read_to_string(self.directory.join(name)).ok();
        names.iter().filter_map(read).map(|text| text.trim().to_owned()).find(|text| !text.is_empty())
    }

    /// The disk's model.
    pub fn model(&self) -> Option<String> {
        self.property(&["device/model"])
    }

    /// What tells the disk from others of its model: its serial number, its name in the world, or the identity of a volume that was
    /// made of disks.
    pub fn serial(&self) -> Option<String> {
        self.property(&["device/serial", "serial", "wwid", "device/wwid", "dm/uuid", "md/uuid"])
    }

    /// Bytes of the disk.
    pub fn disk_size(&self) -> Option<u64> {
        // Sectors of 512 bytes, whatever its blocks are.
        self.property(&["size"])?.parse::<u64>().ok()?.checked_mul(512)
    }

    /// An attribute that is a number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.attribute(name)?.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_the_queue_of_its_disk() {
        let folder = tempfile::tempdir().unwrap();
        let disk = folder.path().join("devices/nvme0n1");
        std::fs::create_dir_all(disk.join("queue")).unwrap();
        std::fs::create_dir_all(disk.join("nvme0n1p1")).unwrap();
        std::fs::write(disk.join("queue/write_cache"), "write back\n").unwrap();
        std::fs::write(disk.join("queue/io_poll"), "1\n").unwrap();
        std::fs::write(disk.join("size"), "2048\n").unwrap();
        std::fs::create_dir(disk.join("device")).unwrap();
        std::fs::write(disk.join("device/model"), "Fast Drive   \n").unwrap();
        std::fs::write(disk.join("device/serial"), "  \n").unwrap();
        std::fs::write(disk.join("wwid"), "eui.0025\n").unwrap();
        std::os::unix::fs::symlink("devices/nvme0n1", folder.path().join("259:0")).unwrap();
        std::os::unix::fs::symlink("devices/nvme0n1/nvme0n1p1", folder.path().join("259:1")).unwrap();
        for minor in [0, 1] {
            let queue = BlockQueue::of_number(folder.path(), rustix::fs::makedev(259, minor)).unwrap();
            assert_eq!(queue.name(), "nvme0n1");
            assert_eq!(queue.attribute("write_cache").as_deref(), Some("write back"));
            assert_eq!((queue.number("io_poll"), queue.number("write_cache")), (Some(1), None));
            assert_eq!(queue.attribute("nonsense"), None);
            assert_eq!((queue.model().as_deref(), queue.disk_size()), (Some("Fast Drive"), Some(1 << 20)));
            assert_eq!(queue.serial().as_deref(), Some("eui.0025"), "an empty one is none");
        }
        assert!(BlockQueue::of_number(folder.path(), rustix::fs::makedev(259, 2)).is_none());
    }
}

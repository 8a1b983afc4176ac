//! The machine as files: a root for /sys, /proc and /dev, and the few actions that change or test something.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::OFlags;
use rustix::process::{Resource, getrlimit};

/// What is done to the machine rather than read from its files.
pub trait Kernel {
    /// Writes one value to a file of sysfs, as one write.
    fn write(&self, path: &Path, text: &str) -> io::Result<()>;

    /// Loads a module, or says why it can't be.
    fn load_module(&self, name: &str) -> Result<(), String>;

    /// Opens a block device for reading so that nobody else can mount or claim it while the file is open. `dev` is its
    /// number as sysfs says. EBUSY when another has claimed it, or a partition of it.
    fn claim(&self, path: &Path, dev: &str) -> io::Result<File>;

    /// Opens a block device for reading, claimed or not.
    fn open(&self, path: &Path, dev: &str) -> io::Result<File>;

    /// Mounts a file system of 2 MiB huge pages.
    fn mount_hugetlbfs(&self, path: &Path) -> io::Result<()>;

    /// Unmounts it.
    fn unmount(&self, path: &Path) -> io::Result<()>;

    /// The process that asks.
    fn process(&self) -> ProcessFacts;
}

/// What the kernel lets this process do.
#[derive(Debug, Clone)]
pub struct ProcessFacts {
    /// Its id, so that its own open files are not taken for somebody else's.
    pub pid: u32,
    /// It runs as root.
    pub is_root: bool,
    /// Bytes it may lock in memory; `None` is no limit.
    pub memlock: Option<u64>,
    /// Files it may open, after raising the limit as far as it may.
    pub open_files: Option<u64>,
}

/// The machine's files below a root, and its actions.
pub struct System {
    root: PathBuf,
    kernel: Box<dyn Kernel>,
}

impl System {
    /// The machine this runs on.
    pub fn host() -> System {
        System { root: "/".into(), kernel: Box::new(Host) }
    }

    /// Files below another root, and somebody else's actions.
    pub fn new(root: impl Into<PathBuf>, kernel: impl Kernel + 'static) -> System {
        System { root: root.into(), kernel: Box::new(kernel) }
    }

    /// Where an absolute path of the machine is.
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The actions.
    pub fn kernel(&self) -> &dyn Kernel {
        &*self.kernel
    }

    /// A file's text without the white space around it; `None` when it can't be read or has none.
    pub fn read(&self, path: &str) -> Option<String> {
        let text = self.read_whole(path).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    /// A file's text, whose absence is an error.
    pub fn read_whole(&self, path: &str) -> io::Result<String> {
        // Sysfs may hold any bytes that a device gave as its name.
        std::fs::read(self.path(path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A file that holds one decimal number.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.parse().ok()
    }

    /// The last part of what a symbolic link points to: how sysfs names drivers and groups.
    pub fn link_name(&self, path: &str) -> Option<String> {
        let target = std::fs::read_link(self.path(path)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// What a symbolic link points to.
    pub fn link(&self, path: &str) -> Option<String> {
        Some(std::fs::read_link(self.path(path)).ok()?.to_string_lossy().into_owned())
    }

    /// The names in a directory, sorted; none when it is not there.
    pub fn list(&self, path: &str) -> Vec<String> {
        self.list_checked(path).unwrap_or_default()
    }

    /// The names in a directory, sorted; an error when it can't be read.
    pub fn list_checked(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.path(path))? {
            names.push(entry?.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }

    /// Whether there is something at a path.
    pub fn exists(&self, path: &str) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    /// Writes one value to a file of sysfs.
    pub fn write(&self, path: &str, text: &str) -> io::Result<()> {
        self.kernel.write(&self.path(path), text)
    }
}

/// The real one.
struct Host;

impl Kernel for Host {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        // Never created: a missing attribute of sysfs is an error, and elsewhere a stray file would be one, too.
        OpenOptions::new().write(true).open(path)?.write_all(text.as_bytes())
    }

    fn load_module(&self, name: &str) -> Result<(), String> {
        let output = Command::new("modprobe").arg(name).stdin(Stdio::null()).output().map_err(|error| {
            format!(
                "modprobe could not be started ({error}); load the module {name} another way, such as insmod"
            )
        })?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(format!(
            "`modprobe {name}` failed: {}",
            said.trim().lines().last().unwrap_or("it gave no reason")
        ))
    }

    fn claim(&self, path: &Path, dev: &str) -> io::Result<File> {
        open_block_device(path, dev, OFlags::EXCL)
    }

    fn open(&self, path: &Path, dev: &str) -> io::Result<File> {
        open_block_device(path, dev, OFlags::empty())
    }

    fn mount_hugetlbfs(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)?;
        let flags = rustix::mount::MountFlags::NOSUID | rustix::mount::MountFlags::NODEV;
        Ok(rustix::mount::mount("none", path, "hugetlbfs", flags, c"pagesize=2M")?)
    }

    fn unmount(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::mount::unmount(path, rustix::mount::UnmountFlags::empty())?)
    }

    fn process(&self) -> ProcessFacts {
        ProcessFacts {
            pid: std::process::id(),
            is_root: rustix::process::geteuid().is_root(),
            memlock: getrlimit(Resource::Memlock).current,
            open_files: getrlimit(Resource::Nofile).maximum,
        }
    }
}

/// A node in /dev may be stale or somebody's own: only one with the number that sysfs gives is the device.
fn open_block_device(path: &Path, dev: &str, flags: OFlags) -> io::Result<File> {
    let flags = (flags | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    let found = format!("{}:{}", rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    if !metadata.file_type().is_block_device() || found != dev {
        let text = format!("it is not the block device {dev} that the kernel means by its name");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What only looks like the device is not opened for it: a stale node, a file, another kind of node.
    #[test]
    fn only_the_block_device_that_sysfs_means_is_opened() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for path in [file.path(), Path::new("/dev/null")] {
            for open in [Host.open(path, "1:3"), Host.claim(path, "1:3"), Host.open(path, "0:0")] {
                assert_eq!(open.unwrap_err().kind(), io::ErrorKind::InvalidData, "{}", path.display());
            }
        }
        assert_eq!(Host.claim(Path::new("/dev/missing"), "1:1").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn an_attribute_that_is_missing_is_never_created() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("driver_override");
        assert_eq!(Host.write(&path, "x").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(!path.exists());
    }
}

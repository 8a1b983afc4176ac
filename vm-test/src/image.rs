//! Drives' images on the host: raw and sparse.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::error::{Result, VmError};
use crate::host::output;

/// A new image that reads as zeros.
pub fn create(path: PathBuf, size: u64) -> Result<PathBuf> {
    let file = File::create(&path).map_err(VmError::os("create", &path))?;
    file.set_len(size).map_err(VmError::os("extend", &path))?;
    Ok(path)
}

/// An independent copy that takes no more room than the original.
pub fn copy(from: &Path, to: PathBuf) -> Result<PathBuf> {
    let mut command = Command::new("cp");
    command.args(["--sparse=always", "--reflink=auto", "--"]).args([from, &to]);
    output(&mut command, Duration::from_secs(300))?;
    Ok(to)
}

/// Where in an image some bytes are, which must be there once.
pub fn find(path: &Path, wanted: &[u8]) -> Result<u64> {
    let bytes = std::fs::read(path).map_err(VmError::os("read", path))?;
    let (first, _) = wanted.split_first().unwrap_or((&0, &[]));
    let mut places = bytes
        .iter()
        .enumerate()
        .filter(|(_, byte)| *byte == first)
        .filter(|(at, _)| bytes[*at..].starts_with(wanted))
        .map(|(at, _)| at as u64);
    match (places.next(), places.next()) {
        (Some(place), None) => Ok(place),
        found => {
            let what = format!("{} should hold a value exactly once, but: {found:?}", path.display());
            Err(VmError::Node { what, output: String::new() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"..abab..abc..").unwrap();
        assert_eq!(find(file.path(), b"abc").unwrap(), 8);
        assert!(find(file.path(), b"ab").is_err() && find(file.path(), b"x").is_err());
    }

    #[test]
    fn a_copy_is_sparse_and_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let original = create(directory.path().join("a"), 8 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(
            &File::options().write(true).open(&original).unwrap(),
            b"x",
            5 << 20,
        )
        .unwrap();
        let copied = copy(&original, directory.path().join("b")).unwrap();
        assert_eq!(std::fs::read(&copied).unwrap(), std::fs::read(&original).unwrap());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&copied).unwrap());
        assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
    }
}

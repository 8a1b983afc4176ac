//! Drives' images on the host: raw and sparse.

use std::fs::File;
use std::io::Read;
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
    find_by(path, wanted, CHUNK_SIZE)
}

/// Bytes of an image that are looked at together.
const CHUNK_SIZE: usize = 16 << 20;

fn find_by(path: &Path, wanted: &[u8], chunk_size: usize) -> Result<u64> {
    let mut file = File::open(path).map_err(VmError::os("open", path))?;
    let mut places = Vec::new();
    // The end of the last chunk stays before the next one: a value may lie across both.
    let (mut bytes, mut offset) = (Vec::new(), 0u64);
    loop {
        let read = file.by_ref().take(chunk_size as u64).read_to_end(&mut bytes);
        if read.map_err(VmError::os("read", path))? == 0 {
            break;
        }
        let starts = bytes.len().saturating_sub(wanted.len() - 1);
        let is_there = |at: &usize| bytes[*at] == wanted[0] && bytes[*at..].starts_with(wanted);
        places.extend((0..starts).filter(is_there).map(|at| offset + at as u64));
        bytes.drain(..starts);
        offset += starts as u64;
    }
    match places[..] {
        [place] => Ok(place),
        _ => {
            let what = format!("{} should hold a value exactly once, not at {places:?}", path.display());
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
        std::fs::write(file.path(), b"..abab.-abc..").unwrap();
        for chunk_size in 1..20 {
            assert_eq!(find_by(file.path(), b"abc", chunk_size).unwrap(), 8, "chunks of {chunk_size}");
            assert_eq!(
                find_by(file.path(), b"..", chunk_size).unwrap_err().to_string().matches(", ").count(),
                2
            );
        }
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

//! What is on a namespace: a Basalt device, or what would be lost.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;

use crate::device::signature;
use crate::format::gpt;
use crate::format::layout::{SUPERBLOCK_COPIES, superblock_offset};
use crate::format::superblock::{self, NoQuorum, SUPERBLOCK_SIZE, Superblock};
use crate::limits::DEVICE_MARGIN_SIZE;
use crate::pci::controller::Namespace;
use crate::size;

/// Which Basalt device it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Identity {
    pub(super) uuid: String,
    pub(super) label: String,
    pub(super) starts: u64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub(super) struct Contents {
    /// A Basalt device and nothing else.
    pub(super) basalt: Option<Identity>,
    /// Everything else, in words. Empty on a blank namespace.
    pub(super) data: Vec<String>,
}

/// Reads both ends of a namespace, and of its partitions.
pub(super) fn look(file: &File, namespace: &Namespace) -> io::Result<Contents> {
    let mut contents = Contents::default();
    let in_partitions = partitions(file, namespace)?;
    match read_superblock(file, namespace.size)? {
        Ok(superblock) => {
            let uuid = uuid::Uuid::from_bytes(superblock.uuid).to_string();
            if in_partitions.is_empty() && is_untouched(file, namespace, &superblock)? {
                let (label, starts) = (superblock.label, superblock.boot);
                return Ok(Contents { basalt: Some(Identity { uuid, label, starts }), data: Vec::new() });
            }
            contents
                .data
                .push(format!("what was the Basalt device {uuid} before something else was written to it"));
        }
        Err(NoQuorum::NotFormatted) => {}
        Err(error) => contents.data.push(format!("a Basalt device that can't be opened: {error}")),
    }
    let found = signature::probe(|offset, size| read(file, offset, size), namespace.size)?;
    contents.data.extend(found.into_iter().map(|finding| finding.what));
    let shown = |one: &crate::pci::controller::Partition| {
        format!("the partition {} ({})", one.name, size::show(one.size))
    };
    contents.data.extend(namespace.partitions.iter().map(shown));
    contents.data.extend(in_partitions);
    Ok(contents)
}

fn read(file: &File, offset: u64, size: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

/// What is known by a magic number in any partition. Other bytes there say no more than that there is a partition.
fn partitions(file: &File, namespace: &Namespace) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for partition in &namespace.partitions {
        // A partition that was cut off with the disk's end has nothing to read there.
        let size = partition.size.min(namespace.size.saturating_sub(partition.offset));
        let findings = signature::probe(|offset, size| read(file, partition.offset + offset, size), size)?;
        let known = findings.into_iter().filter(|finding| !finding.what.starts_with("non-zero data"));
        found.extend(known.map(|finding| format!("{} on {}", finding.what, partition.name)));
    }
    Ok(found)
}

fn read_superblock(file: &File, size: u64) -> io::Result<Result<Superblock, NoQuorum>> {
    let copy = |device_size: u64, copy: usize| {
        let offset = superblock_offset(device_size, copy);
        match offset + SUPERBLOCK_SIZE as u64 > size {
            true => Ok(Vec::new()),
            false => read(file, offset, SUPERBLOCK_SIZE as u64),
        }
    };
    let mut copies: [Vec<u8>; SUPERBLOCK_COPIES] = [copy(size, 0)?, copy(size, 1)?, Vec::new(), Vec::new()];
    // A namespace that grew keeps its far copies where its old end was.
    let near = copies[..2].iter().find_map(|bytes| Superblock::decode(bytes).ok());
    let formatted = near.map_or(size, |(_, superblock)| superblock.layout.device_size);
    copies[2] = copy(formatted, 2)?;
    copies[3] = copy(formatted, 3)?;
    Ok(superblock::choose(&copies).map(|quorum| quorum.superblock))
}

/// Whether the partition table is byte for byte the one that `format` writes. Superblocks alone prove nothing: the far
/// copies outlive a disk that was partitioned anew.
fn is_untouched(file: &File, namespace: &Namespace, superblock: &Superblock) -> io::Result<bool> {
    let ours_only = match namespace.partitions.as_slice() {
        [] => true,
        [one] => one.offset == DEVICE_MARGIN_SIZE,
        _ => false,
    };
    if !ours_only {
        return Ok(false);
    }
    // An image file counts in 512 bytes, also when it was copied to a disk that counts in 4096.
    for block_size in [512, 4096] {
        let table = gpt::encode(&superblock.uuid, superblock.layout.device_size, block_size);
        if read(file, 0, table.start.len() as u64)? == table.start {
            return Ok(true);
        }
    }
    Ok(false)
}

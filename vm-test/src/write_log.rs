//! Power cuts: the log that QEMU's blklogwrites keeps of a drive, and the images that a power cut could have left of it.
//!
//! Killing QEMU loses nothing that a drive had completed: its writes are in the host's page cache. A drive with a volatile
//! write cache loses more, and the log says what: everything before the last flush is on the medium, and of what came after,
//! any part may be.
//!
//! The format is that of dm-log-writes: sectors; the first is a header, then for each operation one sector with an entry
//! (first sector, sector count, flags, unused; 64 bits each, little endian) and the sectors that were written. QEMU adds an
//! entry after the operation has completed and before the guest hears of it. The header's count is brought up to date
//! only now and then, so the log is read to its end. Where several operations complete together, a kill can leave a gap
//! before an entry that did get written: such a log is told apart ([`Ending::Gap`]), since what follows can't be read.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::{Result, VmError};

/// Bytes of the log's sectors.
pub const SECTOR_SIZE: usize = 512;

const MAGIC: u64 = 0x006a_7366_7773_6872;
const VERSION: u64 = 1;

/// Bytes of an entry in its sector.
const ENTRY_SIZE: usize = 32;

const FLAG_FLUSH: u64 = 1;
const FLAG_DISCARD: u64 = 4;

/// One operation of the drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Bytes of the log, written at an offset of the drive.
    Write {
        /// First byte on the drive.
        offset: u64,
        /// Where in the log the data is.
        data: Range<usize>,
    },
    /// Blocks that were given up. QEMU makes them zeros.
    Discard {
        /// First byte on the drive.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// Everything that completed before is on the medium.
    Flush,
}

/// How a log ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// After its last entry, or within one that nobody was told of.
    Clean,
    /// In zeros with something behind them: operations are missing that may have been acknowledged.
    Gap,
}

/// A log of writes.
#[derive(Debug)]
pub struct WriteLog {
    bytes: Vec<u8>,
    operations: Vec<Operation>,
    /// How it ends.
    pub ending: Ending,
}

/// Which part of what was not flushed has survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    /// Nothing.
    Flushed,
    /// All of it: what killing the machine leaves.
    Everything,
    /// Each write whole or not at all, as this seed has it.
    Subset(u64),
    /// What was there before the last so many flushes, as on a drive that did not do them. No node can live with that: it
    /// is for testing the tests.
    Lied {
        /// Flushes that did nothing.
        flush_count: usize,
    },
    /// Each write whole, not at all, or in pieces of this many bytes.
    Torn {
        /// Chooses.
        seed: u64,
        /// Bytes of the smallest piece.
        unit: usize,
    },
}

impl WriteLog {
    /// Reads a log to its end.
    pub fn read(path: &Path) -> Result<WriteLog> {
        let bytes = std::fs::read(path).map_err(VmError::os("read", path))?;
        WriteLog::parse(bytes).map_err(|cause| VmError::WriteLog { path: path.into(), cause })
    }

    fn parse(bytes: Vec<u8>) -> std::result::Result<WriteLog, String> {
        check_header(&bytes)?;
        let mut operations = Vec::new();
        let mut at = SECTOR_SIZE;
        let mut ending = Ending::Clean;
        while let Some(entry) = bytes.get(at..at + ENTRY_SIZE).map(Entry::decode) {
            if entry.is_empty() {
                let behind = &bytes[at..];
                ending = if behind.iter().all(|byte| *byte == 0) { Ending::Clean } else { Ending::Gap };
                break;
            }
            let end = at + SECTOR_SIZE + entry.data_size();
            if end > bytes.len() {
                break;
            }
            operations.push(entry.operation(at + SECTOR_SIZE)?);
            at = end;
        }
        Ok(WriteLog { bytes, operations, ending })
    }

    /// Operations that the last flush made durable, itself included.
    pub fn durable_count(&self) -> usize {
        self.durable_count_before(0)
    }

    fn durable_count_before(&self, flush_count: usize) -> usize {
        let flushes = self.operations.iter().enumerate().filter(|(_, one)| **one == Operation::Flush);
        flushes.rev().nth(flush_count).map_or(0, |(at, _)| at + 1)
    }

    /// All operations.
    pub fn operation_count(&self) -> usize {
        self.operations.len()
    }

    /// Writes that a power cut may take back.
    pub fn unflushed_count(&self) -> usize {
        self.operations.len() - self.durable_count()
    }

    /// Makes of an image, which is as the drive was when the log began, what a power cut could have left.
    pub fn replay(&self, image: &Path, survivors: Survivors) -> Result<()> {
        let file = OpenOptions::new().write(true).open(image).map_err(VmError::os("open", image))?;
        let failed = |error| VmError::os("write to", image)(error);
        let lied = if let Survivors::Lied { flush_count } = survivors { flush_count } else { 0 };
        let (durable, unflushed) = self.operations.split_at(self.durable_count_before(lied));
        for operation in durable {
            self.apply(&file, operation).map_err(failed)?;
        }
        let mut choices = Choices::new(survivors);
        for operation in unflushed {
            for piece in choices.pieces(operation) {
                self.apply(&file, &piece).map_err(failed)?;
            }
        }
        Ok(())
    }

    fn apply(&self, file: &File, operation: &Operation) -> std::io::Result<()> {
        match operation {
            Operation::Write { offset, data } => file.write_all_at(&self.bytes[data.clone()], *offset),
            Operation::Discard { offset, size } => {
                rustix::fs::fallocate(
                    file,
                    rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
                    *offset,
                    *size,
                )?;
                Ok(())
            }
            Operation::Flush => Ok(()),
        }
    }
}

/// An entry as it is in the log.
#[derive(Debug, Clone, Copy)]
struct Entry {
    sector: u64,
    sector_count: u64,
    flags: u64,
}

impl Entry {
    fn decode(bytes: &[u8]) -> Entry {
        Entry { sector: word(bytes, 0), sector_count: word(bytes, 1), flags: word(bytes, 2) }
    }

    fn is_empty(self) -> bool {
        (self.sector, self.sector_count, self.flags) == (0, 0, 0)
    }

    fn data_size(self) -> usize {
        if self.flags & FLAG_DISCARD != 0 { 0 } else { self.sector_count as usize * SECTOR_SIZE }
    }

    fn operation(self, data_at: usize) -> std::result::Result<Operation, String> {
        let offset = self.sector * SECTOR_SIZE as u64;
        match self.flags {
            0 => Ok(Operation::Write { offset, data: data_at..data_at + self.data_size() }),
            FLAG_FLUSH if self.sector_count == 0 => Ok(Operation::Flush),
            FLAG_DISCARD => Ok(Operation::Discard { offset, size: self.sector_count * SECTOR_SIZE as u64 }),
            flags => Err(format!(
                "an entry with flags {flags:#x} at byte {} is not understood",
                data_at - SECTOR_SIZE
            )),
        }
    }
}

/// The header comes with the first flush; before that its sector is empty.
fn check_header(bytes: &[u8]) -> std::result::Result<(), String> {
    if bytes.len() < SECTOR_SIZE || bytes[..SECTOR_SIZE].iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let sector_size = word(bytes, 3) & u64::from(u32::MAX);
    match (word(bytes, 0), word(bytes, 1), sector_size) {
        (MAGIC, VERSION, size) if size == SECTOR_SIZE as u64 => Ok(()),
        found => Err(format!("this is not a log of writes with sectors of {SECTOR_SIZE} bytes: {found:x?}")),
    }
}

fn word(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0u8; 8];
    word.copy_from_slice(&bytes[8 * index..8 * index + 8]);
    u64::from_le_bytes(word)
}

/// Chooses what survives.
struct Choices {
    survivors: Survivors,
    state: u64,
}

impl Choices {
    fn new(survivors: Survivors) -> Choices {
        let (Survivors::Subset(state) | Survivors::Torn { seed: state, .. }) = survivors else {
            return Choices { survivors, state: 0 };
        };
        Choices { survivors, state }
    }

    /// SplitMix64.
    fn below(&mut self, bound: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn pieces(&mut self, operation: &Operation) -> Vec<Operation> {
        let whole = vec![operation.clone()];
        match self.survivors {
            Survivors::Flushed | Survivors::Lied { .. } => Vec::new(),
            Survivors::Everything => whole,
            Survivors::Subset(_) => {
                if self.below(2) == 0 {
                    Vec::new()
                } else {
                    whole
                }
            }
            Survivors::Torn { unit, .. } => match operation {
                Operation::Write { offset, data } => self.tear(*offset, data.clone(), unit),
                _ => whole,
            },
        }
    }

    /// A prefix, a suffix, both with a hole between, or the middle; sometimes all or nothing.
    fn tear(&mut self, offset: u64, data: Range<usize>, unit: usize) -> Vec<Operation> {
        let units = data.len().div_ceil(unit) as u64;
        let (one, other) = (self.below(units + 1) as usize * unit, self.below(units + 1) as usize * unit);
        let (low, high) = (one.min(other).min(data.len()), one.max(other).min(data.len()));
        let kept = match self.below(6) {
            0 => [0..0, 0..0],
            1 => [0..data.len(), 0..0],
            2 => [0..low, 0..0],
            3 => [0..0, high..data.len()],
            4 => [0..low, high..data.len()],
            _ => [low..high, 0..0],
        };
        kept.into_iter()
            .filter(|range| !range.is_empty())
            .map(|range| Operation::Write {
                offset: offset + range.start as u64,
                data: data.start + range.start..data.start + range.end,
            })
            .collect()
    }
}

/// Follows a log while it grows, so that a machine can be cut off with writes under way.
#[derive(Debug)]
pub struct Follower {
    file: File,
    at: u64,
    unflushed_count: usize,
}

impl Follower {
    /// Of a log that QEMU is writing.
    pub fn open(path: &Path) -> Result<Follower> {
        let file = File::open(path).map_err(VmError::os("open", path))?;
        Ok(Follower { file, at: SECTOR_SIZE as u64, unflushed_count: 0 })
    }

    /// Writes since the last flush, as of now.
    pub fn unflushed_count(&mut self) -> usize {
        let mut bytes = [0u8; ENTRY_SIZE];
        while self.file.read_exact_at(&mut bytes, self.at).is_ok() {
            let entry = Entry::decode(&bytes);
            if entry.is_empty() {
                break;
            }
            self.at += (SECTOR_SIZE + entry.data_size()) as u64;
            self.unflushed_count = if entry.flags & FLAG_FLUSH != 0 { 0 } else { self.unflushed_count + 1 };
        }
        self.unflushed_count
    }
}

#[cfg(test)]
#[path = "write_log_tests.rs"]
mod tests;

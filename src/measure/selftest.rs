//! What the durability contract takes for granted of a device, tried out: each test says what it saw, or what is wrong.
//!
//! They find what software can see: a device that mixes up writes in flight, loses them, or forgets what was flushed when it is
//! opened anew. What a power cut would do, no program can see.

use std::collections::BTreeSet;

use super::run_one;
use crate::device::sim::random::Random;
use crate::device::{Deallocate, Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token, blocking};

/// Bytes at the start of the device that the tests write to.
pub const REGION_SIZE: u64 = 8 << 20;

/// What was seen, or what is wrong.
pub type Verdict = Result<String, String>;

/// Rounds of writes in flight.
const ROUNDS: u64 = 8;

/// Writes of one and several blocks, as many at a time as the queue takes, all over the region and in no order, next to each other
/// and overwriting what earlier rounds wrote; then everything is read through `reader`, another queue.
pub fn writes_are_independent<D: Device>(writer: &mut D, reader: &mut D) -> Verdict {
    let block_size = u64::from(writer.geometry().block_size);
    let blocks_max = (u64::from(writer.geometry().transfer_size_max) / block_size).min(8);
    let block_count = REGION_SIZE / block_size;
    let mut random = Random::new(block_count);
    let mut stamps = vec![0; block_count as usize];
    let (mut count, mut most) = (0, 0);
    for round in 1..=ROUNDS {
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < block_count {
            let length = (1 + random.below(blocks_max)).min(block_count - at);
            ranges.push((at, length));
            at += length;
        }
        shuffle(&mut ranges, &mut random);
        // Some are left as they were, so that a write that spills over is seen in every round.
        ranges.truncate(ranges.len() * 3 / 4);
        for (first, length) in &ranges {
            (*first..first + length).for_each(|block| stamps[block as usize] = round);
        }
        count += ranges.len();
        most =
            most.max(write_all(writer, &ranges, round).map_err(|error| format!("writing failed: {error}"))?);
        run_one(writer, IoOp::Flush).map_err(|error| format!("flushing failed: {error}"))?;
        verify(reader, &stamps).map_err(|text| format!("after round {round} of writes in flight, {text}"))?;
    }
    Ok(format!("{count} writes of 1 to {blocks_max} blocks, up to {most} in flight, each where it belongs"))
}

/// Reads of blocks whose neighbours are being written see nothing of that.
pub fn reads_beside_writes_are_right<D: Device>(device: &mut D) -> Verdict {
    let block_size = u64::from(device.geometry().block_size);
    let pairs = (REGION_SIZE / block_size / 2).min(256);
    let failed = |error: IoError| format!("I/O failed: {error}");
    let all: Vec<(u64, u64)> = (0..2 * pairs).map(|block| (block, 1)).collect();
    write_all(device, &all, 101).map_err(failed)?;
    let mut ops = Vec::new();
    for pair in 0..pairs {
        ops.push((2 * pair, true));
        ops.push((2 * pair + 1, false));
    }
    let mut wrong = None;
    keep_in_flight(
        device,
        ops.len(),
        |device, index| {
            let (block, is_write) = ops[index];
            let mut buf = device.allocate(block_size as usize)?;
            let offset = block * block_size;
            if is_write {
                stamp(&mut buf, block, 102, block_size);
                return Some(IoOp::Write { offset, buf, fua: false });
            }
            Some(IoOp::Read { offset, buf })
        },
        |index, buf| {
            let (block, is_write) = ops[index];
            if !is_write && !is_stamped(&buf, block, 101, block_size) {
                wrong = Some(block);
            }
        },
    )
    .map_err(failed)?;
    match wrong {
        Some(block) => Err(format!("a read of block {block} saw something of a write to its neighbour")),
        None => Ok(format!("{pairs} reads between as many writes, each unchanged")),
    }
}

/// Every alignment that the geometry promises, and the refusal of what it does not.
pub fn alignment_is_as_claimed<D: Device>(device: &mut D) -> Verdict {
    let geometry = device.geometry().clone();
    let block_size = u64::from(geometry.block_size);
    let largest = u64::from(geometry.transfer_size_max) / block_size;
    for (first, length) in [(1, 1), (3, 2), (1, largest), (geometry.block_count - 1, 1)] {
        let mut buf = device.allocate((length * block_size) as usize).ok_or("no memory for a buffer")?;
        stamp(&mut buf, first, 103, block_size);
        let offset = first * block_size;
        let say =
            |what: &str, error: IoError| format!("{what} {length} blocks at block {first} failed: {error}");
        let done = run_one(device, IoOp::Write { offset, buf, fua: false })
            .map_err(|error| say("writing", error))?;
        let mut buf = done.buf.ok_or("a write kept its buffer")?;
        buf.fill(0);
        let done = run_one(device, IoOp::Read { offset, buf }).map_err(|error| say("reading", error))?;
        let whole = done.buf.filter(|buf| is_stamped(buf, first, 103, block_size));
        let whole = whole.ok_or_else(|| format!("{length} blocks at block {first} do not read back"))?;
        // The last part, for which the most of a block has to be left out.
        let part_size = geometry.read_alignment as usize;
        let from = whole.len() - part_size;
        let buf = device.allocate(part_size).ok_or("no memory for a buffer")?;
        let part = run_one(device, IoOp::Read { offset: offset + from as u64, buf })
            .map_err(|error| say("reading a part of", error))?;
        if part.buf.is_none_or(|part| part[..] != whole[from..]) {
            return Err(format!(
                "the last {part_size} bytes of block {first} do not read back by themselves"
            ));
        }
    }
    let block = block_size as usize;
    let part = geometry.read_alignment as usize;
    let buffers = (device.allocate(part), device.allocate(block));
    let (Some(to_read), Some(to_write)) = buffers else { return Err("no memory for a buffer".to_owned()) };
    let read = IoOp::Read { offset: part as u64 / 2, buf: to_read };
    let write = IoOp::Write { offset: block_size / 2, buf: to_write, fua: false };
    for (name, op) in [("a read", read), ("a write", write)] {
        match device.submit(Io { token: Token(0), op }) {
            Err(rejected) if matches!(rejected.why, Refusal::Failed(IoError::Invalid { .. })) => {}
            _ => return Err(format!("{name} at an offset between two blocks was not refused")),
        }
    }
    Ok(format!(
        "1 to {largest} blocks of {block_size} bytes at any block, to the last one; reads of {part} bytes; buffers aligned to {} \
         bytes",
        geometry.memory_alignment
    ))
}

/// Writes and flushes what [`is_there_again`] looks for when the device has been opened anew.
pub fn leave_something<D: Device>(device: &mut D) -> Result<(), IoError> {
    let blocks: Vec<(u64, u64)> = (0..64).map(|block| (block, 1)).collect();
    write_all(device, &blocks, 104)?;
    run_one(device, IoOp::Flush).map(drop)
}

/// Whether it is.
pub fn is_there_again<D: Device>(device: &mut D) -> Verdict {
    let mut stamps = vec![0; 64];
    stamps.fill(104);
    verify(device, &stamps).map(|()| "what was flushed is there after opening it anew".to_owned())
}

/// Deallocated blocks read as the geometry says, and their neighbours stay.
pub fn deallocation_is_as_claimed<D: Device>(device: &mut D) -> Verdict {
    let claim = device.geometry().deallocate;
    let block_size = u64::from(device.geometry().block_size);
    let failed = |error: IoError| format!("I/O failed: {error}");
    let blocks: Vec<(u64, u64)> = (0..16).map(|block| (block, 1)).collect();
    write_all(device, &blocks, 105).map_err(failed)?;
    run_one(device, IoOp::Deallocate { offset: 4 * block_size, size: 8 * block_size }).map_err(failed)?;
    let bytes = blocking::read(device, 0, 16 * block_size as usize).map_err(failed)?;
    for (block, found) in bytes.chunks(block_size as usize).enumerate() {
        let is_freed = (4..12).contains(&block);
        let is_right = match (is_freed, claim) {
            (false, _) | (true, Deallocate::None) => is_stamped(found, block as u64, 105, block_size),
            (true, Deallocate::Zeroes) => found.iter().all(|byte| *byte == 0),
            (true, Deallocate::Advisory) => true,
        };
        if !is_right {
            return Err(format!(
                "block {block} is not what it has to be after blocks 4 to 11 were deallocated"
            ));
        }
    }
    Ok(match claim {
        Deallocate::None => "ignored, as claimed".to_owned(),
        Deallocate::Advisory => "taken; nothing is promised of what is read there".to_owned(),
        Deallocate::Zeroes => "deallocated blocks read as zeros, their neighbours as before".to_owned(),
    })
}

fn shuffle<T>(items: &mut [T], random: &mut Random) {
    for index in (1..items.len()).rev() {
        items.swap(index, random.index(index + 1));
    }
}

/// Fills blocks from `first` on so that each 16 bytes say whose they are.
fn stamp(buf: &mut [u8], first: u64, round: u64, block_size: u64) {
    for (index, block) in buf.chunks_mut(block_size as usize).enumerate() {
        for (part, bytes) in block.chunks_mut(16).enumerate() {
            bytes[..8].copy_from_slice(&(first + index as u64).to_le_bytes());
            // Parts of a block differ, and so does what is read from the wrong one.
            bytes[8..].copy_from_slice(&(round << 32 | part as u64).to_le_bytes());
        }
    }
}

/// Whether the bytes are what [`stamp`] made of the blocks from `first` on.
fn is_stamped(bytes: &[u8], first: u64, round: u64, block_size: u64) -> bool {
    let mut expected = vec![0; bytes.len()];
    stamp(&mut expected, first, round, block_size);
    bytes == expected
}

/// Keeps the queue full. `make` gives the operations (`None` while there is no memory), `took` gets the buffers.
fn keep_in_flight<D: Device>(
    device: &mut D,
    count: usize,
    mut make: impl FnMut(&mut D, usize) -> Option<IoOp>,
    mut took: impl FnMut(usize, DmaBuf),
) -> Result<usize, IoError> {
    let (mut next, mut finished, mut most) = (0, 0, 0);
    let mut failure = None;
    let mut done: Vec<IoDone> = Vec::new();
    while finished < next || (next < count && failure.is_none()) {
        while next < count && failure.is_none() {
            let Some(op) = make(device, next) else { break };
            match device.submit(Io { token: Token(next as u64), op }) {
                Ok(()) => next += 1,
                Err(rejected) => {
                    if let Refusal::Failed(error) = rejected.why {
                        failure = Some(error);
                    }
                    break;
                }
            }
        }
        most = most.max(device.in_flight());
        if device.poll(&mut done) == 0 {
            blocking::wait(device);
        }
        for IoDone { token, buf, status } in done.drain(..) {
            finished += 1;
            match (status, buf) {
                (Ok(()), Some(buf)) => took(token.0 as usize, buf),
                (Ok(()), None) => {}
                (Err(error), _) => failure = Some(error),
            }
        }
    }
    failure.map_or(Ok(most), Err)
}

/// Writes ranges of blocks with stamps; returns how many were in flight at most.
fn write_all<D: Device>(device: &mut D, ranges: &[(u64, u64)], round: u64) -> Result<usize, IoError> {
    let block_size = u64::from(device.geometry().block_size);
    keep_in_flight(
        device,
        ranges.len(),
        |device, index| {
            let (first, length) = ranges[index];
            let mut buf = device.allocate((length * block_size) as usize)?;
            stamp(&mut buf, first, round, block_size);
            Some(IoOp::Write { offset: first * block_size, buf, fua: false })
        },
        |_, _| {},
    )
}

/// Reads the blocks from the start on and compares them; where the stamp is 0, nothing is known.
fn verify<D: Device>(device: &mut D, stamps: &[u64]) -> Result<(), String> {
    let block_size = u64::from(device.geometry().block_size) as usize;
    let bytes = blocking::read(device, 0, stamps.len() * block_size)
        .map_err(|error| format!("reading failed: {error}"))?;
    let mut wrong = BTreeSet::new();
    for (block, (found, stamp)) in bytes.chunks(block_size).zip(stamps).enumerate() {
        if *stamp != 0 && !is_stamped(found, block as u64, *stamp, block_size as u64) {
            wrong.insert(block);
        }
    }
    match wrong.first() {
        None => Ok(()),
        Some(block) => {
            Err(format!("{} blocks hold something else than was written, block {block} first", wrong.len()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::{Fault, FaultKind, FaultOp, SimConfig, SimDisk};

    fn disk() -> SimDisk {
        SimDisk::new(SimConfig { block_count: (16 << 20) / 4096, ..SimConfig::default() }, 7)
    }

    fn strike(disk: &SimDisk, nth: u64, op: FaultOp, kind: FaultKind) {
        disk.inject(Fault { nth, op, kind, sticky: false });
    }

    fn independent(disk: &SimDisk) -> Verdict {
        writes_are_independent(&mut disk.open_queue(), &mut disk.open_queue())
    }

    #[test]
    fn a_good_device_passes_everything() {
        let disk = disk();
        let seen = independent(&disk).unwrap();
        assert!(seen.contains("up to 32 in flight"), "{seen}");
        reads_beside_writes_are_right(&mut disk.open_queue()).unwrap();
        alignment_is_as_claimed(&mut disk.open_queue()).unwrap();
        deallocation_is_as_claimed(&mut disk.open_queue()).unwrap();
        leave_something(&mut disk.open_queue()).unwrap();
        is_there_again(&mut disk.open_queue()).unwrap();
    }

    #[test]
    fn lost_misdirected_and_failed_writes_are_found() {
        for (kind, words) in [
            (FaultKind::LostWrite, "something else than was written"),
            (FaultKind::Misdirected(77 * 4096), "something else than was written"),
            (FaultKind::Error(crate::device::sim::Keep::None), "writing failed"),
        ] {
            let disk = disk();
            strike(&disk, 300, FaultOp::Write, kind);
            let wrong = independent(&disk).unwrap_err();
            assert!(wrong.contains(words), "{kind:?}: {wrong}");
        }
        let disk = disk();
        strike(&disk, 5, FaultOp::Flush, FaultKind::FlushLost);
        assert!(independent(&disk).unwrap_err().contains("flushing failed"));
    }

    #[test]
    fn a_wrong_read_beside_writes_is_found() {
        let disk = disk();
        strike(&disk, 100, FaultOp::Read, FaultKind::WrongRead);
        assert!(reads_beside_writes_are_right(&mut disk.open_queue()).unwrap_err().contains("neighbour"));
        let disk = self::disk();
        strike(&disk, 1, FaultOp::Read, FaultKind::WrongRead);
        assert!(alignment_is_as_claimed(&mut disk.open_queue()).unwrap_err().contains("do not read back"));
    }

    #[test]
    fn what_is_gone_after_opening_anew_is_found() {
        let disk = disk();
        leave_something(&mut disk.open_queue()).unwrap();
        disk.flip_bit(9 * 4096 + 100, 3);
        let wrong = is_there_again(&mut disk.open_queue()).unwrap_err();
        assert!(wrong.contains("1 blocks") && wrong.contains("block 9 first"), "{wrong}");
    }

    #[test]
    fn what_reads_otherwise_than_claimed_after_deallocation_is_found() {
        for deallocate in [Deallocate::Zeroes, Deallocate::None] {
            let config = SimConfig { deallocate, block_count: 4096, ..SimConfig::default() };
            let disk = SimDisk::new(config, 7);
            deallocation_is_as_claimed(&mut disk.open_queue()).unwrap();
            strike(&disk, 0, FaultOp::Read, FaultKind::WrongRead);
            let wrong = deallocation_is_as_claimed(&mut disk.open_queue()).unwrap_err();
            assert!(wrong.contains("is not what it has to be"), "{wrong}");
            strike(&disk, 0, FaultOp::Deallocate, FaultKind::Gone);
            assert!(deallocation_is_as_claimed(&mut disk.open_queue()).unwrap_err().contains("gone"));
        }
    }

    #[test]
    fn a_stamp_is_of_its_block_and_round_alone() {
        let mut buf = vec![0; 3 * 512];
        stamp(&mut buf, 5, 9, 512);
        assert!(is_stamped(&buf, 5, 9, 512) && !is_stamped(&buf, 6, 9, 512) && !is_stamped(&buf, 5, 8, 512));
        for at in [0, 8, 511, 512, 700, 1535] {
            buf[at] ^= 1;
            assert!(!is_stamped(&buf, 5, 9, 512), "byte {at}");
            buf[at] ^= 1;
        }
    }
}

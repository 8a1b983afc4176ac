//! Reading a device in order, with the next pieces on their way while one is looked at: for start-up, never on a running reactor.
//!
//! Invariant: pieces come in the order in which they were asked for, whatever the order in which the device has them.

use std::collections::VecDeque;

use super::blocking::wait;
use super::{Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token};

/// Pieces that are on their way or waiting to be taken: enough for a drive's full bandwidth, and no more memory than a queue keeps
/// anyway.
const AHEAD_COUNT_MAX: usize = 8;

/// Bytes of a piece, where the device transfers that many at once.
const PIECE_SIZE_MAX: usize = 1 << 20;

/// A piece to be read.
#[derive(Debug, Clone, Copy)]
struct Piece {
    offset: u64,
    size: usize,
    /// Times that it is still to be asked for.
    tries: u32,
}

enum Coming {
    /// The device is still to be asked for it.
    Wanted(Piece),
    /// It has been.
    UnderWay(Piece),
    /// What came of it.
    Done(Result<DmaBuf, IoError>),
}

/// Pieces of a device in order. Nobody else uses the queue meanwhile; dropping this waits for what is under way.
pub struct ReadAhead<'d, D: Device> {
    device: &'d mut D,
    /// Those that come behind `coming`.
    pieces: std::vec::IntoIter<Piece>,
    coming: VecDeque<Coming>,
    /// The token of the first of those.
    first: u64,
    done: Vec<IoDone>,
}

impl<'d, D: Device> ReadAhead<'d, D> {
    /// Reads these ranges (the first byte of each and its length, multiples of the block size), each in pieces of its own. A piece
    /// that the device can't read is asked for `tries` times.
    pub fn new(
        device: &'d mut D,
        ranges: impl IntoIterator<Item = (u64, u64)>,
        tries: u32,
    ) -> ReadAhead<'d, D> {
        let largest = (device.geometry().transfer_size_max as usize).clamp(4096, PIECE_SIZE_MAX);
        let step = 1 << largest.ilog2();
        let mut pieces = Vec::new();
        for (offset, size) in ranges {
            let starts = (0..size).step_by(step);
            pieces.extend(starts.map(|at| Piece {
                offset: offset + at,
                size: (size - at).min(step as u64) as usize,
                tries,
            }));
        }
        let pieces = pieces.into_iter();
        ReadAhead { device, pieces, coming: VecDeque::new(), first: 0, done: Vec::new() }
    }

    /// The next piece, or why there is none of it; the one behind it may be there all the same. `None` at the end.
    pub fn next_piece(&mut self) -> Option<Result<DmaBuf, IoError>> {
        loop {
            self.ask();
            // Devices are given what they were asked for with a poll: it is to be on its way while the caller looks at this piece.
            self.device.poll(&mut self.done);
            self.settle();
            match self.coming.pop_front()? {
                Coming::Done(result) => {
                    self.first += 1;
                    return Some(result);
                }
                other => self.coming.push_front(other),
            }
            self.receive();
        }
    }

    /// Asks for as much as there may be on its way.
    fn ask(&mut self) {
        let room = AHEAD_COUNT_MAX - self.coming.len();
        self.coming.extend(self.pieces.by_ref().take(room).map(Coming::Wanted));
        for (at, one) in self.coming.iter_mut().enumerate() {
            let Coming::Wanted(piece) = *one else { continue };
            // Without memory or room in the queue, when something has come back.
            let Some(buf) = self.device.allocate(piece.size) else { break };
            let op = IoOp::Read { offset: piece.offset, buf };
            match self.device.submit(Io { token: Token(self.first + at as u64), op }) {
                Ok(()) => *one = Coming::UnderWay(piece),
                Err(rejected) => match rejected.why {
                    Refusal::Full => break,
                    Refusal::Failed(error) => *one = Coming::Done(Err(error)),
                },
            }
        }
    }

    /// Waits until something has come back.
    fn receive(&mut self) {
        if self.device.poll(&mut self.done) == 0 {
            wait(self.device);
        }
        self.settle();
    }

    /// Takes note of what has come back.
    fn settle(&mut self) {
        for IoDone { token, buf, status } in self.done.drain(..) {
            let at = token.0.wrapping_sub(self.first) as usize;
            let Some(Coming::UnderWay(piece)) = self.coming.get(at) else { continue };
            let Piece { offset, size, tries } = *piece;
            let unread = IoError::UnrecoveredRead { offset, size: size as u64 };
            self.coming[at] = match status.and_then(|()| buf.ok_or(unread)) {
                Err(IoError::UnrecoveredRead { .. }) if tries > 1 => {
                    Coming::Wanted(Piece { tries: tries - 1, ..*piece })
                }
                result => Coming::Done(result),
            };
        }
    }
}

impl<D: Device> Drop for ReadAhead<'_, D> {
    fn drop(&mut self) {
        while self.coming.iter().any(|one| matches!(one, Coming::UnderWay(_))) {
            self.receive();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::blocking;
    use crate::device::sim::{Fault, FaultKind, FaultOp, Keep, SimConfig, SimDevice, SimDisk};

    const BLOCK: usize = 4096;
    const PIECE: usize = 2 * BLOCK;

    /// A disk whose blocks hold their numbers, and transfers two of them at once.
    fn disk(depth: u32) -> (SimDisk, SimDevice) {
        let config =
            SimConfig { block_count: 64, depth, transfer_size_max: PIECE as u32, ..SimConfig::default() };
        let disk = SimDisk::new(config, 5);
        let mut device = disk.open_queue();
        for block in 0..64 {
            blocking::write(&mut device, block * BLOCK as u64, &[block as u8; BLOCK]).unwrap();
        }
        (disk, device)
    }

    /// The first byte and the length of each piece that can be read, in order.
    fn seen(ahead: &mut ReadAhead<'_, SimDevice>) -> Vec<Option<(u8, usize)>> {
        std::iter::from_fn(|| ahead.next_piece()).map(|one| one.ok().map(|buf| (buf[0], buf.len()))).collect()
    }

    #[test]
    fn pieces_come_in_order_and_never_span_two_ranges() {
        // The disk completes what is in flight in any order, and with a depth of three takes less than is wanted.
        for depth in [32, 3] {
            let (disk, mut device) = disk(depth);
            let ranges = [(5 * BLOCK as u64, 3 * BLOCK as u64), (40 * BLOCK as u64, 20 * BLOCK as u64)];
            let mut ahead = ReadAhead::new(&mut device, ranges, 1);
            let mut expected = vec![Some((5, PIECE)), Some((7, BLOCK))];
            expected.extend((40..60).step_by(2).map(|block| Some((block, PIECE))));
            assert_eq!(seen(&mut ahead), expected);
            drop(ahead);
            assert_eq!((device.in_flight(), disk.outstanding_buffers()), (0, 0));
        }
    }

    #[test]
    fn several_are_under_way_and_are_waited_for() {
        let (disk, mut device) = disk(32);
        let mut ahead = ReadAhead::new(&mut device, [(0, 64 * BLOCK as u64)], 1);
        assert!(ahead.next_piece().unwrap().is_ok());
        assert!(ahead.device.in_flight() > 1);
        drop(ahead);
        assert_eq!((device.in_flight(), disk.outstanding_buffers()), (0, 0));
    }

    #[test]
    fn a_piece_that_fails_is_asked_for_again_and_the_others_are_there() {
        let (disk, mut device) = disk(32);
        let once = Fault { nth: 2, op: FaultOp::Read, kind: FaultKind::Error(Keep::None), sticky: false };
        disk.inject(once);
        let whole: Vec<_> = (0..16).step_by(2).map(|block| Some((block, PIECE))).collect();
        let ranges = [(0, 16 * BLOCK as u64)];
        assert_eq!(seen(&mut ReadAhead::new(&mut device, ranges, 2)), whole);
        assert_eq!(disk.faults_struck(), 1);
        disk.make_unreadable(5);
        let mut lacking = whole;
        lacking[2] = None;
        assert_eq!(seen(&mut ReadAhead::new(&mut device, ranges, 3)), lacking);
        // A device that is gone ends each of them.
        disk.inject(Fault { nth: 0, op: FaultOp::Read, kind: FaultKind::Gone, sticky: true });
        assert_eq!(seen(&mut ReadAhead::new(&mut device, ranges, 3)), vec![None; 8]);
    }
}

//! Waiting for a device: for start-up, formatting and checking, never on a running reactor.

use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token};

/// How long one wait for the wake descriptor lasts before the device is polled again anyway.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Waits until `poll` is likely to find something.
pub fn wait<D: Device>(device: &D) {
    match device.wake_fd() {
        Some(fd) => {
            // An interrupted or failed wait only means polling earlier.
            let _ = rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&WAIT));
        }
        None => std::hint::spin_loop(),
    }
}

/// Runs operations to their end, as many at a time as the device takes. `make` gives the `i`th of `count` (it may have to
/// give the same one again when the device had no room); `took` gets each result.
fn run<D: Device>(
    device: &mut D,
    count: usize,
    mut make: impl FnMut(&mut D, usize) -> Option<IoOp>,
    mut took: impl FnMut(usize, Option<DmaBuf>),
) -> Result<(), IoError> {
    let (mut next, mut finished) = (0, 0);
    let mut failure = None;
    let mut done: Vec<IoDone> = Vec::new();
    while finished < count {
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
        if failure.is_some() && finished == next {
            break;
        }
        if device.poll(&mut done) == 0 {
            wait(device);
        }
        for IoDone { token, buf, status } in done.drain(..) {
            finished += 1;
            match status {
                Ok(()) => took(token.0 as usize, buf),
                Err(error) => failure = Some(error),
            }
        }
        if failure.is_some() && finished == next {
            break;
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Pieces of at most this many bytes keep several in flight without taking many buffers.
const PIECE_SIZE: usize = 256 << 10;

fn piece_size<D: Device>(device: &D) -> usize {
    let largest = (device.geometry().transfer_size_max as usize).clamp(4096, PIECE_SIZE);
    1 << largest.ilog2()
}

/// Reads `size` bytes at `offset`; both are multiples of the block size.
pub fn read<D: Device>(device: &mut D, offset: u64, size: usize) -> Result<Vec<u8>, IoError> {
    let mut out = vec![0; size];
    read_into(device, offset, &mut out)?;
    Ok(out)
}

/// Fills `out` from `offset` on; its length and `offset` are multiples of the block size.
pub fn read_into<D: Device>(device: &mut D, offset: u64, out: &mut [u8]) -> Result<(), IoError> {
    let piece = piece_size(device);
    let size = out.len();
    run(
        device,
        size.div_ceil(piece),
        |device, i| {
            let at = i * piece;
            Some(IoOp::Read { offset: offset + at as u64, buf: device.allocate(piece.min(size - at))? })
        },
        |i, buf| match buf {
            Some(buf) => out[i * piece..i * piece + buf.len()].copy_from_slice(&buf),
            // What was there before is not what was read.
            None => out[i * piece..((i + 1) * piece).min(size)].fill(0),
        },
    )
}

/// Reads `size` bytes at each of many offsets.
pub fn read_many<D: Device>(
    device: &mut D,
    offsets: &[u64],
    size: usize,
    mut took: impl FnMut(usize, &[u8]),
) -> Result<(), IoError> {
    run(
        device,
        offsets.len(),
        |device, i| Some(IoOp::Read { offset: offsets[i], buf: device.allocate(size)? }),
        |i, buf| {
            if let Some(buf) = buf {
                took(i, &buf);
            }
        },
    )
}

/// Writes `bytes` at `offset`; both are multiples of the block size. Not durable before a flush.
pub fn write<D: Device>(device: &mut D, offset: u64, bytes: &[u8]) -> Result<(), IoError> {
    let piece = piece_size(device);
    run(
        device,
        bytes.len().div_ceil(piece),
        |device, i| {
            let part = &bytes[i * piece..((i + 1) * piece).min(bytes.len())];
            let mut buf = device.allocate(part.len())?;
            buf.copy_from_slice(part);
            Some(IoOp::Write { offset: offset + (i * piece) as u64, buf, fua: false })
        },
        |_, _| {},
    )
}

/// Writes zeros of `size` bytes at each of many offsets.
pub fn zero_many<D: Device>(device: &mut D, offsets: &[u64], size: usize) -> Result<(), IoError> {
    run(
        device,
        offsets.len(),
        |device, i| {
            let mut buf = device.allocate(size)?;
            buf.fill(0);
            Some(IoOp::Write { offset: offsets[i], buf, fua: false })
        },
        |_, _| {},
    )
}

/// Writes zeros from `offset` on; offset and size are multiples of the block size. Not durable before a flush.
pub fn zero<D: Device>(device: &mut D, offset: u64, size: u64) -> Result<(), IoError> {
    let piece = piece_size(device) as u64;
    run(
        device,
        size.div_ceil(piece) as usize,
        |device, i| {
            let at = i as u64 * piece;
            let mut buf = device.allocate(piece.min(size - at) as usize)?;
            buf.fill(0);
            Some(IoOp::Write { offset: offset + at, buf, fua: false })
        },
        |_, _| {},
    )
}

/// Makes everything written so far durable.
pub fn flush<D: Device>(device: &mut D) -> Result<(), IoError> {
    if !device.geometry().volatile_cache {
        return Ok(());
    }
    run(device, 1, |_, _| Some(IoOp::Flush), |_, _| {})
}

//! The engine's side of a queue pair: commands wait here, in order, for a buffer and a place in flight.
//!
//! Invariants:
//! - A command leaves the queue only into the device; a refusal puts it back at its place.
//! - Nothing is dropped: every command ends as one [`Finished`].

use std::collections::VecDeque;

use bytes::Bytes;
use slab::Slab;

use crate::device::{Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token};

/// What a command was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A piece of a read job.
    Read {
        /// The job.
        job: usize,
        /// Bytes from the job's start to the piece.
        at: usize,
    },
    /// A piece of the group's writes.
    Write {
        /// The frame that it belongs to, among those of the group.
        frame: usize,
    },
    /// The group's flush.
    Flush,
    /// A piece of a checkpoint.
    Checkpoint,
    /// A piece of an extent that is being collected.
    Collect,
    /// A piece of a unit of survivors.
    Survivors {
        /// The shard, among those of the engine.
        shard: usize,
    },
    /// A piece of an extent that is read again.
    Scrub,
    /// The deallocation of an extent that is free again.
    Trim {
        /// The shard that it was of, among those of the engine.
        shard: usize,
        /// The extent.
        extent: u32,
    },
}

enum Command {
    Read { offset: u64, size: usize },
    Write { offset: u64, data: Bytes },
    Flush,
    Deallocate { offset: u64, size: u64 },
}

/// A command that has ended.
pub(super) struct Finished {
    pub(super) purpose: Purpose,
    pub(super) buf: Option<DmaBuf>,
    pub(super) status: Result<(), IoError>,
}

/// Commands on their way to the device and back.
pub(super) struct IoQueue<D> {
    device: D,
    purposes: Slab<Purpose>,
    waiting: VecDeque<(Purpose, Command)>,
    done: Vec<IoDone>,
    failed: Vec<Finished>,
    transfer_size_max: usize,
    /// Bytes handed to the device as writes.
    pub(super) bytes_written: u64,
    /// Bytes read from the device.
    pub(super) bytes_read: u64,
    /// Flushes sent.
    pub(super) flush_count: u64,
}

impl<D: Device> IoQueue<D> {
    pub(super) fn new(device: D) -> IoQueue<D> {
        let geometry = device.geometry();
        // Whole log blocks, whatever the device's own block is; a power of two keeps pieces aligned to it.
        let transfer_size_max = (geometry.transfer_size_max as usize).clamp(4096, 1 << 20);
        let transfer_size_max = 1 << transfer_size_max.ilog2();
        IoQueue {
            device,
            purposes: Slab::new(),
            waiting: VecDeque::new(),
            done: Vec::new(),
            failed: Vec::new(),
            transfer_size_max,
            bytes_written: 0,
            bytes_read: 0,
            flush_count: 0,
        }
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }

    pub(super) fn transfer_size_max(&self) -> usize {
        self.transfer_size_max
    }

    pub(super) fn read(&mut self, purpose: Purpose, offset: u64, size: usize) {
        self.waiting.push_back((purpose, Command::Read { offset, size }));
    }

    /// Writes a frame's `data` in pieces that the device takes, and returns how many there are.
    pub(super) fn write(&mut self, frame: usize, offset: u64, data: Bytes) -> usize {
        self.write_for(Purpose::Write { frame }, offset, &data)
    }

    /// Writes `data` in pieces that the device takes, and returns how many there are.
    pub(super) fn write_for(&mut self, purpose: Purpose, offset: u64, data: &Bytes) -> usize {
        let mut at = 0;
        let mut pieces = 0;
        while at < data.len() {
            let end = (at + self.transfer_size_max).min(data.len());
            let piece = Command::Write { offset: offset + at as u64, data: data.slice(at..end) };
            self.waiting.push_back((purpose, piece));
            pieces += 1;
            at = end;
        }
        pieces
    }

    pub(super) fn flush(&mut self) {
        self.flush_count += 1;
        self.waiting.push_back((Purpose::Flush, Command::Flush));
    }

    pub(super) fn deallocate(&mut self, purpose: Purpose, offset: u64, size: u64) {
        self.waiting.push_back((purpose, Command::Deallocate { offset, size }));
    }

    /// Whether anything is waiting or in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.purposes.is_empty() && self.failed.is_empty()
    }

    /// Hands waiting commands to the device until it is full or out of buffers.
    pub(super) fn submit(&mut self) {
        while let Some((purpose, command)) = self.waiting.pop_front() {
            let op = match &command {
                Command::Read { offset, size } => {
                    let Some(buf) = self.device.allocate(*size) else {
                        self.waiting.push_front((purpose, command));
                        return;
                    };
                    IoOp::Read { offset: *offset, buf }
                }
                Command::Write { offset, data } => {
                    let Some(mut buf) = self.device.allocate(data.len()) else {
                        self.waiting.push_front((purpose, command));
                        return;
                    };
                    buf.copy_from_slice(data);
                    IoOp::Write { offset: *offset, buf, fua: false }
                }
                Command::Flush => IoOp::Flush,
                Command::Deallocate { offset, size } => IoOp::Deallocate { offset: *offset, size: *size },
            };
            let token = Token(self.purposes.insert(purpose) as u64);
            match self.device.submit(Io { token, op }) {
                Ok(()) => match command {
                    Command::Read { size, .. } => self.bytes_read += size as u64,
                    Command::Write { data, .. } => self.bytes_written += data.len() as u64,
                    Command::Flush | Command::Deallocate { .. } => {}
                },
                Err(rejected) => {
                    self.purposes.remove(rejected.io.token.0 as usize);
                    match rejected.why {
                        Refusal::Full => {
                            self.waiting.push_front((purpose, command));
                            return;
                        }
                        Refusal::Failed(error) => {
                            self.failed.push(Finished { purpose, buf: None, status: Err(error) });
                        }
                    }
                }
            }
        }
    }

    /// Rings the doorbell and collects what has ended.
    pub(super) fn poll(&mut self, out: &mut Vec<Finished>) {
        self.submit();
        out.append(&mut self.failed);
        let mut done = std::mem::take(&mut self.done);
        self.device.poll(&mut done);
        for IoDone { token, buf, status } in done.drain(..) {
            let purpose = self.purposes.remove(token.0 as usize);
            out.push(Finished { purpose, buf, status });
        }
        self.done = done;
        // Completions gave buffers and places back: what waited for them need not wait for the next loop.
        if !self.waiting.is_empty() {
            self.submit();
        }
    }
}

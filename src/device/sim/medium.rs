//! The state of a simulated medium: what is durable, what is cached, what is in flight.
//!
//! Invariants:
//! - `current` is `durable` with the completed pending writes applied in the order of their completion.
//! - A pending write leaves when it becomes durable, by a flush that was submitted after its completion, by FUA, or at its
//!   completion where there is no volatile cache. What is durable is never undone by an older pending write.
//! - No two in-flight operations overlap unless both are reads.

use std::collections::{BTreeMap, BTreeSet};

use super::SimConfig;
use super::crash::{BlockWrite, Keep, Pending, UnflushedWrite};
use super::fault::{FaultKind, FaultOp, FaultPlan};
use super::image::Image;
use super::random::{Random, mix};
use crate::device::{
    Deallocate, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Refusal, Rejected, Token, check,
};

pub(super) struct Medium {
    pub config: SimConfig,
    pub geometry: Geometry,
    pub random: Random,
    pub durable: Image,
    pub current: Image,
    pub unreadable: BTreeSet<u64>,
    pub faults: FaultPlan,
    pub events: u64,
    pub cut_at: Option<u64>,
    pub gone: bool,
    /// Every later flush fails, until the next start.
    flush_failed: bool,
    pub trace: u64,
    /// Grows at a crash: queues of an earlier one are dead.
    pub generation: u64,
    pub queue_count: u64,
    pending: BTreeMap<u64, Pending>,
    pending_next: u64,
    completion_next: u64,
    in_flight: Vec<InFlight>,
    /// What has been transferred at the end of all that is in flight, had the disk never been idle.
    busy_until_bytes: u64,
}

struct InFlight {
    queue: u64,
    token: Token,
    command: Command,
    /// The poll of its queue at which it completes.
    ready_at: u64,
    fault: Option<FaultKind>,
}

enum Command {
    Read { offset: u64, buf: DmaBuf },
    Write { id: u64, offset: u64, buf: DmaBuf, fua: bool },
    Deallocate { id: u64, offset: u64, size: u64 },
    Flush { covers: Vec<u64> },
}

impl Command {
    fn range(&self) -> Option<(u64, u64)> {
        match self {
            Command::Read { offset, buf } | Command::Write { offset, buf, .. } => {
                Some((*offset, buf.len() as u64))
            }
            Command::Deallocate { offset, size, .. } => Some((*offset, *size)),
            Command::Flush { .. } => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Command::Read { .. } => "read",
            Command::Write { .. } => "write",
            Command::Deallocate { .. } => "deallocation",
            Command::Flush { .. } => "flush",
        }
    }

    fn into_buf(self) -> Option<DmaBuf> {
        match self {
            Command::Read { buf, .. } | Command::Write { buf, .. } => Some(buf),
            Command::Deallocate { .. } | Command::Flush { .. } => None,
        }
    }

    fn pending_id(&self) -> Option<u64> {
        match self {
            Command::Write { id, .. } | Command::Deallocate { id, .. } => Some(*id),
            Command::Read { .. } | Command::Flush { .. } => None,
        }
    }
}

impl Medium {
    pub fn new(config: SimConfig, seed: u64, image: Image) -> Medium {
        Medium {
            geometry: config.geometry(),
            config,
            random: Random::new(mix(seed)),
            durable: image.clone(),
            current: image,
            unreadable: BTreeSet::new(),
            faults: FaultPlan::default(),
            events: 0,
            cut_at: None,
            gone: false,
            flush_failed: false,
            trace: mix(seed),
            generation: 0,
            queue_count: 0,
            pending: BTreeMap::new(),
            pending_next: 0,
            completion_next: 0,
            in_flight: Vec::new(),
            busy_until_bytes: 0,
        }
    }

    pub fn is_off(&self) -> bool {
        self.gone || self.cut_at.is_some_and(|event| self.events >= event)
    }

    pub fn piece(&self) -> usize {
        self.config.tear.size(self.config.block_size)
    }

    /// Mixes what happened into the trace, so that two runs can be compared by one word.
    pub fn record(&mut self, what: u64, words: [u64; 3]) {
        for word in [what, words[0], words[1], words[2]] {
            self.trace = mix(self.trace ^ word);
        }
    }

    pub fn in_flight_of(&self, queue: u64) -> usize {
        self.in_flight.iter().filter(|flying| flying.queue == queue).count()
    }

    pub fn submit(&mut self, queue: u64, polls: u64, io: Io) -> Result<(), Rejected> {
        if self.is_off() {
            return Err(check::refuse(io, IoError::Gone));
        }
        if let Err(error) = check::check(&self.geometry, &io.op) {
            return Err(check::refuse(io, error));
        }
        if self.in_flight_of(queue) >= self.config.depth as usize {
            return Err(check::full(io));
        }
        self.assert_no_overlap(&io);
        let fault = self.faults.strike(match &io.op {
            IoOp::Read { .. } => FaultOp::Read,
            IoOp::Write { .. } => FaultOp::Write,
            IoOp::Flush => FaultOp::Flush,
            IoOp::Deallocate { .. } => FaultOp::Deallocate,
        });
        match fault {
            Some(FaultKind::Full) => return Err(check::full(io)),
            Some(FaultKind::Gone) => {
                self.gone = true;
                return Err(Rejected { io, why: Refusal::Failed(IoError::Gone) });
            }
            _ => {}
        }
        let delay = 1 + self.random.below(self.config.delay_polls_max.max(1));
        let ready_at = match fault {
            Some(FaultKind::Never) => u64::MAX,
            Some(FaultKind::Slow(more)) => polls.saturating_add(delay).saturating_add(more),
            _ => polls + delay,
        };
        let ready_at = ready_at.max(self.turn_of(io.op.transfer_size() as u64, polls));
        let Io { token, op } = io;
        let command = self.begin(token, op);
        self.in_flight.push(InFlight { queue, token, command, ready_at, fault });
        self.events += 1;
        Ok(())
    }

    /// The poll at which a command of this size has been transferred, behind all that is in flight.
    fn turn_of(&mut self, size: u64, polls: u64) -> u64 {
        let Some(rate) = self.config.bytes_per_poll else { return 0 };
        self.busy_until_bytes = self.busy_until_bytes.max(polls * rate) + size;
        self.busy_until_bytes.div_ceil(rate)
    }

    /// Records the operation and notes what it would do to the medium.
    fn begin(&mut self, token: Token, op: IoOp) -> Command {
        match op {
            IoOp::Read { offset, buf } => {
                self.record(1, [token.0, offset, buf.len() as u64]);
                Command::Read { offset, buf }
            }
            IoOp::Write { offset, buf, fua } => {
                self.record(2, [token.0, offset, u64::from(crc32fast::hash(&buf))]);
                let block_size = self.config.block_size as usize;
                let blocks = buf.chunks(block_size).map(|bytes| BlockWrite::Bytes(bytes.into())).collect();
                let id = self.add_pending(offset, blocks, false);
                Command::Write { id, offset, buf, fua }
            }
            IoOp::Deallocate { offset, size } => {
                self.record(3, [token.0, offset, size]);
                let block = match self.config.deallocate {
                    Deallocate::None => BlockWrite::Skip,
                    Deallocate::Advisory => BlockWrite::Forget,
                    Deallocate::Zeroes => BlockWrite::Bytes(vec![0; self.config.block_size as usize].into()),
                };
                let count = (size / u64::from(self.config.block_size)) as usize;
                let id = self.add_pending(offset, vec![block; count], true);
                Command::Deallocate { id, offset, size }
            }
            IoOp::Flush => {
                self.record(4, [token.0, 0, 0]);
                let completed = |(id, pending): (&u64, &Pending)| pending.completed.is_some().then_some(*id);
                Command::Flush { covers: self.pending.iter().filter_map(completed).collect() }
            }
        }
    }

    fn add_pending(&mut self, offset: u64, blocks: Vec<BlockWrite>, deallocation: bool) -> u64 {
        let id = self.pending_next;
        self.pending_next += 1;
        self.pending.insert(id, Pending { offset, blocks, completed: None, deallocation });
        id
    }

    fn assert_no_overlap(&self, io: &Io) {
        let Some((offset, size)) = check::range(&io.op) else { return };
        let is_read = matches!(io.op, IoOp::Read { .. });
        for other in &self.in_flight {
            let Some((other_offset, other_size)) = other.command.range() else { continue };
            let both_read = is_read && matches!(other.command, Command::Read { .. });
            let overlap = offset < other_offset + other_size && other_offset < offset + size;
            let name = match &io.op {
                IoOp::Read { .. } => "read",
                IoOp::Write { .. } => "write",
                IoOp::Flush => "flush",
                IoOp::Deallocate { .. } => "deallocation",
            };
            assert!(
                both_read || !overlap,
                "the {name} with token {} of bytes {offset}..{} overlaps the in-flight {} with token {} of bytes \
                 {other_offset}..{}",
                io.token.0,
                offset + size,
                other.command.name(),
                other.token.0,
                other_offset + other_size,
            );
        }
    }

    /// Completes what is due on this queue, in random order, until the power goes.
    pub fn poll(&mut self, queue: u64, polls: u64, done: &mut Vec<IoDone>) -> usize {
        if self.is_off() {
            // Whoever drives the queue gets its buffers back and can end. What became of the writes is decided when an
            // image is taken: they stay among the pending ones.
            let is_own = |flying: &mut InFlight| flying.queue == queue;
            let lost = self.in_flight.extract_if(.., is_own);
            let before = done.len();
            done.extend(lost.map(|flying| IoDone {
                token: flying.token,
                buf: flying.command.into_buf(),
                status: Err(IoError::Gone),
            }));
            return done.len() - before;
        }
        let is_due = |flying: &InFlight| flying.queue == queue && flying.ready_at <= polls;
        let mut due: Vec<InFlight> = self.in_flight.extract_if(.., |flying| is_due(flying)).collect();
        self.random.shuffle(&mut due);
        let mut due = due.into_iter();
        let mut count = 0;
        while !self.is_off()
            && let Some(flying) = due.next()
        {
            let token = flying.token;
            let (buf, status) = self.complete(flying);
            let outcome = match &status {
                Ok(()) => 0,
                Err(IoError::Aborted) => 1,
                Err(_) => 2,
            };
            self.record(5, [token.0, outcome, buf.as_ref().map_or(0, |buf| u64::from(crc32fast::hash(buf)))]);
            self.events += 1;
            count += 1;
            done.push(IoDone { token, buf, status });
        }
        self.in_flight.extend(due);
        count
    }

    fn complete(&mut self, flying: InFlight) -> (Option<DmaBuf>, Result<(), IoError>) {
        let fault = flying.fault;
        match flying.command {
            Command::Read { offset, mut buf } => {
                let status = self.complete_read(offset, &mut buf, fault);
                (Some(buf), status)
            }
            Command::Write { id, offset, buf, fua } => {
                let is_durable = !self.config.volatile_cache || (fua && self.config.fua);
                let status = self.complete_write(id, offset, buf.len() as u64, is_durable, fault);
                (Some(buf), status)
            }
            Command::Deallocate { id, offset, size } => {
                let is_durable = !self.config.volatile_cache;
                (None, self.complete_write(id, offset, size, is_durable, fault))
            }
            Command::Flush { covers } => (None, self.complete_flush(&covers, fault)),
        }
    }

    fn complete_read(
        &mut self,
        offset: u64,
        buf: &mut DmaBuf,
        fault: Option<FaultKind>,
    ) -> Result<(), IoError> {
        let size = buf.len() as u64;
        let block_size = u64::from(self.config.block_size);
        let blocks = offset / block_size..(offset + size).div_ceil(block_size);
        match fault {
            Some(FaultKind::Aborted(_)) => return Err(IoError::Aborted),
            Some(FaultKind::Error(_)) => return Err(IoError::UnrecoveredRead { offset, size }),
            _ if self.unreadable.range(blocks).next().is_some() => {
                return Err(IoError::UnrecoveredRead { offset, size });
            }
            _ => {}
        }
        self.current.read(offset, buf);
        if fault == Some(FaultKind::WrongRead) {
            let bit = self.random.below(size * 8);
            buf[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
        Ok(())
    }

    fn complete_write(
        &mut self,
        id: u64,
        offset: u64,
        size: u64,
        is_durable: bool,
        fault: Option<FaultKind>,
    ) -> Result<(), IoError> {
        match fault {
            Some(FaultKind::Aborted(keep)) => {
                self.land_torn(id, keep);
                return Err(IoError::Aborted);
            }
            Some(FaultKind::Error(keep)) => {
                self.land_torn(id, keep);
                return Err(IoError::WriteFault { offset, size, cause: "injected write fault".to_owned() });
            }
            Some(FaultKind::LostWrite) => {
                self.pending.remove(&id);
                return Ok(());
            }
            Some(FaultKind::Misdirected(elsewhere)) => {
                if let Some(pending) = self.pending.get_mut(&id) {
                    pending.offset = elsewhere;
                }
            }
            _ => {}
        }
        self.land(id, is_durable);
        Ok(())
    }

    fn land_torn(&mut self, id: u64, keep: Keep) {
        let piece = self.piece();
        if let Some(pending) = self.pending.get_mut(&id) {
            pending.tear(&self.current, keep, piece);
        }
        // The outcome is unknown to the host, so FUA promises nothing.
        self.land(id, !self.config.volatile_cache);
    }

    /// Makes the write visible, and durable where it is.
    fn land(&mut self, id: u64, is_durable: bool) {
        let piece = self.piece();
        let block_size = u64::from(self.config.block_size);
        let Some(pending) = self.pending.get_mut(&id) else { return };
        pending.completed = Some(self.completion_next);
        self.completion_next += 1;
        pending.apply(&mut self.current, Keep::All, piece);
        for (index, write) in pending.blocks.iter().enumerate() {
            if !matches!(write, BlockWrite::Skip) {
                self.unreadable.remove(&(pending.offset / block_size + index as u64));
            }
        }
        if is_durable && let Some(pending) = self.pending.remove(&id) {
            pending.apply(&mut self.durable, Keep::All, piece);
            let size = pending.blocks.len() as u64 * block_size;
            for other in self.pending.values_mut().filter(|other| other.completed.is_some()) {
                other.supersede(pending.offset, size, block_size);
            }
        }
    }

    fn complete_flush(&mut self, covers: &[u64], fault: Option<FaultKind>) -> Result<(), IoError> {
        if self.flush_failed {
            let cause = "an earlier flush failed, and what it lost can't be known".to_owned();
            return Err(IoError::FlushFailed { cause });
        }
        self.flush_failed = matches!(fault, Some(FaultKind::Error(_) | FaultKind::FlushLost));
        let failed = || Err(IoError::FlushFailed { cause: "injected flush failure".to_owned() });
        match fault {
            Some(FaultKind::Aborted(_)) => return Err(IoError::Aborted),
            Some(FaultKind::Error(_)) => return failed(),
            Some(FaultKind::FlushIgnored) => return Ok(()),
            _ => {}
        }
        let mut covered: Vec<Pending> = covers.iter().filter_map(|id| self.pending.remove(id)).collect();
        if fault == Some(FaultKind::FlushLost) {
            self.rebuild_current();
            return failed();
        }
        covered.sort_by_key(|pending| pending.completed);
        let piece = self.piece();
        for pending in covered {
            pending.apply(&mut self.durable, Keep::All, piece);
        }
        Ok(())
    }

    fn rebuild_current(&mut self) {
        self.current = self.durable.clone();
        let mut completed: Vec<&Pending> =
            self.pending.values().filter(|pending| pending.completed.is_some()).collect();
        completed.sort_by_key(|pending| pending.completed);
        for pending in completed {
            pending.apply(&mut self.current, Keep::All, self.config.tear.size(self.config.block_size));
        }
    }

    pub fn unflushed(&self) -> Vec<UnflushedWrite> {
        let block_size = u64::from(self.config.block_size);
        let describe = |(&id, pending): (&u64, &Pending)| UnflushedWrite {
            id,
            offset: pending.offset,
            size: pending.blocks.len() as u64 * block_size,
            completed: pending.completed.is_some(),
            deallocation: pending.deallocation,
        };
        self.pending.iter().map(describe).collect()
    }

    /// What is durable, with the chosen writes applied in the order given.
    pub fn image_with(&self, choices: &[(u64, Keep)]) -> Image {
        let mut image = self.durable.clone();
        for (id, keep) in choices {
            let pending = self.pending.get(id);
            assert!(pending.is_some(), "write {id} is not unflushed");
            if let Some(pending) = pending {
                pending.apply(&mut image, *keep, self.piece());
            }
        }
        image
    }

    /// Replaces what the medium holds and forgets everything that was under way.
    pub fn restart(&mut self, image: Image) {
        self.durable = image.clone();
        self.current = image;
        self.pending.clear();
        self.in_flight.clear();
        self.generation += 1;
        self.cut_at = None;
        self.gone = false;
        self.flush_failed = false;
        self.record(6, [self.generation, self.events, 0]);
    }

    /// Aborts everything in flight; of the writes, a random part was applied. They complete at the next poll.
    pub fn reset_controller(&mut self) {
        let (piece, block_size) = (self.piece(), self.config.block_size as usize);
        for flying in &mut self.in_flight {
            let (_, size) = flying.command.range().unwrap_or((0, block_size as u64));
            flying.fault = Some(FaultKind::Aborted(Keep::random(&mut self.random, size as usize, piece)));
            flying.ready_at = 0;
        }
    }

    /// Takes back what a queue that is being deleted still has in flight. With the power off nothing more happens to it;
    /// otherwise a random part of each write was applied.
    pub fn delete_queue(&mut self, queue: u64) {
        let flying: Vec<InFlight> = self.in_flight.extract_if(.., |flying| flying.queue == queue).collect();
        if self.is_off() {
            return;
        }
        let piece = self.piece();
        for flying in flying {
            if let (Some(id), Some((_, size))) = (flying.command.pending_id(), flying.command.range()) {
                let keep = Keep::random(&mut self.random, size as usize, piece);
                self.land_torn(id, keep);
            }
        }
    }

    pub fn assert_idle(&self) {
        assert!(self.in_flight.is_empty(), "{} operations are in flight", self.in_flight.len());
    }

    /// Changes the block behind the host's back, on the medium and in the cache.
    pub fn damage(&mut self, offset: u64, change: impl Fn(&mut [u8]), size: usize) {
        assert!(offset + size as u64 <= self.geometry.size(), "damage beyond the device");
        for image in [&mut self.durable, &mut self.current] {
            let mut bytes = vec![0; size];
            image.read(offset, &mut bytes);
            change(&mut bytes);
            image.write(offset, &bytes);
        }
    }
}

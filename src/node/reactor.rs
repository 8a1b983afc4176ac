//! One reactor of a node: its shards, its sockets, its mailboxes, in one loop.

mod dumps;
mod requests;
mod walks;

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use slab::Slab;

use self::walks::Walks;
use super::memory::MemoryView;
use super::shared::{Control, Shared};
use super::tasks::{GatherReply, Origin, Step, Task};
use super::{ShardAnswer, ShardRequest};
use crate::device::Device;
use crate::engine::Engine;
use crate::engine::op::{Answer, Clock, ShardId, ShardOp};
use crate::limits::MAILBOX_RING_CAPACITY;
use crate::net::resp::Response;
use crate::net::server::{Readiness, Registry, Server};
use crate::net::{Completed, ConnectionId, SlotId};
use crate::reactor::control::ControlReceiver;
use crate::reactor::{Event, Interest, MeshEnd, Poller, Progress, Work};

/// The key that the device's wake descriptor is registered with; the server's keys are below 2^32.
const DEVICE_KEY: u64 = 1 << 40;

/// How long a stopping node waits for clients to take their replies.
const DRAIN_TIME_US: u64 = 5_000_000;

/// How often a reactor that waits for the others at a stop looks again.
const STOP_POLL: Duration = Duration::from_millis(1);

/// How often a dump is looked at, whose reader may have gone.
const DUMP_POLL: Duration = Duration::from_secs(1);

/// How often a device without a wake descriptor is looked at while nothing is in flight: it may have been reset or removed.
const DEVICE_POLL: Duration = Duration::from_millis(100);

/// A tag names a task of its sender (low 32 bits), what the task needs to tell its answers apart (16 bits), and in the
/// engine also the sender (upper 16 bits).
fn tag(peer: usize, part: u16, task: usize) -> u64 {
    (peer as u64) << 48 | u64::from(part) << 32 | task as u64
}

/// Everything of a reactor but its sockets: what a connection's requests are started on.
pub(super) struct Core<D> {
    index: usize,
    shared: Arc<Shared>,
    engine: Engine<D>,
    mesh: MeshEnd<ShardRequest, ShardAnswer>,
    tasks: Slab<Task>,
    clock: Clock,
    batch_counter: u64,
    walks: Walks,
    /// The task of the dump that a client of this reactor reads.
    dump: Option<usize>,
    /// Steps of tasks under way that a full ring or engine refused, per peer, this reactor included. Bounded by the tasks.
    outbox: Vec<VecDeque<ShardRequest>>,
    /// Requests from peers that the engine refused. While there is one, nothing more is taken from that peer.
    inbox: Vec<VecDeque<ShardRequest>>,
    /// Answers that a full ring refused. While there is one, nothing more is taken from that peer.
    answer_outbox: Vec<VecDeque<ShardAnswer>>,
    memory: MemoryView,
    answers: Vec<(u64, Answer)>,
    completions: Vec<(ConnectionId, SlotId, Completed)>,
    locked: Vec<(ConnectionId, SlotId)>,
    /// Who asked for the stop: gets no reply, and nothing else either.
    shutdown: Origin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Answering what was taken, since this moment.
    Draining {
        since_us: u64,
        save: bool,
    },
    /// Waiting for the other reactors to be done too.
    Quiet {
        save: bool,
    },
    Finished,
}

/// The work of one reactor.
pub(super) struct NodeReactor<D> {
    core: Core<D>,
    server: Option<Server>,
    control: ControlReceiver<Control>,
    phase: Phase,
}

struct PollerRegistry<'a>(&'a mut Poller);

fn interest(readable: bool, writable: bool) -> Interest {
    match (readable, writable) {
        (true, true) => Interest::ReadWrite,
        (true, false) => Interest::Read,
        (false, true) => Interest::Write,
        (false, false) => Interest::None,
    }
}

impl Registry for PollerRegistry<'_> {
    fn add(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()> {
        self.0.register(fd, key, interest(readable, writable)).map_err(|error| error.source.into())
    }
    fn modify(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()> {
        self.0.modify(fd, key, interest(readable, writable)).map_err(|error| error.source.into())
    }
    fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.0.deregister(fd).map_err(|error| error.source.into())
    }
}

impl<D: Device> NodeReactor<D> {
    /// Puts an engine, a mesh end and a listener together, and registers what can wake it.
    pub(super) fn new(
        shared: Arc<Shared>,
        engine: Engine<D>,
        mesh: MeshEnd<ShardRequest, ShardAnswer>,
        control: ControlReceiver<Control>,
        listener: Option<std::net::TcpListener>,
        poller: &mut Poller,
    ) -> io::Result<NodeReactor<D>> {
        let index = mesh.index();
        if let Some(fd) = engine.device().wake_fd() {
            poller.register(fd, DEVICE_KEY, Interest::Read).map_err(|error| io::Error::from(error.source))?;
        }
        let connections = shared.connection_count_max.div_ceil(shared.reactor_count());
        let server = match listener {
            // Generations tell connections apart for good; each reactor has a range that it can't use up.
            Some(listener) => {
                let first = 1 + ((index as u64) << 48);
                Some(Server::new(listener, connections, first, &mut PollerRegistry(poller))?)
            }
            None => None,
        };
        let peers = mesh.peer_count();
        let core = Core {
            index,
            clock: shared.clock(),
            memory: MemoryView::new(shared.memory),
            shared,
            engine,
            mesh,
            tasks: Slab::new(),
            batch_counter: 0,
            walks: Walks::default(),
            dump: None,
            outbox: std::iter::repeat_with(VecDeque::new).take(peers).collect(),
            inbox: std::iter::repeat_with(VecDeque::new).take(peers).collect(),
            answer_outbox: std::iter::repeat_with(VecDeque::new).take(peers).collect(),
            answers: Vec::new(),
            completions: Vec::new(),
            locked: Vec::new(),
            shutdown: None,
        };
        Ok(NodeReactor { core, server, control, phase: Phase::Serving })
    }

    fn controls(&mut self, registry: &mut PollerRegistry<'_>) -> bool {
        let mut any = false;
        while let Some(message) = self.control.receive() {
            any = true;
            match message {
                Control::Durability(durability) => self.core.engine.set_durability(durability),
                Control::Stop { save } => {
                    if self.phase == Phase::Serving {
                        self.phase = Phase::Draining { since_us: self.core.clock.monotonic_us, save };
                        if let Some(server) = &mut self.server {
                            server.stop_accepting(registry);
                            server.finish_connections();
                            if let Some((connection, slot)) = self.core.shutdown.take() {
                                server.complete(connection, slot, Completed::Reply(Response::Nothing));
                            }
                        }
                    }
                }
            }
        }
        any
    }

    fn sockets(&mut self, registry: &mut PollerRegistry<'_>, events: &[Event]) -> bool {
        let Some(server) = &mut self.server else { return false };
        let mut any = false;
        for event in events.iter().filter(|event| event.key != DEVICE_KEY) {
            any = true;
            let ready =
                Readiness { readable: event.readable, writable: event.writable, hangup: event.hangup };
            server.on_event(event.key, ready, &mut self.core, registry);
        }
        any |= server.needs_pump();
        server.pump(&mut self.core, registry);
        any
    }

    fn deliver(&mut self) {
        let Some(server) = &mut self.server else { return };
        for (connection, slot) in self.core.locked.drain(..) {
            server.locked(connection, slot);
        }
        for (connection, slot, completed) in self.core.completions.drain(..) {
            server.complete(connection, slot, completed);
        }
    }

    /// One step towards the end, once everything that was taken is answered.
    fn wind_down(&mut self) {
        match self.phase {
            Phase::Serving | Phase::Finished => {}
            Phase::Draining { since_us, save } => {
                let patience_is_over = self.core.clock.monotonic_us.saturating_sub(since_us) > DRAIN_TIME_US;
                let drained = self.server.as_ref().is_none_or(Server::drained) && self.core.tasks.is_empty();
                if drained || patience_is_over {
                    self.core.shared.quiet_count.fetch_add(1, Ordering::AcqRel);
                    self.phase = Phase::Quiet { save };
                }
            }
            Phase::Quiet { save } => {
                // Until every reactor is quiet, another one may still need this one's shards.
                if self.core.shared.quiet_count.load(Ordering::Acquire) < self.core.shared.reactor_count() {
                    return;
                }
                if save {
                    let mut late = Vec::new();
                    if let Err(error) = self.core.engine.stop(self.core.clock, &mut late) {
                        tracing::error!("the device could not be marked as cleanly stopped: {error}");
                        self.core.shared.failed.store(true, Ordering::Release);
                    }
                }
                self.phase = Phase::Finished;
            }
        }
    }

    fn publish_figures(&self) {
        let engine = self.core.engine.stats();
        let figures = &self.core.shared.figures[self.core.index];
        let set = |figure: &std::sync::atomic::AtomicU64, value| figure.store(value, Ordering::Relaxed);
        set(&figures.keys, engine.keys);
        set(&figures.live_bytes, engine.live_bytes);
        set(&figures.bytes_written, engine.bytes_written);
        set(&figures.bytes_read, engine.bytes_read);
        set(&figures.user_bytes, engine.user_bytes);
        set(&figures.flushes, engine.flushes);
        set(&figures.groups, engine.groups);
        set(&figures.records, engine.records);
        set(&figures.damaged_reads, engine.damaged_reads);
        set(&figures.extents_left, engine.extents_left);
        set(&figures.scrub_bytes, engine.scrub.bytes);
        set(&figures.scrub_passes, engine.scrub.passes);
        set(&figures.scrub_last_pass_ms, engine.scrub.last_pass_ms);
        set(&figures.scrub_damaged, engine.scrub.damaged);
        set(&figures.gc_extents_collected, engine.gc.extents_collected);
        set(&figures.gc_extents_freed, engine.gc.extents_freed);
        set(&figures.gc_bytes_moved, engine.gc.bytes_moved);
        set(&figures.gc_bytes_trimmed, engine.gc.bytes_trimmed);
        set(&figures.checkpoints, engine.checkpoints.written);
        set(&figures.checkpoint_bytes, engine.checkpoints.bytes);
        set(&figures.checkpoints_skipped, engine.checkpoints.skipped);
        set(&figures.gc_abandoned, engine.gc.abandoned);
        for (figures, stats) in figures.io.iter().zip(&engine.io) {
            figures.set(stats);
        }
        set(&figures.cache_hits, engine.cache_hits);
        set(&figures.cache_misses, engine.cache_misses);
        if let Some(server) = &self.server {
            let server = server.statistics();
            set(&figures.connections, server.connection_count);
            set(&figures.accepted, server.accepted_count);
            set(&figures.rejected, server.rejected_count);
            set(&figures.commands, server.command_count);
            set(&figures.received_bytes, server.received_bytes);
            set(&figures.sent_bytes, server.sent_bytes);
            set(&figures.evicted, server.evicted_count);
            set(&figures.connections_memory, server.connections_size);
        }
    }

    /// Looks at the node's memory and tells the engine what it may take.
    fn refresh_memory(&mut self) {
        let Core { memory, shared, engine, index, clock, .. } = &mut self.core;
        let own = &shared.figures[*index];
        let budget = memory.refresh(shared, own, engine.memory_use(), clock.monotonic_us);
        engine.set_memory(budget);
    }
}

impl<D: Device> Work for NodeReactor<D> {
    fn poll(&mut self, poller: &mut Poller, events: &[Event]) -> Progress {
        self.core.clock = self.core.shared.clock();
        self.refresh_memory();
        let registry = &mut PollerRegistry(poller);
        let mut busy = self.controls(registry);
        busy |= self.core.rings_in();
        busy |= self.core.engine_step();
        self.deliver();
        busy |= self.sockets(registry, events);
        // What the sockets brought is started on the device in the same pass, and what needs no device is answered.
        busy |= self.core.engine_step();
        if !self.core.completions.is_empty() || !self.core.locked.is_empty() {
            busy = true;
            self.deliver();
        }
        self.core.watch_dump(self.phase != Phase::Serving);
        self.core.rings_out();
        if busy {
            self.publish_figures();
        }
        if self.phase != Phase::Serving {
            self.wind_down();
        }
        if busy { Progress::Busy } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        if self.phase != Phase::Serving {
            return Some(STOP_POLL);
        }
        let clock = self.core.clock;
        let server = self.server.as_ref().and_then(|server| server.deadline_us(clock.monotonic_us));
        let timer = self.core.engine.deadline_us(clock).into_iter().chain(server).min();
        let timer = timer.map(|at| Duration::from_micros(at.saturating_sub(clock.monotonic_us)));
        let timer = timer.into_iter().chain(self.core.dump.map(|_| DUMP_POLL)).min();
        let device = self.core.engine.device();
        match device.wake_fd() {
            Some(_) => timer,
            // What nobody is woken for has to be looked for.
            None if device.in_flight() > 0 => Some(Duration::ZERO),
            None => Some(timer.map_or(DEVICE_POLL, |timer| timer.min(DEVICE_POLL))),
        }
    }

    fn finished(&self) -> bool {
        self.phase == Phase::Finished
    }
}

impl<D: Device> Core<D> {
    /// Takes what other reactors and in-process callers sent.
    fn rings_in(&mut self) -> bool {
        let mut any = false;
        let index = self.index;
        for peer in (0..self.mesh.peer_count()).filter(|peer| *peer != index) {
            any |= self.retry_inbox(peer);
            if !self.inbox[peer].is_empty() || !self.answer_outbox[peer].is_empty() {
                continue;
            }
            let (engine, inbox, clock) = (&mut self.engine, &mut self.inbox[peer], self.clock);
            let taken = self.mesh.receive_requests_of(peer, MAILBOX_RING_CAPACITY, |request| {
                let ShardRequest { shard, tag: sender_tag, op } = request;
                let full_tag = tag(peer, 0, 0) | sender_tag;
                if inbox.is_empty() {
                    if let Err(op) = engine.submit(shard, full_tag, op, clock) {
                        inbox.push_back(ShardRequest { shard, tag: sender_tag, op });
                    }
                } else {
                    inbox.push_back(ShardRequest { shard, tag: sender_tag, op });
                }
            });
            any |= taken > 0;
        }
        let mut answers = Vec::new();
        if self.mesh.peer_count() > 1 {
            self.mesh.receive_answers(MAILBOX_RING_CAPACITY, |_, answer| answers.push(answer));
        }
        for ShardAnswer { tag, answer } in answers {
            any = true;
            self.on_answer(tag, answer);
        }
        any
    }

    fn retry_inbox(&mut self, peer: usize) -> bool {
        let mut any = false;
        while let Some(ShardRequest { shard, tag: sender_tag, op }) = self.inbox[peer].pop_front() {
            if let Err(op) = self.engine.submit(shard, tag(peer, 0, 0) | sender_tag, op, self.clock) {
                self.inbox[peer].push_front(ShardRequest { shard, tag: sender_tag, op });
                break;
            }
            any = true;
        }
        any
    }

    /// Advances the engine and routes its answers.
    fn engine_step(&mut self) -> bool {
        let mut answers = std::mem::take(&mut self.answers);
        let any = self.engine.poll(self.clock, &mut answers);
        for (full_tag, answer) in answers.drain(..) {
            let peer = (full_tag >> 48) as usize;
            let sender_tag = full_tag & 0xffff_ffff_ffff;
            if peer == self.index {
                self.on_answer(sender_tag, answer);
            } else {
                self.send_answer(peer, ShardAnswer { tag: sender_tag, answer });
            }
        }
        self.answers = answers;
        any
    }

    fn send_answer(&mut self, peer: usize, answer: ShardAnswer) {
        if !self.answer_outbox[peer].is_empty() {
            self.answer_outbox[peer].push_back(answer);
        } else if let Err(full) = self.mesh.send_answer(peer, answer) {
            self.answer_outbox[peer].push_back(full.0);
        }
    }

    /// Sends what a full ring refused before, publishes, wakes.
    fn rings_out(&mut self) {
        for peer in 0..self.outbox.len() {
            while let Some(request) = self.outbox[peer].pop_front() {
                if let Err(request) = self.try_send(peer, request) {
                    self.outbox[peer].push_front(request);
                    break;
                }
            }
            while let Some(answer) = self.answer_outbox[peer].pop_front() {
                if let Err(full) = self.mesh.send_answer(peer, answer) {
                    self.answer_outbox[peer].push_front(full.0);
                    break;
                }
            }
        }
        self.mesh.flush();
    }

    fn try_send(&mut self, peer: usize, request: ShardRequest) -> Result<(), ShardRequest> {
        if peer == self.index {
            let ShardRequest { shard, tag: sender_tag, op } = request;
            let full_tag = tag(peer, 0, 0) | sender_tag;
            let refused = self.engine.submit(shard, full_tag, op, self.clock);
            refused.map_err(|op| ShardRequest { shard, tag: sender_tag, op })
        } else {
            self.mesh.send_request(peer, request).map_err(|full| full.0)
        }
    }

    /// Sends an operation of a new request. Refused when its reactor has no room: the connection tries again.
    fn send_new(&mut self, shard: ShardId, tag: u64, op: ShardOp) -> Result<(), ShardOp> {
        let peer = self.shared.reactor_of(shard);
        if !self.outbox[peer].is_empty() {
            return Err(op);
        }
        self.try_send(peer, ShardRequest { shard, tag, op }).map_err(|request| request.op)
    }

    /// Sends an operation of a task under way, which can't be refused: it waits here when there is no room.
    fn send_step(&mut self, shard: ShardId, tag: u64, op: ShardOp) {
        let peer = self.shared.reactor_of(shard);
        let request = ShardRequest { shard, tag, op };
        if !self.outbox[peer].is_empty() {
            self.outbox[peer].push_back(request);
        } else if let Err(request) = self.try_send(peer, request) {
            self.outbox[peer].push_back(request);
        }
    }

    /// Hands an answer to its task.
    fn on_answer(&mut self, sender_tag: u64, answer: Answer) {
        let id = (sender_tag & 0xffff_ffff) as usize;
        let part = (sender_tag >> 32) as u16;
        let Some(task) = self.tasks.get_mut(id) else { return };
        if let Task::Walk(_) = task {
            return self.on_walk_answer(id, answer);
        }
        let mut sends = Vec::new();
        let shard_count = self.shared.superblock.shard_count;
        let step = task.on_answer(part, answer, self.clock.unix_ms, shard_count, &mut |shard, op| {
            sends.push((shard, op));
        });
        for (shard, op) in sends {
            self.send_step(shard, tag(0, shard.0, id), op);
        }
        self.take_step(id, step);
    }

    fn take_step(&mut self, id: usize, step: Step) {
        match step {
            Step::Waiting => {}
            Step::Locked(origin) => self.locked.extend(origin),
            Step::Send(shard, op) => self.send_step(shard, tag(0, shard.0, id), op),
            Step::SendParts(sends) => self.send_parts(id, sends),
            Step::Ended => {
                self.tasks.try_remove(id);
            }
            Step::Complete { origin, completed, done, unwatch } => {
                if let Some(Task::Gather { reply: GatherReply::Saved, .. }) = self.tasks.get(id)
                    && completed == Completed::Reply(Response::Ok)
                {
                    self.shared.last_save_s.store(self.clock.unix_ms / 1_000, Ordering::Relaxed);
                }
                if done {
                    self.tasks.try_remove(id);
                }
                if let Some((connection, slot)) = origin {
                    self.walks.ended(connection);
                    self.completions.push((connection, slot, completed));
                }
                if !unwatch.is_empty() {
                    self.unwatch(None, unwatch);
                }
            }
        }
    }
}

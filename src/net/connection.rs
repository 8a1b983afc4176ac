//! One client connection without its socket: bytes in, requests out, answers in, bytes out.
//!
//! Invariants:
//! - Replies leave in the order of their requests, whatever order the answers come in.
//! - Work on single keys starts at once; the shards keep it in order per key. After a batch nothing starts until the
//!   batch holds its keys. A global request starts when everything before it is answered, and nothing starts until it
//!   is answered itself (an EXEC with watches: until it holds its keys).
//! - Memory is bounded: no request is read while `REPLY_SLOTS_MAX` replies are owed, while the requests that are under
//!   way hold `IN_FLIGHT_SIZE_MAX` bytes, or while `REPLY_BUFFER_SIZE_MAX` bytes of replies wait to be sent. Each of
//!   these may be passed by one request's worth.
//! - A request that the node refuses is kept, the only one, and offered again.

use std::collections::VecDeque;
use std::net::SocketAddr;

use bytes::{Buf, Bytes, BytesMut};

use super::backend::{Backend, Completed, ConnectionId, SlotId, Started};
use super::command::{Call, Local, Plan};
use super::request::Request;
use super::resp::{DirectRun, Parsed, RequestLimits, RequestParser, Response, Version, put_bulk};
use super::session::{Multi, Session, WATCH_COUNT_MAX, acts_inside_multi, size_of};
use crate::engine::op::{DirectReply, Key};
use crate::limits::{REPLY_BUFFER_SIZE_MAX, REPLY_SLOTS_MAX};

/// Bytes of requests that one connection may have under way.
pub const IN_FLIGHT_SIZE_MAX: usize = 4 << 20;

/// Bytes of replies that one connection may be owed, going by the size of its latest ones. Not a hard bound: nobody knows
/// how long a value is before it is read. The node, which reads it, has the hard one, and refuses.
const OWED_SIZE_MAX: usize = 4 << 20;

/// The size of a reply as long as none was seen. A pessimist's guess: a first burst of requests for long values is held
/// back at once, and short replies bring the figure down to a full pipeline within some twenty of them.
const OWED_SIZE_START: usize = 1 << 20;

/// The same for the output that is written while memory is short: replies in waiting may share their bytes with the cache.
const OUTPUT_SIZE_SHORT: usize = 16 << 10;

/// A reply of this size is sent from where it is.
const BODY_SIZE_MIN: usize = 64 << 10;

/// An empty buffer that is larger than this is given back.
const IDLE_BUFFER_SIZE_MAX: usize = 1 << 10;

/// A reply that is owed.
#[derive(Debug)]
struct Slot {
    version: Version,
    /// Bytes of the request.
    cost: usize,
    reply: Option<Response>,
    then: Then,
}

/// How an answer becomes the reply.
#[derive(Debug)]
enum Then {
    /// As it is.
    Reply,
    /// It is one of EXEC, and lacks these replies at these places.
    Exec(Vec<(usize, Response)>),
    /// It does not matter.
    Instead(Response),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// No more requests; what is owed still goes out.
    Closing,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    peer: Option<SocketAddr>,
    parser: RequestParser,
    input: BytesMut,
    out: BytesMut,
    /// What is left of a long reply; it goes out behind `out`, without being copied there, and nothing is added to `out` until
    /// it has.
    body: Bytes,
    slots: VecDeque<Slot>,
    /// The id of the first slot.
    first: u64,
    /// The request of the last slot, when it could not start yet.
    held: Option<Request>,
    refused: bool,
    /// The slot that lets nothing later start.
    barrier: Option<SlotId>,
    ready_size: usize,
    in_flight_size: usize,
    /// Bytes of output beyond which no further reply is written to it.
    output_size_max: usize,
    /// The size that the next replies are reckoned at: the latest large one's, fading.
    reply_size_seen: usize,
    session: Session,
    phase: Phase,
    /// The client sends no more; what it sent is still answered.
    ended: bool,
    command_count: u64,
}

impl Connection {
    /// A connection at its start.
    pub fn new(id: ConnectionId, peer: Option<SocketAddr>, limits: RequestLimits) -> Self {
        Self {
            id,
            peer,
            parser: RequestParser::new(limits),
            input: BytesMut::new(),
            out: BytesMut::new(),
            body: Bytes::new(),
            slots: VecDeque::new(),
            first: 0,
            held: None,
            refused: false,
            barrier: None,
            ready_size: 0,
            in_flight_size: 0,
            output_size_max: REPLY_BUFFER_SIZE_MAX,
            reply_size_seen: OWED_SIZE_START,
            session: Session::default(),
            phase: Phase::Open,
            ended: false,
            command_count: 0,
        }
    }

    /// Its name.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Whether more bytes are welcome.
    pub fn wants_input(&self) -> bool {
        !self.ended && self.may_read_request()
    }

    fn may_read_request(&self) -> bool {
        self.phase == Phase::Open && self.held.is_none() && self.barrier.is_none() && self.has_room()
    }

    /// Whether `advance` may find another request in what was received.
    pub fn has_requests(&self) -> bool {
        !self.input.is_empty() && self.may_read_request()
    }

    /// Whether the node refused a request, so that `advance` is to be called again without another reason.
    pub fn is_refused(&self) -> bool {
        self.refused
    }

    /// Whether everything is said and the socket is to be closed.
    pub fn is_finished(&self) -> bool {
        self.phase == Phase::Closing && self.is_idle()
    }

    /// Whether nothing is under way: no reply owed, none waiting to be sent.
    pub fn is_idle(&self) -> bool {
        self.slots.is_empty() && self.output().is_empty()
    }

    /// Lets no further request start, as QUIT does.
    pub fn finish(&mut self) {
        self.phase = Phase::Closing;
        self.input = BytesMut::new();
    }

    /// Commands since the last time this was asked.
    pub fn take_command_count(&mut self) -> u64 {
        std::mem::take(&mut self.command_count)
    }

    /// Bytes of memory that it holds, about.
    pub fn size(&self) -> usize {
        std::mem::size_of::<Self>()
            + self.input.capacity()
            + self.out.capacity()
            + self.body.len()
            + self.slots.capacity() * std::mem::size_of::<Slot>()
            + self.ready_size
            + self.in_flight_size
            + self.parser.size()
            + self.session.size()
    }

    /// Takes bytes from the client; `advance` makes something of them.
    pub fn received(&mut self, mut bytes: &[u8]) {
        if self.phase == Phase::Closing {
            return;
        }
        if self.input.is_empty() {
            let taken = self.parser.absorb(bytes);
            bytes = &bytes[taken..];
        }
        self.input.extend_from_slice(bytes);
    }

    /// The client will send no more: the connection finishes once everything it sent is answered.
    pub fn received_end(&mut self) {
        self.ended = true;
    }

    /// Bytes for the client.
    pub fn output(&self) -> &[u8] {
        if self.out.is_empty() { &self.body } else { &self.out }
    }

    /// So many bytes of `output` are sent.
    pub fn sent(&mut self, size: usize) {
        if self.out.is_empty() {
            self.body.advance(size);
            if self.body.is_empty() {
                self.body = Bytes::new();
                self.out.extend_from_slice(b"\r\n");
            }
        } else {
            self.out.advance(size);
            if self.out.is_empty() {
                release(&mut self.out);
            }
        }
        self.flush_ready();
    }

    /// Does what can be done now: starts what is held, reads requests, writes replies.
    pub fn advance<B: Backend>(&mut self, backend: &mut B) {
        self.refused = false;
        loop {
            self.output_size_max =
                if backend.is_memory_short() { OUTPUT_SIZE_SHORT } else { REPLY_BUFFER_SIZE_MAX };
            self.flush_ready();
            if let Some(request) = self.held.take() {
                if !self.start(request, backend) {
                    return;
                }
                continue;
            }
            if !self.may_read_request() {
                return;
            }
            if self.run_at_once(backend) {
                continue;
            }
            match self.parser.next(&mut self.input) {
                Ok(Some(Parsed::Command(args))) => {
                    self.command_count += 1;
                    self.command(args, backend);
                }
                Ok(Some(Parsed::Refused(refusal))) => {
                    self.command_count += 1;
                    self.fail_multi();
                    self.reply(Response::error(refusal.to_string()));
                }
                Ok(None) => {
                    if self.ended {
                        self.finish();
                    }
                    if self.input.is_empty() {
                        release(&mut self.input);
                    }
                    return;
                }
                Err(error) => {
                    self.reply(Response::error(error.to_string()));
                    self.finish();
                }
            }
        }
    }

    /// Answers the direct requests that the input begins with, as far as that can be done at once. False when none was.
    fn run_at_once<B: Backend>(&mut self, backend: &mut B) -> bool {
        // Behind a request that is not answered, the answer would be out of order, and perhaps of a state before it.
        let is_owed =
            !self.slots.is_empty() || !self.body.is_empty() || self.out.len() >= self.output_size_max;
        if is_owed || self.session.multi.is_some() || !self.parser.is_between_requests() {
            return false;
        }
        let Self { input, out, body, output_size_max, reply_size_seen, session, .. } = self;
        let run = DirectRun::read(input, self.parser.argument_size_max());
        if run.requests().is_empty() {
            return false;
        }
        let count = backend.run_at_once(run.requests(), &mut |reply| {
            let size = match reply {
                DirectReply::Value(value) if value.len() >= BODY_SIZE_MIN => {
                    begin_body(value.clone(), out, body);
                    value.len()
                }
                DirectReply::Value(value) => {
                    put_bulk(out, value);
                    value.len()
                }
                DirectReply::Nil => {
                    Response::Nil.encode(session.version, out);
                    0
                }
                DirectReply::Ok => {
                    Response::Ok.encode(session.version, out);
                    0
                }
            };
            *reply_size_seen = size.max(*reply_size_seen - *reply_size_seen / 8);
            body.is_empty() && out.len() < *output_size_max
        });
        let size = run.size_of_first(count);
        self.command_count += count as u64;
        self.input.advance(size);
        count > 0
    }

    /// A batch holds its keys: what follows may start, and will queue behind it where it has to.
    pub fn locked(&mut self, slot: SlotId) {
        if self.barrier == Some(slot) {
            self.barrier = None;
        }
    }

    /// The answer to a request. `advance` writes it.
    pub fn complete(&mut self, id: SlotId, completed: Completed) {
        let Some(at) = id.0.checked_sub(self.first).and_then(|at| usize::try_from(at).ok()) else { return };
        let Some(slot) = self.slots.get_mut(at).filter(|slot| slot.reply.is_none()) else { return };
        let answer = match completed {
            Completed::Reply(response) => response,
            Completed::Watching(watched) => {
                self.session.add_watched(watched);
                Response::Ok
            }
        };
        let reply = match std::mem::replace(&mut slot.then, Then::Reply) {
            Then::Reply => answer,
            Then::Exec(local) => merge(answer, local),
            Then::Instead(reply) => reply,
        };
        self.in_flight_size -= slot.cost;
        let size = reply.size();
        self.ready_size += size;
        self.reply_size_seen = size.max(self.reply_size_seen - self.reply_size_seen / 8);
        slot.reply = Some(reply);
        self.locked(id);
    }

    /// Ends the connection, whatever is under way. What it returns undoes its watches and must be started.
    pub fn close(&mut self) -> Option<Request> {
        self.finish();
        let mut keys = self.session.take_watched();
        match self.held.take() {
            Some(Request::Batch { watched, .. }) => {
                keys.extend(watched.into_iter().map(|watched| watched.key))
            }
            Some(Request::Unwatch { keys: held }) => keys.extend(held),
            _ => {}
        }
        self.slots.clear();
        (!keys.is_empty()).then_some(Request::Unwatch { keys })
    }

    fn has_room(&self) -> bool {
        self.slots.len() < REPLY_SLOTS_MAX
            && self.slots.len().saturating_mul(self.reply_size_seen) <= OWED_SIZE_MAX
            && self.in_flight_size < IN_FLIGHT_SIZE_MAX
            && self.out.len() + self.body.len() + self.ready_size < REPLY_BUFFER_SIZE_MAX
    }

    /// Writes replies in order, as far as they are there and the client takes them.
    fn flush_ready(&mut self) {
        while self.body.is_empty()
            && self.out.len() < self.output_size_max
            && self.slots.front().is_some_and(|slot| slot.reply.is_some())
        {
            if let Some(Slot { version, reply: Some(reply), .. }) = self.slots.pop_front() {
                self.first += 1;
                self.ready_size -= reply.size();
                match reply {
                    Response::Bulk(bytes) if bytes.len() >= BODY_SIZE_MIN => {
                        begin_body(bytes, &mut self.out, &mut self.body);
                    }
                    reply => reply.encode(version, &mut self.out),
                }
            }
        }
        if self.slots.is_empty() && self.slots.capacity() > 16 {
            self.slots = VecDeque::new();
        }
    }

    fn push_slot(&mut self, reply: Option<Response>, cost: usize, then: Then) -> SlotId {
        let id = SlotId(self.first + self.slots.len() as u64);
        self.ready_size += reply.as_ref().map_or(0, Response::size);
        self.in_flight_size += cost;
        self.slots.push_back(Slot { version: self.session.version, cost, reply, then });
        id
    }

    fn reply(&mut self, response: Response) {
        self.push_slot(Some(response), 0, Then::Reply);
    }

    fn request(&mut self, request: Request, cost: usize, then: Then) {
        self.push_slot(None, cost, then);
        self.held = Some(request);
    }

    /// Starts the request of the last slot; keeps it and says no when it must wait.
    fn start<B: Backend>(&mut self, request: Request, backend: &mut B) -> bool {
        let slot = SlotId(self.first + self.slots.len() as u64 - 1);
        let alone = self.slots.len() == 1;
        if self.barrier.is_some() || (request.is_global() && !alone) {
            self.held = Some(request);
            return false;
        }
        if !matches!(request, Request::Single { .. }) {
            self.barrier = Some(slot);
        }
        match backend.start(self.id, slot, request) {
            Started::Now(completed) => self.complete(slot, completed),
            Started::Later => {}
            Started::Refused(request) => {
                self.locked(slot);
                self.held = Some(request);
                self.refused = true;
                return false;
            }
        }
        true
    }

    fn fail_multi(&mut self) {
        if let Some(multi) = &mut self.session.multi {
            multi.failed = true;
        }
    }

    fn command<B: Backend>(&mut self, args: Vec<Bytes>, backend: &mut B) {
        let now_ms = backend.clock().unix_ms;
        let spec = match Session::look_up(&args) {
            Ok(spec) => spec,
            Err(fail) => {
                self.fail_multi();
                return self.reply(Response::Error(fail));
            }
        };
        if let Some(multi) = self.session.multi.as_mut().filter(|_| !acts_inside_multi(spec)) {
            let response = match multi.queue(spec, args, now_ms) {
                Ok(()) => Response::Simple("QUEUED".into()),
                Err(fail) => {
                    multi.failed = true;
                    Response::Error(fail)
                }
            };
            return self.reply(response);
        }
        let cost = size_of(&args);
        match (spec.plan)(&Call { spec, args: &args, now_ms }) {
            Err(fail) => self.reply(Response::Error(fail)),
            Ok(Plan::Data(mut command)) => {
                let request = match (command.actions.len(), command.actions.pop()) {
                    (1, Some((key, action))) => Request::Single { key, action },
                    (_, last) => {
                        command.actions.extend(last);
                        Request::Batch { commands: vec![command], watched: vec![], exec: false }
                    }
                };
                self.request(request, cost, Then::Reply);
            }
            Ok(Plan::Global(request)) => self.request(request, cost, Then::Reply),
            Ok(Plan::Local(local)) => self.local(local, cost, backend),
        }
    }

    fn local<B: Backend>(&mut self, local: Local, cost: usize, backend: &mut B) {
        let peer = self.peer_name(&local);
        match local {
            Local::Quit => {
                self.reply(Response::Ok);
                self.finish();
            }
            Local::Reset => {
                let version = Version::Resp2;
                let watched = self.session.take_watched();
                self.session = Session::default();
                self.session.version = version;
                self.unwatch(watched, Response::Simple("RESET".into()));
            }
            Local::Multi if self.session.multi.is_some() => {
                self.reply(Response::error("ERR MULTI calls can not be nested"));
            }
            Local::Multi => {
                self.session.multi = Some(Box::default());
                self.reply(Response::Ok);
            }
            Local::Discard if self.session.multi.is_none() => {
                self.reply(Response::error("ERR DISCARD without MULTI"))
            }
            Local::Discard | Local::Unwatch => {
                self.session.multi = None;
                let watched = self.session.take_watched();
                self.unwatch(watched, Response::Ok);
            }
            Local::Watch(_) if self.session.multi.is_some() => {
                self.reply(Response::error("ERR WATCH inside MULTI is not allowed"));
            }
            Local::Watch(keys) => self.watch(keys, cost),
            Local::Exec => match self.session.multi.take() {
                Some(multi) => self.exec(*multi, backend),
                None => self.reply(Response::error("ERR EXEC without MULTI")),
            },
            other => {
                let response = self.session.answer(other, self.id.generation, &peer, backend);
                self.reply(response.unwrap_or(Response::Ok));
            }
        }
    }

    fn peer_name(&self, local: &Local) -> String {
        match (local, self.peer) {
            (Local::ClientInfo, Some(peer)) => peer.to_string(),
            _ => String::new(),
        }
    }

    fn watch(&mut self, keys: Vec<Key>, cost: usize) {
        let keys = self.session.not_watched(keys);
        if self.session.watched.len() + keys.len() > WATCH_COUNT_MAX {
            return self.reply(Response::error(format!("ERR a connection may watch {WATCH_COUNT_MAX} keys")));
        }
        if keys.is_empty() {
            return self.reply(Response::Ok);
        }
        self.request(Request::Watch { keys }, cost, Then::Reply);
    }

    fn unwatch(&mut self, keys: Vec<Key>, reply: Response) {
        if keys.is_empty() {
            return self.reply(reply);
        }
        self.request(Request::Unwatch { keys }, 0, Then::Instead(reply));
    }

    fn exec<B: Backend>(&mut self, multi: Multi, backend: &mut B) {
        if multi.failed {
            let watched = self.session.take_watched();
            let text = "EXECABORT Transaction discarded because of previous errors.";
            return self.unwatch(watched, Response::error(text));
        }
        let cost = multi.size();
        let (mut commands, mut local) = (Vec::new(), Vec::new());
        for (at, plan) in multi.plans(backend.clock().unix_ms).enumerate() {
            let response = match plan {
                Ok(Plan::Data(command)) => {
                    commands.push(command);
                    continue;
                }
                // UNWATCH here says OK and does nothing: EXEC ends all watches.
                Ok(Plan::Local(local)) => {
                    let peer = self.peer_name(&local);
                    self.session.answer(local, self.id.generation, &peer, backend).unwrap_or(Response::Ok)
                }
                Ok(Plan::Global(_)) => Response::error("ERR Command is not allowed inside a transaction"),
                Err(fail) => Response::Error(fail),
            };
            local.push((at, response));
        }
        let watched = self.session.take_watches();
        if commands.is_empty() && watched.is_empty() {
            return self.reply(Response::Array(local.into_iter().map(|(_, response)| response).collect()));
        }
        self.request(Request::Batch { commands, watched, exec: true }, cost, Then::Exec(local));
    }
}

/// Writes what comes before a long reply, which is sent from where it is.
fn begin_body(bytes: Bytes, out: &mut BytesMut, body: &mut Bytes) {
    out.extend_from_slice(format!("${}\r\n", bytes.len()).as_bytes());
    *body = bytes;
}

/// Gives a large empty buffer back.
fn release(buffer: &mut BytesMut) {
    if buffer.capacity() > IDLE_BUFFER_SIZE_MAX {
        *buffer = BytesMut::new();
    }
}

/// Puts the replies that the node did not make in their places among those that it did.
fn merge(answer: Response, local: Vec<(usize, Response)>) -> Response {
    let items = match answer {
        Response::Array(items) => items,
        Response::Nil => return Response::NilArray,
        other => return other,
    };
    let mut merged = Vec::with_capacity(items.len() + local.len());
    let mut items = items.into_iter();
    for (at, response) in local {
        merged.extend(items.by_ref().take(at - merged.len()));
        merged.push(response);
    }
    merged.extend(items);
    Response::Array(merged)
}

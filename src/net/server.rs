//! The sockets of one reactor: accepts, reads, writes, closes.
//!
//! Invariants: nothing blocks; a loop reads at most `READ_SIZE_MAX` bytes of a connection and writes to it once, so
//! that no client holds up the others; a connection that cannot take more is not listened to until it can.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use slab::Slab;

use super::backend::{Backend, Completed, ConnectionId, SlotId, Started};
use super::connection::Connection;
use super::request::Request;
use super::resp::RequestLimits;
use crate::limits::CONNECTION_COUNT_MAX;

/// The key of the listener; connections have keys below it.
pub const LISTENER_KEY: u64 = u32::MAX as u64;

/// Bytes read at once.
const SCRATCH_SIZE: usize = 64 << 10;

/// Bytes of one connection read in one loop.
const READ_SIZE_MAX: usize = 256 << 10;

/// Connections accepted in one loop.
const ACCEPT_COUNT_MAX: usize = 64;

/// Bytes of all arguments of one command.
const COMMAND_SIZE_MAX: usize = 64 << 20;

/// How long reading rests while memory is short.
const MEMORY_REST_US: u64 = 1_000;

/// Connections closed for want of memory in one loop.
const EVICTION_COUNT_MAX: usize = 16;

/// Closing a connection that holds less than this gains nothing.
const EVICTED_SIZE_MIN: usize = 1 << 10;

/// How long accepting rests when the process is out of descriptors.
const ACCEPT_REST_US: u64 = 100_000;

const _: () = assert!((CONNECTION_COUNT_MAX as u64) < LISTENER_KEY);
const _: () = assert!(SCRATCH_SIZE <= READ_SIZE_MAX);

/// Tells of readiness, level-triggered. A hang-up is always told.
pub trait Registry {
    /// Begins to watch a descriptor.
    fn add(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()>;
    /// Changes what is watched for.
    fn modify(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()>;
    /// Ends it; before the descriptor is closed.
    fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// What `on_event` is told of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Readiness {
    /// There is something to read, or to accept.
    pub readable: bool,
    /// There is room to write.
    pub writable: bool,
    /// The other side is gone, or the socket is broken (EPOLLHUP, EPOLLERR). Not EPOLLRDHUP: a client that sends no
    /// more still wants its replies, and reading finds its end.
    pub hangup: bool,
}

/// What the server has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerStatistics {
    /// Connections now.
    pub connection_count: u64,
    /// Connections ever.
    pub accepted_count: u64,
    /// Connections refused for being too many.
    pub rejected_count: u64,
    /// Commands.
    pub command_count: u64,
    /// Bytes from clients.
    pub received_bytes: u64,
    /// Bytes to clients.
    pub sent_bytes: u64,
    /// Connections closed for want of memory.
    pub evicted_count: u64,
    /// Bytes of memory that connections hold now.
    pub connections_size: u64,
}

#[derive(Debug)]
struct Client {
    socket: TcpStream,
    connection: Connection,
    /// What is watched for.
    interest: (bool, bool),
    /// It is in `dirty`.
    dirty: bool,
    /// The last write did not take everything: wait for room.
    blocked: bool,
    /// Its bytes wait in the kernel until there is memory for them; it is in `held_back`.
    held_back: bool,
    /// Bytes of memory that it held when last looked at.
    size: usize,
}

/// The sockets of one reactor.
#[derive(Debug)]
pub struct Server {
    listener: Option<TcpListener>,
    /// When accepting rests: when it began.
    resting_since_us: Option<u64>,
    clients: Slab<Client>,
    connection_count_max: usize,
    /// Clients that `pump` has to look at.
    dirty: Vec<usize>,
    /// Clients that are not read while memory is short.
    held_back: Vec<usize>,
    /// Requests of closed connections that the node has yet to take.
    orphans: VecDeque<(ConnectionId, Request)>,
    scratch: Box<[u8]>,
    generation: u64,
    statistics: ServerStatistics,
}

impl Server {
    /// A server on a listener. Generations start at `first_generation`: give each reactor its own range.
    pub fn new(
        listener: TcpListener,
        connection_count_max: usize,
        first_generation: u64,
        registry: &mut impl Registry,
    ) -> io::Result<Self> {
        registry.add(listener.as_fd(), LISTENER_KEY, true, false)?;
        Ok(Self {
            listener: Some(listener),
            resting_since_us: None,
            clients: Slab::new(),
            connection_count_max: connection_count_max.min(CONNECTION_COUNT_MAX),
            dirty: Vec::new(),
            held_back: Vec::new(),
            orphans: VecDeque::new(),
            scratch: vec![0; SCRATCH_SIZE].into_boxed_slice(),
            generation: first_generation,
            statistics: ServerStatistics::default(),
        })
    }

    /// Figures for INFO.
    pub fn statistics(&self) -> ServerStatistics {
        ServerStatistics { connection_count: self.clients.len() as u64, ..self.statistics }
    }

    /// A descriptor is ready. Keys that are not the server's, or no longer, are ignored.
    pub fn on_event<B: Backend>(
        &mut self,
        key: u64,
        ready: Readiness,
        backend: &mut B,
        registry: &mut impl Registry,
    ) {
        if key == LISTENER_KEY {
            return self.accept(backend, registry);
        }
        let Some(index) = usize::try_from(key).ok().filter(|index| self.clients.contains(*index)) else {
            return;
        };
        let alive = !ready.readable || self.read(index, backend);
        let client = &mut self.clients[index];
        client.blocked &= !ready.writable;
        // A hang-up beside unread bytes is told again once those are read; behind a listing they need not be, as who would have
        // read its reply is gone.
        let is_in_vain = ready.hangup && backend.abandon(client.connection.id());
        if !alive || is_in_vain || (ready.hangup && !ready.readable) {
            return self.close(index, backend, registry);
        }
        self.mark(index);
    }

    /// The answer to a request.
    pub fn complete(&mut self, id: ConnectionId, slot: SlotId, completed: Completed) {
        match self.index_of(id) {
            Some(index) => {
                self.clients[index].connection.complete(slot, completed);
                self.mark(index);
            }
            None => {
                if let Completed::Watching(watched) = completed {
                    let keys = watched.into_iter().map(|watched| watched.key).collect();
                    self.orphans.push_back((id, Request::Unwatch { keys }));
                }
            }
        }
    }

    /// A batch holds its keys.
    pub fn locked(&mut self, id: ConnectionId, slot: SlotId) {
        if let Some(index) = self.index_of(id) {
            self.clients[index].connection.locked(slot);
            self.mark(index);
        }
    }

    /// Once per loop, after events and answers: starts what waits, writes what is there, closes what is over.
    pub fn pump<B: Backend>(&mut self, backend: &mut B, registry: &mut impl Registry) {
        self.resume_accepting(backend.clock().monotonic_us, registry);
        if !self.held_back.is_empty() && !backend.is_memory_short() {
            for index in std::mem::take(&mut self.held_back) {
                if let Some(client) = self.clients.get_mut(index) {
                    client.held_back = false;
                    self.mark(index);
                }
            }
        }
        for _ in 0..self.orphans.len() {
            let Some((id, request)) = self.orphans.pop_front() else { break };
            if let Started::Refused(request) = backend.start(id, SlotId(u64::MAX), request) {
                self.orphans.push_back((id, request));
            }
        }
        for _ in 0..EVICTION_COUNT_MAX {
            if !backend.must_evict() || !self.evict(backend, registry) {
                break;
            }
        }
        for index in std::mem::take(&mut self.dirty) {
            let Some(client) = self.clients.get_mut(index) else { continue };
            client.dirty = false;
            client.connection.advance(backend);
            let written = self.write(index);
            let Some(client) = self.clients.get_mut(index) else { continue };
            let size = client.connection.size();
            self.statistics.connections_size += size as u64;
            self.statistics.connections_size -= client.size as u64;
            client.size = size;
            self.statistics.command_count += client.connection.take_command_count();
            if written.is_err() || client.connection.is_finished() || update(index, client, registry).is_err()
            {
                self.close(index, backend, registry);
                continue;
            }
            // Writing may have made room for requests that are already in the buffer.
            let made_room = written.is_ok_and(|size| size > 0) && !client.blocked;
            let more = !client.connection.output().is_empty() || client.connection.has_requests();
            if client.connection.is_refused() || (made_room && more) {
                self.mark(index);
            }
        }
    }

    /// Whether `pump` has something to do without another event or answer.
    pub fn needs_pump(&self) -> bool {
        !self.dirty.is_empty() || !self.orphans.is_empty()
    }

    /// Takes no more connections.
    pub fn stop_accepting(&mut self, registry: &mut impl Registry) {
        if let Some(listener) = self.listener.take() {
            // Closing the descriptor ends the watch in any case.
            let _ = registry.remove(listener.as_fd());
        }
    }

    /// Lets no connection start another request; each closes when its replies are out.
    pub fn finish_connections(&mut self) {
        let indices: Vec<usize> = self.clients.iter().map(|(index, _)| index).collect();
        for index in indices {
            self.clients[index].connection.finish();
            self.mark(index);
        }
    }

    /// Whether no reply is owed or unsent.
    pub fn drained(&self) -> bool {
        self.orphans.is_empty() && self.clients.iter().all(|(_, client)| client.connection.is_idle())
    }

    fn index_of(&self, id: ConnectionId) -> Option<usize> {
        let index = usize::try_from(id.index).ok()?;
        self.clients.get(index).filter(|client| client.connection.id() == id).map(|_| index)
    }

    fn mark(&mut self, index: usize) {
        if let Some(client) = self.clients.get_mut(index).filter(|client| !client.dirty) {
            client.dirty = true;
            self.dirty.push(index);
        }
    }

    fn accept<B: Backend>(&mut self, backend: &mut B, registry: &mut impl Registry) {
        for _ in 0..ACCEPT_COUNT_MAX {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((socket, peer)) => {
                    // A socket that breaks at once concerns its client only.
                    let _ = self.admit(
                        socket,
                        peer,
                        backend.value_size_max(),
                        backend.is_memory_short(),
                        registry,
                    );
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection; trying again shortly");
                    let _ = registry.modify(listener.as_fd(), LISTENER_KEY, false, false);
                    self.resting_since_us = Some(backend.clock().monotonic_us);
                    return;
                }
            }
        }
    }

    fn admit(
        &mut self,
        mut socket: TcpStream,
        peer: SocketAddr,
        value_size_max: u64,
        is_memory_short: bool,
        registry: &mut impl Registry,
    ) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        if is_memory_short {
            self.statistics.rejected_count += 1;
            return socket.write_all(b"-OOM the node's memory is in use by other connections, try again\r\n");
        }
        if self.clients.len() >= self.connection_count_max {
            self.statistics.rejected_count += 1;
            return socket.write_all(b"-ERR max number of clients reached\r\n");
        }
        socket.set_nodelay(true)?;
        let entry = self.clients.vacant_entry();
        let index = u32::try_from(entry.key()).map_err(io::Error::other)?;
        registry.add(socket.as_fd(), u64::from(index), true, false)?;
        let id = ConnectionId { index, generation: self.generation };
        self.generation += 1;
        self.statistics.accepted_count += 1;
        let limits = RequestLimits {
            argument_size_max: usize::try_from(value_size_max).unwrap_or(usize::MAX),
            // A single long value passes, with the command around it.
            command_size_max: COMMAND_SIZE_MAX
                .max(usize::try_from(value_size_max).unwrap_or(usize::MAX) + (1 << 20)),
        };
        let connection = Connection::new(id, Some(peer), limits);
        let size = connection.size();
        self.statistics.connections_size += size as u64;
        entry.insert(Client {
            socket,
            connection,
            interest: (true, false),
            dirty: false,
            blocked: false,
            held_back: false,
            size,
        });
        Ok(())
    }

    /// When accepting or reading goes on after a rest, which no event announces.
    pub fn deadline_us(&self, now_us: u64) -> Option<u64> {
        let accepting = self.resting_since_us.map(|since_us| since_us + ACCEPT_REST_US);
        let reading = (!self.held_back.is_empty()).then_some(now_us + MEMORY_REST_US);
        accepting.into_iter().chain(reading).min()
    }

    /// Closes the connection that holds the most memory. False when none holds much.
    fn evict<B: Backend>(&mut self, backend: &mut B, registry: &mut impl Registry) -> bool {
        let largest = self.clients.iter().max_by_key(|(_, client)| client.size);
        let Some((index, client)) = largest.filter(|(_, client)| client.size >= EVICTED_SIZE_MIN) else {
            return false;
        };
        tracing::warn!(
            "memory is short: closing the connection that holds the most, {} bytes, of {}",
            client.size,
            client
                .socket
                .peer_addr()
                .map_or_else(|_| "a client that is gone".into(), |peer| peer.to_string())
        );
        self.statistics.evicted_count += 1;
        self.close(index, backend, registry);
        true
    }

    fn resume_accepting(&mut self, now_us: u64, registry: &mut impl Registry) {
        let rested =
            self.resting_since_us.is_some_and(|since_us| now_us.saturating_sub(since_us) >= ACCEPT_REST_US);
        if let Some(listener) = self.listener.as_ref().filter(|_| rested) {
            self.resting_since_us = None;
            let _ = registry.modify(listener.as_fd(), LISTENER_KEY, true, false);
        }
    }

    /// Reads what there is, within bounds; whether the connection lives.
    fn read<B: Backend>(&mut self, index: usize, backend: &mut B) -> bool {
        let Self { clients, scratch, statistics, held_back, .. } = self;
        let client = &mut clients[index];
        let mut total = 0;
        while total + SCRATCH_SIZE <= READ_SIZE_MAX && client.connection.wants_input() {
            if backend.is_memory_short() {
                if !client.held_back {
                    client.held_back = true;
                    held_back.push(index);
                }
                break;
            }
            match client.socket.read(scratch) {
                Ok(0) => client.connection.received_end(),
                Ok(size) => {
                    total += size;
                    statistics.received_bytes += size as u64;
                    client.connection.received(&scratch[..size]);
                    if size < SCRATCH_SIZE {
                        client.connection.advance(backend);
                        return true;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return false,
            }
            client.connection.advance(backend);
        }
        true
    }

    /// Writes once; how many bytes went out.
    fn write(&mut self, index: usize) -> io::Result<usize> {
        let client = &mut self.clients[index];
        if client.blocked || client.connection.output().is_empty() {
            return Ok(0);
        }
        match client.socket.write(client.connection.output()) {
            Ok(size) => {
                client.connection.sent(size);
                self.statistics.sent_bytes += size as u64;
                Ok(size)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                client.blocked = true;
                Ok(0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn close<B: Backend>(&mut self, index: usize, backend: &mut B, registry: &mut impl Registry) {
        let Some(mut client) = self.clients.try_remove(index) else { return };
        self.statistics.command_count += client.connection.take_command_count();
        self.statistics.connections_size -= client.size as u64;
        // Closing the descriptor ends the watch in any case.
        let _ = registry.remove(client.socket.as_fd());
        if !client.connection.is_idle() {
            backend.abandon(client.connection.id());
        }
        if let Some(request) = client.connection.close() {
            self.orphans.push_back((client.connection.id(), request));
        }
    }
}

/// Watches for what the client is ready for.
fn update(index: usize, client: &mut Client, registry: &mut impl Registry) -> io::Result<()> {
    let interest =
        (client.connection.wants_input() && !client.held_back, !client.connection.output().is_empty());
    if interest != client.interest {
        client.interest = interest;
        registry.modify(client.socket.as_fd(), index as u64, interest.0, interest.1)?;
    }
    Ok(())
}

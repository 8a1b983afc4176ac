//! A server on real sockets with epoll, over a fake node.

#![expect(clippy::unwrap_used, clippy::panic, reason = "the helpers of tests fail by panicking")]

#[expect(dead_code, reason = "shared by several test programs")]
mod resp_fake;

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use basalt::net::port::Port;
use basalt::net::server::{Readiness, Registry, Server};
use resp_fake::*;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

struct Epoll {
    fd: OwnedFd,
    watched: HashMap<i32, u64>,
}

fn flags(readable: bool, writable: bool) -> EventFlags {
    let mut flags = EventFlags::empty();
    flags.set(EventFlags::IN, readable);
    flags.set(EventFlags::OUT, writable);
    flags
}

impl Registry for Epoll {
    fn add(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()> {
        self.watched.insert(fd.as_raw_fd(), key);
        Ok(epoll::add(&self.fd, fd, EventData::new_u64(key), flags(readable, writable))?)
    }

    fn modify(&mut self, fd: BorrowedFd<'_>, key: u64, readable: bool, writable: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.fd, fd, EventData::new_u64(key), flags(readable, writable))?)
    }

    fn remove(&mut self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watched.remove(&fd.as_raw_fd());
        Ok(epoll::delete(&self.fd, fd)?)
    }
}

struct Node {
    server: Server,
    epoll: Epoll,
    fake: Fake,
    address: std::net::SocketAddr,
}

impl Node {
    fn new(connection_count_max: usize) -> Self {
        let mut port = Port::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut epoll = Epoll { fd: epoll::create(CreateFlags::CLOEXEC).unwrap(), watched: HashMap::new() };
        let server = Server::new(port.listener().unwrap(), connection_count_max, 100, &mut epoll).unwrap();
        Self { server, epoll, fake: Fake::default(), address: port.address() }
    }

    /// One loop of a reactor; how many events it had.
    fn turn(&mut self) -> usize {
        let mut events = Vec::with_capacity(64);
        let wait = rustix::event::Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        epoll::wait(&self.epoll.fd, rustix::buffer::spare_capacity(&mut events), Some(&wait)).unwrap();
        for event in &events {
            let (told, data) = (event.flags, event.data);
            let has = |flag| told.contains(flag);
            let ready = Readiness {
                readable: has(EventFlags::IN),
                writable: has(EventFlags::OUT),
                hangup: has(EventFlags::HUP) || has(EventFlags::ERR),
            };
            self.server.on_event(data.u64(), ready, &mut self.fake, &mut self.epoll);
        }
        self.server.pump(&mut self.fake, &mut self.epoll);
        events.len()
    }

    fn until(&mut self, mut done: impl FnMut(&Self) -> bool) {
        for _ in 0..2000 {
            if done(self) {
                return;
            }
            self.turn();
        }
        panic!("not done in 2000 turns: {:?}", self.server.statistics());
    }

    fn client(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    /// Sends everything and gathers as many bytes of replies, turning the loop meanwhile.
    fn exchange(&mut self, socket: &mut TcpStream, mut request: &[u8], size: usize) -> Vec<u8> {
        let (mut replies, mut piece) = (Vec::new(), vec![0; 1 << 16]);
        for _ in 0..5000 {
            if let Ok(written) = socket.write(request) {
                request = &request[written..];
            }
            self.turn();
            while let Ok(read @ 1..) = socket.read(&mut piece) {
                replies.extend_from_slice(&piece[..read]);
            }
            if request.is_empty() && replies.len() >= size {
                return replies;
            }
        }
        panic!("{} bytes of replies, {} unsent", replies.len(), request.len());
    }
}

#[test]
fn clients_are_served_and_counted() {
    let mut node = Node::new(10);
    let mut socket = node.client();
    let replies =
        node.exchange(&mut socket, &[line("SET a 1"), line("GET a"), line("CLIENT ID")].concat(), 18);
    assert_eq!(String::from_utf8_lossy(&replies), "+OK\r\n$1\r\n1\r\n:100\r\n");
    let statistics = node.server.statistics();
    assert_eq!((statistics.connection_count, statistics.command_count, statistics.sent_bytes), (1, 3, 18));
    // Once all is quiet there is nothing to do.
    node.turn();
    assert!(node.turn() == 0 && !node.server.needs_pump() && node.server.drained());
    drop(socket);
    node.until(|node| node.server.statistics().connection_count == 0);
    assert_eq!(node.epoll.watched.len(), 1);
}

#[test]
fn large_values_and_long_pipelines_get_through() {
    let mut node = Node::new(10);
    let mut socket = node.client();
    let value = vec![b'v'; 1 << 20];
    let request =
        [encode(&[b"SET", b"a", &value]), line("GET a").repeat(20), line("PING").repeat(5000)].concat();
    let expected = 5 + 20 * (1 + 7 + 2 + value.len() + 2) + 5000 * 7;
    assert_eq!(node.exchange(&mut socket, &request, expected).len(), expected);
}

#[test]
fn a_client_that_does_not_read_holds_up_nobody() {
    let mut node = Node::new(10);
    let (mut slow, mut other) = (node.client(), node.client());
    let value = vec![b'v'; 1 << 20];
    node.exchange(&mut other, &encode(&[b"SET", b"a", &value]), 5);
    slow.write_all(&line("GET a").repeat(200)).unwrap();
    for _ in 0..50 {
        node.turn();
    }
    assert_eq!(node.exchange(&mut other, &line("PING"), 7), b"+PONG\r\n");
    // It is blocked, and costs no turns.
    node.turn();
    assert!(node.turn() == 0 && !node.server.needs_pump());
    let expected = 200 * (1 + 7 + 2 + value.len() + 2);
    assert_eq!(node.exchange(&mut slow, b"", expected).len(), expected);
}

#[test]
fn too_many_clients_are_told_so() {
    let mut node = Node::new(1);
    let mut first = node.client();
    node.exchange(&mut first, &line("PING"), 7);
    let mut second = node.client();
    node.until(|node| node.server.statistics().rejected_count == 1);
    second.set_nonblocking(false).unwrap();
    second.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut reply = String::new();
    second.read_to_string(&mut reply).unwrap();
    assert_eq!(reply, "-ERR max number of clients reached\r\n");
    drop(first);
    node.until(|node| node.server.statistics().connection_count == 0);
    let mut third = node.client();
    node.exchange(&mut third, &line("PING"), 7);
}

#[test]
fn a_client_that_leaves_leaves_no_watch() {
    let mut node = Node::new(10);
    let mut socket = node.client();
    node.exchange(&mut socket, &line("WATCH a b"), 5);
    assert_eq!(node.fake.watch_count, 2);
    node.fake.refusals = 3;
    drop(socket);
    node.until(|node| node.fake.watch_count == 0 && node.server.drained());
}

#[test]
fn half_closed_clients_get_their_replies_and_the_end() {
    let mut node = Node::new(10);
    let mut socket = node.client();
    socket.write_all(&[line("SET a 1"), line("GET a")].concat()).unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    node.until(|node| {
        node.server.statistics().accepted_count == 1 && node.server.statistics().connection_count == 0
    });
    socket.set_nonblocking(false).unwrap();
    let mut replies = String::new();
    socket.read_to_string(&mut replies).unwrap();
    assert_eq!(replies, "+OK\r\n$1\r\n1\r\n");
}

#[test]
fn a_server_that_stops_finishes_what_it_owes() {
    let mut node = Node::new(10);
    let mut socket = node.client();
    node.exchange(&mut socket, &line("PING"), 7);
    node.server.stop_accepting(&mut node.epoll);
    assert!(TcpStream::connect(node.address).is_err());
    node.fake.deferred = true;
    socket.write_all(&line("SET a 1")).unwrap();
    node.until(|node| !node.fake.pending.is_empty());
    assert!(!node.server.drained());
    node.server.finish_connections();
    node.turn();
    let id = basalt::net::ConnectionId { index: 0, generation: 100 };
    let (slot, completed) = node.fake.pending.pop_front().unwrap();
    node.server.complete(id, slot, completed);
    node.until(|node| node.server.drained() && node.server.statistics().connection_count == 0);
    assert_eq!(node.epoll.watched.len(), 0);
    let _ = node.epoll.fd.as_fd();
}

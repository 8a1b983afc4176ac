//! An open-loop load: requests are due when a clock says so, not when the server has answered the ones before.
//!
//! Latency counts from when a request was due until its reply was read, so that a server that stalls is charged for every
//! request that would have been sent meanwhile (no coordinated omission). A connection carries as many requests as are due on
//! it. One thread does it all; what it is late itself is counted apart, in `Outcome::lateness`, and is part of the latency.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Exp1};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;

use super::wire::{Keyspace, excerpt};
use crate::Failure;

/// Encoded requests that wait for room in a socket.
const OUTPUT_SIZE_MAX: usize = 64 << 10;
/// Requests handed out before replies are looked for.
const HAND_OUT_MAX: usize = 64;
/// The longest latency that a histogram tells from longer ones.
const LATENCY_MAX: Duration = Duration::from_secs(100);

/// What is offered to a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// The server.
    pub address: SocketAddr,
    /// Connections; each request takes any of them.
    pub connections: usize,
    /// Requests per second, in the mean: gaps are exponential, as of many clients that know nothing of each other.
    pub rate: f64,
    /// For how long requests are due.
    pub duration: Duration,
    /// How long the last replies may take.
    pub patience: Duration,
    /// Reads instead of writes.
    pub read: bool,
    /// Keys, of which a request takes any. Reads verify what they hold.
    pub keys: Keyspace,
    /// The same seed makes the same requests due at the same moments.
    pub seed: u64,
}

/// What came of it. Nanoseconds.
pub struct Outcome {
    /// From when a request was due until its reply was read.
    pub latency: Histogram<u64>,
    /// From when a request was due until it was written, where its socket had room.
    pub lateness: Histogram<u64>,
}

impl Outcome {
    /// Whether lateness of the load itself is a small part of the latency, where it matters: in the tail.
    pub fn kept_up(&self) -> bool {
        self.lateness.value_at_quantile(0.99) <= self.latency.value_at_quantile(0.99) / 4
    }
}

#[derive(Debug, Clone, Copy)]
struct Request {
    due: Instant,
    key: u64,
}

struct Connection {
    stream: TcpStream,
    /// Due, and not encoded yet.
    waiting: VecDeque<Request>,
    /// Encoded, not answered; oldest first.
    pending: VecDeque<Request>,
    output: Vec<u8>,
    written: usize,
    input: Vec<u8>,
    /// The socket had no room for all of `output`; epoll tells when it has.
    blocked: bool,
}

/// A run of a load.
struct Generator<'a> {
    load: &'a Load,
    epoll: OwnedFd,
    connections: Vec<Connection>,
    random: StdRng,
    next_due: Instant,
    end: Instant,
    outstanding: u64,
    reply: Vec<u8>,
    outcome: Outcome,
}

/// Offers a load and takes the time of each request. Any wrong answer ends it.
pub fn run(load: &Load) -> Result<Outcome, Failure> {
    let mut generator = Generator::new(load)?;
    // The kernel may otherwise wake a sleeper 50 us after its time. Where it refuses, lateness shows it.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
    let done = generator.run();
    let _ = rustix::thread::set_current_timer_slack(None);
    done.map(|()| generator.outcome)
}

fn histogram() -> Result<Histogram<u64>, Failure> {
    Ok(Histogram::new_with_bounds(1, nanoseconds(LATENCY_MAX), 3)?)
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}

impl<'a> Generator<'a> {
    fn new(load: &'a Load) -> Result<Generator<'a>, Failure> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut connections = Vec::with_capacity(load.connections);
        for index in 0..load.connections {
            let stream = TcpStream::connect_timeout(&load.address, load.patience)?;
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            epoll::add(&epoll, &stream, epoll::EventData::new_u64(index as u64), epoll::EventFlags::IN)?;
            connections.push(Connection {
                stream,
                waiting: VecDeque::new(),
                pending: VecDeque::new(),
                output: Vec::new(),
                written: 0,
                input: Vec::new(),
                blocked: false,
            });
        }
        let start = Instant::now();
        let outcome = Outcome { latency: histogram()?, lateness: histogram()? };
        Ok(Generator {
            load,
            epoll,
            connections,
            random: StdRng::seed_from_u64(load.seed),
            next_due: start,
            end: start + load.duration,
            outstanding: 0,
            reply: Vec::new(),
            outcome,
        })
    }

    fn run(&mut self) -> Result<(), Failure> {
        let mut events = Vec::with_capacity(self.connections.len());
        let mut buffer = vec![0; 64 << 10];
        let give_up = self.end + self.load.patience;
        loop {
            self.hand_out()?;
            if self.next_due >= self.end && self.outstanding == 0 {
                return Ok(());
            }
            let now = Instant::now();
            if now > give_up {
                return Err(format!(
                    "{} of {} requests were not answered {:?} after the last one was due",
                    self.outstanding,
                    self.outstanding + self.outcome.latency.len(),
                    self.load.patience
                )
                .into());
            }
            let until = if self.next_due < self.end { self.next_due } else { give_up };
            let timeout = Timespec::try_from(until.saturating_duration_since(now))?;
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            for event in events.drain(..) {
                let data = event.data;
                let index = data.u64() as usize;
                // The kernel packs events on some architectures, so that their fields are copied.
                let flags = event.flags;
                if flags.contains(epoll::EventFlags::OUT) {
                    self.flush(index)?;
                }
                if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
                    self.read(index, &mut buffer)?;
                }
            }
        }
    }

    /// Gives what is due to connections, each at once.
    fn hand_out(&mut self) -> Result<(), Failure> {
        let now = Instant::now();
        for _ in 0..HAND_OUT_MAX {
            if self.next_due > now || self.next_due >= self.end {
                break;
            }
            let index = self.random.random_range(0..self.connections.len());
            let key = self.random.random_range(0..self.load.keys.count);
            self.connections[index].waiting.push_back(Request { due: self.next_due, key });
            self.outstanding += 1;
            let gap: f64 = Exp1.sample(&mut self.random);
            self.next_due += Duration::from_secs_f64(gap / self.load.rate);
            if !self.connections[index].blocked {
                self.flush(index)?;
            }
        }
        Ok(())
    }

    /// Encodes and writes what waits on a connection, as far as its socket has room.
    fn flush(&mut self, index: usize) -> Result<(), Failure> {
        let connection = &mut self.connections[index];
        let was_blocked = connection.blocked;
        connection.blocked = false;
        loop {
            if connection.written == connection.output.len() {
                connection.output.clear();
                connection.written = 0;
                let now = Instant::now();
                while connection.output.len() < OUTPUT_SIZE_MAX {
                    let Some(request) = connection.waiting.pop_front() else { break };
                    if self.load.read {
                        self.load.keys.get(request.key, &mut connection.output);
                    } else {
                        self.load.keys.set(request.key, &mut connection.output);
                    }
                    connection.pending.push_back(request);
                    // What waited for room is the server's doing, not ours.
                    if !was_blocked {
                        self.outcome.lateness.saturating_record(nanoseconds(now - request.due));
                    }
                }
                if connection.output.is_empty() {
                    break;
                }
            }
            match connection.stream.write(&connection.output[connection.written..]) {
                Ok(0) => return Err("the server takes no more requests".into()),
                Ok(size) => connection.written += size,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    connection.blocked = true;
                    break;
                }
                Err(error) => return Err(format!("a request cannot be written: {error}").into()),
            }
        }
        if connection.blocked != was_blocked {
            let mut flags = epoll::EventFlags::IN;
            flags.set(epoll::EventFlags::OUT, connection.blocked);
            epoll::modify(&self.epoll, &connection.stream, epoll::EventData::new_u64(index as u64), flags)?;
        }
        Ok(())
    }

    /// Takes the replies that have come on a connection, once round: epoll tells if there is more.
    fn read(&mut self, index: usize, buffer: &mut [u8]) -> Result<(), Failure> {
        let connection = &mut self.connections[index];
        match connection.stream.read(buffer) {
            Ok(0) => return Err("the server closed a connection".into()),
            Ok(size) => connection.input.extend_from_slice(&buffer[..size]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                return Ok(());
            }
            Err(error) => return Err(format!("replies cannot be read: {error}").into()),
        }
        let now = Instant::now();
        let mut taken = 0;
        while taken < connection.input.len() {
            let Some(&request) = connection.pending.front() else {
                return Err(format!("a reply that nobody asked for: {}", excerpt(&connection.input)).into());
            };
            self.reply.clear();
            if self.load.read {
                self.load.keys.bulk(request.key, &mut self.reply);
            } else {
                self.reply.extend_from_slice(b"+OK\r\n");
            }
            let have = &connection.input[taken..];
            if !have.starts_with(&self.reply) {
                if self.reply.starts_with(have) {
                    break;
                }
                let key = self.load.keys.key_with(&request.key.to_string());
                let (have, want) = (excerpt(have), excerpt(&self.reply));
                return Err(format!("{key} was answered with {have} instead of {want}").into());
            }
            taken += self.reply.len();
            connection.pending.pop_front();
            self.outstanding -= 1;
            self.outcome.latency.saturating_record(nanoseconds(now - request.due));
        }
        connection.input.drain(..taken);
        Ok(())
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;

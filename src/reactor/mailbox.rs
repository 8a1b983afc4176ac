//! The mesh: between any two reactors a ring of requests and a ring of answers each way, and the same between reactors and
//! in-process clients, except that nobody sends requests to a client.
//!
//! Invariants:
//! - Each ring has one producer and one consumer, so what one peer sends to another stays in order, requests and answers
//!   each for themselves.
//! - Full is a normal result and gives the message back. Nothing is dropped and nothing queues up behind a ring; whoever
//!   is refused keeps the message and stops taking what would make more of them.
//! - What is sent is seen after the next `flush`, at the latest: one publish per ring and at most one wake-up per peer,
//!   however many messages there were.
//! - `flush` also wakes a sleeping peer that was refused and has room now, so back-pressure never turns into a standstill.
//!   It is therefore to be called after receiving too, once per pass ("rings out").
//! - Nothing is allocated after the mesh has been made.

use std::time::{Duration, Instant};

use super::wake::{EventFd, Parker, Waker};
use crate::reactor::poller::PollerError;
use crate::ring::park;
use crate::ring::{Consumer, Full, Producer, channel};

/// Makes the ends of `reactors` reactors, in their order. Rings hold `capacity` messages.
///
/// Ends can't wake anyone until they are connected: see [`MeshEnd::connect`]. A simulation never needs to.
///
/// # Panics
/// When `capacity` is not a power of two, at least 2.
pub fn mesh<Q: Send, A: Send>(reactors: usize, capacity: usize) -> Vec<MeshEnd<Q, A>> {
    link(reactors, 0, capacity).into_iter().map(MeshEnd).collect()
}

/// Makes the ends of `reactors` reactors and of `clients` in-process clients. To a reactor, client `n` is the peer
/// `reactors + n`. Reactors can wake clients from the beginning.
///
/// # Panics
/// When `capacity` is not a power of two, at least 2.
#[expect(clippy::type_complexity, reason = "two lists; a struct would be taken apart at once")]
pub fn mesh_with_clients<Q: Send, A: Send>(
    reactors: usize,
    clients: usize,
    capacity: usize,
) -> Result<(Vec<MeshEnd<Q, A>>, Vec<ClientEnd<Q, A>>), PollerError> {
    let mut ends = link(reactors, clients, capacity);
    let mut client_ends = Vec::with_capacity(clients);
    for mut end in ends.split_off(reactors) {
        let eventfd = EventFd::new().map_err(PollerError::of("create an eventfd"))?;
        let (parker, waker) = park::pair(eventfd);
        ends.iter_mut().for_each(|reactor| reactor.link(end.index).waker = Some(waker.clone()));
        // Links to other clients were never made.
        end.links.truncate(reactors);
        client_ends.push(ClientEnd { end, parker });
    }
    Ok((ends.into_iter().map(MeshEnd).collect(), client_ends))
}

/// One reactor's end of the mesh.
pub struct MeshEnd<Q, A>(End<Q, A>);

impl<Q: Send, A: Send> MeshEnd<Q, A> {
    /// Hands over the wakers of all reactors, in their order, so that `flush` can wake them.
    pub fn connect(&mut self, wakers: &[Waker]) {
        self.0.connect(wakers);
    }

    /// This reactor's number.
    pub fn index(&self) -> usize {
        self.0.index
    }

    /// Peers, this reactor and clients included: their numbers are below this.
    pub fn peer_count(&self) -> usize {
        self.0.links.len()
    }

    /// Sends a request to another reactor. Seen after `flush`.
    ///
    /// # Panics
    /// When `to` is this reactor, a client, or nobody.
    #[inline]
    pub fn send_request(&mut self, to: usize, request: Q) -> Result<(), Full<Q>> {
        self.0.link(to).send_request(request)
    }

    /// Sends an answer to a peer that sent a request. Seen after `flush`.
    ///
    /// # Panics
    /// When `to` is this reactor, or nobody.
    #[inline]
    pub fn send_answer(&mut self, to: usize, answer: A) -> Result<(), Full<A>> {
        self.0.link(to).send_answer(answer)
    }

    /// Takes up to `max_per_peer` requests of each peer, oldest first. Returns how many there were. Taking few while there
    /// is no room for their answers is how back-pressure travels on.
    pub fn receive_requests(&mut self, max_per_peer: usize, mut each: impl FnMut(usize, Q)) -> usize {
        self.0.sum(|from, link| link.receive_requests(max_per_peer, |request| each(from, request)))
    }

    /// Takes up to `max` requests of one peer: for a reactor that decides peer by peer what it has room for.
    pub fn receive_requests_of(&mut self, from: usize, max: usize, each: impl FnMut(Q)) -> usize {
        self.0.link(from).receive_requests(max, each)
    }

    /// Takes up to `max_per_peer` answers of each peer, oldest first. Returns how many there were.
    pub fn receive_answers(&mut self, max_per_peer: usize, mut each: impl FnMut(usize, A)) -> usize {
        self.0.sum(|from, link| link.receive_answers(max_per_peer, |answer| each(from, answer)))
    }

    /// Rings out: publishes what was sent and wakes the peers that sleep and have reason not to.
    pub fn flush(&mut self) {
        self.0.flush();
    }

    /// Whether a peer's end is gone. What it sent before can still be received.
    pub fn is_abandoned(&self, peer: usize) -> bool {
        self.0.is_abandoned(peer)
    }
}

/// An in-process client's end of the mesh: it sends requests to every reactor and waits for their answers.
pub struct ClientEnd<Q, A> {
    // Before `parker`, so that reactors find the rings abandoned while they can still be told.
    end: End<Q, A>,
    parker: Parker,
}

impl<Q: Send, A: Send> ClientEnd<Q, A> {
    /// Hands over the wakers of all reactors, in their order, so that `flush` can wake them.
    pub fn connect(&mut self, wakers: &[Waker]) {
        self.end.connect(wakers);
    }

    /// How many reactors there are: their numbers are below this.
    pub fn reactor_count(&self) -> usize {
        self.end.links.len()
    }

    /// Sends a request to a reactor. Seen after `flush`, which `wait` does too.
    ///
    /// # Panics
    /// When there is no such reactor.
    #[inline]
    pub fn send_request(&mut self, to: usize, request: Q) -> Result<(), Full<Q>> {
        self.end.link(to).send_request(request)
    }

    /// Takes up to `max_per_peer` answers of each reactor, oldest first. Returns how many there were.
    pub fn receive_answers(&mut self, max_per_peer: usize, mut each: impl FnMut(usize, A)) -> usize {
        self.end.sum(|from, link| link.receive_answers(max_per_peer, |answer| each(from, answer)))
    }

    /// Publishes what was sent and wakes the reactors that sleep and have reason not to.
    pub fn flush(&mut self) {
        self.end.flush();
    }

    /// Whether a reactor's end is gone. What it answered before can still be received.
    pub fn is_abandoned(&self, reactor: usize) -> bool {
        self.end.is_abandoned(reactor)
    }

    /// Flushes, then sleeps until there is an answer, room for a request that was refused, or a reactor's end goes (said
    /// once), or until `timeout` is over. Returns whether there is any of that.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<bool, PollerError> {
        self.flush();
        let started = Instant::now();
        let ClientEnd { end, parker } = self;
        loop {
            if end.has_news() {
                return Ok(true);
            }
            let left = timeout.map(|timeout| timeout.saturating_sub(started.elapsed()));
            match parker.park(|| end.has_news(), |eventfd| eventfd.wait(left)) {
                None => return Ok(true),
                // A wake for news that was found without it ends the next sleep: that is no news.
                Some(Ok(())) if left != Some(Duration::ZERO) => {}
                Some(Ok(())) => return Ok(end.has_news()),
                Some(Err(source)) => return Err(PollerError { action: "wait for answers", source }),
            }
        }
    }
}

/// One party's end: what reactors and clients have in common.
struct End<Q, A> {
    index: usize,
    /// By peer number. `None` where there is nothing: at its own number.
    links: Vec<Option<Link<Q, A>>>,
}

impl<Q, A> End<Q, A> {
    fn connect(&mut self, wakers: &[Waker]) {
        for (link, waker) in self.links.iter_mut().zip(wakers) {
            if let Some(link) = link {
                link.waker = Some(waker.clone());
            }
        }
    }

    #[inline]
    fn link(&mut self, peer: usize) -> &mut Link<Q, A> {
        self.links
            .get_mut(peer)
            .and_then(Option::as_mut)
            .expect("a peer's number is below peer_count and not one's own")
    }

    fn sum(&mut self, mut receive: impl FnMut(usize, &mut Link<Q, A>) -> usize) -> usize {
        let mut count = 0;
        for (peer, link) in self.links.iter_mut().enumerate() {
            if let Some(link) = link {
                count += receive(peer, link);
            }
        }
        count
    }

    fn flush(&mut self) {
        self.links.iter_mut().flatten().for_each(Link::flush);
    }

    fn is_abandoned(&self, peer: usize) -> bool {
        self.links.get(peer).and_then(Option::as_ref).is_some_and(|link| link.answers_out.is_abandoned())
    }

    fn has_news(&mut self) -> bool {
        self.links.iter_mut().flatten().any(Link::has_news)
    }
}

impl<Q, A> Drop for End<Q, A> {
    fn drop(&mut self) {
        // Peers that sleep must see that this end is gone: first the rings go, then they are woken.
        for link in self.links.drain(..).flatten() {
            let waker = link.waker.clone();
            drop(link);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

/// The four rings between one party and one peer, as the one sees them.
struct Link<Q, A> {
    /// `None` towards a client.
    requests_out: Option<Producer<Q>>,
    /// `None` from a reactor to a client, seen from the client.
    requests_in: Option<Consumer<Q>>,
    answers_out: Producer<A>,
    answers_in: Consumer<A>,
    waker: Option<Waker>,
    /// A request was refused and has not been tried again.
    refused: bool,
    /// The owner knows that the peer is gone: reported once, or a client could not wait for the others.
    gone_told: bool,
    /// Something was taken since the last flush, so there may be a starved peer with room now.
    took: bool,
}

impl<Q, A> Link<Q, A> {
    #[inline]
    fn send_request(&mut self, request: Q) -> Result<(), Full<Q>> {
        let ring = self.requests_out.as_mut().expect("requests go to reactors, never to clients");
        let result = ring.stage(request);
        self.refused = result.is_err();
        result
    }

    #[inline]
    fn send_answer(&mut self, answer: A) -> Result<(), Full<A>> {
        self.answers_out.stage(answer)
    }

    fn receive_requests(&mut self, max: usize, each: impl FnMut(Q)) -> usize {
        let count = self.requests_in.as_mut().map_or(0, |ring| ring.drain(max, each));
        self.took |= count > 0;
        count
    }

    fn receive_answers(&mut self, max: usize, each: impl FnMut(A)) -> usize {
        let count = self.answers_in.drain(max, each);
        self.took |= count > 0;
        count
    }

    fn flush(&mut self) {
        let mut wake = self.answers_out.staged() > 0;
        self.answers_out.publish();
        if let Some(ring) = &mut self.requests_out {
            wake |= ring.staged() > 0;
            ring.publish();
        }
        if self.took {
            self.took = false;
            // Both are asked, always: each clears its own flag.
            wake |= self.answers_in.take_starved();
            wake |= self.requests_in.as_mut().is_some_and(Consumer::take_starved);
        }
        if wake && let Some(waker) = &self.waker {
            waker.wake();
        }
    }

    fn is_gone(&mut self) -> bool {
        self.gone_told = self.answers_in.is_abandoned();
        self.gone_told
    }

    fn has_news(&mut self) -> bool {
        !self.answers_in.is_empty()
            || (!self.gone_told && self.is_gone())
            || (self.refused && self.requests_out.as_mut().is_some_and(Producer::has_room))
    }
}

/// Makes the rings between every two parties of which at least one is a reactor. Clients come after the reactors.
fn link<Q, A>(reactors: usize, clients: usize, capacity: usize) -> Vec<End<Q, A>> {
    let parties = reactors + clients;
    let mut ends: Vec<End<Q, A>> =
        (0..parties).map(|index| End { index, links: (0..parties).map(|_| None).collect() }).collect();
    for one in 0..reactors {
        for other in one + 1..parties {
            let client = other >= reactors;
            let (request_there, request_here) = if client { (None, None) } else { some(channel(capacity)) };
            let (request_back, request_from) = some(channel(capacity));
            let (answer_there, answer_here) = channel(capacity);
            let (answer_back, answer_from) = channel(capacity);
            ends[one].links[other] = Some(Link {
                requests_out: request_there,
                requests_in: request_from,
                answers_out: answer_there,
                answers_in: answer_from,
                waker: None,
                refused: false,
                gone_told: false,
                took: false,
            });
            ends[other].links[one] = Some(Link {
                requests_out: request_back,
                requests_in: request_here,
                answers_out: answer_back,
                answers_in: answer_here,
                waker: None,
                refused: false,
                gone_told: false,
                took: false,
            });
        }
    }
    ends
}

fn some<T, U>((one, other): (T, U)) -> (Option<T>, Option<U>) {
    (Some(one), Some(other))
}

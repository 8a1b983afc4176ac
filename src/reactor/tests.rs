//! Reactors that exchange messages, sleep and are woken, each way that there is.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::control::{self, ControlReceiver, ControlSender};
use super::cores::CoreError;
use super::mailbox::{ClientEnd, MeshEnd, mesh, mesh_with_clients};
use super::poller::{Event, Interest, Poller};
use super::run::{Progress, RunStats, SpinPolicy, Work, run};
use super::sleeper::Sleeper;
use super::thread::{ReactorThread, SpawnError, spawn};
use super::wake::Waker;

/// Long enough that reaching it is a failure, on any machine.
const FOREVER: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq)]
struct Stop;

fn sleepers(count: usize) -> (Vec<Sleeper>, Vec<Waker>) {
    let sleepers: Vec<_> = (0..count).map(|_| Sleeper::new().unwrap()).collect();
    let wakers = sleepers.iter().map(Sleeper::waker).collect();
    (sleepers, wakers)
}

/// Runs until it is told to stop, answers every request with its double, keeps what is refused and tries again, and sends
/// `to_send` requests to every other reactor.
struct Doubler {
    end: MeshEnd<u64, u64>,
    reactors: usize,
    control: ControlReceiver<Stop>,
    to_send: u64,
    /// By reactor: requests sent, answers received.
    sent: Vec<u64>,
    answered: Vec<u64>,
    /// By peer: the request that is expected next.
    expected: Vec<u64>,
    /// An answer that was refused: no more requests are taken until it is gone.
    owed: VecDeque<(usize, u64)>,
    refused_count: u64,
    stopped: bool,
    report: Option<std::sync::mpsc::Sender<usize>>,
}

impl Doubler {
    fn new(end: MeshEnd<u64, u64>, reactors: usize, to_send: u64, control: ControlReceiver<Stop>) -> Self {
        let peers = end.peer_count();
        Doubler {
            end,
            reactors,
            control,
            to_send,
            sent: vec![0; reactors],
            answered: vec![0; reactors],
            expected: vec![0; peers],
            owed: VecDeque::new(),
            refused_count: 0,
            stopped: false,
            report: None,
        }
    }

    fn pay(&mut self) -> usize {
        let mut count = 0;
        while let Some(&(to, answer)) = self.owed.front() {
            if self.end.send_answer(to, answer).is_err() {
                self.refused_count += 1;
                break;
            }
            self.owed.pop_front();
            count += 1;
        }
        count
    }
}

impl Work for Doubler {
    fn poll(&mut self, _poller: &mut Poller, _events: &[Event]) -> Progress {
        let mut count = self.pay();
        let answered = &mut self.answered;
        count += self.end.receive_answers(16, |from, answer| {
            assert_eq!(answer, 2 * answered[from], "lost or out of order");
            answered[from] += 1;
        });
        if self.owed.is_empty() {
            let (expected, owed) = (&mut self.expected, &mut self.owed);
            count += self.end.receive_requests(4, |from, request| {
                assert_eq!(request, expected[from], "lost or out of order");
                expected[from] += 1;
                owed.push_back((from, 2 * request));
            });
            self.pay();
        }
        let me = self.end.index();
        for to in (0..self.reactors).filter(|&to| to != me) {
            while self.sent[to] < self.to_send {
                if self.end.send_request(to, self.sent[to]).is_err() {
                    self.refused_count += 1;
                    break;
                }
                self.sent[to] += 1;
                count += 1;
            }
        }
        self.end.flush();
        let complete = (0..self.reactors).all(|peer| peer == me || self.answered[peer] == self.to_send);
        if complete && let Some(report) = self.report.take() {
            report.send(me).unwrap();
        }
        if let Some(Stop) = self.control.receive() {
            self.stopped = true;
        }
        if count > 0 { Progress::Busy } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        // No timer to help out: a lost wake-up is a hang.
        None
    }

    fn finished(&self) -> bool {
        self.stopped
    }
}

type Started<W> = (ReactorThread<(W, RunStats)>, ControlSender<Stop>);

fn start<W: Work + Send + 'static>(
    index: usize,
    mut sleeper: Sleeper,
    spin: SpinPolicy,
    make: impl FnOnce(ControlReceiver<Stop>, &mut Poller) -> W,
) -> Started<W> {
    let (sender, receiver) = control::channel(4, sleeper.waker());
    let mut work = make(receiver, sleeper.poller());
    let thread = spawn(index, None, "test", move || {
        let stats = run(&mut work, &mut sleeper, spin).unwrap();
        (work, stats)
    });
    (thread.unwrap(), sender)
}

#[test]
fn three_reactors_exchange_everything_through_tiny_rings() {
    let to_send = 20_000;
    for spin in [SpinPolicy::For(Duration::ZERO), SpinPolicy::default()] {
        let (sleepers, wakers) = sleepers(3);
        let (report, reports) = std::sync::mpsc::channel();
        let started: Vec<_> = mesh(3, 2)
            .into_iter()
            .zip(sleepers)
            .map(|(mut end, sleeper)| {
                end.connect(&wakers);
                let report = report.clone();
                start(end.index(), sleeper, spin, move |control, _| {
                    let mut work = Doubler::new(end, 3, to_send, control);
                    work.report = Some(report);
                    work
                })
            })
            .collect();
        for _ in 0..3 {
            reports.recv_timeout(FOREVER).expect("a reactor hangs");
        }
        started.iter().for_each(|(_, control)| control.send(Stop).unwrap());
        let mut refused_count = 0;
        for (index, (thread, _)) in started.into_iter().enumerate() {
            let (work, stats) = thread.join().unwrap();
            for peer in (0..3).filter(|&peer| peer != index) {
                assert_eq!((work.answered[peer], work.expected[peer]), (to_send, to_send));
            }
            assert!(work.owed.is_empty() && stats.busy_count > 0);
            refused_count += work.refused_count;
        }
        assert!(refused_count > 0, "rings of two were never full: the test tests nothing");
    }
}

/// One reactor and clients, without a socket in sight.
fn one_reactor_and_clients(clients: usize, capacity: usize) -> (Started<Doubler>, Vec<ClientEnd<u64, u64>>) {
    let (mut sleepers, wakers) = sleepers(1);
    let (mut ends, mut clients) = mesh_with_clients(1, clients, capacity).unwrap();
    clients.iter_mut().for_each(|client| client.connect(&wakers));
    let end = ends.pop().unwrap();
    let started = start(0, sleepers.pop().unwrap(), SpinPolicy::For(Duration::ZERO), |control, _| {
        Doubler::new(end, 1, 0, control)
    });
    (started, clients)
}

#[test]
fn clients_wake_a_sleeping_reactor_and_sleep_for_the_answer() {
    let ((thread, control), clients) = one_reactor_and_clients(2, 4);
    let callers: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            std::thread::spawn(move || {
                assert_eq!(client.reactor_count(), 1);
                let (mut next, mut answered) = (0, 0);
                while answered < 5_000 {
                    while next < 5_000 && client.send_request(0, next).is_ok() {
                        next += 1;
                    }
                    let got = client.receive_answers(16, |from, answer| {
                        assert_eq!((from, answer), (0, 2 * answered));
                        answered += 1;
                    });
                    if got == 0 {
                        assert!(client.wait(Some(FOREVER)).unwrap(), "no answer came");
                    }
                }
            })
        })
        .collect();
    callers.into_iter().for_each(|caller| caller.join().unwrap());
    control.send(Stop).unwrap();
    let (work, stats) = thread.join().unwrap();
    assert_eq!(work.expected, [0, 5_000, 5_000]);
    assert!(stats.sleep_count > 0, "the reactor never slept: the test tests nothing");
}

#[test]
fn a_reactor_that_sleeps_on_a_full_ring_is_woken_by_room_alone() {
    let ((thread, control), mut clients) = one_reactor_and_clients(1, 2);
    let mut client = clients.pop().unwrap();
    let mut next = 0;
    // Twice what the ring of answers holds, and not one of them taken.
    while next < 4 {
        match client.send_request(0, next) {
            Ok(()) => next += 1,
            Err(_) => std::thread::yield_now(),
        }
        client.flush();
    }
    // Gives the reactor time to be refused and to fall asleep; the test holds without it.
    std::thread::sleep(Duration::from_millis(20));
    let mut answered = 0;
    while answered < 4 {
        // From here on the client sends nothing that could wake the reactor by itself.
        assert!(client.wait(Some(FOREVER)).unwrap(), "stuck after {answered} answers");
        client.receive_answers(1, |_, answer| {
            assert_eq!(answer, 2 * answered);
            answered += 1;
        });
    }
    control.send(Stop).unwrap();
    assert!(thread.join().unwrap().0.owed.is_empty());
}

#[test]
fn a_waiting_client_is_told_once_that_a_reactor_is_gone() {
    let ((thread, control), mut clients) = one_reactor_and_clients(1, 2);
    let mut client = clients.pop().unwrap();
    assert!(!client.wait(Some(Duration::from_millis(1))).unwrap(), "nothing has happened");
    let stopper = std::thread::spawn(move || {
        control.send(Stop).unwrap();
        drop(thread.join().unwrap());
    });
    assert!(client.wait(Some(FOREVER)).unwrap());
    assert!(client.is_abandoned(0));
    assert!(!client.wait(Some(Duration::from_millis(1))).unwrap());
    stopper.join().unwrap();
}

/// Echoes bytes from a socket until it hangs up.
struct Echo {
    stream: UnixStream,
    hung_up: bool,
}

impl Work for Echo {
    fn poll(&mut self, poller: &mut Poller, events: &[Event]) -> Progress {
        for event in events {
            assert_eq!(event.key, 7);
            let mut bytes = [0; 16];
            match self.stream.read(&mut bytes).unwrap() {
                0 => {
                    poller.deregister(&self.stream).unwrap();
                    self.hung_up = true;
                }
                count => self.stream.write_all(&bytes[..count]).unwrap(),
            }
        }
        if events.is_empty() { Progress::Idle } else { Progress::Busy }
    }

    fn deadline(&self) -> Option<Duration> {
        None
    }

    fn finished(&self) -> bool {
        self.hung_up
    }
}

#[test]
fn a_socket_wakes_a_sleeping_reactor() {
    let (mut here, there) = UnixStream::pair().unwrap();
    here.set_read_timeout(Some(FOREVER)).unwrap();
    let (thread, _control) =
        start(0, Sleeper::new().unwrap(), SpinPolicy::For(Duration::ZERO), |_, poller| {
            there.set_nonblocking(true).unwrap();
            poller.register(&there, 7, Interest::None).unwrap();
            poller.modify(&there, 7, Interest::Read).unwrap();
            Echo { stream: there, hung_up: false }
        });
    for byte in 0..100_u8 {
        if byte == 50 {
            // Gives the reactor time to fall asleep, which it may not have had before.
            std::thread::sleep(Duration::from_millis(100));
        }
        here.write_all(&[byte]).unwrap();
        let mut back = [0; 1];
        here.read_exact(&mut back).unwrap();
        assert_eq!(back, [byte]);
    }
    drop(here);
    let (_, stats) = thread.join().unwrap();
    assert!(stats.sleep_count > 0);
}

#[test]
fn readiness_is_reported_as_it_is() {
    let mut sleeper = Sleeper::new().unwrap();
    let (mut here, there) = UnixStream::pair().unwrap();
    let mut events = Vec::new();
    sleeper.poller().register(&there, 1, Interest::ReadWrite).unwrap();
    sleeper.check_events(&mut events).unwrap();
    assert_eq!(events, [Event { key: 1, readable: false, writable: true, hangup: false }]);
    here.write_all(b"x").unwrap();
    sleeper.poller().modify(&there, 2, Interest::Read).unwrap();
    // Level-triggered: reported until it is read.
    for _ in 0..2 {
        sleeper.check_events(&mut events).unwrap();
        assert_eq!(events, [Event { key: 2, readable: true, writable: false, hangup: false }]);
    }
    sleeper.poller().modify(&there, 2, Interest::None).unwrap();
    sleeper.check_events(&mut events).unwrap();
    assert_eq!(events, []);
    drop(here);
    sleeper.check_events(&mut events).unwrap();
    assert_eq!(events, [Event { key: 2, readable: true, writable: false, hangup: true }]);
    sleeper.poller().deregister(&there).unwrap();
    sleeper.check_events(&mut events).unwrap();
    assert_eq!(events, []);
    let error = sleeper.poller().deregister(&there).unwrap_err();
    assert!(error.to_string().starts_with("cannot stop watching a descriptor: "), "{error}");
}

/// Waits for a point in time with nothing but its deadline.
struct Alarm {
    at: Instant,
    control: ControlReceiver<Stop>,
    stopped: bool,
    cpu_used: Duration,
}

impl Alarm {
    fn after(wait: Duration, control: ControlReceiver<Stop>) -> Self {
        Alarm { at: Instant::now() + wait, control, stopped: false, cpu_used: Duration::ZERO }
    }
}

impl Work for Alarm {
    fn poll(&mut self, _poller: &mut Poller, _events: &[Event]) -> Progress {
        self.stopped |= self.control.receive().is_some();
        let now = clock_gettime(ClockId::ThreadCPUTime);
        self.cpu_used = Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec as u32);
        Progress::Idle
    }

    fn deadline(&self) -> Option<Duration> {
        Some(self.at.saturating_duration_since(Instant::now()))
    }

    fn finished(&self) -> bool {
        self.stopped || Instant::now() >= self.at
    }
}

#[test]
fn a_deadline_wakes_a_sleeping_reactor_which_idles_for_almost_nothing() {
    let wait = Duration::from_millis(300);
    let (thread, _control) =
        start(0, Sleeper::new().unwrap(), SpinPolicy::default(), |control, _| Alarm::after(wait, control));
    let (work, stats) = thread.join().unwrap();
    assert!(!work.stopped && stats.sleep_count > 0);
    // Processor time, not wall time: a crowded machine doesn't change it.
    assert!(work.cpu_used < wait / 5, "idling for {wait:?} took {:?} of processor time", work.cpu_used);
}

#[test]
fn control_wakes_a_sleeping_reactor_and_a_spinning_one() {
    for spin in [SpinPolicy::For(Duration::ZERO), SpinPolicy::Forever] {
        let (thread, control) =
            start(0, Sleeper::new().unwrap(), spin, |control, _| Alarm::after(FOREVER, control));
        // Gives it time to fall asleep; the test holds without it.
        std::thread::sleep(Duration::from_millis(20));
        control.send(Stop).unwrap();
        let (work, stats) = thread.join().unwrap();
        assert!(work.stopped, "it ran into its deadline");
        assert_eq!(stats.sleep_count == 0, spin == SpinPolicy::Forever);
    }
}

#[test]
fn control_that_nobody_reads_is_refused_at_its_capacity() {
    let sleeper = Sleeper::new().unwrap();
    let (sender, mut receiver) = control::channel(2, sleeper.waker());
    sender.send(1).unwrap();
    sender.clone().send(2).unwrap();
    assert_eq!(sender.send(3).unwrap_err().0, 3);
    assert_eq!((receiver.receive(), receiver.receive(), receiver.receive()), (Some(1), Some(2), None));
}

#[test]
fn a_wake_before_the_sleep_is_kept() {
    let mut sleeper = Sleeper::new().unwrap();
    let waker = sleeper.waker();
    let mut events = Vec::new();
    let before = Instant::now();
    let slept = sleeper.sleep(&mut events, |_| {
        // Between the announcement and the sleep: the worst moment.
        waker.wake();
        super::sleeper::Rest::For(FOREVER)
    });
    assert!(slept.unwrap() && before.elapsed() < FOREVER && events.is_empty());
}

#[test]
fn a_core_that_can_not_be_pinned_is_an_error_of_the_starter() {
    let core = rustix::thread::CpuSet::MAX_CPU - 1;
    let error = spawn(3, Some(core), "test", || unreachable!("ran on the wrong core")).unwrap_err();
    assert!(
        matches!(error, SpawnError::Pin { index: 3, source: CoreError::PinFailed { core: named } } if named == core)
    );
    let usable = super::cores::usable().unwrap()[0];
    let on = spawn(0, Some(usable), "test", rustix::thread::sched_getcpu).unwrap().join().unwrap();
    assert_eq!(on, usable);
}

#[test]
#[should_panic(expected = "not one's own")]
fn a_reactor_does_not_send_to_itself() {
    let mut ends = mesh::<u8, u8>(2, 2);
    let _ = ends[1].send_request(1, 0);
}

#[test]
#[should_panic(expected = "never to clients")]
fn a_client_takes_no_requests() {
    let (mut ends, _clients) = mesh_with_clients::<u8, u8>(1, 1, 2).unwrap();
    let _ = ends[0].send_request(1, 0);
}

#[test]
fn what_is_sent_is_hidden_until_it_is_flushed() {
    let mut ends = mesh::<u8, u8>(2, 2);
    let mut other = ends.pop().unwrap();
    let mut one = ends.pop().unwrap();
    one.send_request(1, 5).unwrap();
    one.send_answer(1, 6).unwrap();
    let ignore = |_, _| panic!("seen too early");
    assert_eq!((other.receive_requests(9, ignore), other.receive_answers(9, ignore)), (0, 0));
    one.flush();
    let mut seen = Vec::new();
    other.receive_requests(9, |from, request| seen.push((from, request)));
    other.receive_answers(9, |from, answer| seen.push((from, answer)));
    assert_eq!(seen, [(0, 5), (0, 6)]);
    drop(one);
    assert!(other.is_abandoned(0));
}

//! Against SPDK's own target over NVMe/TCP on loopback.

#![expect(unsafe_code, reason = "a connection of SPDK's is broken by its descriptor")]

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::controller::{Phase, State, namespace_info};
use super::*;
use crate::device::conformance::{conforms, drain};
use crate::device::{Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token};

#[path = "../../../tests/common/nvmf_target.rs"]
#[expect(dead_code, reason = "shared with the tests from outside, which use other parts")]
mod nvmf_target;

use nvmf_target::{Backing, Target};

const MALLOC: Backing = Backing::Malloc { size_mib: 16, block_size: 512 };
const MALLOC_4K: Backing = Backing::Malloc { size_mib: 16, block_size: 4096 };

fn options() -> SpdkOptions {
    SpdkOptions {
        env: EnvOptions { no_hugepages: true, ..EnvOptions::default() },
        queue_count: 4,
        ..SpdkOptions::default()
    }
}

fn open(target: &Target, index: usize) -> SpdkNamespace {
    open_with(target, index, &options()).unwrap()
}

fn open_with(target: &Target, index: usize, options: &SpdkOptions) -> Result<SpdkNamespace, DeviceError> {
    SpdkNamespace::open(&TransportId::parse(&target.transport_id(index)).unwrap(), options)
}

#[test]
fn spdk_conforms_on_512_byte_blocks() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    assert_eq!((namespace.geometry().block_size, namespace.geometry().partition_block_size), (4096, 512));
    conforms(|| namespace.open_queue().unwrap());
}

#[test]
fn spdk_conforms_on_4096_byte_blocks() {
    let target = Target::start(&[MALLOC_4K]);
    let namespace = open(&target, 0);
    assert_eq!((namespace.geometry().block_size, namespace.geometry().partition_block_size), (4096, 4096));
    conforms(|| namespace.open_queue().unwrap());
}

#[test]
fn spdk_conforms_on_a_file_behind_the_target() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("target.bin");
    std::fs::write(&path, vec![0; 16 << 20]).unwrap();
    let target = Target::start(&[Backing::File { path, block_size: 512 }]);
    let namespace = open(&target, 0);
    conforms(|| namespace.open_queue().unwrap());
}

/// Bytes go where the other engines would have put them.
#[test]
fn what_spdk_writes_the_file_engines_read() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("target.bin");
    std::fs::write(&path, vec![0; 16 << 20]).unwrap();
    let target = Target::start(&[Backing::File { path: path.clone(), block_size: 4096 }]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    write(&mut queue, 1 << 20, 64 << 10, 7).unwrap();
    run(&mut queue, IoOp::Flush).unwrap();
    drop((queue, namespace, target));
    let bytes = std::fs::read(&path).unwrap();
    let from = bytes.iter().position(|byte| *byte != 0);
    assert_eq!((from, bytes.iter().filter(|byte| **byte == 7).count()), (Some(1 << 20), 64 << 10));
}

/// Runs one operation to its end.
fn run(queue: &mut SpdkQueue, op: IoOp) -> Result<Option<DmaBuf>, IoError> {
    queue.submit(Io { token: Token(7), op }).map_err(|rejected| match rejected.why {
        Refusal::Failed(error) => error,
        Refusal::Full => panic!("the queue is full"),
    })?;
    let done = drain(queue).pop().unwrap();
    done.status.map(|()| done.buf)
}

fn write(queue: &mut SpdkQueue, offset: u64, size: usize, byte: u8) -> Result<(), IoError> {
    let mut buf = queue.allocate(size).unwrap();
    buf.fill(byte);
    run(queue, IoOp::Write { offset, buf, fua: false }).map(|_| ())
}

fn read(queue: &mut SpdkQueue, offset: u64, size: usize) -> Result<Vec<u8>, IoError> {
    let buf = queue.allocate(size).unwrap();
    run(queue, IoOp::Read { offset, buf }).map(|buf| buf.unwrap().to_vec())
}

/// Polls until the queue takes commands again.
fn wait_until_back(queue: &mut SpdkQueue) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let mut done = Vec::new();
    loop {
        assert!(std::time::Instant::now() < deadline, "the controller did not come back");
        queue.poll(&mut done);
        let buf = queue.allocate(4096).unwrap();
        match queue.submit(Io { token: Token(1), op: IoOp::Read { offset: 0, buf } }) {
            Ok(()) => break,
            Err(rejected) => assert_eq!(rejected.why, Refusal::Full, "it was given up"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    for finished in drain(queue) {
        finished.status.unwrap();
    }
}

const WRITE: u8 = 1;
const READ: u8 = 2;
const FLUSH: u8 = 0;

#[test]
fn injected_errors_become_typed_errors() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    write(&mut queue, 0, 8192, 5).unwrap();

    // A read is sent again a few times before it is an error.
    queue.inject_error(READ, 3, 0x2, 0x81);
    assert_eq!(read(&mut queue, 0, 8192).unwrap(), [5; 8192]);
    queue.inject_error(READ, 4, 0x2, 0x81);
    assert_eq!(read(&mut queue, 0, 8192), Err(IoError::UnrecoveredRead { offset: 0, size: 8192 }));
    assert_eq!(read(&mut queue, 0, 8192).unwrap(), [5; 8192]);

    queue.inject_error(WRITE, 1, 0x2, 0x80);
    let fault = write(&mut queue, 4096, 4096, 6).unwrap_err();
    assert!(
        matches!(&fault, IoError::WriteFault { offset: 4096, size: 4096, cause } if cause.contains("02/80"))
    );
    write(&mut queue, 4096, 4096, 6).unwrap();

    queue.inject_error(WRITE, 1, 0x0, 0x07);
    assert_eq!(write(&mut queue, 4096, 4096, 7), Err(IoError::Aborted));
    queue.inject_error(READ, 1, 0x0, 0x0b);
    assert_eq!(read(&mut queue, 0, 4096), Err(IoError::Gone));

    // A failed flush poisons every later one, on every queue of the device.
    let mut other = namespace.open_queue().unwrap();
    run(&mut other, IoOp::Flush).unwrap();
    queue.inject_error(FLUSH, 1, 0x0, 0x06);
    let failed = run(&mut queue, IoOp::Flush).unwrap_err();
    assert!(failed.to_string().contains("internal device error"), "{failed}");
    for queue in [&mut queue, &mut other] {
        assert!(matches!(run(queue, IoOp::Flush), Err(IoError::FlushFailed { .. })));
    }
}

#[test]
fn memory_that_is_not_spdks_is_refused() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    let op = IoOp::Write { offset: 0, buf: DmaBuf::from_heap(4096), fua: false };
    let refused = queue.submit(Io { token: Token(3), op }).unwrap_err();
    assert!(matches!(refused.why, Refusal::Failed(IoError::Invalid { .. })));
    assert_eq!(refused.io.token, Token(3));
}

#[test]
fn a_second_open_is_told_that_it_is_in_use() {
    let target = Target::start(&[MALLOC, MALLOC]);
    let namespace = open(&target, 0);
    let again = open_with(&target, 0, &options());
    assert!(matches!(again, Err(DeviceError::InUse { .. })), "{again:?}");
    let _other = open(&target, 1);
    drop(namespace);
    open(&target, 0);
}

#[test]
fn what_can_not_be_reached_is_said_in_plain_words() {
    let mut target = Target::start(&[MALLOC]);
    let id = target.transport_id(0);
    let absent = TransportId::parse(&format!("{id} ns:2")).unwrap();
    let error = SpdkNamespace::open(&absent, &options()).unwrap_err().to_string();
    assert!(error.contains("no active namespace 2; it has 1"), "{error}");
    target.kill();
    let error = SpdkNamespace::open(&TransportId::parse(&id).unwrap(), &options()).unwrap_err().to_string();
    assert!(error.contains("no NVMe/TCP target answers there"), "{error}");
    let drive = TransportId::parse("0000:00:1f.7").unwrap();
    let error = SpdkNamespace::open(&drive, &options()).unwrap_err().to_string();
    assert!(error.contains("not among what it looked for"), "{error}");
}

/// Several threads, each with a queue of its own on the one controller.
#[test]
fn reactors_share_a_controller() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let namespace = &namespace;
            scope.spawn(move || {
                let mut queue = namespace.open_queue().unwrap();
                for round in 0..200_u64 {
                    let (offset, byte) = (thread * (4 << 20) + (round % 50) * 8192, (round + thread) as u8);
                    write(&mut queue, offset, 8192, byte).unwrap();
                    assert_eq!(read(&mut queue, offset, 8192).unwrap(), [byte; 8192]);
                }
            });
        }
    });
    let health = namespace.health().unwrap();
    assert!(health.temperature_kelvin < 400, "{health:?}");
}

/// Keeps a window of writes in flight, does `once` when some have completed, and goes on until one comes back with an
/// error; returns how each one ended.
fn load_until_error(queue: &mut SpdkQueue, once: impl FnOnce(), mut each: impl FnMut()) -> Vec<IoDone> {
    let (mut all, mut done) = (Vec::new(), Vec::new());
    let mut once = Some(once);
    for step in 0_u64.. {
        each();
        if all.len() > 200
            && let Some(once) = once.take()
        {
            once();
        }
        if queue.in_flight() < 16 {
            let mut buf = queue.allocate(16 << 10).unwrap();
            buf.fill(step as u8);
            let op = IoOp::Write { offset: (step % 64) * (16 << 10) + (4 << 20), buf, fua: false };
            // A queue that is between two queue pairs refuses it.
            let _ = queue.submit(Io { token: Token(step), op });
        }
        queue.poll(&mut done);
        let failed = done.iter().any(|one| one.status.is_err());
        all.append(&mut done);
        if failed {
            break;
        }
    }
    all.extend(drain(queue));
    all
}

#[test]
fn a_target_that_dies_and_comes_back_is_reconnected() {
    let mut target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    let mut idle = namespace.open_queue().unwrap();
    run(&mut queue, IoOp::Flush).unwrap();
    let ended = std::thread::scope(|scope| {
        let (die, told) = std::sync::mpsc::channel();
        let target = &mut target;
        scope.spawn(move || {
            told.recv().unwrap();
            target.kill();
            std::thread::sleep(Duration::from_millis(300));
            target.restart();
        });
        // The other queue has to give its queue pair back as well.
        let each = || {
            idle.poll(&mut Vec::new());
        };
        load_until_error(&mut queue, || die.send(()).unwrap(), each)
    });
    let aborted = ended.iter().filter(|one| one.status == Err(IoError::Aborted)).count();
    assert!(aborted > 0 && ended.iter().all(|one| one.buf.is_some()), "{aborted} of {}", ended.len());
    assert!(ended.iter().all(|one| matches!(one.status, Ok(()) | Err(IoError::Aborted))));
    wait_until_back(&mut queue);
    wait_until_back(&mut idle);
    write(&mut queue, 0, 4096, 9).unwrap();
    assert_eq!(read(&mut idle, 0, 4096).unwrap(), [9; 4096]);
    // What had been written and not flushed died with the target's memory: no flush may say otherwise.
    assert!(matches!(run(&mut queue, IoOp::Flush), Err(IoError::FlushFailed { .. })));
}

#[test]
fn a_target_that_stays_away_is_given_up() {
    let mut target = Target::start(&[MALLOC]);
    let timeouts = Timeouts { recovery: Duration::from_secs(1), ..Timeouts::default() };
    let namespace = open_with(&target, 0, &SpdkOptions { timeouts, ..options() }).unwrap();
    let mut queue = namespace.open_queue().unwrap();
    write(&mut queue, 0, 4096, 1).unwrap();
    // Silent first, so that the commands are on their way when it dies.
    target.pause();
    let mut buf = queue.allocate(4096).unwrap();
    buf.fill(1);
    queue.submit(Io { token: Token(1), op: IoOp::Write { offset: 0, buf, fua: false } }).unwrap();
    let buf = queue.allocate(4096).unwrap();
    queue.submit(Io { token: Token(2), op: IoOp::Read { offset: 0, buf } }).unwrap();
    queue.poll(&mut Vec::new());
    target.kill();
    let mut ended = drain(&mut queue);
    ended.sort_by_key(|one| one.token);
    let statuses: Vec<_> = ended.iter().map(|one| one.status.clone()).collect();
    assert_eq!(statuses, [Err(IoError::Aborted), Err(IoError::Gone)]);
    assert_eq!(read(&mut queue, 0, 4096), Err(IoError::Gone));
    assert!(matches!(namespace.open_queue(), Err(DeviceError::Unusable { .. })));
}

#[test]
fn a_namespace_that_is_taken_away_is_gone() {
    let target = Target::start(&[MALLOC, MALLOC]);
    let namespace = open(&target, 0);
    let other = open(&target, 1);
    let mut queue = namespace.open_queue().unwrap();
    let mut other = other.open_queue().unwrap();
    write(&mut queue, 0, 4096, 1).unwrap();
    target.remove_namespace(0);
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while write(&mut queue, 0, 4096, 1) != Err(IoError::Gone) {
        assert!(std::time::Instant::now() < deadline);
    }
    // Another device goes on.
    write(&mut other, 0, 4096, 2).unwrap();
    assert_eq!(read(&mut other, 0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_command_that_never_ends_has_the_controller_reset() {
    let target = Target::start(&[MALLOC]);
    let short = Duration::from_millis(300);
    let timeouts = Timeouts { command: short, abort: short, ..Timeouts::default() };
    let namespace = open_with(&target, 0, &SpdkOptions { timeouts, ..options() }).unwrap();
    let mut queue = namespace.open_queue().unwrap();
    queue.inject_stall(WRITE);
    assert_eq!(write(&mut queue, 0, 4096, 1), Err(IoError::Aborted));
    wait_until_back(&mut queue);
    write(&mut queue, 0, 4096, 2).unwrap();
    assert_eq!(read(&mut queue, 0, 4096).unwrap(), [2; 4096]);
}

#[test]
fn a_reset_under_load_settles_every_command_once() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    let shared = Arc::clone(&namespace.controller.shared);
    let mut tokens = std::collections::BTreeSet::new();
    for round in 0..5 {
        let generation = shared.state().generation;
        // Of the generation at that time: a starved target may have had one reset of its own meanwhile.
        let reset = || shared.request_reset(shared.state().generation, "a test says so");
        let ended = load_until_error(&mut queue, reset, || {});
        assert!(ended.iter().any(|one| one.status == Err(IoError::Aborted)), "round {round}");
        for one in ended {
            assert!(tokens.insert((round, one.token)), "a command ended twice");
            assert!(one.buf.is_some());
        }
        wait_until_back(&mut queue);
        assert!(shared.state().generation > generation);
    }
    // The pool has got all of its memory back.
    let held: Vec<DmaBuf> = std::iter::from_fn(|| queue.allocate(1 << 20)).collect();
    assert_eq!(held.len(), namespace.pool_size >> 20);
}

/// As a network that stops passing anything does: connections stay, and nobody answers.
#[test]
fn a_target_that_falls_silent_is_reconnected() {
    let target = Target::start(&[MALLOC]);
    let timeouts = Timeouts {
        command: Duration::from_millis(300),
        abort: Duration::from_millis(300),
        ..Timeouts::default()
    };
    let namespace = open_with(&target, 0, &SpdkOptions { timeouts, ..options() }).unwrap();
    let mut queue = namespace.open_queue().unwrap();
    write(&mut queue, 0, 4096, 1).unwrap();
    target.pause();
    let resumed = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(3));
            target.resume();
        });
        let ended = write(&mut queue, 0, 4096, 2);
        wait_until_back(&mut queue);
        ended
    });
    assert_eq!(resumed, Err(IoError::Aborted));
    // The unknown outcome has settled to one.
    let found = read(&mut queue, 0, 4096).unwrap();
    assert!(found == [1; 4096] || found == [2; 4096]);
    assert_eq!(read(&mut queue, 0, 4096).unwrap(), found);
}

/// The abort reaches the controller, which ends the command: nothing else is disturbed.
#[test]
fn a_command_that_takes_too_long_is_aborted_without_a_reset() {
    let slow = Backing::Slow { size_mib: 16, block_size: 512, delay: Duration::from_secs(100) };
    let target = Target::start(&[slow]);
    // SPDK 20.07 has one timeout for all commands, the admin queue's half minute.
    let (command, abort) = (Duration::from_millis(500), Duration::from_secs(80));
    let timeouts = Timeouts { command, abort, ..Timeouts::default() };
    let namespace = open_with(&target, 0, &SpdkOptions { timeouts, ..options() }).unwrap();
    let mut queue = namespace.open_queue().unwrap();
    assert_eq!(write(&mut queue, 0, 4096, 1), Err(IoError::Aborted));
    assert_eq!(namespace.controller.shared.state().generation, 0);
    run(&mut queue, IoOp::Flush).unwrap();
}

/// Ends this process's newest TCP connection to a port, as a network would; the first is the admin queue's.
fn break_newest_connection(port: u16) {
    let to_target = |fd: i32| -> bool {
        // SAFETY: the descriptor is listed as open, and the tests of a process that share it close none meanwhile.
        let socket = unsafe { BorrowedFd::borrow_raw(fd) };
        let peer = rustix::net::getpeername(socket).ok().and_then(|peer| SocketAddr::try_from(peer?).ok());
        peer.is_some_and(|peer| peer.port() == port)
    };
    let listed = std::fs::read_dir("/proc/self/fd").unwrap();
    let fds = listed.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let newest = fds.filter(|fd| to_target(*fd)).max().expect("a connection to the target");
    // SAFETY: as above; it is shut down and not closed, so the descriptor stays its owner's.
    let socket = unsafe { BorrowedFd::borrow_raw(newest) };
    rustix::net::shutdown(socket, rustix::net::Shutdown::Both).unwrap();
}

#[test]
fn a_queue_pair_that_fails_is_reconnected() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut other = namespace.open_queue().unwrap();
    let mut queue = namespace.open_queue().unwrap();
    write(&mut queue, 0, 8192, 3).unwrap();
    run(&mut queue, IoOp::Flush).unwrap();
    break_newest_connection(target.port());
    let mut buf = queue.allocate(4096).unwrap();
    buf.fill(4);
    let _ = queue.submit(Io { token: Token(1), op: IoOp::Write { offset: 0, buf, fua: false } });
    // The controller was well: its other queue goes through the same reset, and both go on.
    let shared = &namespace.controller.shared;
    wait_for("the reset", || {
        for queue in [&mut queue, &mut other] {
            queue.poll(&mut Vec::new());
        }
        shared.state() == State { phase: Phase::Ready, generation: 1 }
    });
    wait_until_back(&mut queue);
    wait_until_back(&mut other);
    assert_eq!(read(&mut other, 4096, 4096).unwrap(), [3; 4096]);
    write(&mut queue, 4096, 4096, 5).unwrap();
    assert_eq!(read(&mut other, 4096, 4096).unwrap(), [5; 4096]);
}

/// The target gives up a host that it has not heard of for ten seconds, and looks as often.
#[test]
fn keep_alives_hold_an_idle_connection() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    std::thread::sleep(Duration::from_secs(25));
    write(&mut queue, 0, 4096, 1).unwrap();
    assert_eq!(namespace.controller.shared.state(), State { phase: Phase::Ready, generation: 0 });
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_event_tells_an_idle_queue_that_its_namespace_has_gone() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    target.remove_namespace(0);
    wait_for("the event", || namespace.controller.shared.state().phase == Phase::Gone);
    assert_eq!(read(&mut queue, 0, 4096), Err(IoError::Gone));
}

#[test]
fn a_namespace_may_grow_while_it_is_used() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("target.bin");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(16 << 20).unwrap();
    let target = Target::start(&[Backing::File { path, block_size: 4096 }]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    file.set_len(32 << 20).unwrap();
    target.rescan(0);
    let shared = &namespace.controller.shared;
    wait_for("the new size", || {
        shared.namespace().is_some_and(|one| namespace_info(one).block_count == 8192)
    });
    wait_for("the event's end", || !shared.changed.load(Ordering::Acquire));
    write(&mut queue, 0, 4096, 1).unwrap();
    shared.request_reset(0, "a test says so");
    wait_until_back(&mut queue);
    assert_eq!(read(&mut queue, 0, 4096).unwrap(), [1; 4096]);
}

#[test]
fn another_namespace_behind_the_same_name_is_never_written_to() {
    let mut target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    let mut queue = namespace.open_queue().unwrap();
    target.kill();
    target.restart_with(Backing::Malloc { size_mib: 8, block_size: 512 });
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    loop {
        assert!(std::time::Instant::now() < deadline, "it was not noticed");
        let mut buf = queue.allocate(4096).unwrap();
        buf.fill(6);
        match queue.submit(Io { token: Token(1), op: IoOp::Write { offset: 0, buf, fua: false } }) {
            Ok(()) => {
                let ended = drain(&mut queue);
                assert!(ended.iter().all(|one| one.status.is_err()), "it was written to");
            }
            Err(rejected) if rejected.why == Refusal::Failed(IoError::Gone) => break,
            Err(_) => {
                queue.poll(&mut Vec::new());
            }
        }
    }
}

/// SPDK itself gives a connection two seconds.
#[test]
fn a_queue_opens_on_a_target_that_takes_its_time_to_answer() {
    let target = Target::start(&[MALLOC]);
    let namespace = open(&target, 0);
    target.pause();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(3));
            target.resume();
        });
        let mut queue = namespace.open_queue().unwrap();
        write(&mut queue, 0, 4096, 1).unwrap();
    });
}

//! What is particular to the `uring` engine; the rest is in the conformance suite.

use super::*;
use crate::device::conformance;

fn namespace(folder: &tempfile::TempDir) -> UringNamespace {
    let options = FileOptions { create_size: Some(8 << 20), ..FileOptions::default() };
    UringNamespace::open(&folder.path().join("a.img"), &options).unwrap()
}

fn run(device: &mut UringDevice, op: IoOp) -> IoDone {
    device.submit(Io { token: Token(1), op }).unwrap();
    conformance::drain(device).pop().unwrap()
}

#[test]
fn every_mode_of_the_ring_conforms_and_wakes() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    for mode in RING_MODES {
        // A kernel without the mode is no failure of this code.
        if let Ok(device) = namespace.open_with(&[mode]) {
            assert_eq!(device.mode, mode);
            drop(device);
            conformance::conforms(|| namespace.open_with(&[mode]).unwrap());
        }
    }
}

#[test]
fn an_epoll_on_the_wake_descriptor_wakes_for_every_kind_of_operation() {
    use rustix::event::epoll;
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    for mode in RING_MODES {
        let Ok(mut device) = namespace.open_with(&[mode]) else { continue };
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(1);
        epoll::add(&poller, device.wake_fd().unwrap(), data, epoll::EventFlags::IN).unwrap();
        let ops: [fn(DmaBuf) -> IoOp; 4] = [
            |buf| IoOp::Read { offset: 0, buf },
            |buf| IoOp::Write { offset: 0, buf, fua: true },
            |_| IoOp::Flush,
            |_| IoOp::Deallocate { offset: 0, size: 4096 },
        ];
        for op in ops.iter().cycle().take(200) {
            let buf = device.allocate(4096).unwrap();
            let submitted = Instant::now();
            device.submit(Io { token: Token(1), op: op(buf) }).unwrap();
            let mut done = Vec::new();
            while device.poll(&mut done) == 0 {
                let mut events: [epoll::Event; 1] =
                    [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
                let timeout = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
                let woken = epoll::wait(&poller, &mut events[..], Some(&timeout));
                assert!(matches!(woken, Ok(1) | Err(Errno::INTR)), "{mode:?}: {woken:?}");
                // A wake that the time limit brought about is none.
                assert!(submitted.elapsed() < Duration::from_secs(10), "{mode:?} never woke");
            }
            assert_eq!(done[0].status, Ok(()));
        }
        // With nothing in flight it sleeps, once the kernel has nothing left to interrupt it for.
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        let sleep = || {
            let mut events: [epoll::Event; 1] =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
            epoll::wait(&poller, &mut events[..], Some(&timeout))
        };
        let slept = (0..8).map(|_| sleep()).find(|slept| *slept != Err(Errno::INTR));
        assert_eq!(slept, Some(Ok(0)), "{mode:?} spins");
    }
}

#[test]
fn one_failed_flush_fails_every_later_one_on_every_queue() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let (mut one, mut other) = (namespace.open_queue().unwrap(), namespace.open_queue().unwrap());
    assert_eq!(run(&mut one, IoOp::Flush).status, Ok(()));
    // A pipe can't be synchronised: the system call itself fails.
    let (_reader, writer) = rustix::pipe::pipe().unwrap();
    one.is_file_registered = false;
    let good = std::mem::replace(&mut one.file, File::from(writer));
    assert!(matches!(run(&mut one, IoOp::Flush).status, Err(IoError::FlushFailed { .. })));
    one.file = good;
    assert_eq!(run(&mut one, IoOp::Flush).status, Err(FlushPoison::error()));
    assert_eq!(run(&mut other, IoOp::Flush).status, Err(FlushPoison::error()));
    let buf = other.allocate(4096).unwrap();
    assert_eq!(run(&mut other, IoOp::Read { offset: 0, buf }).status, Ok(()));
}

#[test]
fn a_flush_that_was_under_way_when_another_failed_is_void() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    device.submit(Io { token: Token(1), op: IoOp::Flush }).unwrap();
    device.poison.set();
    assert_eq!(conformance::drain(&mut device).pop().unwrap().status, Err(FlushPoison::error()));
}

#[test]
fn a_file_that_was_cut_short_gives_an_error_after_the_short_read() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    File::options().write(true).open(folder.path().join("a.img")).unwrap().set_len(8192).unwrap();
    let buf = device.allocate(16_384).unwrap();
    let done = run(&mut device, IoOp::Read { offset: 0, buf });
    assert_eq!(done.status, Err(IoError::UnrecoveredRead { offset: 0, size: 16_384 }));
    assert_eq!(done.buf.unwrap().len(), 16_384);
}

#[test]
fn the_rest_of_a_short_transfer_and_a_passing_error_go_back_to_the_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    let mut buf = device.allocate(16_384).unwrap();
    buf.chunks_mut(4096).zip(1..).for_each(|(chunk, byte)| chunk.fill(byte));
    assert_eq!(run(&mut device, IoOp::Write { offset: 0, buf, fua: false }).status, Ok(()));
    let mut buf = device.allocate(16_384).unwrap();
    buf.fill(0xEE);
    let op = IoOp::Read { offset: 0, buf };
    let key = device.flights.insert(Flight { token: Token(2), op, moved: 0, retries: 0 });
    // As if the kernel had completed 4096 of the bytes, and then been interrupted.
    let mut done = Vec::new();
    device.finish(key, 4096, &mut done);
    assert!(done.is_empty());
    let done = conformance::drain(&mut device).pop().unwrap();
    assert_eq!(done.status, Ok(()));
    let buf = done.buf.unwrap();
    assert!(buf[..4096].iter().all(|&byte| byte == 0xEE));
    assert!(buf[4096..].chunks(4096).zip(2..).all(|(chunk, byte)| chunk.iter().all(|&found| found == byte)));
    let op = IoOp::Read { offset: 0, buf };
    let key = device.flights.insert(Flight { token: Token(3), op, moved: 0, retries: 0 });
    device.finish(key, Errno::INTR.raw_os_error().wrapping_neg(), &mut Vec::new());
    let done = conformance::drain(&mut device).pop().unwrap();
    assert_eq!((done.status, done.buf.unwrap()[0]), (Ok(()), 1));
}

#[test]
fn buffers_beyond_the_arena_are_plain_and_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    if device.geometry().registered_buffers {
        assert_ne!(device.allocate(4096).unwrap().class(), 0);
    }
    assert_eq!(device.allocate(1 << 20).unwrap().class(), 0);
    let small: Vec<DmaBuf> = (0..600).map(|_| device.allocate(4096).unwrap()).collect();
    assert_eq!(small[599].class(), 0);
    let mut device = namespace.open_queue().unwrap();
    for buf in small {
        // Buffers of another queue's arena are as good as any.
        assert_eq!(run(&mut device, IoOp::Read { offset: 0, buf }).status, Ok(()));
    }
}

#[test]
fn refusal_by_the_kernel_says_why() {
    let message =
        |errno: Errno| unavailable(&std::io::Error::from(errno), UringOptions::default()).to_string();
    assert!(message(Errno::NOSYS).contains("no io_uring"));
    assert!(message(Errno::PERM).contains("forbid"));
    assert!(message(Errno::NOMEM).contains("ulimit -l"));
    assert!(unregistered_note(&Errno::NOMEM.into()).contains("LimitMEMLOCK"));
}

/// Forbids io_uring_setup to this thread, as containers do, and opens a namespace.
#[test]
fn a_seccomp_filter_makes_the_engine_unavailable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    let opened = std::thread::spawn(move || {
        let statement =
            |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
        let mut filter = [
            // The number of the system call is the first word of seccomp_data.
            statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: plain integers.
        let privileged = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        assert_eq!(privileged, 0);
        // SAFETY: the program and its filter outlive the call, which copies them.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        assert_eq!(set, 0);
        let options = FileOptions { create_size: Some(8 << 20), ..FileOptions::default() };
        UringNamespace::open(&path, &options).map(drop)
    })
    .join()
    .unwrap();
    let error = opened.unwrap_err();
    assert!(
        matches!(&error, DeviceError::EngineUnavailable { engine: "uring", cause } if cause.contains("forbid")),
        "{error}"
    );
    assert!(!folder.path().join("a.img").exists());
}

#[test]
fn dropping_a_queue_waits_for_what_it_had_in_flight() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    conformance::sees_through_what_it_took(|| namespace.open_queue().unwrap());
}

/// A namespace with the options, whatever sysfs says of the drive: some kernels wait for interrupts where they can't poll.
fn unchecked(folder: &tempfile::TempDir, options: UringOptions) -> UringNamespace {
    let mut namespace = namespace(folder);
    namespace.options = options;
    namespace.geometry.engine = options.engine();
    namespace
}

#[test]
fn a_polled_ring_conforms_with_the_helper_for_what_it_does_not_take() {
    for sqpoll in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let options = UringOptions { iopoll: true, sqpoll, ..UringOptions::default() };
        let namespace = unchecked(&folder, options);
        let mut device = namespace.open_queue().unwrap();
        let buf = device.allocate(4096).unwrap();
        let written = run(&mut device, IoOp::Write { offset: 0, buf, fua: false });
        // The file system itself writes what it has yet to mark as written, but what was is read by the drive.
        if run(&mut device, IoOp::Read { offset: 0, buf: written.buf.unwrap() }).status.is_err() {
            println!(
                "SKIPPED: a polled ring: the drive under {} has no queues for it",
                folder.path().display()
            );
            continue;
        }
        assert!(device.wake_fd().is_none());
        assert_eq!(run(&mut device, IoOp::Flush).status, Ok(()));
        drop(device);
        conformance::conforms(|| namespace.open_queue().unwrap());
        conformance::sees_through_what_it_took(|| namespace.open_queue().unwrap());
    }
}

#[test]
fn polling_is_refused_where_the_drive_has_no_queues_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    drop(namespace(&folder));
    let queue = BlockQueue::of(&File::open(&path).unwrap());
    let is_refused = queue.and_then(|queue| queue.attribute("io_poll")).as_deref() != Some("1");
    let options = UringOptions { iopoll: true, ..UringOptions::default() };
    let opened = UringNamespace::open_with_options(&path, &FileOptions::default(), options);
    assert_eq!(opened.is_err(), is_refused, "{opened:?}");
    let text = opened.map(drop).map_or_else(|error| error.to_string(), |()| is_polled(None).unwrap_err());
    assert!(text.contains("leave iopoll out"), "{text}");
}

/// Without the capability that lifts it, and with a limit below what the arena needs.
#[test]
fn a_low_limit_of_locked_memory_is_a_note_or_the_refusal_that_was_asked_for() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    drop(namespace(&folder));
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(64 << 10), ..before }).unwrap();
    let (noted, refused) = std::thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        let open = |buffers| {
            let options = UringOptions { buffers, ..UringOptions::default() };
            UringNamespace::open_with_options(&path, &FileOptions::default(), options)
        };
        let preferred = open(RegisteredBuffers::Preferred).unwrap();
        let mut queue = preferred.open_queue().unwrap();
        let buf = queue.allocate(4096).unwrap();
        assert_eq!(run(&mut queue, IoOp::Read { offset: 0, buf }).status, Ok(()));
        assert!(!queue.geometry().registered_buffers);
        drop(queue);
        let notes = preferred.notes();
        drop(preferred);
        (notes, open(RegisteredBuffers::Required).unwrap_err().to_string())
    })
    .join()
    .unwrap();
    setrlimit(Resource::Memlock, before).unwrap();
    assert!(noted.len() == 1 && noted[0].contains("ulimit -l"), "{noted:?}");
    assert!(refused.contains("uring+registered engine") && refused.contains("ulimit -l"), "{refused}");
}

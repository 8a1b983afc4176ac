//! The traps of Linux AIO.

use super::*;
use crate::device::conformance;

fn namespace(folder: &tempfile::TempDir) -> AioNamespace {
    let options = FileOptions { create_size: Some(8 << 20), ..FileOptions::default() };
    AioNamespace::open(&folder.path().join("a.img"), &options).unwrap()
}

/// Submits `count` writes that differ, with a flush in between, and says what came of them in order of their tokens.
fn write_and_flush(device: &mut AioDevice, count: u64) -> Vec<IoDone> {
    for token in 0..count {
        let mut buf = device.allocate(4096).unwrap();
        buf.fill(token as u8 + 1);
        let op = match token {
            3 => IoOp::Flush,
            _ => IoOp::Write { offset: token * 4096, buf, fua: false },
        };
        device.submit(Io { token: Token(token), op }).unwrap();
    }
    let mut done = conformance::drain(device);
    done.sort_by_key(|one| one.token);
    done
}

fn are_written(device: &mut AioDevice, count: u64) {
    for token in (0..count).filter(|token| *token != 3) {
        let buf = device.allocate(4096).unwrap();
        device.submit(Io { token: Token(0), op: IoOp::Read { offset: token * 4096, buf } }).unwrap();
        let done = conformance::drain(device).pop().unwrap();
        assert!(done.buf.unwrap().iter().all(|byte| *byte == token as u8 + 1), "write {token} is not there");
    }
}

#[test]
fn a_partial_submission_goes_on_with_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    device.script.extend([Ok(2), Ok(1), Err(Errno::INTR), Ok(3)]);
    let done = write_and_flush(&mut device, 12);
    assert!(done.len() == 12 && done.iter().all(|one| one.status == Ok(())), "{done:?}");
    assert!(device.script.is_empty());
    are_written(&mut device, 12);
}

#[test]
fn eagain_waits_for_what_is_under_way_or_goes_to_the_helper() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    // With the kernel idle, the helper takes one; with something under way, the rest waits for the next poll.
    device.script.extend([Err(Errno::AGAIN), Err(Errno::AGAIN), Ok(2), Err(Errno::NOMEM), Err(Errno::AGAIN)]);
    let done = write_and_flush(&mut device, 12);
    assert!(done.len() == 12 && done.iter().all(|one| one.status == Ok(())), "{done:?}");
    assert_eq!(device.helper.thread_count(), 1);
    assert_eq!((device.waiting.len(), device.in_kernel, device.with_helper), (0, 0, 0));
    are_written(&mut device, 12);
}

#[test]
fn eagain_for_ever_still_gets_everything_done() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    device.script.extend(std::iter::repeat_n(Err(Errno::AGAIN), 100_000));
    let done = write_and_flush(&mut device, 12);
    assert!(done.len() == 12 && done.iter().all(|one| one.status == Ok(())), "{done:?}");
    assert!(!device.script.is_empty());
    device.script.clear();
    are_written(&mut device, 12);
}

#[test]
fn a_submission_that_the_kernel_refuses_is_the_error_of_that_operation_alone() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    device.script.extend([Ok(2), Err(Errno::NXIO)]);
    let done = write_and_flush(&mut device, 6);
    let failed: Vec<_> = done.iter().filter(|one| one.status.is_err()).collect();
    assert!(failed.len() == 1 && failed[0].token == Token(2), "{failed:?}");
    assert!(failed[0].status == Err(IoError::Gone) && failed[0].buf.as_ref().unwrap().len() == 4096);
}

#[test]
fn a_kernel_without_flush_in_aio_has_the_helper_do_it() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    // Refused when it is submitted, and when it is done.
    for is_late in [false, true] {
        let mut device = namespace.open_queue().unwrap();
        if is_late {
            let flight = Flight { token: Token(3), op: IoOp::Flush, moved: 0, retries: 0 };
            let key = device.flights.insert(flight);
            device.finish(key, -i64::from(Errno::INVAL.raw_os_error()));
        } else {
            device.script.extend([Err(Errno::INVAL)]);
            device.submit(Io { token: Token(3), op: IoOp::Flush }).unwrap();
        }
        let done = conformance::drain(&mut device);
        assert!(done.len() == 1 && done[0].status == Ok(()), "{done:?}");
        assert!(!device.takes_flush && device.helper.thread_count() == 1);
        let done = write_and_flush(&mut device, 6);
        assert!(done.iter().all(|one| one.status == Ok(())), "{done:?}");
    }
}

#[test]
fn a_failed_flush_is_no_missing_command_and_poisons() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    let key = device.flights.insert(Flight { token: Token(3), op: IoOp::Flush, moved: 0, retries: 0 });
    device.finish(key, -i64::from(Errno::IO.raw_os_error()));
    let done = conformance::drain(&mut device);
    assert!(matches!(done[0].status, Err(IoError::FlushFailed { .. })), "{done:?}");
    let mut other = namespace.open_queue().unwrap();
    other.submit(Io { token: Token(1), op: IoOp::Flush }).unwrap();
    assert_eq!(conformance::drain(&mut other)[0].status, Err(FlushPoison::error()));
}

#[test]
fn the_rest_of_a_short_transfer_and_a_passing_error_go_back_to_the_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    write_and_flush(&mut device, 3);
    let mut buf = device.allocate(3 * 4096).unwrap();
    buf.fill(0xEE);
    let op = IoOp::Read { offset: 0, buf };
    let key = device.flights.insert(Flight { token: Token(2), op, moved: 0, retries: 0 });
    // As if the kernel had completed 4096 of the bytes, and been short of something next.
    device.finish(key, 4096);
    device.waiting.clear();
    device.finish(key, -i64::from(Errno::AGAIN.raw_os_error()));
    let done = conformance::drain(&mut device).pop().unwrap();
    assert_eq!(done.status, Ok(()));
    let buf = done.buf.unwrap();
    assert!(buf.chunks(4096).zip([0xEE, 2, 3]).all(|(chunk, byte)| chunk.iter().all(|found| *found == byte)));
}

#[test]
fn a_file_that_was_cut_short_gives_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    File::options().write(true).open(folder.path().join("a.img")).unwrap().set_len(8192).unwrap();
    conformance::reports_a_short_file(&mut namespace.open_queue().unwrap());
}

#[test]
fn dropping_a_queue_sees_through_what_was_never_polled() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    conformance::sees_through_what_it_took(|| namespace.open_queue().unwrap());
}

#[test]
fn a_limit_that_is_used_up_names_the_setting() {
    // More than the system allows in all, as long as nobody has raised it so far: the kernel's own refusal.
    let allowed: u32 = std::fs::read_to_string("/proc/sys/fs/aio-max-nr").unwrap().trim().parse().unwrap();
    let error = match Context::new((allowed + 1).min(8_000_000)) {
        Err(error) => error,
        Ok(_) => calls::unavailable(Errno::AGAIN, 256),
    };
    let text = error.to_string();
    let words = ["aio engine", "/proc/sys/fs/aio-max-nr", &format!("allows {allowed}"), "sysctl"];
    assert!(words.iter().all(|word| text.contains(word)), "{text}");
}

#[test]
fn an_idle_queue_does_not_stay_awake() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = namespace(&folder);
    let mut device = namespace.open_queue().unwrap();
    for _ in 0..3 {
        write_and_flush(&mut device, 40);
        // The kernel may signal an end a little after it was taken.
        for _ in 0..1000 {
            device.poll(&mut Vec::new());
            std::thread::yield_now();
        }
        assert_eq!(
            (workers::clear(&device.event), device.signals_due),
            (0, 0),
            "the event is still readable"
        );
    }
}

//! One set of tests that every engine passes.

use std::collections::{BTreeMap, BTreeSet};

use super::file::FileOptions;
use super::kernel::{KernelEngine, KernelNamespace};
use super::sim::random::Random;
use super::sim::{SimConfig, SimDisk};
use super::sync::SyncNamespace;
use super::uring::UringNamespace;
use super::uring_options::{RegisteredBuffers, UringOptions};
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Io, IoDone, IoError, IoOp, Namespace, Refusal, Token,
};

const SIZE: u64 = 8 << 20;

fn submit(device: &mut (impl Device + ?Sized), token: u64, op: IoOp) {
    device.submit(Io { token: Token(token), op }).unwrap();
}

/// Polls until something has finished, sleeping on the wake descriptor where there is one.
fn wait(device: &mut (impl Device + ?Sized), done: &mut Vec<IoDone>) {
    // About hangs, not about speed.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while std::time::Instant::now() < deadline {
        if device.poll(done) > 0 {
            return;
        }
        assert!(device.in_flight() > 0, "waiting for nothing");
        if let Some(fd) = device.wake_fd() {
            let timeout = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(fd, rustix::event::PollFlags::IN)];
            let slept = std::time::Instant::now();
            let ready = rustix::event::poll(&mut fds, Some(&timeout));
            assert!(matches!(ready, Ok(1) | Err(rustix::io::Errno::INTR)), "{ready:?}");
            // A wake that the time limit brought about is none.
            assert!(slept.elapsed().as_secs() < 15, "the wake descriptor never became readable");
        }
    }
    panic!("nothing finished");
}

pub(super) fn drain(device: &mut (impl Device + ?Sized)) -> Vec<IoDone> {
    let mut done = Vec::new();
    while device.in_flight() > 0 {
        wait(device, &mut done);
    }
    done
}

fn run(device: &mut (impl Device + ?Sized), op: IoOp) -> Result<Option<DmaBuf>, IoError> {
    submit(device, 77, op);
    let done = drain(device).pop().unwrap();
    assert_eq!(done.token, Token(77));
    done.status.map(|()| done.buf)
}

fn write(device: &mut (impl Device + ?Sized), offset: u64, size: usize, byte: u8, fua: bool) {
    let mut buf = device.allocate(size).unwrap();
    buf.fill(byte);
    run(device, IoOp::Write { offset, buf, fua }).unwrap();
}

fn read(device: &mut (impl Device + ?Sized), offset: u64, size: usize) -> Vec<u8> {
    let buf = device.allocate(size).unwrap();
    run(device, IoOp::Read { offset, buf }).unwrap().unwrap().to_vec()
}

fn reads_back_what_was_written(device: &mut impl Device) {
    let mut byte = 1;
    let sizes = [4096, 8192, 16 << 10, 20 << 10, 64 << 10, 256 << 10, 1 << 20];
    let transfer_size_max = device.geometry().transfer_size_max as usize;
    for size in sizes.into_iter().filter(|size| *size <= transfer_size_max) {
        for fua in [false, true] {
            write(device, 12_288, size, byte, fua);
            assert_eq!(read(device, 12_288, size), vec![byte; size]);
            byte += 1;
        }
    }
    run(device, IoOp::Flush).unwrap();
    let end = device.geometry().size() - 4096;
    write(device, end, 4096, 99, false);
    assert_eq!(read(device, end, 4096), [99; 4096]);
}

fn reads_parts_of_blocks(device: &mut impl Device) {
    let mut block = device.allocate(8192).unwrap();
    for (at, sector) in block.chunks_mut(512).enumerate() {
        sector.fill(at as u8 + 1);
    }
    let content = block.to_vec();
    run(device, IoOp::Write { offset: 12_288, buf: block, fua: false }).unwrap();
    let step = device.geometry().read_alignment as usize;
    assert!(step.is_power_of_two() && (512..=device.geometry().block_size as usize).contains(&step));
    for from in (0..8192).step_by(step) {
        for end in (from + step..=8192).step_by(step) {
            let found = read(device, 12_288 + from as u64, end - from);
            assert_eq!(found, content[from..end], "{from}..{end}");
        }
    }
}

fn refuses_what_is_invalid(device: &mut impl Device) {
    let size = device.geometry().size();
    let too_long = device.geometry().transfer_size_max as usize + 4096;
    for is_write in [false, true] {
        // Half of what reads are aligned to at least.
        let part = if is_write { 512 } else { 256 };
        for (offset, len) in [
            (size, 4096),
            (size - 4096, 8192),
            (part, 4096),
            (0, part as usize),
            (u64::MAX - 4095, 4096),
            (0, 0),
            (0, too_long),
        ] {
            let buf = DmaBuf::from_heap(len);
            let op = match is_write {
                true => IoOp::Write { offset, buf, fua: false },
                false => IoOp::Read { offset, buf },
            };
            let refused = device.submit(Io { token: Token(5), op }).unwrap_err();
            assert!(matches!(refused.why, Refusal::Failed(IoError::Invalid { .. })), "{offset} {len}");
            assert_eq!(refused.io.token, Token(5));
            let (IoOp::Read { buf, .. } | IoOp::Write { buf, .. }) = refused.io.op else { panic!() };
            assert_eq!(buf.len(), len);
        }
    }
    let refused = device.submit(Io { token: Token(5), op: IoOp::Deallocate { offset: size, size: 4096 } });
    assert!(matches!(refused.unwrap_err().why, Refusal::Failed(IoError::Invalid { .. })));
    assert_eq!(device.in_flight(), 0);
}

fn is_full_at_its_depth(device: &mut impl Device) {
    let depth = device.geometry().depth as usize;
    for token in 0..depth {
        let buf = device.allocate(4096).unwrap();
        submit(device, token as u64, IoOp::Read { offset: token as u64 * 4096, buf });
    }
    assert_eq!(device.in_flight(), depth);
    let buf = device.allocate(4096).unwrap();
    let refused = device.submit(Io { token: Token(9), op: IoOp::Read { offset: 0, buf } }).unwrap_err();
    assert_eq!(refused.why, Refusal::Full);
    let tokens: BTreeSet<u64> = drain(device).iter().map(|done| done.token.0).collect();
    assert_eq!(tokens, (0..depth as u64).collect());
    submit(device, 9, refused.io.op);
    assert_eq!(drain(device).len(), 1);
}

/// Random reads, writes and flushes at depth, against a model of whole blocks.
fn agrees_with_a_model(device: &mut impl Device, seed: u64, steps: u64) {
    let mut random = Random::new(seed);
    let mut model: BTreeMap<u64, u8> = BTreeMap::new();
    let mut busy: BTreeMap<u64, (u64, u64, Option<u8>)> = BTreeMap::new();
    let mut done = Vec::new();
    let depth = device.geometry().depth.min(64) as usize;
    for token in 0..steps {
        let count = 1 + random.below(24);
        let first = random.below(1024);
        let is_write = random.chance(1, 2);
        let overlaps = busy.values().any(|&(other, size, byte)| {
            first < other + size && other < first + count && (is_write || byte.is_some())
        });
        if overlaps || device.in_flight() >= depth {
            device.poll(&mut done);
        } else if random.chance(1, 20) {
            submit(device, token, IoOp::Flush);
            busy.insert(token, (0, 0, None));
        } else {
            let mut buf = device.allocate(count as usize * 4096).unwrap();
            let offset = first * 4096;
            let byte = is_write.then(|| random.next_u64() as u8);
            let op = match byte {
                Some(byte) => {
                    buf.fill(byte);
                    IoOp::Write { offset, buf, fua: random.chance(1, 20) }
                }
                None => IoOp::Read { offset, buf },
            };
            submit(device, token, op);
            busy.insert(token, (first, count, byte));
        }
        if token == steps - 1 {
            done.extend(drain(device));
        }
        for finished in done.drain(..) {
            finished.status.unwrap();
            let (first, count, byte) = busy.remove(&finished.token.0).unwrap();
            for index in 0..count {
                match byte {
                    Some(byte) => {
                        model.insert(first + index, byte);
                    }
                    None => {
                        let start = index as usize * 4096;
                        let found = &finished.buf.as_ref().unwrap()[start..start + 4096];
                        let expected = model.get(&(first + index));
                        assert!(expected.is_none_or(|&byte| found.iter().all(|&got| got == byte)));
                    }
                }
            }
        }
    }
    assert!(busy.is_empty() && model.len() > 100);
}

fn deallocates(device: &mut impl Device) {
    write(device, 0, 64 << 10, 5, false);
    run(device, IoOp::Deallocate { offset: 4096, size: 32 << 10 }).unwrap();
    assert_eq!(read(device, 0, 4096), [5; 4096]);
    assert_eq!(read(device, 36 << 10, 4096), [5; 4096]);
    let hole = read(device, 4096, 32 << 10);
    match device.geometry().deallocate {
        Deallocate::Zeroes => assert!(hole.iter().all(|&byte| byte == 0)),
        Deallocate::None => assert!(hole.iter().all(|&byte| byte == 5)),
        Deallocate::Advisory => {}
    }
}

fn gets_its_buffers_back(device: &mut impl Device) {
    let mut held = Vec::new();
    while let Some(buf) = device.allocate(1 << 20) {
        held.push(buf);
        assert!(held.len() <= 1024, "the pool has no bound");
    }
    assert!(held.len() >= 16);
    let count = held.len();
    drop(held);
    for _ in 0..3 {
        let again: Vec<DmaBuf> = (0..count).map(|_| device.allocate(1 << 20).unwrap()).collect();
        drop(again);
    }
    // Many more operations than any class of buffers has: each one must come back.
    for token in 0..3000 {
        let buf = device.allocate(4096).unwrap();
        submit(device, token, IoOp::Read { offset: 0, buf });
        drop(drain(device));
    }
}

fn can_be_dropped_in_flight(mut device: impl Device) {
    for token in 0..32 {
        let mut buf = device.allocate(64 << 10).unwrap();
        buf.fill(token as u8);
        submit(&mut device, token, IoOp::Write { offset: token * (64 << 10), buf, fua: false });
        if token == 15 {
            device.poll(&mut Vec::new());
        }
    }
    let spare = device.allocate(4096).unwrap();
    drop(device);
    // A buffer may outlive its device.
    assert_eq!(spare.len(), 4096);
}

/// Dropping a queue does not forget what was submitted and never polled. `open` opens queues on one device.
pub(super) fn sees_through_what_it_took<D: Device>(mut open: impl FnMut() -> D) {
    let mut device = open();
    for token in 0..32 {
        let mut buf = device.allocate(65_536).unwrap();
        buf.fill(token as u8 + 1);
        submit(&mut device, token, IoOp::Write { offset: token * 65_536, buf, fua: false });
    }
    drop(device);
    let mut device = open();
    for token in 0..32 {
        assert_eq!(
            read(&mut device, token * 65_536, 65_536),
            [token as u8 + 1; 65_536],
            "write {token} was lost"
        );
    }
}

/// The file behind the device was cut to 8192 bytes: a read across that is an error, and gives its buffer back.
pub(super) fn reports_a_short_file(device: &mut impl Device) {
    let buf = device.allocate(16_384).unwrap();
    submit(device, 1, IoOp::Read { offset: 0, buf });
    let done = drain(device).pop().unwrap();
    assert_eq!(done.status, Err(IoError::UnrecoveredRead { offset: 0, size: 16_384 }));
    assert_eq!(done.buf.unwrap().len(), 16_384);
    assert_eq!(read(device, 0, 8192), [0; 8192]);
}

pub(super) fn conforms<D: Device>(mut open: impl FnMut() -> D) {
    reads_back_what_was_written(&mut open());
    reads_parts_of_blocks(&mut open());
    refuses_what_is_invalid(&mut open());
    is_full_at_its_depth(&mut open());
    deallocates(&mut open());
    gets_its_buffers_back(&mut open());
    agrees_with_a_model(&mut open(), 1, 4000);
    for _ in 0..10 {
        can_be_dropped_in_flight(open());
    }
    agrees_with_a_model(&mut open(), 2, 2000);
}

fn create() -> FileOptions {
    FileOptions { create_size: Some(SIZE), ..FileOptions::default() }
}

#[test]
fn sim_conforms() {
    let config = SimConfig { block_count: SIZE / 4096, ..SimConfig::default() };
    let disk = SimDisk::new(config, 1);
    conforms(|| disk.open_queue());
    assert_eq!(disk.outstanding_buffers(), 0);
}

fn kernel_engine_conforms(engine: KernelEngine) {
    let folder = tempfile::tempdir().unwrap();
    let namespace = KernelNamespace::open(engine, &folder.path().join("a.img"), Some(SIZE)).unwrap();
    assert_eq!(namespace.geometry().engine, engine.name());
    conforms(|| namespace.open_queue().unwrap());
}

#[test]
fn buffered_conforms() {
    kernel_engine_conforms(KernelEngine::Buffered);
}

#[test]
fn sync_conforms() {
    kernel_engine_conforms(KernelEngine::Sync);
}

#[test]
fn pool_conforms() {
    kernel_engine_conforms(KernelEngine::Pool);
}

#[test]
fn aio_conforms() {
    kernel_engine_conforms(KernelEngine::Aio);
}

#[test]
fn mmap_conforms() {
    kernel_engine_conforms(KernelEngine::Mmap);
}

#[test]
fn uring_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let namespace = UringNamespace::open(&folder.path().join("a.img"), &create()).unwrap();
    conforms(|| namespace.open_queue().unwrap());
}

#[test]
fn uring_with_a_submission_thread_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let options = UringOptions { sqpoll: true, ..UringOptions::default() };
    let namespace =
        UringNamespace::open_with_options(&folder.path().join("a.img"), &create(), options).unwrap();
    assert_eq!(namespace.geometry().engine, "uring+sqpoll");
    conforms(|| namespace.open_queue().unwrap());
}

#[test]
fn uring_without_registered_buffers_conforms() {
    let folder = tempfile::tempdir().unwrap();
    let options = UringOptions { buffers: RegisteredBuffers::Never, ..UringOptions::default() };
    let namespace =
        UringNamespace::open_with_options(&folder.path().join("a.img"), &create(), options).unwrap();
    assert!(!namespace.geometry().registered_buffers);
    conforms(|| namespace.open_queue().unwrap());
}

/// The claim of a file, and a queue.
type Opened = (Box<dyn std::any::Any>, Box<dyn Device>);

/// An engine's name, and opening the file with it.
type Rung<'a> = (&'static str, Box<dyn Fn() -> Opened + 'a>);

fn ladder(path: &std::path::Path) -> Vec<Rung<'_>> {
    let mut rungs: Vec<Rung<'_>> = Vec::new();
    for engine in KernelEngine::ALL {
        let open = move || -> Opened {
            let namespace = KernelNamespace::open(engine, path, None).unwrap();
            let queue = Box::new(namespace.open_queue().unwrap());
            (Box::new(namespace), queue)
        };
        rungs.push((engine.name(), Box::new(open)));
    }
    let unregistered = UringOptions { buffers: RegisteredBuffers::Never, ..UringOptions::default() };
    let sqpoll = UringOptions { sqpoll: true, ..UringOptions::default() };
    for options in [UringOptions::default(), unregistered, sqpoll] {
        let open = move || -> Opened {
            let namespace =
                UringNamespace::open_with_options(path, &FileOptions::default(), options).unwrap();
            let queue = Box::new(namespace.open_queue().unwrap());
            (Box::new(namespace), queue)
        };
        rungs.push((options.engine(), Box::new(open)));
    }
    rungs
}

#[test]
fn an_image_goes_through_every_pair_of_engines() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    SyncNamespace::open(&path, &create()).unwrap();
    let rungs = ladder(&path);
    let mut byte = 0;
    for (first, open_first) in &rungs {
        for (second, open_second) in &rungs {
            byte = byte % 250 + 2;
            let (claim, mut device) = open_first();
            write(&mut *device, 8192, 16_384, byte, false);
            run(&mut *device, IoOp::Flush).unwrap();
            drop((device, claim));
            let (claim, mut device) = open_second();
            assert_eq!(read(&mut *device, 8192, 16_384), [byte; 16_384], "{first}, then {second}");
            write(&mut *device, 12_288, 4096, byte + 1, byte.is_multiple_of(4));
            run(&mut *device, IoOp::Flush).unwrap();
            drop((device, claim));
            let (_claim, mut device) = open_first();
            let found = read(&mut *device, 8192, 16_384);
            let parts = [(0..4096, byte), (4096..8192, byte + 1), (8192..16_384, byte)];
            for (part, byte) in parts {
                assert!(
                    found[part].iter().all(|found| *found == byte),
                    "{first}, {second}, then {first} again"
                );
            }
        }
    }
    assert_eq!(rungs.len(), 8);
}

#[test]
fn every_engine_says_what_it_waits_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    SyncNamespace::open(&path, &create()).unwrap();
    for (name, open) in ladder(&path) {
        let (_claim, device) = open();
        let geometry = device.geometry();
        let expected = match name {
            "buffered" | "sync" | "mmap" => Blocks::ALWAYS,
            "aio" => Blocks { append: true, ..Blocks::NEVER },
            _ => Blocks::NEVER,
        };
        assert_eq!((geometry.engine, geometry.blocks), (name, expected));
        assert!((1..=4096).contains(&geometry.memory_alignment), "{name}: {}", geometry.memory_alignment);
        let is_cached = matches!(name, "buffered" | "mmap");
        assert_eq!(geometry.memory_alignment == 1, is_cached, "{name}: {}", geometry.memory_alignment);
        assert!(geometry.atomic_size >= 512 && geometry.atomic_size <= geometry.block_size, "{name}");
    }
}

#[test]
fn a_claimed_file_is_in_use_for_every_engine() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.img");
    let held = SyncNamespace::open(&path, &create()).unwrap();
    let again = UringNamespace::open(&path, &FileOptions::default());
    assert!(matches!(again, Err(DeviceError::InUse { .. })));
    drop(held);
    let _held = UringNamespace::open(&path, &FileOptions::default()).unwrap();
    let again = SyncNamespace::open(&path, &FileOptions::default());
    assert!(matches!(again, Err(DeviceError::InUse { .. })));
}

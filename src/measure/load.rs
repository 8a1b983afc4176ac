//! Reads and writes at a queue depth, in a closed loop: as one finishes, the next begins.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Latencies, latencies, record, rest};
use crate::device::sim::random::Random;
use crate::device::{Device, DeviceError, DmaBuf, Io, IoDone, IoError, IoOp, Namespace, Refusal, Token};
use crate::sys::usage::{SystemCalls, context_switches};

/// Which blocks are read or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Reads of random blocks.
    RandomRead,
    /// Writes to random blocks.
    RandomWrite,
    /// Reads of one block after the other, from the start again at the end.
    SequentialRead,
    /// Writes to one block after the other.
    SequentialWrite,
    /// Random blocks, of which 70 in 100 are read and 30 written.
    Mixed,
}

impl Pattern {
    /// Every one of them.
    pub const ALL: [Pattern; 5] = [
        Pattern::RandomRead,
        Pattern::RandomWrite,
        Pattern::SequentialRead,
        Pattern::SequentialWrite,
        Pattern::Mixed,
    ];

    /// Whether nothing is written.
    pub fn is_read_only(self) -> bool {
        matches!(self, Pattern::RandomRead | Pattern::SequentialRead)
    }

    fn is_sequential(self) -> bool {
        matches!(self, Pattern::SequentialRead | Pattern::SequentialWrite)
    }
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Load {
    /// Which blocks.
    pub pattern: Pattern,
    /// Bytes of one operation, a multiple of the device's block size.
    pub block_size: usize,
    /// Operations in flight at a time.
    pub depth: usize,
    /// Bytes of the device that are used.
    pub region: Range<u64>,
    /// How long it runs before anything is measured. System calls are counted here, since that slows them down.
    pub warm_up: Duration,
    /// How long it is measured.
    pub duration: Duration,
    /// Where random numbers come from.
    pub seed: u64,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Measured {
    /// Operations that finished in the time.
    pub count: u64,
    /// The time.
    pub elapsed: Duration,
    /// From submission to completion.
    pub reads: Latencies,
    /// The same of writes.
    pub writes: Latencies,
    /// Context switches of the whole process in the time.
    pub context_switches: u64,
    /// System calls for each operation, where they could be counted.
    pub system_calls_per_io: Option<f64>,
}

impl Measured {
    /// Latencies of reads and writes together.
    pub fn latencies(&self) -> Latencies {
        let mut both = self.reads.clone();
        both += &self.writes;
        both
    }
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A queue could not be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An operation failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// There is no room to keep them apart.
    #[error(
        "{depth} operations of {block_size} bytes at a time need a region of {needed} bytes, and it has {size}"
    )]
    TooSmall {
        /// Operations in flight.
        depth: usize,
        /// Bytes of each.
        block_size: usize,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are there.
        size: u64,
    },
}

/// Blocks that a region has at least for each operation in flight.
pub const BLOCKS_PER_DEPTH: u64 = 4;

/// Runs a load: on one queue where the engine keeps several operations in flight, and on as many queues, each with its own
/// thread, where it does one at a time.
pub fn run<N: Namespace>(namespace: &N, load: &Load) -> Result<Measured, LoadError> {
    let size = load.region.end - load.region.start;
    let needed = BLOCKS_PER_DEPTH * load.depth as u64 * load.block_size as u64;
    if size < needed {
        return Err(LoadError::TooSmall { depth: load.depth, block_size: load.block_size, needed, size });
    }
    let calls = SystemCalls::new().ok();
    let mut phases = Phases::new(load, calls.as_ref());
    if !namespace.geometry().blocks.transfer {
        return Queue::new(namespace.open_queue()?, load).run(&mut phases);
    }
    let part = size / load.depth as u64 / load.block_size as u64 * load.block_size as u64;
    let results: Vec<Result<Measured, LoadError>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..load.depth as u64)
            .map(|index| {
                let start = load.region.start + index * part;
                let load =
                    Load { depth: 1, region: start..start + part, seed: load.seed + index, ..load.clone() };
                let mut phases = phases.without_counts();
                scope.spawn(move || Queue::new(namespace.open_queue()?, &load).run(&mut phases))
            })
            .collect();
        let first = Load { depth: 1, region: load.region.start..load.region.start + part, ..load.clone() };
        let first = namespace
            .open_queue()
            .map_err(LoadError::from)
            .and_then(|queue| Queue::new(queue, &first).run(&mut phases));
        let others = others.into_iter().map(|thread| thread.join().expect("a load does not panic"));
        std::iter::once(first).chain(others).collect()
    });
    let mut sum: Option<Measured> = None;
    for result in results {
        let one = result?;
        sum = Some(match sum {
            None => one,
            Some(mut sum) => {
                sum.count += one.count;
                sum.elapsed = sum.elapsed.max(one.elapsed);
                sum.reads += &one.reads;
                sum.writes += &one.writes;
                sum.context_switches = sum.context_switches.max(one.context_switches);
                sum
            }
        });
    }
    let mut sum = sum.expect("there is at least one queue");
    // The calls of all threads in the warm-up, by the operations of this thread in it.
    sum.system_calls_per_io = sum.system_calls_per_io.map(|calls| calls / load.depth as f64);
    Ok(sum)
}

/// When warm-up and measurement end, and what is counted in each.
struct Phases<'a> {
    warm: Instant,
    end: Instant,
    calls: Option<&'a SystemCalls>,
}

impl<'a> Phases<'a> {
    fn new(load: &Load, calls: Option<&'a SystemCalls>) -> Phases<'a> {
        let warm = Instant::now() + load.warm_up;
        Phases { warm, end: warm + load.duration, calls }
    }

    fn without_counts(&self) -> Phases<'static> {
        Phases { warm: self.warm, end: self.end, calls: None }
    }
}

/// An operation in flight.
#[derive(Clone, Copy)]
struct Slot {
    started: Instant,
    block: u64,
    is_write: bool,
}

/// One queue under load.
struct Queue<'a, D> {
    device: D,
    load: &'a Load,
    random: Random,
    block_count: u64,
    /// The next block of a sequential pattern.
    next: u64,
    slots: Vec<Option<Slot>>,
    /// Indices of empty slots.
    empty: Vec<usize>,
    /// Blocks that are being read or written.
    busy: BTreeSet<u64>,
    spare: Vec<DmaBuf>,
}

impl<'a, D: Device> Queue<'a, D> {
    fn new(device: D, load: &'a Load) -> Queue<'a, D> {
        Queue {
            block_count: (load.region.end - load.region.start) / load.block_size as u64,
            random: Random::new(load.seed),
            next: 0,
            slots: vec![None; load.depth],
            empty: (0..load.depth).rev().collect(),
            busy: BTreeSet::new(),
            spare: Vec::with_capacity(load.depth),
            device,
            load,
        }
    }

    fn run(&mut self, phases: &mut Phases<'_>) -> Result<Measured, LoadError> {
        if let Some(calls) = phases.calls {
            calls.enable(true);
        }
        let warmed = self.phase(phases.warm)?;
        let system_calls_per_io = phases.calls.filter(|_| warmed.count > 0).map(|calls| {
            calls.enable(false);
            calls.count() as f64 / warmed.count as f64
        });
        let (started, switches) = (Instant::now(), context_switches());
        let mut measured = self.phase(phases.end)?;
        measured.elapsed = started.elapsed();
        measured.context_switches = context_switches() - switches;
        measured.system_calls_per_io = system_calls_per_io;
        let mut ignored = measured.clone();
        while self.device.in_flight() > 0 {
            self.step(&mut ignored, false)?;
        }
        Ok(measured)
    }

    fn phase(&mut self, end: Instant) -> Result<Measured, LoadError> {
        let mut measured = Measured {
            count: 0,
            elapsed: Duration::ZERO,
            reads: latencies(),
            writes: latencies(),
            context_switches: 0,
            system_calls_per_io: None,
        };
        // At least once, so that a machine that is late has a figure too.
        loop {
            self.step(&mut measured, true)?;
            if Instant::now() >= end {
                return Ok(measured);
            }
        }
    }

    /// Fills the queue and takes at least one completion.
    fn step(&mut self, measured: &mut Measured, is_filling: bool) -> Result<(), LoadError> {
        while is_filling && let Some(index) = self.empty.pop() {
            if !self.submit(index)? {
                self.empty.push(index);
                break;
            }
        }
        let mut done: Vec<IoDone> = Vec::with_capacity(self.load.depth);
        let mut idle = None;
        while self.device.poll(&mut done) == 0 {
            if self.device.in_flight() == 0 {
                return Ok(());
            }
            rest(&self.device, &mut idle);
        }
        let now = Instant::now();
        for IoDone { token, buf, status } in done {
            status?;
            let index = token.0 as usize;
            let slot = self.slots[index].take().expect("only what is in flight finishes");
            self.busy.remove(&slot.block);
            self.empty.push(index);
            self.spare.extend(buf);
            measured.count += 1;
            let histogram = if slot.is_write { &mut measured.writes } else { &mut measured.reads };
            record(histogram, now - slot.started);
        }
        Ok(())
    }

    /// Starts one operation; `false` when the device has no room for it now.
    fn submit(&mut self, index: usize) -> Result<bool, LoadError> {
        let is_write = match self.load.pattern {
            Pattern::RandomRead | Pattern::SequentialRead => false,
            Pattern::RandomWrite | Pattern::SequentialWrite => true,
            Pattern::Mixed => self.random.chance(30, 100),
        };
        let Some(buf) = self.buffer() else { return Ok(false) };
        // There are at least four times as many blocks as operations in flight.
        let block = loop {
            let block = match self.load.pattern.is_sequential() {
                true => {
                    self.next = (self.next + 1) % self.block_count;
                    self.next
                }
                false => self.random.below(self.block_count),
            };
            if !self.busy.contains(&block) {
                break block;
            }
        };
        let offset = self.load.region.start + block * self.load.block_size as u64;
        let op = if is_write { IoOp::Write { offset, buf, fua: false } } else { IoOp::Read { offset, buf } };
        let started = Instant::now();
        match self.device.submit(Io { token: Token(index as u64), op }) {
            Ok(()) => {
                self.slots[index] = Some(Slot { started, block, is_write });
                self.busy.insert(block);
                Ok(true)
            }
            Err(rejected) => {
                self.spare.extend(rejected.io.op.into_buf());
                match rejected.why {
                    Refusal::Full => Ok(false),
                    Refusal::Failed(error) => Err(error.into()),
                }
            }
        }
    }

    fn buffer(&mut self) -> Option<DmaBuf> {
        self.spare.pop().or_else(|| {
            let mut buf = self.device.allocate(self.load.block_size)?;
            super::fill(&mut buf, self.random.next_u64());
            Some(buf)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::kernel::{KernelEngine, KernelNamespace};
    use crate::device::uring::UringNamespace;

    fn load(pattern: Pattern, depth: usize) -> Load {
        Load {
            pattern,
            block_size: 4096,
            depth,
            region: (1 << 20)..(3 << 20),
            warm_up: Duration::from_millis(20),
            duration: Duration::from_millis(60),
            seed: 1,
        }
    }

    #[test]
    fn each_pattern_reads_and_writes_what_it_says_and_only_its_region() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        drop(KernelNamespace::open(KernelEngine::Buffered, &path, Some(4 << 20)).unwrap());
        for pattern in Pattern::ALL {
            std::fs::write(&path, vec![0; 4 << 20]).unwrap();
            let namespace = UringNamespace::open(&path, &Default::default()).unwrap();
            let measured = run(&namespace, &load(pattern, 16)).unwrap();
            drop(namespace);
            let (reads, writes) = (measured.reads.len(), measured.writes.len());
            assert_eq!(measured.count, reads + writes, "{pattern:?}");
            match pattern {
                Pattern::RandomRead | Pattern::SequentialRead => assert!(reads > 0 && writes == 0),
                Pattern::RandomWrite | Pattern::SequentialWrite => assert!(reads == 0 && writes > 0),
                // 70 to 30; a hundred or more of them are never all of one kind.
                Pattern::Mixed => assert!(measured.count < 100 || (reads > writes && writes > 0)),
            }
            let bytes = std::fs::read(&path).unwrap();
            let is_written = |range: std::ops::Range<usize>| bytes[range].iter().any(|byte| *byte != 0);
            assert!(!is_written(0..1 << 20) && !is_written(3 << 20..4 << 20), "{pattern:?}");
            // What a mixed load writes may be what it has read before.
            if pattern != Pattern::Mixed {
                assert_eq!(is_written(1 << 20..3 << 20), !pattern.is_read_only(), "{pattern:?}");
            }
        }
    }

    #[test]
    fn engines_that_do_one_at_a_time_get_a_thread_for_each() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        let namespace = KernelNamespace::open(KernelEngine::Sync, &path, Some(4 << 20)).unwrap();
        let measured = run(&namespace, &load(Pattern::Mixed, 4)).unwrap();
        assert!(measured.count > 0 && measured.latencies().len() == measured.count);
    }

    #[test]
    fn a_region_without_room_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        let namespace = KernelNamespace::open(KernelEngine::Sync, &path, Some(4 << 20)).unwrap();
        let error = run(&namespace, &load(Pattern::RandomWrite, 256)).unwrap_err();
        assert!(matches!(error, LoadError::TooSmall { needed: 4_194_304, size: 2_097_152, .. }), "{error}");
    }
}

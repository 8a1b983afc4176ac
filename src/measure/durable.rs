//! What it takes to make one write durable, one after the other: a write and a flush, or a FUA write.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::{Latencies, fill, latencies, record, run_one};
use crate::device::{Device, IoError, IoOp};

/// Where the writes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// One block after the other; it ends early at the end of the region.
    Once,
    /// One block after the other, from the start again at the end.
    Around,
    /// The same block every time.
    Same,
}

/// What is to be done.
#[derive(Debug, Clone)]
pub struct DurableLoad {
    /// Bytes of one write.
    pub block_size: usize,
    /// Bytes of the device that are used.
    pub region: Range<u64>,
    /// Where the writes go.
    pub order: Order,
    /// FUA writes rather than flushes.
    pub fua: bool,
    /// How long.
    pub duration: Duration,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct Durable {
    /// From the submission of the write until it was durable.
    pub total: Latencies,
    /// The flush alone; empty for FUA writes.
    pub flush: Latencies,
    /// The write alone.
    pub write: Latencies,
    /// The time.
    pub elapsed: Duration,
}

/// Runs a load.
pub fn run<D: Device>(device: &mut D, load: &DurableLoad) -> Result<Durable, IoError> {
    let mut measured =
        Durable { total: latencies(), flush: latencies(), write: latencies(), elapsed: Duration::ZERO };
    let mut spare = device.allocate(load.block_size);
    if let Some(buf) = &mut spare {
        fill(buf, load.region.start);
    }
    let block_count = (load.region.end - load.region.start) / load.block_size as u64;
    let started = Instant::now();
    for index in 0.. {
        if started.elapsed() >= load.duration || (load.order == Order::Once && index == block_count) {
            break;
        }
        let Some(buf) = spare.take() else { break };
        let block = if load.order == Order::Same { 0 } else { index % block_count };
        let offset = load.region.start + block * load.block_size as u64;
        let begun = Instant::now();
        spare = run_one(device, IoOp::Write { offset, buf, fua: load.fua })?.buf;
        let written = begun.elapsed();
        if !load.fua {
            run_one(device, IoOp::Flush)?;
            record(&mut measured.flush, begun.elapsed() - written);
        }
        record(&mut measured.write, written);
        record(&mut measured.total, begun.elapsed());
    }
    measured.elapsed = started.elapsed();
    Ok(measured)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Namespace;
    use crate::device::kernel::{KernelEngine, KernelNamespace};

    #[test]
    fn writes_go_where_they_are_told_and_each_has_its_flush() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        drop(KernelNamespace::open(KernelEngine::Sync, &path, Some(4 << 20)).unwrap());
        let region = (1 << 20)..(1 << 20) + 8 * 4096;
        for (order, fua) in [(Order::Once, false), (Order::Around, true), (Order::Same, false)] {
            std::fs::write(&path, vec![0; 4 << 20]).unwrap();
            let namespace = KernelNamespace::open(KernelEngine::Sync, &path, None).unwrap();
            let mut device = namespace.open_queue().unwrap();
            // What goes once ends by itself, the others with the time.
            let duration = Duration::from_millis(if order == Order::Once { 3_600_000 } else { 200 });
            let load = DurableLoad { block_size: 4096, region: region.clone(), order, fua, duration };
            let measured = run(&mut device, &load).unwrap();
            assert_eq!(measured.flush.len(), if fua { 0 } else { measured.total.len() });
            assert!(order != Order::Once || measured.total.len() == 8);
            let written = if order == Order::Same { 1 } else { measured.total.len().min(8) };
            let bytes = std::fs::read(&path).unwrap();
            let blocks =
                bytes.chunks(4096).enumerate().filter(|(_, block)| block.iter().any(|byte| *byte != 0));
            let found: Vec<usize> = blocks.map(|(index, _)| index).collect();
            assert_eq!(found, (256..256 + written as usize).collect::<Vec<_>>(), "{order:?}");
        }
    }
}

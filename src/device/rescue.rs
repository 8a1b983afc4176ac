//! A device as somebody sees it who saves what is on it: nothing is ever written, and where a part of it is missing, reads
//! fail there instead of everywhere.

use std::os::fd::BorrowedFd;

use super::{Device, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Refusal, Rejected};

/// A device that is only read, and may have been longer once.
pub struct RescueDevice<D> {
    inner: D,
    geometry: Geometry,
    /// Reads beyond the device's end, on their way back.
    beyond: Vec<IoDone>,
}

impl<D: Device> RescueDevice<D> {
    /// A view of a device that is only read.
    pub fn new(inner: D) -> RescueDevice<D> {
        let geometry = inner.geometry().clone();
        RescueDevice { inner, geometry, beyond: Vec::new() }
    }

    /// Shows the device with the size that it once had; what is missing can't be read.
    pub fn extend_to(&mut self, size: u64) {
        let block_count = size.div_ceil(u64::from(self.geometry.block_size));
        self.geometry.block_count = self.geometry.block_count.max(block_count);
    }

    /// Bytes that are really there.
    pub fn real_size(&self) -> u64 {
        self.inner.geometry().size()
    }
}

impl<D: Device> Device for RescueDevice<D> {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn allocate(&mut self, size: usize) -> Option<DmaBuf> {
        self.inner.allocate(size)
    }

    fn submit(&mut self, io: Io) -> Result<(), Rejected> {
        let (offset, size) = match &io.op {
            IoOp::Read { offset, buf } => (*offset, buf.len() as u64),
            IoOp::Write { offset, buf, .. } => return Err(refused(*offset, buf.len() as u64, io)),
            IoOp::Deallocate { offset, size } => return Err(refused(*offset, *size, io)),
            IoOp::Flush => return Err(refused(0, 0, io)),
        };
        let end = offset.saturating_add(size);
        if end <= self.real_size() || end > self.geometry.size() {
            return self.inner.submit(io);
        }
        let IoOp::Read { buf, .. } = io.op else { return Ok(()) };
        let status = Err(IoError::UnrecoveredRead { offset, size });
        self.beyond.push(IoDone { token: io.token, buf: Some(buf), status });
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let count = self.beyond.len();
        done.append(&mut self.beyond);
        count + self.inner.poll(done)
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.beyond.len()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.wake_fd()
    }
}

fn refused(offset: u64, size: u64, io: Io) -> Rejected {
    let cause = "this device is only read";
    Rejected { io, why: Refusal::Failed(IoError::Invalid { offset, size, cause }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::blocking;
    use crate::device::sim::{SimConfig, SimDisk};

    #[test]
    fn it_writes_nothing_and_fails_only_where_something_is_missing() {
        let disk = SimDisk::new(SimConfig { block_count: 64, ..SimConfig::default() }, 1);
        let block = disk.open_queue().geometry().block_size as usize;
        let mut plain = disk.open_queue();
        blocking::write(&mut plain, 0, &vec![7; 64 * block]).unwrap();
        drop(plain);
        let mut rescue = RescueDevice::new(disk.open_queue());
        assert!(matches!(blocking::write(&mut rescue, 0, &vec![9; block]), Err(IoError::Invalid { .. })));
        rescue.extend_to(100 * block as u64);
        assert_eq!(rescue.geometry().block_count, 100);
        let last = 63 * block as u64;
        assert_eq!(blocking::read(&mut rescue, last, block), Ok(vec![7; block]));
        for (offset, size) in [(last, 2 * block), (last + block as u64, block), (99 * block as u64, block)] {
            let missing = blocking::read(&mut rescue, offset, size);
            assert!(matches!(missing, Err(IoError::UnrecoveredRead { .. })), "{missing:?}");
        }
        let outside = blocking::read(&mut rescue, 100 * block as u64, block);
        assert!(matches!(outside, Err(IoError::Invalid { .. })), "{outside:?}");
        assert_eq!(rescue.in_flight(), 0);
    }
}

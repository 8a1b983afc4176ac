//! Whole transfers through plain system calls: what the engines that block, and the threads of the others, are made of.
//!
//! The traps of the calls are handled here once: a short transfer goes on where it ended, EINTR is no error, EAGAIN is one
//! only when it stays, and a transfer that moves nothing any more has met the end of a file that was cut short.

use std::fs::File;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

/// How often one operation is tried again after EAGAIN before that is its error.
pub(super) const RETRY_COUNT_MAX: u32 = 64;

/// Fills the buffer.
pub(super) fn read(file: &File, offset: u64, buf: &mut [u8]) -> Result<(), Errno> {
    whole(buf.len(), |done| rustix::io::pread(file, &mut buf[done..], offset + done as u64))
}

/// Writes the buffer; durably where `fua`.
pub(super) fn write(file: &File, offset: u64, buf: &[u8], fua: bool) -> Result<(), Errno> {
    let flags = if fua { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
    whole(buf.len(), |done| {
        rustix::io::pwritev2(file, &[std::io::IoSlice::new(&buf[done..])], offset + done as u64, flags)
    })
}

/// Makes what was written durable. An error other than EINTR is final: it is never tried again.
pub(super) fn flush(file: &File) -> Result<(), Errno> {
    uninterrupted(|| rustix::fs::fdatasync(file))
}

/// Gives the space of a range of a file back.
pub(super) fn deallocate(file: &File, offset: u64, size: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    uninterrupted(|| rustix::fs::fallocate(file, flags, offset, size))
}

fn uninterrupted(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// Calls until `size` bytes have moved. The call is told how many have already.
fn whole(size: usize, mut call: impl FnMut(usize) -> Result<usize, Errno>) -> Result<(), Errno> {
    let (mut done, mut retries) = (0, 0);
    while done < size {
        match call(done) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if retries < RETRY_COUNT_MAX => {
                retries += 1;
                std::thread::yield_now();
            }
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `whole` over what each call is to answer; returns its result and where each call began.
    fn script(size: usize, answers: &[Result<usize, Errno>]) -> (Result<(), Errno>, Vec<usize>) {
        let mut starts = Vec::new();
        let result = whole(size, |done| {
            starts.push(done);
            answers[starts.len() - 1]
        });
        (result, starts)
    }

    #[test]
    fn short_transfers_go_on_where_they_ended() {
        assert_eq!(script(10, &[Ok(4), Err(Errno::INTR), Ok(1), Ok(5)]), (Ok(()), vec![0, 4, 4, 5]));
        assert_eq!(script(10, &[Ok(4), Ok(0)]), (Err(Errno::IO), vec![0, 4]));
        assert_eq!(script(10, &[Ok(4), Err(Errno::NOSPC)]), (Err(Errno::NOSPC), vec![0, 4]));
    }

    #[test]
    fn eagain_passes_or_is_the_error_in_the_end() {
        assert_eq!(script(2, &[Err(Errno::AGAIN), Ok(2)]), (Ok(()), vec![0, 0]));
        let (result, starts) = script(2, &[Err(Errno::AGAIN); 100]);
        assert_eq!((result, starts.len()), (Err(Errno::AGAIN), RETRY_COUNT_MAX as usize + 1));
    }

    #[test]
    fn a_failed_flush_is_not_tried_again() {
        let mut calls = 0;
        let result = uninterrupted(|| {
            calls += 1;
            Err(if calls == 1 { Errno::INTR } else { Errno::IO })
        });
        assert_eq!((result, calls), (Err(Errno::IO), 2));
    }
}

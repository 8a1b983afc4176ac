//! Linux AIO as the kernel offers it (`linux/aio_abi.h`): io_setup, io_submit, io_getevents and io_destroy. Neither the C library
//! nor rustix has them.

use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::io::Errno;

use crate::device::{DeviceError, IoOp};

/// One operation as the kernel reads it; it copies it during `io_submit`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Iocb {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    rw_flags: u32,
    #[cfg(target_endian = "big")]
    key: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

/// A completion as the kernel writes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct IoEvent {
    /// The key of the operation.
    pub(super) data: u64,
    object: u64,
    /// Bytes that were moved, or a negative errno.
    pub(super) result: i64,
    result2: i64,
}

const _: () = assert!(size_of::<IoEvent>() == 32);

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DATA_SYNC: u16 = 3;
const FLAG_EVENT_FD: u32 = 1;

impl Iocb {
    /// The rest of `op`, of which `moved` bytes are done. `None` for what the interface has no command for.
    pub(super) fn new(key: usize, op: &mut IoOp, moved: usize, fd: RawFd, event_fd: RawFd) -> Option<Iocb> {
        let common = Iocb {
            data: key as u64,
            fd: fd as u32,
            flags: FLAG_EVENT_FD,
            event_fd: event_fd as u32,
            ..Iocb::default()
        };
        let at = |offset: &u64| (*offset + moved as u64) as i64;
        match op {
            IoOp::Read { offset, buf } => {
                let rest = &mut buf[moved..];
                let (buf, len) = (rest.as_mut_ptr() as u64, rest.len() as u64);
                Some(Iocb { opcode: COMMAND_READ, buf, len, offset: at(offset), ..common })
            }
            IoOp::Write { offset, buf, fua } => {
                let rest = &buf[moved..];
                let (buf, len) = (rest.as_ptr() as u64, rest.len() as u64);
                let rw_flags = if *fua { libc::RWF_DSYNC as u32 } else { 0 };
                Some(Iocb { opcode: COMMAND_WRITE, rw_flags, buf, len, offset: at(offset), ..common })
            }
            IoOp::Flush => Some(Iocb { opcode: COMMAND_DATA_SYNC, ..common }),
            IoOp::Deallocate { .. } => None,
        }
    }
}

/// The head of the queue of completions, which the kernel maps where the context's handle says. The C library for AIO reads it
/// the same way.
#[repr(C)]
struct Ring {
    _id: u32,
    _entry_count: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
}

const RING_MAGIC: u32 = 0xa10a_10a1;

/// A context of the kernel's: a queue of completions, charged to the system's limit.
#[derive(Debug)]
pub(super) struct Context(libc::c_ulong);

impl Context {
    /// Asks for a context with room for so many operations.
    pub(super) fn new(depth: u32) -> Result<Context, DeviceError> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word where the pointer says, which must be 0 before.
        let code = unsafe { libc::syscall(libc::SYS_io_setup, libc::c_long::from(depth), &raw mut context) };
        result(code).map(|_| Context(context)).map_err(|errno| unavailable(errno, depth))
    }

    /// Submits operations and returns how many of them, from the first on, the kernel has taken. An error concerns the
    /// first; then it has taken none.
    ///
    /// # Safety
    /// The buffers that they name stay in place and untouched until the completion with their key was taken, or until the
    /// context was dropped.
    pub(super) unsafe fn submit(&self, iocbs: &mut [*mut Iocb]) -> Result<usize, Errno> {
        let count = iocbs.len() as libc::c_long;
        // SAFETY: each pointer is to an operation that outlives the call; what those name is the caller's promise.
        result(unsafe { libc::syscall(libc::SYS_io_submit, self.0, count, iocbs.as_mut_ptr()) })
    }

    /// Whether there is certainly nothing to take, without a system call.
    pub(super) fn is_empty(&self) -> bool {
        // SAFETY: the kernel maps a page there that begins with a ring, until the context is destroyed, and changes of it only
        // what is atomic here.
        let ring = unsafe { &*ptr::with_exposed_provenance::<Ring>(self.0 as usize) };
        ring.magic == RING_MAGIC && ring.head.load(Ordering::Acquire) == ring.tail.load(Ordering::Acquire)
    }

    /// Takes completions: waits for `least` of them, and not longer than so many seconds.
    pub(super) fn completions(
        &self,
        events: &mut [IoEvent],
        least: usize,
        seconds: i64,
    ) -> Result<usize, Errno> {
        let mut limit = libc::timespec { tv_sec: seconds, tv_nsec: 0 };
        let (least, most) = (least as libc::c_long, events.len() as libc::c_long);
        let (to, limit) = (events.as_mut_ptr(), ptr::from_mut(&mut limit));
        // SAFETY: the kernel writes at most `most` completions, for which there is room, and reads the time limit.
        result(unsafe { libc::syscall(libc::SYS_io_getevents, self.0, least, most, to, limit) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is this value's own. The call waits for what is still under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

fn result(code: libc::c_long) -> Result<usize, Errno> {
    usize::try_from(code)
        .map_err(|_| Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// Why there is no context, and what to do.
pub(super) fn unavailable(errno: Errno, depth: u32) -> DeviceError {
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/fs/{name}"))
            .map_or("?".to_owned(), |text| text.trim().to_owned())
    };
    let cause = match errno {
        Errno::AGAIN => format!(
            "the system has no room for {depth} more operations: /proc/sys/fs/aio-max-nr allows {}, and {} are taken; raise it \
             (sysctl -w fs.aio-max-nr=1048576), or use fewer --cores",
            read("aio-max-nr"),
            read("aio-nr")
        ),
        Errno::NOSYS => "this kernel has no Linux AIO (CONFIG_AIO)".to_owned(),
        Errno::PERM | Errno::ACCESS => {
            format!("Linux AIO is forbidden here, as seccomp profiles can do ({errno})")
        }
        Errno::NOMEM => format!("there is no memory for its queue ({errno})"),
        errno => format!("the kernel refused a context ({})", std::io::Error::from(errno)),
    };
    DeviceError::EngineUnavailable {
        engine: "aio",
        cause: format!("{cause}; the pool and sync engines do without"),
    }
}

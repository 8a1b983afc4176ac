//! The engines that go through the kernel, apart from `uring`, as one type, so that what is generic over a device is compiled
//! once for all of them. One branch for each call is nothing beside what their system calls cost.

use std::os::fd::BorrowedFd;
use std::path::Path;

use super::aio::{AioDevice, AioNamespace};
use super::file::{DirectIo, FileOptions};
use super::mmap::{MmapDevice, MmapNamespace};
use super::pool::{PoolDevice, PoolNamespace};
use super::sync::{SyncDevice, SyncNamespace};
use super::{Device, DeviceError, DmaBuf, Geometry, Io, IoDone, Namespace, Rejected};

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEngine {
    /// Plain calls through the page cache.
    Buffered,
    /// Plain calls around the page cache, where the file system allows it.
    Sync,
    /// Plain calls by threads.
    Pool,
    /// Linux AIO.
    Aio,
    /// A mapping; not for serving.
    Mmap,
}

impl KernelEngine {
    /// Every one of them.
    pub const ALL: [KernelEngine; 5] = [
        KernelEngine::Buffered,
        KernelEngine::Sync,
        KernelEngine::Pool,
        KernelEngine::Aio,
        KernelEngine::Mmap,
    ];

    /// As `Geometry` and the command line have it.
    pub fn name(self) -> &'static str {
        match self {
            KernelEngine::Buffered => "buffered",
            KernelEngine::Sync => "sync",
            KernelEngine::Pool => "pool",
            KernelEngine::Aio => "aio",
            KernelEngine::Mmap => "mmap",
        }
    }
}

/// A file or block device that was opened with one of the engines.
#[derive(Debug)]
pub enum KernelNamespace {
    /// `sync` or `buffered`.
    Sync(SyncNamespace),
    /// `pool`.
    Pool(PoolNamespace),
    /// `aio`.
    Aio(AioNamespace),
    /// `mmap`.
    Mmap(MmapNamespace),
}

/// A queue of one of the engines.
#[derive(Debug)]
pub enum KernelDevice {
    /// `sync` or `buffered`.
    Sync(SyncDevice),
    /// `pool`.
    Pool(PoolDevice),
    /// `aio`.
    Aio(Box<AioDevice>),
    /// `mmap`.
    Mmap(MmapDevice),
}

macro_rules! each {
    ($type:ident, $any:expr, $one:ident => $body:expr) => {
        match $any {
            $type::Sync($one) => $body,
            $type::Pool($one) => $body,
            $type::Aio($one) => $body,
            $type::Mmap($one) => $body,
        }
    };
}

impl KernelNamespace {
    /// Opens and claims what `path` names, a new file where `create_size` says so.
    pub fn open(
        engine: KernelEngine,
        path: &Path,
        create_size: Option<u64>,
    ) -> Result<KernelNamespace, DeviceError> {
        KernelNamespace::open_with_options(
            engine,
            path,
            &FileOptions { create_size, ..FileOptions::default() },
        )
    }

    /// The same with a name. Whether it goes around the page cache is the engine's matter: `aio` insists on it, as it would not be
    /// asynchronous through it; `sync` and `pool` fall back to it with a note.
    pub fn open_with_options(
        engine: KernelEngine,
        path: &Path,
        options: &FileOptions,
    ) -> Result<KernelNamespace, DeviceError> {
        let options = |direct| FileOptions { direct, ..options.clone() };
        Ok(match engine {
            KernelEngine::Buffered => Self::Sync(SyncNamespace::open(path, &options(DirectIo::Never))?),
            KernelEngine::Sync => Self::Sync(SyncNamespace::open(path, &options(DirectIo::Preferred))?),
            KernelEngine::Pool => Self::Pool(PoolNamespace::open(path, &options(DirectIo::Preferred))?),
            KernelEngine::Aio => Self::Aio(AioNamespace::open(path, &options(DirectIo::Required))?),
            KernelEngine::Mmap => Self::Mmap(MmapNamespace::open(path, &options(DirectIo::Never))?),
        })
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> Vec<String> {
        each!(KernelNamespace, self, one => one.notes())
    }
}

impl Namespace for KernelNamespace {
    type Queue = KernelDevice;

    fn geometry(&self) -> &Geometry {
        each!(KernelNamespace, self, one => one.geometry())
    }

    fn open_queue(&self) -> Result<KernelDevice, DeviceError> {
        Ok(match self {
            KernelNamespace::Sync(one) => KernelDevice::Sync(one.open_queue()?),
            KernelNamespace::Pool(one) => KernelDevice::Pool(one.open_queue()?),
            KernelNamespace::Aio(one) => KernelDevice::Aio(Box::new(one.open_queue()?)),
            KernelNamespace::Mmap(one) => KernelDevice::Mmap(one.open_queue()?),
        })
    }

    fn name(&self) -> &str {
        each!(KernelNamespace, self, one => one.name())
    }
}

impl Device for KernelDevice {
    fn geometry(&self) -> &Geometry {
        each!(KernelDevice, self, one => one.geometry())
    }

    fn allocate(&mut self, size: usize) -> Option<DmaBuf> {
        each!(KernelDevice, self, one => one.allocate(size))
    }

    fn submit(&mut self, io: Io) -> Result<(), Rejected> {
        each!(KernelDevice, self, one => one.submit(io))
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        each!(KernelDevice, self, one => one.poll(done))
    }

    fn in_flight(&self) -> usize {
        each!(KernelDevice, self, one => one.in_flight())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        each!(KernelDevice, self, one => one.wake_fd())
    }
}

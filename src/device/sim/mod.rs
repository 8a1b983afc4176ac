//! A simulated disk: deterministic, and stricter than real hardware.
//!
//! A [`SimDisk`] is a handle to one medium; [`SimDisk::open_queue`] gives a queue pair on it. Everything that happens is a
//! function of the configuration, one seed and the calls made: no clock, no thread, no randomness of the host.
//!
//! Where it is stricter than a drive:
//! - Completions come in random order, some polls after their submission, several at a time.
//! - In-flight operations that overlap (unless both are reads) are a panic that names both.
//! - Blocks that were never written, or were deallocated, read back as noise, and so does the memory of fresh buffers.
//! - At a crash any subset of the writes that are not durable persists, torn at the configured piece.
//!
//! A flush makes durable what had completed when it was submitted, on every queue, and nothing else. Reads see completed
//! writes, durable or not. When the power is cut, submissions are refused as `Gone` and polls find nothing; what was in
//! flight or cached stays as it was, so that images of every possible outcome can be taken from then on.

mod crash;
mod fault;
mod image;
mod medium;
mod queue;
pub mod random;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

pub use crash::{CrashChoice, Keep, Tear, UnflushedWrite};
pub use fault::{Fault, FaultKind, FaultOp};
pub use image::Image;
pub use queue::SimDevice;

use super::heap_pool::HeapPool;
use super::{Blocks, Deallocate, Geometry};
use crate::limits;
use medium::Medium;
use random::mix;

/// What a simulated disk is like.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Bytes of one block.
    pub block_size: u32,
    /// Blocks on the disk. Only what is written takes memory.
    pub block_count: u64,
    /// Completed writes are durable only after a flush.
    pub volatile_cache: bool,
    /// FUA writes are durable at completion; otherwise FUA does nothing.
    pub fua: bool,
    /// Commands that one queue takes.
    pub depth: u32,
    /// The most bytes of one read or write.
    pub transfer_size_max: u32,
    /// How writes tear.
    pub tear: Tear,
    /// What deallocation does; advisory gives noise.
    pub deallocate: Deallocate,
    /// An operation completes at a random one of the next so many polls.
    pub delay_polls_max: u64,
    /// Bytes that the disk transfers between two polls of a queue: what is in flight stands in line for it, in the order of
    /// submission. `None` for a disk that does everything at once. Only for disks with one queue, since each has its own polls.
    pub bytes_per_poll: Option<u64>,
    /// Bytes of buffers that may be out.
    pub dma_size_max: usize,
}

impl Default for SimConfig {
    fn default() -> SimConfig {
        SimConfig {
            block_size: 4096,
            block_count: (64 << 20) / 4096,
            volatile_cache: true,
            fua: true,
            depth: 32,
            transfer_size_max: 1 << 20,
            tear: Tear::Sector512,
            deallocate: Deallocate::Advisory,
            delay_polls_max: 4,
            bytes_per_poll: None,
            dma_size_max: limits::DMA_SIZE_MAX,
        }
    }
}

impl SimConfig {
    /// The geometry that a disk like this reports.
    pub fn geometry(&self) -> Geometry {
        assert!(
            self.block_size.is_power_of_two() && (512..=65_536).contains(&self.block_size),
            "a block of {} bytes",
            self.block_size
        );
        Geometry {
            engine: "sim",
            block_size: self.block_size,
            read_alignment: 512,
            block_count: self.block_count,
            transfer_size_max: self.transfer_size_max,
            optimal_boundary_size: 0,
            volatile_cache: self.volatile_cache,
            fua: self.fua,
            atomic_size: self.tear.size(self.block_size) as u32,
            deallocate: self.deallocate,
            blocks: Blocks::NEVER,
            memory_alignment: 1,
            registered_buffers: false,
            depth: self.depth,
            partition_block_size: 512.max(self.block_size.min(4096)),
        }
    }
}

/// A handle to a simulated disk. Clones are handles to the same one.
#[derive(Clone)]
pub struct SimDisk {
    medium: Rc<RefCell<Medium>>,
    pool: Rc<HeapPool>,
}

impl SimDisk {
    /// A disk on which nothing was ever written.
    pub fn new(config: SimConfig, seed: u64) -> SimDisk {
        let image = Image::pristine(config.block_size, mix(seed));
        SimDisk::from_image(config, seed, image)
    }

    /// A disk that holds `image`, idle.
    pub fn from_image(config: SimConfig, seed: u64, image: Image) -> SimDisk {
        assert!(image.block_size() == config.block_size as usize, "an image of another block size");
        let pool = HeapPool::new(config.dma_size_max);
        SimDisk { medium: Rc::new(RefCell::new(Medium::new(config, seed, image))), pool }
    }

    /// Opens a queue pair.
    pub fn open_queue(&self) -> SimDevice {
        SimDevice::new(self.clone())
    }

    /// How it was configured.
    pub fn config(&self) -> SimConfig {
        self.medium.borrow().config.clone()
    }

    /// The geometry that its queues report.
    pub fn geometry(&self) -> Geometry {
        self.medium.borrow().geometry.clone()
    }

    // What happened.

    /// Submissions taken and completions delivered so far: the boundaries at which a crash is a different crash.
    pub fn events(&self) -> u64 {
        self.medium.borrow().events
    }

    /// One word for everything that was submitted and completed, to compare two runs of one seed.
    pub fn trace_hash(&self) -> u64 {
        self.medium.borrow().trace
    }

    /// Buffers that were allocated and not yet dropped, in flight ones among them.
    pub fn outstanding_buffers(&self) -> usize {
        self.pool.outstanding()
    }

    // Crashes.

    /// Cuts the power right after the event of this number (the first is 1; 0 is at once).
    pub fn power_cut_at(&self, event: u64) {
        self.medium.borrow_mut().cut_at = Some(event);
    }

    /// Whether the power was cut or the device is gone.
    pub fn is_off(&self) -> bool {
        self.medium.borrow().is_off()
    }

    /// The writes that are not durable, in the order of submission.
    pub fn unflushed(&self) -> Vec<UnflushedWrite> {
        self.medium.borrow().unflushed()
    }

    /// Another disk: what is durable on this one, with the chosen writes applied in the order given. Panics when an id is
    /// not among [`unflushed`](SimDisk::unflushed).
    pub fn image_with(&self, choices: &[(u64, Keep)]) -> SimDisk {
        let image = self.medium.borrow().image_with(choices);
        self.sibling(self.events(), image)
    }

    /// Another disk: what a crash with these random choices would leave.
    pub fn crash_image(&self, seed: u64) -> SimDisk {
        let choices = self.pick(&mut CrashChoice::seeded(seed));
        let image = self.medium.borrow().image_with(&choices);
        self.sibling(seed, image)
    }

    /// Crashes this disk and powers it up again: what was open on it is dead, and what was not durable is as chosen.
    /// Faults that were scheduled stay.
    pub fn crash(&self, choice: &mut CrashChoice) {
        let choices = self.pick(choice);
        let image = self.medium.borrow().image_with(&choices);
        self.medium.borrow_mut().restart(image);
    }

    fn pick(&self, choice: &mut CrashChoice) -> Vec<(u64, Keep)> {
        let medium = self.medium.borrow();
        choice.pick(&medium.unflushed(), medium.piece())
    }

    fn sibling(&self, seed: u64, image: Image) -> SimDisk {
        let disk = SimDisk::from_image(self.config(), mix(seed), image);
        disk.medium.borrow_mut().unreadable = self.medium.borrow().unreadable.clone();
        disk
    }

    // Faults.

    /// Schedules a fault.
    pub fn inject(&self, fault: Fault) {
        self.medium.borrow_mut().faults.add(fault);
    }

    /// Operations that scheduled faults have hit.
    pub fn faults_struck(&self) -> u64 {
        self.medium.borrow().faults.struck
    }

    /// Forgets every scheduled fault.
    pub fn clear_faults(&self) {
        self.medium.borrow_mut().faults.clear();
    }

    /// Aborts everything in flight, as a controller reset does; of the writes, a random part was applied. The aborted
    /// operations complete at the next poll.
    pub fn reset_controller(&self) {
        self.medium.borrow_mut().reset_controller();
    }

    /// The device is gone: submissions are refused and polls find nothing.
    pub fn remove(&self) {
        self.medium.borrow_mut().gone = true;
    }

    // Damage.

    /// Flips a bit (0 to 7) of the byte at this offset.
    pub fn flip_bit(&self, offset: u64, bit: u32) {
        self.medium.borrow_mut().damage(offset, |bytes| bytes[0] ^= 1 << bit, 1);
    }

    /// Writes bytes at any offset, behind the host's back.
    pub fn overwrite(&self, offset: u64, bytes: &[u8]) {
        self.medium.borrow_mut().damage(offset, |target| target.copy_from_slice(bytes), bytes.len());
    }

    /// Exchanges the contents of two blocks.
    pub fn swap_blocks(&self, first: u64, second: u64) {
        let size = self.config().block_size;
        let at = |block: u64| block * u64::from(size);
        let (a, b) = (self.read_raw(at(first), size as usize), self.read_raw(at(second), size as usize));
        self.overwrite(at(first), &b);
        self.overwrite(at(second), &a);
    }

    /// Makes a block unreadable until it is written again.
    pub fn make_unreadable(&self, block: u64) {
        self.medium.borrow_mut().unreadable.insert(block);
    }

    /// The bytes that a read would see now, at any offset. Costs no event.
    pub fn read_raw(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.medium.borrow().current.read(offset, &mut bytes);
        bytes
    }

    /// The blocks that hold something that was written.
    pub fn written_blocks(&self) -> Vec<u64> {
        self.medium.borrow().current.written_blocks().collect()
    }

    /// What a read of everything would see now. Cheap.
    pub fn snapshot(&self) -> Image {
        self.medium.borrow().current.clone()
    }

    /// Puts a snapshot back, durable. Nothing may be in flight; queues that were open are dead.
    pub fn restore(&self, image: &Image) {
        let mut medium = self.medium.borrow_mut();
        medium.assert_idle();
        medium.restart(image.clone());
    }
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDisk").field("events", &self.events()).finish_non_exhaustive()
    }
}

//! DMA memory of one queue: chunks from SPDK, each cut into buffers of one size.
//!
//! Invariants:
//! - A slot is in exactly one buffer or in the free list of its size.
//! - A chunk is cut anew only while none of its slots is out, so that one size can't keep the memory from the others.
//! - The chunks go back to SPDK after the last buffer, since every buffer holds the pool.
//!
//! Nothing is allocated once as many chunks are cut as the load needs.

#![expect(unsafe_code, reason = "memory of SPDK that becomes DMA buffers")]

use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use spdk_sys::{SPDK_ENV_LCORE_ID_ANY, SPDK_MALLOC_DMA, spdk_free, spdk_zmalloc};

use crate::device::DmaBuf;
use crate::device::buffer::{DMA_ALIGNMENT, DmaPool};

/// Bytes of a chunk, and of a hugepage: a rest of a hugepage is never wasted on one.
const CHUNK_SIZE: usize = 2 << 20;

/// Buffer sizes are powers of two from a page to this many bytes.
const BUFFER_SIZE_MAX: usize = 1 << 20;

/// Sizes there are.
const SIZE_COUNT: usize = (BUFFER_SIZE_MAX / DMA_ALIGNMENT).ilog2() as usize + 1;

/// Marks the class of a buffer whose memory SPDK knows; the chunk's index is added to it.
const CLASS_SPDK: u32 = 0x5350_0000;
const CLASS_MASK: u32 = 0xffff_0000;

const _: () = assert!(CHUNK_SIZE.is_multiple_of(BUFFER_SIZE_MAX));

/// Whether a device may be told to read or write the buffer's memory.
pub(super) fn is_dma(buf: &DmaBuf) -> bool {
    buf.class() & CLASS_MASK == CLASS_SPDK
}

/// A bounded pool. Its buffers keep it alive.
#[derive(Debug)]
pub(super) struct SpdkPool {
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    chunk_count_max: usize,
    chunks: Vec<Chunk>,
    free: [Vec<Slot>; SIZE_COUNT],
}

#[derive(Debug)]
struct Chunk {
    base: NonNull<u8>,
    /// Which size it is cut into.
    size_index: usize,
    out_count: usize,
}

#[derive(Debug)]
struct Slot {
    ptr: NonNull<u8>,
    chunk: usize,
}

impl SpdkPool {
    /// A pool that takes at most `size_max` bytes from SPDK.
    pub(super) fn new(size_max: usize) -> Rc<SpdkPool> {
        let chunk_count_max = (size_max / CHUNK_SIZE).clamp(1, !CLASS_MASK as usize);
        let state = State { chunk_count_max, chunks: Vec::new(), free: std::array::from_fn(|_| Vec::new()) };
        Rc::new(SpdkPool { state: RefCell::new(state) })
    }

    /// A buffer of `size` bytes, or `None` when the bound or SPDK's memory is exhausted. Its contents are unspecified.
    pub(super) fn allocate(self: &Rc<Self>, size: usize) -> Option<DmaBuf> {
        if size > BUFFER_SIZE_MAX {
            return None;
        }
        let size_index = size_index(size);
        let slot = self.state.borrow_mut().take(size_index)?;
        let pool: Rc<dyn DmaPool> = Rc::clone(self) as Rc<dyn DmaPool>;
        let class = CLASS_SPDK | slot.chunk as u32;
        // SAFETY: the slot has `slot_size` zeroed or once written bytes, page-aligned, and is in no list any more; its
        // chunk is freed after the pool's last user has gone, and the buffer is one.
        Some(unsafe { DmaBuf::from_pool(slot.ptr, size, slot_size(size_index), class, pool) })
    }
}

fn size_index(size: usize) -> usize {
    size.max(1).div_ceil(DMA_ALIGNMENT).next_power_of_two().ilog2() as usize
}

fn slot_size(size_index: usize) -> usize {
    DMA_ALIGNMENT << size_index
}

impl State {
    fn take(&mut self, size_index: usize) -> Option<Slot> {
        if self.free[size_index].is_empty() {
            let chunk = self.new_chunk(size_index).or_else(|| self.unused_chunk(size_index))?;
            self.cut(chunk);
        }
        let slot = self.free[size_index].pop()?;
        self.chunks[slot.chunk].out_count += 1;
        Some(slot)
    }

    fn new_chunk(&mut self, size_index: usize) -> Option<usize> {
        if self.chunks.len() == self.chunk_count_max {
            return None;
        }
        let lcore = SPDK_ENV_LCORE_ID_ANY as i32;
        // SAFETY: the environment is initialised, since there is a queue; a null pointer for the physical address is
        // allowed, and failure is a null result.
        let raw =
            unsafe { spdk_zmalloc(CHUNK_SIZE, DMA_ALIGNMENT, std::ptr::null_mut(), lcore, SPDK_MALLOC_DMA) };
        let base = NonNull::new(raw.cast::<u8>())?;
        self.chunks.push(Chunk { base, size_index, out_count: 0 });
        Some(self.chunks.len() - 1)
    }

    /// Takes a chunk without a buffer in use away from another size.
    fn unused_chunk(&mut self, size_index: usize) -> Option<usize> {
        let index = self.chunks.iter().position(|chunk| chunk.out_count == 0)?;
        let chunk = &mut self.chunks[index];
        self.free[chunk.size_index].retain(|slot| slot.chunk != index);
        chunk.size_index = size_index;
        Some(index)
    }

    fn cut(&mut self, index: usize) {
        let Chunk { base, size_index, .. } = self.chunks[index];
        let size = slot_size(size_index);
        for at in (0..CHUNK_SIZE).step_by(size).rev() {
            // SAFETY: `at` is within the chunk.
            let ptr = unsafe { base.add(at) };
            self.free[size_index].push(Slot { ptr, chunk: index });
        }
    }
}

impl DmaPool for SpdkPool {
    fn release(&self, ptr: NonNull<u8>, capacity: usize, class: u32) {
        let mut state = self.state.borrow_mut();
        let chunk = (class & !CLASS_MASK) as usize;
        state.chunks[chunk].out_count -= 1;
        state.free[size_index(capacity)].push(Slot { ptr, chunk });
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for chunk in &self.chunks {
            // SAFETY: it came from spdk_zmalloc, and no buffer is out: each holds the pool.
            unsafe { spdk_free(chunk.base.as_ptr().cast()) };
        }
    }
}

//! The SIMT executor: runs kernels on the CPU.
//!
//! | file | what it holds |
//! | --- | --- |
//! | `executor` | [`Executor`]: launches, in fast or in checked mode |
//! | `pool` | the worker threads over which blocks are spread |
//! | `worker` | the scheduler of a block's threads on one OS thread |
//! | `fiber` | coroutines that run the threads |
//! | `block` | the block's state; barriers, shuffles, tensor-core rendezvous |
//! | `mma` | the tensor-core product itself |
//! | `memory` | shared memory; accesses to it and to buffers |
//! | `checks`, `history`, `shadow` | checked mode: races, unwritten memory, asynchronous copies |
//! | `random` | the seeded order |
//! | `buffer` | [`Buffer`]: memory for tests of kernels |
//! | `fault` | [`Fault`]: why a launch failed |

use std::panic::Location;

pub use buffer::{Buffer, Slice};
pub use executor::Executor;
pub use fault::{Action, Fault, FaultKind, Site};
pub(crate) use memory::{
    active_shadow, async_commit, async_copy, async_wait, check_alignment, dynamic_shared, global_arrival,
    global_atomic, global_read, global_write, gpu_only, out_of_bounds, shared_atomic, shared_read, shared_write,
    static_shared,
};
pub use shadow::Shadow;

mod block;
mod buffer;
mod checks;
mod executor;
mod fault;
mod fiber;
mod history;
mod memory;
mod mma;
mod pool;
mod random;
mod shadow;
mod worker;

/// Which memory an access is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Device memory.
    Global,
    /// The block's shared memory.
    Shared,
}

#[inline(always)]
pub(crate) fn thread_idx() -> u32 {
    fiber::current(|c| c.thread.get())
}

#[inline(always)]
pub(crate) fn block_dim() -> u32 {
    let (_, block) = block::running();
    // SAFETY: the block of the running thread; a plain read.
    unsafe { (*block).threads }
}

#[inline(always)]
pub(crate) fn block_idx() -> [u32; 3] {
    let (_, block) = block::running();
    // SAFETY: as above.
    unsafe { (*block).index }
}

#[inline(always)]
pub(crate) fn grid_dim() -> [u32; 3] {
    let (_, block) = block::running();
    // SAFETY: as above.
    unsafe { (*block).grid.blocks }
}

#[inline(always)]
#[track_caller]
pub(crate) fn sync_threads() {
    block::sync_threads(Location::caller());
}

#[inline(always)]
#[track_caller]
pub(crate) fn sync_warp() {
    block::sync_warp(Location::caller());
}

#[inline(always)]
#[track_caller]
pub(crate) fn warp_exchange<R>(value: u32, read: impl FnOnce(&[u32; 32], usize) -> R) -> R {
    block::exchange(value, Location::caller(), read)
}

#[inline(always)]
#[track_caller]
pub(crate) fn mma_m16n8k16_bf16(a: [u32; 4], b: [u32; 2], c: [f32; 4]) -> [f32; 4] {
    block::product(a, b, c, Location::caller())
}
